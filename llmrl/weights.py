"""Weights on their way from the learner to servers: cut into layers, adapters merged, and as safetensors files in a folder that both see."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmrl.learner import RunFailed
from llmrl.models import Policy
from llmrl.quantize import dequantized
from llmrl.strategy import whole

_LAYER = re.compile(r"^(.*?\.\d+)\.")


def layers(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Tensors by name, one layer at a time and what lies before and behind them, so that one layer is in memory beside the model."""
    group: dict[str, Tensor] = {}
    layer: str | None = None
    for name, tensor in weights:
        here = (found := _LAYER.match(name)) and found[1]
        if group and here != layer:
            yield group
            group = {}
        layer = here
        group[name] = tensor.detach()
    if group:
        yield group


def merged(policy: Policy, adapters: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The whole model by its plain names, W + alpha / rank * B A in fp32 where there is an adapter, one tensor at a time. Collective.

    For servers that take no adapters. Where the base model is quantised, W is what its 4 bits stand for: what the learner computes with.
    """
    there, model = dict(adapters), policy.model
    config: Any = model.peft_config["default"]  # type: ignore[index]
    scale = config.lora_alpha / config.r
    for name, p in model.named_parameters():
        if ".lora_" in name:
            continue
        weight, stem = _gathered(p), name.removesuffix(".base_layer.weight")
        if stem != name:
            a, b = (there[f"{stem}.lora_{x}.default.weight"].to(weight.device, torch.float32) for x in "AB")
            weight = weight.float() + scale * (b @ a)
        yield name.replace(".base_layer.", "."), weight.to(dtype)


def _gathered(p: Tensor) -> Tensor:
    if not hasattr(p, "ds_id"):
        return whole(dequantized(p))
    with importlib.import_module("deepspeed").zero.GatheredParameters([p]):
        return p.detach().clone()


def default_folder() -> Path:
    """Memory where the system has a file system for it (Linux), else the folder for temporary files."""
    memory = Path("/dev/shm")
    home = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return home / f"llmrl-weights-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


class WeightFiles:
    """v000012-000013/00000.safetensors ... in a folder of this run, the same on all its ranks. Written by the first rank; servers read them.

    label: names the weights of now, for a server to say which it holds; None before the first whole version. No two hand-overs share one,
    so that neither another run nor a restart can pass for this one.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.writes = int(os.environ.get("RANK", "0")) == 0
        host, pid, token = self.agree([zlib.crc32(socket.gethostname().encode()), os.getpid(), int.from_bytes(os.urandom(4), "big")])
        self.home = Path(folder) if folder else default_folder()
        self.run = f"{host:08x}-{pid}-{token:08x}"
        self.folder = self.home / f"run-{self.run}"
        self.label: str | None = None
        self.mark = ""
        """Ends the labels: what kind of weights they name."""
        self._place: Path | None = None
        self._count = 0
        if self.writes:
            self._forget_the_dead(f"{host:08x}")

    def begin(self, version: int) -> Path:
        """Where the files of this version go, or what goes with them; the place is empty. After forget(), before whole()."""
        self._place = self.folder / f"v{version:06d}-{self._count:06d}"
        shutil.rmtree(self._place, ignore_errors=True)
        return self._place

    def write(self, n: int, group: dict[str, Tensor], name: str = "") -> Path:
        """A file of its own for one layer of the version that was begun. Raises RunFailed where the folder takes no more."""
        assert self._place is not None
        path = self._place / (name or f"{n:05d}.safetensors")
        part = path.with_suffix(".part")
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in group.items()}, part)
        except (OSError, SafetensorError) as error:
            free = shutil.disk_usage(self.home).free if self.home.exists() else 0
            raise RunFailed(
                f"the weights could not be written to {path} ({free / 1e9:.2f} GB free there): {error}; "
                "set engine.folder to a place that has room for the whole model and that trainer and servers both see"
            ) from None
        part.rename(path)
        return path

    def whole(self, version: int) -> None:
        """From here on the version last written is the one that servers must hold. Every rank says so."""
        self.label = f"{self.run}-v{version}-{self._count}{self.mark}"

    def forget(self) -> None:
        """The weights of before are about to be replaced: nobody must get them any more. Every rank says so."""
        self.label, self._count = None, self._count + 1
        if self._place is not None:
            shutil.rmtree(self._place, ignore_errors=True)  # first, so that the folder never holds two models

    def place(self) -> Path | None:
        """The folder of the last whole version, where one was written."""
        return next(iter(self.folder.glob(f"v*-{self._count:06d}")), None) if self.label else None

    def paths(self) -> list[Path]:
        """The files in it."""
        return sorted(place.glob("*.safetensors")) if (place := self.place()) else []

    @contextlib.contextmanager
    def turn(self, server: str) -> Iterator[bool]:
        """Whether this rank may send weights to a server now: one at a time may."""
        mark = self.folder / f"turn-{zlib.crc32(server.encode()):08x}"
        try:
            mark.mkdir(parents=True)
        except FileExistsError:
            yield False
            return
        try:
            yield True
        finally:
            mark.rmdir()

    def meet(self, ok: bool = True) -> bool:
        """Waits for all ranks; whether all of them say ok. Collective."""
        return not any(self._sum([0 if ok else 1]))

    def close(self) -> None:
        """Deletes everything of this run."""
        self.label = None
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _forget_the_dead(self, host: str) -> None:
        """Deletes what runs on this machine left behind when they were killed."""
        for old in self.home.glob(f"run-{host}-*"):
            pid = int(old.name.split("-")[2])
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                shutil.rmtree(old, ignore_errors=True)
            except PermissionError:
                continue

    @staticmethod
    def _sum(values: list[int]) -> list[int]:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return values
        there = torch.tensor(values, device="cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
        torch.distributed.all_reduce(there)
        return there.tolist()

    def agree(self, values: list[int]) -> list[int]:
        """The first rank's numbers, on every rank. Collective."""
        return self._sum(values if self.writes else [0] * len(values))

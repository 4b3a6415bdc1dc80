"""Weights on their way from the learner to servers: safetensors files in a folder that both see, one a layer, the last version kept."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmrl.learner import RunFailed

_LAYER = re.compile(r"^(.*?\.\d+)\.")


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
        host, pid, token = self._agree([zlib.crc32(socket.gethostname().encode()), os.getpid(), int.from_bytes(os.urandom(4), "big")])
        self.home = Path(folder) if folder else default_folder()
        self.run = f"{host:08x}-{pid}-{token:08x}"
        self.folder = self.home / f"run-{self.run}"
        self.label: str | None = None
        self._place: Path | None = None
        self._count = 0
        if self.writes:
            self._forget_the_dead(f"{host:08x}")

    def write(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Path]:
        """Writes one layer after the other and yields each file once it is whole. At most one layer is in memory beside the model.

        After forget(), before whole(). Raises RunFailed where the folder takes no more.
        """
        self._place = self.folder / f"v{version:06d}-{self._count:06d}"
        group: dict[str, Tensor] = {}
        layer: str | None = None
        n = 0
        for name, tensor in weights:
            here = (found := _LAYER.match(name)) and found[1]
            if group and here != layer:
                yield self._save(n, group)
                group, n = {}, n + 1
            layer = here
            group[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if group:
            yield self._save(n, group)

    def whole(self, version: int) -> None:
        """From here on the version last written is the one that servers must hold. Every rank says so."""
        self.label = f"{self.run}-v{version}-{self._count}"

    def forget(self) -> None:
        """The weights of before are about to be replaced: nobody must get them any more. Every rank says so."""
        self.label, self._count = None, self._count + 1
        if self._place is not None:
            shutil.rmtree(self._place, ignore_errors=True)  # first, so that the folder never holds two models

    def paths(self) -> list[Path]:
        """The files of the last whole version."""
        return sorted(self.folder.glob(f"v*-{self._count:06d}/*.safetensors")) if self.label else []

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

    def _save(self, n: int, group: dict[str, Tensor]) -> Path:
        assert self._place is not None
        path = self._place / f"{n:05d}.safetensors"
        part = path.with_suffix(".part")
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            save_file(group, part)
        except (OSError, SafetensorError) as error:
            free = shutil.disk_usage(self.home).free if self.home.exists() else 0
            raise RunFailed(
                f"the weights could not be written to {path} ({free / 1e9:.2f} GB free there): {error}; "
                "set engine.folder to a place that has room for the whole model and that trainer and servers both see"
            ) from None
        part.rename(path)
        return path

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

    def _agree(self, values: list[int]) -> list[int]:
        """The first rank's numbers, on every rank."""
        return self._sum(values if self.writes else [0] * len(values))

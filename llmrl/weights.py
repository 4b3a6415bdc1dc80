"""Weights on their way from the learner to servers: safetensors files in a folder that both see, one a layer, the last version kept."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_LAYER = re.compile(r"^(.*?\.\d+)\.")


class WeightFiles:
    """v000012/00000.safetensors ... below a folder of this run. Written by the first rank; a server that comes back reads the last version."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder) / f"run-{os.environ.get('TORCHELASTIC_RUN_ID', '')}{os.environ.get('MASTER_PORT', '')}-{os.getpid()}"
        self.version: int | None = None
        self.writes = int(os.environ.get("RANK", "0")) == 0

    def write(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Path]:
        """Writes one layer after the other and yields each file once it is whole. At most one layer is in memory beside the model."""
        place = self._place(version)
        place.mkdir(parents=True, exist_ok=True)
        group: dict[str, Tensor] = {}
        layer: str | None = None
        count = 0
        for name, tensor in weights:
            here = (found := _LAYER.match(name)) and found[1]
            if group and here != layer:
                yield self._save(place, count, group)
                group, count = {}, count + 1
            layer = here
            group[name] = tensor.to("cpu").contiguous().clone()
        if group:
            yield self._save(place, count, group)
        self.version = version

    def paths(self) -> list[Path]:
        """The files of the last whole version."""
        return [] if self.version is None else sorted(self._place(self.version).glob("*.safetensors"))

    def forget_before(self, version: int) -> None:
        """Deletes older versions."""
        for old in self.folder.glob("v*"):
            if int(old.name[1:]) < version:
                shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        """Deletes everything of this run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait_for_ranks(self) -> None:
        """No rank goes on before the first has handed the weights over."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    def _place(self, version: int) -> Path:
        return self.folder / f"v{version:09d}"

    def _save(self, place: Path, count: int, group: dict[str, Tensor]) -> Path:
        path = place / f"{count:05d}.safetensors"
        part = path.with_suffix(".part")
        save_file(group, part)
        part.rename(path)
        return path

"""Checkpoints that are either whole or not there, and from which a run goes on as if it had never stopped.

`checkpoints/step-000010/` holds `model/` (a plain transformers folder), `state.safetensors` (optimizer moments, fp32 masters, tensors of
the credit state) and `state-rank0.json` ... (step, data cursor, credit state, memory, random state). It is written under a temporary
name, every file and folder is fsynced, and only then it is renamed. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmrl.records import InputError

if TYPE_CHECKING:
    from llmrl.learner import Learner

_NAME = re.compile(r"step-(\d{6,})")


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run's `checkpoints` folder, oldest first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]))


def save(folder: Path, step: int, learner: Learner, state: dict[str, Any], *, rank: int = 0, world: int = 1) -> Path:
    """Writes checkpoints/step-<step>; every rank calls it. `state` is this rank's, JSON-able, except tensors at any depth."""
    final = folder / f"step-{step:06d}"
    part = folder / f".part-step-{step:06d}"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".part-*"):  # left by a killed run
            shutil.rmtree(old)
        part.mkdir()
    learner.accelerator.wait_for_everyone()
    tensors: dict[str, Tensor] = {}
    plain = _strip({**state, "random": _random_state()}, "", tensors)
    if rank == 0:
        save_model(part / "model", learner)
        save_file({k: v.contiguous() for k, v in learner.state_tensors().items()}, part / "state.safetensors", metadata={"format": "pt"})
    save_file({k: v.contiguous() for k, v in tensors.items()}, part / f"state-rank{rank}.safetensors")
    (part / f"state-rank{rank}.json").write_text(json.dumps({"format": 1, "world": world, "state": plain}, sort_keys=True), encoding="utf-8")
    learner.accelerator.wait_for_everyone()
    if rank == 0:
        _sync_tree(part)
        if final.exists():  # a resumed run reaches the same step again
            shutil.rmtree(final)
        part.rename(final)
        _sync(folder)
    learner.accelerator.wait_for_everyone()
    return final


def save_model(folder: Path, learner: Learner) -> None:
    """A plain transformers folder: weights, configuration, tokenizer, chat template."""
    model = learner.policy.model
    implementation = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"  # ours would not be known to whoever loads the folder
    try:
        model.save_pretrained(folder)
    finally:
        model.config._attn_implementation = implementation
    learner.policy.chat.tokenizer.save_pretrained(folder)


def load(checkpoint: Path, learner: Learner, *, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Restores weights, optimizer and random state; returns this rank's `state` as it was given to save()."""
    try:
        file = json.loads((checkpoint / f"state-rank{rank}.json").read_text(encoding="utf-8"))
        mine = load_file(checkpoint / f"state-rank{rank}.safetensors")
        state = load_file(checkpoint / "state.safetensors")
        weights = {k: v for part in sorted((checkpoint / "model").glob("*.safetensors")) for k, v in load_file(part).items()}
    except (OSError, ValueError) as e:
        raise InputError(f"{checkpoint}: cannot be read as a checkpoint: {e}") from e
    if file["world"] != world:
        raise InputError(f"{checkpoint} was written by {file['world']} processes and cannot be resumed by {world}; use as many")
    missing = [name for name, _ in learner.params if name not in weights]
    if missing:
        raise InputError(f"{checkpoint}: its model lacks {len(missing)} tensors of this one, first {missing[0]}")
    learner.load_state_tensors(weights, state)
    restored = _fill(file["state"], mine)
    _set_random_state(restored.pop("random"))
    return restored


def save_reference(path: Path, learner: Learner) -> None:
    """The reference model's weights, once a run: a warm start makes them irreproducible from the model's path."""
    assert learner.reference is not None
    part = path.with_name(f".{path.name}.part")
    save_file({n: p.detach().contiguous() for n, p in learner.reference.model.named_parameters()}, part)
    _sync(part)
    part.rename(path)


def load_reference(path: Path, learner: Learner) -> None:
    """The counterpart. InputError when the file is gone."""
    assert learner.reference is not None
    if not path.is_file():
        raise InputError(f"{path}: the reference model's weights are gone; the run cannot be continued as it was")
    weights = load_file(path)
    with torch.no_grad():
        for name, p in learner.reference.model.named_parameters():
            p.copy_(weights[name])


def prune(folder: Path, *, keep: int, best: list[int]) -> None:
    """Deletes all but the last `keep` checkpoints and those of the steps in `best`."""
    there = checkpoints(folder)
    for p in there[:-keep]:
        if int(p.name[5:]) not in best:
            gone = p.with_name(f".part-{p.name}")  # renamed first: a half-deleted folder must not look whole
            p.rename(gone)
            shutil.rmtree(gone)


def _random_state() -> dict[str, Any]:
    """The global generators. Rollouts and data do not use them (their streams are keyed), dropout and plug-ins may."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(), "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)],
    }  # fmt: skip
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numpy_keys, position, has_gauss, normal = state["numpy"]
    np.random.set_state((kind, numpy_keys.numpy().astype(np.uint32), position, has_gauss, normal))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _strip(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON-able shape of a value; its tensors go to `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[where] = value.detach().cpu()
        return {"__tensor__": where}
    if isinstance(value, dict):
        return {str(k): _strip(v, f"{where}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strip(v, f"{where}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _fill(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value["__tensor__"]] if "__tensor__" in value else {k: _fill(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_fill(v, tensors) for v in value]
    return value


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(folder: Path) -> None:
    for p in sorted(folder.rglob("*")):
        _sync(p)
    _sync(folder)


def write_atomic(path: Path, text: str) -> None:
    """A small file that is either the old or the new one, never half of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    _sync(part)
    part.rename(path)

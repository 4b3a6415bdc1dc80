"""Checkpoints that are either whole or not there, and from which a run goes on as if it had never stopped.

`checkpoints/step-000010/` holds `model/` (a plain transformers folder; with LoRA the adapters in PEFT's format), `state.safetensors`
(optimizer moments, fp32 masters), `state.json` with its tensors in `state-extra.safetensors` (step, data cursor, credit state, memory) and
`random-rank0.safetensors` ... It is written under a temporary name, every file and folder is fsynced, and only then it is renamed. Nothing
is pickled. Tensors are whole whatever the learner's strategy, so a run saved under one strategy and number of processes goes on under another.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmrl.quantize import sizes, tell
from llmrl.records import InputError
from llmrl.strategy import cut_like, whole

if TYPE_CHECKING:
    from llmrl.learner import Learner
    from llmrl.models import Policy

_NAME = re.compile(r"step-(\d{6,})")


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run's `checkpoints` folder, oldest first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]))


def save(folder: Path, step: int, learner: Learner, state: dict[str, Any], *, rank: int = 0, world: int = 1) -> Path:
    """Writes checkpoints/step-<step>; every rank calls it, with the same `state`: JSON-able, except tensors at any depth."""
    final = folder / f"step-{step:06d}"
    part = folder / f".part-step-{step:06d}"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".part-*"):  # left by a killed run
            shutil.rmtree(old)
        part.mkdir()
    learner.accelerator.wait_for_everyone()
    save_model(part / "model", learner)
    whole = {k: v.cpu().contiguous() for k, v in learner.held.state() if rank == 0}
    for name, content in [*([("state", state)] if rank == 0 else []), (f"random-rank{rank}", _random_state())]:
        tensors: dict[str, Tensor] = {}
        plain = {"format": 2, "world": world, "state": _strip(content, "", tensors)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, part / f"{name}-extra.safetensors")
        (part / f"{name}.json").write_text(json.dumps(plain, sort_keys=True), encoding="utf-8")
    if rank == 0:
        save_file(whole, part / "state.safetensors", metadata={"format": "pt"})
    learner.accelerator.wait_for_everyone()
    if rank == 0:
        _sync_tree(part)
        if final.exists():  # a resumed run reaches the same step again
            shutil.rmtree(final)
        part.rename(final)
        _sync(folder)
    learner.accelerator.wait_for_everyone()
    return final


def save_base(folder: Path, learner: Learner, plain: Callable[[], Policy]) -> None:
    """With LoRA on a model that lies nowhere (path = "tiny"): writes it without adapters, once a run, to where the adapters say it is.

    plain: makes that model.
    """
    config = learner.policy.model.peft_config["default"] if learner.policy.lora else None  # type: ignore[union-attr, index]
    if config is None or config.base_model_name_or_path:
        return
    config.base_model_name_or_path = str(folder.resolve())
    if learner.accelerator.process_index == 0 and not folder.exists():
        policy = plain()
        policy.model.config._attn_implementation = "sdpa"
        policy.model.save_pretrained(folder)
        policy.chat.tokenizer.save_pretrained(folder)


def save_model(folder: Path, learner: Learner) -> None:
    """A plain transformers folder: weights, configuration, tokenizer, chat template. Collective; the first rank writes.

    With LoRA: the adapters as PEFT writes them; transformers and vLLM read them where the base model is at the path they name. With a
    quantised base a file beside them says so (quantize.py): they fit the quantised weights, and load_policy merges them accordingly.
    """
    model = learner.policy.model
    weights = {name: w.cpu().contiguous() for name, w in learner.held.weights() if learner.accelerator.process_index == 0}
    if learner.accelerator.process_index:
        return
    if learner.policy.lora:
        folder.mkdir(parents=True)
        adapters = {_ADAPTER + name.replace(".default.", "."): w for name, w in weights.items()}
        save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        model.peft_config["default"].save_pretrained(str(folder))  # type: ignore[union-attr, index]
        if sizes(model)[1]:
            tell(folder, "nf4", model.dtype)
    else:
        implementation = model.config._attn_implementation
        model.config._attn_implementation = "sdpa"  # ours would not be known to whoever loads the folder
        try:
            model.save_pretrained(folder, state_dict={**_tied(model, weights), **_fixed(model, weights)})
        finally:
            model.config._attn_implementation = implementation
    learner.policy.chat.tokenizer.save_pretrained(folder)


_ADAPTER = "base_model.model."


def _tied(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, and those that share another's memory under their second name: save_pretrained knows which of them to leave out."""
    first: dict[int, str] = {}
    out = dict(weights)
    for name, p in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(p), name)
        if known != name and known in weights:
            out[name] = weights[known]
    return out


def _fixed(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What never learns but belongs to the folder: saved buffers."""
    found = {}
    for place, module in model.named_modules():  # not model.state_dict(): FSDP2 reshards on it, and this is the first rank alone
        for name, x in module._buffers.items():
            if x is not None and name not in module._non_persistent_buffers_set:
                found[f"{place}.{name}" if place else name] = x.detach().cpu()
    return {name: x for name, x in found.items() if name not in weights}


def load(checkpoint: Path, learner: Learner, *, rank: int = 0) -> dict[str, Any]:
    """Restores weights, optimizer and random state; returns `state` as it was given to save()."""
    try:
        state, its = _read(checkpoint, "state")
        mine = checkpoint / f"random-rank{rank}.json"
        random_state = _fill(*_read(checkpoint, f"random-rank{rank}" if mine.exists() else "random-rank0"))
        optimizer = load_file(checkpoint / "state.safetensors")
        weights = {k: v for part in sorted((checkpoint / "model").glob("*.safetensors")) for k, v in load_file(part).items()}
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"{checkpoint}: cannot be read as a checkpoint: {e}") from e
    if learner.policy.lora:
        weights = {name: weights[key] for name, _ in learner.params if (key := _ADAPTER + name.replace(".default.", ".")) in weights}
    missing = [name for name, _ in learner.params if name not in weights]
    if missing:
        raise InputError(f"{checkpoint}: its model lacks {len(missing)} tensors of this one, first {missing[0]}")
    learner.load(weights, optimizer)
    _set_random_state(random_state)
    return _fill(state, its)


def _read(checkpoint: Path, name: str) -> tuple[Any, dict[str, Tensor]]:
    file = json.loads((checkpoint / f"{name}.json").read_text(encoding="utf-8"))
    if file["format"] != 2:
        raise ValueError(f"{name}.json is of format {file['format']}, this version reads 2")
    return file["state"], load_file(checkpoint / f"{name}-extra.safetensors")


def save_reference(path: Path, learner: Learner) -> None:
    """The reference model's weights, once a run: a warm start makes them irreproducible from the model's path. Collective."""
    assert learner.reference is not None
    if learner.policy.lora:  # it is the base model
        return
    tensors = {n: whole(p).cpu().contiguous() for n, p in learner.reference.model.named_parameters() if _gathered(p, learner)}
    if learner.accelerator.process_index == 0:
        part = path.with_name(f".{path.name}.part")
        save_file(tensors, part)
        _sync(part)
        part.rename(path)


def _gathered(p: Tensor, learner: Learner) -> bool:
    """True on the rank that keeps the tensor; the others take part in gathering it."""
    if learner.accelerator.process_index:
        whole(p)
    return learner.accelerator.process_index == 0


def load_reference(path: Path, learner: Learner) -> None:
    """The counterpart. InputError when the file is gone."""
    assert learner.reference is not None
    if learner.policy.lora:
        return
    if not path.is_file():
        raise InputError(f"{path}: the reference model's weights are gone; the run cannot be continued as it was")
    weights = load_file(path)
    with torch.no_grad():
        for name, p in learner.reference.model.named_parameters():
            p.copy_(cut_like(weights[name], p))


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

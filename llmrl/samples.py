"""Samples of every step on disk: `samples/step-000012.jsonl.gz`, one sample a line, byte-equal when the run is repeated."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from llmrl.records import Group


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A gzip file without a time stamp, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    part.rename(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def sample_rows(step: int, groups: Sequence[Group], adv: Sequence[Tensor]) -> Iterable[dict[str, Any]]:
    """Everything that went into the step's update, by sample. `advantage` is a number, or a list where tokens differ.

    A sample of several turns has `mask` (Sample.mask) besides; its per-token numbers are null where the mask is false.
    """
    advantages = iter(adv)
    for group in groups:
        for s in group.samples:
            a = next(advantages).tolist()
            masked = {} if s.mask is None else {"mask": s.mask}
            yield {
                "schema": 1, "step": step, "id": s.id, "prompt_id": s.prompt_id, "role": s.role, "cohort": s.cohort, "prompt": group.prompt.text,
                "gold": group.prompt.answer, "response": s.text, "finish": s.finish, "policy_version": s.policy_version, "reward": s.reward,
                "score": s.verdict.score if s.verdict else None, "status": s.verdict.status if s.verdict else None,
                "answer": s.verdict.answer if s.verdict else None, "detail": s.verdict.detail if s.verdict else "",
                "advantage": a[0] if len(set(a)) == 1 else s.spread(a, None), "weights": s.weights, "parent": s.parent, "context_ids": s.context_ids,
                "token_ids": s.token_ids, "logprobs": s.behavior_logp and s.spread(s.counted(s.behavior_logp), None),
                "streams": {name: s.spread(s.counted(values), None) for name, values in s.streams.items()}, **masked,
            }  # fmt: skip


def step_path(folder: Path, step: int, rank: int = 0, kind: str = "step") -> Path:
    """samples/step-000012.jsonl.gz; further ranks have a file each."""
    return folder / "samples" / f"{kind}-{step:06d}{f'.rank{rank}' if rank else ''}.jsonl.gz"

"""The samples of a training run as one page: curves, and the browser of single samples that the report has."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmrl.evaluation.importers import read_any
from llmrl.evaluation.report import finite, page, short
from llmrl.evaluation.sample import token_texts
from llmrl.evaluation.traces import Trace
from llmrl.records import InputError

CURVES = ("reward/mean", "eval/accuracy", "length/mean_tokens", "entropy/rollout_nats")
MAX_TOKENS = 4000


def run_page(run_dir: str | Path, out: str | Path, *, steps: tuple[int, int] | None = None, text: Callable[[Sequence[int]], str] | None = None,
             cap: int = 600, role: str = "policy") -> dict[str, Any]:  # fmt: skip
    """Writes the page of a run directory to `out`; returns {out, samples, shown}.

    steps: the first and the last; default all. text: decodes ids; without it tokens are not shaded. cap: samples that the page holds, at
    most: whole groups (a prompt's samples in one step), chosen by hash, so that they are spread over steps and the same ones every time.
    """
    folder = Path(run_dir)
    groups: dict[tuple[int, str], list[Trace]] = {}
    order: dict[tuple[int, str], str] = {}
    limit, held, total = "g", 0, 0  # "g" is behind every hexadecimal digit
    for trace in read_any(folder, format="run", steps=steps, role=role):
        total += 1
        key = (trace.extra["step"], trace.prompt_id)
        order.setdefault(key, hashlib.sha256(f"{key[0]}/{key[1]}".encode()).hexdigest())
        if order[key] >= limit:
            continue
        groups.setdefault(key, []).append(trace)
        held += 1
        while held > cap and len(groups) > 1:
            last = max(groups, key=order.__getitem__)
            limit = order[last]
            held -= len(groups.pop(last))
    if not total:
        raise InputError(f"{folder}: no samples of the role {role!r}")
    numbers = sorted({step for step, _ in groups})
    name = folder.resolve().name
    results = [{"model": name, "benchmark": f"step {step}", "label": "reward", "k": 1, "traces": total, "settings": {"threshold": 1}} for step in numbers]
    shown = [_sample(t, numbers.index(key[0]), text) for key in sorted(groups) for t in groups[key]]
    data = {
        "title": f"Samples of {name}", "view": "run", "notes": [], "results": results, "traces": shown, "metrics": _metrics(folder),
        "traces_left": {"judged": total, "shown": len(shown), "cap": cap},
    }  # fmt: skip
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    part.write_text(page(finite(data)), encoding="utf-8", errors="replace")
    part.replace(target)
    return {"out": str(target), "samples": total, "shown": len(shown)}


def _sample(trace: Trace, result: int, text: Callable[[Sequence[int]], str] | None) -> dict[str, Any]:
    """One sample of the browser. confidence: mean probability of the least likely tenth of its tokens, as it was sampled.

    What an environment said between two turns is shown as text of probability 1, and is none of those.
    """
    ids, own, logs = trace.token_ids or [], iter(trace.logprobs or []), trace.logprobs or []
    mask = trace.extra.get("mask") or [True] * len(ids)
    if "mask" in trace.extra:
        ids, logs = trace.extra["all_token_ids"], [next(own) if on else 0.0 for on in mask] if logs else []
    ids, logs, written = ids[:MAX_TOKENS], logs[:MAX_TOKENS], [k for k, on in enumerate(mask[:MAX_TOKENS]) if on]
    texts = token_texts(ids, text) if text and ids else None
    low = sorted(sorted(written, key=logs.__getitem__)[: max(1, len(written) // 10)]) if logs else []
    p = [float(f"{math.exp(min(x, 0.0)):.3g}") for x in logs]
    advantage = trace.extra.get("advantage")
    row: dict[str, Any] = {
        "r": result, "id": trace.id, "problem": trace.prompt_id, "sample": trace.sample, "prompt": short(trace.prompt), "gold": trace.gold,
        "answer": trace.answer, "status": trace.status, "finish": trace.finish, "correct": trace.score, "quality": trace.extra.get("reward"),
        "advantage": advantage if not isinstance(advantage, list) else None, "confidence": sum(p[i] for i in low) / len(low) if low else None,
        "rank": 0, "kept": True, "length": len(trace.token_ids or []), "scores": None, "reasons": None, "failure": None,
    }  # fmt: skip
    if texts is None or not p:
        return row | {"text": short(trace.response)}
    return row | {"tokens": texts, "p": p, "low": low}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, of the curves only; a torn last line is left out."""
    file = folder / "metrics.jsonl"
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.append({"step": row.get("step"), **{name: row[name] for name in CURVES if row.get(name) is not None}})
    return [row for row in rows if isinstance(row["step"], int)]

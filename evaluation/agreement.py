"""How far two judges, or a judge and a person, give the same scores to the same traces."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.evaluation.dimensions import DIMENSIONS, quality
from llmrl.evaluation.pool import pearson
from llmrl.records import InputError

Scores = Mapping[str, Mapping[str, int]]
"""Trace id -> {dimension: 1..5}."""


def weighted_kappa(a: Sequence[int], b: Sequence[int], levels: int = 5) -> float | None:
    """Cohen's kappa with quadratic weights: 1 - sum w_ij O_ij / sum w_ij E_ij, w_ij = (i - j)^2, scores 1..levels.

    O counts the pairs, E is what the two margins alone give. None without pairs, or where both give one and the same score throughout.
    Source: Cohen 1968, Psychological Bulletin 70(4).
    """
    if not len(a):
        return None
    table = np.zeros((levels, levels))
    np.add.at(table, (np.asarray(a) - 1, np.asarray(b) - 1), 1)
    weight = (np.arange(levels)[:, None] - np.arange(levels)) ** 2
    chance = table.sum(1)[:, None] * table.sum(0) / table.sum()
    expected = float((weight * chance).sum())
    return 1 - float((weight * table).sum()) / expected if expected > 0 else None


def agreement(a: Scores, b: Scores) -> dict[str, Any]:
    """Over the traces that both scored: {traces, dimensions: {name: row}, all: row, quality: {pearson, difference}}.

    A row: n, exact (share of equal scores), within_one (share at most 1 apart), pearson, kappa (quadratic weights), difference
    (mean of a - b, in scores). "all" pools the four dimensions; quality compares R. None = cannot be said.
    """
    ids = sorted(a.keys() & b.keys())
    columns = {name: ([a[i][name] for i in ids], [b[i][name] for i in ids]) for name in DIMENSIONS}
    pooled = tuple([x for name in DIMENSIONS for x in columns[name][side]] for side in (0, 1))
    qualities = [np.array([quality(s[i]) for i in ids], float) for s in (a, b)]
    return {
        "traces": len(ids),
        "dimensions": {name: _row(*columns[name]) for name in DIMENSIONS},
        "all": _row(*pooled),
        "quality": {"pearson": pearson(*qualities), "difference": float((qualities[0] - qualities[1]).mean()) if ids else None},
    }


def _row(a: Sequence[int], b: Sequence[int]) -> dict[str, Any]:
    apart = np.asarray(a, float) - np.asarray(b, float)
    n = len(apart)
    return {
        "n": n,
        "exact": float((apart == 0).mean()) if n else None,
        "within_one": float((np.abs(apart) <= 1).mean()) if n else None,
        "pearson": pearson(np.asarray(a), np.asarray(b)),
        "kappa": weighted_kappa(a, b),
        "difference": float(apart.mean()) if n else None,
    }


def read_human(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """rater -> trace id -> scores, from lines {"id", "faithfulness", "utility", "coherence", "factuality", "rater"?, "model"?, "benchmark"?}.

    Raises InputError naming the line that is none.
    """
    found: dict[str, dict[str, dict[str, int]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: it cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            scores = {name: row[name] for name in DIMENSIONS}
            rater, name = str(row.get("rater", "human")), str(row["id"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: line {number} is no label ({type(error).__name__}: {error})") from error
        if quality(scores) is None:
            raise InputError(f"{path}: line {number}: scores {scores}; expected whole numbers in 1..5 for all of {', '.join(DIMENSIONS)}")
        if name in found.setdefault(rater, {}):
            raise InputError(f"{path}: line {number}: {rater} scored {name!r} before")
        found[rater][name] = scores
    return found

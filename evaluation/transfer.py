"""Pure functions over tables of models x benchmarks ([M, B], points, NaN = not measured): means, ties, rank correlations, transfer."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from llmrl.evaluation.pool import pearson

POINTS = (1.0, 2.0, 3.0, 5.0)


def ranks(values: np.ndarray) -> np.ndarray:
    """1 = the smallest; equal values share the mean of their places."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson of the ranks; None for fewer than two rows or a constant column."""
    return pearson(ranks(np.asarray(a, float)), ranks(np.asarray(b, float)))


def macro(table_MB: np.ndarray) -> np.ndarray:
    """[M] unweighted means over benchmarks; NaN for a model that was not measured on all of them."""
    return np.asarray(table_MB, float).mean(axis=1)


def ties(accuracy_MB: np.ndarray, score_MB: np.ndarray, points: float) -> dict[str, Any]:
    """Pairs of models whose accuracy on a benchmark differs by at most `points`, and how far apart their scores are.

    {points, pairs, score_gap, accuracy_gap (mean absolute differences, points), ratio}. The ratio divides by a gap that was chosen to
    be small, and noise of the score adds to its numerator: read score_gap. None = no pair (ratio: or a gap of 0).
    """
    gaps = []
    for b in range(accuracy_MB.shape[1]):
        known = np.flatnonzero(~np.isnan(accuracy_MB[:, b]) & ~np.isnan(score_MB[:, b]))
        gaps += [(abs(accuracy_MB[i, b] - accuracy_MB[j, b]), abs(score_MB[i, b] - score_MB[j, b])) for i, j in combinations(known, 2)]
    chosen = [g for g in gaps if g[0] <= points + 1e-9]
    accuracy_gap, score_gap = (float(np.mean([g[side] for g in chosen])) if chosen else None for side in (0, 1))
    ratio = score_gap / accuracy_gap if score_gap is not None and accuracy_gap else None
    return {"points": points, "pairs": len(chosen), "score_gap": score_gap, "accuracy_gap": accuracy_gap, "ratio": ratio}


def transfer(source_MB: np.ndarray, target_MB: np.ndarray) -> dict[str, Any]:
    """Does a model's mean on the other benchmarks tell its rank on the one left out?

    For each benchmark the correlation, over models, of the source's mean over the others with the target's column; and the mean of
    these folds. {spearman, pearson, folds: [{spearman, pearson, models}]}; models not measured everywhere are left out. None for fewer
    than two benchmarks, fewer than three models, or a constant column.
    """
    folds = []
    for b in range(source_MB.shape[1]):
        others = np.delete(source_MB, b, axis=1)
        if not others.shape[1]:
            continue
        from_M, to_M = others.mean(axis=1), target_MB[:, b]
        known = ~np.isnan(from_M) & ~np.isnan(to_M)
        enough = int(known.sum()) >= 3
        values = {name: f(from_M[known], to_M[known]) if enough else None for name, f in (("spearman", spearman), ("pearson", pearson))}
        folds.append({**values, "models": int(known.sum())})
    means = {name: None if not folds or any(f[name] is None for f in folds) else float(np.mean([f[name] for f in folds])) for name in ("spearman", "pearson")}
    return {**means, "folds": folds}


def disagreement(a_MB: np.ndarray, b_MB: np.ndarray, points: float = 2.0) -> dict[str, Any]:
    """Pairs of models on a benchmark that both scores hold at least `points` apart, and how many of them the two order differently."""
    pairs = reversed_ = 0
    for column in range(a_MB.shape[1]):
        for i, j in combinations(range(a_MB.shape[0]), 2):
            one, two = a_MB[i, column] - a_MB[j, column], b_MB[i, column] - b_MB[j, column]
            if abs(one) >= points and abs(two) >= points:
                pairs += 1
                reversed_ += int(one * two < 0)
    return {"points": points, "pairs": pairs, "reversed": reversed_}

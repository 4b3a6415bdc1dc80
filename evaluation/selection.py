"""Selection gain: does taking a problem's most confident trace take better reasoning than a random one?

    gain = 100 * mean over problems q of [ R(most confident trace of q) - R(a random trace of q) ]         points, -100 to 100
Source: a study in the release of arXiv:2604.11996: 50 questions a (model, benchmark), gains held against what might foretell them by a
correlation over the pairs. Recorded there over 54 pairs: mean gain -2.6 points; r with FRS 0.491, with pass@1 -0.128.
Differs: (1) where every trace of a problem was judged, their mean stands for the random one: the same expectation, less noise. (2) A problem
whose judgements failed is left out. (3) No held-out judge: with one judge, noise of R is in the gain and in FRS; hold a second judge against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmrl.evaluation.estimator import Measured, Values, draw, estimate
from llmrl.evaluation.pool import Pool, pearson


def most_confident(pool: Pool) -> np.ndarray:
    """[Q] index of the first trace in the pool's order of each problem that has at least two in the pool: else there is nothing to choose."""
    order = pool.order()
    first, n = np.unique(pool.problem_N[order], return_index=True, return_counts=True)[1:]
    return order[np.sort(first[n > 1])]


def drawn_pairs(pool: Pool, n: int, *name: object) -> np.ndarray:
    """[min(n, Q), 2] indices: the most confident trace and a random one (it may be the same) of n problems, seeded by `name` as `draw` is."""
    rows = []
    for top in draw(most_confident(pool), n, *name, "selection"):
        own = np.flatnonzero(pool.problem_N == pool.problem_N[top])
        rows.append((top, draw(own, 1, *name, "selection", pool.problems[pool.problem_N[top]])[0]))
    return np.array(rows, int).reshape(-1, 2)


def selection_gain(pool: Pool, value_N: np.ndarray, asked_N: np.ndarray, pairs: np.ndarray, *, resamples: int, seed: int) -> Measured:
    """Points. value_N: R, NaN = no judgement; asked_N: whether the judge was asked. Problems are resampled.

    Over all problems with two traces or more where the whole pool was asked for, else over `pairs` (rows as `drawn_pairs` gives them) where all of those were.
    """
    top = most_confident(pool)
    if asked_N.all():
        known = ~np.isnan(value_N)
        n = np.bincount(pool.problem_N[known], minlength=len(pool.problems))
        sums = np.bincount(pool.problem_N[known], weights=value_N[known], minlength=len(pool.problems))
        some = top[n[pool.problem_N[top]] > 0]
        gains = value_N[some] - sums[pool.problem_N[some]] / n[pool.problem_N[some]]
    elif len(pairs) and asked_N[pairs].all():
        gains = value_N[pairs[:, 0]] - value_N[pairs[:, 1]]
    else:
        return Measured(None, None, None, of=len(top))
    return estimate([Values(gains[~np.isnan(gains)], len(top))], resamples=resamples, seed=seed, scale=100.0)


def foretold(gains: Sequence[float | None], predictors: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """{mean (points), pairs, predictors: [{predictor, pearson, pairs}]}: correlations, over (model, benchmark) pairs, of the gain with each predictor.

    None in a column = not measured, that pair is left out of it. pearson is None for fewer than three pairs or a constant column.
    """
    gain = _numbers(gains)
    rows = []
    for name, column in predictors.items():
        known = ~np.isnan(gain) & ~np.isnan(_numbers(column))
        r = pearson(gain[known], _numbers(column)[known]) if known.sum() >= 3 else None
        rows.append({"predictor": name, "pearson": r, "pairs": int(known.sum())})
    known = gain[~np.isnan(gain)]
    return {"mean": float(known.mean()) if len(known) else None, "pairs": len(known), "predictors": rows}


def _numbers(column: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in column], float)

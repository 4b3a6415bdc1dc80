"""From judged traces to a mean with its uncertainty: strata by rank, draws seeded by a hash, standard errors, bootstrap.

A stratum is a part of the pool that belongs together by rank: the first is what the smallest K keeps, the first two what the next one
keeps, and so on. In each all traces are judged, or a draw of them; a union's mean weights the strata by their sizes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmrl.evaluation.passk import Estimate
from llmrl.evaluation.pool import Pool, kept

TENTHS = 10


@dataclass(frozen=True)
class Measured(Estimate):
    """An estimate with its 95 % bootstrap interval, and what it rests on."""

    se: float | None = None
    """Standard error about this very pool, in the unit of value, with the finite-population correction: 0 where all of it was judged.
    The interval is about the model (other traces of the same kind) and is not 0 then."""
    n: int = 0
    """Traces (problems, for pass_at_1 and mean_at_k) that were measured."""
    of: int = 0
    """Traces (problems) that it is an estimate about."""


NOTHING = Measured(None, None, None)


# ---------------------------------------------------------------- strata and draws


@dataclass(frozen=True)
class Stratum:
    """A part of the pool by rank."""

    k: float
    """This stratum and those before it are what the share k keeps."""
    index: np.ndarray
    """Of all its traces, by rank."""
    drawn: np.ndarray
    """Of those to judge, in the order in which they are asked for: any beginning of it is a random sample of the stratum."""


def tenths(pool: Pool, *, top_half: bool = False) -> list[tuple[float, np.ndarray]]:
    """(k, indices) of the released estimator's bins: the top floor(M / 2) traces in five, bin = min(4, floor(5 r / m)); the rest in five too.

    Source: [D][C] of arXiv:2604.11996 for the top half; the lower half (OUR CHOICE, left out by top_half) makes the unfiltered mean
    an estimate from the same draw. Bin 0 is the top tenth of the whole pool, up to one trace.
    """
    order = pool.order()
    half = len(order) // 2
    parts = [order[:half]] if top_half else [order[:half], order[half:]]
    found = []
    for first, part in enumerate(parts):
        place = np.minimum(4, 5 * np.arange(len(part)) // max(1, len(part)))
        found += [(round((5 * first + i + 1) / TENTHS, 1), part[place == i]) for i in range(5)]
    return found


def shells(pool: Pool, ks: Sequence[float], *, per_problem: bool = False) -> list[tuple[float, np.ndarray]]:
    """(k, indices) of what each k keeps beyond the one before it."""
    found, before = [], np.zeros(len(pool), bool)
    for k in sorted(set(ks)):
        index = kept(pool, k, per_problem=per_problem)
        found.append((k, index[~before[index]]))
        before[index] = True
    return found


def draw(index: np.ndarray, n: int | None, *name: object) -> np.ndarray:
    """n of these without replacement (None or too many: all), in random order. The draw hangs on SHA-256 of `name` alone; a larger n adds to it."""
    seed = int.from_bytes(hashlib.sha256("\0".join(map(str, name)).encode()).digest()[:16], "big")
    keys = np.random.Philox(key=seed).random_raw(len(index))  # raw numbers of a bit generator do not change between versions of numpy
    return index[np.argsort(keys, kind="stable")[: len(index) if n is None else n]]


# ---------------------------------------------------------------- estimates


@dataclass(frozen=True)
class Values:
    """The judged part of a stratum."""

    value_n: np.ndarray
    """One a judged trace."""
    of: int
    """Traces in the stratum."""
    group_n: np.ndarray | None = None
    """Number of each trace's problem, where whole problems are resampled."""
    complete: bool = False
    """Every trace of the stratum was asked for (some judgements may have failed)."""


def estimate(parts: Sequence[Values], *, resamples: int, seed: int, scale: float = 1.0) -> Measured:
    """Mean over the union of strata. value = scale * sum_b N_b mean_b / N; se^2 = scale^2 sum_b (N_b / N)^2 s_b^2 / n_b (1 - n_b / N_b).

    Where everything was asked for, the strata are one: the plain mean of what was judged. Interval: percentiles of `resamples`
    bootstrap means, traces drawn with replacement within each stratum (problems, where `group_n` is given). No value where a stratum
    has no judged trace; no interval below two judged traces (problems).
    """
    parts = [p for p in parts if p.of]
    if len(parts) > 1 and all(p.complete for p in parts):
        groups = [p.group_n for p in parts if p.group_n is not None]
        parts = [Values(np.concatenate([p.value_n for p in parts]), sum(p.of for p in parts), np.concatenate(groups) if groups else None, True)]
    n, of = sum(len(p.value_n) for p in parts), sum(p.of for p in parts)
    if not parts or any(len(p.value_n) == 0 for p in parts):
        return Measured(None, None, None, n=n, of=of)
    weight = np.array([p.of for p in parts]) / of
    value = float(sum(w * p.value_n.mean() for w, p in zip(weight, parts, strict=True)))
    square = [w * w * _variance(p) for w, p in zip(weight, parts, strict=True)]
    se = None if any(map(math.isnan, square)) else math.sqrt(sum(square))
    means = bootstrap_means(parts, resamples=resamples, seed=seed)
    low, high = (None, None) if means is None else (scale * float(x) for x in np.percentile(means, [2.5, 97.5]))
    return Measured(scale * value, low, high, se=None if se is None else scale * se, n=n, of=of)


def _variance(part: Values) -> float:
    """Of the mean: s^2 / n (1 - n / N); NaN for one judged trace of several."""
    n = len(part.value_n)
    if n >= part.of:
        return 0.0
    return float(part.value_n.var(ddof=1)) / n * (1 - n / part.of) if n > 1 else math.nan


def bootstrap_means(parts: Sequence[Values], *, resamples: int, seed: int) -> np.ndarray | None:
    """[resamples] means over the union of strata, each resampled on its own; None where there is nothing to resample."""
    rng = np.random.Generator(np.random.Philox(seed))
    if all(p.group_n is not None for p in parts):
        groups = np.unique(np.concatenate([p.group_n for p in parts if p.group_n is not None]), return_inverse=True)[1]
        ends = np.cumsum([0] + [len(p.value_n) for p in parts])
        columns = []
        for p, a, b in zip(parts, ends, ends[1:], strict=False):
            columns += [np.bincount(groups[a:b], weights=w, minlength=groups.max() + 1) for w in (p.value_n, None)]
        table = resample_sums(np.stack(columns, axis=1).astype(float), resamples, rng)
        means = None if table is None else union(table, [p.of for p in parts])
        return None if means is None else means[~np.isnan(means)]
    if sum(len(p.value_n) for p in parts) < 2:
        return None
    total = np.zeros(resamples)
    for p in parts:
        values, counts = np.unique(p.value_n, return_counts=True)
        n = counts.sum()
        total += p.of * _mean_draws(values, counts, int(n), resamples, rng)
    return total / sum(p.of for p in parts)


def _mean_draws(values: np.ndarray, counts: np.ndarray, n: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of n draws with replacement. Where few values repeat often, drawn as how often each comes up: the same, at no cost in n."""
    if 8 * len(values) > n:
        every, step = np.repeat(values, counts), max(1, 4_000_000 // n)
        return np.concatenate([every[rng.integers(0, n, (min(step, resamples - a), n))].mean(axis=1) for a in range(0, resamples, step)])
    step = max(1, 2_000_000 // len(values))
    draws = [rng.multinomial(n, counts / n, size=min(step, resamples - a)) @ values for a in range(0, resamples, step)]
    return np.concatenate(draws) / n


def resample_sums(table_PC: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray | None:
    """[resamples, C] column sums of P rows drawn with replacement; None for fewer than two rows. Equal rows are drawn as one kind."""
    if len(table_PC) < 2:
        return None
    rows, counts = np.unique(table_PC, axis=0, return_counts=True)
    step = max(1, 2_000_000 // len(rows))
    chance = counts / counts.sum()
    return np.concatenate([rng.multinomial(len(table_PC), chance, size=min(step, resamples - a)) @ rows for a in range(0, resamples, step)])


def union(sums: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Means over a union of strata from [.., 2B] columns (sum, count) of each; NaN for a resample that has no trace of some stratum."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[:, 0::2] / sums[:, 1::2]) @ (np.array(sizes) / sum(sizes))


def over_problems(pool: Pool, threshold: float | None, *, resamples: int, seed: int) -> Measured:
    """Mean over problems of the mean score of the problem's samples, or with a threshold of the share that reaches it; problems resampled.

    Samples that no verifier judged are left out, those without a confidence are not.
    """
    problem = np.concatenate([pool.problem_N, pool.dropped_problem_D]).astype(int)
    score = np.concatenate([pool.score_N, pool.dropped_score_D]).astype(float)
    problem, score = problem[~np.isnan(score)], score[~np.isnan(score)]
    score = score if threshold is None else (score >= threshold).astype(float)
    n = np.bincount(problem, minlength=len(pool.problems))
    means = np.bincount(problem, weights=score, minlength=len(pool.problems))[n > 0] / n[n > 0]
    if not len(means):
        return Measured(None, None, None, of=len(pool.problems))
    found = estimate([Values(means, len(means))], resamples=resamples, seed=seed)
    spread = float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else None
    return Measured(found.value, found.low, found.high, se=spread, n=len(means), of=len(pool.problems))

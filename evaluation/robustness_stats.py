"""Figures with bootstrap intervals over problems, in which differences and quotients of figures are of the same resampled problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrl.evaluation.passk import Estimate


@dataclass(frozen=True)
class Measured:
    """A figure, its values under the resamples, and how many problems have a say in it. value NaN: nothing to measure."""

    value: float
    draws_R: np.ndarray
    problems: int

    def _with(self, other: Measured, of: Callable[[Any, Any], Any]) -> Measured:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(of(np.float64(self.value), np.float64(other.value)))
            draws = of(self.draws_R, other.draws_R)
        return Measured(value if np.isfinite(value) else float("nan"), np.where(np.isfinite(draws), draws, np.nan), min(self.problems, other.problems))

    def __sub__(self, other: Measured) -> Measured:
        return self._with(other, lambda a, b: a - b)

    def __truediv__(self, other: Measured) -> Measured:
        return self._with(other, lambda a, b: a / b)

    def harmonic(self, other: Measured) -> Measured:
        """2ab / (a + b), and 0 where both are 0."""
        return self._with(other, lambda a, b: np.where((a == 0) & (b == 0), 0.0, 2 * a * b / np.where(a + b == 0, np.nan, a + b)))

    def estimate(self) -> Estimate:
        """With the 2.5 and 97.5 percentiles; without an interval where fewer than two problems have a say."""
        if np.isnan(self.value):
            return Estimate(None, None, None)
        if self.problems < 2 or np.isnan(self.draws_R).all():
            return Estimate(self.value, None, None)
        low, high = np.nanpercentile(self.draws_R, [2.5, 97.5])
        return Estimate(self.value, float(low), float(high))

    def to_json(self) -> dict[str, Any]:
        e = self.estimate()
        return {"value": e.value, "low": e.low, "high": e.high, "problems": self.problems}


class Resampled:
    """Percentile bootstrap over problems: one set of resamples for every figure of every model."""

    def __init__(self, problems: Sequence[str], *, resamples: int = 2000, seed: int = 0):
        self.index = {p: i for i, p in enumerate(dict.fromkeys(problems))}
        n = len(self.index)
        rng = np.random.Generator(np.random.Philox(seed))
        self.times_RP = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float32) if n else np.zeros((resamples, 0), np.float32)

    def ratio(self, numerator: Mapping[str, float], denominator: Mapping[str, float]) -> Measured:
        """sum(numerator) / sum(denominator) over the problems of `denominator`; a resample without any of them is left out."""
        top_P, bottom_P = np.zeros(len(self.index)), np.zeros(len(self.index))
        for problem, weight in denominator.items():
            i = self.index[problem]
            top_P[i], bottom_P[i] = numerator.get(problem, 0.0), weight
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = (self.times_RP @ top_P) / (self.times_RP @ bottom_P)
            value = float(np.float64(top_P.sum()) / bottom_P.sum())
        return Measured(value, draws, int(np.count_nonzero(bottom_P)))

    def mean(self, values: Mapping[str, Sequence[float]]) -> Measured:
        """Mean over problems of each problem's mean; problems without a value are left out."""
        means = {p: float(np.mean(v)) for p, v in values.items() if len(v)}
        return self.ratio(means, dict.fromkeys(means, 1.0))

    def share(self, flags: Mapping[str, Sequence[float]]) -> Measured:
        """Mean over items, resampled with their problems: a problem counts as often as it has items."""
        return self.ratio({p: float(np.sum(f)) for p, f in flags.items()}, {p: float(len(f)) for p, f in flags.items() if len(f)})

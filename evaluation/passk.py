"""pass@k, mean@k and majority vote over traces, with bootstrap intervals over problems.

A problem is all traces with one prompt_id. Traces that could not be judged (score None) are left out of every figure and counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import exp, lgamma, log, log1p
from typing import Any

import numpy as np
from rich.table import Table

from llmrl.evaluation.traces import Trace
from llmrl.records import InputError


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % interval. value None: nothing to measure; low, high None: fewer than two problems."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class AtK:
    """The figures for k samples a problem, over the problems that have at least k judged samples."""

    k: int
    problems: int
    pass_at_k: Estimate
    """Chance that at least one of k samples is right."""
    mean_at_k: Estimate
    """Expected score of a sample: the same for every k, but for the problems it is taken over."""
    maj_at_k: Estimate
    """Chance that the most frequent answer among k samples is right, ties broken at random."""
    maj_problems: int
    """Problems that the vote is taken over: those whose judged samples all have an answer or the status "no_answer"."""


@dataclass(frozen=True)
class PassKResult:
    problems: int
    """With at least one judged sample."""
    problems_unjudged: int
    samples: int
    """Judged."""
    unjudged: int
    by_status: dict[str, int]
    """Samples by status; "none" = no status in the trace."""
    at_k: tuple[AtK, ...]
    truncated: Estimate
    """Share of judged samples cut off at the token limit, of those whose finish is known."""
    no_answer: Estimate
    """Share of judged samples in which no answer was found, of those whose status is known."""
    threshold: float
    resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Table:
        """For `rich.print`: one line a k, percentages with their intervals; a dash where nothing could be measured."""
        caption = (
            f"{self.problems} problems, {self.samples} judged samples, {self.unjudged} unjudged; "
            f"cut off at the limit {_percent(self.truncated)}, no answer {_percent(self.no_answer)}"
        )
        table = Table(title="pass@k (% [95 % interval over problems])", caption=caption)
        for name in ("k", "problems", "pass@k", "mean@k", "maj@k"):
            table.add_column(name, justify="right")
        for row in self.at_k:
            figures = [_percent(estimate) for estimate in (row.pass_at_k, row.mean_at_k, row.maj_at_k)]
            table.add_row(str(row.k), str(row.problems), *figures)
        return table


def passk(
    traces: Iterable[Trace], *, ks: Sequence[int] | None = None, resamples: int = 2000, seed: int = 0, threshold: float = 1.0
) -> PassKResult:
    """pass@k, mean@k, maj@k and the rates of truncation and missing answers.

    ks: default 1, 2, 4, ... and the largest number of judged samples of a problem.
    resamples, seed: percentile bootstrap, problems drawn with replacement; the same draw for all figures, so that they can be compared.
    threshold: a sample is right when its score is at least this.
    Raises InputError when there is no trace, or traces of several models (score them one by one).
    """
    if ks is not None and (not ks or min(ks) < 1):
        raise InputError(f"ks is {list(ks)}; it must be a list of whole numbers from 1")
    if resamples < 1:
        raise InputError(f"resamples is {resamples}; it must be at least 1")
    samples, statuses = _by_problem(traces)
    judged = [[t for t in group if t.score is not None] for group in samples.values()]
    groups = [group for group in judged if group]
    sizes = [len(group) for group in groups]
    n_samples = sum(sizes)
    ks = sorted(set(ks)) if ks is not None else _default_ks(max(sizes, default=0))

    # Every figure is a ratio of two sums over problems: (numerator, denominator) of shape [P]; 0 / 0 where a problem has no say.
    ratios: list[tuple[np.ndarray, np.ndarray]] = []
    for k in ks:
        ratios += _ratios_at(groups, k, threshold)
    ratios.append(_share([[t.finish == "length" for t in g if t.finish is not None] for g in groups]))
    ratios.append(_share([[t.status == "no_answer" for t in g if t.status is not None] for g in groups]))
    estimates = _bootstrap(ratios, resamples, seed)

    rows = []
    for i, k in enumerate(ks):
        has_k, votes = (int(ratios[3 * i + j][1].sum()) for j in (0, 2))
        rows.append(AtK(k, has_k, *estimates[3 * i : 3 * i + 3], maj_problems=votes))
    return PassKResult(
        problems=len(groups),
        problems_unjudged=len(judged) - len(groups),
        samples=n_samples,
        unjudged=sum(map(len, samples.values())) - n_samples,
        by_status=dict(sorted(statuses.items())),
        at_k=tuple(rows),
        truncated=estimates[-2],
        no_answer=estimates[-1],
        threshold=threshold,
        resamples=resamples,
        seed=seed,
    )


@dataclass(frozen=True)
class _Judged:
    """What is kept of a trace: files may be larger than memory."""

    score: float | None
    status: str | None
    finish: str | None
    answer: str | None


def _by_problem(traces: Iterable[Trace]) -> tuple[dict[str, list[_Judged]], Counter[str]]:
    samples: defaultdict[str, list[_Judged]] = defaultdict(list)
    models: set[str | None] = set()
    statuses: Counter[str] = Counter()
    for trace in traces:
        models.add(trace.model)
        statuses[trace.status or "none"] += 1
        samples[trace.prompt_id].append(_Judged(trace.score, trace.status, trace.finish, trace.answer))
    if not samples:
        raise InputError("no traces to score")
    if len(models) > 1:
        raise InputError(f"the traces come from {len(models)} models ({', '.join(sorted(map(str, models)))}); score them one by one")
    return dict(samples), statuses


def _default_ks(largest: int) -> list[int]:
    return sorted({2**i for i in range(largest.bit_length())} | ({largest} if largest else set()))


def _ratios_at(groups: list[list[_Judged]], k: int, threshold: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """pass@k, mean@k, maj@k as (numerator_P, denominator_P)."""
    passed, mean, majority, has_k, votes = (np.zeros(len(groups)) for _ in range(5))
    for p, group in enumerate(groups):
        if len(group) < k:
            continue
        right = [t.score is not None and t.score >= threshold for t in group]
        has_k[p] = 1
        passed[p] = pass_at_k(len(group), sum(right), k)
        mean[p] = sum(t.score for t in group if t.score is not None) / len(group)
        if all(t.answer is not None or t.status == "no_answer" for t in group):
            votes[p] = 1
            # "no_answer" is no vote, whatever text the verifier may have left there.
            majority[p] = maj_at_k([None if t.status == "no_answer" else t.answer for t in group], right, k)
    return [(passed, has_k), (mean, has_k), (majority, votes)]


def _share(flags: list[list[bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([sum(f) for f in flags], float), np.array([len(f) for f in flags], float)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold at least one of the c right ones: 1 - C(n-c, k) / C(n, k).

    Computed as 1 - prod_{i=n-c+1..n} (1 - k / i): no factor exceeds 1, so nothing overflows. Source: arXiv:2107.03374, section 2.1.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k(n={n}, c={c}, k={k}): needs 0 <= c <= n and 1 <= k <= n")
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def maj_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Chance that the majority vote of k of these samples, drawn without replacement, is right. Exact.

    answers: None = no answer, which is no vote; no vote at all is wrong. A tie is broken at random, so it counts the share of right ones
    among the tied. An answer of which the verifier accepted only some copies counts the share it accepted.

    For every answer a and every number t of its votes, the others' votes are counted by a table over (how many tie with t, how many samples
    are drawn). Each sample is taken as drawn with chance q = k / n on its own, given that k are drawn in all: the same distribution, and
    its terms are chances, which do not overflow.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"maj_at_k: k = {k} of {n} samples")
    counts = Counter(answer for answer in answers if answer is not None)
    accepted = Counter(answer for answer, ok in zip(answers, right, strict=True) if ok and answer is not None)
    abstained = _binomial(n - counts.total(), k / n)
    total = 0.0
    for answer, n_accepted in accepted.items():
        others = Counter(counts[other] for other in counts if other != answer)
        own = _binomial(counts[answer], k / n)
        wins = sum(float(own[t]) * _wins_with(t, k - t, others, abstained, k / n) for t in range(1, min(counts[answer], k) + 1))
        total += wins * n_accepted / counts[answer]
    return total / float(_binomial(n, k / n)[k])


def _wins_with(t: int, drawn: int, others: Counter[int], abstained: np.ndarray, q: float) -> float:
    """Chance that the other answers and the abstentions make up `drawn` samples and no other answer has more than t of them, each
    outcome divided by the number of answers with t votes. others: size of an answer -> how many answers have it."""
    most_ties = min(drawn // t, sum(how_many for size, how_many in others.items() if size >= t))
    table = np.zeros((most_ties + 1, drawn + 1))  # [answers that tie, samples drawn]
    table[0, : len(abstained)] = abstained[: drawn + 1]
    for size, how_many in others.items():
        chance = _binomial(size, q)
        for _ in range(how_many):
            after = np.zeros_like(table)
            for votes in range(min(size, t - 1, drawn) + 1):
                after[:, votes:] += chance[votes] * table[:, : drawn + 1 - votes]
            if size >= t and t <= drawn:
                after[1:, t:] += chance[t] * table[:-1, : drawn + 1 - t]
            table = after
    return float((table[:, drawn] / np.arange(1, most_ties + 2)).sum())


def _binomial(n: int, q: float) -> np.ndarray:
    """Chances of 0 .. n successes in n trials, 0 < q <= 1; by logarithms, so that no n is too large."""
    if q == 1.0:
        return np.eye(1, n + 1, n)[0]
    return np.array([exp(lgamma(n + 1) - lgamma(x + 1) - lgamma(n - x + 1) + x * log(q) + (n - x) * log1p(-q)) for x in range(n + 1)])


def _bootstrap(ratios: list[tuple[np.ndarray, np.ndarray]], resamples: int, seed: int) -> list[Estimate]:
    """sum(numerator) / sum(denominator) of each pair, with the 2.5 and 97.5 percentiles over resampled problems."""
    numerators, denominators = (np.stack([ratio[i] for ratio in ratios], axis=1) for i in (0, 1))  # [P, figures]
    n_problems = len(numerators)
    rng = np.random.Generator(np.random.Philox(seed))
    draws = []
    for start in range(0, resamples if n_problems > 1 else 0, 100):  # 100 at a time bound the memory
        times = rng.multinomial(n_problems, np.full(n_problems, 1 / n_problems), size=min(100, resamples - start))
        with np.errstate(invalid="ignore"):  # 0 / 0: a resample without any problem that has a say
            draws.append((times @ numerators) / (times @ denominators))
    estimates = []
    for i, (numerator, denominator) in enumerate(ratios):
        if denominator.sum() == 0:
            estimates.append(Estimate(None, None, None))
            continue
        value = float(numerator.sum() / denominator.sum())
        if np.count_nonzero(denominator) < 2:
            estimates.append(Estimate(value, None, None))
            continue
        low, high = np.nanpercentile(np.concatenate([d[:, i] for d in draws]), [2.5, 97.5])
        estimates.append(Estimate(value, float(low), float(high)))
    return estimates


def _percent(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    interval = "" if estimate.low is None or estimate.high is None else f" [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    return f"{100 * estimate.value:.1f}{interval}"

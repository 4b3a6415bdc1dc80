"""The pool of one (model, benchmark): every trace as a few numbers, its order by confidence, and what a filter keeps of it.

A pool of M traces is columns of length N (here N = M), about 40 bytes a trace: a file is read as a stream and its texts are not held.
The filter looks at confidence alone, never at whether a trace is right.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmrl.evaluation.confidence import Confidence, Guard
from llmrl.evaluation.traces import Trace

NGRAM = 4
ECE_BINS = 10
"""Equal widths over [0, 1]: OUR CHOICE."""


@dataclass
class Pool:
    """Columns over the traces that have a confidence, in the order of the file."""

    model: str
    benchmark: str
    problems: list[str]
    """Their ids, in the order of their first trace."""
    row_N: np.ndarray
    """Number of the trace among all that were scanned, from 0: finds its text again."""
    problem_N: np.ndarray
    sample_N: np.ndarray
    confidence_N: np.ndarray
    score_N: np.ndarray
    """In [0, 1]; NaN = not judged by a verifier."""
    length_N: np.ndarray
    """Tokens; -1 where the trace has none on record."""
    repetition_N: np.ndarray
    """1 - different 4-grams / 4-grams, in [0, 1); NaN where there are no token ids."""
    cut_N: np.ndarray
    """Tokens in a repeated tail; -1 where nothing could be looked at."""
    truncated_N: np.ndarray
    """1 = cut off at the token limit, 0 = not, -1 = unknown."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Traces without a confidence, by reason. They are in no column, but their scores count in pass@1 and mean@k:"""
    dropped_problem_D: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    dropped_score_D: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __len__(self) -> int:
        return len(self.row_N)

    def order(self) -> np.ndarray:
        """[N] indices from the most confident on; ties by problem id, then by sample number: (-c, problem, sample)."""
        by_name = np.empty(len(self.problems), np.int64)
        by_name[sorted(range(len(self.problems)), key=self.problems.__getitem__)] = np.arange(len(self.problems))
        return np.lexsort((self.sample_N, by_name[self.problem_N], -self.confidence_N))


@dataclass
class _Columns:
    """What grows while a file is read; plain arrays, so that a number costs its bytes."""

    problems: dict[str, int] = field(default_factory=dict)
    row: array[int] = field(default_factory=lambda: array("q"))
    problem: array[int] = field(default_factory=lambda: array("l"))
    sample: array[int] = field(default_factory=lambda: array("l"))
    confidence: array[float] = field(default_factory=lambda: array("d"))
    score: array[float] = field(default_factory=lambda: array("f"))
    length: array[int] = field(default_factory=lambda: array("l"))
    repetition: array[float] = field(default_factory=lambda: array("f"))
    cut: array[int] = field(default_factory=lambda: array("l"))
    truncated: array[int] = field(default_factory=lambda: array("b"))
    answer: array[int] = field(default_factory=lambda: array("l"))
    answers: dict[tuple[int, str], int] = field(default_factory=dict)
    """(problem, answer) -> number; "" = none."""
    seen: Counter[int] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_problem: array[int] = field(default_factory=lambda: array("l"))
    dropped_score: array[float] = field(default_factory=lambda: array("f"))


def scan(
    traces: Iterable[Trace], confidence: Confidence, *, model: str | None = None, benchmark: str | None = None, diagnose: bool = True
) -> dict[tuple[str, str], Pool]:
    """Reads traces once and returns their pools by (model, benchmark).

    model, benchmark: names in place of those of the traces (`Trace.model`; the column "benchmark", where there is none "all").
    diagnose: measure repetition too; the rest is the same without.
    Raises InputError where a trace does not carry what the confidence is taken from.
    """
    found: dict[tuple[str, str], _Columns] = {}
    by_vote, guard = confidence.measure == "vote_share", confidence.guard or Guard()
    for row, trace in enumerate(traces):
        key = (model or trace.model or "?", benchmark or str(trace.extra.get("benchmark") or "all"))
        to = found.setdefault(key, _Columns())
        problem = to.problems.setdefault(trace.prompt_id, len(to.problems))
        number = to.seen[problem]
        to.seen[problem] += 1
        score = math.nan if trace.score is None else trace.score
        value, why = (0.0, "") if by_vote else confidence.of(trace)
        if value is None:
            to.dropped[why] += 1
            to.dropped_problem.append(problem)
            to.dropped_score.append(score)
            continue
        to.row.append(row)
        to.problem.append(problem)
        to.sample.append(number if trace.sample is None else trace.sample)
        to.confidence.append(value)
        to.score.append(score)
        to.truncated.append(-1 if trace.finish is None else int(trace.finish == "length"))
        if by_vote:
            answer = (trace.answer or "").strip() if trace.status != "no_answer" else ""
            to.answer.append(to.answers.setdefault((problem, answer), len(to.answers)))
        length, repetition, cut = _shape(trace, guard, diagnose)
        to.length.append(length)
        to.repetition.append(repetition)
        to.cut.append(cut)
    return {key: _finish(key, to, by_vote) for key, to in found.items()}


def _shape(trace: Trace, guard: Guard, diagnose: bool) -> tuple[int, float, int]:
    """(tokens, share of repeated 4-grams, tokens of a repeated tail)."""
    known = next((v for v in (trace.token_ids, trace.raw_logprobs, trace.logprobs, trace.tokens) if v is not None), None)
    if trace.token_ids is None or not diagnose:
        return (-1 if known is None else len(known)), math.nan, -1
    ids_T = np.asarray(trace.token_ids, np.uint64)
    span = guard.span(ids_T)
    return len(ids_T), repetition(ids_T), (0 if span is None else span[1] - span[0])


def repetition(ids_T: np.ndarray, n: int = NGRAM) -> float:
    """1 - different n-grams / n-grams, in [0, 1); 0 for a text shorter than n tokens."""
    count = len(ids_T) - n + 1
    if count < 1:
        return 0.0
    hashed = np.zeros(count, np.uint64)
    for i in range(n):  # a polynomial modulo 2**64: two n-grams that differ meet with chance 1e-19
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + ids_T[i : i + count].astype(np.uint64) + np.uint64(1)
    hashed.sort()
    return 1.0 - (1 + int(np.count_nonzero(hashed[1:] != hashed[:-1]))) / count


def _finish(key: tuple[str, str], c: _Columns, by_vote: bool) -> Pool:
    columns = {name: np.array(getattr(c, name)) for name in ("row", "problem", "sample", "confidence", "score", "length", "repetition", "cut", "truncated")}
    if by_vote:
        per_problem = np.array([c.seen[i] for i in range(len(c.problems))])
        votes = np.bincount(c.answer, minlength=len(c.answers))
        votes[[number for (_, answer), number in c.answers.items() if not answer]] = 0  # as llmrl.evaluation.confidence.vote_shares
        columns["confidence"] = votes[np.array(c.answer, int)] / per_problem[columns["problem"]]
    return Pool(
        *key, list(c.problems), **{f"{name}_N": column for name, column in columns.items()}, dropped=dict(c.dropped),
        dropped_problem_D=np.array(c.dropped_problem, int), dropped_score_D=np.array(c.dropped_score, float),
    )  # fmt: skip


# ---------------------------------------------------------------- the filter


def size_at(k: float, n: int) -> int:
    """max(1, floor(k n)): how many of n traces the share k keeps."""
    return max(1, math.floor(k * n + 1e-9))


def kept(pool: Pool, k: float, *, per_problem: bool = False) -> np.ndarray:
    """Indices of the kept traces by rank. The sets are nested in k.

    One pool for all problems, as in the paper: a problem may give none of its traces or all. per_problem: each gives its
    size_at(k, own traces) most confident ones.
    """
    order = pool.order()
    if not per_problem:
        return order[: size_at(k, len(order))] if len(order) else order
    problem = pool.problem_N[order]
    grouped = np.argsort(problem, kind="stable")  # within a problem still by rank
    start = np.searchsorted(problem[grouped], np.arange(len(pool.problems)))
    place = np.empty(len(order), np.int64)
    place[grouped] = np.arange(len(order)) - start[problem[grouped]]
    size = np.bincount(pool.problem_N, minlength=len(pool.problems))
    allowed = np.maximum(1, np.floor(k * size + 1e-9))
    return order[place < allowed[problem]]


# ---------------------------------------------------------------- what can be said without a judge


def accuracy(pool: Pool, index: np.ndarray, threshold: float = 1.0) -> float | None:
    """Share of right traces among those of `index` that a verifier judged; None where it judged none."""
    score = pool.score_N[index]
    score = score[~np.isnan(score)]
    return float((score >= threshold).mean()) if len(score) else None


def ece(pool: Pool, threshold: float = 1.0, bins: int = ECE_BINS) -> float | None:
    """Expected calibration error: sum over bins of confidence of n_b / N * |share right - mean confidence|.

    None where nothing was judged, or where the confidence is no probability (mean_logprob, self_certainty).
    """
    judged = ~np.isnan(pool.score_N)
    c, right = pool.confidence_N[judged], pool.score_N[judged] >= threshold
    if not len(c) or c.min() < 0 or c.max() > 1:
        return None
    place = np.minimum((c * bins).astype(int), bins - 1)
    n, sure, ok = (np.bincount(place, weights=w, minlength=bins) for w in (None, c, right))
    return float(np.abs(ok - sure).sum() / n.sum())


def composition(pool: Pool, index: np.ndarray, threshold: float = 1.0) -> dict[str, Any]:
    """Which problems a kept set is made of.

    problem_share: share of the problems with a kept trace. most, most_problem: traces of the problem that gives most.
    always_solved: share of the kept traces whose problem has only right samples. right: share of right ones.
    accuracy_correlation: Pearson, over problems, of the number kept and the share of right samples. None = cannot be said.
    """
    number = np.bincount(pool.problem_N[index], minlength=len(pool.problems))
    judged = ~np.isnan(pool.score_N)
    n = np.bincount(pool.problem_N[judged], minlength=len(pool.problems))
    right = np.bincount(pool.problem_N[judged], weights=pool.score_N[judged] >= threshold, minlength=len(pool.problems))
    known = n > 0
    share = np.divide(right, n, out=np.full(len(n), np.nan), where=known)
    of_known = index[known[pool.problem_N[index]]]
    top = int(number.argmax()) if len(number) else 0
    return {
        "kept": len(index),
        "problem_share": float(np.count_nonzero(number) / len(number)) if len(number) else None,
        "most": int(number[top]) if len(number) else 0,
        "most_problem": pool.problems[top] if len(number) else None,
        "always_solved": float((share[pool.problem_N[of_known]] == 1.0).mean()) if len(of_known) else None,
        "right": accuracy(pool, index, threshold),
        "accuracy_correlation": pearson(number[known], share[known]),
    }


def diagnostics(pool: Pool, index: np.ndarray) -> dict[str, Any]:
    """Length, repetition and truncation in the pool and in a kept set: what the filter may have selected instead of reasoning.

    length: mean tokens. repetition: mean share of repeated 4-grams. repeated_tails: share of traces with a tail that the guard would cut.
    truncation: share cut off at the token limit. with_confidence: Pearson over the pool. Unknown values are left out; None = all unknown.
    """
    columns = {"length": (pool.length_N, pool.length_N >= 0), "repetition": (pool.repetition_N, ~np.isnan(pool.repetition_N)),
               "repeated_tails": (pool.cut_N > 0, pool.cut_N >= 0), "truncation": (pool.truncated_N == 1, pool.truncated_N >= 0)}  # fmt: skip
    inside = np.zeros(len(pool), bool)
    inside[index] = True
    result = {}
    for name, (values, known) in columns.items():
        values = np.asarray(values, float)
        result[name] = {
            "pool": _mean(values[known]),
            "kept": _mean(values[known & inside]),
            "with_confidence": pearson(values[known], pool.confidence_N[known]),
        }
    return result


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlation of two columns; None for fewer than two rows or a constant column."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if len(a) < 2:
        return None
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else None

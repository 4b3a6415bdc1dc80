"""How sure a model was of a trace, from the probabilities of its own tokens.

All measures are larger for a surer model, and only their order within one (model, benchmark) counts: levels of two models do not compare.
Probabilities are those of the raw softmax at temperature 1 (`Trace.raw_logprobs`), so the sampling temperature does not enter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmrl.evaluation.traces import Trace
from llmrl.records import InputError

Measure = Literal["tail_mean", "mean_logprob", "self_certainty", "answer_prob", "vote_share"]
MEASURES: tuple[Measure, ...] = ("tail_mean", "mean_logprob", "self_certainty", "answer_prob", "vote_share")


def n_low(length: int, share: float) -> int:
    """max(1, floor(share * length)): how many tokens the tail has."""
    return max(1, math.floor(share * length + 1e-9))  # 0.29 * 100 is 28.999... in binary


def tail_mean(logp_T: Sequence[float] | np.ndarray, share: float = 0.10) -> float:
    """c = mean of the n_low smallest token probabilities, in (0, 1]. Source: arXiv:2604.11996 Eq. 2, share = 0.10.

    logp_T: natural logs, at least one. Differs: n_low is floor(share * T) without the error of binary fractions.
    """
    logp_T = np.asarray(logp_T, float)
    n = n_low(len(logp_T), share)
    low = np.sort(np.partition(logp_T, n - 1)[:n])  # sorted: the same numbers in another order give the same sum
    return float(np.exp(np.minimum(low, 0.0)).mean())


def low_tokens(logp_T: Sequence[float] | np.ndarray, share: float = 0.10) -> list[int]:
    """Indices of the tokens that `tail_mean` is the mean of, ascending; of equal ones the earlier count."""
    logp_T = np.asarray(logp_T, float)
    return sorted(np.argsort(logp_T, kind="stable")[: n_low(len(logp_T), share)].tolist()) if len(logp_T) else []


def vote_shares(answers: Sequence[str | None]) -> list[float]:
    """Share of a problem's samples that gave this answer (as text, blanks at the ends apart), in [0, 1].

    Self-consistency, arXiv:2203.11171, taken as a confidence. A sample without an answer has no vote: 0, and counts in the denominator.
    """
    keys = [(a or "").strip() for a in answers]
    counts = Counter(filter(None, keys))
    return [counts[k] / len(keys) for k in keys]


# ---------------------------------------------------------------- the repetition guard


@dataclass(frozen=True)
class Guard:
    """Finds a tail that repeats itself: nearly certain filler would lift the tail mean (frs.md, failure mode 1). OUR CHOICE throughout.

    A tail is a run of tokens in which each equals the one a period before it, at least `repeats` periods and `min_tokens` long, that
    ends within `slack` tokens of the trace's end (an end token, a closing mark). The first period of it stays, and so does the slack.
    Misses loops that change a little each time round, and loops that the model has left again.
    """

    max_period: int = 64
    min_tokens: int = 24
    repeats: int = 3
    slack: int = 4

    def span(self, ids_T: Sequence[int] | np.ndarray) -> tuple[int, int] | None:
        """[start, end) of the tokens to cut, or None."""
        ids_T = np.asarray(ids_T)
        best: tuple[int, int] | None = None
        for end in range(len(ids_T), max(len(ids_T) - self.slack - 1, 1), -1):
            first = max(0, end - 1 - self.max_period)
            periods = end - 1 - first - np.flatnonzero(ids_T[first : end - 1] == ids_T[end - 1])
            for period in periods.tolist():
                if max(self.min_tokens, self.repeats * period) > end:
                    continue
                differs = np.flatnonzero(ids_T[period:end] != ids_T[: end - period])
                run = end - period - (int(differs[-1]) + 1 if len(differs) else 0)
                long_enough = run + period >= max(self.min_tokens, self.repeats * period)
                if long_enough and (best is None or run > best[1] - best[0]):
                    best = (end - run, end)
        return best


# ---------------------------------------------------------------- of a trace


@dataclass(frozen=True)
class Confidence:
    """Which measure is taken, and of which tokens."""

    measure: Measure = "tail_mean"
    share: float = 0.10
    """Of the tokens, for tail_mean; in (0, 1]."""
    guard: Guard | None = None
    """Cuts repeated tails before anything is taken; needs token ids or token texts."""
    special_ids: frozenset[int] = frozenset()
    """Token ids left out, such as the end token's."""
    sampled: bool = False
    """Take `logprobs`, those of the distribution that was sampled from, where a trace has no raw ones."""

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise InputError(f"confidence {self.measure!r}: there are {', '.join(MEASURES)}")
        if not 0.0 < self.share <= 1.0:
            raise InputError(f"the tail's share is {self.share}; it must lie in (0, 1]")

    def kept(self, trace: Trace, length: int) -> np.ndarray:
        """bool [T]: the tokens that count, after special ones and the repeated tail are left out."""
        keep_T = np.ones(length, bool)
        if self.guard is not None and length:
            span = self.guard.span(_ids(trace))
            if span:
                keep_T[span[0] : span[1]] = False
        if self.special_ids and trace.token_ids is not None:
            keep_T &= ~np.isin(np.asarray(trace.token_ids), list(self.special_ids))
        return keep_T

    def logp(self, trace: Trace) -> np.ndarray:
        """[T] natural logs of the probabilities that count for this trace. Raises InputError where it carries none."""
        found = trace.raw_logprobs if trace.raw_logprobs is not None else trace.logprobs if self.sampled else None
        if found is None:
            also = (
                ". It has logprobs: where they are those of the bare softmax (vLLM's default), say --logprobs raw; --sampled-logprobs takes them as they are"
                if trace.logprobs is not None else ""
            )  # fmt: skip
            raise InputError(
                f"trace {trace.id!r} has no raw_logprobs, which {self.measure} is taken from{also}. `llmrl sample` writes them; "
                "for traces of others --score-with MODEL has the model that wrote the texts score them"
            )
        return np.asarray(found, float)

    def of(self, trace: Trace) -> tuple[float | None, str]:
        """(confidence, ""), or (None, why the trace has none and is dropped). vote_share is of a whole problem: see `vote_shares`.

        Raises InputError where the trace does not carry what the measure needs.
        """
        if self.measure == "self_certainty":
            return self._self_certainty(trace)
        logp_T = self.logp(trace)
        keep_T = self.kept(trace, len(logp_T))
        if self.measure == "answer_prob":
            return self._answer_prob(trace, logp_T)
        logp_T = logp_T[keep_T]
        if not len(logp_T):
            return None, "no tokens"
        return (tail_mean(logp_T, self.share) if self.measure == "tail_mean" else float(logp_T.mean())), ""

    def low(self, trace: Trace) -> list[int]:
        """Indices, in the whole trace, of the tokens that tail_mean looked at; [] for measures that are no tail, or without log-probs."""
        if self.measure != "tail_mean":
            return []
        logp_T = self.logp(trace)
        places = np.flatnonzero(self.kept(trace, len(logp_T)))
        return places[low_tokens(logp_T[places], self.share)].tolist() if len(places) else []

    def _self_certainty(self, trace: Trace) -> tuple[float | None, str]:
        """Mean over tokens of KL(uniform || p), nats (arXiv:2502.18581): it needs whole distributions, so the trace has to bring it."""
        found = trace.extra.get("self_certainty")
        values = np.atleast_1d(np.asarray(found, float)) if _numbers(found) else None
        if values is None:
            raise InputError(
                f"trace {trace.id!r} has no self_certainty: it needs the whole distribution at every token, which traces do not keep. "
                'Sample with --self-certainty (the column "self_certainty": a number, or one a token), or take another measure'
            )
        if len(values) > 1:
            values = values[self.kept(trace, len(values))]
        return (float(values.mean()), "") if len(values) else (None, "no tokens")

    def _answer_prob(self, trace: Trace, logp_T: np.ndarray) -> tuple[float | None, str]:
        """exp(mean log p) of the tokens that hold the answer's last occurrence, in (0, 1]. OUR CHOICE: geometric, so that length matters less."""
        if trace.tokens is None:
            raise InputError(f"trace {trace.id!r} has no `tokens` (the text of each token), which answer_prob finds the answer in")
        answer = (trace.answer or "").strip()
        if not answer:
            return None, "no answer"
        ends = np.cumsum([len(t) for t in trace.tokens])
        at = "".join(trace.tokens).rfind(answer)
        if at < 0:
            return None, "the answer as extracted does not stand in the text"
        first, last = np.searchsorted(ends, at, side="right"), np.searchsorted(ends, at + len(answer), side="left")
        return float(np.exp(logp_T[first : last + 1].mean())), ""


def _numbers(found: object) -> bool:
    values = found if isinstance(found, list) else [found]
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _ids(trace: Trace) -> np.ndarray:
    """One number a token: its id, or the number of its text."""
    if trace.token_ids is not None:
        return np.asarray(trace.token_ids)
    if trace.tokens is None:
        raise InputError(f"trace {trace.id!r} has neither token_ids nor tokens, which the repetition guard looks at; leave the guard out (no --strict)")
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(t, len(numbers)) for t in trace.tokens])

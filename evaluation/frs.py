"""The Filtered Reasoning Score: how well a model reasons on the traces that it is most sure of.

    c_i   = mean of the least likely 10 % of the trace's token probabilities                       (Eq. 2, llmrl.evaluation.confidence)
    R_i   = (faithfulness + utility + coherence + factuality - 4) / 16, four scores in 1..5         (Eq. 1, llmrl.evaluation.dimensions)
    FRS_K = 100 * mean of R_i over the K share of one (model, benchmark)'s traces with the largest c_i   (Eq. 3)
Source: arXiv:2604.11996 and its released code. Units: qualities (frs, by_k, unfiltered, single_trace) are points from 0 to 100; R_i,
accuracies, shares and confidences lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from rich.table import Table

from llmrl.evaluation.confidence import Confidence
from llmrl.evaluation.dimensions import Case, Judge, Judgement, case_of
from llmrl.evaluation.estimator import NOTHING, Measured, Stratum, Values, draw, estimate, over_problems, shells, tenths
from llmrl.evaluation.judging import Judged, JudgementFile, judge_cases
from llmrl.evaluation.pool import Pool, accuracy, composition, diagnostics, ece, kept, scan
from llmrl.evaluation.selection import drawn_pairs, selection_gain
from llmrl.evaluation.traces import Trace
from llmrl.records import InputError

TENTHS = tuple(i / 10 for i in range(1, 11))
SHOWN = (0.1, 0.2, 0.5, 1.0)
"""The K that tables show."""


@dataclass(frozen=True)
class JudgedTrace:
    """One trace that a judge was asked about."""

    id: str
    prompt_id: str
    confidence: float
    rank: int
    """Place in the pool by confidence, 0 = the most confident."""
    bin: int | None
    """Stratum of ranks that it was drawn for, 0 = the most confident; None where it was drawn for single_trace alone."""
    correct: float | None
    """The verifier's score in [0, 1]; None = not judged."""
    scores: dict[str, int] | None
    """{faithfulness, utility, coherence, factuality: 1..5}; None where the judgement failed, or a scorer without dimensions made it."""
    reasons: str | None
    """In the judge's words, where it was asked for them."""
    quality: float | None
    """R in [0, 1]; None where the judgement failed."""
    failure: str | None
    """Why there is no quality."""
    low_tokens: list[int]
    """Indices of the tokens that the confidence is the mean of, ascending; [] where it is taken otherwise."""
    sample: int | None = None
    tokens: int | None = None
    """Length of the trace."""


@dataclass(frozen=True)
class FRSResult:
    """The scores of one model on one benchmark, by one judge."""

    model: str
    benchmark: str
    label: str
    """"FRS", "FRS (blind judge)", or, for a scorer that is no language model, a name that says that it is no FRS."""
    k: float
    """Share of the pool that the headline keeps, in (0, 1]."""
    traces: int
    """In the pool."""
    problems: int
    frs: Measured
    """Points, 0 to 100, as are the three that follow."""
    by_k: dict[float, Measured]
    unfiltered: Measured
    """The mean quality of the whole pool, where it was judged or sampled."""
    single_trace: Measured
    """Of one trace a problem: the one with the lowest sample number."""
    top_accuracy: dict[float, float | None]
    """Share of right traces among the K most confident, by K; 1.0: of all."""
    pass_at_1: Measured
    """Mean over problems of the share of right samples; from these very traces."""
    mean_at_k: Measured
    """Mean over problems of the mean score: differs from pass_at_1 where scores lie between 0 and 1."""
    ece: float | None
    """Expected calibration error of the confidence as a chance of being right, in [0, 1]."""
    composition: dict[str, Any]
    """Of the kept set: see llmrl.evaluation.pool.composition."""
    diagnostics: dict[str, Any]
    """{length, repetition, repeated_tails, truncation: {pool, kept, with_confidence}}: see llmrl.evaluation.pool.diagnostics."""
    judge: dict[str, Any]
    """{name, blind, ... facts, counters, reused}; "agreement" is filled in where several judges or people scored the same traces."""
    judged: list[JudgedTrace]
    """By rank."""
    dropped: dict[str, int]
    """What is in no quality, by reason."""
    gain: Measured = NOTHING
    """Points: quality of a problem's most confident trace less that of a random one; see llmrl.evaluation.selection."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the numbers depend on: measure, share, guard, strata, seed, resamples, ..."""

    @property
    def is_frs(self) -> bool:
        return self.label.startswith("FRS")

    def to_json(self) -> dict[str, Any]:
        """For json.dump. A scorer that is no language model has its number under "baseline", and null under "frs"."""
        found = asdict(self)
        for name in ("by_k", "top_accuracy"):
            found[name] = {f"{k:g}": v for k, v in found[name].items()}
        return found if self.is_frs else {**found, "frs": None, "baseline": found["frs"]}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> FRSResult:
        """What `to_json` made. Raises InputError for anything else."""
        try:
            row = dict(found)
            row["frs"] = row.pop("baseline", None) or row["frs"]
            for name in ("frs", "unfiltered", "single_trace", "pass_at_1", "mean_at_k", *(("gain",) if "gain" in row else ())):
                row[name] = Measured(**row[name])
            row["by_k"] = {float(k): Measured(**v) for k, v in row["by_k"].items()}
            row["top_accuracy"] = {float(k): v for k, v in row["top_accuracy"].items()}
            row["judged"] = [JudgedTrace(**t) for t in row["judged"]]
            return cls(**row)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"this is no FRS result ({type(error).__name__}: {error})") from error

    def table(self) -> Table:
        """For `rich.print`: every figure with its interval and what it rests on; a dash where nothing could be measured."""
        lost = "; ".join(f"{n} x {why}" for why, n in self.dropped.items() if n) or "nothing"
        table = Table(title=f"{self.label}: {self.model} on {self.benchmark}", caption=f"{self.traces} traces of {self.problems} problems; left out: {lost}")
        for name in ("", "value [95 % interval]", "judged", "of"):
            table.add_column(name, justify="left" if not name else "right")
        rows = [(f"{self.label}, K = {100 * k:g} %", m) for k, m in self.by_k.items() if k in SHOWN or k == self.k]
        rows += [("one trace a problem", self.single_trace)] + ([("most confident of a problem less a random one", self.gain)] if self.gain.n else [])
        for name, m in rows:
            table.add_row(name, points(m), str(m.n), str(m.of))
        for name, m in (("pass@1, % of these traces", self.pass_at_1), ("mean@k, %", self.mean_at_k)):
            table.add_row(name, points(m, 100), str(m.n), str(m.of))
        for k, share in self.top_accuracy.items():
            if k in SHOWN:
                table.add_row(f"right among the top {100 * k:g} %, %", percent(share), "", "")
        table.add_row("calibration error (ECE)", "-" if self.ece is None else f"{self.ece:.3f}", "", "")
        table.add_row("problems among the kept, %", percent(self.composition["problem_share"]), "", "")
        return table


def points(m: Measured, scale: float = 1.0) -> str:
    """65.2 [60.1, 70.3]; a dash where there is no value."""
    if m.value is None:
        return "-"
    interval = "" if m.low is None or m.high is None else f" [{scale * m.low:.1f}, {scale * m.high:.1f}]"
    return f"{scale * m.value:.1f}{interval}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


# ---------------------------------------------------------------- from traces to a result


@dataclass(frozen=True)
class Options:
    """How a pool is filtered, sampled and estimated. See `frs` for each."""

    k: float = 0.10
    ks: tuple[float, ...] = TENTHS
    confidence: Confidence = field(default_factory=Confidence)
    per_problem: bool = False
    subsample: int | None = 50
    top_half: bool = False
    selection: int = 0
    threshold: float = 1.0
    over: Literal["traces", "problems"] = "traces"
    seed: int = 42
    resamples: int = 10_000

    def __post_init__(self) -> None:
        for k in (self.k, *self.ks):
            if not 0.0 < k <= 1.0:
                raise InputError(f"K is {k}; it must be a share of the pool in (0, 1]")
        if self.subsample is not None and self.subsample < 2:
            raise InputError(f"subsample is {self.subsample}; a standard error needs at least 2 traces a bin")
        object.__setattr__(self, "k", round(self.k, 9))  # 3 * 0.1 is 0.3: K names results
        object.__setattr__(self, "ks", tuple(round(k, 9) for k in self.ks))
        if self.top_half and (self.per_problem or self.k not in TENTHS[:5] or self.subsample is None):
            raise InputError("top_half is the paper's draw of 50 from five bins: it goes with one pool, a subsample and a K of 10, 20, ... 50 %")
        if self.selection < 0 or self.selection == 1:
            raise InputError(f"selection is {self.selection} problems; an interval needs at least 2, and 0 leaves it out")
        if self.resamples < 1:
            raise InputError(f"resamples is {self.resamples}; it must be at least 1")


@dataclass(frozen=True)
class Plan:
    """Which traces of a pool are judged, and what each group of them stands for. `index` are indices into the pool."""

    strata: list[Stratum]
    single: np.ndarray
    """One trace a problem, as far as drawn."""
    singles: int
    """Problems that they stand for; 0 where single traces are left out."""
    pairs: np.ndarray
    """[n, 2]: the most confident and a random trace of each problem that the selection gain is taken from, as far as drawn."""

    @property
    def asked(self) -> np.ndarray:
        """Every index once, in the order of judging: the most confident stratum first, at random within each."""
        parts = np.concatenate([*(s.drawn for s in self.strata), self.single, self.pairs.ravel()]).astype(int)
        return parts[np.sort(np.unique(parts, return_index=True)[1])]


def plan(pool: Pool, options: Options) -> Plan:
    """Strata and draws. Where the subsample would take every trace, all are judged and the cuts are exact."""
    name = (pool.model, pool.benchmark)
    ks = sorted({*options.ks, options.k})
    n = options.subsample
    cut = shells(pool, ks, per_problem=options.per_problem)
    tenth = set(ks) <= set(TENTHS) and not options.per_problem
    if n is not None and (options.top_half or any(len(index) > n for _, index in cut)):
        parts = tenths(pool, top_half=options.top_half) if tenth or options.top_half else cut
    else:
        n, parts = None, cut
    strata = [Stratum(k, index, draw(index, n, *name, b, options.seed)) for b, (k, index) in enumerate(parts)]
    pairs = drawn_pairs(pool, options.selection, *name, options.seed)
    if options.top_half:
        return Plan(strata, np.zeros(0, int), 0, pairs)
    first = _first_samples(pool)
    return Plan(strata, draw(first, None if n is None and ks[-1] == 1.0 else options.subsample, *name, "single", options.seed), len(first), pairs)


def _first_samples(pool: Pool) -> np.ndarray:
    """Index of each problem's trace with the lowest sample number."""
    order = np.lexsort((pool.sample_N, pool.problem_N))
    return order[np.unique(pool.problem_N[order], return_index=True)[1]]


def cases_of(traces: Iterable[Trace], pool: Pool, asked: np.ndarray, options: Options) -> tuple[list[Case], dict[int, Case], dict[int, list[int]]]:
    """Second reading: (cases in the order of `asked`, case by index, low tokens by index). `traces` gives the same traces as before."""
    wanted = {int(pool.row_N[i]): int(i) for i in asked}
    cases: dict[int, Case] = {}
    low: dict[int, list[int]] = {}
    for row, trace in enumerate(traces):
        i = wanted.get(row)
        if i is None:
            continue
        score = pool.score_N[i]
        cases[i] = replace(case_of(trace), correct=None if np.isnan(score) else bool(score >= options.threshold))
        low[i] = options.confidence.low(trace)
    if missing := len(wanted) - len(cases):
        raise InputError(f"the traces changed between two readings: {missing} of {len(wanted)} are not there any more")
    return [cases[int(i)] for i in asked], cases, low


def refuse_unshowable(cases: Sequence[Case], judge: Judge) -> None:
    """A judge that is shown gold and verdict needs some; without any, every call would be wasted."""
    if judge.blind or not judge.label.startswith("FRS") or not cases:
        return
    if not any((c.gold or "").strip() for c in cases):
        raise InputError("no trace has a gold answer, which the paper's judge is shown: add `gold`, or take the blind judge (--blind)")
    if all(c.correct is None for c in cases):
        raise InputError("no trace has been graded, and the paper's judge is told the verdict: name a --verifier, or take the blind judge (--blind)")


def frs(
    traces: Iterable[Trace], *, judge: Judge, k: float = 0.10, ks: Sequence[float] = TENTHS, confidence: Confidence | None = None,
    per_problem: bool = False, subsample: int | None = 50, top_half: bool = False, selection: int = 0, threshold: float = 1.0,
    over: Literal["traces", "problems"] = "traces", seed: int = 42, resamples: int = 10_000, model: str | None = None,
    benchmark: str | None = None, file: JudgementFile | None = None, workers: int = 16,
) -> FRSResult:  # fmt: skip
    """The Filtered Reasoning Score of one model on one benchmark.

    traces: of one (model, benchmark), with `raw_logprobs`; a list or anything that can be gone through twice (else it is held in memory).
    judge: llmrl.evaluation.dimensions.EndpointJudge(...), or a FunctionJudge around a function of your own.
    k: share of the pool that the headline keeps; ks: the shares of `by_k`.
    confidence: default the paper's, the mean of the least likely 10 % of token probabilities.
    per_problem: filter within each problem and not over one pool.
    subsample: traces a tenth of the pool to judge (the estimator behind the paper's table, over the whole pool); None = all up to the largest K.
    top_half: exactly the paper's five bins: nothing below the median is judged, so there is no unfiltered mean.
    selection: problems whose most confident and one random trace are judged too, for `gain`; 0 = only where all traces are judged anyway.
    threshold: a trace is right when its score is at least this.
    over: what the bootstrap draws anew: "traces" (the paper) or whole "problems".
    seed: of draws and bootstrap. file: where judgements are kept; workers: calls in flight.
    Returns an FRSResult: qualities in points 0 to 100, accuracies in [0, 1].
    Raises InputError for traces of several models or benchmarks, or without what the confidence or the judge needs.
    """
    source = list(traces) if iter(traces) is traces else traces
    options = Options(k, tuple(ks), confidence or Confidence(), per_problem, subsample, top_half, selection, threshold, over, seed, resamples)
    pools = scan(source, options.confidence, model=model, benchmark=benchmark)
    if len(pools) != 1:
        raise InputError(f"the traces are of {len(pools)} pairs of model and benchmark: {sorted(pools)}; score them one by one")
    pool = next(iter(pools.values()))
    return score_pool(pool, source, judge, options, file or JudgementFile(None), workers=workers)


def score_pool(
    pool: Pool, traces: Iterable[Trace], judge: Judge, options: Options, file: JudgementFile, *, workers: int = 16,
    each: Callable[[int], None] = lambda n: None,
) -> FRSResult:  # fmt: skip
    """Plans, judges and estimates. traces: the same as `pool` was made of."""
    if not len(pool):
        raise InputError(f"{pool.model} on {pool.benchmark}: no trace has a confidence ({pool.dropped or 'there are none'})")
    chosen = plan(pool, options)
    cases, by_index, low = cases_of(traces, pool, chosen.asked, options)
    refuse_unshowable(cases, judge)
    judged = judge_cases(cases, judge, file, workers=workers, each=each)
    found = {i: judged.by_id[case.id] for i, case in by_index.items() if case.id in judged.by_id}
    return assemble(pool, chosen, found, low, {i: c.id for i, c in by_index.items()}, judge, judged, options)


def assemble(
    pool: Pool, chosen: Plan, found: dict[int, Judgement], low: dict[int, list[int]], ids: dict[int, str], judge: Judge, judged: Judged, options: Options
) -> FRSResult:
    """Judgements by index -> the result. Pure."""
    value_N = np.full(len(pool), np.nan)
    for i, judgement in found.items():
        value_N[i] = np.nan if judgement.quality is None else judgement.quality
    asked = np.zeros(len(pool), bool)
    asked[list(found)] = True

    def values(index: np.ndarray, drawn: np.ndarray) -> Values:
        missing = np.flatnonzero(~asked[drawn])
        known = drawn[: missing[0]] if len(missing) else drawn  # a budget ended: the beginning of a draw is a draw, other leftovers are not
        known = known[~np.isnan(value_N[known])]
        whole = len(drawn) == len(index) and not len(missing)
        return Values(value_N[known], len(index), pool.problem_N[known] if options.over == "problems" else None, whole)

    parts = [values(s.index, s.drawn) for s in chosen.strata]
    how: dict[str, Any] = {"resamples": options.resamples, "seed": options.seed, "scale": 100.0}
    by_k = {s.k: estimate(parts[: b + 1], **how) for b, s in enumerate(chosen.strata)}
    # Single traces come last, and those that a stratum asked for are the confident ones: all of the draw, or nothing.
    single = values(np.zeros(chosen.singles, int), chosen.single if asked[chosen.single].all() else chosen.single[:0])
    headline = kept(pool, options.k, per_problem=options.per_problem)
    failed = sum(j.quality is None for j in found.values())
    result = FRSResult(
        model=pool.model, benchmark=pool.benchmark, label=judge.label, k=options.k, traces=len(pool), problems=len(pool.problems),
        frs=by_k[options.k], by_k=by_k, unfiltered=by_k.get(1.0, Measured(None, None, None, of=len(pool))),
        single_trace=estimate([single], **how) if chosen.singles else Measured(None, None, None, of=len(pool.problems)),
        top_accuracy={k: accuracy(pool, kept(pool, k, per_problem=options.per_problem), options.threshold) for k in sorted({*by_k, 1.0})},
        pass_at_1=over_problems(pool, options.threshold, resamples=options.resamples, seed=options.seed),
        mean_at_k=over_problems(pool, None, resamples=options.resamples, seed=options.seed),
        ece=ece(pool, options.threshold), composition=composition(pool, headline, options.threshold), diagnostics=diagnostics(pool, headline),
        judge={"name": judge.name, "blind": judge.blind, **getattr(judge, "about", {}), "counters": judged.spent, "reused": judged.reused},
        judged=_judged(pool, chosen, found, low, ids),
        dropped={**pool.dropped, "judgement failed": failed, f"not asked{': ' + judged.why if judged.why else ''}": judged.not_asked},
        gain=selection_gain(pool, value_N, asked, chosen.pairs, resamples=options.resamples, seed=options.seed),
        settings=_settings(options, chosen),
    )  # fmt: skip
    return result


def _judged(pool: Pool, chosen: Plan, found: dict[int, Judgement], low: dict[int, list[int]], ids: dict[int, str]) -> list[JudgedTrace]:
    rank_N = np.empty(len(pool), int)
    rank_N[pool.order()] = np.arange(len(pool))
    bins = {int(i): b for b, s in enumerate(chosen.strata) for i in s.drawn}
    rows = []
    for i in sorted(found, key=lambda i: rank_N[i]):
        j, score = found[i], float(pool.score_N[i])
        rows.append(JudgedTrace(
            id=ids[i], prompt_id=pool.problems[pool.problem_N[i]], confidence=float(pool.confidence_N[i]), rank=int(rank_N[i]), bin=bins.get(i),
            correct=None if np.isnan(score) else score, scores=j.scores, reasons=j.reasons, quality=j.quality, failure=j.failure,
            low_tokens=low[i], sample=int(pool.sample_N[i]), tokens=int(pool.length_N[i]) if pool.length_N[i] >= 0 else None,
        ))  # fmt: skip
    return rows


def _settings(options: Options, chosen: Plan) -> dict[str, Any]:
    c = options.confidence
    return {
        "measure": c.measure, "share": c.share, "guard": None if c.guard is None else asdict(c.guard), "special_ids": sorted(c.special_ids),
        "sampled_logprobs": c.sampled, "filter": "per problem" if options.per_problem else "one pool", "subsample": options.subsample,
        "top_half": options.top_half, "threshold": options.threshold, "bootstrap_over": options.over, "seed": options.seed,
        "resamples": options.resamples,
        "strata": [{"k": s.k, "traces": len(s.index), "drawn": len(s.drawn)} for s in chosen.strata], "single_drawn": len(chosen.single),
        "selection_drawn": len(chosen.pairs),
    }  # fmt: skip

"""What `llmrl score --use frs` does: files -> pools -> judges -> results, a comparison and a report, in one folder that it can go on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

from llmrl import plugins
from llmrl.importing import choices, import_files
from llmrl.records import InputError
from llmrl.sampling import EVALUATORS, graded

TENTHS = tuple(i / 10 for i in range(1, 11))
SAID = tuple(signature(choices).parameters)
"""Options that say what files of others hold."""


@dataclass(frozen=True)
class Ask:
    """The command's options; see `llmrl score --help`."""

    out: Path
    urls: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    key_env: str | None = None
    structured: str = "json_schema"
    blind: bool = False
    both: bool = False
    reasons: bool = False
    baseline: bool = False
    k: tuple[int, ...] = (10,)
    confidence: str = "tail_mean"
    tail: float = 10.0
    """Percent."""
    strict: bool = False
    sampled: bool = False
    special_ids: tuple[int, ...] = ()
    per_problem: bool = False
    subsample: int = 50
    """0 = all."""
    top_half: bool = False
    selection: int = 0
    over: str = "traces"
    max_calls: int | None = None
    max_usd: float | None = None
    usd_per_mtok: tuple[float, float] | None = None
    dry_run: bool = False
    human: Path | None = None
    cache: str = "~/.cache/llmrl/judge"
    concurrency: int = 16
    timeout_s: float = 120.0
    read: dict[str, Any] = field(default_factory=choices)
    """What was said about the files: keywords of read_any."""
    score_with: tuple[str, ...] = ()
    """The model that fills missing raw_logprobs: one, or one a file."""
    dtype: str = "float32"
    resamples: int = 10_000
    seed: int = 42
    verifier: str | None = None
    verifier_args: dict[str, Any] | None = None


def make_ask(asked: dict[str, Any]) -> Ask:
    """From the options that were given; the others take their defaults. Raises InputError for values that make no sense."""
    found = {name: value for name, value in asked.items() if value is not None and value != ()}
    for name, known in (("structured", ("json_schema", "json_object", "none")), ("over", ("traces", "problems"))):
        if name in found and found[name] not in known:
            raise InputError(f"{name} = {found[name]!r}: expected {', '.join(known)}")
    if "usd_per_mtok" in found:
        try:
            read, written = map(float, found["usd_per_mtok"].split(","))
        except ValueError as error:
            raise InputError(f"--usd-per-mtok {found['usd_per_mtok']!r}: expected INPUT,OUTPUT such as 0.15,0.60") from error
        found["usd_per_mtok"] = (read, written)
    if found.get("blind") and found.get("both"):
        raise InputError("--blind is the blind judge alone and --both is it beside the paper's: give one of them")
    said = {name: found.pop(name) for name in SAID if name in found}
    return Ask(**{"out": Path("frs"), "read": choices(**said), **found})


def part(ref: str) -> Any:
    """MODULE:NAME of llmrl.evaluation."""
    return plugins.resolve(f"{EVALUATORS}.{ref}", home=EVALUATORS, base=Path())


class Source:
    """The traces of one file, as often as they are gone through; graded by the verifier where there is one.

    bad: rows that are no traces, {where, reason}, known after a reading.
    """

    def __init__(self, argument: str, ask: Ask, scorer: str | None = None) -> None:
        label, equals, path = argument.partition("=")
        named = bool(equals) and not Path(argument).exists()
        self.path = Path(path if named else argument)
        model, _, benchmark = label.partition("@") if named else ("", "", "")
        self.model, self.benchmark = model or None, benchmark or None
        self.ask, self.scorer = ask, scorer
        self.bad: list[dict[str, str]] = []
        if not self.path.exists():
            raise InputError(f"{self.path}: no such file")

    def __iter__(self) -> Iterator[Any]:
        if self.scorer is not None:
            yield from part("importers:read_any")(self.filled())
            return
        report = part("importers:ImportReport")(str(self.path))
        yield from part("importers:read_any")(self.path, report=report, **self.ask.read)
        self.bad = report.to_json()["bad"]

    def filled(self) -> Path:
        """The traces with the log-probs that `scorer` gives their texts: made once, kept in --out under what they were made from."""
        files = sorted(self.path.glob("samples/*")) if self.path.is_dir() else [self.path]
        facts = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        told = json.dumps([facts, self.ask.read, self.scorer, self.ask.dtype], sort_keys=True, default=str)
        path = self.ask.out / "filled" / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.jsonl.gz"
        report = path.with_suffix(".json")
        if not report.exists():
            made = import_files([self.path], path, score_with=self.scorer, dtype=self.ask.dtype, quiet=True, **self.ask.read)
            report.write_text(json.dumps(made) + "\n", encoding="utf-8")
        self.bad = json.loads(report.read_text(encoding="utf-8"))["files"][0]["bad"]
        return path

    def first(self) -> Iterator[Any]:
        """With verdicts: the pool keeps them, so that the later readings need no verifier."""
        return iter(self) if self.ask.verifier is None else graded(iter(self), self.path, self.ask.verifier, self.ask.verifier_args or {})


@dataclass
class Outcome:
    """results: by judge, then by file; comparison: None for a single pair; costs: what a dry run found, and nothing else then."""

    results: list[Any]
    comparison: Any
    notes: list[str]
    files: list[Path]
    costs: list[dict[str, Any]] | None

    def to_json(self) -> dict[str, Any]:
        if self.costs is not None:
            return {"dry_run": self.costs}
        told = [{key: value for key, value in r.to_json().items() if key != "judged"} for r in self.results]
        return {"results": told, "comparison": self.comparison and self.comparison.to_json(), "notes": self.notes, "files": [str(f) for f in self.files]}


def score_frs(files: Sequence[str], ask: Ask, *, quiet: bool = False) -> Outcome:
    """Everything is checked before the first call; a killed command goes on from OUT/judgements.jsonl."""
    judges, options = make_judges(ask), make_options(ask)
    sources = make_sources(files, ask)
    human = part("agreement:read_human")(ask.human) if ask.human else {}
    pools: list[tuple[Any, Source]] = []
    for source in sources:
        found = part("pool:scan")(source.first(), options.confidence, model=source.model, benchmark=source.benchmark)
        if not found:
            raise InputError(f"{source.path}: no traces")
        pools += [(pool, source) for pool in found.values()]
    _refuse_twins(pools)
    kept = part("judging:JudgementFile")(ask.out / "judgements.jsonl") if not ask.dry_run or (ask.out / "judgements.jsonl").exists() else None
    with kept or part("judging:JudgementFile")(None) as file:
        if ask.dry_run:
            return Outcome([], None, [], [], costs(pools, judges, options, file))
        results = judge_all(pools, judges, options, file, ask.concurrency, quiet=quiet)
    compare_judges(results, human)
    comparison = part("compare:compare")(results, resamples=ask.resamples, seed=ask.seed)
    notes = [*comparison.notes, *_notes(results, sources, options)]
    owners = [source for _ in judges for _, source in pools]
    files_out = part("report:write_report")(results, ask.out, traces=owners, comparison=comparison.to_json(), notes=notes)
    return Outcome(results, comparison, notes, files_out, None)


def make_sources(files: Sequence[str], ask: Ask) -> list[Source]:
    if len(ask.score_with) not in (0, 1, len(files)):
        raise InputError(f"{len(files)} files but {len(ask.score_with)} --score-with: name one model for all, or one a file")
    scorers = ask.score_with if len(ask.score_with) == len(files) else (ask.score_with or (None,)) * len(files)
    return [Source(file, ask, scorer) for file, scorer in zip(files, scorers, strict=True)]


def make_options(ask: Ask) -> Any:
    if ask.strict and ask.sampled:
        raise InputError("--strict takes raw log-probs only; leave --sampled-logprobs out")
    if ask.strict and ask.read["on_bad"] == "drop":
        raise InputError("--strict drops no row; leave --on-bad drop out")
    if any(not 1 <= k <= 100 for k in ask.k):
        raise InputError(f"-k {min(ask.k)}: the percent of the pool that is kept, from 1 to 100")
    confidence = part("confidence:Confidence")(
        ask.confidence, ask.tail / 100, part("confidence:Guard")() if ask.strict else None, frozenset(ask.special_ids), ask.sampled
    )  # fmt: skip
    head, *more = (k / 100 for k in ask.k)
    ks = (head, *more) if more else TENTHS if head in TENTHS else (head, 0.2, 0.5, 1.0)
    return part("frs:Options")(
        k=head, ks=tuple(ks), confidence=confidence, per_problem=ask.per_problem, subsample=ask.subsample or None, top_half=ask.top_half,
        selection=ask.selection, over=ask.over, seed=ask.seed, resamples=ask.resamples,
    )  # fmt: skip


def make_judges(ask: Ask) -> list[Any]:
    """The paper's and the blind one of every model, then the baseline."""
    if not ask.models and not ask.baseline:
        raise InputError("name a judge: --judge-url http://HOST:PORT/v1 --judge-model NAME; or --baseline for the scorer without a language model")
    if ask.models and len(ask.urls) not in (1, len(ask.models)):
        raise InputError(f"{len(ask.models)} --judge-model but {len(ask.urls)} --judge-url: give one address for all, or one each")
    if ask.urls and not ask.models:
        raise InputError("--judge-url needs a --judge-model")
    judges = []
    for i, model in enumerate(ask.models):
        for blind in (False, True) if ask.both else (ask.blind,):
            judges.append(part("dimensions:EndpointJudge")(
                model=model, base_url=ask.urls[i if len(ask.urls) > 1 else 0], blind=blind, reasons=ask.reasons, api_key_env=ask.key_env,
                structured=ask.structured, cache=Path(ask.cache).expanduser() if ask.cache else None, usd_per_mtok=ask.usd_per_mtok,
                max_calls=ask.max_calls, max_usd=ask.max_usd, max_concurrent=ask.concurrency, timeout_s=ask.timeout_s,
            ))  # fmt: skip
    for judge in judges:
        judge.check()
    judges += [part("rules_baseline:RulesBaseline")()] if ask.baseline else []
    names = [j.name for j in judges]
    if len(set(names)) < len(names):
        raise InputError(f"a judge is named twice: {', '.join(names)}")
    return judges


def _refuse_twins(pools: Sequence[tuple[Any, Source]]) -> None:
    seen: dict[tuple[str, str], Source] = {}
    for pool, source in pools:
        before = seen.setdefault((pool.model, pool.benchmark), source)
        if before is not source:
            raise InputError(
                f"{before.path} and {source.path} both hold traces of {pool.model!r} on {pool.benchmark!r}: give them names, "
                f"e.g. before@gsm8k={before.path} after@gsm8k={source.path}; parts of one sample belong into one file"
            )


def costs(pools: Sequence[tuple[Any, Source]], judges: Sequence[Any], options: Any, file: Any) -> list[dict[str, Any]]:
    """One row a pool and judge: what judging it would take. No call is made."""
    rows = []
    for pool, source in pools:
        asked = part("frs:plan")(pool, options).asked
        cases, _, _ = part("frs:cases_of")(source, pool, asked, options)
        for judge in judges:
            part("frs:refuse_unshowable")(cases, judge)
            if hasattr(judge, "base_url"):
                rows.append({"model": pool.model, "benchmark": pool.benchmark, "traces": len(pool), **part("judging:cost")(cases, judge, file)})
    return rows


def judge_all(pools: Sequence[tuple[Any, Source]], judges: Sequence[Any], options: Any, file: Any, workers: int, *, quiet: bool) -> list[Any]:
    """Results by judge, then by pool, with a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    results = []
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("judged"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        for judge in judges:
            for pool, source in pools:
                task = bar.add_task(f"{judge.name}: {pool.model} on {pool.benchmark}", total=len(part("frs:plan")(pool, options).asked))

                def each(done: int, task: Any = task) -> None:
                    bar.update(task, completed=done)

                results.append(part("frs:score_pool")(pool, source, judge, options, file, workers=workers, each=each))
    return results


def compare_judges(results: Sequence[Any], human: dict[str, Any]) -> None:
    """Fills in `judge["agreement"]` of every result: with every other judge of the same pair, and with every person."""
    scores = [{t.id: t.scores for t in r.judged if t.scores is not None} for r in results]
    for r, own in zip(results, scores, strict=True):
        others = {o.judge["name"]: s for o, s in zip(results, scores, strict=True) if o is not r and (o.model, o.benchmark) == (r.model, r.benchmark)}
        found = {name: part("agreement:agreement")(own, other) for name, other in {**others, **{f"person: {n}": s for n, s in human.items()}}.items()}
        r.judge["agreement"] = {name: row for name, row in found.items() if row["traces"]}


def _notes(results: Sequence[Any], sources: Sequence[Source], options: Any) -> list[str]:
    notes = [f"{s.path}: {len(s.bad)} rows are no traces and were left out; the first is {s.bad[0]['where']}: {s.bad[0]['reason']}" for s in sources if s.bad]
    short = [r for r in results if any(n for why, n in r.dropped.items() if why.startswith("not asked"))]
    if short:
        notes.append(f"the budget ended the judging of {len(short)} of {len(results)} results early: what was judged is a random part of each stratum")
    if options.confidence.sampled:
        notes.append("confidence may rest on probabilities of the distribution that was sampled from, not on raw ones: not the paper's")
    notes += [f"{r.judge['name']}: {r.label}" for r in results[:1] if not r.is_frs]
    return notes


def cost_table(rows: Sequence[dict[str, Any]]) -> Any:
    """For `rich.print`: the dry run, with its sum."""
    from rich.table import Table

    total = None if any(r["usd"] is None for r in rows) else sum(r["usd"] for r in rows)
    calls = sum(r["calls"] for r in rows)
    table = Table(title="What judging would cost (no call was made)", caption=(
        f"{calls} calls; tokens are estimated from lengths, retries come on top"
        + ("; no price is known: give --usd-per-mtok INPUT,OUTPUT" if total is None else f"; about {total:.4g} USD")
    ))  # fmt: skip
    for name in ("judge", "model", "benchmark", "traces", "calls", "judged before", "prompt tokens", "reply tokens", "USD"):
        words = name in ("judge", "model", "benchmark")
        table.add_column(name, justify="left" if words else "right", no_wrap=name in ("calls", "USD"), overflow="fold")
    for r in rows:
        numbers = [str(r[n]) for n in ("traces", "calls", "judged_before", "prompt_tokens", "completion_tokens")]
        table.add_row(r["judge"], r["model"], r["benchmark"], *numbers, "-" if r["usd"] is None else f"{r['usd']:.3g}")
    return table

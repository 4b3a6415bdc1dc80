"""Several FRS results side by side: leaderboard with intervals, accuracy ties, transfer between benchmarks, K, paired differences, judges.

Everything is computed from `FRSResult`s alone (their JSON files will do): no trace is read again and no judge is asked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from llmrl.evaluation.agreement import agreement
from llmrl.evaluation.estimator import Measured, Values, bootstrap_means, resample_sums, union
from llmrl.evaluation.frs import FRSResult, percent, points
from llmrl.evaluation.selection import foretold
from llmrl.evaluation.transfer import POINTS, disagreement, macro, spearman, ties, transfer
from llmrl.records import InputError

MIN_GAP = 8.0
"""Points below which one benchmark's 50 traces a cell do not rank two models (frs.md, failure mode 5)."""


FEW_PROBLEMS = 5
"""A kept set of fewer problems is told of: its interval knows nothing of other problems. OUR CHOICE."""


@dataclass(frozen=True)
class Row:
    """A model's line of the leaderboard, by one judge."""

    model: str
    mean: Measured
    """Points: unweighted mean over the benchmarks; no value where one is missing."""
    cells: dict[str, Measured]
    """Points, by benchmark."""
    accuracy: dict[str, float | None]
    """pass@1 of the same traces, in points."""
    unfiltered: dict[str, float | None]
    single_trace: dict[str, float | None]
    top_accuracy: dict[str, float | None]

    def told(self, benchmark: str) -> str:
        """A cell of the leaderboard as text."""
        if benchmark not in self.cells:
            return "-"
        accuracy = self.accuracy.get(benchmark)
        return points(self.cells[benchmark]) + ("" if accuracy is None else f" ({accuracy:.1f})")


@dataclass(frozen=True)
class Comparison:
    """See the fields; None = cannot be said from these results."""

    label: str
    k: float
    models: list[str]
    """By their mean, the best first; those without a mean last."""
    benchmarks: list[str]
    leaderboard: list[Row]
    """By the first judge."""
    ties: list[dict[str, Any]]
    """For 1, 2, 3, 5 points of pass@1: see transfer.ties; with the gaps of the unfiltered mean and of single traces."""
    transfer: list[dict[str, Any]]
    """{from, to, spearman, pearson, folds}: leave one benchmark out."""
    k_sensitivity: list[dict[str, Any]]
    """{k, means: {model: points}, spearman}: rank correlation of the model means at this K with those at the headline's."""
    filter_against_single: dict[str, Any]
    """Pairs of models that FRS and single traces order differently."""
    selection: dict[str, Any]
    """{mean, pairs, predictors}: gain of a problem's most confident trace over a random one, points, and what goes with it: see selection.foretold."""
    pairs: list[dict[str, Any]]
    """Paired bootstrap of two models on a benchmark: {a, b, benchmark, difference, low, high, p, problems, paired}; difference is a - b, points."""
    judges: list[dict[str, Any]]
    """Other judges against the first: {judge, label, means, spearman, difference, agreement}."""
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def tables(self) -> list[Table]:
        """For `rich.print`: the leaderboard first, then what there are results for."""
        caption = "points [95 % interval]; pass@1 of the same traces in brackets\n" + "\n".join(self.notes)
        board = Table(title=f"{self.label}, K = {100 * self.k:g} %", caption=caption)
        for i, name in enumerate(("model", "mean", *self.benchmarks)):
            board.add_column(name, justify="left" if i == 0 else "right")
        for row in self.leaderboard:
            board.add_row(row.model, points(row.mean), *(row.told(b) for b in self.benchmarks))
        tables = [board]
        if self.pairs:
            tables.append(_table("Differences (a - b), problems resampled", ("a", "b", "benchmark", "difference", "p"), [
                (p["a"], p["b"], p["benchmark"], points(Measured(p["difference"], p["low"], p["high"])), _number(p["p"], 3)) for p in self.pairs
            ]))  # fmt: skip
        if any(t["pairs"] for t in self.ties):
            tables.append(_table("Pairs that are tied in pass@1", ("within points", "pairs", "FRS gap", "unfiltered gap", "single-trace gap"), [
                (f"{t['points']:g}", str(t["pairs"]), *(_number(t[name]) for name in ("score_gap", "unfiltered_gap", "single_trace_gap"))) for t in self.ties
            ]))  # fmt: skip
        if any(t["spearman"] is not None for t in self.transfer):
            tables.append(_table("Transfer, one benchmark left out", ("from", "to", "Spearman", "Pearson"), [
                (t["from"], t["to"], _number(t["spearman"], 3), _number(t["pearson"], 3)) for t in self.transfer
            ]))  # fmt: skip
        if any(r["pearson"] is not None for r in self.selection["predictors"]):
            g = self.selection
            title = f"A problem's most confident trace less a random one: {_number(g['mean'])} points over {g['pairs']} pairs of model and benchmark"
            tables.append(_table(title, ("what goes with the gain", "Pearson", "pairs"), [
                (r["predictor"], _number(r["pearson"], 3), str(r["pairs"])) for r in g["predictors"]
            ]))  # fmt: skip
        if self.judges:
            tables.append(_table("Judges against the first", ("judge", "mean difference", "rank correlation", "exact %", "within one %", "kappa"), [
                (j["judge"], _number(j["difference"]), _number(j["spearman"], 3), percent(j["agreement"]["all"]["exact"]),
                 percent(j["agreement"]["all"]["within_one"]), _number(j["agreement"]["all"]["kappa"], 3)) for j in self.judges
            ]))  # fmt: skip
        return tables


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# ---------------------------------------------------------------- bootstrap over results


def parts_of(result: FRSResult, k: float) -> list[Values]:
    """The judged traces of a result up to the share k, as `estimator.estimate` takes them; groups are numbers of problems in `judged`."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(t.prompt_id for t in result.judged))}
    parts = []
    for b, stratum in enumerate(result.settings["strata"]):
        if stratum["k"] > k + 1e-12 or not stratum["traces"]:
            continue
        asked = [t for t in result.judged if t.bin == b]
        known = [t for t in asked if t.quality is not None]
        quality, group = np.array([t.quality for t in known], float), np.array([numbers[t.prompt_id] for t in known], int)
        parts.append(Values(quality, stratum["traces"], group, complete=len(asked) == stratum["traces"]))
    if len(parts) > 1 and all(p.complete for p in parts):
        groups = np.concatenate([p.group_n for p in parts if p.group_n is not None])
        parts = [Values(np.concatenate([p.value_n for p in parts]), sum(p.of for p in parts), groups, True)]
    return parts


def mean_of(cells: Sequence[FRSResult], k: float, *, resamples: int = 10_000, seed: int = 42) -> Measured:
    """A model's mean over its benchmarks: traces are resampled within each benchmark, and the means averaged."""
    found = [c.by_k.get(k, Measured(None, None, None)) for c in cells]
    values = [m.value for m in found if m.value is not None]
    n, of = sum(m.n for m in found), sum(m.of for m in found)
    if len(values) < len(cells) or not cells:
        return Measured(None, None, None, n=n, of=of)
    draws = []
    for i, cell in enumerate(cells):
        parts = [Values(p.value_n, p.of, None, p.complete) for p in parts_of(cell, k)]
        draws.append(bootstrap_means(parts, resamples=resamples, seed=seed + i) if parts else None)
    low, high = (None, None) if any(d is None for d in draws) else 100 * np.percentile(np.mean([d for d in draws if d is not None], axis=0), [2.5, 97.5])
    errors = [m.se for m in found]
    se = None if any(e is None for e in errors) else float(np.sqrt(sum(e * e for e in errors if e is not None)) / len(cells))
    return Measured(float(np.mean(values)), None if low is None else float(low), None if high is None else float(high), se=se, n=n, of=of)


def paired(a: FRSResult, b: FRSResult, k: float | None = None, *, resamples: int = 10_000, seed: int = 42) -> dict[str, Any]:
    """FRS of a minus FRS of b on one benchmark, points: problems are drawn with replacement, the same ones for both.

    A problem without a kept trace counts as one, too. low, high: 2.5 and 97.5 percentiles. p: two-sided, twice the share of resamples
    on the other side of 0. paired: problems with judged kept traces of both; where it is 0 the difference is that of two independent sets.
    """
    k = a.k if k is None else k
    sides = [parts_of(r, k) for r in (a, b)]
    name = {"a": a.model, "b": b.model, "benchmark": a.benchmark, "k": k}
    nothing = {**name, "difference": None, "low": None, "high": None, "p": None, "problems": 0, "paired": 0}
    if any(not parts or any(not len(p.value_n) for p in parts) for parts in sides):
        return nothing
    all_ids = sorted({t.prompt_id for r in (a, b) for t in r.judged})
    place = {name: i for i, name in enumerate(all_ids)}
    rows = max(len(all_ids), a.problems, b.problems)
    columns, seen = [], []
    for r, parts in zip((a, b), sides, strict=True):
        own = np.array([place[x] for x in dict.fromkeys(t.prompt_id for t in r.judged)])
        groups = [own[p.group_n] for p in parts if p.group_n is not None]
        seen.append(set(np.concatenate(groups).tolist()))
        for p, g in zip(parts, groups, strict=True):
            columns += [np.bincount(g, weights=w, minlength=rows) for w in (p.value_n, None)]
    split = 2 * len(sides[0])
    table = np.stack(columns, axis=1).astype(float)
    sums = resample_sums(table, resamples, np.random.Generator(np.random.Philox(seed)))
    if sums is None:
        return nothing

    def difference(s: np.ndarray) -> np.ndarray:
        one, two = (union(part, [p.of for p in parts]) for part, parts in zip((s[:, :split], s[:, split:]), sides, strict=True))
        return 100 * (one - two)

    draws = difference(sums)
    draws = draws[~np.isnan(draws)]
    low, high = np.percentile(draws, [2.5, 97.5])
    p = min(1.0, 2 * float(min((draws <= 0).mean(), (draws >= 0).mean())))
    value = float(difference(table.sum(axis=0, keepdims=True))[0])
    return {**name, "difference": value, "low": float(low), "high": float(high), "p": p, "problems": rows, "paired": len(seen[0] & seen[1])}


# ---------------------------------------------------------------- the comparison


def compare(results: Sequence[FRSResult], *, resamples: int = 10_000, seed: int = 42) -> Comparison:
    """Results of models x benchmarks, by one judge or several (told apart by judge["name"]; the first one's leads).

    Raises InputError where a pair has two results by one judge, or the results filter at different K.
    """
    if not results:
        raise InputError("no results to compare")
    if len({r.k for r in results}) > 1:
        raise InputError(f"the results filter at different K: {sorted({r.k for r in results})}; score them alike")
    by_judge: dict[str, dict[tuple[str, str], FRSResult]] = {}
    for r in results:
        cells = by_judge.setdefault(r.judge["name"], {})
        if (r.model, r.benchmark) in cells:
            raise InputError(f"{r.model} on {r.benchmark} is there twice; give one of them another name: NAME@BENCHMARK=FILE")
        cells[r.model, r.benchmark] = r
    (_, cells), *others = by_judge.items()
    k, label = results[0].k, results[0].label
    benchmarks = list(dict.fromkeys(b for _, b in cells))
    rows = [_row(m, cells, benchmarks, k, resamples, seed) for m in dict.fromkeys(m for m, _ in cells)]
    rows.sort(key=lambda r: -np.inf if r.mean.value is None else r.mean.value, reverse=True)
    models = [r.model for r in rows]
    tables = {"FRS": _grid(rows, benchmarks, lambda r, b: r.cells[b].value if b in r.cells else None)}
    for name, attribute in (("pass@1", "accuracy"), ("unfiltered", "unfiltered"), ("single trace", "single_trace"), ("top-K accuracy", "top_accuracy")):
        tables[name] = _grid(rows, benchmarks, lambda r, b, attribute=attribute: getattr(r, attribute).get(b))
    pairs = [
        paired(cells[a, bench], cells[b, bench], k, resamples=resamples, seed=seed)
        for a, b in combinations(models, 2) for bench in benchmarks if (a, bench) in cells and (b, bench) in cells
    ]  # fmt: skip
    return Comparison(
        label=label, k=k, models=models, benchmarks=benchmarks, leaderboard=rows, ties=_ties(tables), transfer=_transfers(tables),
        k_sensitivity=_k_sensitivity(models, benchmarks, cells, k), filter_against_single=disagreement(tables["FRS"], tables["single trace"]),
        selection=foretold([r.gain.value for r in cells.values()], {
            "FRS": [r.frs.value for r in cells.values()], "accuracy of the kept": [r.top_accuracy.get(k) for r in cells.values()],
            "unfiltered": [r.unfiltered.value for r in cells.values()], "single trace": [r.single_trace.value for r in cells.values()],
            "pass@1": [r.pass_at_1.value for r in cells.values()],
        }),
        pairs=pairs, judges=[_against(name, other, cells, models, benchmarks) for name, other in others], notes=_notes(rows, pairs, cells),
    )  # fmt: skip


def _row(model: str, cells: dict[tuple[str, str], FRSResult], benchmarks: list[str], k: float, resamples: int, seed: int) -> Row:
    own = {b: cells[model, b] for b in benchmarks if (model, b) in cells}
    whole = [own[b] for b in benchmarks] if len(own) == len(benchmarks) else []

    def scaled(value: float | None) -> float | None:
        return None if value is None else 100 * value

    return Row(
        model, mean_of(whole, k, resamples=resamples, seed=seed), {b: r.frs for b, r in own.items()},
        accuracy={b: scaled(r.pass_at_1.value) for b, r in own.items()}, unfiltered={b: r.unfiltered.value for b, r in own.items()},
        single_trace={b: r.single_trace.value for b, r in own.items()}, top_accuracy={b: scaled(r.top_accuracy.get(k)) for b, r in own.items()},
    )  # fmt: skip


def _grid(rows: Sequence[Row], benchmarks: Sequence[str], get: Any) -> np.ndarray:
    """[M, B] in the order of the rows; NaN where there is nothing."""
    return np.array([[np.nan if (v := get(r, b)) is None else v for b in benchmarks] for r in rows], float).reshape(len(rows), len(benchmarks))


def recorded() -> dict[str, Any]:
    """The paper's table (data/frs_table.json) through the same functions: {models, benchmarks, means: {FRS, pass@1}, ties, transfer}."""
    found = json.loads((Path(__file__).parent / "data" / "frs_table.json").read_text(encoding="utf-8"))
    tables = {"FRS": np.array(list(found["frs"].values())), "pass@1": np.array(list(found["pass_at_1"].values()))}
    means = {name: macro(table).tolist() for name, table in tables.items()}
    return {"models": list(found["frs"]), "benchmarks": found["benchmarks"], "means": means, "ties": _ties(tables), "transfer": _transfers(tables)}


def _ties(tables: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    found, others = [], [n for n in ("unfiltered", "single trace") if n in tables]
    for limit in POINTS:
        other = {f"{n.replace(' ', '_')}_gap": ties(tables["pass@1"], tables[n], limit)["score_gap"] for n in others}
        found.append({**ties(tables["pass@1"], tables["FRS"], limit), **other})
    return found


def _transfers(tables: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    routes = [(name, name) for name in tables] + [(name, "FRS") for name in tables if name != "FRS"] + [("FRS", "pass@1")]
    return [{"from": a, "to": b, **transfer(tables[a], tables[b])} for a, b in routes]


def _k_sensitivity(models: list[str], benchmarks: list[str], cells: dict[tuple[str, str], FRSResult], k: float) -> list[dict[str, Any]]:
    def means(at: float) -> np.ndarray:
        def value(m: str, b: str) -> float:
            found = cells[m, b].by_k.get(at) if (m, b) in cells else None
            return np.nan if found is None or found.value is None else found.value

        return macro(np.array([[value(m, b) for b in benchmarks] for m in models]))

    head, found = means(k), []
    for at in sorted({at for r in cells.values() for at in r.by_k}):
        own = means(at)
        known = ~np.isnan(own) & ~np.isnan(head)
        rho = spearman(own[known], head[known]) if known.sum() >= 3 else None
        found.append({"k": at, "means": {m: None if np.isnan(v) else float(v) for m, v in zip(models, own, strict=True)}, "spearman": rho})
    return found


def _against(
    name: str, other: dict[tuple[str, str], FRSResult], cells: dict[tuple[str, str], FRSResult], models: list[str], benchmarks: list[str]
) -> dict[str, Any]:
    """Another judge's model means and scores against the first's: the traces that both scored, and the cells that both have."""
    tables = [np.array([[_value(of, m, b) for b in benchmarks] for m in models], float) for of in (other, cells)]
    means = [macro(t) for t in tables]
    known = ~np.isnan(means[0]) & ~np.isnan(means[1])
    apart = (tables[0] - tables[1])[~np.isnan(tables[0] - tables[1])]
    scored = [{f"{m}/{b}/{t.id}": t.scores for (m, b), r in of.items() for t in r.judged if t.scores is not None} for of in (other, cells)]
    return {
        "judge": name, "label": next(iter(other.values())).label,
        "means": {m: None if np.isnan(v) else float(v) for m, v in zip(models, means[0], strict=True)},
        "spearman": spearman(means[0][known], means[1][known]) if known.sum() >= 3 else None,
        "difference": float(apart.mean()) if len(apart) else None,
        "agreement": agreement(*scored),
    }  # fmt: skip


def _value(cells: dict[tuple[str, str], FRSResult], model: str, benchmark: str) -> float:
    found = cells.get((model, benchmark))
    return np.nan if found is None or found.frs.value is None else found.frs.value


def _notes(rows: list[Row], pairs: list[dict[str, Any]], cells: dict[tuple[str, str], FRSResult]) -> list[str]:
    """What a reader must know before he ranks anything."""
    notes = []
    if unpaired := [p for p in pairs if p["difference"] is not None and not p["paired"]]:
        p = unpaired[0]
        notes.append(f"{p['a']} and {p['b']} share no problem among their judged traces on {p['benchmark']}: is it the same benchmark?")
    close = [p for p in pairs if p["difference"] is not None and abs(p["difference"]) < MIN_GAP and p["low"] < 0 < p["high"]]
    if close:
        notes.append(f"{len(close)} of {len(pairs)} differences on one benchmark are not told apart (interval over 0, below {MIN_GAP:g} points)")
    few = {f"{m} on {b}": round(r.composition["problem_share"] * r.problems) for (m, b), r in cells.items() if r.composition["problem_share"] is not None}
    if few := {name: n for name, n in few.items() if n < FEW_PROBLEMS}:
        notes.append("the kept traces come from few problems, and their intervals know of no others: " + ", ".join(f"{name} {n}" for name, n in few.items()))
    if gaps := [r.model for r in rows if r.mean.value is None]:
        notes.append(f"without a mean, for want of a benchmark or of judgements: {', '.join(gaps)}")
    if lost := sum(n for r in cells.values() for why, n in r.dropped.items() if why != "judgement failed" and "not asked" not in why):
        notes.append(f"{lost} traces had no confidence and are in no pool")
    if failed := sum(r.dropped.get("judgement failed", 0) for r in cells.values()):
        notes.append(f"{failed} judgements failed and are in no mean")
    return notes

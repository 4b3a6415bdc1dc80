"""One page from one or several FRS results: `report.html` that works from a file without a network, with `report.json` and `report.md` beside it.

The page holds its data as JSON in a script element that no browser executes, and one script of its own; a content security policy lets nothing
else run and nothing be fetched, and texts enter the page as text only: a trace that holds HTML shows it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrl.evaluation.frs import FRSResult, Measured, percent, points
from llmrl.evaluation.traces import Trace

PILLARS = ("faithfulness", "utility", "coherence", "factuality")
HERE = Path(__file__).parent / "templates"
MAX_POINTS = 3000
"""Judged traces of a result in the plot of confidence against quality, at most."""
HEAD, TAIL = 3000, 1000
"""Tokens of a trace that the page holds: this many from its beginning and its end."""
MAX_TEXT = 40_000
"""Characters of a prompt, or of a response without token texts."""


def write_report(
    results: Sequence[FRSResult], out: str | Path, *, traces: Sequence[Iterable[Trace]] | None = None, comparison: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (), cap: int = 400, max_bytes: int = 16_000_000, title: str = "Filtered Reasoning Score",
) -> list[Path]:  # fmt: skip
    """Writes report.html, report.json and report.md into the folder `out` and returns their paths.

    traces: for each result the traces that it was made from, read once; without them the page shows no texts. comparison: of several
    results, goes into the JSON and the page as it is. notes: sentences shown on top. cap, max_bytes: traces and bytes of them that the page
    holds at most; it says how many there would be.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    shown, left = chosen_traces(results, traces, cap=cap, max_bytes=max_bytes)
    data = page_data(results, shown, left, comparison=comparison, notes=notes, title=title)
    whole = {"results": [r.to_json() for r in results], "comparison": comparison, "notes": list(notes)}
    files = {
        "report.html": page(data), "report.json": json.dumps(finite(whole), indent=1, ensure_ascii=False) + "\n", "report.md": markdown(results, notes, title),
    }  # fmt: skip
    for name, text in files.items():
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8", errors="replace")
        part.replace(folder / name)
    return [folder / name for name in files]


# ---------------------------------------------------------------- what the page holds


def page_data(
    results: Sequence[FRSResult], shown: Sequence[dict[str, Any]] = (), left: Mapping[str, Any] | None = None, *,
    comparison: Mapping[str, Any] | None = None, notes: Sequence[str] = (), title: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Everything that the page shows, as JSON values."""
    rows = []
    for r, name in zip(results, series(results), strict=True):
        row = {key: value for key, value in r.to_json().items() if key != "judged"}
        row["frs"] = row.get("baseline") or row["frs"]  # the page tells them apart by is_frs
        step = max(1, math.ceil(len(r.judged) / MAX_POINTS))
        row |= {
            "series": name, "is_frs": r.is_frs, "judged_n": len(r.judged), "pillars": {"kept": pillars(r, True), "all": pillars(r, False)},
            "points": [[round(t.confidence, 5), t.quality, t.correct, t.id] for t in r.judged[::step] if t.quality is not None], "points_step": step,
        }  # fmt: skip
        rows.append(row)
    data = {"title": title, "notes": list(notes), "results": rows, "comparison": comparison, "traces": list(shown), "traces_left": dict(left or {})}
    return finite(data)


def series(results: Sequence[FRSResult]) -> list[str]:
    """For each result the name under which it stands beside others: its label, and its judge where several judges share the label."""
    judges = {label: {r.judge["name"] for r in results if r.label == label} for label in {r.label for r in results}}
    return [r.label if len(judges[r.label]) == 1 else f"{r.label} by {r.judge['name'].removesuffix(' (blind)')}" for r in results]


def is_kept(result: FRSResult, trace: Any) -> bool:
    """Whether a judged trace is in the set that the headline is about."""
    strata = result.settings.get("strata")
    if strata and trace.bin is not None and trace.bin < len(strata):
        return strata[trace.bin]["k"] <= result.k + 1e-9
    return trace.rank < max(1, math.floor(result.k * result.traces + 1e-9))


def pillars(result: FRSResult, kept: bool) -> dict[str, Any]:
    """Mean of each dimension's scores, 1 to 5, over the judged traces of the kept set, or over all that were judged; None where there are none."""
    scores = [t.scores for t in result.judged if t.scores and (not kept or is_kept(result, t))]
    return {"n": len(scores)} | {p: sum(s[p] for s in scores) / len(scores) if scores else None for p in PILLARS}


def chosen_traces(
    results: Sequence[FRSResult], traces: Sequence[Iterable[Trace]] | None, *, cap: int, max_bytes: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(traces that the page holds, how many there would be). Half of a result's share are its most confident ones, half are spread over the others."""
    if traces is None:
        return [], {}
    if len(traces) != len(results):
        raise ValueError(f"{len(results)} results but {len(traces)} sources of traces")
    share = max(1, cap // max(1, len(results)))
    shown: list[dict[str, Any]] = []
    used = 0
    for number, (result, source) in enumerate(zip(results, traces, strict=True)):
        judged = {t.id: t for t in spread(result.judged, share)}
        found = {}
        for trace in source:
            if trace.id in judged:
                found[trace.id] = shown_trace(trace, judged[trace.id], number, is_kept(result, judged[trace.id]))
        limit = used + (max_bytes - used) / (len(results) - number)  # each result gets its part of what is left
        for name in judged:
            if name not in found:
                continue
            size = len(json.dumps(found[name], ensure_ascii=False).encode(errors="replace"))
            if used + size <= limit:
                used += size
                shown.append(found[name])
    return shown, {"judged": sum(len(r.judged) for r in results), "shown": len(shown), "cap": cap, "max_bytes": max_bytes}


def spread(rows: Sequence[Any], n: int) -> list[Any]:
    """n of rows: the first half of them from the beginning, the others evenly from the rest; in order."""
    if len(rows) <= n:
        return list(rows)
    first = math.ceil(n / 2)
    rest, more = len(rows) - first, n - first
    return [*rows[:first], *(rows[first + (2 * j + 1) * rest // (2 * more)] for j in range(more))]


def shown_trace(trace: Trace, judged: Any, result: int, kept: bool) -> dict[str, Any]:
    """One trace of the browser. tokens and p (probability of each) leave out the middle of a long trace: gap = [index, how many]."""
    row: dict[str, Any] = {
        "r": result, "id": trace.id, "problem": trace.prompt_id, "sample": trace.sample, "prompt": short(trace.prompt), "gold": trace.gold,
        "answer": trace.answer, "status": trace.status, "finish": trace.finish, "correct": judged.correct, "quality": judged.quality,
        "scores": judged.scores, "reasons": judged.reasons, "failure": judged.failure, "confidence": judged.confidence, "rank": judged.rank,
        "bin": judged.bin, "kept": kept, "length": judged.tokens,
    }  # fmt: skip
    if trace.prompt is None and trace.messages:
        row["prompt"] = short("\n\n".join(f"{m['role']}: {m['content']}" for m in trace.messages))
    logs = trace.raw_logprobs if trace.raw_logprobs is not None else trace.logprobs
    if trace.tokens is None or logs is None:
        return row | {"text": short(trace.response)}
    n = len(trace.tokens)
    index = list(range(n)) if n <= HEAD + TAIL else [*range(HEAD), *range(n - TAIL, n)]
    place = {i: k for k, i in enumerate(index)}
    row |= {"tokens": [trace.tokens[i] for i in index], "p": [float(f"{math.exp(min(logs[i], 0.0)):.3g}") for i in index]}
    row["low"] = [place[i] for i in judged.low_tokens if i in place]
    return row | ({"gap": [HEAD, n - HEAD - TAIL]} if n > HEAD + TAIL else {})


def short(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} [... {len(text) - MAX_TEXT} characters left out]"


def finite(value: Any) -> Any:
    """Without NaN and infinity, which JSON has not: None."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- the page


def embedded(data: Any) -> str:
    """JSON that may stand in a script element: without <, > and &, nothing in it can end the element or begin another."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def page(data: dict[str, Any]) -> str:
    """The HTML of the report."""
    html, css, *scripts = ((HERE / name).read_text(encoding="utf-8") for name in ("report.html", "report.css", "report.js", "report_traces.js"))
    js = "\n".join(scripts)
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    parts = {"CSS": css, "DIGEST": digest, "DATA": embedded(data), "JS": js}
    for name in parts:
        assert html.count(f"@@{name}@@") == 1
    before, _, rest = html.partition("@@DIGEST@@")  # one after the other: what is put in is not looked through again
    out = before + parts["DIGEST"]
    for name in ("CSS", "DATA", "JS"):
        before, _, rest = rest.partition(f"@@{name}@@")
        out += before + parts[name]
    return out + rest


# ---------------------------------------------------------------- markdown


def markdown(results: Sequence[FRSResult], notes: Sequence[str] = (), title: str = "Filtered Reasoning Score") -> str:
    """The tables, for a repository or a chat. Scorers that are no language model get a table of their own."""
    lines = [f"# {_cell(title)}", "", *(f"- {_line(n)}" for n in notes), *([""] if notes else [])]
    names = series(results)
    for label in dict.fromkeys(names):
        rows = [r for r, name in zip(results, names, strict=True) if name == label]
        kept = f"{_cell(label)}, K = {100 * rows[0].k:g} %"
        head = ("model", "benchmark", kept, "unfiltered", "one trace a problem", "right among the kept, %", "pass@1, %", "ECE", "traces", "judged")
        lines += [f"## {_cell(label)}", "", f"| {' | '.join(head)} |", f"|{'---|' * 2}{'---:|' * (len(head) - 2)}"]
        for r in sorted(rows, key=lambda r: (r.benchmark, -(r.frs.value if r.frs.value is not None else -1.0))):
            cells = [
                _cell(r.model), _cell(r.benchmark), points(r.frs), points(r.unfiltered), points(r.single_trace), percent(r.top_accuracy.get(r.k)),
                points(r.pass_at_1, 100), "-" if r.ece is None else f"{r.ece:.3f}", str(r.traces), str(sum(t.quality is not None for t in r.judged)),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "Quality by the share K of the most confident traces that is kept:", ""]
        ks = sorted({k for r in rows for k in r.by_k})
        lines += [f"| model | benchmark | {' | '.join(f'{100 * k:g} %' for k in ks)} |", f"|---|---|{'---:|' * len(ks)}"]
        lines += [f"| {_cell(r.model)} | {_cell(r.benchmark)} | {' | '.join(_value(r.by_k.get(k)) for k in ks)} |" for r in rows]
        lines += ["", "Mean scores (1 to 5) of the kept traces:", ""]
        lines += [f"| model | benchmark | {' | '.join(PILLARS)} | n |", "|---|---|---:|---:|---:|---:|---:|"]
        for r in rows:
            mean = pillars(r, True)
            lines.append(f"| {_cell(r.model)} | {_cell(r.benchmark)} | {' | '.join(_number(mean[p]) for p in PILLARS)} | {mean['n']} |")
        lines.append("")
        for r in rows:
            lost = "; ".join(f"{n} x {_line(why)}" for why, n in r.dropped.items() if n)
            lines += [f"- {_line(r.model)} on {_line(r.benchmark)}: left out: {lost}"] if lost else []
    return "\n".join(lines).rstrip() + "\n"


def _value(m: Measured | None) -> str:
    return "-" if m is None or m.value is None else f"{m.value:.1f}"


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|").replace("<", "&lt;")

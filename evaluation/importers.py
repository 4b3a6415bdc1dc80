"""Traces from the files of others: run directories of llmrl, OpenAI and vLLM response logs, lm-eval and lighteval samples, plain rows.

`read_any` tells the format from the content, streams, and completes what `formats` finds in a row: ids, samples counted per problem, gold
answers joined from another file. What a format cannot hold stays None and is named in the report: no token's probability, no confidence.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from llmrl.evaluation import formats
from llmrl.evaluation.formats import Draft, Row, Source
from llmrl.evaluation.traces import SCHEMA, BadTrace, Trace, bad_report, file_lines, parse_trace, refuse
from llmrl.records import InputError

MISSING = {
    "run": "a training step keeps the log-probs of what it sampled from; they are raw only where rollout sampled at temperature 1 without cuts",
    "openai": 'ask for them with "logprobs": true. Whether they are raw the log tells only where the request is in it (with temperature 1)',
    "vllm": "sample with SamplingParams(logprobs=0)",
    "lm-eval": "lm-eval --log_samples keeps no token's log-prob",
    "lighteval": "lighteval keeps log-probs with one backend only, of the first response only, and does not say under which temperature",
    "rows": "map a column to raw_logprobs (or probs: probabilities), one number a token",
}
FORMATS = ("auto", "traces", *MISSING)
ADAPTERS: dict[str, Callable[[Row, Source], list[Draft]]] = {
    "run": formats.run, "openai": formats.openai, "vllm": formats.vllm, "lm-eval": formats.lm_eval, "lighteval": formats.lighteval,
}  # fmt: skip
NAMES = {
    "response": (
        "response", "output", "completion", "generation", "generated_text", "model_output", "prediction", "responses", "generations", "outputs", "code",
    ),
    "gold": ("gold", "answer", "target", "reference", "ground_truth", "label", "expected_answer", "gold_answer"),
    "prompt": formats.PROMPTS, "messages": ("messages",), "id": ("id",), "prompt_id": ("prompt_id", "problem_id", "question_id", "task_id", "unique_id"),
    "score": ("score", "correct", "is_correct", "final_answer_correct", "acc", "reward"), "logprobs": ("logprobs", "token_logprobs"),
    "raw_logprobs": ("raw_logprobs",), "probs": ("probs", "token_probs", "token_probabilities"), "tokens": ("tokens", "token_texts"),
    "token_ids": ("token_ids", "output_ids"), "finish": ("finish", "finish_reason"), "model": ("model", "model_name", "generator"),
    "sample": ("sample", "sample_id", "sample_index"),
}  # fmt: skip
"""Columns that are looked for where none is named, in this order; the first that there is."""
REPEATED = ("response", "score", "raw_logprobs", "logprobs", "probs", "tokens", "token_ids", "finish")
"""Fields that hold a list, one entry a response, where `response` is a list."""


@dataclass
class ImportReport:
    """What was read from one file or directory."""

    path: str
    format: str = ""
    rows: int = 0
    traces: int = 0
    bad: list[BadTrace] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that were not meant, by what they are."""
    filled: Counter[str] = field(default_factory=Counter)
    """Trace field -> number of traces that have it."""

    def text(self) -> str:
        """For people: what came, what was dropped and why, what is missing and what to do about it."""
        lines = [f"{self.path}: {self.traces} traces of {self.rows} rows, format {self.format}"]
        lines += [f"  left out: {n} {what}" for what, n in self.left_out.items()]
        lines += [bad_report(self.bad, self.rows)] if self.bad else []
        part = [f"{key} {'in none' if not n else f'in {n} only'}" for key in ("prompt", "gold", "score") if (n := self.filled[key]) < self.traces]
        lines += [f"  missing: {', '.join(part)}"] if part else []
        if (n := self.filled["raw_logprobs"]) < self.traces:
            found = f"in {n} traces only" if n else "in no trace"
            lines.append(f"  raw_logprobs {found}, and confidence needs them: {MISSING.get(self.format, 'the file has none')}.")
            if self.filled["logprobs"] > n:
                lines.append("  There are logprobs. If they are those of the bare softmax (vLLM's default, --logprobs-mode raw_logprobs), say --logprobs raw.")
            lines.append("  Or have the model that wrote the texts score them: --score-with MODEL.")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path, "format": self.format, "rows": self.rows, "traces": self.traces, "left_out": dict(self.left_out),
            "filled": dict(self.filled), "bad": [{"where": b.where, "reason": b.reason} for b in self.bad],
        }  # fmt: skip


def read_any(
    path: str | Path, *, format: str = "auto", columns: dict[str, str] | None = None, model: str | None = None,
    logprobs: Literal["auto", "raw", "sampled"] = "auto", join: str | Path | None = None, answer_after: str | None = None, score_key: str | None = None,
    filter: str | None = None, role: str = "policy", steps: tuple[int, int] | None = None, on_bad: Literal["refuse", "drop"] = "refuse",
    report: ImportReport | None = None,
) -> Iterator[Trace]:  # fmt: skip
    """The traces of a file or a run directory, one at a time. Trace files of llmrl come through unchanged but for `model`.

    format: one of FORMATS; auto tells it from the content. columns: for the format rows, {Trace field (or "probs"): column}, "a.b" reaches
    into a nested one, "" is none; what is left open is looked for under NAMES. A column of lists is a response an entry; `steps` are joined.
    Columns that are no field go to extra.
    model: the name that the traces carry, whatever the file says.
    logprobs: what the file's log-probs are. raw: of the bare softmax (temperature 1, nothing cut), so they fill raw_logprobs; sampled: of
        the distribution sampled from; auto: raw where the row itself shows it.
    join: rows {id or custom_id, prompt or messages or body.messages, answer or gold} that complete traces of that prompt_id, e.g. the input
        of a batch. answer_after: the gold answer is what follows the last of this mark, e.g. "####".
    score_key, filter, role, steps (first, last): see formats.Source; steps of a run directory, default all.
    on_bad: "refuse" raises one InputError at the end for all rows that are no traces; "drop" counts them in `report`, which must be given.
    """
    if format not in FORMATS:
        raise InputError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    if on_bad == "drop" and report is None:
        raise ValueError('on_bad = "drop" needs a report for what is dropped')
    report = report if report is not None else ImportReport(str(path))
    first = len(report.bad)
    reader = _Reader(columns or {}, model, logprobs, _joined(join) if join else {}, answer_after, report)
    for file, source_format, facts in _files(Path(path), format, steps):
        source = Source(file, dict(columns or {}), score_key, filter, role, facts, lambda why: report.left_out.update([f"rows {why}"]))
        yield from reader.traces(file, source_format, source)
    if len(report.bad) > first and on_bad == "refuse":
        raise refuse(report.bad[first:], report.rows)


@dataclass
class _Reader:
    columns: dict[str, str]
    model: str | None
    logprobs: str
    join: dict[str, Draft]
    answer_after: str | None
    report: ImportReport
    samples: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)

    def traces(self, file: Path, kind: str, source: Source) -> Iterator[Trace]:
        adapter = ADAPTERS.get(kind, _from_columns)
        rows = _rows(file)
        if kind == "auto":
            head = list(_until_a_row(rows))
            kind = detect(head[-1][1] if head else None)
            adapter, rows = ADAPTERS.get(kind, _from_columns), chain(head, rows)
        self.report.format = kind
        for number, row in rows:
            self.report.rows += 1
            name = row.get("custom_id") or row.get("id") if isinstance(row, dict) else None
            try:
                if not isinstance(row, dict):
                    raise ValueError(row if isinstance(row, str) else f"a {type(row).__name__} where an object was expected")
                made = [self.own(row)] if kind == "traces" else [self.trace(draft, number) for draft in adapter(row, source)]
            except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:  # a row of unexpected shape
                why = str(error) if isinstance(error, ValueError) else f"not of the format {kind} ({type(error).__name__}: {error})"
                self.report.bad.append(BadTrace(number, name if isinstance(name, str) else None, why, str(file)))
                continue
            for trace in made:
                self.count(trace)
                yield trace

    def own(self, row: Row) -> Trace:
        trace = parse_trace(row)
        self.once(trace.id)
        return trace if self.model is None else replace(trace, model=self.model)

    def once(self, name: str, hint: str = "") -> None:
        if name in self.seen:
            raise ValueError(f"this id came before{hint}")
        self.seen.add(name)

    def count(self, trace: Trace) -> None:
        self.report.traces += 1
        self.report.filled.update(key for key in ("prompt", "gold", "score", "logprobs", "raw_logprobs", "tokens", "finish") if getattr(trace, key) is not None)

    def trace(self, draft: Draft, number: int) -> Trace:
        """A draft completed and checked."""
        d = {key: value for key, value in draft.items() if value is not None}
        raw = d.pop("raw", None)
        if d.get("prompt_id") is None:
            asked = json.dumps(d.get("messages") or d.get("prompt"), sort_keys=True, ensure_ascii=False)
            d["prompt_id"] = hashlib.sha256(asked.encode()).hexdigest()[:12] if asked != "null" else f"row-{number}"
        d["prompt_id"] = str(d["prompt_id"])
        for key, value in self.join.get(d["prompt_id"], {}).items():
            if key == "raw":
                raw = value if raw is None else raw
            else:
                d.setdefault(key, value)
        if self.model is not None:
            d["model"] = self.model
        if isinstance(d.get("gold"), str) and self.answer_after and self.answer_after in d["gold"]:
            d["gold"] = d["gold"].rpartition(self.answer_after)[2].strip()
        d.setdefault("sample", self.samples[d["prompt_id"]])
        self.samples[d["prompt_id"]] += 1
        d["id"] = str(d.get("id", f"{d['prompt_id']}/{d['sample']}"))
        if d.get("score") is not None:
            d.setdefault("status", "ok")
        if "logprobs" in d and (self.logprobs == "raw" or (self.logprobs == "auto" and raw)):
            d.setdefault("raw_logprobs", d["logprobs"])
        fields, extra = {key: value for key, value in d.items() if key != "extra"}, d.get("extra") or {}
        trace = replace(parse_trace({"schema": SCHEMA} | fields), extra=extra)
        self.once(trace.id, "; where it names the problem: --column prompt_id=id --column id=" if self.report.format == "rows" else "")
        return trace


def _until_a_row(rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Up to the first line that holds an object, which shows the format; broken ones may come before it."""
    for number, row in rows:
        yield number, row
        if isinstance(row, dict) or number > 100:
            return


def detect(row: Any) -> str:
    """The format that a file's first row has; "rows" where it is none of the known ones."""
    if not isinstance(row, dict):
        return "rows"
    if "schema" in row and "prompt_id" in row and "response" in row and "step" not in row:
        return "traces"
    if "step" in row and "token_ids" in row and "policy_version" in row:
        return "run"
    if "resps" in row:
        return "lm-eval"
    if ("doc" in row and "model_response" in row) or ("predictions" in row and "metrics" in row):
        return "lighteval"
    answer = row.get("response")
    if isinstance(row.get("choices"), list) or (isinstance(answer, dict) and ("choices" in answer or "status_code" in answer or "body" in answer)):
        return "openai"
    if "custom_id" in row and "error" in row:
        return "openai"
    outputs = row.get("outputs")
    return "vllm" if isinstance(outputs, list) and outputs and isinstance(outputs[0], dict) else "rows"


def _files(path: Path, format: str, steps: tuple[int, int] | None) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """(file, format, facts) of what `path` names: itself, or the sample files of a run directory."""
    if not path.is_dir():
        if format == "run" and not path.name.startswith("step-"):
            raise InputError(f"{path}: the format run reads a run directory or its samples/step-*.jsonl.gz")
        yield path, format, {}
        return
    if format not in ("auto", "run"):
        raise InputError(f"{path} is a directory; the format {format} reads files")
    found = [f for f in sorted((path / "samples").glob("step-*.jsonl.gz")) if steps is None or steps[0] <= int(f.name[5:11]) <= steps[1]]
    if not found:
        raise InputError(f"{path}: no samples/step-*.jsonl.gz{'' if steps is None else f' of the steps {steps[0]} to {steps[1]}'}; not a run directory?")
    facts: dict[str, Any] = {"name": path.resolve().name}
    if (path / "manifest.json").is_file():
        facts["rollout"] = json.loads((path / "manifest.json").read_text()).get("recipe", {}).get("rollout")
    for file in found:
        yield file, "run", facts


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, decoded row; a text = why it could not be decoded). Lines of JSON, a JSON array, or parquet."""
    if file.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise InputError(f"{file}: reading parquet needs pyarrow; pip install pyarrow") from error
        try:
            table = parquet.ParquetFile(file)
            yield from enumerate((row for batch in table.iter_batches(batch_size=256) for row in batch.to_pylist()), 1)
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: not a parquet file that can be read ({error})") from error
        return
    for number, raw in file_lines(file):
        if number == 1 and raw.lstrip()[:1] == b"[" and file.suffix == ".json":
            yield from enumerate(_array(file), 1)
            return
        try:
            yield number, json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON ({error})"


def _array(file: Path) -> list[Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error})") from error


def _at(row: Row, column: str) -> Any:
    """The value of a column; "a.b" where there is no column of that name reaches into a nested one."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def _from_columns(row: Row, source: Source) -> list[Draft]:
    """Plain rows by column names."""
    unknown = source.columns.keys() - NAMES.keys() - {"answer"}
    if unknown:
        raise InputError(f"columns: {', '.join(sorted(unknown))} is no field; there are {', '.join([*NAMES, 'answer'])}")
    d: Draft = {}
    used = set(Trace.__dataclass_fields__) | {"schema"}
    for key, names in NAMES.items():
        column = source.columns[key] if key in source.columns else next((name for name in names if row.get(name) is not None), None)
        if column and key == "response" and _at(row, column) is None:
            raise ValueError(f"no column {column!r}")
        d[key] = _at(row, column) if column else None
        used.add(column or "")
    d["answer"] = _at(row, source.columns["answer"]) if "answer" in source.columns else None
    if d["response"] is None and isinstance(row.get("steps"), list) and all(isinstance(step, str) for step in row["steps"]):
        d["response"] = "\n".join(row["steps"])
    if d["response"] is None:
        raise ValueError(f"no response in the columns {', '.join(map(str, list(row)[:12]))}; name it, e.g. --column response=output")
    d["extra"] = {key: value for key, value in row.items() if key not in used}
    if not isinstance(d["response"], list):
        return [_one(d)]
    n = len(d["response"])
    spread = {key: d[key] for key in REPEATED if isinstance(d[key], list) and len(d[key]) == n and (key == "response" or _per_response(key, d[key]))}
    kept = dict.fromkeys(REPEATED) | {"id": None, "sample": None}
    if d["id"] is not None and d["prompt_id"] is None:
        kept["prompt_id"] = d["id"]
    return [_one(d | kept | {key: values[k] for key, values in spread.items()}) for k in range(n)]


def _per_response(key: str, values: list[Any]) -> bool:
    return key in ("score", "finish") or all(v is None or isinstance(v, list) for v in values)


def _one(d: Draft) -> Draft:
    """One response of a plain row: numbers as text where text is due, probabilities as log-probs."""
    d = dict(d)
    probs = d.pop("probs")
    if probs is not None and d["raw_logprobs"] is None:
        if not isinstance(probs, list) or not all(formats.is_number(p) and 0 < p <= 1.001 for p in probs):
            raise ValueError("probs must be a list of probabilities in (0, 1], one a token")
        d["raw_logprobs"] = [min(math.log(p), 0.0) for p in probs]
    if (given := d["score"]) is not None:
        d["score"] = formats.as_score(given)
        if d["score"] is None:
            raise ValueError(f"score is {given!r}; it must lie in [0, 1] or be true or false")
    if isinstance(d["prompt"], list):
        d["messages"], d["prompt"] = d["messages"] or d["prompt"], formats.user_text(d["prompt"])
    d["prompt"] = d["prompt"] if d["prompt"] is not None else formats.user_text(d["messages"])
    d["gold"], d["finish"] = formats.as_text(d["gold"]), d["finish"] if d["finish"] in ("stop", "length") else None
    d["sample"] = d["sample"] if type(d["sample"]) is int else None
    return d


def _joined(file: str | Path) -> dict[str, Draft]:
    """prompt_id -> what the rows of another file tell of it."""
    found: dict[str, Draft] = {}
    for number, row in _rows(Path(file)):
        if not isinstance(row, dict) or (name := row.get("custom_id", row.get("id", row.get("prompt_id")))) is None:
            raise InputError(f"{file}:{number}: a row without id or custom_id cannot be joined")
        body = row.get("body") if isinstance(row.get("body"), dict) else row
        messages = body.get("messages")  # type: ignore[union-attr]
        told = {"messages": messages, "prompt": formats.user_text(messages), "raw": formats.is_pure(body)}
        told["prompt"] = told["prompt"] or next((row[key] for key in formats.PROMPTS if isinstance(row.get(key), str)), None)
        told["gold"] = next((text for key in NAMES["gold"] if (text := formats.as_text(row.get(key))) is not None), None)
        found[str(name)] = {key: value for key, value in told.items() if value is not None}
    return found

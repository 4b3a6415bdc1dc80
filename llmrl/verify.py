"""Grades a file of responses, and where its rows carry labels, the verifier: `llmrl verify --use REF cases.jsonl`.

Rows are streamed: memory holds a few batches, whatever the size of the file.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from llmrl.records import InputError, Prompt, Verdict
from llmrl.scoring import Scorer

_BATCH_ROWS = 512
_BATCH_BYTES = 1_000_000  # of the file's text, other columns included: they travel too
_IN_FLIGHT = 3  # batches: one being judged, one whose items fill up the workers at its end, one being read
_NO_META = {"id", "prompt", "gold", "response", "label"}


@dataclass(frozen=True)
class Case:
    """One row of the file."""

    id: Any
    """As given, or the 0-based row number as text."""
    prompt: Prompt
    response: str
    label: float | None


@dataclass
class VerifySummary:
    """What came out. A score of 0.5 and above counts as "correct", and so does a label; missing figures are None."""

    file: str
    verifier: str
    rows: int = 0
    statuses: dict[str, int] = field(default_factory=lambda: {"ok": 0, "no_answer": 0, "timeout": 0, "error": 0})
    mean_score: float | None = None
    """Over the rows that could be judged."""
    labelled: int = 0
    """Rows with a label."""
    labelled_unjudged: int = 0
    """Rows with a label and without a score: in none of the four counts below."""
    true_positives: int = 0
    true_negatives: int = 0
    false_positives: int = 0
    """Judged correct, labelled wrong: what a policy would learn to exploit."""
    false_negatives: int = 0
    seconds: float = 0.0
    run_s: float | None = None
    """Mean time of one verdict in its worker."""
    respawns: int = 0
    """Worker processes that had to be replaced."""
    about: dict[str, Any] = field(default_factory=dict)
    """What the verifier tells of how it runs, e.g. its sandbox."""
    counters: dict[str, float] = field(default_factory=dict)
    """What it counts itself, e.g. calls and tokens."""
    unjudged_examples: list[dict[str, Any]] = field(default_factory=list)
    """The first five rows without a score: id, status, detail."""
    _score_sum: float = field(default=0.0, repr=False)

    @property
    def accuracy(self) -> float | None:
        """Agreement with the labels, over labelled rows that could be judged."""
        judged = self.labelled - self.labelled_unjudged
        return (self.true_positives + self.true_negatives) / judged if judged else None

    def add(self, case: Case, verdict: Verdict) -> bool:
        """Counts one row; True where the verdict disagrees with the row's label."""
        self.rows += 1
        self.statuses[verdict.status] += 1
        if verdict.score is None:
            if len(self.unjudged_examples) < 5:
                self.unjudged_examples.append({"id": case.id, "status": verdict.status, "detail": verdict.detail})
        else:
            self._score_sum += verdict.score
            self.mean_score = self._score_sum / (self.statuses["ok"] + self.statuses["no_answer"])
        if case.label is None:
            return False
        self.labelled += 1
        if verdict.score is None:
            self.labelled_unjudged += 1
            return False
        said, right = verdict.score >= 0.5, case.label >= 0.5
        self.true_positives += said and right
        self.true_negatives += not said and not right
        self.false_positives += said and not right
        self.false_negatives += right and not said
        return said != right

    def to_json(self) -> dict[str, Any]:
        """A dict that json.dumps takes: the fields, and accuracy and rows_per_s."""
        fields = {key: value for key, value in asdict(self).items() if not key.startswith("_")}
        return fields | {"accuracy": self.accuracy, "rows_per_s": self.rows / self.seconds if self.seconds else None}

    def table(self) -> Table:
        """For people."""
        table = Table(title=f"{self.verifier} on {self.file}", show_header=False)
        for status, count in self.statuses.items():
            table.add_row(status, f"{count}", f"{count / self.rows:.1%}" if self.rows else "")
        table.add_row("mean score", "none judged" if self.mean_score is None else f"{self.mean_score:.4f}", "of the judged rows")
        if self.labelled:
            table.add_section()
            agreement = "none judged" if self.accuracy is None else f"{self.accuracy:.4f}"
            table.add_row("agreement", agreement, f"{self.labelled} labelled rows, {self.labelled_unjudged} unjudged")
            table.add_row("labelled correct", f"{self.true_positives} judged correct", f"{self.false_negatives} judged wrong")
            table.add_row("labelled wrong", f"{self.true_negatives} judged wrong", f"{self.false_positives} judged correct")
        table.add_section()
        table.add_row("time", f"{self.seconds:.1f} s", f"{self.rows / self.seconds:.0f} rows/s" if self.seconds else "")
        table.add_row("a verdict", "" if self.run_s is None else f"{1e3 * self.run_s:.3g} ms", f"{self.respawns} workers replaced")
        for name, value in {**self.about, **self.counters}.items():
            table.add_row(name, f"{value:,.6g}" if isinstance(value, float) else str(value))
        for example in self.unjudged_examples:
            table.add_row(f"unjudged {example['id']}", example["status"], example["detail"][:160])
        return table


def verify_file(
    path: Path,
    ref: str,
    kwargs: dict[str, Any],
    base: Path,
    *,
    out: Path | None = None,
    disagreements: Path | None = None,
    workers: int = 2,
    timeout_s: float = 10.0,
    concurrency: int = 16,
    progress: bool = True,
) -> VerifySummary:
    """Grades rows {"id"?, "prompt"?, "gold", "response", "label"?} of a .jsonl or .jsonl.gz file with the verifier `ref`.

    prompt is a text or a list of messages; other columns become Prompt.meta. label is 0, 1, a bool or a number between.
    out: gets {"id", "score", "status", "answer"} a row, in the order of the file; disagreements: {"id", "gold", "response", "label",
    "score", "answer", "detail"} of judged rows whose score falls on the other side of 0.5 than the label. Both may end in .gz and
    appear only when the whole file was graded. The progress bar goes to stderr.
    Raises InputError: a bad row (named by file and line), an unreadable file, a verifier that cannot be built.
    """
    path, started = Path(path), time.monotonic()
    summary = VerifySummary(str(path), ref)
    with ExitStack() as stack:
        source = _Source(path)
        stack.callback(source.close)
        # before the scorer, so that on an error or Ctrl-C the scorer closes first and ends the calls that wait in the pool
        pool = stack.enter_context(ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="llmrl-verify"))
        scorer = stack.enter_context(Scorer(ref, kwargs, base, workers=workers, timeout_s=timeout_s, concurrency=concurrency, max_failure_rate=1.0))
        rows_out = stack.enter_context(_Sink(out))
        wrong_out = stack.enter_context(_Sink(disagreements))
        bar = stack.enter_context(_bar(progress))
        task = bar.add_task(path.name, total=source.bytes_total, rows=0)
        for cases, verdicts in _graded(source, scorer, pool):
            for case, verdict in zip(cases, verdicts, strict=True):
                rows_out.write({"id": case.id, "score": verdict.score, "status": verdict.status, "answer": verdict.answer})
                if summary.add(case, verdict):
                    wrong_out.write(_disagreement(case, verdict))
            bar.update(task, completed=source.bytes_read, rows=summary.rows)
        bar.update(task, completed=source.bytes_total)
        rows_out.keep()
        wrong_out.keep()
        stats = scorer.stats()
        summary.respawns, run_s = int(stats.pop("respawns")), stats.pop("run_s")
        summary.run_s = run_s / summary.rows if summary.rows else None
        summary.counters = {name: value for name, value in stats.items() if name not in summary.statuses and name != "queue_s"}
        summary.about = {name: value for name, value in scorer.about.items() if name != "worst_case_s"}
    summary.seconds = time.monotonic() - started
    return summary


def _disagreement(case: Case, verdict: Verdict) -> dict[str, Any]:
    row = {"id": case.id, "gold": case.prompt.answer, "response": case.response, "label": case.label}
    return row | {"score": verdict.score, "answer": verdict.answer, "detail": verdict.detail}


def _bar(show: bool) -> Progress:
    text = "{task.fields[rows]} rows"
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn(text), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)


def _graded(source: _Source, scorer: Scorer, pool: ThreadPoolExecutor) -> Iterator[tuple[list[Case], list[Verdict]]]:
    """Batches in the order of the file. A few are under way at once, so that workers never wait for the end of a batch."""
    waiting: deque[tuple[list[Case], Future[list[Verdict]]]] = deque()
    for cases in _batches(source):
        waiting.append((cases, pool.submit(scorer.score, [(c.prompt, c.response) for c in cases])))
        if len(waiting) >= _IN_FLIGHT:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


def _batches(source: _Source) -> Iterator[list[Case]]:
    batch: list[Case] = []
    size = 0
    for case, length in source.cases():
        batch.append(case)
        size += length
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Source:
    """The rows of a file, and how far it has been read, in bytes on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._raw = path.open("rb")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); expected a .jsonl or .jsonl.gz file") from error
        self.bytes_total = os.fstat(self._raw.fileno()).st_size
        head = self._raw.read(2)
        self._raw.seek(0)
        self._lines: IO[bytes] = gzip.GzipFile(fileobj=self._raw) if head == b"\x1f\x8b" else self._raw  # type: ignore[assignment]

    @property
    def bytes_read(self) -> int:
        return self._raw.tell()

    def close(self) -> None:
        self._raw.close()

    def cases(self) -> Iterator[tuple[Case, int]]:
        """Each row and the length of its line in bytes."""
        number = -1
        line_number = 0
        try:
            for line_number, line in enumerate(self._lines, 1):
                if line.strip():
                    number += 1
                    yield _case(line, number, f"{self.path}, line {line_number}"), len(line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{self.path}, after line {line_number}: the gzip stream is damaged ({error})") from error


def _case(line: bytes, number: int, where: str) -> Case:
    try:
        row = json.loads(line)
    except ValueError as error:  # both bad JSON and bad UTF-8
        raise InputError(f"{where}: no JSON in UTF-8 ({error})") from error
    if not isinstance(row, dict):
        raise InputError(f'{where}: expected an object {{"gold": ..., "response": ...}}, got {type(row).__name__}')
    for key in ("gold", "response"):
        if key not in row:
            raise InputError(f'{where}: no key "{key}"; there are {", ".join(map(repr, row)) or "none"}')
    gold, response, label = row["gold"], row["response"], row.get("label")
    if isinstance(gold, bool) or not isinstance(gold, str | int | float | None):
        raise InputError(f"{where}: gold is {gold!r}; expected a text, a number, or null where the verifier needs none")
    if not isinstance(response, str):
        raise InputError(f"{where}: response is {response!r}; expected a text")
    if label is not None and not (isinstance(label, bool | int | float) and 0 <= label <= 1):
        raise InputError(f"{where}: label is {label!r}; expected 0, 1, true, false or a number between 0 and 1")
    given = row.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
        raise InputError(f"{where}: id is {given!r}; expected a text or a whole number")
    name = str(number) if given is None else given
    if isinstance(gold, float) and not math.isfinite(gold):
        raise InputError(f"{where}: gold is {gold!r}; expected a finite number")
    meta = {key: value for key, value in row.items() if key not in _NO_META}
    prompt = Prompt(str(name), _messages(row.get("prompt"), where), None if gold is None else str(gold), meta)
    return Case(name, prompt, response, None if label is None else float(label))


def _messages(prompt: Any, where: str) -> tuple[dict[str, str], ...]:
    if prompt is None:
        return ()
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    if isinstance(prompt, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in prompt):
        return tuple(prompt)
    raise InputError(f'{where}: prompt is {str(prompt)[:100]!r}; expected a text or a list of {{"role", "content"}}')


class _Sink:
    """A .jsonl or .jsonl.gz file that appears under its name only when keep() was called; nothing where the path is None."""

    def __init__(self, path: Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._part = None if self._path is None else self._path.with_name(self._path.name + ".part")
        self._file: io.TextIOBase | None = None

    def __enter__(self) -> _Sink:
        if self._path is not None and self._part is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            opened = gzip.open(self._part, "wb") if self._path.suffix == ".gz" else self._part.open("wb")
            self._file = io.TextIOWrapper(opened, encoding="utf-8")  # type: ignore[arg-type]
        return self

    def write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")  # ASCII: a response may hold half a surrogate pair, which UTF-8 cannot write

    def keep(self) -> None:
        if self._file is not None and self._part is not None and self._path is not None:
            self._file.close()
            self._part.replace(self._path)

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self._part is not None:
            self._file.close()
            self._part.unlink(missing_ok=True)

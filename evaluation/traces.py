"""Traces: sampled responses on disk, one JSON object a line, the common input of every evaluator.

Schema 2 (`Trace`); files are .jsonl or .jsonl.gz. A trace is written once and scored as often as one likes: `score`, `status` and `answer`
are None until a verifier has looked at it. Keys that are not of the schema are kept in `extra` and written back unchanged. Schema 1, which had
no `raw_logprobs` and no `tokens`, is read too; a file may hold lines of both. Files of other programs come in through `importers`.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, cast

from llmrl.records import Finish, InputError, Message, Status

SCHEMA = 2
READABLE = (1, 2)


@dataclass(frozen=True)
class Trace:
    """One response of a model to one prompt."""

    id: str
    """Unique in a file."""
    prompt_id: str
    """Traces with the same prompt_id are samples of one problem."""
    response: str
    prompt: str | None = None
    """The user's text."""
    messages: list[Message] | None = None
    """The whole context, where it was a chat."""
    gold: str | None = None
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    """Natural log, one a token, under the distribution that was sampled from."""
    raw_logprobs: list[float] | None = None
    """Natural log, one a token, under the model's own softmax: temperature 1, nothing cut (no top-p, top-k, min-p). What confidence is taken from."""
    tokens: list[str] | None = None
    """The text of each token, for people to look at; joined they give the response."""
    finish: Finish | None = None
    """"length" = cut off at the token limit; None = the source does not say."""
    score: float | None = None
    """In [0, 1]; None = not judged, or could not be judged."""
    status: Status | None = None
    """None = no verifier has looked at it."""
    answer: str | None = None
    """As extracted by the verifier."""
    model: str | None = None
    sample: int | None = None
    """Number of this response among those to its prompt, from 0."""
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of one line, in the order of the schema."""
        return {"schema": SCHEMA} | {name: getattr(self, name) for name in _KEYS} | self.extra


_ORDER = "id prompt_id prompt messages gold response token_ids logprobs raw_logprobs tokens finish score status answer model sample"
_KEYS = tuple(_ORDER.split())
assert set(_KEYS) == {f.name for f in fields(Trace)} - {"extra"}


@dataclass(frozen=True)
class BadTrace:
    """A line that is no trace."""

    line: int
    """Counted from 1."""
    id: str | None
    reason: str
    path: str = ""

    @property
    def where(self) -> str:
        """file:line, and the id where there is one."""
        return f"{self.path or 'line'}:{self.line}" + (f" (id {self.id!r})" if self.id is not None else "")


def bad_report(bad: list[BadTrace], total: int, *, places: int = 3) -> str:
    """What was dropped and why: one line a kind of reason with its count and its first places; "" where nothing was.

    Reasons that differ in numbers and quoted values only count as one kind; the first one is told in full.
    """
    if not bad:
        return ""
    kinds: defaultdict[str, list[BadTrace]] = defaultdict(list)
    for b in bad:
        kinds[re.sub(r"'[^']*'|\d+(\.\d+)?", "_", b.reason)].append(b)
    lines = [f"{len(bad)} of {total} rows are no traces:"]
    for group in sorted(kinds.values(), key=len, reverse=True):
        more = f" and {len(group) - places} more" if len(group) > places else ""
        lines.append(f"  {len(group)} x {group[0].reason}  at {', '.join(b.where for b in group[:places])}{more}")
    return "\n".join(lines)


def parse_trace(row: Any) -> Trace:
    """One decoded line -> Trace. Raises ValueError saying what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__} where an object was expected")
    if row.get("schema") not in READABLE or isinstance(row["schema"], bool):
        raise ValueError(f"schema is {row.get('schema')!r}; this version reads schema {' and '.join(map(str, READABLE))}")
    values: dict[str, Any] = {key: row.get(key) for key in _KEYS}
    trace = Trace(**values, extra={k: v for k, v in row.items() if k not in _KEYS and k != "schema"})
    for key in ("id", "prompt_id", "response", "prompt", "gold", "answer", "model"):
        value = getattr(trace, key)
        if not isinstance(value, str) and not (value is None and key not in ("id", "prompt_id", "response")):
            raise ValueError(f"{key} is {'missing' if value is None else type(value).__name__}; it must be text")
    _check_choice("finish", trace.finish, ("stop", "length"))
    _check_choice("status", trace.status, ("ok", "no_answer", "timeout", "error"))
    if trace.score is not None and (not _is_number(trace.score) or not 0.0 <= trace.score <= 1.0):
        raise ValueError(f"score is {trace.score!r}; it must lie in [0, 1] or be null")
    if trace.status is not None and (trace.status in ("ok", "no_answer")) != (trace.score is not None):
        raise ValueError(f"score {trace.score!r} with status {trace.status!r}: a score goes with ok and no_answer only")
    if not (trace.sample is None or (isinstance(trace.sample, int) and trace.sample >= 0)):
        raise ValueError(f"sample is {trace.sample!r}; it must be a whole number from 0")
    _check_lists(trace)
    return trace


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{key} is {value!r}; it must be {', '.join(choices)} or null")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(values: list[Any]) -> bool:
    """All are `_is_number`; plain numbers, which a file holds, take a path without a Python call each."""
    return (set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))) or all(map(_is_number, values))


def _check_lists(trace: Trace) -> None:
    ids, messages = trace.token_ids, trace.messages
    if ids is not None and not (isinstance(ids, list) and set(map(type, ids)) <= {int}):
        raise ValueError("token_ids must be a list of whole numbers or null")
    for key in ("logprobs", "raw_logprobs"):
        values = getattr(trace, key)
        if values is not None and not (isinstance(values, list) and _are_numbers(values)):
            raise ValueError(f"{key} must be a list of finite numbers or null")
    if trace.raw_logprobs and max(trace.raw_logprobs) > 1e-3:  # a probability is the usual mistake; rounding may pass 0 by 1e-6
        raise ValueError(f"raw_logprobs holds {max(trace.raw_logprobs):.4g}: the natural log of a probability is at most 0")
    if trace.tokens is not None and not (isinstance(trace.tokens, list) and set(map(type, trace.tokens)) <= {str}):
        raise ValueError("tokens must be a list of texts or null")
    lengths = {key: len(value) for key in ("token_ids", "logprobs", "raw_logprobs", "tokens") if (value := getattr(trace, key)) is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(" but ".join(f"{n} {key}" for key, n in lengths.items()))
    if messages is not None and not (
        isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages)
    ):
        raise ValueError("messages must be a list of {role, content} or null")


def read_traces(path: str | Path, *, on_bad: Literal["refuse", "drop"] = "refuse", bad: list[BadTrace] | None = None) -> Iterator[Trace]:
    """The traces of a .jsonl or .jsonl.gz file (told apart by content), one at a time.

    Lines that are no trace, and ids that came before, are skipped; when the end is reached, "refuse" raises one InputError for all of
    them (the first 5 and their number), "drop" has put them into `bad`, which must be given: nothing is dropped unseen.
    Raises InputError for a file that does not exist or is damaged.
    """
    if on_bad == "drop" and bad is None:
        raise ValueError('on_bad = "drop" needs a list `bad` for what is dropped')
    found: list[BadTrace] = [] if bad is None else bad
    first, total = len(found), 0
    seen: set[str] = set()
    for number, raw in file_lines(Path(path)):
        total += 1
        row: Any = None
        try:
            row = json.loads(raw.decode("utf-8"))
            trace = parse_trace(row)
            if trace.id in seen:
                raise ValueError("this id came before")
        except (ValueError, RecursionError) as error:
            name = row.get("id") if isinstance(row, dict) else None
            found.append(BadTrace(number, name if isinstance(name, str) else None, str(error), str(path)))
            continue
        seen.add(trace.id)
        yield trace
    if len(found) > first and on_bad == "refuse":
        raise refuse(found[first:], total)


def refuse(bad: list[BadTrace], total: int) -> InputError:
    """The error that names the first 5 bad rows by file:line and tells how many there are."""
    lines = [f"{bad[0].path}: {len(bad)} of {total} rows are no traces:"]
    lines += [f"  {b.where}: {b.reason}" for b in bad[:5]]
    lines += [f"  and {len(bad) - 5} more"] if len(bad) > 5 else []
    return InputError("\n".join([*lines, "Mend or remove them, or drop them and have them counted: on_bad = \"drop\" (--on-bad drop)."]))


def file_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of the lines that are not blank."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with cast(IO[bytes], gzip.open(path, "rb") if packed else path.open("rb")) as lines:
            yield from ((number, raw) for number, raw in enumerate(lines, 1) if raw.strip())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: it cannot be read to its end ({type(error).__name__}: {error})") from error


def write_traces(path: str | Path, traces: Iterable[Trace]) -> int:
    """Writes a whole file (gzip where the name ends in .gz); returns the number of traces, at the end. An old file stays until then."""
    with TraceWriter(path, resume=False) as writer:
        for trace in traces:
            writer.write(trace)
    return len(writer.ids)


class TraceWriter:
    """Writes traces one by one; a killed writer loses at most the line it was in.

    Lines go to `<path>.part`, plain JSON lines, each handed to the operating system at once. `close` packs the part file under a temporary
    name, fsyncs, renames it to `<path>` and removes the part file: `<path>` is always a whole file, and its bytes depend on the traces
    alone (gzip without time or name). With `resume` the whole lines of a part file (or of a finished file) are kept; `ids` says which.
    Leaving the `with` block by an exception keeps the part file and does not touch `<path>`.
    """

    def __init__(self, path: str | Path, *, resume: bool = True) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self.ids: set[str] = set()
        """Ids of the traces written so far, kept ones included."""
        self.first: Trace | None = None
        """The first trace that was there when the file was opened."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume and not self.part.exists() and self.path.exists():
            # Unpacked under a third name: a half-unpacked part file would look like a run that was cut short.
            unpacked = self.part.with_name(self.part.name + ".tmp")
            with unpacked.open("wb") as out:
                out.writelines(raw if raw.endswith(b"\n") else raw + b"\n" for _, raw in file_lines(self.path))
            os.replace(unpacked, self.part)
        if resume and self.part.exists():
            _drop_torn_line(self.part)
            for trace in read_traces(self.part):
                self.first = self.first or trace
                self.ids.add(trace.id)
        self._file = self.part.open("ab" if resume else "wb")

    def write(self, trace: Trace) -> None:
        """Raises ValueError for a trace that could not be read back (a wrong field, NaN, an id that was written before)."""
        if clash := trace.extra.keys() & {"schema", *_KEYS}:
            raise ValueError(f"trace {trace.id!r}: extra holds keys of the schema: {', '.join(sorted(clash))}")
        row = trace.to_json()
        parse_trace(row)
        if trace.id in self.ids:
            raise ValueError(f"trace {trace.id!r} was written before")
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", errors="strict") + b"\n")
        self._file.flush()
        self.ids.add(trace.id)

    def close(self) -> None:
        """Turns the part file into the finished file. Calling it again does nothing."""
        if self._file.closed:
            return
        os.fsync(self._file.fileno())
        self._file.close()
        temporary = self.path.with_name(self.path.name + ".tmp")
        with self.part.open("rb") as lines, temporary.open("wb") as raw:
            if self.path.suffix == ".gz":
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0) as packed:
                    packed.writelines(lines)
            else:
                raw.writelines(lines)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, self.path)
        self.part.unlink()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _drop_torn_line(path: Path) -> None:
    """Cuts off what follows the last line end."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            cut = file.read(end - start).rfind(b"\n")
            if cut >= 0:
                end = start + cut + 1
                break
            end = start
        file.truncate(end)

"""Raw rows of a dataset, whatever they come from: a file, the Hub, a reasoning-gym task or a generator function.

Every source yields `SourceRow`s one at a time. A row that cannot be read is a row too: it carries the reason, so that the reader of
rows (`llmrl.data`) can name it, count it and refuse or drop it. Only a source that is broken as a whole raises `InputError`.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import importlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from llmrl.records import InputError

FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".csv")


class SourceRow(NamedTuple):
    """One row as it was found."""

    number: int
    """Counted from 1; in jsonl files the line of the file, in csv files the header is not counted."""
    cells: dict[str, Any] | None
    """Column name -> value; None when the row cannot be read."""
    problem: str | None = None
    """Why it cannot be read."""


def open_source(path: str, *, base: Path, split: str | None = None, args: dict[str, Any] | None = None) -> tuple[str, Iterator[SourceRow]]:
    """(the source's name for messages, its rows). For the kinds of `path` see `llmrl.data.read_prompts`.

    `split` goes to the Hub; any other source must have a column `split`, and only the rows with that value are yielded.
    `args` go to the Hub loader, the reasoning-gym task or the generator function; a file takes none.
    Raises InputError when the source does not exist, cannot be opened or takes no such argument.
    """
    args = dict(args or {})
    kind, _, name = path.partition(":")
    if kind == "hub":
        return path, _hub_rows(name, split or "train", args)
    if kind == "gym":
        label, rows = path, _gym_rows(name, args)
    elif path.endswith(FILE_ENDINGS):
        if args:
            raise InputError(f"data.path = {path!r} is a file and takes no data.args (got {', '.join(sorted(args))}); remove them")
        file = find_file(path, base)
        label, rows = str(file), _file_rows(file)
    elif ":" in path or path.isidentifier():
        label, rows = path, _generated_rows(path, args, base)
    else:
        raise InputError(
            f"data.path = {path!r}: not a source I know. It may be a file ending in {', '.join(FILE_ENDINGS)}, hub:owner/name, gym:task, "
            "or a generator function: chains, pkg.module:function, ./file.py:function"
        )
    return label, rows if split is None else _only_split(label, rows, split)


def find_file(path: str, base: Path) -> Path:
    """The file at `path`: absolute, relative to `base` (the recipe's folder), or else relative to the working directory."""
    given = Path(path).expanduser()
    tried = [given] if given.is_absolute() else list(dict.fromkeys([(base / given).resolve(), given.resolve()]))
    for place in tried:
        if place.is_file():
            return place
    beside = sorted({p.name for place in tried if place.parent.is_dir() for p in place.parent.iterdir() if p.name.endswith(FILE_ENDINGS)})
    near = difflib.get_close_matches(given.name, beside, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"data.path = {path!r}: no such file (looked at {', '.join(map(str, tried))}){hint}")


def _file_rows(file: Path) -> Iterator[SourceRow]:
    read = _parquet_rows if file.suffix == ".parquet" else _csv_rows if file.suffix == ".csv" else _jsonl_rows
    try:
        yield from read(file)
    except (OSError, EOFError, zlib.error) as error:  # damaged gzip: there is no next row to go on with
        raise InputError(f"{file}: it cannot be read to its end ({type(error).__name__}: {error}); fetch or write it again") from error


def _jsonl_rows(file: Path) -> Iterator[SourceRow]:
    with cast(IO[bytes], gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")) as lines:
        for number, raw in enumerate(lines, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                cells = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield SourceRow(number, None, f"not UTF-8 (byte {error.start} of the line)")
            except (ValueError, RecursionError) as error:
                yield SourceRow(number, None, f"not JSON ({error})")
            else:
                ok = isinstance(cells, dict)
                yield SourceRow(number, cells if ok else None, None if ok else f"a {type(cells).__name__} where a JSON object was expected")


def _csv_rows(file: Path) -> Iterator[SourceRow]:
    bad_lines: set[int] = set()

    def lines() -> Iterator[str]:
        with file.open("rb") as raw_lines:
            for number, raw in enumerate(raw_lines, 1):
                try:
                    yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    bad_lines.add(number)
                    yield raw.decode("utf-8", errors="replace")

    reader = csv.reader(lines(), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise InputError(f"{file}: the header names a column twice: {', '.join(header)}")
        done = reader.line_num
        for number, values in enumerate(filter(None, reader), 1):
            spoiled = bad_lines.intersection(range(done + 1, reader.line_num + 1))
            done = reader.line_num
            if spoiled:
                yield SourceRow(number, None, f"not UTF-8 (line {min(spoiled)} of the file)")
            elif len(values) != len(header):
                yield SourceRow(number, None, f"{len(values)} cells under a header of {len(header)} (line {done} of the file)")
            else:
                yield SourceRow(number, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: not CSV ({error})") from error


def _parquet_rows(file: Path) -> Iterator[SourceRow]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{file}: reading parquet needs pyarrow; pip install pyarrow") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for cells in batch.to_pylist():
                number += 1
                yield SourceRow(number, cells)
    except ValueError as error:  # pyarrow.ArrowInvalid is one
        raise InputError(f"{file}: not a parquet file that can be read, after row {number} ({error})") from error


def _hub_rows(name: str, split: str, args: dict[str, Any]) -> Iterator[SourceRow]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise InputError(f"data.path = 'hub:{name}' needs the package datasets; pip install datasets") from error
    try:
        data = datasets.load_dataset(name, split=split, **args)
    except Exception as error:  # the loader raises the errors of whatever it uses: HTTP client, file system, parsers
        raise InputError(
            f"data.path = 'hub:{name}', split {split!r}, args {args}: the dataset could not be loaded "
            f"({type(error).__name__}: {error}). Check the name, data.split and data.args; without a network only datasets that were "
            "loaded here before can be used: export the rows to a jsonl file and give its path"
        ) from error
    return _enumerate(data)


def _gym_rows(task: str, args: dict[str, Any]) -> Iterator[SourceRow]:
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise InputError(f"data.path = 'gym:{task}' needs reasoning-gym, which is not installed; pip install 'llmrl[gym]'") from error
    try:
        data = gym.create_dataset(task, **args)
    except (ValueError, TypeError, AssertionError) as error:  # unknown task, unknown key, value out of range
        raise InputError(f"data.path = 'gym:{task}', args {args}: {error}") from error
    return _enumerate(data)


def _generated_rows(ref: str, args: dict[str, Any], base: Path) -> Iterator[SourceRow]:
    from llmrl.plugins import use

    rows = use(ref, args, home="llmrl.tasks", base=base, where="[data]")
    if not isinstance(rows, Iterable):
        raise InputError(f"data.path = {ref!r} returned {type(rows).__name__}; it must return an iterable of rows (dicts)")
    return _enumerate(rows)


def _enumerate(rows: Iterable[Any]) -> Iterator[SourceRow]:
    for number, cells in enumerate(rows, 1):
        ok = isinstance(cells, dict)
        yield SourceRow(number, dict(cells) if ok else None, None if ok else f"a {type(cells).__name__} where a dict was expected")


def _only_split(label: str, rows: Iterator[SourceRow], split: str) -> Iterator[SourceRow]:
    seen: set[str] = set()
    for row in rows:
        value = row.cells.get("split") if row.cells is not None else None
        if value is not None:
            seen.add(str(value))
        if row.cells is None or value == split:
            yield row
    if split not in seen:
        have = f"its column 'split' holds {', '.join(sorted(seen))}" if seen else "it has no column 'split'"
        raise InputError(f"{label}: no row of data.split = {split!r}: {have}")

"""`llmrl verify`: rows in order, every count right, bad rows refused by line, nothing half-written."""

import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmrl.records import InputError
from llmrl.verify import VerifySummary, verify_file

V = """
import time
from llmrl.records import Verdict
def lookup():
    def verify(prompt, response):
        if response == "hang":
            time.sleep(100)
        if response == "crash":
            raise ValueError("no such row")
        if not response:
            return Verdict(0.0, "no_answer")
        text = f"{prompt.id}|{prompt.text}|{prompt.meta.get('level')}"
        return Verdict(1.0 if response == prompt.answer else 0.5 if response == "half" else 0.0, "ok", text, "why")
    return verify
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "v.py").write_text(V)
    return tmp_path


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def grade(base: Path, path: Path, ref: str = "./v.py:lookup", **keys: Any) -> VerifySummary:
    return verify_file(path, ref, {}, base, out=keys.pop("out", None), disagreements=keys.pop("wrong", None), progress=False, **keys)


ROWS: list[Any] = [
    {"id": "a", "prompt": "how?", "gold": "7", "response": "7", "label": 1, "level": 3},
    {"gold": "7", "response": "8", "label": False},
    {"id": 5, "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "gold": 7, "response": "7", "label": 0},
    {"id": "d", "gold": "7", "response": "8", "label": 0.9},
    "",
    {"gold": "7", "response": "half", "label": 0.5},
    {"gold": "7", "response": "crash", "label": 1},
    {"gold": "7", "response": "hang", "label": 0},
    {"gold": "7", "response": ""},
    {"gold": None, "response": "\ud83d"},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_every_row_is_graded_counted_and_written_in_order(base: Path, suffix: str) -> None:
    source = write(base / f"cases{suffix}", ROWS)
    out, wrong = base / f"graded{suffix}", base / "new" / f"wrong{suffix}"
    summary = grade(base, source, out=out, wrong=wrong, timeout_s=0.5)
    assert read(out) == [
        {"id": "a", "score": 1.0, "status": "ok", "answer": "a|how?|3"},
        {"id": "1", "score": 0.0, "status": "ok", "answer": "1||None"},
        {"id": 5, "score": 1.0, "status": "ok", "answer": "5|u|None"},
        {"id": "d", "score": 0.0, "status": "ok", "answer": "d||None"},
        {"id": "4", "score": 0.5, "status": "ok", "answer": "4||None"},
        {"id": "5", "score": None, "status": "error", "answer": None},
        {"id": "6", "score": None, "status": "timeout", "answer": None},
        {"id": "7", "score": 0.0, "status": "no_answer", "answer": None},
        {"id": "8", "score": 0.0, "status": "ok", "answer": "8||None"},
    ]
    assert read(wrong) == [
        {"id": 5, "gold": "7", "response": "7", "label": 0.0, "score": 1.0, "answer": "5|u|None", "detail": "why"},
        {"id": "d", "gold": "7", "response": "8", "label": 0.9, "score": 0.0, "answer": "d||None", "detail": "why"},
    ]
    assert summary.rows == 9 and summary.statuses == {"ok": 6, "no_answer": 1, "timeout": 1, "error": 1}
    assert (summary.labelled, summary.labelled_unjudged) == (7, 2)
    counts = (summary.true_positives, summary.true_negatives, summary.false_positives, summary.false_negatives)
    assert counts == (2, 1, 1, 1)
    assert summary.accuracy == pytest.approx(0.6) and summary.mean_score == pytest.approx(2.5 / 7)
    assert [(e["id"], e["status"]) for e in summary.unjudged_examples] == [("5", "error"), ("6", "timeout")]
    assert not list(base.glob("**/*.part"))


def test_summary_for_machines_and_for_people(base: Path) -> None:
    summary = grade(base, write(base / "c.jsonl", ROWS[:4]))
    figures = json.loads(json.dumps(summary.to_json()))
    assert figures["accuracy"] == 0.5 and figures["false_positives"] == 1 and figures["rows"] == 4 and figures["rows_per_s"] > 0
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary.table())
    text = console.export_text()
    assert "0.5000" in text and "4 labelled rows, 0 unjudged" in text and "lookup" in text
    unlabelled = grade(base, write(base / "u.jsonl", [{"gold": "7", "response": "crash"}]))
    assert unlabelled.accuracy is None and unlabelled.mean_score is None
    empty = grade(base, write(base / "e.jsonl", []), out=base / "empty.jsonl")
    assert empty.rows == 0 and empty.mean_score is None and (base / "empty.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", r"line 3: no JSON"),
        ("[1]", "line 3: expected an object"),
        ({"response": "7"}, 'line 3: no key "gold"'),
        ({"gold": "7", "answer": "7"}, 'line 3: no key "response"; there are'),
        ({"gold": "7", "response": None}, "line 3: response is None"),
        ({"gold": ["7"], "response": "7"}, "line 3: gold is"),
        ({"gold": "7", "response": "7", "label": 2}, "line 3: label is 2"),
        ({"gold": "7", "response": "7", "label": "yes"}, "line 3: label is 'yes'"),
        ({"gold": "7", "response": "7", "id": 1.5}, "line 3: id is 1.5"),
        ({"gold": "7", "response": "7", "prompt": 4}, "line 3: prompt is"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line_and_nothing_is_written(base: Path, row: Any, message: str) -> None:
    source = write(base / "cases.jsonl", [{"gold": "7", "response": "7"}, "", row])
    with pytest.raises(InputError, match=rf"cases\.jsonl, {message}"):
        grade(base, source, out=base / "out.jsonl")
    assert sorted(p.name for p in base.iterdir()) == ["cases.jsonl", "v.py"]


def test_unreadable_files_are_refused(base: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl: cannot be read"):
        grade(base, base / "nowhere.jsonl")
    (base / "latin.jsonl").write_bytes(b'{"gold": "7", "response": "\xe9"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl, line 1: no JSON in UTF-8"):
        grade(base, base / "latin.jsonl")
    whole = gzip.compress(b'{"gold": "7", "response": "7"}\n' * 5000)
    (base / "cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(InputError, match="gzip stream is damaged"):
        grade(base, base / "cut.jsonl.gz")
    with pytest.raises(InputError, match="lookup"):
        grade(base, write(base / "c.jsonl", ROWS[:1]), ref="./v.py:lookupp")


def test_a_long_file_streams_in_order_and_in_bounded_memory(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = base / "long.jsonl.gz", base / "out.jsonl.gz"
    with gzip.open(source, "wt", compresslevel=1) as file:
        for i in range(6000):
            row = {"id": f"r{i}", "gold": str(i), "response": str(i - i % 2), "label": i % 2 == 0, "note": "x" * 5000}
            file.write(json.dumps(row) + "\n")
    tracemalloc.start()
    summary = verify_file(source, "./v.py:lookup", {}, base, out=out, disagreements=None, workers=2, timeout_s=5, progress=True)
    peak_mb = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert summary.rows == 6000 and summary.accuracy == 1.0
    assert [row["id"] for row in read(out)] == [f"r{i}" for i in range(6000)]
    assert peak_mb < 25  # the rows are 31 MB of text
    shown = capsys.readouterr()
    assert shown.out == "" and "6000 rows" in shown.err

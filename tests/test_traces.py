"""Trace files: what is written is read back, bad lines are named, a killed writer goes on where it was."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llmrl.evaluation.traces import BadTrace, Trace, TraceWriter, parse_trace, read_traces, write_traces
from llmrl.records import InputError

ROOT = Path(__file__).parents[1]


def trace(i: int, **changes) -> Trace:
    full = Trace(
        id=f"p{i // 4}/{i % 4}",
        prompt_id=f"p{i // 4}",
        response=f"réponse {i}\n\u2028#4",
        prompt="2+2=",
        messages=[{"role": "user", "content": "2+2="}],
        gold="4",
        token_ids=[5, 6, i],
        logprobs=[-0.1, -1e-9, -12.345678901234567],
        finish="stop",
        score=1.0,
        status="ok",
        answer="4",
        model="tiny",
        sample=i % 4,
    )
    return replace(full, **changes)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "new/t.jsonl.gz"])
def test_what_is_written_is_read_back(tmp_path, name):
    traces = [trace(0), trace(1, score=None, status="timeout", answer=None), Trace("x", "p", ""), trace(2, extra={"source": {"a": [1]}})]
    assert write_traces(tmp_path / name, traces) == 4
    assert list(read_traces(tmp_path / name)) == traces
    assert sorted(p.name for p in (tmp_path / name).parent.iterdir() if p.is_file()) == [Path(name).name]


def test_the_schema_is_what_the_lines_hold(tmp_path):
    write_traces(tmp_path / "t.jsonl", [trace(3)])
    row = json.loads((tmp_path / "t.jsonl").read_text())
    want = "schema id prompt_id prompt messages gold response token_ids logprobs finish score status answer model sample"
    assert list(row) == want.split()
    assert row["schema"] == 1 and row["logprobs"] == [-0.1, -1e-9, -12.345678901234567]


def test_gzip_bytes_depend_on_the_traces_alone(tmp_path):
    write_traces(tmp_path / "a.jsonl.gz", [trace(i) for i in range(9)])
    time.sleep(1.1)  # a gzip header counts whole seconds
    write_traces(tmp_path / "b.jsonl.gz", (trace(i) for i in range(9)))
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def lines_of(rows: list) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


BAD: list[tuple[object, str | None, str]] = [
    (b"{", None, "Expecting"),
    (b"\xff", None, "utf-8"),
    ([1], None, "a list where an object"),
    ({"id": "a"}, "a", "schema is None"),
    (trace(4).to_json() | {"schema": 2}, "p1/0", "reads schema 1"),
    (trace(4).to_json() | {"response": None}, "p1/0", "response is missing"),
    (trace(4).to_json() | {"id": 7}, None, "id is int"),
    (trace(4).to_json() | {"score": 1.5}, "p1/0", "score is 1.5"),
    (trace(4).to_json() | {"score": None}, "p1/0", "a score goes with ok"),
    (trace(4).to_json() | {"status": "error"}, "p1/0", "a score goes with ok"),
    (trace(4).to_json() | {"status": "fine"}, "p1/0", "status is 'fine'"),
    (trace(4).to_json() | {"finish": "eos"}, "p1/0", "finish is 'eos'"),
    (trace(4).to_json() | {"token_ids": [1]}, "p1/0", "1 token_ids but 3 logprobs"),
    (trace(4).to_json() | {"logprobs": [float("nan")] * 3}, "p1/0", "finite"),
    (trace(4).to_json() | {"sample": -1}, "p1/0", "sample is -1"),
    (trace(4).to_json() | {"messages": "hi"}, "p1/0", "messages must be"),
    (trace(0).to_json(), "p0/0", "came before"),
]


def test_bad_lines_are_named_and_counted(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines_of([trace(0).to_json(), *[row for row, _, _ in BAD], b"", trace(1).to_json()]))
    bad: list[BadTrace] = []
    assert list(read_traces(path, on_bad="drop", bad=bad)) == [trace(0), trace(1)]
    assert [(b.line, b.id) for b in bad] == [(i + 2, name) for i, (_, name, _) in enumerate(BAD)]
    for b, (_, _, reason) in zip(bad, BAD, strict=True):
        assert reason in b.reason
    with pytest.raises(InputError) as caught:
        list(read_traces(path))
    assert f"{len(BAD)} of {len(BAD) + 2} lines" in str(caught.value) and "line 2:" in str(caught.value)
    assert "and 12 more" in str(caught.value)
    with pytest.raises(ValueError, match="needs a list"):
        next(read_traces(path, on_bad="drop"))


def test_files_that_are_missing_or_cut_short(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        list(read_traces(tmp_path / "none.jsonl"))
    write_traces(tmp_path / "t.jsonl.gz", [trace(i) for i in range(40)])
    whole = (tmp_path / "t.jsonl.gz").read_bytes()
    (tmp_path / "t.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(InputError, match="cannot be read to its end"):
        list(read_traces(tmp_path / "t.jsonl.gz"))


def test_reading_streams(tmp_path):
    """The first trace comes before the end of the file is looked at."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines_of([trace(0).to_json(), b"broken"]))
    assert next(read_traces(path)) == trace(0)


def test_a_writer_refuses_what_could_not_be_read(tmp_path):
    with TraceWriter(tmp_path / "t.jsonl") as writer:
        writer.write(trace(0))
        for wrong, match in [
            (trace(0), "written before"),
            (trace(1, score=float("nan")), "score is nan"),
            (trace(1, extra={"id": "other"}), "keys of the schema: id"),
            (trace(1, extra={"x": float("inf")}), "JSON compliant"),
        ]:
            with pytest.raises(ValueError, match=match):
                writer.write(wrong)
    assert list(read_traces(tmp_path / "t.jsonl")) == [trace(0)]


def test_an_exception_keeps_the_part_and_the_old_file(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    write_traces(path, [trace(0)])
    old = path.read_bytes()
    with pytest.raises(RuntimeError), TraceWriter(path, resume=False) as writer:
        writer.write(trace(1))
        raise RuntimeError
    assert path.read_bytes() == old
    with TraceWriter(path) as writer:
        assert writer.ids == {"p0/1"}
        writer.write(trace(2))
    assert list(read_traces(path)) == [trace(1), trace(2)]


def test_resume_after_any_cut_keeps_the_whole_lines(tmp_path):
    path, part = tmp_path / "t.jsonl.gz", tmp_path / "t.jsonl.gz.part"
    traces = [trace(i) for i in range(3)]
    write_traces(path, traces)
    want, lines = path.read_bytes(), gzip.decompress(path.read_bytes())
    for cut in range(0, len(lines) + 1, 7):
        path.unlink(missing_ok=True)
        part.write_bytes(lines[:cut])
        with TraceWriter(path) as writer:
            assert len(writer.ids) == lines[:cut].count(b"\n")
            for t in traces:
                if t.id not in writer.ids:
                    writer.write(t)
        assert path.read_bytes() == want and not part.exists()


def test_resume_of_a_finished_file_adds_to_it(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    write_traces(path, [trace(0)])
    with TraceWriter(path) as writer:
        assert writer.ids == {"p0/0"}
        writer.write(trace(1))
    assert list(read_traces(path)) == [trace(0), trace(1)]


CHILD = """
import sys, time
from llmrl.evaluation.traces import Trace, TraceWriter
with TraceWriter(sys.argv[1]) as writer:
    print("up", flush=True)
    for i in range(20000):
        if i % 100 == 0 and f"{i}" not in writer.ids:
            time.sleep(0.001)  # so that a fast machine is not done before it is killed
        if f"{i}" not in writer.ids:
            writer.write(Trace(f"{i}", f"{i // 4}", "x" * (i % 97), token_ids=[i], logprobs=[-i / 7]))
"""


def start(target: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(target)], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)


def kill_after(target: Path, delay_s: float) -> bool:
    """Starts the writer, lets it write for so long, kills it; whether it was still at work."""
    child = start(target)
    assert child.stdout is not None and child.stdout.readline() == b"up\n"
    time.sleep(delay_s)
    child.kill()  # SIGKILL; nothing happens to a process that has ended
    child.stdout.close()
    return child.wait(timeout=60) == -signal.SIGKILL


def test_kill_9_at_any_moment_loses_nothing(tmp_path):
    path, part = tmp_path / "t.jsonl.gz", tmp_path / "t.jsonl.gz.part"
    assert start(tmp_path / "whole.jsonl.gz").wait(timeout=60) == 0
    rng = random.Random(0)
    kills = kept = 0
    for _ in range(15):
        kills += kill_after(path, 0.04 * rng.random())
        if part.exists():  # what was there before the kill is still there
            assert part.read_bytes().count(b"\n") >= kept
            kept = part.read_bytes().count(b"\n")
        if path.exists():
            break
    assert kills >= 5 and kept > 0
    assert start(path).wait(timeout=60) == 0
    want = path.read_bytes()
    assert want == (tmp_path / "whole.jsonl.gz").read_bytes()
    # Now while it packs: everything is written, and the old finished file must stay or be the new one.
    for delay_s in (0.0, 0.002, 0.005, 0.01, 0.02):
        part.write_bytes(gzip.decompress(want))
        path.write_bytes(b"old")
        killed = kill_after(path, delay_s)
        assert path.read_bytes() in (b"old", want) and (part.exists() or path.read_bytes() == want), killed
    assert start(path).wait(timeout=60) == 0
    assert path.read_bytes() == want
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.jsonl.gz", "whole.jsonl.gz"]


def test_parse_keeps_unknown_keys():
    row = trace(0).to_json() | {"source": "elsewhere"}
    assert parse_trace(row).extra == {"source": "elsewhere"} and parse_trace(row).to_json() == row

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

from llmrl.evaluation.confidence import Confidence
from llmrl.evaluation.sample import raw_logprobs, rescore, sample_traces, token_texts
from llmrl.evaluation.traces import BadTrace, Trace, TraceWriter, bad_report, parse_trace, read_traces, write_traces
from llmrl.records import Completion, InputError, Prompt, Request, Sampling, Verdict

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
        raw_logprobs=[-0.2, 0.0, -11.5],
        tokens=["ré", "ponse", f" {i}\n\u2028#4"],
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
    want = "schema id prompt_id prompt messages gold response token_ids logprobs raw_logprobs tokens finish score status answer model sample"
    assert list(row) == want.split()
    assert row["schema"] == 2 and row["logprobs"] == [-0.1, -1e-9, -12.345678901234567]


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
    (trace(4).to_json() | {"schema": 3}, "p1/0", "schema is 3; this version reads schema 1 and 2"),
    (trace(4).to_json() | {"schema": True}, "p1/0", "schema is True"),
    (trace(4).to_json() | {"response": None}, "p1/0", "response is missing"),
    (trace(4).to_json() | {"id": 7}, None, "id is int"),
    (trace(4).to_json() | {"score": 1.5}, "p1/0", "score is 1.5"),
    (trace(4).to_json() | {"score": None}, "p1/0", "a score goes with ok"),
    (trace(4).to_json() | {"status": "error"}, "p1/0", "a score goes with ok"),
    (trace(4).to_json() | {"status": "fine"}, "p1/0", "status is 'fine'"),
    (trace(4).to_json() | {"finish": "eos"}, "p1/0", "finish is 'eos'"),
    (trace(4).to_json() | {"token_ids": [1]}, "p1/0", "1 token_ids but 3 logprobs"),
    (trace(4).to_json() | {"raw_logprobs": [-1.0]}, "p1/0", "3 logprobs but 1 raw_logprobs"),
    (trace(4).to_json() | {"raw_logprobs": [0.9, 0.5, 1.0]}, "p1/0", "raw_logprobs holds 1: the natural log of a probability is at most 0"),
    (trace(4).to_json() | {"raw_logprobs": [-1.0, None, -2.0]}, "p1/0", "raw_logprobs must be a list of finite numbers"),
    (trace(4).to_json() | {"tokens": ["a", "b", 3]}, "p1/0", "tokens must be a list of texts"),
    (trace(4).to_json() | {"tokens": ["a"]}, "p1/0", "3 raw_logprobs but 1 tokens"),
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
    assert f"{len(BAD)} of {len(BAD) + 2} rows" in str(caught.value) and f"{path}:2: Expecting" in str(caught.value)
    assert f"{path}:6 (id 'p1/0'): schema is 3" in str(caught.value) and f"and {len(BAD) - 5} more" in str(caught.value)
    with pytest.raises(ValueError, match="needs a list"):
        next(read_traces(path, on_bad="drop"))


def test_the_report_of_what_was_dropped_counts_reasons():
    bad = [BadTrace(k, None, f"score is {k}.5; it must lie in [0, 1] or be null", "t.jsonl") for k in range(1, 8)]
    bad.append(BadTrace(9, "x", "finish is 'eos'", "t.jsonl"))
    text = bad_report(bad, 20)
    assert text.splitlines() == [
        "8 of 20 rows are no traces:",
        "  7 x score is 1.5; it must lie in [0, 1] or be null  at t.jsonl:1, t.jsonl:2, t.jsonl:3 and 4 more",
        "  1 x finish is 'eos'  at t.jsonl:9 (id 'x')",
    ]
    assert bad_report([], 20) == ""


def test_schema_1_is_read_beside_schema_2(tmp_path):
    old = {k: v for k, v in trace(0).to_json().items() if k not in ("raw_logprobs", "tokens")} | {"schema": 1}
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines_of([old, trace(1).to_json()]))
    assert list(read_traces(path)) == [trace(0, raw_logprobs=None, tokens=None), trace(1)]
    with TraceWriter(path) as writer:  # and continued
        assert writer.first == trace(0, raw_logprobs=None, tokens=None)
        writer.write(trace(2))
    assert [t.id for t in read_traces(path)] == ["p0/0", "p0/1", "p0/2"]


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


# ---------------------------------------------------------------- sampling


class Scripted:
    """An engine whose numbers tell where they came from: token k of a request has log-prob -k/8 as sampled and -k/4 - 1 in a second pass.

    As with a real one, numbers differ a little with the batch: by 1e-6 for each request in it.
    """

    policy_version = 0

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at, self.calls, self.scored = fail_at, 0, 0

    def generate(self, requests):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("broken off")
        eps = 1e-6 * len(requests)
        return [
            Completion([*r.context_ids, int(r.seed[2])], [-k / 8 - eps for k in range(len(r.context_ids) + 1)], "stop", 0, "t" * (len(r.context_ids) + 1))
            for r in requests
        ]

    def score(self, pairs):
        self.scored += len(pairs)
        return [[-k / 4 - 1 - 1e-6 * len(pairs) for k in range(len(ids))] for _, ids in pairs]

    def load_weights(self, version, weights):
        raise AssertionError


PROMPTS = [Prompt(f"q{i}", ({"role": "user", "content": "x" * (i % 3 + 1)},), "1") for i in range(7)]


def sample(out: Path, engine: Scripted, **changes) -> int:
    how = {"n": 3, "sampling": Sampling(temperature=0.7), "seed": 5, "model": "m", "text": lambda ids: "t" * len(ids), "batch": 4} | changes
    return sample_traces(engine, lambda p: list(range(1, len(p.text) + 1)), PROMPTS, out, **how)


@pytest.mark.parametrize(
    "sampling, own", [(Sampling(), True), (Sampling(temperature=0.7), False), (Sampling(temperature=0), False), (Sampling(top_p=0.9), False),
                      (Sampling(top_k=5), False), (Sampling(min_p=0.1), False), (Sampling(max_new_tokens=9, stop=("#",)), True)],
)  # fmt: skip
def test_raw_logprobs_are_the_engines_own_only_where_it_sampled_from_the_bare_softmax(tmp_path, sampling, own):
    engine = Scripted()
    assert sample(tmp_path / "t.jsonl", engine, sampling=sampling) == 21
    assert engine.scored == (0 if own else 21)
    for t in read_traces(tmp_path / "t.jsonl"):
        assert t.raw_logprobs is not None and t.logprobs is not None
        want = t.logprobs if own else [-k / 4 - 1 for k in range(len(t.logprobs))]
        assert t.raw_logprobs == pytest.approx(want, abs=1e-5) and t.tokens == ["t"] * len(want)
        assert t.extra["sampling"]["temperature"] == sampling.temperature and t.extra["sampling"]["seed"] == 5


def test_self_certainty_is_a_column_where_it_is_asked_for(tmp_path):
    engine = Scripted()
    engine.certainty = lambda pairs: [[0.125 * len(context)] * len(ids) for context, ids in pairs]  # type: ignore[attr-defined]
    sample(tmp_path / "t.jsonl", engine, certainty=True)
    for t in read_traces(tmp_path / "t.jsonl"):
        assert t.extra["self_certainty"] == [0.125 * len(t.prompt or "")] * len(t.token_ids or [])
        assert Confidence("self_certainty").of(t)[0] == 0.125 * len(t.prompt or "")


def test_a_broken_off_run_continues_to_the_bytes_of_an_unbroken_one(tmp_path):
    """Also within a batch, although the engine's last digits hang on the batch."""
    whole, path, part = tmp_path / "whole.jsonl.gz", tmp_path / "t.jsonl.gz", tmp_path / "t.jsonl.gz.part"
    assert sample(whole, Scripted()) == 21
    want = whole.read_bytes()
    for fail_at in range(1, 7):
        path.unlink(missing_ok=True)
        with pytest.raises(RuntimeError):
            sample(path, Scripted(fail_at))
        assert sample(path, Scripted()) == 21 - 4 * (fail_at - 1)
        assert path.read_bytes() == want
    lines = gzip.decompress(want)
    for cut in range(0, len(lines), 997):
        path.unlink(missing_ok=True)
        part.write_bytes(lines[:cut])
        sample(path, Scripted())
        assert path.read_bytes() == want, cut


def test_more_samples_are_added_to_a_file(tmp_path):
    path = tmp_path / "t.jsonl"
    assert sample(path, Scripted()) == 21 and sample(path, Scripted()) == 0 and sample(path, Scripted(), n=4) == 7
    assert {t.id for t in read_traces(path)} == {f"q{i}/{k}" for i in range(7) for k in range(4)}


def test_a_file_of_other_sampling_or_another_model_is_not_continued(tmp_path):
    path = tmp_path / "t.jsonl"
    sample(path, Scripted())
    for changes, match in [
        ({"sampling": Sampling(temperature=0.8)}, "temperature was 0.7 and is now 0.8"),
        ({"sampling": Sampling(temperature=0.7, stop=("a",))}, "stop was"),
        ({"seed": 6}, "seed was 5 and is now 6"),
        ({"model": "other"}, "model was 'm' and is now 'other'"),
    ]:
        with pytest.raises(InputError, match=match):
            sample(path, Scripted(), **changes)
    assert len(list(read_traces(tmp_path / "t.jsonl.part"))) == 21
    assert sample(path, Scripted(), seed=6, resume=False) == 21


def test_new_traces_alone_are_graded_and_progress_is_told(tmp_path):
    seen: list[str] = []
    told: list[int] = []

    def grade(items: list[tuple[Prompt, str]]) -> list[Verdict]:
        seen.extend(p.id for p, _ in items)
        return [Verdict(1.0, answer=text) for _, text in items]

    with pytest.raises(RuntimeError):
        sample(tmp_path / "t.jsonl", Scripted(fail_at=3), score=grade)
    assert sample(tmp_path / "t.jsonl", Scripted(), score=grade, each=told.append) == 13
    assert len(seen) == 21 and told == [8, 12, 16, 20, 21, 21]
    assert all(t.score == 1.0 and t.status == "ok" for t in read_traces(tmp_path / "t.jsonl"))


class Streaming(Scripted):
    """Answers one by one and out of order, as servers do; tells how many requests were open at most."""

    streams = True

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__(fail_at)
        self.open = self.most = 0

    async def complete(self, requests):
        import asyncio

        self.open += len(requests)
        self.most = max(self.most, self.open)
        await asyncio.sleep(0.002 * (5 - len(requests[0].context_ids)))
        self.open -= len(requests)
        return self.generate(requests)


def test_an_engine_that_streams_is_asked_for_two_batches_at_a_time(tmp_path):
    engine, told = Streaming(), []
    assert sample(tmp_path / "t.jsonl", engine, each=told.append) == 21
    assert 4 < engine.most <= 8 and engine.calls == 21  # one call a request
    assert sorted(told) == [*range(22), 21]
    assert [t.id for t in read_traces(tmp_path / "t.jsonl")] == [f"q{i}/{k}" for i in range(7) for k in range(3)]
    with pytest.raises(RuntimeError, match="broken off"):
        sample(tmp_path / "u.jsonl", Streaming(fail_at=10))
    sample(tmp_path / "u.jsonl", Streaming())
    assert (tmp_path / "u.jsonl").read_bytes() == (tmp_path / "t.jsonl").read_bytes()


def test_raw_logprobs_of_a_mixed_batch():
    requests = [Request((1,), (0, "a", 0), Sampling()), Request((1, 2), (0, "b", 0), Sampling(temperature=2.0))]
    engine = Scripted()
    raw = raw_logprobs(engine, requests, engine.generate(requests))
    assert raw[0] == pytest.approx([0, -0.125], abs=1e-5) and raw[1] == pytest.approx([-1, -1.25, -1.5], abs=1e-5)


def test_token_texts_join_to_the_response():
    """Bytes as tokens: characters of several bytes, one that is broken off at the end, one special token."""
    said = "né 🙂\n!"
    ids = [*said.encode(), 300]

    def text(some) -> str:
        return bytes(i for i in some if i < 256).decode(errors="replace")

    assert token_texts(ids, text) == ["n", "", "é", " ", "", "", "", "🙂", "\n", "!", ""]
    assert token_texts([*b"a", 0xC3], text) == ["a", "\ufffd"]
    assert token_texts([], text) == []
    assert token_texts([97, 98], lambda some: str(len(some))) is None  # decoding that is no sum of its parts


def test_rescore_fills_what_has_no_probabilities():
    kept, engine = trace(3), Scripted()
    bare = Trace("b", "p", "abc", prompt="ab", logprobs=[-1.0])
    sampled = trace(4, raw_logprobs=None, tokens=None)
    done = list(rescore(engine, lambda t: [1] * len(t.prompt or ""), lambda s: [ord(c) for c in s], iter([kept, bare, sampled, Trace("e", "p", "")]),
                        text=lambda ids: "".join(map(chr, ids)), batch=2))  # fmt: skip
    assert done[0] == kept and done[3] == Trace("e", "p", "")
    assert done[1].token_ids == [97, 98, 99] and done[1].tokens == ["a", "b", "c"] and done[1].logprobs is None
    assert done[1].raw_logprobs == pytest.approx([-1, -1.25, -1.5], abs=1e-5)
    assert done[2].token_ids == sampled.token_ids and done[2].logprobs == sampled.logprobs and len(done[2].raw_logprobs or []) == 3

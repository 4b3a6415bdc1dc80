"""`llmrl score --use frs` as a user types it: kill and resume, two files and several judges, verdicts on the way, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmrl.cli import app
from llmrl.evaluation.dimensions import DIMENSIONS
from llmrl.evaluation.frs import FRSResult
from llmrl.evaluation.traces import Trace, write_traces
from llmrl.records import InputError
from tests.endpoint_server import Call, EndpointServer, Raw, completion

REPO = Path(__file__).parents[1]
GOOD = {"faithfulness": 5, "utility": 4, "coherence": 5, "factuality": 4}


def sampled(path: Path, model: str | None, n_problems: int = 30, **more: Any) -> Path:
    traces = [Trace(**{
        "id": f"p{q}/{s}", "prompt_id": f"p{q}", "prompt": f"What is {q} + {q}?", "response": f"{model}: {q} + {q} = {2 * q + (s == 3)}", "gold": str(2 * q),
        "raw_logprobs": [-0.1 * (1 + (7 * q + 13 * s) % 31), -0.2], "token_ids": [1, 2], "score": float(s != 3), "status": "ok", "model": model, "sample": s,
        "finish": "stop", **more}) for q in range(n_problems) for s in range(8)]  # fmt: skip
    write_traces(path, traces)
    return path


def arguments(*args: object) -> list[str]:
    return ["score", *map(str, args), "--use", "frs", "--judge-cache", "", "--resamples", "200"]


def start(*args: object, cwd: Path) -> subprocess.Popen[bytes]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    return subprocess.Popen(
        [sys.executable, "-m", "llmrl.cli", *arguments(*args)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it, and hands that down
    )  # fmt: skip


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def llmrl(*args: object) -> Done:
    """In this process, in the folder that it is in; a refusal as `main` maps it."""
    found = CliRunner().invoke(app, arguments(*args))
    if found.exception is not None and not isinstance(found.exception, (InputError, SystemExit)):
        raise found.exception
    return Done(2 if isinstance(found.exception, InputError) else found.exit_code, found.stdout, f"{found.stderr}{found.exception or ''}")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def by_text(call: Call, n: int) -> dict[str, int]:
    """Scores that hang on what is asked alone."""
    digest = sum(call.text.encode())
    return {name: 1 + (digest >> i) % 5 for i, name in enumerate(DIMENSIONS)}


def test_a_killed_command_goes_on_and_ends_as_the_unbroken_one(tmp_path):
    sampled(tmp_path / "a.jsonl", "a")
    with EndpointServer(by_text) as server:
        whole = llmrl("a.jsonl", "--judge-url", server.base_url, "--judge-model", "j", "--out", "whole", "--subsample", 12, "--json")
        assert whole.returncode == 0, whole.stderr
        needed = len(server.calls)
    told = json.loads(whole.stdout)["results"][0]
    assert 120 <= needed <= 132  # 12 of each tenth, and 12 single traces as far as they were not among them
    held = {"n": 0}

    def slow(call: Call, n: int) -> Any:
        held["n"] = n + 1
        return Raw(body=completion(json.dumps(by_text(call, n))), delay_s=0.05)

    with EndpointServer(slow) as server:
        given = ("a.jsonl", "--judge-url", server.base_url, "--judge-model", "j", "--out", "cut", "--subsample", 12, "--concurrency", 2, "--json")
        process = start(*given, cwd=tmp_path)
        end = time.monotonic() + 90
        while held["n"] < 30 and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = len((tmp_path / "cut" / "judgements.jsonl").read_text().splitlines())
        first = len(server.calls)
        assert 20 <= kept <= first <= kept + 2 + 2  # what was in flight, no more
        again = llmrl(*given)
        assert again.returncode == 0, again.stderr
        assert len(server.calls) - first == needed - kept  # no judgement is asked for twice, none is lost
        third = llmrl(*given)
        assert len(server.calls) - first == needed - kept and third.returncode == 0
    for end_ in (again, third):
        found = json.loads(end_.stdout)["results"][0]
        assert {k: v for k, v in found.items() if k != "judge"} == {k: v for k, v in told.items() if k != "judge"}
    results = [FRSResult.from_json(json.loads((tmp_path / d / "report.json").read_text())["results"][0]) for d in ("whole", "cut")]
    assert results[0].judged == results[1].judged


def test_an_interrupted_command_waits_for_what_is_in_flight(tmp_path):
    sampled(tmp_path / "a.jsonl", "a")
    seen = {"n": 0}

    def slow(call: Call, n: int) -> Any:
        seen["n"] = n + 1
        return Raw(body=completion(json.dumps(GOOD)), delay_s=0.3)

    with EndpointServer(slow) as server:
        given = ("a.jsonl", "--judge-url", server.base_url, "--judge-model", "j", "--out", "o", "--concurrency", 3)
        process = start(*given, cwd=tmp_path)
        end = time.monotonic() + 90
        while seen["n"] < 4 and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130
        assert len((tmp_path / "o" / "judgements.jsonl").read_text().splitlines()) == len(server.calls)  # every call that was sent is kept


def test_two_files_two_judges_a_report_and_a_dry_run(tmp_path):
    sampled(tmp_path / "before.jsonl.gz", "tiny")
    sampled(tmp_path / "after.jsonl.gz", "tiny")
    (tmp_path / "people.jsonl").write_text("".join(json.dumps({"id": f"p{q}/0", **GOOD}) + "\n" for q in range(30)))
    with EndpointServer(by_text) as server:
        how = ("--judge-url", server.base_url, "--judge-model", "gpt-4o-mini", "--subsample", 5)
        twins = llmrl("before.jsonl.gz", "after.jsonl.gz", *how)
        assert twins.returncode == 2 and "before@gsm8k=before.jsonl.gz" in twins.stderr
        files = ("before@sums=before.jsonl.gz", "after@sums=after.jsonl.gz")
        dry = llmrl(*files, *how, "--dry-run", "--both", "--json")
        assert dry.returncode == 0 and not server.calls and not (tmp_path / "frs").exists(), dry.stderr
        costs = json.loads(dry.stdout)["dry_run"]
        assert [(c["judge"], c["model"]) for c in costs] == [("gpt-4o-mini", "before"), ("gpt-4o-mini (blind)", "before"), ("gpt-4o-mini", "after"),
                                                           ("gpt-4o-mini (blind)", "after")] and all(c["usd"] > 0 for c in costs)  # fmt: skip
        done = llmrl(*files, *how, "--both", "--baseline", "--human", "people.jsonl", "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert len(server.calls) <= sum(c["calls"] for c in costs)
    assert [(r["label"], r["model"]) for r in told["results"]] == [
        ("FRS", "before"), ("FRS", "after"), ("FRS (blind judge)", "before"), ("FRS (blind judge)", "after"),
        *[("rules baseline (no language model: not FRS)", m) for m in ("before", "after")]]  # fmt: skip
    assert told["results"][4]["frs"] is None and told["results"][4]["baseline"]["value"] is not None
    assert told["results"][0]["benchmark"] == "sums" and told["comparison"]["pairs"][0]["paired"] > 0
    assert {"gpt-4o-mini (blind)", "person: human"} == set(told["results"][0]["judge"]["agreement"])
    assert told["comparison"]["judges"][0]["agreement"]["traces"] > 50
    assert {p.name for p in (tmp_path / "frs").iterdir()} == {"judgements.jsonl", "report.html", "report.json", "report.md"}


def test_traces_without_verdicts_are_graded_or_judged_blind(tmp_path):
    sampled(tmp_path / "a.jsonl", "a", score=None, status=None)
    with EndpointServer(by_text) as server:
        how = ("a.jsonl", "--judge-url", server.base_url, "--judge-model", "j", "--subsample", 5, "--json")
        refused = llmrl(*how)
        assert refused.returncode == 2 and "--verifier" in refused.stderr and not server.calls
        graded = llmrl(*how, "--verifier", "numeric", "--out", "g")
        assert graded.returncode == 0, graded.stderr
        assert json.loads(graded.stdout)["results"][0]["pass_at_1"]["value"] == 0.875
        assert any('"final_answer_correct": false' in call.text for call in server.calls)
        blind = llmrl(*how, "--blind", "--out", "b")
        assert blind.returncode == 0 and json.loads(blind.stdout)["results"][0]["pass_at_1"]["value"] is None


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["a.jsonl"], "name a judge"),
        (["a.jsonl", "--judge-model", "m"], "--judge-url"),
        (["a.jsonl", "--baseline", "--judge-url", "http://x"], "needs a --judge-model"),
        (["a.jsonl", "--judge-model", "m", "--judge-url", "localhost"], "base_url"),
        (["no.jsonl", "--baseline"], "no such file"),
        (["a.jsonl", "--baseline", "--blind", "--both"], "one of them"),
        (["a.jsonl", "--baseline", "--k", "101"], "percent"),
        (["a.jsonl", "--baseline", "--strict", "--sampled-logprobs"], "raw log-probs only"),
        (["a.jsonl", "--baseline", "--confidence", "vibes"], "tail_mean"),
        (["a.jsonl", "--baseline", "--usd-per-mtok", "cheap"], "INPUT,OUTPUT"),
        (["a.jsonl", "--baseline", "--top-half", "--subsample", "0"], "top_half"),
    ],
)  # fmt: skip
def test_the_command_refuses(args, said, tmp_path):
    sampled(tmp_path / "a.jsonl", "a", 2)
    found = CliRunner().invoke(app, ["score", *args, "--use", "frs"])
    assert isinstance(found.exception, InputError) and said in str(found.exception)


def test_options_of_frs_are_refused_elsewhere(tmp_path):
    found = CliRunner().invoke(app, ["score", str(sampled(tmp_path / "a.jsonl", "a", 2)), "--blind", "--max-calls", "3"])
    assert isinstance(found.exception, InputError) and "blind, max_calls" in str(found.exception)


# ---------------------------------------------------------------- traces of others, in the same one command


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plain_rows_with_columns_of_their_own(tmp_path):
    rows = [{"q": f"{i} + 1?", "out": {"text": f"{i + 1}"}, "lp": [-0.1 * (i + 1)], "ok": i % 2} for i in range(12)]
    jsonl(tmp_path / "mine.jsonl", rows)
    jsonl(tmp_path / "asked.jsonl", [{"id": f"row-{i + 1}", "answer": f"work #### {i + 1}"} for i in range(12)])
    how = ("mine@sums=mine.jsonl", "--baseline", "--json", "--column", "response=out.text", "--column", "score=ok", "--column", "logprobs=lp")
    short = llmrl(*how, "--out", "o")
    assert short.returncode == 2 and "say --logprobs raw" in short.stderr  # what they are nobody has said
    done = llmrl(*how, "--out", "o", "--logprobs", "raw", "--column", "prompt=", "--join", "asked.jsonl", "--answer-after", "####")
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)["results"]
    assert (told["model"], told["traces"], told["pass_at_1"]["value"]) == ("mine", 12, 0.5) and told["top_accuracy"]["0.1"] == 0.0  # i = 0
    with EndpointServer(lambda call, n: GOOD) as server:
        judged = llmrl(*how[0:1], *how[2:], "--out", "p", "--logprobs", "raw", "--column", "prompt=q", "--column", "id=", "--judge-url", server.base_url,
                       "--judge-model", "j", "--blind")  # fmt: skip
        assert judged.returncode == 0 and json.loads(judged.stdout)["results"][0]["frs"]["value"] == 87.5, judged.stderr
        assert any("11 + 1?" in call.text for call in server.calls)


def test_a_batch_of_an_endpoint_joined_with_its_input(tmp_path):
    def answer(k: int) -> dict[str, Any]:
        token = {"token": f"{k}", "logprob": -0.5 / (k + 1), "bytes": [48 + k]}
        return {"model": "gpt-x", "choices": [{"index": 0, "message": {"role": "assistant", "content": f"{k}"}, "finish_reason": "stop",
                                               "logprobs": {"content": [token]}}]}  # fmt: skip

    body = {"model": "gpt-x", "temperature": 1, "top_p": 1, "messages": [{"role": "user", "content": "how many?"}]}
    jsonl(tmp_path / "out.jsonl", [{"id": "r", "custom_id": f"q{k}", "response": {"status_code": 200, "body": answer(k)}, "error": None} for k in range(9)])
    jsonl(tmp_path / "in.jsonl", [{"custom_id": f"q{k}", "body": body, "answer": k % 8} for k in range(9)])
    with EndpointServer(lambda call, n: GOOD) as server:
        done = llmrl("out.jsonl", "--join", "in.jsonl", "--verifier", "numeric", "--judge-url", server.base_url, "--judge-model", "j", "--json")
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)["results"]
    assert told["model"] == "gpt-x" and told["traces"] == told["problems"] == 9 and told["pass_at_1"]["value"] == pytest.approx(8 / 9)
    assert len(server.calls) == 9 and all("how many?" in call.text for call in server.calls)


def test_texts_without_probabilities_are_scored_by_the_model_that_wrote_them_once(tmp_path, monkeypatch):
    from llmrl import importing

    asked: list[str] = []

    def scored(traces: Any, model: str, dtype: str) -> Any:
        asked.append(f"{model} {dtype}")
        yield from (replace(t, raw_logprobs=[-0.1 * len(t.response), -0.2], token_ids=[1, 2]) for t in traces)

    monkeypatch.setattr(importing, "_scored", scored)
    for name in ("a", "b"):
        jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{i}?", "response": "x" * (i + 1), "score": i % 2} for i in range(10)] + [{"prompt": "no response"}])
    files = ("a@x=a.jsonl", "b@x=b.jsonl", "--baseline", "--json", "--on-bad", "drop")
    assert llmrl(*files).returncode == 2  # without a model there is no confidence
    assert llmrl(*files, "--score-with", "1", "--score-with", "2", "--score-with", "3").returncode == 2
    for dtype in ("bfloat16", "bfloat16", "float32"):
        done = llmrl(*files, "--score-with", "one", "--score-with", "two", "--dtype", dtype)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["results"][0]["traces"] == 10 and "a.jsonl: 1 rows are no traces and were left out; the first is a.jsonl:11:" in " ".join(told["notes"])
    assert asked == ["one bfloat16", "two bfloat16", "one float32", "two float32"]  # the second command took what the first had made

"""Files of other programs become traces: the forms are those that the programs write, with what they cannot tell left open and named."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmrl.evaluation.importers import FORMATS, ImportReport, read_any
from llmrl.evaluation.traces import Trace, read_traces, write_traces
from llmrl.records import InputError


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path, **how: Any) -> tuple[list[Trace], ImportReport]:
    report = ImportReport(str(path))
    return list(read_any(path, report=report, **how)), report


# ---------------------------------------------------------------- our own


def test_trace_files_come_through_unchanged(tmp_path):
    traces = [Trace(f"q{i}/0", f"q{i}", "text", raw_logprobs=[-0.5], model="m", extra={"a": 1}) for i in range(3)]
    write_traces(tmp_path / "t.jsonl.gz", traces)
    got, report = read(tmp_path / "t.jsonl.gz")
    assert got == traces and report.format == "traces" and report.filled["raw_logprobs"] == 3 and "confidence" not in report.text()
    assert [t.model for t in read_any(tmp_path / "t.jsonl.gz", model="other")] == ["other"] * 3


def test_a_trace_file_stays_one_whatever_its_first_lines_are(tmp_path):
    good = Trace("q/0", "q", "text", token_ids=[3], raw_logprobs=[-0.5], extra={"a": 1})
    got, report = read(jsonl(tmp_path / "t.jsonl", ["{broken", good.to_json() | {"schema": 9, "id": "q/1"}, good.to_json()]), on_bad="drop")
    assert got == [good] and report.format == "traces" and [b.reason[:8] for b in report.bad] == ["not JSON", "schema i"]


def step_row(step: int, name: str, **changes: Any) -> dict[str, Any]:
    row = {
        "schema": 1, "step": step, "id": f"{name}/0", "prompt_id": name, "role": "policy", "cohort": name, "prompt": "3+8=", "gold": "11",
        "response": "3+8=11#11", "finish": "stop", "policy_version": step - 1, "reward": 1.0, "score": 1.0, "status": "ok", "answer": "11",
        "detail": "", "advantage": 0.35,
        "weights": {"policy": 1.0}, "parent": None, "context_ids": [1, 7], "token_ids": [7, 14, 2], "logprobs": [-0.25, -0.5, -0.125], "streams": {},
    }  # fmt: skip
    return row | changes


@pytest.mark.parametrize("temperature, raw", [(1.0, True), (0.7, False)])
def test_run_directory(tmp_path, temperature, raw):
    folder = tmp_path / "runs" / "mine"
    jsonl(folder / "samples/step-000002.jsonl.gz", [step_row(2, "b~1"), step_row(2, "c", id="c/pol", role="polluter"), step_row(2, "c", logprobs=None)])
    jsonl(folder / "samples/step-000001.jsonl.gz", [step_row(1, "b"), step_row(1, "d", score=None, status="timeout", reward=None)])
    jsonl(folder / "samples/step-000001.rank1.jsonl.gz", [step_row(1, "e", finish="length")])
    jsonl(folder / "samples/eval-000000.jsonl.gz", [{"id": "x"}])
    rollout = {"temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "stop": []}
    (folder / "manifest.json").write_text(json.dumps({"recipe": {"rollout": rollout}}))
    got, report = read(folder)
    assert [(t.id, t.prompt_id, t.sample, t.score) for t in got] == [
        ("b/0", "b", 0, 1.0), ("d/0", "d", 0, None), ("e/0", "e", 0, 1.0), ("b~1/0", "b", 1, 1.0), ("c/0", "c", 0, 1.0)]  # fmt: skip
    assert [t.raw_logprobs for t in got] == [[-0.25, -0.5, -0.125] if raw else None] * 4 + [None]
    assert got[2].finish == "length" and got[3].extra == {"step": 2, "policy_version": 1, "reward": 1.0, "advantage": 0.35, "role": "policy"}
    assert {t.model for t in got} == {"mine"} and report.left_out == {"rows of role 'polluter'": 1} and report.rows == 6
    assert [t.id for t in read_any(folder, steps=(2, 2))] == ["b~1/0", "c/0"]
    assert [t.id for t in read_any(folder, role="polluter")] == ["c/pol"]
    with pytest.raises(InputError, match="of the steps 5 to 9"):
        list(read_any(folder, steps=(5, 9)))


# ---------------------------------------------------------------- OpenAI


def chat_response(texts: list[str], **changes: Any) -> dict[str, Any]:
    """What POST /v1/chat/completions answers with "logprobs": true."""

    def content(text: str) -> list[dict[str, Any]]:
        return [{"token": c, "logprob": -0.5, "bytes": list(c.encode()), "top_logprobs": []} for c in text]

    choices = [
        {
            "index": k, "message": {"role": "assistant", "content": t, "refusal": None}, "logprobs": {"content": content(t), "refusal": None},
            "finish_reason": "stop",
        }
        for k, t in enumerate(texts)
    ]  # fmt: skip
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1700000000, "model": "gpt-x", "choices": choices, "usage": {"total_tokens": 9},
    } | changes  # fmt: skip


REQUEST = {"model": "gpt-x", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}], "logprobs": True, "n": 2}


def batch_line(name: str, body: dict[str, Any] | None, status: int = 200, error: Any = None) -> dict[str, Any]:
    return {"id": f"batch_req_{name}", "custom_id": name, "response": body and {"status_code": status, "request_id": "r", "body": body}, "error": error}


def test_openai_batch_output_joined_with_its_input(tmp_path):
    rows = [
        batch_line("q1", chat_response(["four", "4"])), batch_line("q2", {"error": {"message": "rate"}}, 429),
        batch_line("q3", None, error={"code": "expired"}),
        batch_line("q4", chat_response(["x"], choices=[{"index": 0, "message": {"content": None, "tool_calls": [{}]}, "finish_reason": "tool_calls"}])),
        batch_line("q5", chat_response(["cut"])),
    ]  # fmt: skip
    bodies = [REQUEST | {"temperature": k % 2, "top_p": 1} for k in range(6)]
    asked = [{"custom_id": f"q{k}", "method": "POST", "url": "/v1/chat/completions", "body": body, "answer": 4} for k, body in enumerate(bodies)]
    path, requests = jsonl(tmp_path / "out.jsonl", rows), jsonl(tmp_path / "in.jsonl", asked)
    got, report = read(path, join=requests, on_bad="drop")
    assert [(t.id, t.prompt_id, t.response, t.sample) for t in got] == [("q1/0", "q1", "four", 0), ("q1/1", "q1", "4", 1), ("q5/0", "q5", "cut", 0)]
    first = got[0]
    assert first.prompt == "2+2?" and first.gold == "4" and first.messages == REQUEST["messages"] and first.model == "gpt-x" and first.finish == "stop"
    assert first.tokens == ["f", "o", "u", "r"] and first.logprobs == [-0.5] * 4 == first.raw_logprobs  # the input says: temperature 1
    assert [(b.line, b.reason.split(" (")[0]) for b in report.bad] == [
        (2, "the request failed with HTTP status 429"), (3, "the request failed: {'code': 'expired'}"), (4, "a choice without text")]  # fmt: skip
    with pytest.raises(InputError, match=r"3 of 5 rows(?s:.*)out.jsonl:2 \(id 'q2'\): the request failed"):
        list(read_any(path))
    alone, report = read(path, on_bad="drop")
    assert alone[0].raw_logprobs is None and alone[0].logprobs == [-0.5] * 4 and alone[0].prompt is None
    assert "raw_logprobs in no trace" in report.text() and "--logprobs raw" in report.text() and "prompt in none" in report.text()
    assert next(iter(read_any(path, logprobs="raw"))).raw_logprobs == [-0.5] * 4


@pytest.mark.parametrize(
    "request_, raw", [({"temperature": 1.0}, True), ({}, False), ({"temperature": 0.7}, False), ({"temperature": 1, "top_p": 0.9}, False),
                      ({"temperature": 1, "top_k": -1, "min_p": 0}, True), ({"temperature": 1, "top_k": 20}, False),
                      ({"temperature": 1, "presence_penalty": 1}, False)],
)  # fmt: skip
def test_log_probs_are_raw_only_where_the_request_shows_it(tmp_path, request_, raw):
    path = jsonl(tmp_path / "log.jsonl", [{"request": REQUEST | request_, "response": chat_response(["a"])}])
    (trace,) = read_any(path)
    assert (trace.raw_logprobs == [-0.5]) == raw and trace.logprobs == [-0.5]
    (trace,) = read_any(path, logprobs="sampled")
    assert trace.raw_logprobs is None


def test_same_question_is_one_problem_in_a_log_without_ids(tmp_path):
    other = REQUEST | {"messages": [{"role": "user", "content": [{"type": "text", "text": "3+3?"}]}]}
    rows = [{"request": r, "response": chat_response([t])} for r, t in [(REQUEST, "4"), (other, "6"), (REQUEST, "5")]]
    got, _ = read(jsonl(tmp_path / "log.jsonl", rows))
    assert got[0].prompt_id == got[2].prompt_id != got[1].prompt_id and [t.sample for t in got] == [0, 0, 1] and got[1].prompt == "3+3?"
    assert len({t.id for t in got}) == 3


def test_tokens_of_vllm_and_of_characters_in_parts(tmp_path):
    halves = [{"token": "\ufffd", "logprob": -1.0, "bytes": [0xC3]}, {"token": "\ufffd", "logprob": -2.0, "bytes": [0xA9]}]
    content = [*halves, {"token": "<end>", "logprob": 1e-9, "bytes": []}]
    ids = [{"token": f"token_id:{k}", "logprob": -9999.0} for k in (5, 6)]
    rows = [
        {"id": "a", "choices": [{"message": {"content": "é", "reasoning": "hm"}, "logprobs": {"content": content}, "token_ids": [8, 9, 2]}]},
        {"id": "b", "choices": [{"message": {"content": "xy"}, "logprobs": {"content": ids}, "finish_reason": "content_filter"}]},
        {"id": "cmpl", "choices": [{"text": "ab", "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-0.1, -0.2]}, "finish_reason": "length"}]},
        {"id": "echo", "choices": [{"text": "ab", "logprobs": {"tokens": ["a", "b"], "token_logprobs": [None, -0.2]}, "finish_reason": "stop"}]},
    ]  # fmt: skip
    got, report = read(jsonl(tmp_path / "log.jsonl", rows), on_bad="drop")
    assert got[0].tokens == ["", "é", ""] and got[0].token_ids == [8, 9, 2] and got[0].logprobs == [-1.0, -2.0, 0.0]
    assert got[0].response == "<think>\nhm\n</think>\né" and got[0].prompt_id == "a"
    assert got[1].token_ids == [5, 6] and got[1].tokens is None and got[1].finish is None and got[1].extra == {"finish_reason": "content_filter"}
    assert got[2].finish == "length" and got[2].tokens == ["a", "b"]
    assert len(report.bad) == 1 and "echo" in report.bad[0].reason


def test_vllm_offline_outputs(tmp_path):
    def output(index: int, ids: list[int], **changes: Any) -> dict[str, Any]:
        told = [{str(i): {"logprob": -i / 10, "rank": 1, "decoded_token": f"<{i}>"}, "99": {"logprob": -7.0, "rank": 2, "decoded_token": "?"}} for i in ids]
        text = "".join(f"<{i}>" for i in ids)
        return {"index": index, "text": text, "token_ids": ids, "cumulative_logprob": -1.0, "logprobs": told, "finish_reason": "length"} | changes

    rows = [
        {"request_id": "0", "prompt": "2+2=", "prompt_token_ids": [1], "outputs": [output(0, [4, 5]), output(1, [6])], "finished": True},
        {"request_id": "1", "prompt": None, "outputs": [output(0, [7], logprobs=None)]},
        {"request_id": "2", "prompt": "x", "outputs": [output(0, [7], token_ids=[8])]},
        {"request_id": "3", "prompt": "x", "outputs": []},
    ]  # fmt: skip
    got, report = read(jsonl(tmp_path / "out.jsonl", rows), on_bad="drop", logprobs="raw", format="vllm")
    assert got[0].raw_logprobs == [-0.4, -0.5] and got[0].tokens == ["<4>", "<5>"] and got[0].prompt_id == got[1].prompt_id and got[1].sample == 1
    assert got[2].prompt_id == "1" and got[2].logprobs is None
    assert [b.reason for b in report.bad] == ["a sampled token is missing from its logprobs", "no outputs"]
    assert report.filled["raw_logprobs"] == 2 and "raw_logprobs in 2 traces only" in report.text()


# ---------------------------------------------------------------- lm-eval, lighteval


def lm_eval_row(doc_id: int, filter_: str, **changes: Any) -> dict[str, Any]:
    asked = f"Question: 1\nAnswer: 1\n\nQuestion: How many in {doc_id}?\nAnswer:"
    return {
        "doc_id": doc_id, "doc": {"question": f"How many in {doc_id}?", "answer": f"so {doc_id}\n#### {doc_id}"}, "target": f"so {doc_id}\n#### {doc_id}",
        "arguments": {"gen_args_0": {"arg_0": asked, "arg_1": {"until": ["Q:"], "do_sample": False}}},
        "resps": [[f" {doc_id} it is\n#### {doc_id}"]], "filtered_resps": [str(doc_id)], "filter": filter_, "metrics": ["exact_match"], "doc_hash": "d",
        "prompt_hash": "p", "target_hash": "t", "exact_match": 1.0,
    } | changes  # fmt: skip


def test_lm_eval_samples(tmp_path):
    chat = json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": "asked"}])
    rows = [
        lm_eval_row(0, "strict-match"),
        lm_eval_row(1, "strict-match", exact_match=0.0, arguments={"gen_args_0": {"arg_0": [chat], "arg_1": {}}}, doc={"x": 1}, filtered_resps=[["7"]]),
        lm_eval_row(2, "strict-match", resps=[["a", "b"]]), lm_eval_row(3, "strict-match", resps=[[["-1.5", "False"]], [["-0.5", "True"]]]),
        lm_eval_row(0, "flexible-extract", filtered_resps=["zero"]),
    ]  # fmt: skip
    path = jsonl(tmp_path / "org__model-7b" / "samples_gsm8k_2026-01-02T03-04-05.678901.jsonl", rows)
    got, report = read(path, on_bad="drop", answer_after="####")
    assert [(t.id, t.score, t.answer, t.gold) for t in got] == [
        ("gsm8k/0/0", 1.0, "0", "0"), ("gsm8k/1/0", 0.0, "7", "1"), ("gsm8k/2/0", None, None, "2"), ("gsm8k/2/1", None, None, "2")]  # fmt: skip
    assert got[0].model == "org/model-7b" and got[0].prompt == "How many in 0?" and got[0].response == " 0 it is\n#### 0"
    assert got[0].messages is None and got[0].extra["context"] == "Question: 1\nAnswer: 1\n\nQuestion: How many in 0?\nAnswer:"
    assert got[1].prompt == "asked" and (got[1].messages or [])[0] == {"role": "system", "content": "s"} and got[0].extra["metrics"] == {"exact_match": 1.0}
    assert report.left_out == {"rows of the filter 'flexible-extract' (taken: 'strict-match')": 1}
    assert [b.reason for b in report.bad] == ["log-likelihoods of given choices, no text that the model wrote"]
    assert "lm-eval --log_samples keeps no token's log-prob" in report.text() and "--score-with" in report.text()
    assert [t.answer for t in read_any(path, filter="flexible-extract")] == ["zero"]
    with pytest.raises(InputError, match="no metric 'acc'; there are exact_match"):
        list(read_any(path, score_key="acc"))


def lighteval_row(name: str, texts: list[str], **changes: Any) -> dict[str, Any]:
    doc = {"query": f"Q {name}", "choices": ["12", "twelve"], "gold_index": [0, 1], "id": name, "task_name": "lighteval|gsm8k|0", "specific": None}
    answer = {
        "input": f"chat of {name}", "input_tokens": [1, 2], "text": texts, "output_tokens": [[5, 6, 7] for _ in texts], "text_post_processed": None,
        "logprobs": [], "argmax_logits_eq_gold": [], "logits": None, "truncated_tokens_count": 0,
    }  # fmt: skip
    return {"doc": doc, "metric": {"extractive_match": 1.0}, "model_response": answer} | changes


def test_lighteval_details(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [lighteval_row("0", ["it is 12"]), lighteval_row("1", ["a", "b"])]
    rows[0]["model_response"]["logprobs"] = [-0.1, -0.2, -0.3]
    path = tmp_path / "details/org/model/2026-01-02T03-04-05.6/details_lighteval|gsm8k|0_2026-01-02T03-04-05.6.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    got, report = read(path)
    assert [(t.id, t.score) for t in got] == [("lighteval|gsm8k|0/0/0", 1.0), ("lighteval|gsm8k|0/1/0", None), ("lighteval|gsm8k|0/1/1", None)]
    assert {(t.gold, t.model) for t in got} == {("12", "org/model")}
    assert got[0].prompt == "Q 0" and got[0].extra["context"] == "chat of 0" and got[0].token_ids == [5, 6, 7]
    assert got[0].logprobs == [-0.1, -0.2, -0.3] and got[0].raw_logprobs is None and got[0].extra["golds"] == ["12", "twelve"]
    assert report.format == "lighteval" and "one backend only" in report.text()
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="not a parquet file that can be read"):
        list(read_any(path))


def test_lighteval_details_of_before(tmp_path):
    """The flat columns, lists written as text too."""
    old = {"example": "Q", "full_prompt": "shots\nQ", "predictions": ["it's 3"], "gold": ["3"], "metrics": {"em": 1.0}, "cont_tokens": [[4, 5]]}
    as_text = {k: str(v) if isinstance(v, (list, dict)) else v for k, v in old.items()}
    scores = old | {"predictions": [[-1.5, False]]}
    got, report = read(jsonl(tmp_path / "details.jsonl", [old, as_text, scores]), on_bad="drop")
    assert len(got) == 2 and got[0].prompt_id == got[1].prompt_id and {(t.response, t.gold, t.score) for t in got} == {("it's 3", "3", 1.0)}
    assert got[1].token_ids == [4, 5] and "log-likelihood" in report.bad[0].reason


# ---------------------------------------------------------------- plain rows


def test_rows_by_known_names(tmp_path):
    rows = [
        {"question": "2+2?", "output": "4", "target": 4, "is_correct": True, "token_probs": [0.5, 1.0], "model_name": "m"},
        {"problem": "p", "generations": ["a", "b"], "correct": [True, 0.25], "probs": [[0.5], [0.25, 0.5]], "unique_id": "u1", "answer": ["9"]},
        {"prompt": [{"role": "user", "content": "hi"}], "response": "c", "id": "mine", "score": 0.0},
    ]
    got, report = read(jsonl(tmp_path / "rows.jsonl", rows))
    assert report.format == "rows" and got[0].prompt == "2+2?" and got[0].gold == "4" and got[0].score == 1.0 and got[0].model == "m"
    assert got[0].raw_logprobs == [math.log(0.5), 0.0]
    assert [(t.id, t.response, t.score, t.gold) for t in got[1:3]] == [("u1/0", "a", 1.0, "9"), ("u1/1", "b", 0.25, "9")]
    assert got[2].raw_logprobs == [math.log(0.25), math.log(0.5)]
    assert got[3].id == "mine" and got[3].prompt == "hi" and got[3].messages == [{"role": "user", "content": "hi"}]


def test_rows_by_named_columns(tmp_path):
    rows = [{"id": "q1", "in": {"text": "x"}, "out": f"y{k}", "lp": [-0.5 - k], "answer": "no gold"} for k in range(2)]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    columns = {"prompt": "in.text", "response": "out", "raw_logprobs": "lp", "prompt_id": "id", "id": "", "gold": ""}
    got, _ = read(path, columns=columns)
    assert [(t.id, t.prompt, t.response, t.raw_logprobs, t.gold) for t in got] == [("q1/0", "x", "y0", [-0.5], None), ("q1/1", "x", "y1", [-1.5], None)]
    with pytest.raises(InputError, match=r"rows.jsonl:2 .*came before; where it names the problem: --column prompt_id=id --column id="):
        list(read_any(path, columns={"response": "out"}))
    with pytest.raises(InputError, match=r"no response in the columns id, in, out, lp, answer; name it"):
        list(read_any(path))
    with pytest.raises(InputError, match="columns: respone is no field"):
        list(read_any(path, columns={"respone": "out"}))


def test_bad_rows_are_named_and_counted(tmp_path):
    rows = [
        {"prompt": "a", "response": "x"}, "{broken", [1], {"prompt": "a", "response": 5}, {"prompt": "a", "response": "x", "score": 7},
        {"prompt": "a", "response": "x", "probs": [0.5, 0.0]}, {"prompt": "a", "response": "x", "raw_logprobs": [0.9]}, {"prompt": "b", "response": "y"},
    ]  # fmt: skip
    got, report = read(jsonl(tmp_path / "rows.jsonl", rows), on_bad="drop")
    assert [t.response for t in got] == ["x", "y"] and report.rows == 8 and report.traces == 2
    assert [b.line for b in report.bad] == [2, 3, 4, 5, 6, 7]
    for b, want in zip(report.bad, ["not JSON", "a list where", "response is int", "score is 7", "probs must be", "raw_logprobs holds 0.9"], strict=True):
        assert want in b.reason
    assert "6 of 8 rows are no traces" in report.text() and f"{tmp_path}/rows.jsonl:2" in report.text()
    assert json.dumps(report.to_json())


def test_a_json_array_and_an_empty_file(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "a", "response": "x"}], indent=1))
    assert [t.response for t in read_any(tmp_path / "rows.json")] == ["x"]
    (tmp_path / "none.jsonl").write_text("")
    assert list(read_any(tmp_path / "none.jsonl")) == []
    with pytest.raises(InputError, match="no such file"):
        list(read_any(tmp_path / "other.jsonl"))
    with pytest.raises(InputError, match=f"expected one of {', '.join(FORMATS)}"):
        list(read_any(tmp_path / "none.jsonl", format="csv"))


def test_reading_streams(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "x"}, "{broken"])
    assert next(read_any(path)).response == "x"


# ---------------------------------------------------------------- the command


def llmrl(*args: object) -> subprocess.CompletedProcess[str]:
    repo = Path(__file__).parents[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(repo)}
    return subprocess.run([sys.executable, "-m", "llmrl.cli", *map(str, args)], capture_output=True, text=True, cwd=repo, env=env, timeout=120, check=False)


def test_the_command_writes_one_file_and_says_what_is_missing(tmp_path):
    path = jsonl(tmp_path / "samples_gsm8k_2026-01-02T03-04-05.6.jsonl", [lm_eval_row(k, "strict-match") for k in range(3)])
    own = jsonl(tmp_path / "mine.jsonl", [{"q": "2+2?", "output": "4", "probs": [0.5], "answer": "4"}, {"q": "x"}])
    out = tmp_path / "t.jsonl.gz"
    done = llmrl("import-traces", path, own, "--out", out, "--column", "prompt=q", "--model", "m", "--answer-after", "####", "--on-bad", "drop")
    assert done.returncode == 0, done.stderr
    assert "3 traces of 3 rows, format lm-eval" in done.stdout and "keeps no token's log-prob" in done.stdout and "4 traces -> " in done.stdout
    assert "1 of 2 rows are no traces" in done.stdout and "mine.jsonl:2" in done.stdout
    got = list(read_traces(out))
    assert len(got) == 4 and {t.model for t in got} == {"m"} and got[0].gold == "0" and got[3].raw_logprobs == [math.log(0.5)]
    for args, match in [
        ((own, "--out", out), "mine.jsonl:2: no response in the columns q"), ((path, path, "--out", out), "came before, in another of the files"),
        ((path, "--out", path), "is one of the files that are read"), ((path, "--out", out, "--steps", "x"), "expected two numbers"),
        ((path, "--out", out, "--column", "prompt"), "expected FIELD=COLUMN"), ((path, "--out", out, "--logprobs", "yes"), "expected auto, raw, sampled"),
    ]:  # fmt: skip
        done = llmrl("import-traces", *args)
        assert done.returncode == 2 and match in " ".join(done.stderr.split()), done.stderr
    assert len(list(read_traces(out))) == 4  # what is refused replaces nothing

# ruff: noqa: F811 - fixtures are imported
"""`llmrl sample --engine vllm`: stock servers without dev mode share the work, and the traces are those of the model that they serve."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrl.chat import char_tokenizer
from llmrl.models import Policy, load_policy
from llmrl.recipe import Model
from llmrl.records import InputError, Request, Sampling
from llmrl.sampling import sample_file
from llmrl.vllm_sampling import tongue
from tests.test_engine_contract import learner_logp
from tests.test_engine_faults import assert_right, completions, folder, until  # noqa: F401
from tests.vllm_server import Scripted

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def stock(folder: Path) -> Iterator[list[Scripted]]:
    servers = [Scripted(folder, dev=False).start().wait() for _ in range(2)]
    yield servers
    for s in servers:
        s.kill()


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return load_policy(Model(path=str(folder)))


def rows(path: Path, n: int) -> Path:
    path.write_text("".join(json.dumps({"id": f"q{i}", "prompt": f"{i}+{i + 3}=", "answer": "1"}) + "\n" for i in range(n)))
    return path


def sampled(folder: Path, data: Path, out: Path, servers: list[Scripted], **how: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "n": 4, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "stop": (), "limit": None, "template": None, "system": None, "answer_after": None,
        "args": {}, "split": None, "verifier": None, "verifier_args": {}, "dtype": "float32", "seed": 3, "resume": True, "quiet": True,
    }  # fmt: skip
    return sample_file(str(folder), str(data), out, servers=tuple(s.url for s in servers), **given | how)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_the_engine_needs_of_a_model_comes_without_its_weights(folder: Path, policy: Policy, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    bare = tongue(str(tmp_path / "bare"))
    assert (bare.stop_ids, bare.banned_ids, bare.model.config.vocab_size) == (policy.stop_ids, policy.banned_ids, policy.model.config.vocab_size)


def test_several_servers_share_the_work_and_a_file_is_continued(stock: list[Scripted], folder: Path, policy: Policy, tmp_path: Path) -> None:
    data, before = rows(tmp_path / "rows.jsonl", 20), [completions(s) for s in stock]
    result = sampled(folder, data, tmp_path / "all.jsonl", stock)
    assert (result["new"], result["traces"]) == (80, 80)
    assert all(completions(s) - b > 20 for s, b in zip(stock, before, strict=True))
    traces = read(tmp_path / "all.jsonl")
    asked = [Request(tuple(policy.chat.prompt_ids(t["messages"])), (3, t["prompt_id"], t["sample"]), Sampling(8)) for t in traces]
    done: list[Any] = [type("C", (), {"token_ids": t["token_ids"], "logprobs": t["logprobs"], "finish": t["finish"], "text": t["response"]}) for t in traces]
    assert_right(policy, asked, done)
    for t, want in zip(traces, learner_logp(policy, asked, done, 1.0), strict=True):
        assert t["logprobs"] == pytest.approx(want, abs=1e-5)
    lines = (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:33]))
    assert sampled(folder, data, tmp_path / "cut.jsonl", stock[:1])["new"] == 47
    again = read(tmp_path / "cut.jsonl")
    assert [(t["id"], t["token_ids"]) for t in again] == [(t["id"], t["token_ids"]) for t in traces]


def test_a_server_that_dies_hands_its_work_over(stock: list[Scripted], folder: Path, policy: Policy, tmp_path: Path) -> None:
    stock[0].control(mode="die", after=7)
    try:
        assert sampled(folder, rows(tmp_path / "rows.jsonl", 10), tmp_path / "t.jsonl", stock)["new"] == 40
    finally:
        stock[0].process.join(5)
        stock[0].start().wait()
    assert len({t["id"] for t in read(tmp_path / "t.jsonl")}) == 40


def test_servers_that_would_make_the_traces_wrong_are_refused(stock: list[Scripted], folder: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "rows.jsonl", 2)
    shutil.copytree(folder, tmp_path / "other")
    char_tokenizer("9876543210-+= #*;abcde").save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"serves .*sharp.*gives other token ids than .*other"):
        sampled(tmp_path / "other", data, tmp_path / "t.jsonl", stock)
    stock[1].control(raw=True)
    try:
        with pytest.raises(InputError, match="start it with --logprobs-mode processed_logprobs"):
            sampled(folder, data, tmp_path / "t.jsonl", stock)
    finally:
        stock[1].control(raw=False)


def test_the_command_says_what_a_server_serves(stock: list[Scripted], folder: Path, tmp_path: Path) -> None:
    data, copy = rows(tmp_path / "rows.jsonl", 2), tmp_path / "copy"
    shutil.copytree(folder, copy)

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmrl.cli", "sample", str(copy), "--data", str(data), "--max-new-tokens", "4", *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = run("--engine", "vllm", "--server", stock[0].url, "--server", stock[1].url, "--out", str(tmp_path / "t.jsonl"))
    assert done.returncode == 0 and "2 new traces" in done.stdout, done.stderr
    assert f"note: {stock[1].url} serves {folder}, which is sampled from" in done.stderr
    assert len(read(tmp_path / "t.jsonl")) == 2
    for wrong in (("--engine", "vllm"), ("--engine", "hf", "--server", stock[0].url), ("--engine", "mine")):
        done = run(*wrong, "--out", str(tmp_path / "u.jsonl"))
        assert done.returncode == 2 and "expected hf, or vllm with --server" in done.stderr

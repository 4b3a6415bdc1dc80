"""`llmrl sample --transport vgf`: the two files, what a moved trace carries, best-of-N at L = 0, resuming, refusals. Tiny random models, one thread."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llmrl.cli import app
from llmrl.evaluation.traces import read_traces
from llmrl.lm_transport import RewardModel
from llmrl.models import load_policy
from llmrl.recipe import Model, Tiny
from llmrl.records import InputError
from llmrl.reward_head import reward_policy, save_reward_model
from llmrl.transport_sampling import Transport, move_traces, reward_folder, sampled_path

TINY = Tiny(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, alphabet="abcdefgh>", max_length=64)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, two reward models of its tokenizer, and six prompts."""
    base = tmp_path_factory.mktemp("models")
    policy = load_policy(Model(path="tiny", tiny=TINY), seed=1)
    policy.model.config._attn_implementation = "sdpa"
    policy.model.save_pretrained(base / "policy")
    policy.chat.tokenizer.save_pretrained(base / "policy")
    for k in (1, 2):
        save_reward_model(reward_policy(Model(path="tiny", tiny=TINY), seed=10 * k), base / f"run{k}" / "reward_model")
    (base / "prompts.jsonl").write_text("".join(json.dumps({"id": f"q{i}", "prompt": f"{c}>", "answer": "a"}) + "\n" for i, c in enumerate("abcdef")))
    return base


def sample(place: Path, out: Path, *more: str) -> Any:
    args = ["sample", str(place / "policy"), "--data", str(place / "prompts.jsonl"), "--out", str(out), "-n", "3", "--max-new-tokens", "8", "--json"]
    return CliRunner().invoke(app, [*args, *more])


VGF = ("--transport", "vgf", "--reward-model")


def test_the_command_writes_what_was_sampled_and_what_became_of_it(place, tmp_path):
    out = tmp_path / "moved.jsonl.gz"
    how = (*VGF, str(place / "run1"), "-L", "3", "--eps", "2", "--guard", "-1", "--second-reward", str(place / "run2"), "--verifier", "exact")
    done = sample(place, out, *how)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    before, after = list(read_traces(sampled_path(out))), list(read_traces(out))
    assert told["traces"] == told["new"] == len(before) == len(after) == 18 and [t.id for t in before] == [t.id for t in after]
    reward, second, policy = RewardModel.load(place / "run1" / "reward_model"), RewardModel.load(place / "run2" / "reward_model"), load_policy(
        Model(path=str(place / "policy")))  # fmt: skip
    contexts = [policy.chat.prompt_ids(t.messages) for t in after]
    rewards, others = reward.score([(c, t.token_ids) for c, t in zip(contexts, after, strict=True)]), second.score(
        [(c, t.token_ids) for c, t in zip(contexts, after, strict=True)])  # fmt: skip
    moved = 0
    for s, t, r, o in zip(before, after, rewards, others, strict=True):
        x = t.extra["transport"]
        assert x["sampled"] == s.response and x["sampled_token_ids"] == s.token_ids and x["sampled_score"] == s.score and t.score is not None
        assert len(t.token_ids) == len(s.token_ids) and t.response == policy.chat.text(t.token_ids) == "".join(t.tokens) and t.logprobs is None
        assert x["reward_after"] == pytest.approx(r, abs=1e-5) and x["second_after"] == pytest.approx(o, abs=1e-5)
        assert x["changed_share"] == pytest.approx(sum(a != b for a, b in zip(s.token_ids, t.token_ids, strict=True)) / len(s.token_ids))
        assert s.extra.get("transport") is None and t.extra["sampling"] == s.extra["sampling"]
        moved += x["changed_share"] > 0
    assert moved > 5
    for q in {t.prompt_id for t in after}:
        own = [t for t in after if t.prompt_id == q]
        (winner,) = (t for t in own if t.extra["transport"]["best"])
        assert winner.extra["transport"]["reward_after"] == max(t.extra["transport"]["reward_after"] for t in own)
    assert told["means"]["reward_after"] == pytest.approx(sum(rewards) / 18, abs=1e-5)
    assert told["means"]["reward_flowed"] > told["means"]["reward_before"]


def test_a_moved_trace_has_the_log_probs_of_its_own_text(place, tmp_path):
    from llmrl.hf_engine import HFEngine

    out = tmp_path / "m.jsonl.gz"
    assert sample(place, out, *VGF, str(place / "run1"), "-L", "2", "--eps", "3", "--guard", "-1").exit_code == 0
    policy = load_policy(Model(path=str(place / "policy")))
    for t in read_traces(out):
        (want,) = HFEngine(policy).score([(policy.chat.prompt_ids(t.messages), t.token_ids)])
        assert t.raw_logprobs == pytest.approx(want, abs=1e-5) and t.status is None


def test_no_steps_is_best_of_n_and_the_guard_puts_back(place, tmp_path):
    out = tmp_path / "m.jsonl.gz"
    assert sample(place, out, *VGF, str(place / "run1"), "-L", "0").exit_code == 0
    before, after = list(read_traces(sampled_path(out))), list(read_traces(out))
    assert [t.token_ids for t in before] == [t.token_ids for t in after] and [t.response for t in before] == [t.response for t in after]
    policy, reward = load_policy(Model(path=str(place / "policy"))), RewardModel.load(place / "run1" / "reward_model")
    scores = reward.score([(policy.chat.prompt_ids(t.messages), t.token_ids) for t in before])
    for at in range(0, 18, 3):
        assert [t.extra["transport"]["best"] for t in after[at : at + 3]] == [x == max(scores[at : at + 3]) for x in scores[at : at + 3]]
    kept = list(move_traces(policy, reward, before, Transport(steps=3, eps=2.0, guard=1e-9), raw=False))
    back = [t for t in kept if not t.extra["transport"]["kept"]]
    assert back and all(t.response == t.extra["transport"]["sampled"] and t.raw_logprobs is None for t in back)


def test_an_interrupted_file_is_continued_to_the_same_bytes(place, tmp_path):
    out, how = tmp_path / "m.jsonl.gz", (*VGF, str(place / "run1"), "-L", "2", "--eps", "2")
    assert sample(place, out, *how).exit_code == 0
    whole = out.read_bytes()
    lines = gzip.decompress(whole).splitlines(keepends=True)
    out.with_name(out.name + ".part").write_bytes(b"".join(lines[:7]))  # in the middle of the third prompt
    out.unlink()
    again = sample(place, out, *how)
    assert json.loads(again.stdout.splitlines()[-1])["new"] == 11 and out.read_bytes() == whole
    other = sample(place, out, *VGF, str(place / "run1"), "-L", "3", "--eps", "2")
    assert isinstance(other.exception, InputError) and "was begun with the transport" in str(other.exception) and out.read_bytes() == whole


@pytest.mark.parametrize(
    "options, told",
    [
        (("--transport", "vgf"), "expected --transport vgf with --reward-model FOLDER"), (("--reward-model", "x"), "--transport None"),
        (("--transport", "svgd", "--reward-model", "x"), "--transport svgd"), ((*VGF, "nowhere"), "nowhere: no sequence-classification folder"),
        ((*VGF, "nowhere", "--velocity", "fast"), "--velocity fast: expected independent, svgd or pooled"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused_before_anything_is_sampled(place, tmp_path, options, told):
    done = sample(place, tmp_path / "m.jsonl.gz", *options)
    assert isinstance(done.exception, InputError) and told in str(done.exception) and not list(tmp_path.iterdir())


def test_a_run_directory_stands_for_its_reward_model(place):
    assert reward_folder(str(place / "run1")) == reward_folder(str(place / "run1" / "reward_model")) == str(place / "run1" / "reward_model")

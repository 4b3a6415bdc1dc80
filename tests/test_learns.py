"""A tiny model learns: the shipped quickstart recipe made small, from a random model to sums done step by step in under a minute."""

import json
import math
from pathlib import Path

import pytest
import torch

from llmrl.config import load_recipe
from llmrl.console import Console
from llmrl.metrics import MetricLog
from llmrl.samples import read_rows
from llmrl.train import train

torch.set_num_threads(1)
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
STEPS = 20
SMALL = [
    "seed=0", f"steps={STEPS}", "model.tiny.layers=2", 'data.args.ops="+"', "data.args.rows=12000", "data.args.careful=0.4", "data.holdout=100",
    "warm_start.steps=400", "warm_start.examples=96", "optim.lr=5e-4", "eval.rows=100", "eval.every=10", "checkpoint.every=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, summary) of the run."""
    folder = tmp_path_factory.mktemp("learns") / "run"
    torch.set_num_threads(1)
    summary = train(load_recipe(RECIPE, [*SMALL, f"run.dir={folder}"]), console=Console(quiet=True))
    return folder, summary


def test_the_reward_rises(run):
    folder, summary = run
    assert summary["accuracy_after"] - summary["accuracy_before"] > 0.25 and summary["accuracy_after"] > 0.8
    rewards = [row["reward/mean"] for row in MetricLog.read(folder) if row["step"]]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_the_summary_says_what_happened(run):
    folder, summary = run
    on_disk = json.loads((folder / "summary.json").read_text())
    assert on_disk == summary and on_disk["steps"] == STEPS and 0 < on_disk["seconds"] < 600
    rows = MetricLog.read(folder)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert on_disk["tokens"] == sum(row["tokens/generated"] for row in rows[1:])
    assert on_disk["accuracy_before"] == rows[0]["eval/accuracy"] and on_disk["accuracy_after"] == rows[-1]["eval/accuracy"]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 10, 20]
    for row in rows[1:]:
        assert row["samples"] == 32 * 8 and row["samples/unjudged"] == 0 and row["policy_version"] == 400 + row["step"]
        assert row["logp_gap/max_nats"] < 1e-3 and row["kl/old_nats"] < 1e-9 and row["clip/share"] == 0.0  # one update a step: on-policy
        assert all(math.isfinite(v) for v in row.values() if v is not None)


def test_samples_can_be_read(run):
    folder, _ = run
    row = MetricLog.read(folder)[7]
    samples = read_rows(folder / "samples" / "step-000007.jsonl.gz")
    assert len(samples) == 256 and len({s["id"] for s in samples}) == 256 and {s["step"] for s in samples} == {7}
    assert row["reward/mean"] == pytest.approx(sum(s["reward"] for s in samples) / 256)
    assert row["length/mean_tokens"] == pytest.approx(sum(len(s["token_ids"]) for s in samples) / 256)
    for s in samples:
        shown, value = s["prompt"].removesuffix("="), s["response"].rpartition("#")[2]
        assert s["gold"] == str(sum(map(int, shown.split("+")))) and s["reward"] == float(value == s["gold"])
        assert len(s["logprobs"]) == len(s["token_ids"]) <= 24 and s["finish"] == ("stop" if s["token_ids"][-1] == 2 else "length")
    by_prompt = {}
    for s in samples:
        by_prompt.setdefault(s["cohort"], []).append(s)
    for group in by_prompt.values():  # advantages: (reward - mean) / std of the group
        r = torch.tensor([s["reward"] for s in group], dtype=torch.float64)
        want = (r - r.mean()) / (r.std() + 1e-6)
        assert [s["advantage"] for s in group] == pytest.approx(want.tolist(), abs=1e-9)


def test_evaluation_is_on_problems_never_trained_on(run):
    folder, summary = run
    held = read_rows(folder / "samples" / "eval-000020.jsonl.gz")
    assert len({h["prompt"] for h in held}) == len(held) == 100
    trained = {s["prompt"] for f in (folder / "samples").glob("step-*") for s in read_rows(f)}
    assert not trained & {h["prompt"] for h in held}
    assert summary["accuracy_after"] == pytest.approx(sum(h["score"] for h in held) / 100)


def test_there_is_a_curve(run):
    data = (run[0] / "curve.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000


def test_the_model_loads_with_plain_transformers_and_says_the_same(run):
    """AutoModelForCausalLM and AutoTokenizer alone, greedy, on held-out problems: the answers of samples/eval-*."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, summary = run
    model, tokenizer = AutoModelForCausalLM.from_pretrained(summary["model"]), AutoTokenizer.from_pretrained(summary["model"])
    assert Path(summary["model"]).is_relative_to(folder) and model.config._attn_implementation == "sdpa"
    for held in read_rows(folder / "samples" / "eval-000020.jsonl.gz")[:3]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": held["prompt"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True) == held["response"] and len(out) == held["tokens"]


def test_checkpoints_are_whole(run):
    folder, _ = run
    assert {p.name for p in (folder / "checkpoints").iterdir()} >= {"step-000010", "step-000020"}
    assert not list(folder.rglob(".*part*"))

"""ExPO inside a run: a run that dies between two checkpoints and is resumed equals the unbroken one, with explanations kept in the memory and with a
reference model that is renewed; an offline DPO run on pairs of `llmrl explain`."""

import json
from pathlib import Path

import pytest
import torch

from llmrl import train as train_file
from llmrl.config import load_recipe
from llmrl.console import Console
from llmrl.explain import explain, text
from llmrl.records import InputError
from llmrl.samples import read_rows
from tests.test_resume import contents

torch.set_num_threads(1)
RECIPE = """
seed = 3
steps = 6
[model]
path = "tiny"
[model.tiny]
hidden = 32
layers = 1
heads = 2
ffn = 48
alphabet = "0123456789+-*=;#() !@~"
[data]
path = "llmrl.level_tasks:levels"
holdout = 4
[data.args]
rows = 12
terms = [3]
[rollout]
prompts = 4
group = 2
max_new_tokens = 64
[rule]
use = "expo"
template = "tiny"
marks = ["#"]
cut = "mark"
answer_format = "#{answer}"
min_tokens = 1
refresh = "once"
[verifier]
use = "./coin.py:coin"
[scoring]
workers = 1
[optim]
lr = 1e-3
[eval]
every = 0
rows = 4
[checkpoint]
every = 3
keep = 1
best = 0
"""
COIN = '''
from llmrl.records import Verdict


def coin():
    """Right for half of the texts, so that an untrained model has explanations and wrong samples."""
    return lambda prompt, response: Verdict(float(sum(map(ord, response)) % 2))
'''
ONLINE = ["rule=", "rule.use=exp_dpo", "rule.template=tiny", 'rule.marks=["#"]', "rule.cut=mark", 'rule.answer_format="#{answer}"', "rule.min_tokens=1"]
ONLINE += ["rollout.group=4"]


class Crash(Exception):
    pass


def run(tmp_path, overrides, *, resume=False):
    (tmp_path / "coin.py").write_text(COIN)
    (tmp_path / "r.toml").write_text(RECIPE)
    return train_file.train(load_recipe(tmp_path / "r.toml", [f"run.dir={tmp_path / 'run'}", *overrides]), resume=resume, console=Console(quiet=True))


@pytest.mark.parametrize("overrides", [[], [*ONLINE, "rule.round_steps=2"]], ids=["memory", "reference renewed"])
def test_a_resumed_run_is_the_same_run(tmp_path, monkeypatch, overrides):
    """It dies in step 6, three steps behind its checkpoint; the reference of round 3 has been written by then, that of step 4 is needed again."""
    run(tmp_path, overrides)
    whole = contents(tmp_path / "run")
    references = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("reference*")}
    (tmp_path / "run").rename(tmp_path / "whole")
    step = train_file.run_step

    def dies(session, k, **keys):
        if k == 6:
            raise Crash
        return step(session, k, **keys)

    monkeypatch.setattr(train_file, "run_step", dies)
    with pytest.raises(Crash):
        run(tmp_path, overrides)
    if overrides:
        there = sorted(p.name for p in (tmp_path / "run").glob("reference*"))
        assert there == ["reference-000002.safetensors", "reference-000004.safetensors", "reference.safetensors"]
    monkeypatch.setattr(train_file, "run_step", step)
    run(tmp_path, overrides, resume=True)
    broken = contents(tmp_path / "run")
    assert sorted(whole) == sorted(broken) and [k for k in whole if whole[k] != broken[k]] == []
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("reference*")} == references
    rows = [row for k in range(1, 7) for row in read_rows(tmp_path / "run" / "samples" / f"step-{k:06d}.jsonl.gz")]
    if not overrides:  # eight prompts, six steps of four: each is seen three times, and explained once
        kept = {}
        for row in rows:
            if row["role"] == "explanation":
                kept.setdefault(row["prompt_id"], set()).add((row["policy_version"], tuple(row["token_ids"])))
        assert len(kept) >= 6 and all(len(texts) == 1 for texts in kept.values())
    else:
        assert references.keys() == {"reference.safetensors", "reference-000004.safetensors"}
        assert references["reference.safetensors"] != references["reference-000004.safetensors"]
        assert all(any(r["step"] == k and r["role"] == "chosen" for r in rows) for k in range(1, 7))
        metrics = {row["step"]: row for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())}
        losses = {k: metrics[k]["loss/dpo"] for k in range(1, 7)}
        for k in (1, 3, 5):  # a round's first step: the policy is its reference
            assert losses[k] == pytest.approx(0.6931472, abs=2e-6)
        assert all(abs(losses[k] - 0.6931472) > 1e-5 for k in (2, 4, 6))


def test_lora_has_no_reference_that_moves(tmp_path):
    with pytest.raises(InputError, match="policy at the start of each round"):
        run(tmp_path, [*ONLINE, "model.lora.rank=2"])


def test_explain_reports_and_writes_pairs_for_offline_dpo(tmp_path):
    (tmp_path / "coin.py").write_text(COIN)
    (tmp_path / "r.toml").write_text(RECIPE)
    pairs = tmp_path / "pairs.jsonl"
    result = explain(load_recipe(tmp_path / "r.toml", ONLINE), questions=6, pairs=pairs)
    assert result["questions"] == 6 and result["pairs"]["questions"] == 8 and result["pairs"]["written"] >= 3
    assert "lift of log p(answer)" in text(result) and "pairs of 8 questions" in text(result)
    summary = run(tmp_path, [*ONLINE, "rule.mode=offline", f"rule.pairs={pairs}", "steps=2"])
    assert summary["tokens"] == 0  # nothing is sampled
    rows = read_rows(tmp_path / "run" / "samples" / "step-000001.jsonl.gz")
    stored = {row["id"]: row for row in map(json.loads, pairs.read_text().splitlines())}
    assert {r["role"] for r in rows} >= {"chosen", "rejected"}
    assert all(r["token_ids"] == stored[r["prompt_id"]][r["role"]] for r in rows if r["role"] != "none")
    with pytest.raises(InputError, match="llmrl sft"):
        explain(load_recipe(tmp_path / "r.toml", ["warm_start.steps=1"]), questions=2)
    with pytest.raises(InputError, match="makes no explanations"):
        explain(load_recipe(tmp_path / "r.toml", ["rule.beta=0"]), questions=2)


def test_the_full_scale_recipe_takes_two_steps_with_a_tiny_model(tmp_path):
    """The recipe's own rule, template, verifier and schedule; model, data and sizes are replaced."""
    letters = "0123456789+-*=;#() abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?.,:{}\\\\\\n"
    rows = [{"prompt": f"What is {i}+2?", "answer": str(i + 2), "solution": f"It is {i + 2}."} for i in range(20)]
    (data := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["hidden=32", "layers=1", "heads=2", "ffn=48", "max_length=1024", f'alphabet="{letters}"']
    overrides = ["steps=2", "model.path=tiny", *(f"model.tiny.{k}" for k in small), "model.dtype=float32", f"data.path={data}", "data.split="]
    overrides += ["eval.data=", "data.holdout=4", "rollout.prompts=4", "rollout.group=2", "rollout.max_new_tokens=8", "batch.tokens=800", "scoring.workers=1"]
    overrides += ["optim.warmup_steps=0", "eval.rows=4", f"run.dir={tmp_path / 'run'}", "rule.source=solution"]
    path = Path(__file__).parents[2] / "recipes" / "replication" / "expo" / "math.toml"
    summary = train_file.train(load_recipe(path, overrides), console=Console(quiet=True))
    assert summary["steps"] == 2
    texts = [r["response"] for r in read_rows(tmp_path / "run" / "samples" / "step-000002.jsonl.gz") if r["role"] == "explanation"]
    assert len(texts) == 4 and all("boxed{" in t for t in texts)

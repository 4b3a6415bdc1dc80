"""The rule vgf inside a run: a run that dies and is resumed equals the unbroken one, value head and all; bf16; what the metrics tell."""

import json
import math

import pytest
import torch

from llmrl import train as train_file
from llmrl.config import load_recipe
from llmrl.console import Console
from llmrl.models import load_tokenizer
from llmrl.recipe import Model
from tests.test_lm_transport import tiny_reward
from tests.test_resume import contents

torch.set_num_threads(1)
RECIPE = """
seed = 3
steps = 5
[model]
path = "tiny"
[model.tiny]
hidden = 32
layers = 1
heads = 2
ffn = 48
[data]
path = "chains"
holdout = 4
[data.args]
rows = 20
terms = 2
[rollout]
prompts = 4
group = 4
max_new_tokens = 8
[rule]
use = "vgf"
reward_model = "./rm"
steps = 6
eps = 1.0
guard = 1.0
candidates = 12
select = "verifier"
value = "head"
value_window = 12
[verifier]
use = "./digits.py:digits"
[scoring]
workers = 1
[optim]
lr = 1e-3
[eval]
every = 0
rows = 4
[checkpoint]
every = 2
keep = 1
best = 0
"""
DIGITS = '''
from llmrl.records import Verdict


def digits():
    """The share of digits."""
    return lambda prompt, response: Verdict(sum(c.isdigit() for c in response) / max(1, len(response)))
'''


class Crash(Exception):
    pass


@pytest.fixture
def run(tmp_path):
    reward = tiny_reward(load_tokenizer(Model(path="tiny")).tokenizer)
    for part in (reward.model, reward.tokenizer):
        part.save_pretrained(tmp_path / "rm")
    (tmp_path / "digits.py").write_text(DIGITS)
    (tmp_path / "r.toml").write_text(RECIPE)

    def run(*overrides, resume=False):
        train_file.train(load_recipe(tmp_path / "r.toml", [f"run.dir={tmp_path / 'run'}", *overrides]), resume=resume, console=Console(quiet=True))
        return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    return run


def test_a_resumed_run_is_the_same_run(tmp_path, monkeypatch, run):
    """It dies in step 4, one step behind its checkpoint, whose memory holds what the head of step 3 was fitted to."""
    rows = run()
    whole = contents(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "whole")
    step = train_file.run_step

    def dies(session, k, **keys):
        if k == 4:
            raise Crash
        return step(session, k, **keys)

    monkeypatch.setattr(train_file, "run_step", dies)
    with pytest.raises(Crash):
        run()
    monkeypatch.setattr(train_file, "run_step", step)
    run(resume=True)
    broken = contents(tmp_path / "run")
    assert sorted(whole) == sorted(broken) and [k for k in whole if whole[k] != broken[k]] == []
    for row in rows[1:]:  # the budget that was used, and how far the policy is from where it began
        assert 0 < row["rule/changed_share"] < 1 and row["rule/mmd"] > 0 and row["rule/displacement"] > 0
        assert row["kl/ref_nats"] >= 0 and row["rule/winner_share"] == 1.0 and row["time/transport_s"] > 0
    assert rows[-1]["kl/ref_nats"] > 1e-6
    assert rows[1]["rule/value/ranked"] == rows[1]["rule/reward/ranked"] and any(r["rule/value/ranked"] != r["rule/reward/ranked"] for r in rows[2:])


@pytest.mark.parametrize("form", ["winners", "members"])
def test_bf16(run, form):
    keys = [] if form == "winners" else ["rule.form=members", "rule.select="]
    rows = run("model.dtype=bfloat16", "rule.dtype=bfloat16", "steps=2", *keys)
    assert all(math.isfinite(v) for row in rows for v in row.values() if v is not None)
    assert all(row["rule/changed_share"] > 0 and row["rule/reward/flowed"] != row["rule/reward/before"] for row in rows[1:])

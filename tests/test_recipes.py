"""Every shipped recipe loads, names what exists, and runs two steps on the tiny model with the data it has here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llmrl.config import check_plugins, load_recipe
from llmrl.console import Console
from llmrl.train import train

REPO = Path(__file__).parents[1]
RECIPES = sorted((REPO / "recipes").glob("*.toml"))
LETTERS = "0123456789+-*=;#() abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?.,:{}\\\\\\n"


def test_the_recipes_of_the_readme_are_the_recipes():
    table = set(re.findall(r"\[`(\w+\.toml)`\]", (REPO / "README.md").read_text()))
    assert table == {p.name for p in RECIPES} and len(table) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_it_loads_and_its_plug_ins_take_its_keys(path):
    loaded = load_recipe(path)
    check_plugins(loaded)
    assert "default" in loaded.origins.values() and loaded.recipe.run.dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_two_steps_with_a_tiny_model(path, tmp_path):
    """The recipe's own rule, verifier, template and schedule; model, data and sizes are replaced."""
    rows = [{"id": f"q{i}", "prompt": f"What is {i}+2?", "answer": str(i + 2), "solution": f"#{i + 2}"} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = load_recipe(path).recipe
    text = path.read_text()
    small = ["hidden=32", "layers=1", "heads=2", "ffn=48", "max_length=512", f'alphabet="{LETTERS}"']
    overrides = ["steps=2", "model.path=tiny", *(f"model.tiny.{k}" for k in small), f"data.path={data}", "data.limit=40"]
    overrides += ["rollout.prompts=4", "rollout.group=2", "rollout.max_new_tokens=8", "batch.tokens=400", "optim.warmup_steps=0"]
    overrides += ["eval.rows=4", "eval.every=1", "checkpoint.every=1", f"run.dir={tmp_path / 'run'}", "scoring.workers=1", "model.dtype=float32"]
    overrides += [f"{key}=" for key in ("data.args", "data.split", "data.answer_after") if key.split(".")[1] in text.split("[rollout]")[0].split("[data]")[1]]
    if recipe.eval.data is not None:
        overrides += ["eval.data=", "data.holdout=4"]
    else:
        overrides += ["data.holdout=4"]
    if recipe.rule.kwargs.get("overlong_cache"):
        overrides += ["rule.overlong_cache=4"]
    if recipe.warm_start is not None:
        overrides += ["warm_start.steps=2", "warm_start.examples=4", "warm_start.optim.warmup_steps=0"]
    summary = train(load_recipe(path, overrides), console=Console(quiet=True))
    assert summary["steps"] == 2 and summary["tokens"] > 0 and summary["accuracy_after"] is not None
    names = sorted(p.name for p in (tmp_path / "run" / "samples").iterdir())
    assert [n for n in names if n.startswith("step")] == ["step-000001.jsonl.gz", "step-000002.jsonl.gz"]

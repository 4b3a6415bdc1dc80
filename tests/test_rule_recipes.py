"""Every recipe of recipes/rules: loads, belongs to the study, runs on the tiny model, and is resumed from a real checkpoint to the same bytes."""

from __future__ import annotations

import hashlib
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from llmrl.check import check_recipe
from llmrl.config import check_plugins, load_recipe
from llmrl.console import Console
from llmrl.manifest import plugin_hashes
from llmrl.train import train
from tests.test_resume import contents

REPO = Path(__file__).parents[1]
FOLDER = REPO / "recipes" / "rules"
RECIPES = sorted(p for p in FOLDER.glob("*.toml") if p.stem not in ("task", "study"))
SMALL = ["model.tiny.hidden=32", "model.tiny.layers=1", "model.tiny.heads=2", "model.tiny.ffn=48", "data.args.rows=16", "data.holdout=4", "eval.rows=4"]
SMALL += ["warm_start.steps=6", "warm_start.examples=16", "warm_start.data.args.rows=200", "warm_start.optim.warmup_steps=0", "optim.warmup_steps=0"]
SMALL += ["rollout.prompts=6", "rollout.group=4", "batch.tokens=900", "scoring.workers=1", "steps=3", "checkpoint.every=1", "checkpoint.keep=3", "eval.every=0"]


def test_the_study_compares_them_all():
    arms = set(tomllib.loads((FOLDER / "study.toml").read_text())["arms"])
    assert arms == {p.stem for p in RECIPES} - {"urpo"}  # whose rows are of three kinds


def test_the_manifest_knows_the_code_inside_a_verifier(tmp_path):
    """The judge of a step stands two verifiers deep; and a key called `use` that names no plug-in is nobody's."""
    found = plugin_hashes(load_recipe(FOLDER / "b_star_process.toml"))
    assert found["verifier:./equation.py:equation"] == hashlib.sha256((FOLDER / "equation.py").read_bytes()).hexdigest()
    assert {"verifier:combine", "verifier:exact", "verifier:process", "rule:b_star"} <= found.keys()
    (tmp_path / "v.py").write_text("def mine(*, how):\n    return lambda prompt, response: None\n")
    own = plugin_hashes(load_recipe(FOLDER / "grpo.toml", [f"verifier={{use='{tmp_path}/v.py:mine', how={{use='gpu'}}}}"]))
    assert [k for k in own if k.startswith("verifier:")] == [f"verifier:{tmp_path}/v.py:mine"]


@pytest.mark.filterwarnings("ignore:canon")
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_it_runs_and_resumes_to_the_same_bytes(path, tmp_path):
    """Three steps at once, and the third again from the checkpoint of the second: prompts come a second time in it, so memories are read."""
    torch.set_num_threads(1)
    check_plugins(load_recipe(path))
    findings = list(check_recipe(load_recipe(path, [*SMALL, f"run.dir={tmp_path / 'never'}"])))
    assert [f for f in findings if not f.ok] == [] and len(findings) >= 8
    run, again = tmp_path / "run", tmp_path / "again"
    summary = train(load_recipe(path, [*SMALL, f"run.dir={run}"]), console=Console(quiet=True))
    assert summary["steps"] == 3 and summary["tokens"] > 0
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-000003")
    (again / "summary.json").unlink()
    train(load_recipe(path, [*SMALL, f"run.dir={again}"]), resume=True, console=Console(quiet=True))
    whole, resumed = contents(run), contents(again)
    assert whole.keys() == resumed.keys() and len(whole["metrics"]) >= 3
    assert [k for k in whole if whole[k] != resumed[k]] == [], "files that differ after a resume"

"""A resumed run is the same run: kill -9 at random moments, resume, and compare bytes with a run that was never stopped."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmrl.metrics import MetricLog, without_times
from llmrl.records import InputError

RECIPE = """
seed = 3
steps = 14
[model]
path = "tiny"
[model.tiny]
hidden = 32
layers = 2
heads = 2
ffn = 48
alphabet = "0123456789+-*=;#() "
[data]
path = "chains"
holdout = 24
[data.args]
rows = 300                       # several epochs: the cursor crosses them
terms = 2
[warm_start]
steps = 6
examples = 16
[warm_start.optim]
lr = 3e-3
[rollout]
prompts = 8
group = 4
max_new_tokens = 10
[rule]
use = "{rule}"
{keys}
[verifier]
use = "exact"
after = "#"
[optim]
lr = 1e-3
schedule = "cosine"
[batch]
tokens = 160
minibatches = {minibatches}
[eval]
every = 4
rows = 16
[checkpoint]
every = 3
keep = 2
best = 1
"""

CASES = {
    "dapo with refill": ("dapo", "dynamic_rounds = 3\nentropy = 0.01", 1),
    "grpo with reference, two updates a step": ("grpo", "kl = 0.05", 2),
}


def _run(recipe: str, resume: bool) -> None:
    """In a process of its own."""
    import torch

    torch.set_num_threads(1)
    from llmrl.config import load_recipe
    from llmrl.console import Console
    from llmrl.train import train

    os.setpgid(0, 0)  # so that the kill takes nothing else with it
    train(load_recipe(recipe), resume=resume, console=Console(quiet=True))


@pytest.fixture(scope="module")
def context():
    """Processes that start with everything imported: a kill then hits the run, not the imports."""
    made = mp.get_context("forkserver")
    made.set_forkserver_preload(["llmrl.train", "transformers.models.llama.modeling_llama", "datasets"])
    return made


def start(context, recipe: Path, resume: bool):
    process = context.Process(target=_run, args=(str(recipe), resume))
    process.start()
    return process


def finish(context, recipe: Path, resume: bool) -> None:
    process = start(context, recipe, resume)
    process.join(120)
    assert process.exitcode == 0


def contents(folder: Path) -> dict[str, object]:
    """Every file of a run that has to be equal: bytes, and metrics without the wall clock."""
    found: dict[str, object] = {
        str(p.relative_to(folder)): p.read_bytes()
        for kind in ("checkpoints/**/*", "samples/*", "reference.safetensors")
        for p in folder.glob(kind)
        if p.is_file() and not p.name.startswith(".")
    }
    found["metrics"] = [json.dumps(without_times(row), sort_keys=True) for row in MetricLog.read(folder)]
    summary = json.loads((folder / "summary.json").read_text())
    found["summary"] = {k: v for k, v in summary.items() if k not in ("seconds", "run_dir", "model")}
    return found


def written(tmp_path: Path, name: str, case: str) -> Path:
    rule, keys, minibatches = CASES[case]
    recipe = tmp_path / f"{name}.toml"
    recipe.write_text(RECIPE.format(rule=rule, keys=keys, minibatches=minibatches) + f'[run]\ndir = "{tmp_path / name}"\n')
    return recipe


def rows_of(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.mark.parametrize(("case", "kills"), [("dapo with refill", 10), ("grpo with reference, two updates a step", 4)])
def test_ten_kills_change_no_byte(context, tmp_path, case, kills):
    whole, broken = written(tmp_path, "whole", case), written(tmp_path, "broken", case)
    began = time.monotonic()
    finish(context, whole, resume=False)
    seconds = time.monotonic() - began
    rng = random.Random(1)
    folder = tmp_path / "broken"
    hit = []
    for i in range(kills):
        process = start(context, broken, resume=(folder / "manifest.json").is_file())
        # the first kills strike early, before a checkpoint exists; the later ones a few steps on, and somewhere within a step
        goal = 0 if i < 2 else rows_of(folder) + rng.randrange(4)
        while process.exitcode is None and rows_of(folder) < goal:
            process.join(0.01)
        process.join(rng.uniform(0.05, 0.35) * seconds if i < 2 else rng.uniform(0.0, 0.1) * seconds)
        if process.exitcode is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # so early that it has no group of its own yet, and no children either
                process.kill()
            process.join()
            there = sorted(p.name for p in (folder / "checkpoints").glob("step-*")) if folder.exists() else []
            hit.append(there[-1] if there else "start")
        if (folder / "summary.json").exists():  # it got to the end: begin again, the count of kills must be reached
            for p in sorted(folder.rglob("*"), reverse=True):
                p.unlink() if p.is_file() else p.rmdir()
            folder.rmdir()
    finish(context, broken, resume=(folder / "manifest.json").is_file())
    assert len(hit) >= kills // 2 and len(set(hit)) >= 2, f"kills came too early or too late to prove anything: {hit}"
    one, other = contents(tmp_path / "whole"), contents(folder)
    assert sorted(one) == sorted(other)
    assert [name for name in one if one[name] != other[name]] == []
    assert len(one["metrics"]) == 15 and any("step-000014/model/model.safetensors" in name for name in one)


def test_a_resume_under_another_recipe_or_of_nothing_is_refused(context, tmp_path):
    from llmrl.config import load_recipe
    from llmrl.console import Console
    from llmrl.train import train

    recipe = written(tmp_path, "a", "dapo with refill")
    recipe.write_text(recipe.read_text().replace("steps = 14", "steps = 2"))
    with pytest.raises(InputError, match=r"holds no run"):
        train(load_recipe(recipe), resume=True, console=Console(quiet=True))
    finish(context, recipe, resume=False)
    with pytest.raises(InputError, match=r"optim\.lr: was 0\.001, is 0\.5"):
        train(load_recipe(recipe, ["optim.lr=0.5"]), resume=True, console=Console(quiet=True))
    with pytest.raises(InputError, match=r"already holds a run.*--resume.*--overwrite"):
        train(load_recipe(recipe), console=Console(quiet=True))


def test_a_checkpoint_is_a_plain_model_and_holds_no_pickle(context, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = written(tmp_path, "a", "dapo with refill")
    recipe.write_text(recipe.read_text().replace("steps = 14", "steps = 2"))
    finish(context, recipe, resume=False)
    latest = tmp_path / "a" / "checkpoints" / "step-000002"
    assert {p.suffix for p in latest.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".jinja", ".txt"}
    model = AutoModelForCausalLM.from_pretrained(latest / "model")
    tokenizer = AutoTokenizer.from_pretrained(latest / "model")
    saved = load_file(latest / "model" / "model.safetensors")
    assert all((model.state_dict()[k] == v).all() for k, v in saved.items())
    assert tokenizer.apply_chat_template([{"role": "user", "content": "1+2="}], return_dict=False) == [1, 5, 14, 6, 17]


def test_a_budget_of_generated_tokens_ends_a_run_and_counts_what_was_thrown_away(context, tmp_path):
    """dapo refills: the engine makes more than the samples that are kept. The last step is evaluated and saved as any last step is."""
    recipe = written(tmp_path, "a", "dapo with refill")
    recipe.write_text("max_generated_tokens = 900\n" + recipe.read_text())
    finish(context, recipe, resume=False)
    rows = MetricLog.read(tmp_path / "a")
    made, last = [r.get("tokens/generated", 0) or 0 for r in rows], rows[-1]
    assert sum(made[:-1]) < 900 <= sum(made) == last["tokens/total"] and 1 <= last["step"] < 14
    assert last["eval/accuracy"] is not None and (tmp_path / "a" / "checkpoints" / f"step-{last['step']:06d}").is_dir()
    kept = [r["samples"] * r["length/mean_tokens"] for r in rows[1:]]
    assert any(m > k + 1 for m, k in zip(made[1:], kept, strict=True)) and all(m >= k - 1e-6 for m, k in zip(made[1:], kept, strict=True))
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    finish(context, recipe, resume=True)  # there is nothing left to do
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before

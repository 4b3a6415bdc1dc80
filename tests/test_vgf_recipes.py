"""The full-scale VGF recipes with tiny models and rows of the forms that TL;DR and Anthropic HH have: pairs, reward model, check, and two steps."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llmrl.cli import app
from llmrl.config import load_recipe
from llmrl.console import Console
from llmrl.train import train

torch.set_num_threads(1)
HERE = Path(__file__).parents[1] / "recipes" / "replication" / "vgf"
LETTERS = "0123456789 abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?.,:;/!\\\\\\n"
TINY = ["model.path=tiny", *(f"model.tiny.{k}" for k in ("hidden=32", "layers=1", "heads=2", "ffn=48", "max_length=1024", f'alphabet="{LETTERS}"'))]
POST = "SUBREDDIT: r/cats\n\nTITLE: My cat {}\n\nPOST: It sat on {} mats, all day long.\n\nTL;DR:"


def write(file, rows):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def pairs_of(form, n=24):
    """Rows as trl-lib/tldr-preference has them, and as Anthropic/hh-rlhf has them."""
    if form == "tldr":
        return [{"prompt": POST.format(i, i), "chosen": f" Cat sat on {i} mats.", "rejected": f" Dogs {i}."} for i in range(n)]
    talk = "\n\nHuman: What is {}?\n\nAssistant: A number.\n\nHuman: Which?\n\nAssistant: {}"
    return [{"chosen": talk.format(i, f"The number {i}."), "rejected": talk.format(i, "No idea.")} for i in range(n)]


def run(*args):
    found = CliRunner().invoke(app, [str(a) for a in args])
    assert found.exit_code == 0, (found.output, found.exception)
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", ["tldr", "hh"])
def test_pairs_of_both_forms_are_read_and_make_a_reward_model(tmp_path, form):
    pairs = write(tmp_path / "pairs.jsonl", pairs_of(form))
    keys = [HERE / "tldr_reward.toml", f"pairs.path={pairs}", "pairs.split=", "pairs.holdout=8"]
    assert run("reward", *keys, "--check", "--json") == {"train": 16, "held_out": 8, "dropped": 0}
    told = run("reward", *keys, *TINY, "batch.pairs=8", "optim.warmup_steps=0", f"run.dir={tmp_path / 'run'}", "--json")
    assert (told["train_pairs"], told["held_out"]["pairs"], told["updates"]) == (16, 8, 2)
    assert (tmp_path / "run" / "reward_model" / "config.json").is_file() and 0 <= told["held_out"]["accuracy"] <= 1


def test_the_policys_recipe_passes_check_and_takes_two_steps(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", pairs_of("tldr"))
    made = [f"pairs.path={pairs}", "pairs.split=", "pairs.holdout=8", "batch.pairs=16", "optim.warmup_steps=0", f"run.dir={tmp_path / 'rm'}"]
    run("reward", HERE / "tldr_reward.toml", *TINY, *made, "--json")
    data = write(tmp_path / "rows.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs_of("tldr")])
    reward = tmp_path / "rm" / "reward_model"
    keys = [*TINY, f"data.path={data}", "data.split=", "data.holdout=4", "rollout.prompts=4", "rollout.group=2", "rollout.max_new_tokens=8"]
    keys += ["steps=2", "optim.warmup_steps=0", "eval.rows=2", "warm_start="]
    keys += [ f"rule.reward_model={reward}", f"verifier.path={reward}", f"run.dir={tmp_path / 'run'}"]
    found = CliRunner().invoke(app, ["check", str(HERE / "tldr.toml"), *keys, "--json"])
    told = [json.loads(line) for line in found.stdout.splitlines()]
    assert found.exit_code == 0, (told, found.exception)
    train(load_recipe(HERE / "tldr.toml", keys), console=Console(quiet=True))  # bf16 and recomputed activations, as the recipe has them
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["rule/winner_share"] for r in rows[1:]] == [1.0, 1.0] and all(r["samples/unjudged"] == 0 and r["kl/ref_nats"] >= 0 for r in rows[1:])

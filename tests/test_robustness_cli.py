"""`llmrl robustness build` and `llmrl score --use robustness` on a tiny model that has learnt a few sums by heart, and their refusals."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmrl import robustness
from llmrl.records import InputError, Sampling
from llmrl.tasks import chains
from tests.builders import tiny_policy

torch.set_num_threads(1)
REPO = Path(__file__).parents[1]
ARGS = {"rows": 6, "terms": 4, "seed": 3, "careful": 1.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """(a model that solves the six sums step by step, the same one moved a little)."""
    folder = tmp_path_factory.mktemp("models")
    policy = tiny_policy(hidden=32, layers=2, heads=2, kv_heads=2, ffn=64)
    model, chat = policy.model, policy.chat
    model.set_attn_implementation("sdpa")
    rows = [(chat.prompt_ids([{"role": "user", "content": r["prompt"]}]), chat.completion_ids(r["solution"])) for r in chains(**ARGS)]
    longest = max(len(p) + len(s) for p, s in rows)
    ids = torch.tensor([[*p, *s] + [0] * (longest - len(p) - len(s)) for p, s in rows])
    labels = torch.tensor([[-100] * len(p) + s + [-100] * (longest - len(p) - len(s)) for p, s in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(250):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    for name in ("base", "moved"):
        model.config._attn_implementation = "sdpa"
        model.save_pretrained(folder / name)
        chat.tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
    return str(folder / "base"), str(folder / "moved")


def build(model: str, out: Path, **changes):
    how = {
        "limit": None, "template": None, "system": None, "answer_after": None, "args": ARGS, "split": None, "verifier": "exact",
        "verifier_args": {"after": "#"}, "sampling": Sampling(max_new_tokens=40), "samples": 2, "solve_samples": 2, "solve_min": 1,
        "r": (0.1, 0.3, 0.5), "m": (0.0, 0.5), "cut": ";", "answer_mark": "#", "min_step_tokens": None, "min_edits": None, "coherence_nats": 50.0,
        "proxy": False, "kinds": (), "polluters": ("base",), "polluter_template": "tiny", "delimiters": ("", ";"), "pollutions": 2, "corrections": (),
        "diagnose_template": "chat", "diagnose": 5, "processbench": None, "dtype": "float32", "seed": 0, "overwrite": False,
    }  # fmt: skip
    return robustness.build_set(model, "chains", out, **{**how, **changes})


@pytest.fixture(scope="module")
def built(models, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("set") / "set.jsonl.gz"
    return out, build(models[0], out)


def score(models, file, out, **changes):
    how = {"resamples": 100, "seed": 0, "dtype": "float32", "drift": True, "base": None, "quiet": True}
    return robustness.score_models(models, file, out, **{**how, **changes})


def test_a_set_from_a_tiny_model(built):
    out, result = built
    assert out.is_file() and result["solved"]["solved"] == 6 and result["traces"] == 6
    assert result["shares"]["number"]["items"] >= 6
    assert set(result["left_out"]["diagnose/own"]) == {"the tokenizer has no token for 'P'"}
    text = robustness.summary(result)
    assert "the base solves 6 of 6 problems" in text and "left out of diagnose/own" in text


def test_the_report_of_two_models(built, models, tmp_path):
    report = score(models, built[0], tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "report.png").stat().st_size > 30_000
    base, moved = data["models"]
    assert base["drift"]["kl_nats"] == 0 and base["drift"]["weight_distance"] == 0 and base["drift"]["cka"] == pytest.approx([1, 1])
    assert moved["drift"]["weight_distance"] == pytest.approx(0.1, rel=1e-4) and moved["drift"]["kl_nats"] > 0 and len(moved["drift"]["cka"]) == 2
    assert base["figures"]["clean/accuracy"]["value"] > 0.9 and base["same_tokenizer"]
    (difference,) = data["differences"]
    for name, d in difference["figures"].items():
        a, b = base["figures"][name]["value"], moved["figures"][name]["value"]
        assert d["value"] == (None if a is None or b is None else pytest.approx(b - a)), name
    assert any("diagnose (none at all)" in note for note in data["notes"]) and data["set"]["sha256"] == built[1]["sha256"]
    assert "moved - base" in [str(c.header) for c in report.table().columns]
    again = score(models, built[0], tmp_path / "again")
    assert again.to_json()["models"] == data["models"]
    with gzip.open(tmp_path / "answers-0.jsonl.gz") as file:
        assert sum(1 for _ in file) == 2 * data["set"]["items"]


def test_a_base_with_other_weights_is_no_base(built, models, tmp_path):
    report = score(models[1:], built[0], tmp_path, base=models[1])
    assert "has other weights than when the set was built" in report.drift[models[1]]
    assert any("no drift" in n for n in report.notes())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kinds": ("typo",)}, r"--kind typo: there are typos, irrelevant"),
        ({"solve_min": 3}, r"--solve-min 3 with --solve-samples 2"),
        ({"r": (0.1, 1.0)}, r"--r .*below 1"),
        ({"m": (0.1, 0.1)}, r"--m .*different"),
        ({"polluter_template": "nothing"}, r"nothing"),
        ({"processbench": Path("/nowhere.jsonl")}, r"nowhere"),
        ({"dtype": "half"}, r"--dtype half"),
    ],
)
def test_a_build_that_cannot_be_is_refused_before_the_model_is_loaded(tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        build("./no-such-model", tmp_path / "set.jsonl.gz", **changes)
    assert not list(tmp_path.iterdir())


def test_a_set_is_not_built_twice(built, models):
    with pytest.raises(InputError, match="--overwrite"):
        build(models[0], built[0])


def test_processbench_rows_become_items(models, tmp_path):
    row = {"source": "ProcessBench/gsm8k", "problem": "1+1=", "steps": ["1+1=2", "#2"]}
    rows = [row | {"id": f"r{i}", "first_error_step": (-1, 0, 1)[i % 3]} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "ask.txt").write_text("{question}({steps})")
    with pytest.raises(InputError, match="expected ProcessBench rows"):
        (tmp_path / "other.jsonl").write_text('{"id": 1}\n')
        build(models[0], tmp_path / "x.jsonl", processbench=tmp_path / "other.jsonl")
    result = build(models[0], tmp_path / "set.jsonl", processbench=tmp_path / "rows.jsonl", diagnose_template=str(tmp_path / "ask.txt"), diagnose=2)
    assert result["left_out"]["diagnose/processbench/gsm8k"] == {"the tokenizer has no token for '['": 4}  # two wrong, two right


def llmrl(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(REPO)}
    return subprocess.run([sys.executable, "-m", "llmrl.cli", *map(str, args)], capture_output=True, text=True, cwd=cwd, env=env, timeout=120, check=False)


def test_the_command_prints_the_table_and_says_where_the_files_are(built, models, tmp_path):
    done = llmrl("score", models[0], "--use", "robustness", "--set", built[0], "--out", tmp_path / "o", "--no-drift", "--resamples", 50, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recover/rules/any/rec" in done.stdout and "reconstructed from the abstract" in done.stdout and "report.png" in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["score", "m", "--use", "robustness"], "needs --set"),
        (["score", "m", "--use", "robustness", "--set", "no.jsonl"], "no such file"),
        (["score", "m", "--use", "robustness", "--set", "no.jsonl", "-k", "2"], "-k: with --use robustness"),
        (["score", "m", "--set", "no.jsonl"], "--set goes with --use robustness"),
    ],
)
def test_bad_calls_are_refused_with_exit_code_2(args, said, tmp_path):
    done = llmrl(*args, cwd=tmp_path)
    assert done.returncode == 2 and re.search(said, done.stderr.replace("\n", " ")), done.stderr

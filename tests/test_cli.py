"""The commands as a user types them, in processes of their own: what they print, write, and exit with."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl import cli

REPO = Path(__file__).parents[1]
TINY = ["model.tiny.hidden=32", "model.tiny.layers=1", "model.tiny.heads=2", "model.tiny.ffn=48", "warm_start.steps=4", "warm_start.examples=8", "steps=2",
        "rollout.prompts=4", "rollout.group=2", "rollout.max_new_tokens=10", "optim.warmup_steps=0", "warm_start.optim.warmup_steps=0", "data.args.rows=400",
        "data.holdout=20", "eval.rows=10", "checkpoint.every=1"]  # fmt: skip


def llmrl(*args: object, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(REPO)}
    return subprocess.run([sys.executable, "-m", "llmrl.cli", *map(str, args)], capture_output=True, text=True, cwd=cwd, env=env, timeout=120, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = llmrl("train", "recipes/quickstart.toml", *TINY, f"run.dir={folder}", "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done


def test_train_keeps_its_contract_with_scripts(run):
    folder, printed, done = run
    assert printed == json.loads((folder / "summary.json").read_text()) and done.stderr == ""
    assert {"accuracy_before", "accuracy_after", "steps", "seconds", "tokens"} <= set(printed) and printed["steps"] == 2
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2] and rows[1]["time/step_s"] > 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["recipe"]["model"]["path"] == "tiny" and manifest["origins"]["steps"] == "override" and manifest["plugins"]
    with gzip.open(folder / "samples" / "step-000001.jsonl.gz", "rt") as f:
        samples = [json.loads(line) for line in f]
    assert len(samples) == 8 and all(len(s["token_ids"]) == len(s["logprobs"]) for s in samples)
    assert {"advantage", "reward", "status", "response", "gold", "policy_version"} <= set(samples[0])


def test_a_second_train_is_refused_and_a_finished_one_resumes_to_the_same_summary(run):
    folder, printed, _ = run
    again = llmrl("train", "recipes/quickstart.toml", *TINY, f"run.dir={folder}")
    assert again.returncode == 2 and "--resume" in again.stderr and "--overwrite" in again.stderr
    resumed = llmrl("train", "recipes/quickstart.toml", *TINY, f"run.dir={folder}", "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert {k: v for k, v in json.loads(resumed.stdout).items() if k != "seconds"} == {k: v for k, v in printed.items() if k != "seconds"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "recipes/quickstrt.toml"], r'no such recipe; nearest: ".*quickstart\.toml"'),
        (["train", "recipes/quickstart.toml", "rule.hihg=0.3"], r'unknown key "hihg".*high'),
        (["train", "recipes/quickstart.toml", "rule.use=grop"], r"rule.*grop.*grpo"),
        (["train", "recipes/quickstart.toml", "steps=many"], r"steps"),
        (["train", "recipes/quickstart.toml", "verifier.use=exakt"], r"exakt.*exact"),
        (["train", "recipes/quickstart.toml", "model.path=./nowhere"], r"model\.path.*nowhere"),
        (["train", "recipes/quickstart.toml", "data.path=./no.jsonl"], r"data\.path.*no\.jsonl"),
        (["train", "recipes/quickstart.toml", "rollout.max_new_tokens=500"], r"max_new_tokens.*256 positions"),
        (["train", "recipes/quickstart.toml", 'model.tiny.alphabet="0123456789"'], r"no token for '[-+=]'"),
        (["score", "no.jsonl"], r"no\.jsonl"),
        (["verify", "no.jsonl"], r"no\.jsonl"),
        (["sample", "./nowhere", "--data", "chains", "--out", "x.jsonl"], r"nowhere"),
        (["sample", "tiny", "--data", "chains", "--args", "{rows", "--out", "x.jsonl"], r"--args: not JSON"),
    ],
)
def test_bad_input_is_refused_with_exit_code_2_in_one_message(args, said, tmp_path):
    recipes = [str(REPO / a) if str(a).startswith("recipes/") else a for a in args]
    done = llmrl(*recipes, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert re.search(said, done.stderr.replace("\n", " ")), done.stderr
    assert done.stderr.startswith("refused:") and "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_a_bad_data_row_is_named(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"id": "a", "prompt": "1+1=", "answer": "2", "solution": "#2"}\n{"id": "b", "prompt": "", "answer": "2", "solution": "#2"}\n')
    done = llmrl("train", "recipes/quickstart.toml", f"data.path={data}", "data.args=", "data.holdout=1", "eval.rows=1")
    assert done.returncode == 2 and "row 2" in done.stderr and '"drop"' in done.stderr, done.stderr


def test_a_solution_that_cannot_be_written_and_an_evaluation_on_training_prompts(tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"id": f"r{i}", "prompt": f"{i}+1=", "answer": str(i + 1), "solution": f"#{i + 1}"} for i in range(6)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    keys = [f"data.path={data}", "data.args=", *(k for k in TINY if not k.startswith("data.")), f"run.dir={tmp_path / 'run'}", "data.holdout=0"]
    found = llmrl("check", "recipes/quickstart.toml", *keys, f"eval.data.path={data}", "--json")
    assert found.returncode == 1 and "6 held-out questions are training prompts too" in found.stdout, found.stderr
    for row in rows:
        row["solution"] += "!"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    refused = llmrl("train", "recipes/quickstart.toml", *keys, "data.holdout=2")
    assert refused.returncode == 2 and re.search(r"row r\d: its solution holds '!'", refused.stderr), refused.stderr


def test_a_dropped_long_prompt_is_not_the_longest(tmp_path):
    data = tmp_path / "rows.jsonl"
    prompts = ["1+1=", "2+1=", "3+1=", "1+" * 20 + "1="]
    data.write_text("".join(json.dumps({"prompt": p, "answer": "2", "solution": "#2"}) + "\n" for p in prompts))
    keys = [f"data.path={data}", "data.args=", *(k for k in TINY if not k.startswith("data.")), "data.holdout=1"]
    keys += ["data.on_bad=drop", "data.max_prompt_tokens=8"]
    found = json.loads(llmrl("check", "recipes/quickstart.toml", *keys, "--json").stdout)
    assert "2 training prompts, 1 held out, 1 rows dropped; longest prompt 5 tokens" in json.dumps(found)


def test_show_check_and_help(run):
    shown = json.loads(llmrl("show", "recipes/quickstart.toml", "rule.high=0.3", "--json").stdout)
    assert "rule.high" in json.dumps(shown)
    checked = llmrl("check", "recipes/quickstart.toml", *TINY, "--json")
    checks = json.loads(checked.stdout)
    assert checked.returncode == 0 and checks["ok"] and len(checks["checks"]) >= 8
    names = " ".join(c["name"] for c in checks["checks"])
    assert "gold answers score 1" in names and "learner and engine agree" in names
    failing = llmrl("check", "recipes/quickstart.toml", *TINY, "verifier.after=@@nothing", "--json")
    assert failing.returncode in (0, 1)
    for command in ("train", "sft", "sample", "score", "verify", "check", "show", "export", "launch"):
        done = llmrl(command, "--help")
        assert done.returncode == 0 and "--json" in done.stdout


def test_sample_is_resumable_and_score_reads_it(run, tmp_path):
    folder, _, _ = run
    out = tmp_path / "traces.jsonl.gz"
    args = ["sample", folder, "--data", "chains", "--args", '{"rows": 6, "seed": 5}', "-n", "3", "--max-new-tokens", "8", "--out"]
    first = llmrl(*args, out, "--json")
    assert first.returncode == 0 and json.loads(first.stdout)["new"] == 18, first.stderr
    assert json.loads(llmrl(*args, out, "--json").stdout)["new"] == 0
    ungraded = llmrl("score", out)
    assert ungraded.returncode == 2 and "--verifier" in ungraded.stderr
    graded = llmrl("score", out, "--verifier", "exact", "--verifier-args", '{"after": "#"}', "--json")
    result = json.loads(graded.stdout)[str(out)]
    assert graded.returncode == 0 and result["problems"] == 6 and result["samples"] == 18


def test_verify_and_check_of_the_readmes_own_verifier(tmp_path):
    """The 20 lines of the README, taken out of it."""
    readme = (REPO / "README.md").read_text()
    (tmp_path / "units.py").write_text(re.findall(r"```python\n(# units\.py\n.*?)```", readme, re.S)[0])
    checked = llmrl("check", "./units.py:units", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout
    (tmp_path / "cases.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [
            {"id": "a", "gold": "2000 m", "response": "2 km", "label": 1}, {"id": "b", "gold": "2000 m", "response": "2 m", "label": 1},
            {"id": "c", "gold": "none", "response": "2 m", "label": 0},
        ])
    )  # fmt: skip
    done = llmrl("verify", "cases.jsonl", "--use", "./units.py:units", "tolerance=1e-3", "--out", "out.jsonl", "--json", cwd=tmp_path)
    summary = json.loads(done.stdout)
    assert done.returncode == 0 and summary["statuses"] == {"ok": 2, "no_answer": 0, "timeout": 0, "error": 1} and summary["false_negatives"] == 1
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(r["id"], r["score"], r["status"]) for r in rows] == [("a", 1.0, "ok"), ("b", 0.0, "ok"), ("c", None, "error")]
    assert json.loads((tmp_path / "cases.disagreements.jsonl").read_text())["id"] == "b"


def test_sft_writes_a_model(tmp_path):
    done = llmrl("sft", "recipes/quickstart.toml", *TINY, f"run.dir={tmp_path / 'sft'}", "--json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sft" / "model" / "model.safetensors").is_file() and json.loads(done.stdout)["steps"] == 4


def test_deepspeed_cannot_write_between_the_json(monkeypatch, capsys):
    """Its logger has a handler on stdout, made while it is imported: after the command line has begun."""
    monkeypatch.setattr("sys.argv", ["llmrl", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    capsys.readouterr()
    logger = logging.getLogger("DeepSpeed")
    handler = logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    try:
        logger.warning("Setting accelerator to %s", "CPU")
    finally:
        logger.removeHandler(handler)
        logger.filters.clear()
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "Setting accelerator to CPU\n")

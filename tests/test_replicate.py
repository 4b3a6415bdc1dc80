"""scripts/replicate.py: a study run for real in small, continued, and its table against numbers computed here."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SCRIPT = REPO / "scripts" / "replicate.py"
spec = importlib.util.spec_from_file_location("replicate", SCRIPT)
replicate = importlib.util.module_from_spec(spec)
sys.modules["replicate"] = replicate  # its models look their annotations up there
spec.loader.exec_module(replicate)

STUDY = """
name = "probe"
title = "A probe"
recipe = "small.toml"
seeds = [0, 1]
[arms]
grpo = []
[[evaluate]]
command = ["sample", "{model}", "--data", "chains", "--args", '{"rows": 8, "terms": 2}', "--out", "{out}/traces.jsonl.gz", "--max-new-tokens", "9", "--json"]
stdout = "told.json"
[[columns]]
title = "accuracy (%)"
metric = "eval/accuracy"
scale = 100
[[columns]]
title = "traces"
file = "told.json"
path = "traces"
digits = 0
[[curves]]
title = "reward"
metric = "reward/mean"
"""


def run(folder, *args):
    command = [sys.executable, SCRIPT, folder / "study.toml", "--work", folder / "work", "--to", folder / "REPLICATION.md", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_study_runs_is_continued_and_tells_its_numbers(tmp_path):
    from tests.test_resume import RECIPE

    text = RECIPE.format(rule="grpo", keys="", minibatches=1).replace("steps = 14", "steps = 3")
    (tmp_path / "small.toml").write_text(text)
    (tmp_path / "study.toml").write_text(STUDY)
    done = run(tmp_path, "--jobs", "2", "--only", "grpo")
    assert done.returncode == 0, done.stdout + done.stderr
    first = (tmp_path / "work" / "grpo-0" / "metrics.jsonl").read_bytes()
    done = run(tmp_path)
    assert done.returncode == 0 and (tmp_path / "work" / "grpo-0" / "metrics.jsonl").read_bytes() == first  # not run again
    rows = [(tmp_path / "work" / f"grpo-{s}" / "metrics.jsonl").read_text().splitlines()[-1] for s in (0, 1)]
    a, b = (100 * json.loads(row)["eval/accuracy"] for row in rows)
    base = replicate.metrics(tmp_path / "work" / "grpo-0")[0]
    told = json.loads((tmp_path / "work" / "start-0" / "summary.json").read_text())
    assert base["step"] == 0 and base["eval/accuracy"] == told["accuracy_after"]  # the arm began with the seed's warm-started model
    page = (tmp_path / "REPLICATION.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| grpo |"))
    half = 12.706 * abs(a - b) / 2  # t(1) * |a - b| / sqrt(2) / sqrt(2)
    assert [c.strip() for c in row.split("|")[2:4]] == [f"{(a + b) / 2:.1f} ± {half:.1f}", "8 ± 0"]
    assert (tmp_path / "docs" / "replication-probe.png").stat().st_size > 5000 and page.count("begin, written by") == 1


def test_a_failed_arm_is_named_and_the_others_are_told(tmp_path):
    from tests.test_resume import RECIPE

    (tmp_path / "small.toml").write_text(RECIPE.format(rule="grpo", keys="", minibatches=1).replace("steps = 14", "steps = 1"))
    study = STUDY.replace("grpo = []", 'grpo = []\n"no learning" = ["optim.lr=-1"]').replace("seeds = [0, 1]", "seeds = [0]")
    (tmp_path / "study.toml").write_text(study.replace('[[evaluate]]', '[[prepare]]'))
    done = run(tmp_path)
    page = (tmp_path / "REPLICATION.md").read_text()
    assert done.returncode == 1 and "Failed: no learning, seed 0: `llmrl train` ended with 2; see" in page
    assert "optim.lr" in (tmp_path / "work" / "logs" / "no learning-0.log").read_text()
    assert "| no learning | - | - |" in page and re.search(r"\| grpo \| \d+\.\d \| - \|", page)


@pytest.mark.parametrize(
    ("values", "sign", "text"),
    [([1.0, 2.0, 3.0], False, "2.00 ± 2.48"), ([0.5], True, "+0.50"), ([None, None], False, "-"), ([1.0, None, 1.0], False, "1.00 ± 0.00 (2 of 3)")],
)
def test_cells(values, sign, text):
    """2.48 = 4.303 * 1 / sqrt(3)."""
    assert replicate.shown(values, replicate.Column(title="x", digits=2), sign=sign) == text


def test_a_section_is_replaced_and_the_rest_of_the_page_stays(tmp_path):
    page = tmp_path / "R.md"
    replicate.write_section(page, "a", "one\n")
    page.write_text(page.read_text() + "\nby hand\n")
    replicate.write_section(page, "b", "two\n")
    replicate.write_section(page, "a", "three\n")
    text = page.read_text()
    assert "one" not in text and text.index("three") < text.index("by hand") < text.index("two")


def test_an_old_value_is_not_the_last_one(tmp_path):
    rows = [{"step": 0}, {"step": 1, "entropy": 0.2, "eval": 0.5}, {"step": 2, "entropy": 0.1}, {"step": 3, "entropy": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def value(**keys):
        return replicate.value_of(replicate.Column(title="x", **keys), tmp_path, tmp_path)

    assert value(metric="entropy") is None and value(metric="eval") == 0.5  # measured up to some step; measured at some steps
    assert value(metric="entropy", over="median") == pytest.approx(0.15) and value(metric="step", reach=("eval", 0.5)) == 1

"""The shipped generator functions."""

from __future__ import annotations

import json
import re
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from llmrl.data import read_prompts
from llmrl.records import InputError
from llmrl.tasks import addition, chains, humaneval, mbpp, word_chains


def value_of(expr: str) -> int:
    """Left to right, by hand: an independent reading of what the tasks print."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", expr))


def test_chains_use_every_expression_once_before_any_repeats():
    rows = list(chains(rows=2 * 2916 + 10))
    first, second = rows[:2916], rows[2916:5832]
    assert len({row["prompt"] for row in first}) == len({row["prompt"] for row in second}) == 9**3 * 4
    assert len({row["id"] for row in rows}) == len(rows)
    assert [r["prompt"] for r in first] != [r["prompt"] for r in second]
    for row in rows:
        assert re.fullmatch(r"[1-9][+-][1-9][+-][1-9]=", row["prompt"])
        assert value_of(row["prompt"][:-1]) == int(row["answer"])
        assert row["id"].partition("~")[0] + "=" == row["prompt"]


def test_chains_demonstrations():
    rows = list(chains(rows=5832))
    n_careful, offsets = 0, Counter()
    for row in rows:
        steps, _, last = row["solution"].rpartition("#")
        if not steps:
            offsets[int(last) - int(row["answer"])] += 1
            continue
        n_careful += 1
        assert last == row["answer"]
        total = int(row["prompt"][0])
        parts = steps.split(";")
        for part, (sign, n) in zip(parts, re.findall(r"([+-])(\d)", row["prompt"][1:]), strict=True):
            after = total + int(sign + n)
            assert part == f"{total}{sign}{n}={after}"
            total = after
    assert 0.37 < n_careful / len(rows) < 0.43  # 0.4 +- 4.7 standard deviations
    assert set(offsets) == set(range(-3, 4))
    assert all(0.11 < n / offsets.total() < 0.18 for n in offsets.values())  # 1/7


def test_the_careful_demonstration_of_one_expression():
    rows = {row["prompt"]: row for row in chains(rows=2916, careful=1.0)}
    assert rows["3-6-1="] == {"id": "3-6-1", "prompt": "3-6-1=", "answer": "-4", "solution": "3-6=-3;-3-1=-4#-4"}


def test_chains_with_noise_have_one_wrong_step():
    rows = list(chains(rows=2916, careful=1.0, noise=1.0))
    for row in rows:
        steps, _, last = row["solution"].rpartition("#")
        wrong = sum(value_of(left) != int(right) for left, right in (step.rsplit("=", 1) for step in steps.split(";")))
        assert wrong == 1 and last != row["answer"]


def test_chains_are_uniform():
    """Like independent draws of every term: each first number and each sign appears about equally often in a sample."""
    rows = list(chains(rows=2000, terms=4, seed=3))
    first = Counter(row["prompt"][0] for row in rows)
    assert len({row["prompt"] for row in rows}) == 2000
    assert all(160 < n < 285 for n in first.values()) and len(first) == 9  # 222 +- 4.4 standard deviations
    assert 0.45 < sum(row["prompt"][1] == "+" for row in rows) / 2000 < 0.55


def test_rows_are_reproducible_and_seeds_differ():
    assert list(chains(rows=20)) == list(chains(rows=40))[:20]
    assert list(chains(rows=20)) != list(chains(rows=20, seed=1))
    assert [row["prompt"] for row in chains(rows=3)] == GOLDEN_CHAINS
    big = list(chains(rows=50, terms=12, max_value=99))
    assert len({row["id"] for row in big}) == 50 and all(value_of(row["id"]) == int(row["answer"]) for row in big)


GOLDEN_CHAINS = ["9+8+9=", "6-6+8=", "2-2+9="]


def test_addition():
    rows = list(addition())
    assert len(rows) == len({row["id"] for row in rows}) == 81
    assert {row["prompt"]: row["answer"] for row in rows}["What is 3+8?"] == "11"
    assert all(value_of(row["id"]) == int(row["answer"]) for row in rows)
    two = list(addition(rows=500, digits=2, prompt="{a} plus {b}"))
    assert all(re.fullmatch(r"\d\d plus \d\d", row["prompt"]) and row["prompt"][0] != "0" for row in two)
    assert len(list(addition(max_value=20))) == 400


def test_addition_does_not_repeat_unless_told():
    with pytest.raises(InputError, match=r"82 rows.*81 different problems.*repeat = true"):
        list(addition(rows=82))
    rows = list(addition(rows=100, repeat=True))
    assert len({row["id"] for row in rows}) == 100 and len({row["prompt"] for row in rows}) == 81
    with pytest.raises(InputError, match="not both"):
        list(addition(digits=1, max_value=5))


def test_word_chains():
    rows = {row["id"]: row for row in word_chains(rows=2916)}
    assert rows["3-6-1"] == {
        "id": "3-6-1",
        "prompt": "Start with 3. Subtract 6. Subtract 1. What number do you have now?",
        "answer": "-4",
        "solution": "3 - 6 = -3. -3 - 1 = -4. The answer is -4.",
    }
    assert all(value_of(name) == int(row["answer"]) for name, row in rows.items())


@pytest.mark.parametrize(
    ("args", "match"),
    [({"rows": 0}, "rows"), ({"terms": 1}, "terms"), ({"ops": "+*"}, "ops"), ({"careful": 1.5}, "careful"), ({"prompt": "{exp}"}, "expr")],
)
def test_arguments_out_of_range(args, match):
    with pytest.raises(InputError, match=match):
        list(chains(**args))


def test_tasks_as_data_sources(tmp_path: Path):
    table = read_prompts("chains", base=tmp_path, args={"rows": 30, "terms": 2}, need_solution=True)
    assert len(table.prompts) == 30 and set(table.prompts[0].meta) == {"solution"}
    with pytest.raises(InputError, match="nearest"):
        read_prompts("chain", base=tmp_path)
    with pytest.raises(InputError, match="rows"):
        read_prompts("addition", base=tmp_path, args={"rowz": 3})


# ---------------------------------------------------------------- programs

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    \"\"\"The sum, e.g. {1} -> 1.\"\"\"\n",
    "canonical_solution": "    return sum(xs)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
    "entry_point": "total",
}
MBPP = {
    "task_id": 7,
    "text": "Write a function to double a number.",
    "code": "def double(x):\r\n    return 2 * x",
    "test_list": ["assert double(1) == 2", "assert double(3) == 6"],
    "test_setup_code": "",
    "challenge_test_list": ["assert double('a') == 'aa'"],
}


def write(file: Path, *rows: dict) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_humaneval_rows_in_either_naming(tmp_path: Path):
    own = {"id": "humaneval/0", "answer": HUMANEVAL["canonical_solution"], **{k: HUMANEVAL[k] for k in ("prompt", "test", "entry_point")}}
    write(tmp_path / "rows.jsonl", HUMANEVAL, own)
    first, second = humaneval(path="./rows.jsonl", base=tmp_path)
    assert first["id"] == "HumanEval/0" and {**first, "id": ""} == {**second, "id": ""}
    assert first["answer"] == HUMANEVAL["prompt"] + "    return sum(xs)\n" and first["prefix"] == HUMANEVAL["prompt"]
    assert first["prompt"].startswith("Complete this Python function.") and first["prompt"].endswith('{1} -> 1."""\n```')
    assert first["solution"].startswith("```python\nfrom typing") and first["solution"].endswith("return sum(xs)\n```")
    (bare, _) = humaneval(path="./rows.jsonl", base=tmp_path, prompt="{code}")
    assert bare["prompt"] == HUMANEVAL["prompt"].strip("\n")
    with pytest.raises(InputError, match="canonical_solution or answer"):
        list(humaneval(path=str(write(tmp_path / "bad.jsonl", {"task_id": "x", "prompt": "def f():"})), base=tmp_path))
    with pytest.raises(InputError, match=r"bad\.jsonl, row 1: not JSON"):
        (tmp_path / "bad.jsonl").write_text("{\n")
        list(humaneval(path="bad.jsonl", base=tmp_path))


def test_mbpp_rows_show_the_first_assert_only(tmp_path: Path):
    sanitized = {"task_id": 8, "prompt": "Double it.", "code": "x", "test_imports": ["import math"], "test_list": ["assert f(1)"], "split": "test"}
    write(tmp_path / "rows.jsonl", {**MBPP, "split": "train"}, sanitized)
    first, second = mbpp(path="rows.jsonl", base=tmp_path)
    assert first["id"] == "7" and first["answer"] == MBPP["code"] and first["test_list"] == MBPP["test_list"]
    assert "double a number" in first["prompt"] and "double(1) == 2" in first["prompt"] and "== 6" not in first["prompt"]
    assert first["challenge_test_list"] == MBPP["challenge_test_list"] and "aa" not in first["prompt"]
    assert second["test_imports"] == ["import math"] and second["test_setup_code"] == ""
    assert [row["id"] for row in mbpp(path="rows.jsonl", split="test", base=tmp_path)] == ["8"]
    with pytest.raises(InputError, match="no test_list"):
        list(mbpp(path=str(write(tmp_path / "bad.jsonl", {**MBPP, "test_list": []})), base=tmp_path))
    with pytest.raises(InputError, match="it must contain"):
        list(mbpp(path="rows.jsonl", base=tmp_path, prompt="{tests}"))


def test_programs_come_from_the_hub_by_default(monkeypatch, tmp_path: Path):
    """The loader's own call, with the package replaced: there is no network in tests."""
    asked = []

    def load_dataset(path, **keys):
        asked.append((path, keys))
        return [HUMANEVAL if "humaneval" in path else MBPP]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(list(humaneval(base=tmp_path))) == 1
    (row,) = mbpp(base=tmp_path)
    assert row["split"] == "train" and next(iter(mbpp(split="test", config="sanitized", base=tmp_path)))["split"] == "test"
    assert asked == [
        ("openai/openai_humaneval", {"split": "test"}),
        ("google-research-datasets/mbpp", {"split": "train", "name": "full"}),
        ("google-research-datasets/mbpp", {"split": "test", "name": "sanitized"}),
    ]


def test_programs_as_a_data_source(tmp_path: Path):
    write(tmp_path / "mbpp.jsonl", MBPP)
    table = read_prompts("mbpp", base=tmp_path, args={"path": "./mbpp.jsonl"}, need_solution=True)
    (prompt,) = table.prompts
    assert prompt.id == "7" and prompt.answer == MBPP["code"] and prompt.meta["test_list"] == MBPP["test_list"]
    write(tmp_path / "humaneval.jsonl", HUMANEVAL)
    (prompt,) = read_prompts("humaneval", base=tmp_path, args={"path": "./humaneval.jsonl"}).prompts
    assert prompt.meta["entry_point"] == "total" and prompt.meta["prefix"] == HUMANEVAL["prompt"]


DATA = Path(__file__).parents[1].parent / "shared" / "data" / "code"


@pytest.mark.skipif(not DATA.exists(), reason="the shared data folder is not here")
def test_all_real_rows_of_programs_are_read():
    assert len(list(humaneval(path=str(DATA / "humaneval.jsonl.gz"), base=DATA))) == 164
    rows = list(mbpp(path="mbpp.jsonl.gz", base=DATA))
    assert Counter(row["split"] for row in rows) == {"train": 374, "test": 500, "validation": 90, "prompt": 10}
    assert len({row["id"] for row in rows}) == 974 and all(row["test_list"][0] in row["prompt"] for row in rows)

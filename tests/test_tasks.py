"""The shipped generator functions."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from llmrl.data import read_prompts
from llmrl.records import InputError
from llmrl.tasks import addition, chains, word_chains


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

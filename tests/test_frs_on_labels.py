"""scripts/frs_on_labels.py: its statistics by hand, and the whole of it on a tiny model."""

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "frs_on_labels.py"
spec = importlib.util.spec_from_file_location("frs_on_labels", SCRIPT)
assert spec and spec.loader
labels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(labels)


def test_auroc_by_hand():
    value, good = np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, False])
    assert labels.auroc(value, good) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    found = labels.with_interval(value, good, 500, 0)
    assert found[0] == labels.auroc(value, good) and 0.25 <= found[1] <= found[0] <= found[2] <= 1.0
    rng = np.random.default_rng(0)
    value = np.concatenate([rng.normal(1, 1, 400), rng.normal(0, 1, 400)])
    point, low, high = labels.with_interval(value, np.arange(800) < 400, 500, 0)
    assert point == pytest.approx(0.76, abs=0.04) and high - low == pytest.approx(0.066, abs=0.01)  # Phi(1 / sqrt 2); Hanley-McNeil width


def test_length_is_held():
    rng = np.random.default_rng(1)
    length = rng.uniform(size=2000)
    assert abs(np.corrcoef(labels.without(length + 0.3 * rng.uniform(size=2000), length), length)[0, 1]) < 0.02


def test_first_errors_by_hand():
    def row(name: str, first: int, *steps: float) -> dict:
        return {"id": name, "source": "s", "first_error_step": first, "steps": list(steps)}

    rows = [row("a", 1, 0.5, 0.3), row("b", 1, 0.2, 0.4), row("c", 0, 0.9, 0.1), row("d", -1, 0.6, 0.35), row("e", 1, 0.1, 0.1), row("f", 1, 0.7, 0.6)]
    found = labels.first_errors(rows, 100, 0, elsewhere=False)  # c has no step before
    assert labels.first_errors(rows[:3], 100, 0, elsewhere=False) is None  # too few
    assert found is None or found[0] == 4
    at_place = labels.first_errors(rows, 100, 0, elsewhere=True)
    # step 1 against d's 0.35: a 1, b 0, e 1, f 0; step 0 of c (0.9) against 0.5, 0.2, 0.6, 0.1, 0.7: none is surer
    assert at_place is not None and at_place[0] == 5 and at_place[1] == pytest.approx((1 + 0 + 0 + 1 + 0) / 5)


def test_labels_take_turns_and_long_texts_stay_out(tmp_path):
    rows = [{"id": f"{s}{i}", "source": s, "steps": ["x" * (2000 if i == 0 else 10)], "first_error_step": -1 if i % 4 == 0 else 0, "final_answer_correct": None}
            for s in "ab" for i in range(12)]  # fmt: skip
    path = tmp_path / "t.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)
    found = labels.read_rows([path], 6, 100, [])
    assert len(found) == 12 and {r["id"] for r in found}.isdisjoint({"a0", "b0"})
    assert [r["source"] for r in found[:4]] == ["a", "b", "a", "b"]
    assert [labels.is_good(r) for r in found if r["source"] == "a"] == [True, False, True, False, False, False]  # two good ones are left: 4 and 8
    assert len(labels.read_rows([path], 6, 100, ["b"])) == 6

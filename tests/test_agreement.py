"""Verdicts on real labelled responses: the counts of tests/golden/agreement.json, and how the rewritten golds are made.

The golden: `python scripts/agreement.py --data PATH --every 5 --json tests/golden/agreement.json`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llmrl.records import Prompt, Verdict

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
GOLDEN = json.loads((ROOT / "tests" / "golden" / "agreement.json").read_text(encoding="utf-8"))


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agreement", ROOT / "scripts" / "agreement.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["agreement"] = module
    spec.loader.exec_module(module)
    return module


agreement = load_script()


def test_rewriting_keeps_the_value_and_changing_changes_it() -> None:
    assert list(agreement.same(r"\frac{3}{4}")) == [
        r"The answer is $\frac{3}{4}$.",
        r"\dfrac{3}{4}",
        r"\tfrac{3}{4}",
        "0.75",
    ]
    assert set(agreement.same("1250")) == {"The answer is $1250$.", "x = 1250", r"1250\text{ cm}", "1,250"}
    assert {"3, 2, 1", "1,2,3"} < set(agreement.same("1, 2, 3"))
    assert "25" in set(agreement.same(r"25\%"))
    assert "(1,2]" in set(agreement.same(r"\left(1,2\right]"))
    assert list(agreement.other(r"\frac{3}{4}", "7")) == [r"-\frac{3}{4}", r"\frac{4}{3}"]
    assert list(agreement.other("5", "7")) == ["-5", "6", "7"] and list(agreement.other("5", "5")) == ["-5", "6"]
    assert list(agreement.other("(1,2)", "7")) == ["(2,1)", "[1,2)", "(2,2)"]
    assert list(agreement.other(r"\text{even}", "7")) == []


def test_counts_and_cells() -> None:
    cases = [agreement.Case("d", "1", "1", True), agreement.Case("d", "1", "1", True), agreement.Case("d", "1", "2", False)]
    table = {"math_answer": agreement.count(cases, [Verdict(1.0), Verdict(None, "timeout"), Verdict(1.0)]), "exact": {}}
    assert table["math_answer"] == {"d": {"positives": 2, "negatives": 1, "tp": 1, "fp": 1, "unjudged": 1}}
    assert agreement.rows(table) == [["d", "2", "1", "50.0 / 100.0 (1)", "-"]]


def test_string_match_takes_the_last_box_else_the_last_number() -> None:
    judge = agreement.string_match()
    rows = [(r"\boxed{3} or \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0), ("so 1,250", "1250", 1.0), ("4", "5", 0.0), ("", "", 0.0)]
    assert [judge(Prompt("p", (), gold), response).score for response, gold, _ in rows] == [score for *_, score in rows]


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
@pytest.mark.skipif(agreement.versions() != GOLDEN["versions"], reason="other versions of Math-Verify or sympy than the golden's")
def test_counts_on_real_responses_are_the_goldens() -> None:
    cases = agreement.load(DATA, GOLDEN["every"])
    table = {name: agreement.count(cases, agreement.judge_all(cases, name)) for name in agreement.VERIFIERS}
    assert table == GOLDEN["table"]


def test_the_golden_says_what_it_should() -> None:
    table = GOLDEN["table"]
    ours, plain = table["math_answer"], table["Math-Verify"]
    assert ours["gsm8k_model_solutions"]["tp"] == ours["gsm8k_model_solutions"]["positives"] > 100
    assert ours["gsm8k_model_solutions"]["fp"] == ours["math_other"]["fp"] == ours["qwen_math_cot"]["fp"] == 0
    for dataset in ("math_same", "math_full_stop"):
        assert ours[dataset]["tp"] == ours[dataset]["positives"] > 100
    assert all(ours[d]["tp"] >= plain[d]["tp"] and ours[d]["fp"] <= plain[d]["fp"] for d in ours)
    assert sum(row["unjudged"] for row in ours.values()) <= 1

"""Comparisons: the paper's recorded table (check 16), rank statistics and agreement by hand, paired differences, several judges."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from llmrl.evaluation.agreement import agreement, read_human, weighted_kappa
from llmrl.evaluation.compare import compare, mean_of, paired, parts_of, recorded
from llmrl.evaluation.dimensions import DIMENSIONS, Case, FunctionJudge
from llmrl.evaluation.frs import FRSResult, frs
from llmrl.evaluation.traces import Trace
from llmrl.evaluation.transfer import disagreement, macro, ranks, spearman, ties, transfer
from llmrl.records import InputError

# ---------------------------------------------------------------- check 16: recorded data


def test_the_papers_table_through_our_code():
    found = recorded()
    means = {"FRS": [88.5, 79.9, 76.3, 74.3, 73.8, 69.7, 68.1, 63.2, 26.3], "pass@1": [68.2, 42.9, 64.8, 62.5, 56.4, 68.9, 73.5, 59.3, 24.8]}
    for name, expected in means.items():  # printed to one decimal; 74.25 and 63.15 lie between two
        np.testing.assert_allclose(found["means"][name], expected, atol=0.0501)
    routes = {(t["from"], t["to"]): t for t in found["transfer"]}
    assert routes["FRS", "FRS"]["spearman"] == pytest.approx(0.7117, abs=5e-5)
    assert routes["pass@1", "pass@1"]["spearman"] == pytest.approx(0.5489, abs=5e-5)
    assert routes["pass@1", "FRS"]["spearman"] == pytest.approx(0.2766, abs=5e-5)
    assert routes["FRS", "pass@1"]["spearman"] == pytest.approx(0.209, abs=5e-4) and routes["FRS", "pass@1"]["pearson"] == pytest.approx(0.551, abs=5e-4)
    folds = dict(zip(found["benchmarks"], (round(f["spearman"], 2) for f in routes["FRS", "FRS"]["folds"]), strict=True))
    assert folds == {"GSM8K": 0.93, "MATH500": 0.72, "SVAMP": 0.68, "AQuA": 0.82, "CSQA": 0.47, "GPQA": 0.65}
    tied = {t["points"]: t for t in found["ties"]}
    assert (tied[2.0]["pairs"], round(tied[2.0]["score_gap"], 2)) == (15, 12.18)
    table = [(t["pairs"], round(t["score_gap"], 1), float(f"{t['ratio']:.3g}")) for t in found["ties"]]
    assert table == [(8, 14.6, 30.7), (15, 12.2, 13.1), (27, 12.3, 7.35), (34, 12.9, 6.06)]
    assert tied[2.0]["ratio"] == pytest.approx(13.1, abs=0.05)


# ---------------------------------------------------------------- tables, by hand


def test_rank_statistics_by_hand():
    assert ranks(np.array([10.0, 30.0, 20.0, 20.0])).tolist() == [1.0, 4.0, 2.5, 2.5]
    assert spearman(np.array([1, 2, 3, 4]), np.array([1, 3, 2, 4])) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman(np.array([1.0, 2.0]), np.array([5.0, 5.0])) is None and spearman(np.array([1.0]), np.array([1.0])) is None
    assert np.isnan(macro(np.array([[1.0, np.nan]]))[0])


def test_ties_by_hand():
    accuracy, score = np.array([[50.0, 80.0], [51.0, 70.0], [55.0, np.nan]]), np.array([[60.0, 90.0], [70.0, 40.0], [90.0, 10.0]])
    assert ties(accuracy, score, 1.0) == {"points": 1.0, "pairs": 1, "score_gap": 10.0, "accuracy_gap": 1.0, "ratio": 10.0}
    found = ties(accuracy, score, 5.0)  # 50-51, 50-55, 51-55 on the first; 80-70 is too far
    assert (found["pairs"], found["score_gap"], found["accuracy_gap"]) == (3, 20.0, pytest.approx(10 / 3))
    assert ties(accuracy, score, 0.5)["score_gap"] is None


def test_transfer_by_hand_and_its_limits():
    table = np.array([[1.0, 1.0, 3.0], [2.0, 2.0, 2.0], [3.0, 3.0, 1.0]])
    found = transfer(table, table)
    assert [f["spearman"] for f in found["folds"]] == [None, None, pytest.approx(-1.0)]  # the mean of 1 + 3, 2 + 2, 3 + 1 is constant
    assert found["spearman"] is None
    assert transfer(table[:2], table[:2])["folds"][2]["spearman"] is None  # two models have no rank correlation to speak of
    assert transfer(table[:, :1], table[:, :1]) == {"spearman": None, "pearson": None, "folds": []}
    assert disagreement(np.array([[5.0], [1.0], [-2.0]]), np.array([[1.0], [5.0], [-4.0]])) == {"points": 2.0, "pairs": 3, "reversed": 1}
    assert disagreement(np.array([[5.0], [1.0]]), np.array([[1.0], [2.5]]))["pairs"] == 0


# ---------------------------------------------------------------- agreement, by hand


def test_weighted_kappa_by_hand():
    # 3 x 3 of four pairs: observed disagreement 0 + 1 + 1 + 0 = 2; margins a: 1, 2, 2, 3 and b: 1, 1, 3, 3
    # expected: sum over a, b of (a - b)^2 / 4 = (0+0+4+4) + 2 * (1+1+1+1) + (4+4+0+0) = 24, / 4 = 6
    assert weighted_kappa([1, 2, 2, 3], [1, 1, 3, 3]) == pytest.approx(1 - 2 / 6)
    assert weighted_kappa([1, 3, 5], [1, 3, 5]) == 1.0 and weighted_kappa([1, 5], [5, 1]) == -1.0
    assert weighted_kappa([3, 3], [3, 3]) is None and weighted_kappa([], []) is None


def test_agreement_by_hand():
    def all_of(*scores: int) -> dict[str, int]:
        return dict(zip(DIMENSIONS, scores, strict=True))

    a = {"x": all_of(5, 4, 3, 2), "y": all_of(1, 1, 5, 5), "only a": all_of(1, 1, 1, 1)}
    b = {"x": all_of(5, 3, 5, 2), "y": all_of(1, 1, 4, 1), "only b": all_of(1, 1, 1, 1)}
    found = agreement(a, b)
    assert found["traces"] == 2 and found["all"]["n"] == 8
    assert found["all"]["exact"] == 4 / 8 and found["all"]["within_one"] == 6 / 8  # apart by 0 1 -2 0, 0 0 1 4
    assert found["all"]["difference"] == pytest.approx(4 / 8)
    assert found["dimensions"]["faithfulness"] == {"n": 2, "exact": 1.0, "within_one": 1.0, "pearson": pytest.approx(1.0), "kappa": 1.0, "difference": 0.0}
    assert found["quality"]["difference"] == pytest.approx(((14 - 15) / 16 + (12 - 7) / 16) / 2)
    assert agreement(a, {})["all"]["exact"] is None


def test_peoples_labels_are_read_by_rater(tmp_path):
    rows = [{"id": "t", "rater": r, **dict.fromkeys(DIMENSIONS, i + 2)} for i, r in enumerate("ab")] + [{"id": "u", **dict.fromkeys(DIMENSIONS, 1)}]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_human(tmp_path / "h.jsonl")
    assert set(found) == {"a", "b", "human"} and found["b"]["t"]["utility"] == 3
    for line, said in (('{"id": "t"}', "line 1 is no label"), (json.dumps({"id": "t", **dict.fromkeys(DIMENSIONS, 6)}), "1..5"), ("[]", "line 1")):
        (tmp_path / "h.jsonl").write_text(line)
        with pytest.raises(InputError, match=said):
            read_human(tmp_path / "h.jsonl")


# ---------------------------------------------------------------- results


def result_of(model: str, mean: float, benchmark: str = "b", judge: str = "j", seed: int = 0, problems: int = 40, **options: object) -> FRSResult:
    """Qualities around `mean`, half of their spread the problem's; confidence and quality of a problem are the same for every model."""
    rng = np.random.default_rng(7)
    hard, c = rng.normal(0, 0.15, problems), rng.uniform(0.1, 0.9, (problems, 8))
    noise = np.random.default_rng(seed).normal(0, 0.1, (problems, 8))
    traces = [Trace(id=f"p{q:02}/{s}", prompt_id=f"p{q:02}", prompt="?", response="!", gold="1", raw_logprobs=[math.log(c[q, s])], token_ids=[1], score=1.0,
                    status="ok", model=model, sample=s) for q in range(problems) for s in range(8)]  # fmt: skip

    def fn(case: Case) -> float:
        q, s = int(case.id[1:3]), int(case.id[4:])
        return float(np.clip(mean + hard[q] + noise[q, s], 0, 1))

    return frs(traces, judge=FunctionJudge(fn, judge), benchmark=benchmark, resamples=500, **{"subsample": None, **options})  # type: ignore[arg-type]


def test_paired_differences_lose_the_problems_spread():
    a, b = result_of("a", 0.60, seed=1), result_of("b", 0.55, seed=2)
    assert paired(a, b)["difference"] == pytest.approx(a.frs.value - b.frs.value)  # type: ignore[operator]
    whole = paired(a, b, k=1.0, resamples=4000)
    assert whole["low"] < whole["difference"] < whole["high"] and whole["p"] < 0.01 and whole["paired"] == whole["problems"] == 40
    wide = [result_of(m, mean, seed=s, over="problems").unfiltered for m, mean, s in (("a", 0.60, 1), ("b", 0.55, 2))]
    apart = [w.high - w.low for w in wide]  # type: ignore[operator]
    # 0.1 of noise over 8 samples against 0.15 between problems: sqrt(0.00125 / 0.02375) = 0.23 of the width
    assert whole["high"] - whole["low"] == pytest.approx(0.23 * math.hypot(*apart), rel=0.3)
    same = paired(a, a)
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0.0, 0.0, 0.0, 1.0)
    reverse = paired(b, a, k=1.0, resamples=4000)
    assert reverse["difference"] == pytest.approx(-whole["difference"]) and reverse["low"] == pytest.approx(-whole["high"], abs=0.3)


def test_paired_coverage():
    """Over repetitions the interval holds the true difference of 5 points about as often as it says."""
    hits = 0
    for s in range(40):
        found = paired(result_of("a", 0.55, seed=2 * s, ks=(0.5,), k=0.5), result_of("b", 0.50, seed=2 * s + 1, ks=(0.5,), k=0.5), resamples=400, seed=s)
        hits += found["low"] <= 5.0 <= found["high"]
    assert hits >= 34


def test_the_parts_of_a_result_give_its_numbers_again():
    for options in ({}, {"subsample": 10}):
        r = result_of("a", 0.5, **options)
        for k in (0.1, 0.5, 1.0):
            parts = parts_of(r, k)
            value = 100 * sum(p.of * p.value_n.mean() for p in parts) / sum(p.of for p in parts)
            assert value == pytest.approx(r.by_k[k].value) and sum(len(p.value_n) for p in parts) == r.by_k[k].n


def test_a_leaderboard_over_models_and_benchmarks():
    results = [result_of(m, base + shift, b, seed=i + 10 * j) for j, (b, shift) in enumerate((("x", 0.0), ("y", 0.1), ("z", -0.1)))
               for i, (m, base) in enumerate((("low", 0.3), ("high", 0.6), ("mid", 0.45), ("part", 0.9))) if not (m == "part" and b == "z")]  # fmt: skip
    found = compare(results, resamples=300)
    assert found.models == ["high", "mid", "low", "part"] and found.benchmarks == ["x", "y", "z"]
    top = found.leaderboard[0]
    assert top.mean.value == pytest.approx(np.mean([top.cells[b].value for b in "xyz"])) and top.mean.low < top.mean.value < top.mean.high  # type: ignore[operator]
    assert top.mean.se == 0.0 and found.leaderboard[3].mean.value is None and any("part" in n for n in found.notes)
    assert found.k_sensitivity[0]["spearman"] == pytest.approx(1.0) and [row["k"] for row in found.k_sensitivity][-1] == 1.0
    assert len(found.pairs) == 3 * 3 + 2 * 3 and {t["points"] for t in found.ties} == {1.0, 2.0, 3.0, 5.0}
    assert found.ties[0]["pairs"] == 6 + 6 + 3 and found.ties[0]["accuracy_gap"] == 0.0  # all are right throughout
    routes = {(t["from"], t["to"]): t["spearman"] for t in found.transfer}
    assert routes["FRS", "FRS"] == pytest.approx(1.0) and routes["pass@1", "pass@1"] is None
    json.dumps(found.to_json())
    assert found.tables()[0].row_count == 4
    spread = mean_of([r for r in results if r.model == "high"], 0.1, resamples=4000)
    cells = [r.frs.high - r.frs.low for r in results if r.model == "high"]  # type: ignore[operator]
    assert spread.high - spread.low == pytest.approx(math.sqrt(sum(w * w for w in cells)) / 3, rel=0.1)  # type: ignore[operator]


def test_judges_are_held_against_the_first():
    mild = [result_of(m, base, judge="mild") for m, base in (("a", 0.3), ("b", 0.5), ("c", 0.7))]
    hard = [result_of(m, base, judge="hard") for m, base in (("a", 0.3), ("b", 0.1), ("c", 0.6))]
    found = compare([*mild, *hard], resamples=50)
    assert found.judges[0]["judge"] == "hard" and found.judges[0]["spearman"] == pytest.approx(0.5)  # 2 1 3 against 1 2 3
    expected = np.mean([h.frs.value - m.frs.value for h, m in zip(hard, mild, strict=True)])  # type: ignore[operator]
    assert found.judges[0]["difference"] == pytest.approx(expected) and found.judges[0]["agreement"]["traces"] == 0  # these judges have no dimensions


def test_what_cannot_be_compared_is_refused():
    a = result_of("a", 0.5, problems=4)
    with pytest.raises(InputError, match="twice"):
        compare([a, a])
    with pytest.raises(InputError, match="different K"):
        compare([a, replace(a, model="b", k=0.5)])
    with pytest.raises(InputError, match="no results"):
        compare([])
    other = replace(a, model="b", judged=[replace(t, prompt_id="q" + t.prompt_id) for t in a.judged])
    assert any("share no problem" in n for n in compare([a, other], resamples=50).notes)


def test_a_kept_set_of_few_problems_is_told_of():
    a, b = result_of("a", 0.6, seed=1), result_of("b", 0.5, seed=2)
    assert not [n for n in compare([a, b], resamples=50).notes if "few problems" in n]
    narrow = replace(b, composition={**b.composition, "problem_share": 2 / 40})
    (note,) = [n for n in compare([a, narrow], resamples=50).notes if "few problems" in n]
    assert note.endswith("b on b 2")

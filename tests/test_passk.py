"""pass@k, mean@k and the majority vote, against numbers by hand and against every subset."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from rich.console import Console

from llmrl.evaluation.passk import maj_at_k, pass_at_k, passk
from llmrl.evaluation.traces import Trace
from llmrl.records import InputError


def problem(name: str, scores: list, answers: list | None = None, **changes) -> list[Trace]:
    """Traces of one problem; a score None is a timeout, an answer None is a missing one."""
    made = []
    for i, score in enumerate(scores):
        answer = answers[i] if answers is not None else ("right" if score == 1 else f"wrong{i}")
        status = "timeout" if score is None else "no_answer" if answer is None else "ok"
        fields: dict = {"finish": "stop", "score": score, "status": status, "answer": answer} | changes
        made.append(Trace(f"{name}/{i}", name, "text", **fields))
    return made


# By hand: n = 5, c = 2: 1 - C(3,2)/C(5,2) = 1 - 3/10; n = 10, c = 3, k = 5: 1 - C(7,5)/C(10,5) = 1 - 21/252.
@pytest.mark.parametrize(
    ("n", "c", "k", "want"),
    [(5, 2, 1, 0.4), (5, 2, 2, 0.7), (5, 2, 4, 1.0), (10, 3, 5, 11 / 12), (4, 0, 4, 0.0), (4, 4, 1, 1.0), (1, 1, 1, 1.0), (8, 1, 8, 1.0)],
)
def test_pass_at_k_by_hand(n, c, k, want):
    assert pass_at_k(n, c, k) == pytest.approx(want, abs=1e-15)


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n in range(1, 8):
        for c in range(n + 1):
            right = [i < c for i in range(n)]
            for k in range(1, n + 1):
                subsets = list(combinations(right, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-14)


def test_pass_at_k_is_stable_for_large_n():
    for n, c, k in [(2000, 1, 1000), (2000, 700, 3), (5000, 20, 512)]:
        exact = 1 - Fraction(comb(n - c, k), comb(n, k))
        assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-12)
    with pytest.raises(ValueError, match="needs"):
        pass_at_k(3, 1, 4)


def majority_by_enumeration(answers: list, right: list, k: int) -> float:
    """Every subset, every tied answer, in fractions."""
    total, n_subsets = Fraction(0), 0
    accepted = {a: Fraction(sum(r for b, r in zip(answers, right, strict=True) if b == a), answers.count(a)) for a in set(answers)}
    for subset in combinations(range(len(answers)), k):
        n_subsets += 1
        votes = [answers[i] for i in subset if answers[i] is not None]
        most = max(map(votes.count, votes), default=0)
        tied = {a for a in votes if votes.count(a) == most}
        total += sum((accepted[a] for a in tied), Fraction(0)) / len(tied) if tied else 0
    return float(total / n_subsets)


def test_majority_by_hand():
    assert maj_at_k(["4", "4", "5"], [True, True, False], 3) == 1.0
    assert maj_at_k(["4", "5"], [True, False], 2) == pytest.approx(0.5)  # a tie
    # Pairs of {4, 4, 5}: (4,4) right, (4,5) twice a tie: (1 + 1/2 + 1/2) / 3.
    assert maj_at_k(["4", "4", "5"], [True, True, False], 2) == pytest.approx(2 / 3)
    assert maj_at_k(["4", "5", "5", None], [True, False, False, False], 4) == 0.0
    assert maj_at_k(["4", None, None, None], [True, False, False, False], 4) == 1.0  # one vote is a majority
    assert maj_at_k([None, None], [False, False], 2) == 0.0


def test_majority_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    for _ in range(60):
        n = int(rng.integers(1, 9))
        answers = [["a", "b", "c", "d", None][i] for i in rng.integers(0, 5, n)]
        right = [a == "a" or (a == "b" and bool(rng.integers(2))) for a in answers]
        for k in range(1, n + 1):
            assert maj_at_k(answers, right, k) == pytest.approx(majority_by_enumeration(answers, right, k), abs=1e-12)


def test_majority_of_many_samples():
    """1200 samples: C(1200, 600) is over 1e350. By symmetry two equal camps have the chance 1/2; a camp of 2 in 3 nearly always wins."""
    answers = ["a", "b"] * 600
    assert maj_at_k(answers, [a == "a" for a in answers], 601) == pytest.approx(0.5, abs=1e-9)
    answers = ["a", "a", "b"] * 400
    assert maj_at_k(answers, [a == "a" for a in answers], 101) > 0.999


def test_figures_of_three_problems_by_hand():
    traces = problem("p", [1, 1, 0, 0]) + problem("q", [0, 0, 0, 1]) + problem("r", [0, 0, 0, 0], ["1", "1", "2", None])
    result = passk(traces)
    assert [row.k for row in result.at_k] == [1, 2, 4]
    one, two, four = result.at_k
    assert one.pass_at_k.value == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    assert two.pass_at_k.value == pytest.approx((5 / 6 + 1 / 2 + 0) / 3)
    assert four.pass_at_k.value == pytest.approx(2 / 3)
    assert one.mean_at_k.value == two.mean_at_k.value == pytest.approx((2 / 4 + 1 / 4) / 3)
    # p: "right" has 2 votes against 1 and 1; q: four answers tie; r: never.
    assert four.maj_at_k.value == pytest.approx((1 + 1 / 4 + 0) / 3)
    assert one.maj_at_k.value == pytest.approx(one.pass_at_k.value)
    assert (result.problems, result.samples, result.unjudged) == (3, 12, 0)
    assert result.no_answer.value == pytest.approx(1 / 12) and result.truncated.value == 0.0
    assert result.by_status == {"no_answer": 1, "ok": 11}


def test_unjudged_samples_are_in_no_denominator():
    judged = problem("p", [1, 0]) + problem("q", [0, 0], finish="length")
    extra = [t for t in problem("p", [1, 0, None, None], finish="length") if t.score is None] + problem("z", [None, None])
    plain, mixed = passk(judged), passk(judged + extra)
    assert mixed.at_k == plain.at_k
    assert mixed.truncated == plain.truncated and mixed.truncated.value == 0.5
    assert (mixed.samples, mixed.unjudged, mixed.problems, mixed.problems_unjudged) == (4, 4, 2, 1)
    assert mixed.by_status == {"ok": 4, "timeout": 4}


def test_k_over_the_samples_of_a_problem():
    traces = problem("p", [1, 0, 0, 0]) + problem("q", [1, 1])
    result = passk(traces, ks=[2, 4, 8])
    assert [row.problems for row in result.at_k] == [2, 1, 0]
    assert result.at_k[0].pass_at_k.value == pytest.approx((1 / 2 + 1) / 2)
    assert result.at_k[1].pass_at_k.value == 1.0 and result.at_k[1].mean_at_k.value == 0.25
    assert result.at_k[1].pass_at_k.low is None
    assert result.at_k[2].pass_at_k.value is None
    assert [row.k for row in passk(problem("p", [1] * 6)).at_k] == [1, 2, 4, 6]


def test_a_vote_needs_answers():
    traces = problem("p", [1, 1], ["4", "4"]) + problem("q", [1, 0], ["4", None], status="ok")
    row = passk(traces, ks=[2]).at_k[0]
    assert (row.problems, row.maj_problems, row.maj_at_k.value) == (2, 1, 1.0)


def test_partial_scores_and_the_threshold():
    traces = problem("p", [0.5, 1.0], ["a", "b"]) + problem("q", [0.25, 0.5], ["a", "b"])
    strict, lenient = passk(traces, ks=[1]).at_k[0], passk(traces, ks=[1], threshold=0.5).at_k[0]
    assert strict.mean_at_k.value == lenient.mean_at_k.value == pytest.approx((0.75 + 0.375) / 2)
    assert strict.pass_at_k.value == 0.25 and lenient.pass_at_k.value == 0.75


def test_rates_that_are_unknown_are_none():
    result = passk([Trace("a", "p", "x", score=1.0), Trace("b", "q", "x", score=0.0)])
    assert result.truncated.value is None and result.no_answer.value is None and result.at_k[0].maj_at_k.value is None
    assert result.by_status == {"none": 2}
    nothing = passk(problem("p", [None]))
    assert nothing.at_k == () and nothing.problems == 0 and nothing.unjudged == 1
    json.dumps(nothing.to_json())


def test_bootstrap_is_seeded_and_covers_the_binomial():
    traces = [t for i in range(100) for t in problem(f"p{i}", [int(i < 30)])]
    first, again, other = (passk(traces, seed=seed).at_k[0].pass_at_k for seed in (0, 0, 1))
    assert first == again and first != other
    assert first.value == pytest.approx(0.3)
    # Sum of 100 draws with p = 0.3: the 2.5 and 97.5 percentiles of Binomial(100, 0.3) are 21 and 39.
    assert first.low == pytest.approx(0.21, abs=0.011) and first.high == pytest.approx(0.39, abs=0.011)


def test_order_of_the_traces_does_not_matter():
    traces = [t for i in range(9) for t in problem(f"p{i}", [int(j < i % 4) for j in range(4)])]
    forward, backward = passk(traces).to_json(), passk(sorted(traces, key=lambda t: (t.prompt_id, t.id[::-1]))).to_json()
    assert forward == backward


def test_what_is_refused():
    with pytest.raises(InputError, match="no traces"):
        passk([])
    with pytest.raises(InputError, match="2 models"):
        passk(problem("p", [1], model="a") + problem("q", [1], model="b"))
    with pytest.raises(InputError, match="ks"):
        passk(problem("p", [1]), ks=[0])


def test_json_and_table():
    traces = problem("p", [1, 0, 0]) + problem("q", [0, 0, 0]) + problem("r", [1, 1, 1], status=None, answer=None)
    result = passk(traces, ks=[1, 3, 5])
    row = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert row["at_k"][0]["pass_at_k"]["value"] == pytest.approx(4 / 9) and row["at_k"][2]["pass_at_k"]["value"] is None
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(result.table())
    text = console.export_text()
    assert "44.4 [" in text and "pass@k" in text and "3 problems, 9 judged samples" in text

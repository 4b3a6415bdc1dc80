"""Selection gain: by hand, its limiting cases, the draw of pairs, and what foretells it."""

import math

import numpy as np
import pytest

from llmrl.evaluation.dimensions import FunctionJudge, Judgement
from llmrl.evaluation.frs import FRSResult, Options, frs, plan
from llmrl.evaluation.pool import kept, scan
from llmrl.evaluation.selection import drawn_pairs, foretold, most_confident, selection_gain
from llmrl.records import InputError
from tests.test_frs import pool_of, traces_of

C = np.array([[0.2, 0.9, 0.5], [0.8, 0.1, 0.3], [0.4, 0.4, 0.6]])
R = np.array([[0.5, 1.0, 0.0], [0.25, 0.75, 0.5], [1.0, 0.5, 0.0]])


def judged(c: np.ndarray, r: np.ndarray, **how: object) -> FRSResult:
    values = {f"p{q:03}/{s}": float(r[q, s]) for q in range(len(r)) for s in range(r.shape[1])}
    return frs(traces_of(c), judge=FunctionJudge(lambda case: values[case.id]), **{"subsample": None, "resamples": 500, **how})  # type: ignore[arg-type]


def test_gain_by_hand_where_all_is_judged():
    gain = judged(C, R).gain  # the most confident: 1.0, 0.25, 0.0; means 0.5, 0.5, 0.5
    assert gain.value == pytest.approx(100 * (0.5 - 0.25 - 0.5) / 3) and (gain.n, gain.of) == (3, 3)
    assert FRSResult.from_json(judged(C, R).to_json()).gain == gain


def test_a_result_of_before_is_still_read():
    row = judged(C, R).to_json()
    del row["gain"]
    assert FRSResult.from_json(row).gain.value is None


def test_the_ends():
    rng = np.random.default_rng(0)
    r = rng.uniform(0, 1, (400, 8))
    c = 0.05 + 0.9 * rng.uniform(0, 1, r.shape)
    best, none, worst = (judged(x, r).gain for x in (0.01 + 0.98 * r, c, 0.99 - 0.98 * r))
    assert best.value == pytest.approx(100 * float((r.max(1) - r.mean(1)).mean()))  # E = 8/9 - 1/2
    assert best.value == pytest.approx(100 * (8 / 9 - 1 / 2), abs=1.5)
    assert none.low is not None and none.high is not None and none.low < 0 < none.high
    assert worst.value == pytest.approx(-100 * (1 / 2 - 1 / 9), abs=1.5)
    assert judged(c[:, :1], r[:, :1]).gain.value is None  # one trace a problem: nothing to choose from
    assert judged(c**3, r).gain == none  # only ranks count


def test_only_the_order_within_a_problem_counts_and_frs_may_go_the_other_way():
    c = np.array([[0.9, 0.8], [0.2, 0.1]])
    gain = judged(c, np.array([[0.0, 1.0], [0.0, 1.0]]), k=0.5, ks=(0.5, 1.0))
    assert gain.gain.value == -50.0 and gain.frs.value == gain.unfiltered.value == 50.0


def test_pairs_are_drawn_by_name_and_asked_for():
    rng = np.random.default_rng(1)
    traces = traces_of(rng.uniform(0.1, 0.9, (60, 8)))
    (pool,) = scan(traces, Options().confidence).values()
    pairs = drawn_pairs(pool, 20, "m", "all", 42)
    assert pairs.shape == (20, 2) and (pool.problem_N[pairs[:, 0]] == pool.problem_N[pairs[:, 1]]).all() and len(set(pool.problem_N[pairs[:, 0]])) == 20
    assert set(pairs[:, 0]) <= set(most_confident(pool)) and len(set(most_confident(pool))) == 60
    for top in most_confident(pool):
        assert pool.confidence_N[top] == pool.confidence_N[pool.problem_N == pool.problem_N[top]].max()
    np.testing.assert_array_equal(drawn_pairs(pool, 30, "m", "all", 42)[:20], pairs)  # a larger draw contains the smaller
    assert (drawn_pairs(pool, 20, "m", "other", 42) != pairs).any()
    with_it, without = (plan(pool, Options(subsample=5, selection=n)) for n in (20, 0))
    assert set(with_it.asked) == set(without.asked) | set(pairs.ravel()) and len(without.pairs) == 0
    np.testing.assert_array_equal(with_it.asked[: len(without.asked)], without.asked)  # what the headline rests on is asked first


def test_a_draw_estimates_the_gain_of_all():
    rng = np.random.default_rng(2)
    r = rng.uniform(0, 1, (300, 6))
    c = 0.1 + 0.4 * r + 0.4 * rng.uniform(0, 1, r.shape)
    (pool,) = scan(traces_of(c), Options().confidence).values()
    asked, values = np.zeros(len(pool), bool), r.ravel()[pool.row_N]
    whole = selection_gain(pool, values, np.ones(len(pool), bool), np.zeros((0, 2), int), resamples=10, seed=0).value
    found = []
    for seed in range(60):
        pairs = drawn_pairs(pool, 50, seed)
        asked[:] = False
        asked[pairs] = True
        found.append(selection_gain(pool, values, asked, pairs, resamples=10, seed=0).value)
    assert whole is not None and np.mean(found) == pytest.approx(whole, abs=3 * np.std(found) / math.sqrt(60)) and whole > 15


def test_failures_are_left_out_and_half_a_draw_is_none():
    def fn(case):
        return Judgement(failure="no", failed="reply") if case.id == "p000/1" else float(R[int(case.id[1:4]), int(case.id[5:])])

    result = frs(traces_of(C), judge=FunctionJudge(fn), subsample=None, resamples=50)
    assert result.gain.value == pytest.approx(100 * (-0.25 - 0.5) / 2) and (result.gain.n, result.gain.of) == (2, 3)
    pool = pool_of(np.linspace(0.9, 0.1, 6), problems=2)
    pairs = np.array([[0, 2], [1, 3]])
    asked = np.array([True, True, True, False, False, False])
    assert selection_gain(pool, np.ones(6), asked, pairs, resamples=10, seed=0).value is None
    assert kept(pool, 0.5)[0] == most_confident(pool)[0]


def test_what_foretells_the_gain():
    found = foretold([1.0, 2.0, None, 3.0], {"up": [1.0, 2.0, 9.0, 3.0], "down": [3.0, 2.0, 0.0, 1.0], "flat": [1.0] * 4, "few": [1.0, None, 2.0, 2.0]})
    assert found["mean"] == 2.0 and found["pairs"] == 3
    assert [(p["pearson"], p["pairs"]) for p in found["predictors"]] == [(pytest.approx(1.0), 3), (pytest.approx(-1.0), 3), (None, 3), (None, 2)]
    assert foretold([None], {})["mean"] is None
    with pytest.raises(InputError, match="selection"):
        Options(selection=1)

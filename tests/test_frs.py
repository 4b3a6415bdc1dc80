"""The filter and the estimator: the checks of frs.md section 6 (1, 2, 5 to 13) with their numbers, and what a pool says without a judge."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from llmrl.evaluation.confidence import Confidence, Guard
from llmrl.evaluation.dimensions import FunctionJudge, Judgement, quality
from llmrl.evaluation.estimator import Values, bootstrap_means, draw, estimate, shells, tenths
from llmrl.evaluation.frs import FRSResult, Options, frs, plan
from llmrl.evaluation.pool import Pool, accuracy, composition, diagnostics, ece, kept, repetition, scan, size_at
from llmrl.evaluation.traces import Trace
from llmrl.records import InputError

GOOD = {"faithfulness": 5, "utility": 4, "coherence": 5, "factuality": 4}


def traces_of(confidence_QS: np.ndarray, score_QS: np.ndarray | None = None, **more: object) -> list[Trace]:
    """One token a trace, so that its confidence is the number given; problem p003, sample 7 is p003/7."""
    found = []
    for q, row in enumerate(confidence_QS):
        for s, c in enumerate(row):
            score = 1.0 if score_QS is None else float(score_QS[q, s])
            found.append(Trace(
                id=f"p{q:03}/{s}", prompt_id=f"p{q:03}", prompt=f"problem {q}", response=f"trace {q} {s}", gold="1", raw_logprobs=[math.log(c)],
                token_ids=[5], score=score, status="ok", model="m", sample=s, **more,  # type: ignore[arg-type]
            ))  # fmt: skip
    return found


def pool_of(confidence: np.ndarray, problems: int = 1) -> Pool:
    n = len(confidence)
    zeros = np.zeros(n, int)
    return Pool("m", "b", [f"p{i:06}" for i in range(problems)], np.arange(n), np.arange(n) % problems, np.arange(n) // problems, confidence, np.ones(n),
                zeros, np.zeros(n), zeros, zeros)  # fmt: skip


def frs_of(c: np.ndarray, r: np.ndarray, k: float) -> float:
    index = kept(pool_of(c), k)
    found = estimate([Values(r[index], len(index), complete=True)], resamples=10, seed=0, scale=100).value
    assert found is not None
    return found


def judge_by(values: dict[str, float], name: str = "j") -> FunctionJudge:
    return FunctionJudge(lambda case: values[case.id], name)


# ---------------------------------------------------------------- 1, 2: the ends of K, the map of scores


def test_k_100_is_the_plain_mean_and_the_kept_sets_are_nested():
    rng = np.random.default_rng(0)
    traces = traces_of(rng.uniform(0.01, 1, (13, 5)))
    r = {t.id: rng.integers(0, 17) / 16 for t in traces}
    result = frs(traces, judge=judge_by(r), subsample=None, resamples=200)
    assert result.unfiltered.value == pytest.approx(100 * np.mean(list(r.values())), abs=1e-12) == result.by_k[1.0].value
    assert (result.unfiltered.n, result.unfiltered.of, result.unfiltered.se) == (65, 65, 0.0)
    pool = scan(traces, Confidence())["m", "all"]
    sets = [kept(pool, k) for k in (1e-6, 0.05, 0.1, 0.33, 0.5, 1.0)]
    assert [len(s) for s in sets] == [1, 3, 6, 21, 32, 65] == [size_at(k, 65) for k in (1e-6, 0.05, 0.1, 0.33, 0.5, 1.0)]
    assert all(set(a) < set(b) for a, b in pairwise(sets))
    assert result.frs.value == pytest.approx(100 * np.mean([r[traces[i].id] for i in sets[2]]))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((1, 1, 1, 1), 0.0), ((5, 5, 5, 5), 1.0), ((5, 4, 5, 4), 0.875), ((2, 1, 1, 1), 0.0625), ((0, 5, 5, 5), None), ((6, 5, 5, 5), None),
     ((4.5, 5, 5, 5), None), ((True, 5, 5, 5), None), (("5", 5, 5, 5), None)],
)  # fmt: skip
def test_score_map(scores, expected):
    named = dict(zip(("faithfulness", "utility", "coherence", "factuality"), scores, strict=True))
    assert quality(named) == expected
    if expected is not None:
        assert expected == np.mean([(s - 1) / 4 for s in scores])
    assert quality({k: v for k, v in named.items() if k != "utility"}) is None and quality(None) is None


def test_failed_judgements_are_excluded_and_counted():
    traces = traces_of(np.linspace(0.1, 0.9, 20).reshape(4, 5))
    said = {t.id: Judgement(failure="no JSON", failed="reply") if t.sample == 0 else GOOD for t in traces}
    result = frs(traces, judge=FunctionJudge(lambda c: said[c.id]), subsample=None, resamples=100)
    assert (result.unfiltered.value, result.unfiltered.n, result.unfiltered.of) == (87.5, 16, 20)
    assert result.dropped["judgement failed"] == 4
    failed = [t for t in result.judged if t.failure]
    assert len(failed) == 4 and all(t.quality is None and t.scores is None for t in failed)


# ---------------------------------------------------------------- 5 to 8: what the filter does to a mean


def test_uninformative_confidence_leaves_the_mean():
    rng = np.random.default_rng(1)
    r = rng.integers(0, 17, 200_000) / 16
    for k in (0.1, 0.2, 0.5, 1.0):
        assert frs_of(rng.uniform(size=200_000), r, k) == pytest.approx(50.0, abs=1.0)


@pytest.mark.parametrize("k", [0.1, 0.2, 0.5, 1.0])
def test_perfect_ranking(k):
    r = np.random.default_rng(2).uniform(size=100_000)
    assert frs_of(r, r, k) == pytest.approx(100 * (1 - k / 2), abs=0.3)


@pytest.mark.parametrize(("correlation", "spread"), [(0.5, 0.2), (0.0, 0.2), (-0.3, 0.1), (1.0, 0.2)])
def test_gaussian_gain(correlation, spread):
    rng = np.random.default_rng(3)
    c, noise = rng.standard_normal((2, 400_000))
    r = 0.5 + spread * (correlation * c + math.sqrt(1 - correlation**2) * noise)
    assert frs_of(c, r, 0.10) - 100 * r.mean() == pytest.approx(175.5 * correlation * spread, abs=0.5)
    phi_over_k = math.exp(-(1.2815515655446004**2) / 2) / math.sqrt(2 * math.pi) / 0.10  # z of the upper tenth
    assert 100 * phi_over_k == pytest.approx(175.5, abs=0.05)


def test_only_ranks_count():
    rng = np.random.default_rng(4)
    c, r = rng.uniform(0.01, 1, 5000), rng.integers(0, 17, 5000) / 16
    for transform in (np.log, np.square, lambda x: 1 / (1 + np.exp(-20 * x))):
        for k in (0.01, 0.1, 0.5):
            assert frs_of(transform(c), r, k) == frs_of(c, r, k)


# ---------------------------------------------------------------- 9, 10: what the filter may not look at, and its pool


def test_the_filter_does_not_see_correctness():
    rng = np.random.default_rng(5)
    c, right = rng.uniform(0.1, 1, (20, 8)), rng.integers(0, 2, (20, 8))
    seen_a, seen_b = {}, {}

    def spy(store):
        def fn(case):
            store[case.id] = case.correct
            return GOOD

        return fn

    a = frs(traces_of(c, right), judge=FunctionJudge(spy(seen_a)), subsample=None, resamples=10)
    b = frs(traces_of(c, 1 - right), judge=FunctionJudge(spy(seen_b)), subsample=None, resamples=10)
    assert [(t.id, t.rank) for t in a.judged] == [(t.id, t.rank) for t in b.judged]
    assert seen_a == {name: not value for name, value in seen_b.items()}  # the judge's input is what changes


def test_the_pool_is_global_and_a_filter_within_problems_is_not():
    rng = np.random.default_rng(6)
    c = rng.uniform(0.01, 0.5, (10, 16))
    c[4] += 0.5  # one problem is surer throughout
    pool = scan(traces_of(c), Confidence())["m", "all"]
    assert set(pool.problem_N[kept(pool, 0.10)]) == {4} and len(kept(pool, 0.10)) == 16
    own = kept(pool, 0.10, per_problem=True)
    assert sorted(pool.problem_N[own]) == list(range(10))  # floor(1.6) = 1 of each
    for i in own:
        assert pool.confidence_N[i] == c[pool.problem_N[i]].max()
    sizes = [len(kept(pool, k, per_problem=True)) for k in (0.1, 0.2, 0.5, 1.0)]
    assert sizes == [10, 30, 80, 160]
    found = composition(pool, kept(pool, 0.10))
    assert (found["problem_share"], found["most"], found["most_problem"], found["always_solved"]) == (0.1, 16, "p004", 1.0)


def test_ties_are_broken_by_problem_then_sample_whatever_the_order_of_the_file():
    traces = traces_of(np.full((4, 3), 0.5))
    shuffled = [traces[i] for i in np.random.default_rng(7).permutation(12)]
    pool = scan(shuffled, Confidence())["m", "all"]
    assert [shuffled[pool.row_N[i]].id for i in kept(pool, 0.5)] == ["p000/0", "p000/1", "p000/2", "p001/0", "p001/1", "p001/2"]


# ---------------------------------------------------------------- 11, 12: bins, draws, standard errors


@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 25, 100, 101, 999, 1000, 1004])
def test_bins_as_in_the_released_estimator(n):
    pool = pool_of(np.random.default_rng(n).uniform(size=n))
    order, half, bins = pool.order(), n // 2, tenths(pool)
    assert [k for k, _ in bins] == [i / 10 for i in range(1, 11)]
    np.testing.assert_array_equal(np.concatenate([index for _, index in bins]), order)  # all of the pool, once, by rank
    for r in range(half):
        b = min(4, 5 * r // half)
        assert order[r] in bins[b][1]
    assert abs(len(bins[0][1]) - n // 10) <= 1 and len(bins[0][1]) == math.ceil(half / 5)
    assert [k for k, _ in tenths(pool, top_half=True)] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_a_stratified_draw_estimates_the_mean_of_the_pool():
    rng = np.random.default_rng(8)
    c = rng.uniform(size=(200, 10)) * 0.9 + 0.05
    traces = traces_of(c)
    r = {t.id: float(np.clip(c[int(t.prompt_id[1:]), t.sample or 0] + rng.normal(0, 0.2), 0, 1)) for t in traces}
    exact = frs(traces, judge=judge_by(r), subsample=None, resamples=50)
    found = [frs(traces, judge=judge_by(r), seed=s, resamples=50) for s in range(40)]
    for k in (0.1, 0.2, 0.5, 1.0):
        z = [(f.by_k[k].value - exact.by_k[k].value) / f.by_k[k].se for f in found]  # type: ignore[operator]
        assert abs(np.mean(z)) < 0.5 and 0.7 < np.std(z) < 1.35  # unbiased, and the standard error is what it says
        assert all((f.by_k[k].n, f.by_k[k].of) == (round(500 * k), round(2000 * k)) for f in found)
    assert found[0].settings["strata"][0] == {"k": 0.1, "traces": 200, "drawn": 50}
    assert len({f.frs.value for f in found}) > 35 and found[0] == frs(traces, judge=judge_by(r), seed=0, resamples=50)


def test_standard_error_with_the_finite_population_correction():
    value = np.array([0.0, 0.25, 0.5, 1.0, 1.0] * 10)
    found = estimate([Values(value, 132)], resamples=100, seed=0, scale=100)
    assert found.value == pytest.approx(55.0)
    assert found.se == pytest.approx(100 * value.std(ddof=1) / math.sqrt(50) * math.sqrt(1 - 50 / 132))
    two = estimate([Values(value, 132), Values(value[:30], 68)], resamples=100, seed=0)
    parts = [v.std(ddof=1) ** 2 / len(v) * (1 - len(v) / n) * (n / 200) ** 2 for v, n in ((value, 132), (value[:30], 68))]
    assert two.se == pytest.approx(math.sqrt(sum(parts))) and two.value == pytest.approx((132 * 0.55 + 68 * value[:30].mean()) / 200)
    assert estimate([Values(value, 132), Values(value[:0], 68)], resamples=10, seed=0).value is None  # nothing is known of the second part
    assert estimate([Values(value[:1], 9)], resamples=10, seed=0) == replace(found, value=0.0, low=None, high=None, se=None, n=1, of=9)


def test_draws_hang_on_the_names_alone_and_grow():
    index = np.arange(1000, 1300)
    a = draw(index, 50, "m", "gsm8k", 0, 42)
    assert len(set(a)) == 50 and set(a) <= set(index)
    np.testing.assert_array_equal(draw(index, 120, "m", "gsm8k", 0, 42)[:50], a)
    assert all(set(draw(index, 50, *other)) != set(a) for other in (("n", "gsm8k", 0, 42), ("m", "math", 0, 42), ("m", "gsm8k", 1, 42), ("m", "gsm8k", 0, 43)))
    assert a[:4].tolist() == [1159, 1277, 1233, 1125]  # SHA-256 and raw Philox: the same on every machine
    assert sorted(draw(index, None, "x")) == list(index)


def test_the_papers_draw_asks_for_250_and_the_default_for_the_lower_half_too():
    pool = pool_of(np.random.default_rng(9).uniform(size=1600), problems=100)
    paper, ours = plan(pool, Options(ks=(0.1, 0.2, 0.5), top_half=True)), plan(pool, Options())
    assert len(paper.asked) == 250 and len(paper.strata) == 5
    assert [len(s.drawn) for s in ours.strata] == [50] * 10 and len(ours.single) == 50 and 500 < len(ours.asked) <= 550
    assert set(ours.asked[:50]) == set(ours.strata[0].drawn)  # the headline first: a budget that ends hits the rest
    small = plan(pool_of(np.random.default_rng(9).uniform(size=45), problems=9), Options())
    assert [len(s.drawn) for s in small.strata] == [4, 5, 4, 5, 4, 5, 4, 5, 4, 5]  # all are judged, so the cuts are exact: floor(0.1 * 45)
    odd = plan(pool, Options(k=0.15, ks=(0.4,)))
    assert [(s.k, len(s.index), len(s.drawn)) for s in odd.strata] == [(0.15, 240, 50), (0.4, 400, 50)]


def test_shells_cover_what_each_k_adds():
    pool = pool_of(np.random.default_rng(10).uniform(size=160), problems=10)
    for per_problem in (False, True):
        found, seen = shells(pool, (0.1, 0.5, 1.0), per_problem=per_problem), set()
        for k, index in found:
            assert not seen & set(index)
            seen |= set(index)
            assert seen == set(kept(pool, k, per_problem=per_problem))


# ---------------------------------------------------------------- 13: the bootstrap


@pytest.mark.parametrize("levels", [17, None])
def test_bootstrap_spread(levels):
    rng = np.random.default_rng(11)
    value = rng.uniform(size=50) if levels is None else rng.integers(0, levels, 50) / 16
    means = bootstrap_means([Values(value, 132)], resamples=10_000, seed=0)
    assert means is not None and len(means) == 10_000
    assert means.std() == pytest.approx(value.std(ddof=1) * math.sqrt(49 / 50) / math.sqrt(50), rel=0.03)
    assert means.mean() == pytest.approx(value.mean(), abs=0.003)


def test_drawing_counts_is_drawing_values():
    value = np.repeat([0.0, 0.25, 1.0], [300, 100, 400])  # many equal values: drawn as counts
    by_count = bootstrap_means([Values(value, 800)], resamples=20_000, seed=1)
    rng = np.random.default_rng(2)
    plain = np.array([rng.choice(value, 800).mean() for _ in range(4000)])
    assert by_count is not None
    np.testing.assert_allclose(np.percentile(by_count, [2.5, 25, 50, 75, 97.5]), np.percentile(plain, [2.5, 25, 50, 75, 97.5]), atol=0.004)


def test_problems_can_be_resampled_whole():
    """16 equal traces a problem: the mean is one of 20 problems, not of 320 traces."""
    rng = np.random.default_rng(12)
    per_problem = rng.uniform(size=20)
    value, group = np.repeat(per_problem, 16), np.repeat(np.arange(20), 16)
    whole = bootstrap_means([Values(value, 320, group)], resamples=10_000, seed=0)
    single = bootstrap_means([Values(value, 320)], resamples=10_000, seed=0)
    assert whole is not None and single is not None
    assert whole.std() == pytest.approx(per_problem.std() / math.sqrt(20), rel=0.05) and whole.std() / single.std() == pytest.approx(4.0, rel=0.05)


# ---------------------------------------------------------------- without a judge


def test_calibration_error_by_hand():
    pool = pool_of(np.array([0.95, 0.95, 0.15, 0.15, 1.0]))
    pool.score_N = np.array([1.0, 0.0, 0.0, np.nan, 1.0])
    # bin 9: 0.95, 0.95, 1.0, two of three right: |2 - 2.9| ; bin 1: 0.15, none right: 0.15; over 4 judged
    assert ece(pool) == pytest.approx((0.9 + 0.15) / 4)
    pool.confidence_N = np.array([-1.0, -2.0, -3.0, -4.0, -5.0])
    assert ece(pool) is None and accuracy(pool, np.array([3])) is None


def test_accuracies_come_from_the_same_traces():
    score = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0.5]], float)
    c = np.array([[0.9, 0.8, 0.7, 0.1], [0.95, 0.2, 0.3, 0.4], [0.5, 0.6, 0.15, 0.25]])
    result = frs(traces_of(c, score), judge=FunctionJudge(lambda case: GOOD), subsample=None, ks=(0.25, 1.0), k=0.25, resamples=100)
    assert result.pass_at_1.value == pytest.approx((0.5 + 0.25 + 0) / 3) and result.mean_at_k.value == pytest.approx((0.5 + 0.25 + 0.125) / 3)
    assert result.top_accuracy == {0.25: 1.0, 1.0: 0.25} and result.frs.n == 3 and result.single_trace.n == 3
    first = [(t.id, t.rank, t.bin, t.correct) for t in result.judged[:4]]
    assert first == [("p001/0", 0, 0, 1.0), ("p000/0", 1, 0, 1.0), ("p000/1", 2, 0, 1.0), ("p000/2", 3, 1, 0.0)]


def test_length_repetition_and_truncation_are_told_for_pool_and_kept():
    honest = Trace(id="a", prompt_id="p", response="", raw_logprobs=[-3.0] * 8, token_ids=list(range(8)), finish="stop", model="m", sample=0)
    loop = Trace(id="b", prompt_id="p", response="", raw_logprobs=[-0.1] * 40, token_ids=[9] * 40, finish="length", model="m", sample=1)
    pool = scan([honest, loop], Confidence())["m", "all"]
    found = diagnostics(pool, kept(pool, 0.5))
    assert found["length"] == {"pool": 24.0, "kept": 40.0, "with_confidence": pytest.approx(1.0)}
    assert found["repetition"]["kept"] == pytest.approx(36 / 37) and found["repeated_tails"]["pool"] == 0.5
    assert found["truncation"] == {"pool": 0.5, "kept": 1.0, "with_confidence": pytest.approx(1.0)}
    guarded = scan([honest, loop], Confidence(guard=Guard()))["m", "all"]
    assert guarded.confidence_N == pytest.approx(np.exp([-3.0, -0.1]))


def test_repetition_by_hand():
    assert repetition(np.array([1, 2, 3])) == 0.0 and repetition(np.arange(100)) == 0.0
    assert repetition(np.array([1, 2, 1, 2, 1, 2, 1])) == pytest.approx(1 - 2 / 4)  # 1212 2121 1212 2121


def test_vote_share_counts_the_samples_of_a_problem():
    answers = [["7", "7", "8", None], ["x", "x", "x", "x"]]
    traces = [Trace(id=f"{q}/{s}", prompt_id=str(q), response="", answer=a, model="m", sample=s) for q, row in enumerate(answers) for s, a in enumerate(row)]
    pool = scan(traces, Confidence("vote_share"))["m", "all"]
    assert pool.confidence_N.tolist() == [0.5, 0.5, 0.25, 0.0, 1.0, 1.0, 1.0, 1.0]


def test_a_trace_without_confidence_is_dropped_counted_and_still_in_pass_at_1():
    traces = traces_of(np.full((2, 2), 0.5), np.array([[1, 1], [1, 1]]))
    traces.append(Trace(id="e", prompt_id="p000", response="", raw_logprobs=[], token_ids=[], score=0.0, status="ok", model="m", sample=2))
    result = frs(traces, judge=FunctionJudge(lambda case: GOOD), subsample=None, resamples=50)
    assert result.traces == 4 and result.dropped["no tokens"] == 1
    assert result.pass_at_1.value == pytest.approx((2 / 3 + 1) / 2)


def test_a_pool_holds_a_few_numbers_a_trace_and_no_text():
    def stream():
        for i in range(5000):
            logps = [-0.1 * (i % 7 + 1)] * 30
            yield Trace(id=str(i), prompt_id=str(i // 16), response="x" * 2000, raw_logprobs=logps, token_ids=list(range(30)), model="m", sample=i % 16)

    pool = scan(stream(), Confidence())["m", "all"]
    assert len(pool) == 5000 and sum(v.nbytes for v in vars(pool).values() if isinstance(v, np.ndarray)) <= 64 * 5000


# ---------------------------------------------------------------- the function's contract


def test_results_survive_json_and_a_baseline_is_no_frs():
    traces = traces_of(np.random.default_rng(13).uniform(0.1, 1, (8, 4)))
    result = frs(traces, judge=FunctionJudge(lambda case: GOOD), resamples=50)
    told = json.loads(json.dumps(result.to_json()))
    assert FRSResult.from_json(told) == result and told["frs"]["value"] == 87.5 and "baseline" not in told
    from llmrl.evaluation.rules_baseline import RulesBaseline

    other = frs(traces, judge=RulesBaseline(), resamples=50)
    told = json.loads(json.dumps(other.to_json()))
    assert told["frs"] is None and told["baseline"]["value"] is not None and "not FRS" in told["label"] and FRSResult.from_json(told) == other
    assert "FRS" not in other.table().title.replace("not FRS", "")  # type: ignore[union-attr, operator]
    with pytest.raises(InputError, match="no FRS result"):
        FRSResult.from_json({"model": "m"})


def test_several_models_or_none_are_refused():
    traces = traces_of(np.full((2, 2), 0.5))
    with pytest.raises(InputError, match="2 pairs"):
        frs([*traces, replace(traces[0], id="x", model="other")], judge=FunctionJudge(lambda case: GOOD))
    with pytest.raises(InputError, match="0 pairs"):
        frs([], judge=FunctionJudge(lambda case: GOOD))
    with pytest.raises(InputError, match="gold"):
        frs([replace(t, gold=None) for t in traces], judge=FunctionJudge(lambda case: GOOD))
    with pytest.raises(InputError, match="verifier"):
        frs([replace(t, score=None, status=None) for t in traces], judge=FunctionJudge(lambda case: GOOD))
    blind = [replace(t, gold=None, score=None, status=None) for t in traces]
    assert frs(blind, judge=FunctionJudge(lambda case: GOOD, blind=True), resamples=50).frs.value == 87.5
    assert frs((t for t in traces), judge=FunctionJudge(lambda case: GOOD), resamples=50).traces == 4  # a generator is held


@pytest.mark.parametrize("bad", [{"k": 0.0}, {"k": 1.2}, {"ks": (0.5, 2.0)}, {"subsample": 1}, {"top_half": True, "k": 0.6}, {"top_half": True, "k": 0.15},
                                 {"resamples": 0}])
def test_options_that_make_no_sense_are_refused(bad):
    with pytest.raises(InputError):
        Options(**bad)


def test_k_is_a_name_too():
    traces = traces_of(np.random.default_rng(14).uniform(0.1, 1, (100, 8)))
    result = frs(traces, judge=FunctionJudge(lambda case: GOOD), k=3 * 0.1, resamples=50)  # 0.30000000000000004
    assert result.k == 0.3 and result.frs == result.by_k[0.3]
    paper = frs(traces, judge=FunctionJudge(lambda case: GOOD), top_half=True, resamples=50)
    assert list(paper.by_k) == [0.1, 0.2, 0.3, 0.4, 0.5] and len(paper.judged) == 250 and paper.unfiltered.value is None and paper.single_trace.value is None


def test_running_inside_a_notebooks_loop():
    import asyncio

    async def cell() -> FRSResult:
        return frs(traces_of(np.full((2, 2), 0.5)), judge=FunctionJudge(lambda case: GOOD), resamples=50)

    assert asyncio.run(cell()).frs.value == 87.5

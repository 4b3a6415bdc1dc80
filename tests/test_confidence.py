"""Confidence of a trace: hand numbers of frs.md section 6 (checks 3, 4, 8), the other measures, the repetition guard, and token alignment (14)."""

import math

import numpy as np
import pytest

from llmrl.evaluation.confidence import Confidence, Guard, low_tokens, n_low, tail_mean, vote_shares
from llmrl.evaluation.traces import Trace
from llmrl.records import InputError


def logs(values: list[float]) -> list[float]:
    return [math.log(v) for v in values]


def trace(probs: list[float] | None, **more: object) -> Trace:
    values: dict = {"id": "t", "prompt_id": "p", "response": "r", "raw_logprobs": None if probs is None else logs(probs), **more}
    return Trace(**values)


@pytest.mark.parametrize(
    ("probs", "expected"),
    [([0.9] * 23 + [0.2, 0.4], 0.30), ([0.5, 0.3, *[0.7] * 7], 0.3), ([0.6], 0.6), ([0.1] + [0.9] * 9, 0.10), ([0.1] + [0.9] * 9 + [1.0] * 90, 0.82)],
)
def test_tail_mean_by_hand(probs, expected):
    assert tail_mean(logs(probs)) == pytest.approx(expected, abs=1e-12)


def test_the_tail_holds_max_1_floor_of_the_share():
    assert [n_low(t, 0.10) for t in (1, 9, 10, 19, 20, 25, 30)] == [1, 1, 1, 1, 2, 2, 3]
    assert n_low(100, 0.29) == 29  # 0.29 * 100 is 28.999999999999996
    assert tail_mean(logs([0.2, 0.4, 0.6, 0.8]), 0.5) == pytest.approx(0.3) and tail_mean(logs([0.2, 0.4]), 1.0) == pytest.approx(0.3)


def test_order_does_not_matter_and_a_larger_p_never_lowers_c():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.01, 1, 57)
    c = tail_mean(np.log(p))
    assert {tail_mean(np.log(rng.permutation(p))) for _ in range(20)} == {c}  # to the last bit: ties stay ties
    for i in range(len(p)):
        raised = p.copy()
        raised[i] = min(1.0, raised[i] + 0.05)
        assert tail_mean(np.log(raised)) >= c


def test_low_tokens_are_those_of_the_mean():
    p = [0.9] * 23 + [0.2, 0.4]
    assert low_tokens(logs(p)) == [23, 24]
    assert low_tokens(logs([0.5] * 20)) == [0, 1]  # ties: the earlier
    assert low_tokens([]) == []


# ---------------------------------------------------------------- the guard


def test_the_guard_undoes_the_padding_exploit():
    honest, padded = [0.1] + [0.9] * 9, [0.1] + [0.9] * 9 + [1.0] * 90
    ids = [*range(10), *[77] * 90]
    assert Confidence().of(trace(padded, token_ids=ids))[0] == pytest.approx(0.82)
    guarded = Confidence(guard=Guard())
    assert guarded.of(trace(padded, token_ids=ids))[0] == pytest.approx(0.10) == Confidence().of(trace(honest))[0]
    assert guarded.low(trace(padded, token_ids=ids)) == [0]  # 11 tokens are left, so the tail is one
    assert guarded.of(trace(padded, tokens=[str(i) for i in ids]))[0] == pytest.approx(0.10)  # texts do as well
    with pytest.raises(InputError, match="neither token_ids nor tokens"):
        guarded.of(trace(padded))


@pytest.mark.parametrize(
    ("ids", "span"),
    [
        ([*range(10), *[1, 2, 3] * 20, 5], (13, 70)),  # a loop of three, then an end token: the first round and the end stay
        ([*range(10), *[1, 2, 3] * 20, 1, 2], (13, 72)),  # cut off within a round
        ([*range(10), *list(range(20, 60)) * 3], (50, 130)),
        ([*range(10), *list(range(20, 60)) * 2], None),  # twice is no loop
        ([*range(10), *[7] * 20], None),  # below 24 tokens
        ([*[7] * 90, *range(100, 140)], None),  # left again
        (list(range(300)), None),
        ([*list(range(20, 90)) * 5], None),  # a period above 64
        ([], None),
        ([3], None),
        ([3] * 24, (1, 24)),
    ],
)
def test_repeated_tails(ids, span):
    assert Guard().span(ids) == span


# ---------------------------------------------------------------- the other measures


def test_the_other_measures_by_hand():
    t = trace([0.5, 0.25, 0.5, 0.5], tokens=["So ", "x is ", "4", "2."], answer="42", extra={"self_certainty": [1.0, 2.0, 3.0, 6.0]})
    assert Confidence("mean_logprob").of(t)[0] == pytest.approx(math.log(0.5) * 5 / 4)
    assert Confidence("answer_prob").of(t)[0] == pytest.approx(0.5)
    assert Confidence("self_certainty").of(t)[0] == 3.0
    assert Confidence("self_certainty").of(trace(None, extra={"self_certainty": 0.75}))[0] == 0.75
    last = trace([0.1, 0.9, 0.4, 0.9], tokens=["42 ", "or ", "42", " !"], answer="42")
    assert Confidence("answer_prob").of(last)[0] == pytest.approx(0.4)  # the last occurrence
    assert Confidence("answer_prob").of(trace([0.1], tokens=["x"], answer=None)) == (None, "no answer")
    assert Confidence("answer_prob").of(trace([0.1], tokens=["x"], answer="y"))[0] is None
    assert vote_shares(["7", " 7", None, "8"]) == [0.5, 0.5, 0.0, 0.25]


def test_special_tokens_can_be_left_out():
    t = trace([0.9] * 9 + [0.001], token_ids=[*range(9), 2])
    assert Confidence().of(t)[0] == pytest.approx(0.001)
    without = Confidence(special_ids=frozenset({2}))
    assert without.of(t)[0] == pytest.approx(0.9) and without.low(t) == [0]


@pytest.mark.parametrize(
    ("how", "of", "said"),
    [
        (Confidence(), {"probs": None}, "no raw_logprobs"),
        (Confidence(), {"probs": None, "logprobs": [-1.0]}, "--sampled-logprobs"),
        (Confidence("self_certainty"), {"probs": [0.5]}, "whole distribution"),
        (Confidence("self_certainty"), {"probs": [0.5], "extra": {"self_certainty": [float("nan")]}}, "self_certainty"),
        (Confidence("answer_prob"), {"probs": [0.5], "answer": "4"}, "tokens"),
    ],
)
def test_what_a_trace_does_not_carry_is_refused(how, of, said):
    with pytest.raises(InputError, match=said):
        how.of(trace(of.pop("probs"), **of))


def test_sampled_logprobs_only_where_asked_for():
    t = trace(None, logprobs=logs([0.25]))
    assert Confidence(sampled=True).of(t)[0] == pytest.approx(0.25)
    assert Confidence(sampled=True).of(trace([0.5], logprobs=logs([0.25])))[0] == pytest.approx(0.5)  # raw ones first


def test_an_empty_trace_has_no_confidence():
    assert Confidence().of(trace([])) == (None, "no tokens")
    assert Confidence(special_ids=frozenset({1})).of(trace([0.5], token_ids=[1])) == (None, "no tokens")


@pytest.mark.parametrize("bad", [{"measure": "tail"}, {"share": 0.0}, {"share": 1.5}])
def test_nonsense_is_refused(bad):
    with pytest.raises(InputError):
        Confidence(**bad)


# ---------------------------------------------------------------- check 14: alignment of the scorer


def test_scored_probabilities_are_the_generators_own():
    """Greedy tokens get the maximum softmax probability; p of a fixed text does not know a sampling temperature."""
    torch = pytest.importorskip("torch")
    from llmrl.hf_engine import HFEngine
    from llmrl.models import load_policy
    from llmrl.recipe import Model, Tiny
    from llmrl.records import Request, Sampling

    torch.set_num_threads(1)
    tiny = Tiny(hidden=32, layers=2, heads=2, ffn=48, alphabet="0123456789+-=")
    policy = load_policy(Model(path="tiny", tiny=tiny), seed=3)
    engine = HFEngine(policy)
    context = tuple(policy.chat.prompt_ids([{"role": "user", "content": "12+34="}]))
    greedy, hot = engine.generate([Request(context, (1,), Sampling(max_new_tokens=12, temperature=t)) for t in (0.0, 1.7)])
    scored = engine.score([(context, greedy.token_ids), (context, hot.token_ids)])
    implementation = policy.model.config._attn_implementation
    policy.model.set_attn_implementation("sdpa")  # transformers' own forward, from position T_x - 1 to T_x + T - 2
    with torch.no_grad():
        logits = policy.model(torch.tensor([[*context, *greedy.token_ids]])).logits[0, len(context) - 1 : -1].float()
    policy.model.set_attn_implementation(implementation)
    logits[:, list(policy.banned_ids)] = -torch.inf
    np.testing.assert_allclose(scored[0], logits.log_softmax(-1).max(-1).values.numpy(), atol=1e-5)  # at each place the most likely token
    again = engine.generate([Request(context, (1,), Sampling(max_new_tokens=12, temperature=1.0))])[0]
    np.testing.assert_allclose(engine.score([(context, again.token_ids)])[0], again.logprobs, atol=1e-5)  # T = 1: the engine's own are raw
    assert not np.allclose(scored[1], hot.logprobs, atol=1e-3)  # those of T = 1.7 are not
    np.testing.assert_allclose(engine.score([(context, hot.token_ids)])[0], scored[1], atol=1e-6)
    certain = engine.certainty([(context, greedy.token_ids), (context, [])])
    seen = logits[:, torch.isfinite(logits[0])].log_softmax(-1)  # KL(uniform || p) by its definition, over the ids that can be sampled
    by_hand = (torch.full_like(seen, 1 / seen.shape[1]) * (-math.log(seen.shape[1]) - seen)).sum(-1)
    np.testing.assert_allclose(certain[0], by_hand.numpy(), atol=1e-5)
    assert min(certain[0]) > 0 and certain[1] == []


def test_self_certainty_of_known_distributions():
    torch = pytest.importorskip("torch")
    from llmrl.head import head_certainty

    weight = torch.eye(4, dtype=torch.float64)
    hidden = torch.log(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64))
    found = head_certainty(hidden, weight, None)
    expected = [0.0, (math.log(0.25 / 0.7) + 3 * math.log(0.25 / 0.1)) / 4, (math.log(0.25 / 0.97) + 3 * math.log(0.25 / 0.01)) / 4]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(head_certainty(hidden + 3.0, weight, None, chunk=2).numpy(), expected, atol=1e-12)  # neither shift nor chunks matter
    two = head_certainty(hidden, weight, None, banned_ids=(2, 3))[1]  # 0.7 and 0.1 of 0.8
    assert float(two) == pytest.approx((math.log(0.5 / 0.875) + math.log(0.5 / 0.125)) / 2, abs=1e-12)

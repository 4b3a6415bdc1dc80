"""COPO: the specification's three prompts and token losses, identities of the global advantage, and its blend modes."""

import asyncio
import math

import pytest
import torch

from llmrl.batch import evaluate_terms
from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.records import Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules import grpo
from llmrl.rules.copo import answer_entropy, copo
from tests.builders import ALPHABET, f64, make_batch, make_view
from tests.test_credit import lockstep

ANSWERS = ["7777", "3453", "9892"]
REWARDS = [1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0]
A_LOC = [0.0] * 4 + [-0.499999, 1.499997, -0.499999, -0.499999] + [0.0] * 4
A_GLOB = [1.120895, -0.320256, -0.800639]
W = [0.006693, 0.924142, 0.924142]


def view_of(rewards=REWARDS, answers=ANSWERS, cohorts=None):
    cohorts = cohorts or [i // 4 for i in range(len(rewards))]
    bits = [answer_entropy(list(answers[g])) for g in cohorts]
    return make_view(rewards, cohorts, streams={"answer_entropy_bits": [[b] for b in bits]})


def both(rule, view):
    """(local, global) advantages with their shares in them."""
    state = rule.credit.init()
    local, state = rule.credit.update(view, state)
    return local, rule.credit.extra(view, state)[0]["global"]


def test_worked_advantages():
    assert [answer_entropy(list(a)) for a in ANSWERS] == [0.0, 1.5, 1.5]
    local, _ = both(copo(blend="none"), view_of())
    assert local.tolist() == pytest.approx(A_LOC, abs=1e-6)
    zero, whole = both(copo(blend="global"), view_of())
    assert zero.abs().max() == 0 and whole[::4].tolist() == pytest.approx(A_GLOB, abs=1e-6)


@pytest.mark.parametrize(
    ("blend", "expected"),
    [
        ("soft", [1.113393] * 4 + [-0.486364, 1.361916, -0.486364, -0.486364] + [-0.060735] * 4),
        ("soft_zero", [1.113393] * 4 + [-0.320256, 1.361916, -0.320256, -0.320256] + [-0.800639] * 4),
        ("none", A_LOC),
        ("global", [1.120895] * 4 + [-0.320256] * 4 + [-0.800639] * 4),
        ("forced", [1.120895] * 4 + A_LOC[4:8] + [-0.800639] * 4),
        ("soft_forced", [1.120895] * 4 + [-0.486364, 1.361916, -0.486364, -0.486364] + [-0.800639] * 4),
        ("zero", [0.0] * 4 + [-0.320256, 1.499997, -0.320256, -0.320256] + [-0.800639] * 4),
    ],
)
def test_worked_effective_advantages(blend, expected):
    assert sum(both(copo(blend=blend), view_of())).tolist() == pytest.approx(expected, abs=1.1e-6)


def test_worked_consistency():
    """At n = 4: lam 0.375, factors 1 and 0.4375, and 1/n where all answers differ."""
    _, got = both(copo(blend="global", consistency=True), view_of())
    r = f64([1.0, 0.25 * 0.4375, 0.0])
    assert got[::4].tolist() == pytest.approx(((r - r.mean()) / (r.std() + 1e-6)).tolist())
    solved = [1, 1, 1, 1, 1, 0, 0, 0]  # R = 1 with factor 1/4 is as good as R = 1/4 with factor 1
    _, got = both(copo(blend="global", consistency=True), view_of(solved, ["1234", "5555"]))
    assert answer_entropy(list("1234")) == 2.0 and got.abs().max() < 1e-9


@pytest.mark.parametrize(
    ("rho", "loc", "expected"), [(1.3, 1.499997, -1.631870), (0.7, -0.499999, 0.389091)]
)
def test_worked_token_loss(rho, loc, expected):
    """Prompt B: the two terms are clipped separately, then mixed; blended first it would be -1.634297."""
    w = 1 / (1 + math.exp(-2.5))
    batch, out = make_batch([[math.log(rho)]], [w * loc], old=[[0.0]])
    batch.stream["global"] = f64([(1 - w) * A_GLOB[1]])
    value, _ = evaluate_terms(copo().loss, batch, out, [1.0, 1.0])
    assert float(value.detach()) == pytest.approx(expected, abs=1.1e-6)


def test_worked_prompt_a():
    batch, out = make_batch([[0.0]], [0.0])
    batch.stream["global"] = f64([(1 - W[0]) * A_GLOB[0]])
    assert float(evaluate_terms(copo().loss, batch, out, [1.0, 1.0])[0].detach()) == pytest.approx(-1.113393, abs=1.1e-6)


def test_dual_clip_bounds_the_loss():
    batch, out = make_batch([[math.log(9.0)]], [-1.0], old=[[0.0]])
    batch.stream["global"] = f64([-1.0])
    assert float(evaluate_terms(copo().loss, batch, out, [1.0, 1.0])[0].detach()) == pytest.approx(6.0)
    assert float(evaluate_terms(copo(dual=None).loss, batch, out, [1.0, 1.0])[0].detach()) == pytest.approx(18.0)


def test_limits_of_the_blend():
    local, whole = both(copo(middle=-1e6), view_of())
    plain = grpo.grpo().credit.update(view_of(), grpo.grpo().credit.init())[0]
    assert local.tolist() == plain.tolist() and whole.abs().max() == 0.0
    local, whole = both(copo(middle=1e6), view_of())
    assert local.abs().max() == 0.0 and whole[::4].tolist() == pytest.approx(A_GLOB, abs=1e-6)
    local, _ = both(copo(middle=1.5, sharpness=1e9), view_of())
    assert local[5] == pytest.approx(0.5 * 1.499997)  # H = middle: one half


def test_the_global_advantage():
    _, whole = both(copo(blend="global"), view_of())
    assert float(whole.sum()) == pytest.approx(0.0, abs=1e-12)
    assert float(whole[0]) > 0  # a solved prompt is pushed up
    _, same = both(copo(blend="global"), view_of([1, 0, 0, 0] * 3))
    _, single = both(copo(blend="global"), view_of([1, 0, 0, 0], ["1234"]))
    assert same.abs().max() == 0.0 and single.abs().max() == 0.0


def test_global_statistics_run_over_all_ranks():
    credit = copo(blend="global").credit.channels["global"]
    got = lockstep(credit, [view_of(REWARDS[:8], ANSWERS[:2]), view_of(REWARDS[8:], ANSWERS[2:])])
    assert torch.cat(got)[::4].tolist() == pytest.approx(A_GLOB, abs=1e-6)


def test_collect_tells_the_entropy_of_the_judged_answers():
    chat = Chat(char_tokenizer(ALPHABET))

    class Echo:
        def score(self, items):
            by_text = {"9": Verdict(None, "timeout"), "8": Verdict(0.0, "no_answer")}
            return [by_text.get(t) or Verdict(float(t == "2"), answer=t) for _, t in items]

    replies = iter(["2", "2", "3", "8", "8", "9"])
    io = RolloutIO(TableEngine(chat, lambda r: next(replies)), Echo(), chat, Memory(), Sampling(4), 6, (0, 1))
    (group,) = asyncio.run(copo().collect([Prompt("p", ({"role": "user", "content": "1+1="},), "2")], io))
    bits = 2 * 0.4 * math.log2(2.5) + 0.2 * math.log2(5)  # 2, 2 | 3 | <none>, <none>
    assert [s.streams.get("answer_entropy_bits", [None])[0] for s in group.samples] == [pytest.approx(bits)] * 5 + [None]


def test_dual_below_one_is_refused():
    with pytest.raises(ValueError, match="dual"):
        copo(dual=1.0)

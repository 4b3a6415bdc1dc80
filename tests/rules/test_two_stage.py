"""GRPO-N: the specification's advantages, softmax updates and token losses; N + P = full; the switch is state."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from llmrl.batch import evaluate_terms
from llmrl.rules import grpo
from llmrl.rules.two_stage import grpo_n, part
from tests.builders import f64, make_batch, make_view
from tests.test_credit import lockstep

R = [1, 0, 0, 1, 0, 0]
A = [1.290992, -0.645496, -0.645496, 1.290992, -0.645496, -0.645496]


def advantages(rule, rewards=R, cohorts=None, state=None):
    view = make_view(rewards, cohorts or [0] * len(rewards))
    adv, after = rule.credit.update(view, state or rule.credit.init())
    return adv.tolist(), after


def test_worked_advantages():
    assert advantages(grpo_n(keep="all"))[0] == pytest.approx(A, abs=2e-6)
    assert advantages(grpo_n())[0] == pytest.approx([min(a, 0.0) for a in A], abs=2e-6)
    assert advantages(grpo_n(keep="pos"))[0] == pytest.approx([max(a, 0.0) for a in A], abs=2e-6)


def test_size_of_the_negative_part():
    """|A_neg| = sqrt(k / (B - k)) for k right of B with ddof 0; ddof 1 shrinks it by sqrt((B-1)/B)."""
    for k in range(1, 6):
        a = advantages(grpo_n(std_eps=0.0), [1] * k + [0] * (6 - k))[0]
        assert a[-1] == pytest.approx(-math.sqrt(k / (6 - k)) * math.sqrt(5 / 6))


def expected_update(pi, adv):
    """The exact policy gradient of sum_v pi_v A_v (A held fixed) with respect to the logits."""
    z = pi.log().requires_grad_()
    return torch.autograd.grad((z.softmax(0) * adv).sum(), z)[0]


def test_worked_expected_updates():
    pi, r = f64([0.6, 0.01, 0.39]), f64([0.8, 1.0, 0.0])
    a = r - (pi * r).sum()
    assert a.tolist() == pytest.approx([0.31, 0.51, -0.49])
    table = {
        "all": ([0.186, 0.0051, -0.1911], [0.685068, 0.009528, 0.305404], 0.665704),
        "neg": ([0.11466, 0.001911, -0.116571], [0.653295, 0.009727, 0.336977], 0.689733),
        "pos": ([0.07134, 0.003189, -0.074529], [0.633977, 0.009870, 0.356153], 0.702204),
    }
    total = torch.zeros(3, dtype=torch.float64)
    for keep, (dz, new, entropy) in table.items():
        got = expected_update(pi, part(a, keep))
        assert got.tolist() == pytest.approx(dz, abs=1e-9) and float(got.sum()) == pytest.approx(0.0, abs=1e-12)
        after = (pi.log() + got).softmax(0)
        assert after.tolist() == pytest.approx(new, abs=1e-6)
        assert -float((after * after.log()).sum()) == pytest.approx(entropy, abs=1e-6)
        total += got if keep != "all" else 0
    assert_close(total, expected_update(pi, a))


def test_worked_single_sample():
    pi = f64([0.6, 0.01, 0.39])
    z = pi.log().requires_grad_()
    dz = torch.autograd.grad(-1.0 * z.log_softmax(0)[2], z)[0]
    assert dz.tolist() == pytest.approx([0.6, 0.01, -0.61])
    after = (pi.log() + dz).softmax(0)
    assert float(after[0] / after[1]) == pytest.approx(60.0 * math.exp(0.59))  # one step on logits: the gain is in proportion to pi


def loss(rule, adv, rho=(1.0, 1.5, 0.7, 1.0)):
    batch, out = make_batch([[math.log(r)] for r in rho], adv, old=[[0.0]] * 4)
    value, _ = evaluate_terms(rule.loss, batch, out, [4.0])
    return float(value.detach()), torch.autograd.grad(value, out.logp_T)[0]


def test_worked_losses_and_the_split():
    """The denominator is that of all four tokens, so that N + P = full, gradient too."""
    a = f64([1, 1, -1, -1])
    full, n, p = (loss(grpo_n(), part(a, keep).tolist()) for keep in ("all", "neg", "pos"))
    assert full[0] == pytest.approx(-0.1) and n[0] == pytest.approx(0.45)
    assert n[0] + p[0] == pytest.approx(full[0])
    assert_close(n[1] + p[1], full[1])
    assert n[1].tolist() == pytest.approx([0, 0, 0, 0.25])  # rho = 0.7 < 1 - eps: clipped
    assert loss(grpo_n(), [0.0] * 4)[1].abs().max() == 0.0
    assert_close(loss(grpo_n(), [-1.0] * 4), loss(grpo_n(keep="all"), [-1.0] * 4), atol=0, rtol=0)
    assert loss(grpo_n(), [-1.0] * 4, rho=(9.0, 1, 1, 1))[1][0] == pytest.approx(9 / 4)  # a large ratio is not bounded where A < 0


def test_dead_groups_do_nothing():
    for r in (0, 1):
        assert advantages(grpo_n(), [r] * 4)[0] == [0.0] * 4


def test_graded_rewards_press_down_what_is_below_the_mean():
    a = advantages(grpo_n(), [1.0, 0.9, 0.6, 0.9])[0]
    assert a[2] < 0 and a[0] == 0.0


def test_renormalised_over_the_kept_samples_of_all_ranks():
    whole = advantages(grpo_n(renormalise=True), R * 2, [0] * 6 + [1] * 6)[0]
    assert whole[1] == pytest.approx(A[1] * 12 / 8, abs=2e-6)

    class Rule:  # lockstep's chains carry no state: the transform is asked directly
        init = staticmethod(dict)

        @staticmethod
        def update(view, state):
            return grpo_n(renormalise=True).credit.update(view, grpo_n().credit.init())[0], state

    two = lockstep(Rule, [make_view([1, 0, 0, 1, 0, 0], [0] * 6), make_view([1, 0, 0, 1, 0, 0], [0] * 6)])
    assert torch.cat(two).tolist() == pytest.approx(whole)


def test_the_switch_is_state_and_survives_json():
    rule, state, seen = grpo_n(switch_step=3), None, []
    for _ in range(4):
        adv, state = advantages(rule, state=json.loads(json.dumps(state)) if state else None)
        seen.append(adv[0] > 0)
    assert seen == [True, True, False, False]


def test_forms():
    assert grpo_n(ratio="sequence").loss[0].label == "gspo" and grpo_n(ratio="sequence").loss[0].over == "sample"
    assert grpo_n().loss[0].over == "token"
    assert advantages(grpo_n(keep="all"))[0] == advantages(grpo.grpo())[0]
    with pytest.raises(ValueError, match="switch_step"):
        grpo_n(switch_step=-1)

"""DRPO: the specification's group of four in both forms, limits of its temperatures, the trust region, and the denominator of all prompts."""

import math

import pytest
import torch
from torch.testing import assert_close

from llmrl.batch import evaluate_terms
from llmrl.rules import grpo
from llmrl.rules.drpo import discriminative, drpo, length_weights, trust_region
from tests.builders import f64, make_batch, make_view

S, Y, LENGTHS = [-0.50, -0.80, -0.60, -1.20], [1, 1, 0, 0], [20, 60, 30, 90]


def shares(rule, rewards=Y, lengths=LENGTHS, cohorts=None, **streams):
    view = make_view(rewards, cohorts or [0] * len(rewards), lengths, max_new_tokens=100, streams=streams)
    return [float(x[0]) for x in rule.credit.update(view, rule.credit.init())[0].split(lengths)]


def loss(share, s=S, *, tau=10.0, cohorts=None, groups=1):
    """Two tokens a sample around its mean: (value, d loss / d s_i)."""
    batch, out = make_batch([[x + 0.1, x - 0.1] for x in s], share, cohorts=cohorts or [0] * len(s))
    rule = drpo(tau=tau, beta=0.0)
    value, _ = evaluate_terms(rule.loss, batch, out, [float(groups)])
    g = torch.autograd.grad(value, out.logp_T)[0]
    return float(value.detach()), g.reshape(-1, 2).sum(1).tolist()


@pytest.mark.parametrize(("lam", "w"), [(0.1, [0.982014, 0.017986]), (1.0, [0.598688, 0.401312]), (1e6, [0.5, 0.5]), (1e-3, [1.0, 0.0])])
def test_worked_weights(lam, w):
    assert shares(drpo(lam=lam)) == pytest.approx([*w, -0.5, -0.5], abs=1e-6)


def test_worked_loss():
    value, g = loss(shares(drpo()))
    assert value == pytest.approx(-0.390105, abs=1e-6)
    assert g == pytest.approx([-0.982014, -0.017986, 0.514996, 0.485004], abs=1e-6)
    value, g = loss(shares(drpo()), tau=1.0)
    assert value == pytest.approx(0.505396 - 0.855659, abs=1e-6)
    assert g[2:] == pytest.approx([0.645656, 0.354344], abs=1e-6)


def test_worked_advantage_form():
    """Zero-sum, never negative for a right sample; with ratio 1 the gradient is that of the loss."""
    rows = [[s] * n for s, n in zip(S, LENGTHS, strict=True)]
    rule = drpo(form="advantage")
    a = shares(rule, old_logp=rows)
    assert a == pytest.approx([3.928055, 0.071945, -2.059982, -1.940018], abs=1e-6) and sum(a) == pytest.approx(0.0, abs=1e-12)
    batch, out = make_batch([[s, s] for s in S], a)
    value, _ = evaluate_terms(rule.loss, batch, out, [4.0])
    g = torch.autograd.grad(value, out.logp_T)[0].reshape(-1, 2).sum(1)
    assert g.tolist() == pytest.approx(loss(shares(drpo()))[1], abs=1e-6)
    assert rule.needs.old_logp and not rule.needs.whole_groups


def test_why_grpo_fails():
    rewards = [0.9, 0.5, 0.05, 0, 0, 0]
    z = grpo.grpo().credit.update(make_view(rewards, [0] * 6), grpo.grpo().credit.init())[0] * (6 / 5) ** 0.5  # the example has ddof 0
    assert z.tolist() == pytest.approx([1.910980, 0.749878, -0.556361] + [-0.701499] * 3, abs=1e-5)  # the third right one is pushed down
    assert all(a > 0 for a in shares(drpo(), [1, 1, 1, 0, 0, 0], [5, 50, 99, 9, 9, 9])[:3])


def test_identities_of_the_weights():
    one = torch.zeros(3, dtype=torch.long)
    on = torch.ones(3, dtype=torch.bool)
    r = f64([0.2, 0.7, 0.4])
    assert_close(length_weights(r, 0.1, one, 1, on), length_weights(r + 0.3, 0.1, one, 1, on))
    assert length_weights(f64([0.5] * 3), 0.01, one, 1, on).tolist() == pytest.approx([1 / 3] * 3)
    assert float(length_weights(r, 0.1, one, 1, on).sum()) == pytest.approx(1.0)


def test_limits_of_tau():
    assert loss([1.0, 0.0, -0.5, -0.5], tau=1e6)[0] == pytest.approx(0.5 + -0.9, abs=1e-5)  # mean of the wrong
    assert loss([1.0, 0.0, -0.5, -0.5], tau=1e-3)[0] == pytest.approx(0.5 + -0.6, abs=1e-3)  # their largest
    for tau in (0.1, 1.0, 10.0):
        assert loss([1.0, -1.0], s=[-0.5, -0.7], tau=tau)[0] == pytest.approx(0.5 - 0.7)


def test_gradients_sum_to_one_on_each_side_and_shifts_do_not_matter():
    share = shares(drpo(lam=0.3))
    value, g = loss(share, tau=2.0)
    assert (sum(g[:2]), sum(g[2:])) == pytest.approx((-1.0, 1.0))
    assert loss(share, s=[x - 0.7 for x in S], tau=2.0)[0] == pytest.approx(value)


def test_doubling_the_wrong_ones_changes_nothing():
    twice = loss(shares(drpo(), [1, 1, 0, 0, 0, 0], [20, 60, 30, 90, 30, 90]), s=[*S, *S[2:]])[0]
    assert twice == pytest.approx(loss(shares(drpo()))[0])


def test_one_outcome_is_nothing_but_counts_as_a_prompt():
    for rewards in ([1, 1, 1, 1], [0, 0, 0, 0]):
        assert shares(drpo(), rewards) == [0.0] * 4 and loss([0.0] * 4) == (0.0, [0.0] * 4)
    both = loss([*shares(drpo()), 0.0, 0.0], s=[*S, -1.0, -2.0], cohorts=[0] * 4 + [1] * 2, groups=2)
    assert both[0] == pytest.approx(-0.390105 / 2, abs=1e-6)
    assert [t.count for t in drpo().loss] == ["groups", "groups"] and drpo().needs.whole_groups


def test_unscored_and_masked_samples_are_on_no_side():
    assert shares(drpo(), [1, 1, 0, None, 0], [20, 60, 30, 50, 90]) == pytest.approx([0.982014, 0.017986, -0.5, 0.0, -0.5], abs=1e-6)


def penalty(drift, n=(2, 3), **keys):
    rows = [[-1.0] * k for k in n]
    batch, out = make_batch(rows, [0.0] * len(n), old=[[-1.0 + drift] * k for k in n], cohorts=[0] * len(n))
    value, _ = evaluate_terms(drpo(**keys).loss[1:], batch, out, [1.0])
    return float(value.detach()), float(torch.autograd.grad(value, out.logp_T)[0].sum())


def test_worked_trust_region():
    """K below delta: nothing. K = 1.1e-3: 5.0e-4, and d loss / dK = 1 (logp moves K by -1)."""
    assert penalty(5e-5) == (0.0, 0.0) and penalty(0.0) == (0.0, 0.0) and penalty(-0.3) == (0.0, 0.0)
    value, slope = penalty(1.1e-3)
    assert value == pytest.approx(5.0e-4, rel=1e-9) and slope == pytest.approx(-1.0, rel=1e-9)
    assert penalty(-0.3, kl_form="low_var_kl")[0] == pytest.approx(500 * (math.exp(0.3) - 1.3 - 1e-4) ** 2)


def test_the_trust_region_is_by_prompt_so_that_cuts_do_not_matter():
    """The code's K is over the micro-batch: a drifting prompt hides behind others there. Here two prompts at once or one by one: the same."""
    rows, old, cohorts = [[-1.0] * 2, [-1.0] * 3, [-1.0] * 4], [[-0.9] * 2, [-0.8] * 3, [-1.2] * 4], [0, 0, 1]
    terms = drpo().loss[1:]
    batch, out = make_batch(rows, [0.0] * 3, old=old, cohorts=cohorts)
    whole = float(evaluate_terms(terms, batch, out, [2.0])[0].detach())
    parts = [evaluate_terms(terms, *make_batch(rows[a:b], [0.0] * (b - a), old=old[a:b], cohorts=cohorts[a:b]), [2.0])[0] for a, b in ((0, 2), (2, 3))]
    assert whole == pytest.approx(sum(float(p.detach()) for p in parts)) and whole > 0


def test_functions_carry_the_names_of_the_metrics():
    assert discriminative(1.0).__name__ == "drpo" and trust_region(0.1).__name__ == "trust_region"
    for keys in ({"lam": 0.0}, {"tau": -1.0}, {"beta": -1.0}):
        with pytest.raises(ValueError, match="drpo"):
            drpo(**keys)

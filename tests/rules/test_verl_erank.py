"""VERL: effective ranks and the worked example of the specification, the gate's limits, the running means, ranks of processes."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from llmrl.rules.verl_erank import effective_rank, phi, prefix_ranks, statistics, verl_erank
from tests.builders import f64, make_view
from tests.contracts.rule import lockstep

Z = [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1], [1, 1, 0], [-1, -1, 0]]
MU = {"mu": [0.10, 0.50, 10.0], "steps": 1}


def rank(z):
    return effective_rank(f64(z))


def by_svd(z):
    """The definition, by singular values."""
    p = torch.linalg.svdvals(z - z.mean(0))
    p = p / p.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def bonus(view, state=MU, **keys):
    """-> (advantages, new state) of the bonus alone on advantages that are the rewards."""
    (transform,) = verl_erank(**keys).credit.token
    return transform.update(view.reward_S[view.sample_T], state, view)


def view_of(x, rewards, **rest):
    """Samples of 8 tokens whose streams give ERA, ERV, ER = x with stride 2: e is ERV -+ ERA / 2 at the second and third prefix."""
    rows = []
    for era, erv, er in x:
        e2, e3 = erv - era / 2, erv + era / 2
        m1 = 3.0
        m2 = m1 + e2
        m3 = (m1 + m2) / 2 + e3
        rows.append([1.0, 1.0, m1, m1, m2, m2, m3, er])
    return make_view(rewards, [0] * len(x), [8] * len(x), streams={"erank": rows}, **rest)


def test_worked_ranks():
    assert rank([[1, 0], [-1, 0], [0, 1], [0, -1]]) == pytest.approx(2.0, abs=1e-12)
    assert rank([[1, 2], [2, 4], [3, 6], [-5, -10]]) == pytest.approx(1.0, abs=1e-6)
    assert rank(Z) == pytest.approx(2.892219, abs=1e-6)
    stream = prefix_ranks(2)(torch.tensor(Z, dtype=torch.float32)).tolist()
    assert stream == pytest.approx([1.0, 1.0, 1.928623, 1.928623, 2.938760, 2.938760, 2.966348, 2.892219], abs=1e-6)
    assert statistics(stream, 2) == pytest.approx((-0.477481, 0.771397, 2.892219), abs=2e-6)


@pytest.mark.parametrize("shape", [(6, 3), (5, 20), (40, 7), (2, 4)])
def test_rank_is_that_of_the_singular_values(shape):
    """In its bounds; unchanged by scale, offset, rotation of features and order of tokens."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=g, dtype=torch.float64)
    want = by_svd(z)
    assert rank(z.tolist()) == pytest.approx(want, abs=1e-5) and 1 <= want <= min(shape[0] - 1, shape[1]) + 1e-9
    turn = torch.linalg.qr(torch.randn((shape[1], shape[1]), generator=g, dtype=torch.float64))[0]
    for other in (z * 31, z + 5, z @ turn, z.flip(0)):
        assert rank(other.tolist()) == pytest.approx(want, abs=1e-5)


def test_ranks_at_the_edges():
    assert rank([[3.0, 4.0]] * 5) == 1.0 and rank([[0.0, 0.0]] * 3) == 1.0 and rank([[2.0, 1.0]]) == 1.0
    assert rank(torch.eye(6).tolist()) == pytest.approx(5.0, abs=1e-6)  # equal singular values: their number, less the one that centring takes
    assert prefix_ranks(40)(torch.randn(1, 4)).tolist() == [1.0]


def test_too_few_prefixes_and_constant_ranks_have_no_velocity():
    assert statistics([1.0, 2.0, 3.0], 2) == (0.0, 0.0, 3.0)
    assert statistics([1.0, 1.0, 2.0, 2.0, 4.0], 2) == (0.0, 2.0, 4.0)  # two prefixes: one difference, no acceleration
    assert statistics([5.0] * 9, 2) == (0.0, 0.0, 5.0)


def test_worked_advantages():
    mu = f64(MU["mu"])
    assert float(torch.sigmoid(f64(2.0 * 0.5))) == pytest.approx(0.731059, abs=1e-6)
    x = f64([[0.15, 0.60, 9.0], [0.15, 0.60, 12.0]])
    assert phi(x, mu, 2.0, 5.0).tolist() == pytest.approx([-0.019781, 0.197375], abs=1e-6)
    a, _ = bonus(view_of([(0.15, 0.60, 12.0)] * 4, [1.5, -0.5, 0.1, 0.0]), stride=2)
    assert a.tolist() == pytest.approx([v for x in (1.697375, -0.302625, 0.15, 0.0) for v in [x] * 8], abs=1e-6)
    a, _ = bonus(view_of([(0.15, 0.60, 9.0)] * 2, [1.5, -0.5]), stride=2)
    assert a.tolist() == [1.5] * 8 + [-0.5] * 8  # Phi <= 0: nothing


def test_running_means():
    _, state = bonus(view_of([(0.1, 0.5, 11.0), (0.2, 0.7, 13.0), (9.0, 9.0, 9.0)], [1.0, 0.0, None]), stride=2)
    assert state["mu"] == pytest.approx([0.115, 0.53, 10.6]) and state["steps"] == 2 and MU["mu"] == [0.10, 0.50, 10.0]
    view = view_of([(0.15, 0.60, 12.0)] * 2, [1.0, -1.0])
    fresh = verl_erank(stride=2).credit.token[0].init()
    a, state = bonus(view, fresh, stride=2)
    assert a.tolist() == [1.0] * 8 + [-1.0] * 8 and state["mu"] == pytest.approx([0.3 * 0.15, 0.3 * 0.6, 0.3 * 12])  # no bonus in the first step
    assert bonus(view, state, stride=2)[0].max() > 1.0
    nobody = view_of([(0.1, 0.5, 11.0)], [None])
    assert bonus(nobody, MU, stride=2)[1] == MU


def test_the_bonus_never_lowers_and_never_turns_a_sign():
    g = torch.Generator().manual_seed(1)
    x = (torch.rand((60, 3), generator=g, dtype=torch.float64) * f64([0.4, 2.0, 30.0]) - f64([0.2, 0.5, 0.0])).tolist()
    a0 = torch.randn(60, generator=g, dtype=torch.float64).tolist()
    for kappa in (1.0, 2.0, 8.0):
        a, _ = bonus(view_of(x, a0), stride=2, kappa=kappa)
        off = a - f64([v for v in a0 for _ in range(8)])
        assert bool((off >= 0).all()) and bool((off <= 1).all()) and float(off.max()) > 0
        assert bool((a * f64([v for v in a0 for _ in range(8)]) >= 0).all())
    assert bool((phi(f64(x), f64(MU["mu"]), 2.0, 5.0).abs() < 1).all())


def test_the_gate():
    """Balanced where ERA is as ever; with a hard gate it is breadth (ER) where the growth speeds up and speed (ERV) where it slows down."""
    mu = f64(MU["mu"])
    er, erv = math.tanh(0.2), math.tanh(0.4)
    assert float(phi(f64([[0.10, 0.7, 12.0]]), mu, 2.0, 5.0)) == pytest.approx((er + erv) / 2)
    assert float(phi(f64([[0.11, 0.7, 12.0]]), mu, 1e6, 5.0)) == pytest.approx(er)
    assert float(phi(f64([[0.09, 0.7, 12.0]]), mu, 1e6, 5.0)) == pytest.approx(erv)
    assert float(phi(f64([[9.0, 0.5, 1e9]]), mu, 1e6, 5.0)) == pytest.approx(math.tanh(5.0))


def test_on_the_last_token_only():
    a, _ = bonus(view_of([(0.15, 0.60, 12.0)] * 2, [1.5, -0.5]), stride=2, last_token_only=True)
    assert a.tolist() == pytest.approx([1.5] * 7 + [1.697375] + [-0.5] * 7 + [-0.302625], abs=1e-6)


def test_means_are_those_of_all_ranks():
    x = [(0.1, 0.5, 11.0), (0.3, 0.2, 14.0), (0.2, 0.9, 8.0)]
    a, state = bonus(view_of(x, [1.0, -1.0, 0.5]), stride=2)
    parts = [([0], [1.0]), ([1, 2], [-1.0, 0.5])]
    jobs = [lambda ranks, i=i, r=r: bonus(replace(view_of([x[k] for k in i], r), all_sum=ranks.all_sum), stride=2) for i, r in parts]
    (a1, s1), (a2, s2) = lockstep(jobs)
    assert_close(torch.cat([a1, a2]), a)
    assert s1["mu"] == pytest.approx(state["mu"]) and s1 == s2


def test_keys_are_checked():
    for keys in ({"kappa": 0.0}, {"stride": 0}, {"decay": 0.0}, {"limit": -1.0}):
        with pytest.raises(ValueError, match="verl_erank"):
            verl_erank(**keys)

"""The transport core against hand numbers and the identities of VGF's specification (section 9); fp64."""

import math

import pytest
import torch
from torch.testing import assert_close

from llmrl import transport as t

torch.set_num_threads(1)
EXACT = {"rtol": 0, "atol": 0}


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def quadratic(m):
    """R(a) = -|a - m|^2 / 2."""
    return lambda x: -0.5 * (x - m).square().sum(-1)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stein(**keys):
    return lambda x, g: t.svgd(x, g, **keys)


def alone(x, g):
    return t.independent(g)


# ---------------------------------------------------------------- 1. zero budget


@pytest.mark.parametrize("optimizer", ["plain", "adam"])
@pytest.mark.parametrize(("steps", "eps"), [(0, 0.5), (3, 0.0), (0, 0.0)])
def test_zero_budget_leaves_particles_bit_for_bit(steps, eps, optimizer):
    x = draws(2, 5, 3)
    y, seen = t.flow(quadratic(2.0), x, stein(), steps=steps, eps=eps, optimizer=optimizer)
    assert torch.equal(x, y) and len(seen) == 1
    assert torch.equal(seen[-1].argmax(1), quadratic(2.0)(x).argmax(1))  # the selection is best-of-N on the same samples


# ---------------------------------------------------------------- 2, 3. hand numbers


def test_the_hand_vector():
    x = f64([[[0.0], [1.0]]])
    score = 2 - x  # R = -(a-2)^2/2
    assert_close(t.svgd(x, score, alpha=1.0, bandwidth=1.0), f64([[[1.00000], [1.40980]]]), rtol=0, atol=5e-6)
    assert_close(t.svgd(x, score, bandwidth=1.0, entropy=False), f64([[[1.30327], [1.10653]]]), rtol=0, atol=5e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_one_particle_contracts_geometrically(alpha):
    m, a0, eps, steps = f64([1.0, -2.0]), draws(3, 1, 2), 0.1, 7
    for bandwidth in (1.0, None):
        x, _ = t.flow(quadratic(m), a0, stein(alpha=alpha, bandwidth=bandwidth), steps=steps, eps=eps)
        assert_close(x - m, (1 - eps / alpha) ** steps * (a0 - m), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- 4. limits of the kernel


def test_wide_kernel_gives_everyone_the_mean_gradient():
    x, m, eps = draws(2, 6, 3), 1.5, 0.1
    g = draws(2, 6, 3, seed=1)
    assert_close(t.svgd(x, g, bandwidth=1e7, entropy=False), g.mean(1, keepdim=True).expand_as(g), rtol=1e-10, atol=1e-10)
    y, _ = t.flow(quadratic(m), x, stein(bandwidth=1e7, entropy=False), steps=4, eps=eps)
    assert_close(y.mean(1) - m, (1 - eps) ** 4 * (x.mean(1) - m), rtol=1e-9, atol=1e-9)
    assert_close(y[:, :1] - y[:, 1:], x[:, :1] - x[:, 1:], rtol=1e-9, atol=1e-9)


def test_narrow_kernel_leaves_each_its_own_gradient_over_n():
    x, g = draws(2, 6, 3), draws(2, 6, 3, seed=1)
    assert_close(t.svgd(x, g, bandwidth=1e-4, entropy=False), g / 6, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- 5. stationarity


def test_with_entropy_the_particles_become_the_boltzmann_density():
    x = draws(1, 200, 1)
    y, _ = t.flow(quadratic(2.0), x, stein(alpha=0.5), steps=300, eps=0.5)
    assert_close(float(y.mean()), 2.0, rtol=0, atol=1e-3)
    assert_close(float(y.var(correction=0)), 0.490, rtol=0, atol=0.01)  # 0.5 for infinitely many


# ---------------------------------------------------------------- 6. budget


def test_the_budget_bound_holds():
    worst = 0.0
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        sigma, eps, alpha = (float(x) for x in torch.rand(3, generator=g) * 1.5 + 0.05)
        steps = int(torch.randint(1, 6, (1,), generator=g))
        w = torch.randn(2, generator=g, dtype=torch.float64)
        x = torch.randn(1, 12, 2, generator=g, dtype=torch.float64)
        # the gradient of sqrt(1 + |a - w|^2) is shorter than 1
        y, _ = t.flow(lambda a, w=w: - (1 + (a - w).square().sum(-1)).sqrt(), x, stein(alpha=alpha, bandwidth=sigma), steps=steps, eps=eps)
        bound = t.budget_bound(steps=steps, eps=eps, sigma=sigma, slope=1.0, alpha=alpha)
        worst = max(worst, float(t.mmd2(x, y, sigma)[0]) / bound)
    assert 0.005 < worst < 0.5


def test_mmd_of_two_points_and_the_bound_by_hand():
    # k = exp(-1/2): 1 + 1 - 2 k
    assert_close(float(t.mmd2(f64([[[0.0]]]), f64([[[1.0]]]), 1.0)[0]), 2 - 2 * math.exp(-0.5), rtol=1e-12, atol=0)
    assert float(t.mmd2(draws(1, 5, 2), draws(1, 5, 2), 0.7)[0]) == 0.0
    s = 2 * math.sqrt(math.e)
    assert_close(t.budget_bound(steps=3, eps=0.1, sigma=2.0, slope=1.5, alpha=0.5), 0.6 / s * (3.0 + 1 / s), rtol=1e-12, atol=0)


# ---------------------------------------------------------------- 7. Adam, clipping


def test_adam_moves_by_eps_in_the_sign_of_the_velocity():
    x, eps = draws(2, 4, 3), 0.05
    value = quadratic(f64([5.0, -5.0, 0.3]))
    _, g = t.gradient(value, x)
    phi = t.svgd(x, g)
    for steps, most in zip(range(1, 6), (1.00, 2.00, 3.01, 4.01, 5.02), strict=True):
        y, _ = t.flow(value, x, stein(), steps=steps, eps=eps, optimizer="adam")
        assert float((y - x).abs().max()) / eps <= min(most + 0.005, 1.005 * steps)  # `most` is rounded
        if steps == 1:
            assert_close(y - x, eps * phi.sign(), rtol=1e-5, atol=0)
    y, _ = t.flow(value, x, stein(), steps=5, eps=eps, optimizer="adam", clip=(-0.5, 0.5))
    assert float(y.abs().max()) == 0.5


# ---------------------------------------------------------------- 8, 9. invariances, repulsion


@pytest.mark.parametrize("optimizer", ["plain", "adam"])
@pytest.mark.parametrize("bandwidth", [0.8, None])
def test_invariances(optimizer, bandwidth):
    x, order = draws(2, 5, 3), [3, 1, 4, 0, 2]
    how = {"steps": 3, "eps": 0.1, "optimizer": optimizer}
    value = lambda a: torch.sin(a).sum(-1) - 0.1 * a.square().sum(-1)  # noqa: E731
    plain, _ = t.flow(value, x, stein(alpha=0.7, bandwidth=bandwidth), **how)
    assert_close(t.flow(value, x[:, order], stein(alpha=0.7, bandwidth=bandwidth), **how)[0], plain[:, order], rtol=1e-9, atol=1e-9)
    assert_close(t.flow(lambda a: value(a) + 7, x, stein(alpha=0.7, bandwidth=bandwidth), **how)[0], plain, **EXACT)
    assert_close(t.flow(lambda a: 4 * value(a), x, stein(alpha=2.8, bandwidth=bandwidth), **how)[0], plain, rtol=1e-9, atol=1e-9)
    flat, _ = t.flow(lambda a: 0 * a.sum(-1), x, stein(bandwidth=bandwidth, entropy=False), **how)
    assert torch.equal(flat, x)


@pytest.mark.parametrize("bandwidth", [0.8, None])
def test_repulsion_spreads(bandwidth):
    x = draws(1, 6, 2)
    y, _ = t.flow(lambda a: 0 * a.sum(-1), x, stein(bandwidth=bandwidth), steps=1, eps=0.05)
    assert bool((t.squared_distances(y) + torch.eye(6, dtype=torch.float64) > t.squared_distances(x)).all())


def test_a_missing_particle_neither_moves_nor_moves_others():
    x = draws(2, 5, 3)
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    for bandwidth in (0.8, None):
        y, _ = t.flow(quadratic(1.0), x, lambda a, g, b=bandwidth: t.svgd(a, g, bandwidth=b, mask_BN=mask), steps=3, eps=0.1, mask_BN=mask)
        few, _ = t.flow(quadratic(1.0), x[:1, [0, 1, 3]], stein(bandwidth=bandwidth), steps=3, eps=0.1)
        assert_close(y[:1, [0, 1, 3]], few, rtol=1e-12, atol=1e-12)
        assert torch.equal(y[0, [2, 4]], x[0, [2, 4]])
        assert not t.svgd(x, draws(2, 5, 3, seed=1), bandwidth=bandwidth, mask_BN=mask)[0, [2, 4]].any()


def test_pooled_repulsion_by_hand():
    # two texts of two positions, one masked in the second: p = (1, 4), K = exp(-9/2), push_0 = K (1-4)/1 = -3K over T = 2, push_1 = 3K over T = 1
    u, g = f64([[[[0.0], [2.0]], [[4.0], [9.0]]]]), f64([[[[1.0], [2.0]], [[3.0], [5.0]]]])
    mask, k = torch.tensor([[[True, True], [True, False]]]), math.exp(-4.5)
    phi = t.pooled(u, g, mask, alpha=2.0, bandwidth=1.0)
    assert_close(phi[0, ..., 0], f64([[0.5 * (0.5 - 1.5 * k), 0.5 * (1.0 - 1.5 * k)], [0.5 * (1.5 + 3 * k), 0.0]]), rtol=1e-12, atol=1e-15)


def test_the_normalised_step():
    phi = f64([[[3.0, 4.0], [0.0, 1.0], [100.0, 0.0]], [[0.0, 0.0]] * 3])
    mask = torch.tensor([[True, True, False], [True] * 3])
    assert_close(t.normalised(phi, mask, 2.0), f64([[[1.2, 1.6], [0.0, 0.4], [0.0, 0.0]], [[0.0, 0.0]] * 3]), rtol=1e-12, atol=0)


# ---------------------------------------------------------------- 14, 16 (10 is that of texts: test_lm_transport.py)


def test_small_steps_climb():
    value = lambda a: torch.sin(a).sum(-1) - 0.1 * a.square().sum(-1)  # noqa: E731
    _, seen = t.flow(value, draws(3, 8, 4), alone, steps=20, eps=0.02)
    mean = torch.stack([r.mean() for r in seen])
    assert bool((mean[1:] > mean[:-1]).all())


def test_the_median_heuristic():
    for n in (2, 5, 8):
        x = draws(1, n, 3, seed=n)
        median = float(t.squared_distances(x).flatten().quantile(0.5))
        if n == 2:  # two zeros of the diagonal, two distances: the mean of the middle two
            assert_close(median, float((x[0, 0] - x[0, 1]).square().sum()) / 2, rtol=1e-12, atol=0)
        assert_close(math.exp(-median / float(t.median_width(x))), 1 / (n + 1), rtol=1e-4, atol=0)
    k, width = t.rbf(draws(1, 1, 3))
    assert float(k) == 1.0 and float(t.repulsion(draws(1, 1, 3), k, width).abs().max()) == 0.0


def test_refusals():
    with pytest.raises(ValueError, match="steps"):
        t.flow(quadratic(0.0), draws(1, 2, 1), alone, steps=-1, eps=0.1)

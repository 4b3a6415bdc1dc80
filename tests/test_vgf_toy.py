"""The VGF toy (scripts/vgf_toy.py): what leaves the data and what cannot, and the TD target of VGF's offline part."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmrl.transport import flow, svgd, td_target

torch.set_num_threads(1)
SPEC = importlib.util.spec_from_file_location("vgf_toy", Path(__file__).parents[1] / "scripts" / "vgf_toy.py")
toy = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(toy)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_reward_by_hand():
    between = float((toy.PEAKS[0] - toy.PEAKS[1]).square().sum())  # 2.2^2 + 0.1^2
    assert_close(between, 4.85, rtol=1e-12, atol=0)
    assert_close(float(toy.true_reward(toy.PEAKS[0])), 1 + 0.75 * math.exp(-4.85 / 0.72), rtol=1e-12, atol=0)
    assert float(toy.PEAKS.norm(dim=-1).min()) > toy.RADIUS + toy.WIDTH / 2


# ---------------------------------------------------------------- 15. support


def test_the_reference_never_reaches_the_peak_and_particles_do():
    """With the true reward as value: the best of any number of draws stays in the disc, particles walk to the top."""
    peak = float(toy.true_reward(toy.PEAKS[:1]))
    edge = float(toy.true_reward(toy.PEAKS[:1] * (toy.RADIUS / toy.PEAKS[0].norm())))  # the disc's point that is nearest to the peak
    for n in (10, 1000, 100000):
        x = toy.sample_mu((1, n), generator())
        assert float(toy.best(toy.true_reward(x), x).norm()) <= toy.RADIUS + 1e-12
        assert float(toy.true_reward(x).max()) <= edge + 1e-3 < 0.65 < peak  # 1e-3: the other bump moves the disc's best point a little
    x = toy.sample_mu((50, 10), generator(1))
    reached = [float(toy.true_reward(toy.transported(toy.true_reward, x, steps, eps=0.1, alpha=0.1)).amax(1).min()) for steps in (0, 4, 30)]
    assert reached[0] < reached[1] < reached[2] and reached[2] > 0.9 * peak > edge


def test_the_budget_is_two_sided_on_a_learned_value():
    """The learned value of the chosen particle goes on rising; its true reward rises, beats best-of-640, and falls."""
    value = toy.fit_value(0)
    x, wide = toy.sample_mu((60, 10), generator(2)), toy.sample_mu((60, 640), generator(3))
    chosen = {steps: toy.best(value(y), y) for steps in (0, 6, 20) for y in [toy.transported(value, x, steps, eps=0.1, alpha=0.1)]}
    true = {k: float(toy.true_reward(c).mean()) for k, c in chosen.items()}
    learned = [float(value(chosen[k]).mean()) for k in (0, 6, 20)]
    reference = float(toy.true_reward(toy.best(value(wide), wide)).mean())
    assert learned == sorted(learned) and true[0] < reference < true[6] and true[20] < true[0]


def test_the_script_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["vgf_toy.py", "--seeds", "2", "--repeats", "5", "--out", str(tmp_path / "x.png")])
    toy.main()
    told = capsys.readouterr().out
    assert "best-of-640" in told and "VGF, L = 30" in told and (tmp_path / "x.png").stat().st_size > 10_000


# ---------------------------------------------------------------- 11, 17. temporal differences


def networks():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double() for _ in range(5)]


def test_the_td_loss_reaches_the_online_critics_alone():
    sampler, *critics = networks()
    sampler[2] = nn.Linear(8, 2).double()
    online, targets = critics[:2], critics[2:]
    noise = torch.randn(4, 6, 2, generator=generator(), dtype=torch.float64)
    before = [p.clone() for net in (sampler, *critics) for p in net.parameters()]
    drawn = []

    def reference(n):
        drawn.append(sampler(noise[:, :n]))  # with a graph: what must not be followed
        return drawn[-1]

    y = toy.flowed_target(reference, online, targets, torch.ones(4, dtype=torch.float64), n=6, steps=3, eps=0.1, alpha=0.5, discount=0.9)
    assert drawn[0].requires_grad and not y.requires_grad
    action = torch.randn(4, 2, generator=generator(1), dtype=torch.float64)
    toy.td_loss(online, action, y).backward()
    assert all(p.grad is None for net in (sampler, *targets) for p in net.parameters())
    # the gradient is that of a plain regression on y: nothing of it came through the particles, which the online critics moved
    for net in online:
        mine = [p.grad.clone() for p in net.parameters()]
        net.zero_grad(set_to_none=True)
        (net(action)[:, 0] - y).square().mean().backward()
        for p, g in zip(net.parameters(), mine, strict=True):
            assert_close(p.grad, g, rtol=1e-12, atol=1e-15)
    assert all(torch.equal(p, q) for p, q in zip((p for net in (sampler, *critics) for p in net.parameters()), before, strict=True))


def test_target_by_hand():
    q = torch.tensor([[[1.0, 3.0], [0.0, 2.0]], [[2.0, 2.0], [4.0, -2.0]]], dtype=torch.float64)  # 2 critics, 2 states, 2 particles
    r, alive = torch.tensor([0.5, 1.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    # state 0: the lower critic says 1 and 2, the mean of both 1.5 and 2.5
    for ensemble, particles, want in [("min", "mean", 0.5 + 0.9 * 1.5), ("min", "max", 2.3), ("mean", "mean", 2.3), ("mean", "max", 2.75)]:
        assert_close(td_target(r, alive, q, discount=0.9, ensemble=ensemble, particles=particles), r.new_tensor([want, 1.0]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("particles", ["mean", "max"])
def test_one_particle_and_no_step_is_sarsa_under_the_reference(particles):
    _, *critics = networks()
    online, targets = critics[:2], critics[2:]
    next_action = torch.randn(4, 1, 2, generator=generator(), dtype=torch.float64)
    r = torch.randn(4, generator=generator(1), dtype=torch.float64)
    y = toy.flowed_target(lambda n: next_action[:, :n], online, targets, r, n=1, steps=0, eps=0.1, alpha=1.0, discount=0.99, particles=particles)
    q = torch.minimum(*(net(next_action[:, 0])[:, 0] for net in targets))
    assert_close(y, (r + 0.99 * q).detach(), rtol=1e-12, atol=0)
    moved, _ = flow(lambda a: -a.square().sum(-1), next_action, lambda x, g: svgd(x, g), steps=0, eps=0.1)
    assert torch.equal(moved, next_action)

"""VGF's toy: a two-dimensional bandit with two bumps, data between them, and a learned value that errs where there are no data.

    python scripts/vgf_toy.py            # under a minute on one core; prints the table, writes docs/vgf_toy.png

Compared on the same learned values: best-of-N (never leaves the data), weighted imitation (reweighs the data), and VGF particles under
several budgets (leave the data, by as much as they are let). Every point is judged by the true reward. Source: arXiv:2604.14265, its toy;
the bumps, the data, the network and all constants are OUR CHOICE.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from llmrl.transport import flow, svgd, td_target

PEAKS = torch.tensor([[1.15, 0.55], [-1.05, 0.65]], dtype=torch.float64)
HEIGHTS = torch.tensor([1.0, 0.75], dtype=torch.float64)
WIDTH = 0.6
RADIUS = 0.7
"""The data lie in a disc around the origin: both peaks (1.27 and 1.23 away) are outside of it."""


def true_reward(a: Tensor) -> Tensor:
    """Two Gaussian bumps; [..., 2] -> [...]."""
    d2 = (a[..., None, :] - PEAKS.to(a)).square().sum(-1)
    return (HEIGHTS.to(a) * torch.exp(-d2 / (2 * WIDTH**2))).sum(-1)


def sample_mu(n: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Uniform in the disc, [*n, 2]: the reference."""
    r = RADIUS * torch.rand(*n, generator=g, dtype=torch.float64).sqrt()
    angle = 2 * torch.pi * torch.rand(*n, generator=g, dtype=torch.float64)
    return torch.stack([r * angle.cos(), r * angle.sin()], -1)


def fit_value(seed: int, *, samples: int = 512, noise: float = 0.05, steps: int = 600) -> Callable[[Tensor], Tensor]:
    """A small network regressed on noisy rewards of reference samples."""
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    a = sample_mu((samples,), g)
    y = true_reward(a) + noise * torch.randn(samples, generator=g, dtype=torch.float64)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = (net(a)[:, 0] - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.requires_grad_(False)
    return lambda x: net(x)[..., 0]


def best(values_BN: Tensor, x_BN2: Tensor) -> Tensor:
    """The particle of the highest value, [B, 2]."""
    return x_BN2[torch.arange(len(x_BN2)), values_BN.argmax(1)]


def td_loss(critics: list[nn.Module], state_action: Tensor, target_B: Tensor) -> Tensor:
    """mean_b sum_e (Q_e(s, a) - y)^2: section 5.2. The target is data."""
    return torch.stack([(q(state_action)[:, 0] - target_B).square() for q in critics]).sum(0).mean()


def flowed_target(
    reference: Callable[[int], Tensor], online: list[nn.Module], targets: list[nn.Module], reward_B: Tensor, *, n: int, steps: int, eps: float, alpha: float,
    discount: float, particles: str = "mean",
) -> Tensor:  # fmt: skip
    """y of section 5.2 for a bandit that is played on: the next action's N reference particles, moved along the online critics' mean gradient,
    judged by the target critics. [B]"""
    x = reference(n)
    moved, _ = flow(lambda a: torch.stack([q(a)[..., 0] for q in online]).mean(0), x, partial(svgd, alpha=alpha), steps=steps, eps=eps, optimizer="adam",
                    clip=(-2.0, 2.0))  # fmt: skip
    q_EBN = torch.stack([q(moved)[..., 0] for q in targets])
    return td_target(reward_B, torch.ones_like(reward_B), q_EBN, discount=discount, particles=particles)  # type: ignore[arg-type]


def transported(value: Callable[[Tensor], Tensor], x: Tensor, steps: int, *, eps: float, alpha: float) -> Tensor:
    """The released code's flow: SVGD with the median bandwidth, Adam steps."""
    return flow(value, x, partial(svgd, alpha=alpha), steps=steps, eps=eps, optimizer="adam", clip=(-2.0, 2.0))[0]


def study(seeds: int, *, repeats: int, n: int, eps: float, alpha: float) -> tuple[list[tuple[str, list[list[float]]]], list[int]]:
    """Rows (name, [true reward of the chosen point, mean true reward of all points, learned value of the chosen] of each seed), and the budgets."""
    budgets = [0, 1, 2, 4, 6, 8, 10, 12, 16, 20, 30]
    rows: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        value, g = fit_value(seed), torch.Generator().manual_seed(1000 + seed)

        def judge(x: Tensor, value: Callable[[Tensor], Tensor] = value) -> list[float]:
            chosen = best(value(x), x)
            return [float(true_reward(chosen).mean()), float(true_reward(x).mean()), float(value(chosen).mean())]

        for many in (n, 4 * n, 64 * n):
            rows.setdefault(f"best-of-{many}", []).append(judge(sample_mu((repeats, many), g)))
        data = sample_mu((4096,), g)
        for beta in (0.3, 0.1, 0.03):
            w = torch.softmax(value(data) / beta, 0)
            mean = float(w @ true_reward(data))
            rows.setdefault(f"weighted imitation, beta {beta}", []).append([mean, mean, float(w @ value(data))])
        x = sample_mu((repeats, n), g)
        for steps in budgets:
            rows.setdefault(f"VGF, L = {steps}", []).append(judge(transported(value, x, steps, eps=eps, alpha=alpha)))
    return list(rows.items()), budgets


def figure(out: Path, rows: dict[str, list[list[float]]], budgets: list[int], *, n: int, eps: float, alpha: float) -> None:
    """Left: true reward, data, a run's particles. Middle: the learned value. Right: budget against true and learned reward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axis = torch.linspace(-2, 2, 161, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    value, g = fit_value(0), torch.Generator().manual_seed(7)
    many, x = sample_mu((300,), g), sample_mu((1, n), g)
    some = [0, 6, 12, 30]
    paths = [transported(value, x, k, eps=eps, alpha=alpha)[0] for k in range(some[-1] + 1)]
    fig, axes = plt.subplots(1, 3, figsize=(13.5, 4.4), layout="constrained")
    for ax, field, title in zip(axes, (true_reward(grid), value(grid)), ("true reward, VGF particles", "learned value (seed 0)"), strict=False):
        shown = ax.contourf(axis, axis, field, levels=24, cmap="viridis")
        fig.colorbar(shown, ax=ax, shrink=0.85)
        ax.scatter(*many.T, s=3, c="white", alpha=0.5, label="data")
        ax.scatter(*PEAKS.T, marker="*", s=140, c="red", edgecolors="white", label="true peaks")
        ax.set(title=title, xlabel="action, 1st coordinate", ylabel="2nd coordinate", aspect="equal", xlim=(-2, 2), ylim=(-2, 2))
    for i in range(n):
        axes[0].plot(*torch.stack([p[i] for p in paths]).T, c="orange", lw=0.8)
    for k, mark in zip(some, ("o", "s", "D", "X"), strict=True):
        axes[0].scatter(*paths[k].T, marker=mark, s=28, edgecolors="black", linewidths=0.6, c="orange", label=f"L = {k}")
    axes[0].legend(fontsize=7, loc="lower left")
    picked = [torch.tensor(rows[f"VGF, L = {k}"]) for k in budgets]
    for column, label, colour in ((0, "chosen, true", "C0"), (1, "all particles, true", "C2"), (2, "chosen, learned", "C1")):
        mean = torch.stack([p[:, column].mean() for p in picked])
        spread = torch.stack([p[:, column].std() for p in picked])
        axes[2].plot(budgets, mean, c=colour, label=f"VGF, {label}")
        axes[2].fill_between(budgets, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)
    line = torch.tensor(rows[f"best-of-{64 * n}"])[:, 0].mean()
    axes[2].axhline(float(line), c="black", ls="--", lw=1, label=f"best-of-{64 * n}, true")
    imitation = max(float(torch.tensor(v)[:, 0].mean()) for k, v in rows.items() if k.startswith("weighted"))
    axes[2].axhline(imitation, c="grey", ls=":", lw=1.2, label="weighted imitation (best beta), true")
    axes[2].set(title="budget", xlabel=f"L (steps of {eps})", ylabel="reward", ylim=(0, 2.1))
    axes[2].legend(fontsize=7, loc="upper left")
    fig.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "vgf_toy.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    how = {"n": 10, "eps": 0.1, "alpha": 0.1}
    rows, budgets = study(args.seeds, repeats=args.repeats, **how)
    print(f"{args.seeds} learned values, {args.repeats} draws each; N = {how['n']}, eps = {how['eps']}, alpha = {how['alpha']}; mean (std over values)")
    print(f"{'':28} {'chosen, true':>16} {'all, true':>16} {'chosen, learned':>16}")
    for name, found in rows:
        mean, std = torch.tensor(found).mean(0).tolist(), torch.tensor(found).std(0).tolist()
        print(f"{name:28} " + " ".join(f"{m:9.3f} ({s:.3f})" for m, s in zip(mean, std, strict=True)))
    figure(args.out, dict(rows), budgets, **how)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()

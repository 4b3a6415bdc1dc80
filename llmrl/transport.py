"""Value-gradient flow on particles: pure functions of tensors.

VGF (Xu, Hu, Sojoudi, Zhang; arXiv:2604.14265) draws N particles from a reference and moves them for L steps along the gradient of a value,
a discretised Wasserstein gradient flow of KL(q || exp(R/alpha)/Z): Stein variational gradient descent, started at the reference. How far
they may go, steps times step size, is the only regulariser.

Shapes: B batch (states or prompts), N particles of one, d their dimension, T positions and D embedding width where a particle is a text.
`mask_BN` is False for a particle that is not there: it neither moves nor moves others. All in the dtype of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

GUARD = 1e-6
"""Added to 2 sigma^2 where sigma comes from the median heuristic, as in the released code."""
Velocity = Callable[[Tensor, Tensor], Tensor]
"""(particles [B, N, d], gradient of the value there [B, N, d]) -> velocity [B, N, d]."""


# ---------------------------------------------------------------- kernel


def squared_distances(x_BNd: Tensor) -> Tensor:
    """[B, N, N], from differences: exact where two particles are one."""
    return (x_BNd[:, :, None] - x_BNd[:, None]).square().sum(-1)


def median_width(x_BNd: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """2 sigma^2 of the median heuristic, [B]: h = median of all N^2 squared distances, zeros of the diagonal included, / (2 ln(N+1)),
    sigma^2 = max(h, 1e-12). Source: the paper's released code. For an even count the median is the mean of the middle two."""
    d2 = squared_distances(x_BNd)
    n = torch.full((len(d2),), d2.shape[1], device=d2.device) if mask_BN is None else mask_BN.sum(1)
    if mask_BN is not None:
        d2 = d2.masked_fill(~(mask_BN[:, :, None] & mask_BN[:, None]), torch.nan)
    median = _median(d2.flatten(1))
    return 2 * (median / (2 * torch.log(n.to(d2) + 1))).clamp(min=1e-12) + GUARD


def _median(rows_BM: Tensor) -> Tensor:
    """Of each row's numbers that are not NaN; of an even count the mean of the middle two. 0 for a row without any."""
    ordered = rows_BM.sort(1).values  # NaNs last
    count = (~rows_BM.isnan()).sum(1, keepdim=True)
    low, high = ((count - 1) // 2).clamp(min=0), (count // 2).clamp(max=rows_BM.shape[1] - 1)
    return torch.where(count > 0, (ordered.gather(1, low) + ordered.gather(1, high)) / 2, 0.0)[:, 0]


def rbf(x_BNd: Tensor, bandwidth: float | None = None, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(K [B, N, N], 2 sigma^2 [B]): K_ij = exp(-|x_i - x_j|^2 / (2 sigma^2)), 0 where one of the two is not there.

    bandwidth: sigma, the same in every batch entry; None = the median heuristic, anew at each call.
    """
    width = median_width(x_BNd, mask_BN) if bandwidth is None else x_BNd.new_full((len(x_BNd),), 2 * bandwidth**2)
    k = torch.exp(-squared_distances(x_BNd) / width[:, None, None])
    return (k if mask_BN is None else k * (mask_BN[:, :, None] & mask_BN[:, None])), width


def repulsion(x_BNd: Tensor, k_BNN: Tensor, width_B: Tensor) -> Tensor:
    """sum_j grad_{x_j} k(x_j, x_i) = sum_j K_ij (x_i - x_j) / sigma^2, [B, N, d]: away from the others.

    Differs from the released code: sigma is held constant when the kernel is differentiated, also where it is the median's.
    """
    pushed = k_BNN.sum(-1, keepdim=True) * x_BNd - k_BNN @ x_BNd
    return pushed * 2 / width_B[:, None, None]


def _count(x: Tensor, mask_BN: Tensor | None) -> Tensor | int:
    return x.shape[1] if mask_BN is None else mask_BN.sum(1).clamp(min=1)[:, None, None]


# ---------------------------------------------------------------- velocities


def svgd(
    x_BNd: Tensor, score_BNd: Tensor, *, alpha: float = 1.0, bandwidth: float | None = None, entropy: bool = True, mask_BN: Tensor | None = None
) -> Tensor:
    """The velocity of section 3.4, [B, N, d].

    entropy:  phi_i = (1/N) sum_j [ K_ij score_j / alpha + K_ij (x_i - x_j) / sigma^2 ]
    without:  phi_i = (1/N) sum_j K_ij score_j                                             (no repulsion, no alpha)
    score = grad_a R(a). N counts the particles that are there.
    """
    k, width = rbf(x_BNd, bandwidth, mask_BN)
    pull = k @ score_BNd
    phi = (pull / alpha + repulsion(x_BNd, k, width) if entropy else pull) / _count(x_BNd, mask_BN)
    return phi if mask_BN is None else phi * mask_BN[..., None]


def independent(score_BNd: Tensor, *, alpha: float = 1.0) -> Tensor:
    """phi_i = score_i / alpha: the kernel is the identity, particles do not see each other. As in the released amortised agent."""
    return score_BNd / alpha


def pooled(
    u_BNTD: Tensor, score_BNTD: Tensor, mask_BNT: Tensor, *, alpha: float = 1.0, bandwidth: float | None = None
) -> Tensor:
    """Own gradient, and repulsion of the mean embeddings: OUR CHOICE, an ablation. [B, N, T, D]

    phi_it = (1/N) [ score_it / alpha + (1/T_i) sum_j K_ij (p_i - p_j) / sigma^2 ],  p_i = mean over the T_i positions of mask_BNT
    """
    length = mask_BNT.sum(-1)
    there = length > 0
    p = (u_BNTD * mask_BNT[..., None]).sum(2) / length.clamp(min=1)[..., None]
    k, width = rbf(p, bandwidth, there)
    push = repulsion(p, k, width) / length.clamp(min=1)[..., None]
    n = there.sum(1).clamp(min=1)[:, None, None, None]
    return (score_BNTD / alpha + push[:, :, None]) / n * mask_BNT[..., None]


# ---------------------------------------------------------------- steps


def normalised(phi_NTD: Tensor, mask_NT: Tensor, rho: float) -> Tensor:
    """rho phi_i / max_t |phi_it|: the position with the longest velocity moves by rho, in units of which eps then is. OUR CHOICE (section 4.2).

    Positions outside the mask get 0, and so does a particle whose velocity is 0 everywhere.
    """
    phi = phi_NTD * mask_NT[..., None]
    longest = phi.norm(dim=-1).amax(-1)[:, None, None]
    return torch.where(longest > 0, rho * phi / longest.clamp(min=torch.finfo(phi.dtype).tiny), 0.0)


@dataclass
class Adam:
    """Adam on particles, ascending, with fresh state for every transport (the released code's step). beta 0.9 and 0.999, 1e-8 (optax).

    The first step moves every coordinate by lr * sign(phi); after L <= 5 steps none has moved more than 1.005 L lr.
    """

    lr: float
    b1: float = 0.9
    b2: float = 0.999
    tiny: float = 1e-8
    _m: Tensor | None = field(default=None, repr=False)
    _v: Tensor | None = field(default=None, repr=False)
    _t: int = 0

    def __call__(self, phi: Tensor) -> Tensor:
        """The move that goes with this velocity."""
        self._t += 1
        self._m = (1 - self.b1) * phi + (0.0 if self._m is None else self.b1 * self._m)
        self._v = (1 - self.b2) * phi.square() + (0.0 if self._v is None else self.b2 * self._v)
        return self.lr * (self._m / (1 - self.b1**self._t)) / ((self._v / (1 - self.b2**self._t)).sqrt() + self.tiny)


def gradient(value: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(value(x) [B, N], its gradient [B, N, d]), both detached. Rows must not see each other; nothing else receives a gradient."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        r = value(at)
        (g,) = torch.autograd.grad(r.sum(), at)
    return r.detach(), g


def flow(
    value: Callable[[Tensor], Tensor], x_BNd: Tensor, velocity: Velocity, *, steps: int, eps: float, optimizer: Literal["plain", "adam"] = "plain",
    clip: tuple[float, float] | None = None, mask_BN: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """(particles after `steps` steps, the value before each step and after the last: steps + 1 times [B, N]).

    plain: x <- x + eps * phi;  adam: x <- x + Adam(lr=eps)(phi), as released;  then clip to a box. steps = 0 or eps = 0 returns x itself.
    """
    if steps < 0 or eps < 0:
        raise ValueError(f"steps = {steps} and eps = {eps} must not be negative")
    adam, x, seen = Adam(eps), x_BNd.detach(), []
    for _ in range(steps if eps else 0):
        r, g = gradient(value, x)
        phi = velocity(x, g if mask_BN is None else g * mask_BN[..., None])
        moved = x + (eps * phi if optimizer == "plain" else adam(phi))
        moved = moved if clip is None else moved.clamp(*clip)
        x = moved if mask_BN is None else torch.where(mask_BN[..., None], moved, x)
        seen.append(r)
    with torch.no_grad():
        seen.append(value(x))
    return x, seen


# ---------------------------------------------------------------- budget


def budget_bound(*, steps: int, eps: float, sigma: float, slope: float, alpha: float = 1.0) -> float:
    """Upper bound of MMD^2 between the particles before and after plain SVGD steps with entropy and a fixed sigma; slope >= |grad R|.

    (2 eps L / (sigma sqrt(e))) (slope/alpha + 1/(sigma sqrt(e))). Section 3.5.
    """
    s = sigma * math.sqrt(math.e)
    return 2 * eps * steps / s * (slope / alpha + 1 / s)


def mmd2(x_BNd: Tensor, y_BMd: Tensor, sigma: float | Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two sets of equally weighted particles under the RBF kernel, [B]; the V-statistic, so >= 0."""
    width = torch.as_tensor(2 * sigma**2, dtype=x_BNd.dtype, device=x_BNd.device).reshape(-1, 1, 1)

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a[:, :, None] - b[:, None]).square().sum(-1) / width).mean((1, 2))

    return (mean(x_BNd, x_BNd) + mean(y_BMd, y_BMd) - 2 * mean(x_BNd, y_BMd)).clamp(min=0)


def td_target(
    reward_B: Tensor, alive_B: Tensor, q_EBN: Tensor, *, discount: float, ensemble: Literal["min", "mean"] = "min", particles: Literal["mean", "max"] = "mean"
) -> Tensor:
    """y = r + discount * alive * reduce_j agg_e Q_e(s', a'_j), detached, [B]. Section 5.2: a'_j are reference actions of s' after L_train steps.

    alive: 0 where s' is terminal. The released code takes the mean over particles, the maximum as an option.
    """
    q_BN = q_EBN.amin(0) if ensemble == "min" else q_EBN.mean(0)
    v_B = q_BN.mean(1) if particles == "mean" else q_BN.amax(1)
    return (reward_B + discount * alive_B * v_B).detach()

"""Clip-Cov and KL-Cov (Cui et al., arXiv:2505.22617): touch only the few tokens whose log-prob and advantage vary together the most.

To first order a policy's entropy falls by the covariance of log-prob and advantage, and a tiny share of the tokens carries nearly all of it.
    C_t = (logp_t - mean logp) (A_t - mean A),  means over the scored tokens of the whole step, all ranks
The paper's code computes C in each micro-batch with the log-probs of the update under way; there max(1, .) makes small micro-batches pick too
many. Here C, the budget and the choice are those of the step, made once before packing with the log-probs at its start (stream "old_logp"): the
same choice however the batch is cut. Differs in the second and later updates of a step: the choice stays, and tokens that PPO clipping
stops by then are not taken out of the draw (their gradient is 0 already).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.records import Group, Prompt
from llmrl.rollout import RolloutIO, plays_episodes, sample_groups
from llmrl.rules.base import Needs, Rule, Term

if TYPE_CHECKING:
    from llmrl.batch import Outputs, TokenBatch


def clip_cov(
    *, fraction: float = 2e-4, bounds: tuple[float, float] = (1.0, 5.0), low: float = 1.0, high: float = 1.0, std_eps: float = 1e-6,
    mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """Clip-Cov: grpo that drops the gradient of a few random tokens with a high covariance of log-prob and advantage. arXiv:2505.22617.

    I = max(1, int(fraction * N)) tokens drawn from {bounds[0] < C_t < bounds[1]}, or all of them if they are fewer;  l_t = 0 in I, else clip(r_t, A_t)
    Differs from grpo: (1) tokens of I train nothing and stay in the denominator, (2) the mean over all tokens, (3) ratio limited to [0, 2] (low =
    high = 1: the released scripts). fraction (r_cov) 2e-4 and bounds (1, 5) are the paper's. The choice is made once a step (see the module). The
    draw hangs on the sample's id and the step. std_eps is OUR CHOICE. The paper makes 8 updates a step and leaves out groups of equal rewards.
    """
    if not 0 < fraction <= 1 or bounds[0] >= bounds[1]:
        raise ValueError(f"clip_cov: fraction = {fraction} must lie in (0, 1], and bounds = {bounds} must rise")
    return Rule(
        credit=c.Credit((c.center(), c.scale(eps=std_eps)), (_drop_drawn(fraction, bounds),)), loss=(Term(losses.pg_clip(low, high)),),
        collect=partial(_with_draws, mask_truncated=mask_truncated), needs=Needs(old_logp=True),
    )  # fmt: skip


clip_cov.cost = ""  # type: ignore[attr-defined]  # its collect only puts numbers beside the samples


def kl_cov(
    *, fraction: float = 2e-3, beta: float = 1.0, clip: float | None = None, std_eps: float = 1e-6, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """KL-Cov: unclipped policy gradient plus a KL penalty to the step's start on the few tokens of highest covariance. arXiv:2505.22617.

    I = the max(1, int(fraction * N)) tokens of largest C_t;  l_t = -r_t A_t + beta * |logp_t - old_logp_t| * [t in I]
    Differs from grpo: (1) that penalty, (2) no ratio clipping (clip = 0.2 turns it on: OUR CHOICE), (3) the mean over all tokens. It acts only with
    two or more updates a step (batch.minibatches, batch.epochs): in the first one logp = old_logp. fraction is a fraction, as in verl; the authors'
    k_percent is in percent (0.2 there is 2e-3 here). The paper: 2e-3 at 7B, 2e-4 at 32B; beta 1 (verl: 2e-4 and 0.1). The choice is made once a
    step (see the module). OUR CHOICE: tokens that tie at the threshold are all taken, and none with C <= 0.
    """
    if not 0 < fraction <= 1 or beta < 0:
        raise ValueError(f"kl_cov: fraction = {fraction} must lie in (0, 1], beta = {beta} must be at least 0")
    sample = (c.center(), c.scale(eps=std_eps))
    bound = 1e9 if clip is None else clip
    return Rule(
        credit=c.Credit(sample, channels={"high_cov": c.Credit(sample, (_mark_largest(fraction),))}),
        loss=(Term(losses.pg_clip(bound, bound)), Term(_kl_old(), coef=beta, name="kl_cov")),
        collect=partial(sample_groups, mask_truncated=mask_truncated), needs=Needs(old_logp=True),
    )  # fmt: skip


def covariance(a_T: Tensor, view: c.View) -> Tensor:
    """C_t of every token, float64; NaN where a sample is unscored."""
    on_T = view.scored_S[view.sample_T]
    logp_T = torch.where(on_T, view.streams["old_logp"], 0.0)
    n, a, logp = view.all_sum(torch.stack([on_T.double().sum(), torch.where(on_T, a_T, 0.0).sum(), logp_T.sum()]))
    n = n.clamp(min=1)
    return torch.where(on_T, (logp_T - logp / n) * (a_T - a / n), torch.nan)


def nth_largest(x: Tensor, n: int, view: c.View) -> float:
    """The n-th largest of the values of all ranks (n from 1), exactly; -inf where there are fewer. NaN entries are left out.

    Floats sort like integers once the negative ones are turned over; a byte at a time, the counts of all ranks say in which bin it lies.
    """
    bits = x[~x.isnan()].double().view(torch.int64)
    keys = torch.where(bits < 0, bits ^ 0x7FFF_FFFF_FFFF_FFFF, bits)
    if int(view.all_sum(torch.tensor([float(len(keys))], dtype=torch.float64))[0]) < n:
        return -float("inf")
    found, left = 0, n
    for shift in range(56, -1, -8):
        part = (keys >> shift) & 0xFF if shift < 56 else (keys >> shift) + 128  # the top byte carries the sign
        counts = view.all_sum(torch.bincount(part, minlength=256).double())
        above = counts.flip(0).cumsum(0).flip(0) - counts  # in higher bins
        bin_ = int(torch.nonzero((above < left) & (above + counts >= left))[0])
        left -= int(above[bin_])
        keys = keys[part == bin_]
        found |= (bin_ if shift < 56 else bin_ - 128) << shift
    key = torch.tensor([found], dtype=torch.int64)
    return float(torch.where(key < 0, key ^ 0x7FFF_FFFF_FFFF_FFFF, key).view(torch.float64)[0])


def _budget(fraction: float, view: c.View) -> int:
    scored = view.scored_S[view.sample_T].double().sum()
    return max(1, int(fraction * float(view.all_sum(scored[None])[0]) + 1e-9))


def _mark_largest(fraction: float) -> c.Transform:
    """1 for the tokens of largest covariance, else 0. Per token."""

    def f(a_T: Tensor, view: c.View) -> Tensor:
        cov_T = covariance(a_T, view)
        return ((cov_T >= nth_largest(cov_T, _budget(fraction, view), view)) & (cov_T > 1e-12)).double()

    return c.stateless("mark_largest_covariance", f)


def _drop_drawn(fraction: float, bounds: tuple[float, float]) -> c.Transform:
    """Advantage 0 for the eligible tokens with the largest draws. Per token; needs the stream "draw", uniform numbers."""

    def f(a_T: Tensor, view: c.View) -> Tensor:
        cov_T = covariance(a_T, view)
        draw_T = torch.where((cov_T > bounds[0]) & (cov_T < bounds[1]), view.streams["draw"], torch.nan)
        return torch.where(draw_T >= nth_largest(draw_T, _budget(fraction, view), view), 0.0, a_T)

    return c.stateless("drop_high_covariance", f)


def _kl_old() -> losses.LossFn:
    def kl_cov(batch: TokenBatch, out: Outputs) -> Tensor:
        return batch.stream["high_cov"].to(out.logp_T) * (out.logp_T - out.old_logp_T).abs()

    return kl_cov


@plays_episodes
async def _with_draws(prompts: Sequence[Prompt], io: RolloutIO, *, mask_truncated: bool) -> list[Group]:
    groups = await sample_groups(prompts, io, mask_truncated=mask_truncated)
    for s in (s for g in groups for s in g.samples):
        s.streams["draw"] = io.rng("clip_cov", s.id).random(len(s.token_ids)).tolist()
    return groups

"""GRPO-N and GSPO-N, relative negative gradients only (Yao et al., "The Debate on RLVR Reasoning Capability Boundary", arXiv:2510.04028)."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.rollout import sample_groups
from llmrl.rules.base import Over, Rule, Term

Keep = Literal["all", "neg", "pos"]


def grpo_n(
    *, keep: Keep = "neg", switch_step: int = 0, ratio: Literal["token", "sequence"] = "token", low: float | None = None, high: float | None = None,
    over: Over | None = None, renormalise: bool = False, std_eps: float = 1e-6, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo that keeps only the negative advantages: failures lose mass to all else in proportion, and no favourite is sharpened. arXiv:2510.04028.

    A_i <- min(A_i, 0) (keep = "neg") or max(A_i, 0) ("pos");  GRPO-N: mean over all tokens of clip(r_t, A);  GSPO-N: the sequence's ratio
    Differs from grpo: (1) that mask, (2) the mean over all tokens (ratio = "token"). grad("neg") + grad("pos") = grad("all"), so the denominator stays
    that of all samples; renormalise divides by the kept ones of the step, all ranks, instead. Graded rewards: right but below the group's mean is pressed
    down too. Where A < 0 a large ratio is not clipped. OUR CHOICE: switch_step, the step (from 1) from which the mask holds, `keep` "all" before; clip
    0.2 / 0.2 ("sequence": gspo's 3e-4 / 4e-4 and its mean over samples).
    """
    if switch_step < 0:
        raise ValueError(f"grpo_n: switch_step = {switch_step} is a step, from 1 (0 and 1: from the start)")
    clip, bounds = (losses.pg_clip, (0.2, 0.2)) if ratio == "token" else (losses.gspo, (3e-4, 4e-4))
    loss = clip(bounds[0] if low is None else low, bounds[1] if high is None else high)
    return Rule(
        credit=c.Credit((c.center(), c.scale(eps=std_eps), _keep(keep, switch_step, renormalise))),
        loss=(Term(loss, over=over or ("token" if ratio == "token" else "sample")),), collect=partial(sample_groups, mask_truncated=mask_truncated),
    )  # fmt: skip


def part(a: Tensor, keep: Keep) -> Tensor:
    """The negative or positive part of advantages."""
    return {"all": a, "neg": a.clamp(max=0.0), "pos": a.clamp(min=0.0)}[keep]


def _keep(keep: Keep, switch_step: int, renormalise: bool) -> c.Transform:
    def update(a_S: Tensor, state: c.State, view: c.View) -> tuple[Tensor, c.State]:
        step = int(state["step"]) + 1
        kept_S = part(a_S, keep if step >= switch_step else "all")
        if renormalise:
            on_S = (view.scored_S & (kept_S != 0)).double()
            n, left = view.all_sum(torch.stack([view.scored_S.double().sum(), on_S.sum()]))
            kept_S = kept_S * n / left.clamp(min=1)
        return kept_S, {"step": step}

    return c.Transform("keep_part", lambda: {"step": 0}, update)

"""CANON, conditional advantage estimation (Chen et al., arXiv:2509.23962)."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.rollout import sample_groups
from llmrl.rules.base import Needs, Rule, Term
from llmrl.segment import seg_count, seg_mean

Schedule = Literal["inter_first", "intra_first", "cosine_inter_first", "cosine_intra_first"]
Metric = Literal["entropy", "nll", "length"]


def canon(
    *, metric: Metric = "entropy", mu: float | Schedule = 1.0, alpha: float = 1.0, plus: Literal["high", "low"] | None = None,
    low: float = 0.2, high: float = 0.28, budget: int | None = None, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """dr_grpo that compares each half of a group, cut by a metric of the samples, with the other half and with itself. arXiv:2509.23962.

    A = mu (R - mean of the OTHER half) + (1 - mu) (R - mean of the OWN half); halves by rising metric, the low one floor(G/2). Eq. 3-8 (from notes and code)
    alpha < 1 (CANON-Eff, eq. 8-9): A_inter = alpha R - mean_other in the half `plus`, R - alpha mean_plus in the other; A_intra has no alpha.
    metric "entropy": mean over the tokens of the whole next-token distribution's entropy at the start of the step (one more forward); "nll": the mean
    of -log p of the sampled tokens, its one-sample estimate, free; "length". mu 1 (CANON-Inter), 0 (CANON-Intra), or CANON-Dynamic:
    "inter_first" mu = 1 - mean reward of the step, "intra_first" mu = mean reward, "cosine_...": restarts by the step (warm-up 30, cycles of 40).
    Differs from grpo: (1) that baseline, no std, (2) a constant token budget (None = rollout.max_new_tokens; paper 8192), (3) clip 0.2 / 0.28. mu = 0.5
    with even groups is dr_grpo. With alpha != 1 groups of equal rewards teach too. OUR CHOICE: the metric and mu by default; plus is the long or the
    low-entropy half, as in the code; ties of the metric go by place in the group (the paper states nothing); a group of one has an empty half:
    advantage 0 (the code: R). A group with an odd number of scored samples warns: mu = 0.5 is not dr_grpo there.
    """
    if (not isinstance(mu, str) and not 0 <= mu <= 1) or not 0 < alpha <= 1:
        raise ValueError(f"canon: mu = {mu} must lie in [0, 1] and alpha = {alpha} in (0, 1]")
    upper = (plus or ("high" if metric == "length" else "low")) == "high"
    return Rule(
        credit=c.Credit((_canon(metric, mu, alpha, upper),)), loss=(Term(losses.pg_clip(low, high), over="fixed", budget=budget),),
        collect=partial(sample_groups, mask_truncated=mask_truncated), needs=Needs(old_entropy=metric == "entropy"),
    )  # fmt: skip


def halves(metric_S: Tensor, view: c.View) -> Tensor:
    """True for the samples of their cohort's upper half: by (metric, place); the low half is the first floor(n / 2) scored ones."""
    later = torch.arange(len(metric_S))
    same = (view.cohort_S[:, None] == view.cohort_S) & view.scored_S & view.scored_S[:, None]
    before = (metric_S < metric_S[:, None]) | ((metric_S == metric_S[:, None]) & (later < later[:, None]))
    size_S = seg_count(view.cohort_S, view.cohorts, view.scored_S)[view.cohort_S]
    return (same & before).sum(1) >= torch.div(size_S, 2, rounding_mode="floor")


def conditional(a_S: Tensor, upper_S: Tensor, mu: float | Tensor, view: c.View, *, alpha: float = 1.0, plus_upper: bool = True) -> Tensor:
    """mu * inter + (1 - mu) * intra advantages of rewards a_S."""
    means = [seg_mean(a_S, view.cohort_S, view.cohorts, view.scored_S & (upper_S == side))[view.cohort_S] for side in (False, True)]
    own, other = torch.where(upper_S, means[1], means[0]), torch.where(upper_S, means[0], means[1])
    plus_S = upper_S == plus_upper
    inter = torch.where(plus_S, alpha * a_S - other, a_S - alpha * other)
    return (mu * inter + (1 - mu) * (a_S - own)).nan_to_num(0.0)  # NaN: an empty half, a cohort of one


def cosine(step: int, top: float, bottom: float) -> float:
    """c of 0-based `step`: linear to `top` over 30 steps, then from top to bottom in each cycle of 40."""
    if step < 30:
        return top * (step + 1) / 30
    return bottom + 0.5 * (top - bottom) * (1 + math.cos(math.pi * ((step - 30) % 40) / 40))


def _canon(metric: Metric, mu: float | Schedule, alpha: float, plus_upper: bool) -> c.Transform:
    def update(a_S: Tensor, state: c.State, view: c.View) -> tuple[Tensor, c.State]:
        odd = seg_count(view.cohort_S, view.cohorts, view.scored_S) % 2 == 1
        if bool(odd.any()):
            warnings.warn("canon: a group with an odd number of scored samples has unequal halves", stacklevel=2)
        n, total = view.all_sum(torch.stack([view.scored_S.double().sum(), view.reward_S[view.scored_S].sum()]))
        reward, step = float((total / n.clamp(min=1)).clamp(0, 1)), int(state["step"])
        now = mu if not isinstance(mu, str) else {
            "inter_first": 1 - reward, "intra_first": reward,
            "cosine_inter_first": cosine(step, 1.0, 0.4), "cosine_intra_first": 1 - cosine(step, 0.6, 0.0),
        }[mu]  # fmt: skip
        a_S = conditional(a_S, halves(_metric(metric, view), view), now, view, alpha=alpha, plus_upper=plus_upper)
        return torch.where(a_S.abs() < 1e-12, 0.0, a_S), {"step": step + 1}

    return c.Transform("canon", lambda: {"step": 0}, update)


def _metric(metric: Metric, view: c.View) -> Tensor:
    if metric == "length":
        return view.length_S.double()
    values_T = view.streams["old_entropy"] if metric == "entropy" else -view.streams["behavior_logp"]
    return seg_mean(values_T, view.sample_T, len(view.length_S)).nan_to_num(0.0)

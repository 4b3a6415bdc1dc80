"""ADORA, advantage dynamics via online rollout adaptation (Ren et al., arXiv:2602.10019)."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.rollout import sample_groups
from llmrl.rules.base import Over, Rule, Term
from llmrl.segment import seg_count, seg_max, seg_mean, seg_sum

Criteria = Literal["length", "difficulty", "and", "or"]


def adora(
    *, mode: Literal["attenuate", "amplify"] = "amplify", criteria: Criteria | None = None, tau: float = 0.5, up: float = 2.0, down: float = 0.1,
    renorm: bool = False, right: float = 0.5, low: float = 0.2, high: float = 0.2, over: Over = "sample", std_eps: float = 1e-6, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo whose advantages are multiplied, prompt by prompt, by a weight read off the group's lengths and success rate.

    A_i = w_q z_i;  amplify: w = up if the criterion holds, else 1;  attenuate: w = 1 if it holds, else down.  arXiv:2602.10019 eq. 4-6 (through notes)
    length: the LONGEST right sample is longer than the MEAN wrong one, samples cut by the limit left out;  difficulty: success rate <= tau
    Differs from grpo: (1) that weight, after normalisation, from this step's group alone. It re-weighs the objective: it is not an unbiased estimate.
    tau 0.5, up 2 (language models), down 0.1 (vision-language and the released code) are the paper's. OUR CHOICE: criteria "and" when amplifying (how
    the paper joins the two is not public), "length" when attenuating; no right sample: length does not hold and the weight is 1; no countable
    wrong sample: length holds; renorm divides by the mean weight over the prompts of the step, all ranks (the paper: not stated); a score above
    `right` is a right sample.
    """
    if min(up, down) <= 0:
        raise ValueError(f"adora: up = {up} and down = {down} are factors of advantages and must be above 0")
    weigh = _weigh(mode, criteria or ("and" if mode == "amplify" else "length"), tau, up, down, renorm, right)
    return Rule(
        credit=c.Credit((c.center(), c.scale(eps=std_eps), weigh)), loss=(Term(losses.pg_clip(low, high), over=over),),
        collect=partial(sample_groups, mask_truncated=mask_truncated),
    )  # fmt: skip


def advantages_hold(view: c.View, tau: float, right: float) -> tuple[Tensor, Tensor, Tensor]:
    """(length criterion, difficulty criterion, any right sample) of each cohort, bool."""
    n = view.cohorts
    right_S = view.scored_S & (view.reward_S > right)
    counted_S = view.scored_S & ~right_S & ~view.truncated_S
    longest = seg_max(view.length_S.double(), view.cohort_S, n, right_S)
    mean = seg_mean(view.length_S.double(), view.cohort_S, n, counted_S)
    some = seg_count(view.cohort_S, n, right_S) > 0
    rate = seg_sum(right_S.double(), view.cohort_S, n) / seg_count(view.cohort_S, n, view.scored_S)
    return some & (mean.isnan() | (longest > mean)), rate <= tau, some


def _weigh(mode: str, criteria: Criteria, tau: float, up: float, down: float, renorm: bool, right: float) -> c.Transform:
    def f(a_S: Tensor, view: c.View) -> Tensor:
        length, hard, some = advantages_hold(view, tau, right)
        holds = {"length": length, "difficulty": hard, "and": length & hard, "or": length | hard}[criteria]
        one = torch.ones(view.cohorts, dtype=torch.float64)
        w = torch.where(some & holds, up, one) if mode == "amplify" else torch.where(some & ~holds, down, one)
        if renorm:
            there = seg_count(view.cohort_S, view.cohorts, view.scored_S) > 0
            n, total = view.all_sum(torch.stack([there.double().sum(), w[there].sum()]))
            w = w * n / total.clamp(min=1e-12)
        return a_S * w[view.cohort_S]

    return c.stateless("adora", f)

"""A-GRAE, asymmetric group-relative advantage estimation (Yu et al., arXiv:2602.05548)."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.rollout import sample_groups
from llmrl.rules.base import Over, Rule, Term
from llmrl.segment import seg_mean

Arm = Literal["both", "hard", "easy"]


def a_grae(
    *, alpha: float = 1.0, arm: Arm = "both", positive: float = 1.0, easy_norm: Literal["paper", "code"] = "paper", divide_by_std: bool = True,
    low: float = 0.2, high: float = 0.2, over: Over = "sample", std_eps: float = 1e-6, ddof: int = 1, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo whose advantages are weighed by prompt difficulty against the batch's accuracy, and damped where positive while that is low.

    A_i = z_i (omega / (2 sqrt(p)) + (1 - omega) / (2 sqrt(1 - p))), 0 for p in {0, 1};  A_i > 0: times min(1, omega / alpha).  arXiv:2602.05548 eq. 11-13
    z_i: grpo's advantage; p: mean reward of the prompt; omega: mean reward of the step, all ranks. A score is the correctness signal, in [0, 1].
    Differs from grpo: (1) that factor, (2) the damping, so that groups no longer sum to 0 while omega < alpha. alpha 1 is the paper's for text
    mathematics, 0.5 for Geo3K and medical VQA. arm = "hard" or "easy" are the paper's ablations (z / (2 sqrt(p)), z / (2 sqrt(1 - p))), as is `positive`,
    a factor of positive advantages (10 or 0.1 there). easy_norm = "code": 1 / (1 - sqrt(p)) for 1 / sqrt(1 - p), as released: for replication only.
    OUR CHOICE: ddof 1 and std_eps (the identities of the paper hold with ddof 0), no smoothing of omega over steps, and with divide_by_std = false
    (for Dr. GRPO; then over = "fixed") the same factors on R - mean. The loss is the host's: over = "token" and high = 0.28 are DAPO's.
    """
    if not 0 < alpha <= 1 or positive <= 0:
        raise ValueError(f"a_grae: alpha = {alpha} must lie in (0, 1], positive = {positive} above 0")
    scale = (c.scale(eps=std_eps, ddof=ddof),) if divide_by_std else ()
    asymmetric = _asymmetric(alpha, arm, positive, easy_norm)
    return Rule(
        credit=c.Credit((c.center(), *scale, asymmetric)), loss=(Term(losses.pg_clip(low, high), over=over),),
        collect=partial(sample_groups, mask_truncated=mask_truncated),
    )  # fmt: skip


def asymmetric(a_S: Tensor, p_S: Tensor, omega: float | Tensor, *, alpha: float = 1.0, arm: Arm = "both", easy_norm: str = "paper") -> Tensor:
    """Equations 11-13 on advantages a_S of prompts with success rates p_S."""
    omega = torch.as_tensor(omega, dtype=torch.float64)
    hard = 0.5 / p_S.sqrt()
    easy = 0.5 / ((1 - p_S).sqrt() if easy_norm == "paper" else 1 - p_S.sqrt())
    factor = {"both": omega * hard + (1 - omega) * easy, "hard": hard, "easy": easy}[arm]
    if arm == "both":
        factor = torch.where(a_S > 0, factor * (omega / alpha).clamp(max=1.0), factor)
    return torch.where((p_S > 1e-12) & (p_S < 1 - 1e-12), a_S * factor, 0.0)


def _asymmetric(alpha: float, arm: Arm, positive: float, easy_norm: str) -> c.Transform:
    def f(a_S: Tensor, view: c.View) -> Tensor:
        n, total = view.all_sum(torch.stack([view.scored_S.double().sum(), view.reward_S[view.scored_S].sum()]))
        p_S = seg_mean(view.reward_S, view.cohort_S, view.cohorts, view.scored_S)[view.cohort_S].nan_to_num(0.0)
        a_S = asymmetric(a_S, p_S, total / n.clamp(min=1), alpha=alpha, arm=arm, easy_norm=easy_norm)
        return torch.where(a_S > 0, positive * a_S, a_S)

    return c.stateless("asymmetric", f)

"""DRPO, decoupled reward policy optimisation (Li, Chen, Lin, Yang; arXiv:2510.04474; not to be taken for other methods of that name)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.rollout import sample_groups
from llmrl.rules.base import Needs, Rule, Term
from llmrl.segment import seg_count, seg_max, seg_mean, seg_sum

if TYPE_CHECKING:
    from llmrl.batch import Outputs, TokenBatch

KLForm = Literal["kl", "low_var_kl"]


def drpo(
    *, lam: float = 0.1, tau: float = 10.0, beta: float = 1e3, delta: float = 1e-4, kl_form: KLForm = "kl", form: Literal["loss", "advantage"] = "loss",
    max_length: int | None = None, right: float = 0.5, low: float = 0.2, high: float = 0.2, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """Pushes right samples up by weights that favour short ones, and wrong ones down together: length never turns a right sample's sign.

    J_q = sum_right w_i s_i - tau log mean_wrong exp(s_j / tau);  s = mean log-prob of a sample, w = softmax over the right ones of (1 - length/C) / lam
    loss = -(1/P) sum_q J_q + (beta/2) max(0, K - delta)^2, K = mean of old_logp - logp;  P counts all prompts, those of one outcome too (J_q = 0). Eq. 7
    Differs from grpo: (1) no advantage, ratio or clipping: that loss over whole groups, (2) the constraint for them. lam 0.1 (length temperature), tau 10
    (the script; the inherited default is 1), beta 1e3, delta 1e-4 are the released script's. K there is over the micro-batch at hand; here it is over each
    prompt's tokens, and the penalty the mean over the prompts, so that it does not depend on how the batch is cut. It acts from the second update of a
    step on. The released code prints another value of the same gradient. form = "advantage" (OUR CHOICE, not the paper's): A = G w_i, -G softmax_j(s_old /
    tau), in grpo's clipped loss (low, high; no constraint). OUR CHOICE: C = max_length, by default rollout.max_new_tokens (code: padded width).
    """
    if lam <= 0 or tau <= 0 or beta < 0 or delta < 0:
        raise ValueError(f"drpo: lam = {lam} and tau = {tau} are temperatures above 0; beta = {beta} and delta = {delta} at least 0")
    collect = partial(sample_groups, mask_truncated=mask_truncated)
    shares = _shares(lam, max_length, right, mask_truncated)
    if form == "advantage":
        credit = c.Credit((shares, _discriminative(tau)))
        return Rule(credit=credit, loss=(Term(losses.pg_clip(low, high), over="sample"),), collect=collect, needs=Needs(old_logp=True))
    terms = [Term(discriminative(tau), over="sample", count="groups", name="drpo")]
    if beta:
        terms.append(Term(trust_region(delta, kl_form), over="sample", count="groups", coef=beta, name="trust_region"))
    return Rule(credit=c.Credit((shares,)), loss=tuple(terms), collect=collect, needs=Needs(whole_groups=True))


def length_weights(preference_S: Tensor, lam: float, cohort_S: Tensor, n: int, right_S: Tensor) -> Tensor:
    """w_i = softmax of preference / lam over the right samples of each cohort; 0 for the others. preference >= 0, 1 - length/C for length."""
    x_S = preference_S / lam
    top_S = seg_max(x_S, cohort_S, n, right_S)[cohort_S]
    e_S = torch.where(right_S, (x_S - top_S).exp(), 0.0)
    return torch.where(right_S, e_S / seg_sum(e_S, cohort_S, n)[cohort_S], 0.0)


def _shares(lam: float, max_length: int | None, right: float, mask_truncated: bool) -> c.Transform:
    """w_i for right samples, -1/(number of wrong ones) for wrong ones, 0 in groups of one outcome: what the loss reads as its advantage."""

    def f(a_S: Tensor, view: c.View) -> Tensor:
        on_S = view.scored_S & ~(view.truncated_S & mask_truncated)
        right_S, wrong_S, n = on_S & (a_S > right), on_S & (a_S <= right), view.cohorts
        w_S = length_weights(1 - view.length_S.double() / (max_length or view.max_new_tokens), lam, view.cohort_S, n, right_S)
        wrong_n, right_n = (seg_count(view.cohort_S, n, x)[view.cohort_S] for x in (wrong_S, right_S))
        share_S = torch.where(right_S, w_S, torch.where(wrong_S, -1 / wrong_n.clamp(min=1), 0.0))
        return torch.where((wrong_n > 0) & (right_n > 0), share_S, 0.0)

    return c.stateless("drpo_shares", f)


def _discriminative(tau: float) -> c.Transform:
    """Shares -> G w_i and -G softmax over the wrong ones of s_old / tau. Needs the stream old_logp."""

    def f(share_S: Tensor, view: c.View) -> Tensor:
        n = view.cohorts
        s_S = seg_mean(view.streams["old_logp"], view.sample_T, len(share_S)).nan_to_num(0.0) / tau
        wrong_S = share_S < 0
        e_S = torch.where(wrong_S, (s_S - seg_max(s_S, view.cohort_S, n, wrong_S)[view.cohort_S]).exp(), 0.0)
        down_S = e_S / seg_sum(e_S, view.cohort_S, n)[view.cohort_S].clamp(min=1e-300)
        return seg_count(view.cohort_S, n, view.scored_S)[view.cohort_S] * torch.where(wrong_S, -down_S, share_S)

    return c.stateless("drpo_advantages", f)


def discriminative(tau: float) -> losses.LossFn:
    """-w_i s_i for right samples, their share of tau log mean exp(s_j / tau) for wrong ones; one number a sample. Needs(whole_groups=True)."""

    def drpo(batch: TokenBatch, out: Outputs) -> Tensor:
        n = batch.n_samples
        on_T = batch.weight["policy"] > 0
        s_S = torch.where(seg_sum(on_T.float(), batch.sample_T, n) > 0, seg_mean(out.logp_T, batch.sample_T, n, on_T), 0.0)
        share_S = seg_max(batch.adv_T, batch.sample_T, n).to(s_S)
        wrong_S = share_S < 0
        top_S = seg_max(s_S.detach() / tau, batch.cohort_S, n, wrong_S)[batch.cohort_S].nan_to_num(0.0)
        mean_S = seg_sum(torch.where(wrong_S, -share_S * (s_S / tau - top_S).exp(), 0.0), batch.cohort_S, n)[batch.cohort_S]
        down_S = tau * (torch.where(wrong_S, mean_S, 1.0).log() + top_S)
        return torch.where(wrong_S, -share_S * down_S, -share_S * s_S)[batch.sample_T]

    return drpo


def trust_region(delta: float, kl_form: KLForm = "kl") -> losses.LossFn:
    """max(0, K - delta)^2 / 2 of the cohort, shared out over its samples; K in nats a token. Needs(whole_groups=True)."""

    def trust_region(batch: TokenBatch, out: Outputs) -> Tensor:
        on_T = batch.weight["policy"] > 0
        d_T = out.logp_T - out.old_logp_T
        k_T = -d_T if kl_form == "kl" else d_T.clamp(-20.0, 20.0).exp() - 1 - d_T
        cohort_T, n = batch.cohort_S[batch.sample_T], batch.n_samples
        tokens = seg_sum(on_T.to(k_T), cohort_T, n).clamp(min=1)
        k = seg_sum(torch.where(on_T, k_T, 0.0), cohort_T, n) / tokens
        on_S = seg_sum(on_T.to(k_T), batch.sample_T, n) > 0
        members = seg_sum(on_S.to(k_T), batch.cohort_S, n).clamp(min=1)
        return (0.5 * (k - delta).clamp(min=0.0) ** 2 / members)[cohort_T]

    return trust_region

"""COPO, consistency-aware policy optimisation (Han et al., arXiv:2508.04138)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.records import Group, Prompt
from llmrl.rollout import RolloutIO, sample_groups
from llmrl.rules.base import Rule, Term
from llmrl.segment import seg_count, seg_mean

Blend = Literal["none", "global", "soft", "forced", "soft_forced", "zero", "soft_zero"]


def copo(
    *, sharpness: float = 5.0, middle: float = 1.0, blend: Blend = "soft", consistency: bool = False, low: float = 0.2, high: float = 0.2,
    dual: float | None = 3.0, std_eps: float = 1e-6, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo blended with a second advantage of the whole prompt against the other prompts, by the entropy of the group's answers.

    A_glob = (R_q - mean_q R) / (std_q R + std_eps), R_q the mean reward of prompt q, over the distinct prompts of the step, ddof 1, all ranks
    H_q = entropy (bits) of the group's answers;  w = sigmoid(sharpness (H_q - middle));  loss = w clip(r, A_loc) + (1 - w) clip(r, A_glob)
    arXiv:2508.04138, as the authors' code has it. Differs from grpo: (1) the second, separately clipped term, so groups of equal rewards teach;
    (2) dual clip at 3. sharpness 5 and middle 1 are the paper's (gamma, rho). blend says what multiplies the local term: "none" 1, "global" 0, "soft"
    w (the paper), "forced" [A_loc != 0], "zero" [reward != 0], "soft_forced" and "soft_zero" (the released scripts ask for the latter) times w.
    consistency: R_q *= 1 - lam H_q with lam = (1 - 1/n) / log2(n) (off in the released runs). Answers are compared as the verifier's extracted strings.
    OUR CHOICE: a sample without an answer is a class of its own, "<none>", shared by all such; statistics run over all ranks.
    """
    if dual is not None and dual <= 1:
        raise ValueError(f"copo: dual = {dual} bounds the loss where the advantage is negative; it must be above 1, or left out")
    clip = losses.pg_clip(low, high, dual=dual)
    local = (c.center(), c.scale(eps=std_eps), _blend("local_share", blend, sharpness, middle, rest=False))
    whole = (c.center(), c.scale(eps=std_eps), _blend("global_share", blend, sharpness, middle, rest=True), _global(consistency, std_eps))
    return Rule(
        # clip(r, A) times a weight >= 0 is clip(r, weight * A), the dual clip too: the weights are part of the advantages
        credit=c.Credit(local, channels={"global": c.Credit(whole)}),
        loss=(Term(clip, over="sample"), Term(losses.on_channel(clip, "global"), over="sample", name="global")),
        collect=partial(_with_answer_entropy, mask_truncated=mask_truncated),
    )  # fmt: skip


copo.cost = ""  # type: ignore[attr-defined]  # its collect only puts numbers beside the samples


def answer_entropy(answers: Sequence[str | None]) -> float:
    """H of the empirical distribution of the answers, in bits."""
    counts = Counter("<none>" if a is None else a for a in answers)
    return -sum(k / len(answers) * math.log2(k / len(answers)) for k in counts.values()) + 0.0


def local_share(a_S: Tensor, h_S: Tensor, reward_S: Tensor, blend: Blend, sharpness: float, middle: float) -> Tensor:
    """What multiplies the local term, [S]; a_S are the local advantages."""
    soft = torch.sigmoid(sharpness * (h_S - middle)) if blend.startswith("soft") else torch.ones_like(a_S)
    gate = {"forced": a_S != 0, "zero": reward_S != 0, "global": torch.zeros_like(a_S)}.get(blend.removeprefix("soft_"))
    return soft if gate is None else soft * gate.double()


def _blend(name: str, blend: Blend, sharpness: float, middle: float, *, rest: bool) -> c.Transform:
    """Local advantages -> their share of them, or (rest) the share that is left to the global one."""

    def f(a_S: Tensor, view: c.View) -> Tensor:
        h_S = view.of_sample("answer_entropy_bits").nan_to_num(0.0)
        w_S = local_share(a_S, h_S, view.reward_S, blend, sharpness, middle)
        return 1 - w_S if rest else w_S * a_S

    return c.stateless(name, f)


def _global(consistency: bool, eps: float) -> c.Transform:
    """Shares left to it -> those times A_glob."""

    def f(w_S: Tensor, view: c.View) -> Tensor:
        n_G = seg_count(view.cohort_S, view.cohorts, view.scored_S)
        r_G = seg_mean(view.reward_S, view.cohort_S, view.cohorts, view.scored_S).nan_to_num(0.0)
        if consistency:
            h_G = seg_mean(view.of_sample("answer_entropy_bits"), view.cohort_S, view.cohorts, view.scored_S).nan_to_num(0.0)
            r_G = r_G * (1 - (1 - 1 / n_G.clamp(min=2)) / n_G.clamp(min=2).log2() * h_G)
        mean, var = c.moments(r_G, (n_G > 0).double(), view)
        off_G = torch.where((r_G - mean).abs() < 1e-12, 0.0, r_G - mean)
        return w_S * (off_G / (var.sqrt() + eps))[view.cohort_S]

    return c.stateless("global_advantage", f)


async def _with_answer_entropy(prompts: Sequence[Prompt], io: RolloutIO, *, mask_truncated: bool) -> list[Group]:
    groups = await sample_groups(prompts, io, mask_truncated=mask_truncated)
    for g in groups:
        judged = [s for s in g.samples if s.reward is not None]
        for s in judged:
            bits = answer_entropy([x.verdict.answer if x.verdict else None for x in judged])
            s.streams["answer_entropy_bits"] = [bits] * len(s.token_ids)
    return groups

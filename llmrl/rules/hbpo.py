"""HBPO, hierarchical budget policy optimisation (Lyu, Wu et al., arXiv:2507.15844)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.records import Group, InputError, Prompt
from llmrl.rollout import RolloutIO, make_sample
from llmrl.rules.base import Over, Rule, Term
from llmrl.segment import seg_mean, seg_std

PREFIX = "<think>\nI will answer the question within {budget} tokens.\n"
"""What the assistant's text is made to begin with; the wording is ours, the meaning the paper's."""


def hbpo(
    *, budgets: tuple[float, ...] = (0.125, 0.25, 0.5, 0.625), prefix: str = PREFIX, beta: float = 4.0, alpha: float | None = None, clamp: bool = False,
    right: float = 0.5, low: float = 0.2, high: float = 0.28, over: Over = "token", std_eps: float = 1e-6, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """Samples of a prompt are told different token budgets; rewards fall off beyond the budget, and are compared within and between budgets.

    R(n|b) = beta cos(pi n / 2L) - alpha |n - b| for a right sample of n > b tokens, beta cos(pi b / 2L) =: f(b) for n <= b, 0 if wrong or cut
    A = [mean of the budget's samples of R - f(b)] + [(R - mean_prompt R) / (std_prompt R + std_eps)], ddof 1.  L = rollout.max_new_tokens. arXiv:2507.15844
    Differs from grpo: (1) the reward, (2) contexts: sample i begins with `prefix` and budget i mod k (part of the context, not trained), (3) the
    first bracket, which is never positive, (4) the mean over all tokens and clip 0.2 / 0.28. An all-wrong prompt is pushed down by -f(b). As in the paper's
    equations (the released code takes a minimum with f, rounds, gives -1 without a box, and adds the bracket twice). The paper: 16 samples, budgets 512,
    1024, 2048, 2560 of 4096, beta 4, alpha 1/4096. OUR CHOICE: budgets as fractions of L (above 1: tokens), alpha 1/L, round-robin where the group
    is no multiple of k, a guard for std 0, negative R kept (clamp = true stops at 0), and the prefix. Evaluation uses no prefix. For a chat template that
    opens the think tag itself, or a tiny model, set another prefix (with {budget} in it).
    """
    if not budgets or min(budgets) <= 0 or "{budget}" not in prefix:
        raise ValueError(f"hbpo: budgets = {budgets} must be one or more positive numbers, and prefix must contain {{budget}}")
    credit = c.Credit((_budget_reward(beta, alpha, clamp, right), _hierarchical(beta, std_eps)))
    collect = partial(budget_groups, budgets=budgets, prefix=prefix, mask_truncated=mask_truncated)
    return Rule(credit=credit, loss=(Term(losses.pg_clip(low, high), over=over),), collect=collect)


hbpo.cost = ""  # type: ignore[attr-defined]  # its collect changes the contexts only


def tokens_of(budgets: Sequence[float], limit: int) -> list[int]:
    """Budgets in tokens: those up to 1 are fractions of the limit."""
    return [max(1, round(b * limit)) if b <= 1 else int(b) for b in budgets]


def within(budget_S: Tensor, limit: int, beta: float) -> Tensor:
    """f(b): the reward of a right sample that keeps to its budget."""
    return beta * torch.cos(torch.pi * budget_S / (2 * limit))


def reward(length_S: Tensor, budget_S: Tensor, right_S: Tensor, limit: int, beta: float, alpha: float) -> Tensor:
    """R(n|b)."""
    beyond = beta * torch.cos(torch.pi * length_S / (2 * limit)) - alpha * (length_S - budget_S).abs()
    kept = torch.where(length_S <= budget_S, within(budget_S, limit, beta), beyond)
    return torch.where(right_S, kept, 0.0)


def _budget_reward(beta: float, alpha: float | None, clamp: bool, right: float) -> c.Transform:
    def f(a_S: Tensor, view: c.View) -> Tensor:
        limit = view.max_new_tokens
        right_S = view.scored_S & (a_S > right) & ~view.truncated_S
        r_S = reward(view.length_S.double(), view.of_sample("budget"), right_S, limit, beta, alpha if alpha is not None else 1 / limit)
        return r_S.clamp(min=0.0) if clamp else r_S

    return c.stateless("budget_reward", f)


def _hierarchical(beta: float, eps: float) -> c.Transform:
    def f(r_S: Tensor, view: c.View) -> Tensor:
        budget_S = view.of_sample("budget")
        pairs, own_S = torch.unique(torch.stack([view.cohort_S.double(), budget_S], 1), dim=0, return_inverse=True)
        intra = (seg_mean(r_S, own_S, len(pairs), view.scored_S) - within(pairs[:, 1], view.max_new_tokens, beta))[own_S]
        off = r_S - seg_mean(r_S, view.cohort_S, view.cohorts, view.scored_S)[view.cohort_S]
        std = seg_std(r_S, view.cohort_S, view.cohorts, view.scored_S)[view.cohort_S].nan_to_num(0.0)
        return intra + torch.where(off.abs() < 1e-12, 0.0, off / (std + eps))

    return c.stateless("hierarchical", f)


async def budget_groups(prompts: Sequence[Prompt], io: RolloutIO, *, budgets: Sequence[float], prefix: str, mask_truncated: bool) -> list[Group]:
    """The default collect, but sample i of a prompt is conditioned on budget i mod k."""
    told = tokens_of(budgets, io.sampling.max_new_tokens)
    texts = [prefix.format(budget=b) for b in told]
    if strange := next((s for s in map(io.chat.unknown, texts) if s is not None), None):
        raise InputError(f"[rule] hbpo: the tokenizer has no token for {strange!r} of prefix = {prefix!r}; set another prefix")
    begins = [io.chat.completion_ids(text)[:-1] for text in texts]  # without the end token
    jobs = [(p, i) for p in prompts for i in range(io.group)]
    contexts = [io.chat.prompt_ids(p.messages) + begins[i % len(told)] for p, i in jobs]
    done = io.sample(contexts, [(p.visit_id, i) for p, i in jobs])
    verdicts = await io.verify([(p, d.text) for (p, _), d in zip(jobs, done, strict=True)])
    groups = [Group(p, []) for p in prompts]
    for k, ((p, i), context, d, v) in enumerate(zip(jobs, contexts, done, verdicts, strict=True)):
        s = make_sample(p, i, context, d, v, mask_truncated=mask_truncated)
        s.streams["budget"] = [float(told[i % len(told)])] * len(s.token_ids)
        groups[k // io.group].samples.append(s)
        io.note(f"budget_{told[i % len(told)]}/tokens", len(s.token_ids))
    return groups

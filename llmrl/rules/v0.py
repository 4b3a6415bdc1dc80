"""V_0, a value at state zero (Zhang et al., arXiv:2602.03584): rollouts are shared out among the prompts by how likely each is to be solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from llmrl import credit as c
from llmrl.records import Group, InputError, Prompt
from llmrl.rollout import RolloutIO, sample_groups
from llmrl.rules import grpo as family
from llmrl.rules import v0_value
from llmrl.rules.base import Rule
from llmrl.rules.vgf_value import ranked

Allocate = Literal["exact", "greedy", "uniform"]


def v0(
    *, allocate: Allocate = "exact", b_min: int = 2, b_max: int = 128, window: int = 8, value: Literal["history", "learned"] = "history",
    prior: str | None = None, context: int = 256, rank_share: float = 0.25, ridge: float = 0.01, clamp: float = 0.01,
    average: Literal["sample", "prompt"] = "sample", right: float = 0.5, low: float = 0.2, high: float = 0.2, std_eps: float = 1e-6, ddof: int = 0,
    kl: float = 0.0, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo whose group sizes follow a prediction of each prompt's success; the number of samples of a step stays what it was. arXiv:2602.03584.

    maximise sum_i U(B_i, p_i) subject to sum_i B_i <= rollout.prompts * rollout.group, b_min <= B_i <= b_max;  U(B, p) = B (1 - p) [1 - (1 - p)^(B - 1)]
    (U: expected number of wrong samples in groups that are neither all right nor all wrong, so that rarer successes count for more.)
    Differs from grpo: (1) the group sizes B_i, (2) ddof 0, as the paper's advantages. All prompts of the step are allocated together, those of other ranks
    too, so B_i does not depend on the ranks; ranks then have unequal shares. "exact" is dynamic programming, O(prompts * samples * b_max) a step; the
    paper's "greedy" (largest marginal next) is kept for comparison: U is not concave in B where p is small, and greedy can end far below. B in [2, 128] is
    the paper's; U grows like B (1 - p), so the optimum gives a few hard prompts b_max each and most others b_min: where p is known poorly, set b_max to
    2 to 4 times rollout.group. LEFT OUT: routing.
    p_i = (s + 1) / (n + 2), s of n right over the prompt's last `window` visits; before the first visit the mean rate of the step before (0.5 at first).
    With a prediction m of another source (s + 2m) / (n + 2), from the first visit on: OUR CHOICE, as the former. prior: a column of the rows that holds m.
    value = "learned": m from a value at state zero (v0_value.py), fitted each step to the last `context` (prompt, result) pairs, 256 in the paper, with the
    paper's loss, rank_share L_rank + (1 - rank_share) L_CE, its 0.25, and the penalty ridge / 2 |w|^2; the paper's embedder and tabular predictor
    are models of their own: OUR CHOICE are hashed letters and a linear model. p is clamped to [clamp, 1 - clamp]. average = "prompt" weighs samples by
    rollout.group / B_i, so that prompts count alike; "sample": samples do. It needs prompts that come back, a prior column, or value = "learned".
    Metrics rule/rate/{predicted,observed,error}, rule/rate/ranked (share of a rank's prompt pairs that p had in the order of their results),
    rule/group/{at_minimum_share,utility}.
    """
    if not 1 <= b_min <= b_max or window < 1 or not 0 <= clamp < 0.5:
        raise ValueError(f"v0: 1 <= b_min = {b_min} <= b_max = {b_max}, window = {window} at least 1, and clamp = {clamp} in [0, 0.5) must hold")
    if context < 1 or not 0 <= rank_share <= 1 or ridge <= 0:
        raise ValueError(f"v0: context = {context} at least 1, rank_share = {rank_share} in [0, 1] and ridge = {ridge} above 0 must hold")
    if value == "history" and (context, rank_share, ridge) != (256, 0.25, 0.01):
        raise ValueError('v0: context, rank_share and ridge do nothing with value = "history"; leave them out or say value = "learned"')
    if value == "learned" and prior is not None:
        raise ValueError(f'v0: prior = {prior!r} and value = "learned" both say what a prompt without visits has; leave one out')
    collect = partial(
        allocated_groups, allocate=allocate, b_min=b_min, b_max=b_max, window=window, prior=prior, clamp=clamp, average=average, right=right,
        mask_truncated=mask_truncated, learned=(context, rank_share, ridge) if value == "learned" else None,
    )  # fmt: skip
    return replace(family.grpo(low=low, high=high, kl=kl), credit=c.Credit((c.center(), c.scale(eps=std_eps, ddof=ddof))), collect=collect)


v0.cost = ""  # type: ignore[attr-defined]  # its collect moves samples from prompt to prompt


def utility(b: np.ndarray | int, p: np.ndarray | float) -> np.ndarray:
    """U(B, p), broadcast. Equation 4."""
    q = 1 - np.asarray(p, dtype=np.float64)
    return b * q * (1 - q ** (np.asarray(b) - 1))


def exact(p: Sequence[float], total: int, b_min: int, b_max: int) -> list[int]:
    """The sizes of greatest summed utility, at most `total` samples; of equal ones later prompts take less."""
    room = total - len(p) * b_min
    most = min(b_max - b_min, room)
    extra = np.arange(most + 1)
    best, choice = np.zeros(room + 1), np.zeros((len(p), room + 1), dtype=np.int32)
    for i, p_i in enumerate(p):
        before = sliding_window_view(np.concatenate([np.full(most, -np.inf), best]), most + 1)[:, ::-1]  # [room left, extra samples for i]
        value = before + utility(b_min + extra, p_i)
        choice[i] = value.argmax(1)
        best = value.max(1)
    sizes = []
    for i in reversed(range(len(p))):
        sizes.append(b_min + int(choice[i, room]))
        room -= int(choice[i, room])
    return sizes[::-1]


def greedy(p: Sequence[float], total: int, b_min: int, b_max: int) -> list[int]:
    """One sample after the other to where U(B + 1) - U(B) is largest, ties to the first. Equation 5."""
    rates, sizes = np.asarray(p, dtype=np.float64), np.full(len(p), b_min)
    for _ in range(total - len(p) * b_min):
        gain = np.where(sizes < b_max, utility(sizes + 1, rates) - utility(sizes, rates), 0.0)
        if gain.max() <= 0:
            break
        sizes[gain.argmax()] += 1
    return sizes.tolist()


async def allocated_groups(
    prompts: Sequence[Prompt], io: RolloutIO, *, allocate: Allocate, b_min: int, b_max: int, window: int, prior: str | None, clamp: float, average: str,
    right: float, mask_truncated: bool, learned: tuple[int, float, float] | None,
) -> list[Group]:  # fmt: skip
    """The default collect with a number of samples for each prompt."""
    if not b_min <= io.group <= b_max:
        raise InputError(f"[rule] v0: rollout.group = {io.group}, the mean group size, must lie in [b_min, b_max] = [{b_min}, {b_max}]")
    everyone = io.step_prompts or prompts
    looks = v0_value.by_looks([p.text for p in everyone], io.memory, *learned) if learned else None
    told = looks or [None if prior is None else v0_value.by_column(p, prior) for p in everyone]
    rate = {p.visit_id: v0_value.predicted(p, io.memory, m, clamp) for p, m in zip(everyone, told, strict=True)}
    share = {"exact": exact, "greedy": greedy, "uniform": lambda p, *_: [io.group] * len(p)}[allocate]
    size = dict(zip(rate, share(list(rate.values()), len(rate) * io.group, b_min, b_max), strict=True))
    groups = await sample_groups(prompts, io, mask_truncated=mask_truncated, sizes=[size[p.visit_id] for p in prompts])
    pairs: list[tuple[float, float]] = []
    for g in groups:
        p, b = rate[g.prompt.visit_id], size[g.prompt.visit_id]
        judged = [s.reward > right for s in g.samples if s.reward is not None]
        if average == "prompt":
            for s in g.samples:
                s.weights["policy"] *= io.group / b
        io.note("group/at_minimum_share", float(b == b_min))
        io.note("group/utility", float(utility(b, p)))
        if judged:
            io.memory.remember("v0/visits", g.prompt.id, [sum(judged), len(judged)], cap=window)
            io.memory.track("v0/rate", sum(judged), len(judged), decay=0.0)
            if learned:
                v0_value.learn(g.prompt, io, sum(judged), len(judged), learned[0] + len(everyone))
            pairs.append((p, sum(judged) / len(judged)))
            for name, value in (("predicted", p), ("observed", sum(judged) / len(judged)), ("error", abs(p - sum(judged) / len(judged)))):
                io.note(f"rate/{name}", value)
    if pairs and (found := ranked(*torch.tensor(pairs, dtype=torch.float64).T))[1]:
        io.note("rate/ranked", *found)
    return groups

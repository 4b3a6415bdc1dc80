"""HDPO, decoupled accuracy and tool-efficiency optimisation (Yan, Tong et al., arXiv:2604.08545)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.records import Group, Prompt, Sample
from llmrl.rollout import RolloutIO, plays_episodes, sample_groups
from llmrl.rules.base import Over, Rule, Term
from llmrl.segment import seg_count, seg_mean, seg_std

Eligible = Literal["nonzero", "correct"]


def hdpo(
    *, tool_weight: float = 0.15, mark: str = "<tool_call>", right: float = 0.5, eligible: Eligible = "nonzero", coupled: bool = False,
    low: float = 0.2, high: float = 0.2, over: Over = "token", std_eps: float = 1e-6, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo plus a second channel that ranks the right samples of a group, and only those, by how few tool calls they made. arXiv:2604.08545.

    A_tool_i = (r_i - mean_Q) / (std_Q + std_eps), r = 1 / (calls + 1), Q = the right samples of the group; 0 outside Q and where |Q| < 2; ddof 1
    loss = clip(r_t, A_acc) + tool_weight * clip(r_t, A_tool), each over its own samples: the second divides by the tokens of those with A_tool != 0.
    Differs from grpo: (1) that term, so solved prompts still teach economy and wrong samples never gain by it, (2) the mean over all tokens.
    tool_weight 0.15 is the paper's. Its accuracy reward 0.9 answer + 0.1 format is the verifier's affair (verifier `combine`). Tool calls are counted as
    occurrences of `mark` in the text, or taken from the stream "tool_calls" where a sample brings it. coupled = true is the form that the paper argues
    against, r_acc + tool_weight * r_tool in one normalisation. OUR CHOICE: a score above `right` is right; eligible = "correct" makes all of Q count in
    the denominator where |Q| >= 2 ("nonzero", the code: those at Q's mean exactly do not); clip 0.2 is the framework's default.
    """
    if tool_weight < 0 or not mark:
        raise ValueError(f"hdpo: tool_weight = {tool_weight} must be at least 0, and mark a text that a tool call contains")
    accuracy, clip = (c.center(), c.scale(eps=std_eps)), losses.pg_clip(low, high)
    collect = partial(_counted_groups, mark=mark, right=right, eligible=eligible, mask_truncated=mask_truncated)
    if coupled:
        return Rule(credit=c.Credit((_coupled(tool_weight, right), *accuracy)), loss=(Term(clip, over=over),), collect=collect)
    tool = Term(losses.on_channel(clip, "tool"), weight="tool", over=over, coef=tool_weight, name="tool")
    return Rule(credit=c.Credit(accuracy, channels={"tool": c.Credit((_efficiency(right, std_eps),))}), loss=(Term(clip, over=over), tool), collect=collect)


hdpo.cost = ""  # type: ignore[attr-defined]  # its collect only puts numbers beside the samples


def _reward(view: c.View, right: float) -> tuple[Tensor, Tensor]:
    """(1 / (calls + 1) where right, else 0; who is right)."""
    right_S = view.scored_S & (view.reward_S > right)
    return torch.where(right_S, 1 / (view.of_sample("tool_calls").nan_to_num(0.0) + 1), 0.0), right_S


def _efficiency(right: float, eps: float) -> c.Transform:
    def f(_: Tensor, view: c.View) -> Tensor:
        r_S, right_S = _reward(view, right)
        n = view.cohorts
        off = r_S - seg_mean(r_S, view.cohort_S, n, right_S)[view.cohort_S]
        std = seg_std(r_S, view.cohort_S, n, right_S)[view.cohort_S]
        several = seg_count(view.cohort_S, n, right_S)[view.cohort_S] > 1
        return torch.where(right_S & several & (off.abs() > 1e-12), off / (std + eps), 0.0)

    return c.stateless("efficiency", f)


def _coupled(weight: float, right: float) -> c.Transform:
    return c.stateless("coupled", lambda a_S, view: a_S + weight * _reward(view, right)[0])


@plays_episodes
async def _counted_groups(
    prompts: Sequence[Prompt], io: RolloutIO, *, mark: str, right: float, eligible: Eligible, mask_truncated: bool
) -> list[Group]:  # fmt: skip
    """The default collect; every sample with its number of calls, and those that the tool term compares with the weight "tool"."""
    groups = await sample_groups(prompts, io, mask_truncated=mask_truncated)
    for g in groups:
        for s in g.samples:
            own = s.text if s.mask is None else io.chat.text(s.counted(s.token_ids))  # of an episode, what the policy wrote
            s.streams.setdefault("tool_calls", [float(own.count(mark))] * len(s.token_ids))
        chosen = {s.id for s in _eligible(g, right, eligible)}
        for s in g.samples:
            s.weights["tool"] = s.weights["policy"] if s.id in chosen else 0.0
        io.note("tool_calls", sum(s.streams["tool_calls"][0] for s in g.samples), len(g.samples))
    return groups


def _eligible(group: Group, right: float, eligible: Eligible) -> list[Sample]:
    """Q, where it has two samples or more; "nonzero": less those exactly at its mean."""
    rewards = {s.id: 1 / (s.streams["tool_calls"][0] + 1) for s in group.samples if s.reward is not None and s.reward > right}
    if len(rewards) < 2:
        return []
    mean = sum(rewards.values()) / len(rewards)
    return [s for s in group.samples if s.id in rewards and (eligible == "correct" or abs(rewards[s.id] - mean) > 1e-12)]

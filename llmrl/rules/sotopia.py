"""Sotopia-RL's utterance-level credit (arXiv:2508.03905): a dialogue's score is shared out over the utterances that earned it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses, plugins
from llmrl.records import Group, Prompt, Sample
from llmrl.rollout import RolloutIO, plays_episodes, sample_groups
from llmrl.rules.base import Over, Rule, Term
from llmrl.segment import seg_mean, seg_std

Attribute = Callable[[Prompt, Sequence[str], float], Awaitable[Sequence[int | None]]]
"""(prompt, the policy's utterances, score of the dialogue) -> how much each did for the goal, in {-1, 0, 1, 2, 3}; None = cannot be said."""


ALARM = (4, 0.2)
"""Dialogues of a step, and share of them, whose attribution may fail."""


def sotopia(
    *, attribution: str | None = None, timeout_s: float = 60.0, goal_scale: float = 1.0, compare: Literal["turn", "cohort"] = "turn", std_eps: float = 1e-6,
    low: float = 0.2, high: float = 0.2, over: Over = "token", mask_truncated: bool = False, base: Path = Path(),
) -> Rule:  # fmt: skip
    """Every utterance has a reward of its own: the share of the dialogue's goal that is attributed to it. arXiv:2508.03905 (from notes on the code).

    r_u = (a_u / 3) g for a_u in {0, 1, 2, 3},  r_u = -1 for a_u = -1;  A_u = (r_u - mean) / (std + std_eps), the same for all tokens of the utterance
    g: the sample's reward times goal_scale (Sotopia scores from 0 to 10: goal_scale = 10). a_u: the stream "attribution" of the environment (Step.numbers),
    or a plug-in, `attribution = "./judge.py:make"`, whose factory gives `async (prompt, utterances, score) -> list of a_u`; it has timeout_s a dialogue.
    Utterances without an attribution have advantage 0, are in no statistic, and are counted (metric rule/unattributed).
    Differs from the paper: (1) there a reward model is fitted to these labels and the policy trained by single-turn GRPO on dialogue states; here the
    labels are the rewards of whole episodes. (2) The goal alone, no relationship and knowledge scores. OUR CHOICE: an utterance is compared with those of its
    prompt's samples at the same turn (compare = "cohort": at all turns), std with ddof 1; alone it gets 0. Differs from grpo: (3) that credit, (4) mean
    over all tokens. Without an environment a completion is one utterance.
    """
    if goal_scale <= 0 or timeout_s <= 0:
        raise ValueError(f"sotopia: goal_scale = {goal_scale} and timeout_s = {timeout_s} must be positive")
    attribute = plugins.use(attribution, {}, home="llmrl.rules", base=base, where="[rule] attribution") if attribution else None
    return Rule(
        credit=c.Credit((), (_by_utterance(goal_scale, compare, std_eps),)), loss=(Term(losses.pg_clip(low, high), over=over),),
        collect=partial(_attributed_groups, attribute=attribute, timeout_s=timeout_s, mask_truncated=mask_truncated),
    )  # fmt: skip


sotopia.cost = "one attribution a dialogue, where a plug-in gives them"  # type: ignore[attr-defined]


def utterance_reward(a: Tensor, goal: Tensor | float) -> Tensor:
    """(a / 3) goal, and -1 where a = -1; NaN stays."""
    return torch.where(a == -1, torch.full_like(a, -1.0), a / 3 * goal)


def _by_utterance(goal_scale: float, compare: str, eps: float) -> c.Transform:
    def f(a_T: Tensor, view: c.View) -> Tensor:
        if "attribution" not in view.streams:
            raise ValueError('sotopia: no stream "attribution": the environment gives it in Step.numbers, or a plug-in does (rule.attribution)')
        turn_T = view.streams.get("turn", torch.zeros_like(a_T)).nan_to_num(0.0).long()
        keys, which_T = torch.unique(view.sample_T * 2**20 + turn_T, return_inverse=True)
        first_U = torch.full((len(keys),), len(a_T)).scatter_reduce(0, which_T, torch.arange(len(a_T)), "amin")  # an utterance's first token
        r_U = utterance_reward(view.streams["attribution"][first_U], goal_scale * view.reward_S[view.sample_T[first_U]])
        on_U = view.scored_S[view.sample_T[first_U]] & ~r_U.isnan()
        place_U = view.cohort_S[view.sample_T[first_U]] * 2**20 + (turn_T[first_U] if compare == "turn" else 0)
        cells, cell_U = torch.unique(place_U, return_inverse=True)
        off_U = r_U - seg_mean(r_U, cell_U, len(cells), on_U)[cell_U]
        std_U = seg_std(torch.where(on_U, r_U, 0.0), cell_U, len(cells), on_U)[cell_U]
        adv_U = torch.where(on_U & std_U.isfinite() & (off_U.abs() > 1e-12), off_U / (std_U + eps), 0.0)
        return adv_U[which_T]

    return c.stateless("by_utterance", f)


@plays_episodes
async def _attributed_groups(
    prompts: Sequence[Prompt], io: RolloutIO, *, attribute: Attribute | None, timeout_s: float, mask_truncated: bool
) -> list[Group]:  # fmt: skip
    groups = await sample_groups(prompts, io, mask_truncated=mask_truncated)
    judged = [(g.prompt, s) for g in groups for s in g.samples if s.reward is not None]
    if attribute is not None:
        failed: list[str] = []
        found = await asyncio.gather(*(_asked(attribute, p, s, io, timeout_s, failed) for p, s in judged))
        if len(failed) > max(ALARM[0], ALARM[1] * len(judged)):
            raise RuntimeError(f"sotopia: {len(failed)} of {len(judged)} dialogues could not be attributed; the first: {failed[0]}")
        for (_, s), labels in zip(judged, found, strict=True):
            s.streams["attribution"] = s.spread([labels[k] for k in _turns(s)])
    values = [x for _, s in judged for x in s.counted(s.streams.get("attribution", []))]
    if wrong := sorted({x for x in values if x == x and x not in (-1, 0, 1, 2, 3)}):
        raise ValueError(f"sotopia: attributions {wrong[:5]}; they are -1, 0, 1, 2 or 3")
    io.note("unattributed", sum(x != x for x in values), max(1, len(values)))
    return groups


def _turns(s: Sample) -> list[int]:
    """The turn of each token that counts."""
    return [int(x) if x == x else 0 for x in s.counted(s.streams["turn"])] if "turn" in s.streams else [0] * s.length


async def _asked(attribute: Attribute, prompt: Prompt, s: Sample, io: RolloutIO, timeout_s: float, failed: list[str]) -> list[float]:
    """An attribution a turn; NaN for all of them where the plug-in fails, is late or gives another number of them."""
    turns, ids = _turns(s), s.counted(s.token_ids)
    texts = [io.chat.text([token for token, k in zip(ids, turns, strict=True) if k == turn]) for turn in range(max(turns) + 1)]
    try:
        said = await asyncio.wait_for(attribute(prompt, texts, s.reward or 0.0), timeout_s)
        if len(said) != len(texts):
            raise ValueError(f"{len(said)} attributions for {len(texts)} utterances")
    except Exception as error:  # whatever a judge raises is counted, and too much of it stops the run
        failed.append(f"prompt {prompt.id!r}: {type(error).__name__}: {str(error)[:300]}")
        said = [None] * len(texts)
    return [float("nan") if x is None else float(x) for x in said]

"""R^3: replay, reflection and ranking rewards (Jiang, Zhao et al., arXiv:2601.19620): three ways to learn from prompts that GRPO learns nothing from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl.records import Group, Prompt, Sample, Verdict
from llmrl.rollout import RolloutIO, sample_groups
from llmrl.rules import grpo as family
from llmrl.rules.base import Needs, Rule
from llmrl.segment import seg_count, seg_rank
from llmrl.templates import Template, read_template


def r3(
    *, base: Path, replay: int = 1, max_age: int = 64, buffer: int = 8, tau: float = 0.25, template: str = "chat", shown_tokens: int = 4096,
    ranked: float = 0.5, peak: float = 0.2, alpha: float = 1.0, length_limit: int = 32768, right: float = 0.5, low: float = 0.2, high: float = 0.2,
    std_eps: float = 1e-6, ddof: int = 1, kl: float = 0.0,
) -> Rule:  # fmt: skip
    """grpo that replays stored samples of the other outcome, reflects on old wrong answers, and ranks truncated failures by entropy. arXiv:2601.19620.

    A = (R - mean) / (alpha std + std_eps) over a prompt's fresh and replayed samples (eq. 3); R: the score, plus max(0, 1 - length / length_limit) if right
    Differs from grpo: (1) replay (CCR): a group without a right sample gets the `replay` newest stored right ones of its prompt, an all-right group wrong
    ones; their ratio is exp(logp - log-probs stored when they were sampled), clipped as usual. They are old by right: neither the staleness check nor the
    engine's alarm looks at them, and more than max_age updates old they stay out. (2) reflection (ISR): where a prompt's mean stored outcome is below tau,
    a group of its own answers prompt + random stored wrong answer + instruction (`template`); these are never stored. (3) ranking (SERR): truncated
    samples of a group without a right one are paid ranked (1 - rank / (N - 1)): i beats j if the mean of its share `peak` of largest token entropies is
    higher AND its mean entropy lower; rank by the number beaten. (4) the length bonus and alpha. replay, tau, ranked, length_limit = 0 turn their part off.
    The paper gives length_limit, and the first pass over the data without (1), (2), which here follows from empty buffers. OUR CHOICE: all other numbers,
    the template, ties in the ranking share their mean rank, N = 1 is paid 0, alpha acts in all groups, both outcomes keep `buffer` samples and visits, wrong
    answers are shown from their last shown_tokens tokens. max_age must exceed the updates of a pass over the data, or nothing is ever replayed
    (rule/replay/too_old). Metrics rule/replay/{right,wrong,too_old,age_updates}, rule/reflection/{groups,reward}.
    """
    if min(replay, max_age, buffer - 1, shown_tokens - 1, length_limit) < 0 or not 0 <= ranked < 1 or not 0 < peak <= 1 or alpha <= 0:
        raise ValueError(f"r3: ranked = {ranked} in [0, 1), peak = {peak} in (0, 1], alpha = {alpha} above 0, buffer, shown_tokens above 0, no key negative")
    bonus = (_length_bonus(length_limit, right),) if length_limit else ()
    order = (_ranked_failures(ranked, peak, right),) if ranked else ()
    scale = (c.center(), c.scale(eps=std_eps / alpha, ddof=ddof), c.stateless("alpha", lambda a_S, view: a_S / alpha))  # = off / (alpha std + std_eps)
    told = read_template(template, kind="r3", fields=("wrong",), base=base, needs=("question", "wrong"))
    collect = partial(_with_history, replay=replay, max_age=max_age, buffer=buffer, tau=tau, shown=shown_tokens, right=right, template=told)
    plain, needs = family.grpo(low=low, high=high, kl=kl), Needs(ref_logp=bool(kl), old_entropy=bool(ranked))
    return replace(plain, credit=c.Credit((*bonus, *order, *scale)), collect=collect, needs=needs)


r3.cost = "a group more for every prompt with a poor history"  # type: ignore[attr-defined]


def _length_bonus(limit: int, right: float) -> c.Transform:
    def f(a_S: Tensor, view: c.View) -> Tensor:
        return a_S + torch.where(view.reward_S > right, (1 - view.length_S.double() / limit).clamp(min=0.0), 0.0)

    return c.stateless("length_bonus", f)


def peak_and_mean(entropy_T: Tensor, share: float) -> tuple[float, float]:
    """(mean of the max(1, floor(share * L)) largest entropies, mean of all L) of one sample, nats."""
    k = max(1, int(share * len(entropy_T) + 1e-9))
    return float(entropy_T.topk(k).values.mean()), float(entropy_T.mean())


def beaten(peak_S: Tensor, mean_S: Tensor, same_SS: Tensor) -> Tensor:
    """How many comparable samples each beats by the strict partial order, [S]."""
    return (same_SS & (peak_S[:, None] > peak_S) & (mean_S[:, None] < mean_S)).sum(1)


def _ranked_failures(top: float, share: float, right: float) -> c.Transform:
    def f(a_S: Tensor, view: c.View) -> Tensor:
        n, fresh_S = view.cohorts, view.scored_S & (view.of_sample("replayed") == 0)
        solved = seg_count(view.cohort_S, n, fresh_S & (view.reward_S > right)) > 0
        in_S = fresh_S & view.truncated_S & ~solved[view.cohort_S]
        entropies = view.streams["old_entropy"].split(view.length_S.tolist())
        numbers_S2 = torch.tensor([peak_and_mean(x, share) if on else (0.0, 0.0) for x, on in zip(entropies, in_S, strict=True)], dtype=torch.float64)
        same_SS = (view.cohort_S[:, None] == view.cohort_S) & in_S & in_S[:, None]
        rank_S = seg_rank(-beaten(numbers_S2[:, 0], numbers_S2[:, 1], same_SS).double(), view.cohort_S, n, in_S)
        size_S = seg_count(view.cohort_S, n, in_S)[view.cohort_S]
        return torch.where(in_S, torch.where(size_S > 1, top * (1 - rank_S / (size_S - 1).clamp(min=1)), 0.0), a_S)

    return c.stateless("ranked_failures", f)


async def _with_history(
    prompts: Sequence[Prompt], io: RolloutIO, *, replay: int, max_age: int, buffer: int, tau: float, shown: int, right: float, template: Template
) -> list[Group]:  # fmt: skip
    """The default collect; each group with its replayed samples, and behind it the reflection group of its prompt, if it has one."""
    kept = [{name: io.memory.recall(f"r3/{name}", p.id) for name in ("right", "wrong", "visits")} for p in prompts]  # before this step adds to it
    groups = await sample_groups(prompts, io)
    asked = [k for k, old in enumerate(kept) if old["wrong"] and poor(old["visits"], tau)]
    reflections = dict(zip(asked, await _reflect([prompts[k] for k in asked], [kept[k]["wrong"] for k in asked], io, template, shown), strict=True))
    io.note("reflection/groups", len(asked), 0)
    for g, old in zip(groups, kept, strict=True):
        judged = [s for s in g.samples if s.reward is not None]
        n_right = sum((s.reward or 0.0) > right for s in judged)
        for s in g.samples:
            s.streams["replayed"] = [0.0] * len(s.token_ids)
        if judged and (replay or tau):
            _store(judged, n_right, io, buffer, right)
        if judged and n_right in (0, len(judged)):
            name = "wrong" if n_right else "right"
            newest = old[name][-replay:] if replay else []
            young = [e for e in newest if io.version - e["version"] <= max_age]
            g.samples += [_replayed(g, j, e, io) for j, e in enumerate(young)]
            io.note(f"replay/{name}", len(young), 0)
            io.note("replay/too_old", len(newest) - len(young), 0)
            if young:
                io.note("replay/age_updates", sum(io.version - e["version"] for e in young), len(young))
    return [g for k, own in enumerate(groups) for g in (own, *([reflections[k]] if k in reflections else []))]


def poor(visits: Sequence[Sequence[int]], tau: float) -> bool:
    """Whether the mean outcome of the stored visits (right samples, judged samples) is below tau; a prompt without any is not poor."""
    return bool(visits) and sum(v[0] for v in visits) / sum(v[1] for v in visits) < tau


def _store(judged: Sequence[Sample], n_right: int, io: RolloutIO, buffer: int, right: float) -> None:
    for s in judged:
        entry = {"token_ids": s.token_ids, "logp": s.behavior_logp, "version": s.policy_version, "score": s.reward, "finish": s.finish, "id": s.id}
        io.memory.remember(f"r3/{'right' if (s.reward or 0.0) > right else 'wrong'}", s.prompt_id, entry, cap=buffer)
    io.memory.remember("r3/visits", judged[0].prompt_id, [n_right, len(judged)], cap=buffer)


def _replayed(group: Group, j: int, entry: dict[str, Any], io: RolloutIO) -> Sample:
    """A stored sample as a member of the group: behavior_logp None, since it is old by right; the ratio's denominator is what was stored."""
    p, ids = group.prompt, entry["token_ids"]
    return Sample(
        id=f"{p.visit_id}/replay{j}", prompt_id=p.id, cohort=p.visit_id, context_ids=group.samples[0].context_ids, token_ids=ids, behavior_logp=None,
        policy_version=entry["version"], text=io.chat.text(ids), finish=entry["finish"], role="replay", verdict=Verdict(entry["score"]),
        reward=entry["score"], streams={"old_logp": entry["logp"], "replayed": [1.0] * len(ids)}, parent=entry["id"],
    )  # fmt: skip


async def _reflect(prompts: Sequence[Prompt], wrong: Sequence[list[Any]], io: RolloutIO, template: Template, shown: int) -> list[Group]:
    """A group behind each prompt with one of its wrong answers, drawn at random: as if it were a prompt of its own."""
    picked = [own[int(io.rng("reflect", p.visit_id).integers(len(own)))] for p, own in zip(prompts, wrong, strict=True)]
    messages = [template.messages(p, wrong=io.chat.text(e["token_ids"][-shown:])) for p, e in zip(prompts, picked, strict=True)]
    groups = await sample_groups([replace(p, id=f"{p.id}/reflect", messages=m) for p, m in zip(prompts, messages, strict=True)], io) if prompts else []
    for s, entry in ((s, entry) for g, entry in zip(groups, picked, strict=True) for s in g.samples):
        s.role, s.parent, s.streams["replayed"] = "reflection", entry["id"], [0.0] * len(s.token_ids)
        if s.reward is not None:
            io.note("reflection/reward", s.reward)
    return groups

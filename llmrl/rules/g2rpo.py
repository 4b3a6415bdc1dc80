"""G2RPO, Gaussian GRPO (Hu et al., arXiv:2604.08539): rewards become normal quantiles by rank; length and entropy are kept in a band by task."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.records import Group, Prompt
from llmrl.rollout import RolloutIO, plays_episodes, sample_groups
from llmrl.rules.base import Over, Rule, Term
from llmrl.segment import seg_mean

if TYPE_CHECKING:
    from llmrl.batch import Outputs, TokenBatch

Span = tuple[float, float, float, float]


def g2rpo(
    *, stages: Literal[1, 2] = 1, dead: Literal["zero", "rank"] = "zero", task: str = "task", lengths: dict[str, Span] | None = None,
    length_weight: float = 1.0, entropy_band: tuple[float, float] | None = None, entropy_coef: float = 0.01,
    policy_loss: Literal["clip", "cispo"] = "clip", low: float = 0.2, high: float = 0.2, over: Over = "sample", mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo whose advantages are the group's rewards mapped by rank onto N(0, 1): the same distribution whatever the rewards' shape. arXiv:2604.08539.

    The k-th smallest of N values gets q_k = Phi^-1((k - 1/2) / N); tied values all get the mean of theirs; N = 1 gives 0; nothing is rescaled.
    stages = 2 (the released estimator) maps the result again over all samples of the step with the same task (column `task` of the row), all ranks.
    lengths: by task (or "" for all others) l_min < l_a <= l_b < l_max; the trapezoid 0, rise, 1, fall, 0, times length_weight, is added to the reward.
    entropy_band (lo, hi): + entropy_coef * sum over tasks of max(0, H - hi) + max(0, lo - H), H the mean of -log pi of the task's tokens.
    Differs from grpo: (1) that map for mean and std, (2) the shapers, both off by default. The code's band is (0.2, 0.6). Which side of the band a task is
    on is decided once a step, over all ranks, with the log-probs of sampling: the code does it in each micro-batch. OUR CHOICE: rewards are rounded to
    1e-6 before ranking; dead = "zero": a group of equal rewards gets 0 after stage 2, where the release ranks it against the others ("rank": an all-wrong
    group can be pushed up); length_weight 1 and entropy_coef 0.01 (not public); clipping as in grpo. Not here: ranks by reward component (gs_gdpo).
    """
    for name, (a, b, d, e) in (lengths or {}).items():
        if not a < b <= d < e:
            raise ValueError(f'g2rpo: lengths["{name}"] = {(a, b, d, e)} must be l_min < l_a <= l_b < l_max, in tokens')
    clip = losses.cispo() if policy_loss == "cispo" else losses.pg_clip(low, high)
    shaped = (c.stateless("length_reward", lambda a_S, view: a_S + length_weight * view.of_sample("length_reward").nan_to_num(0.0)),) if lengths else ()
    ranked = (_within_groups(), *((_within_tasks(dead == "zero"),) if stages == 2 else ()))
    terms, channels = [Term(clip, over=over)], {}
    if entropy_band is not None:
        terms.append(Term(_band(*entropy_band), over="token", coef=entropy_coef, name="entropy_band"))
        channels["entropy_push"] = c.Credit((), (_push(entropy_band, mask_truncated),))
    return Rule(
        credit=c.Credit((*shaped, *ranked), channels=channels), loss=tuple(terms),
        collect=partial(_labelled_groups, task=task, lengths=lengths or {}, mask_truncated=mask_truncated),
    )  # fmt: skip


g2rpo.cost = ""  # type: ignore[attr-defined]  # its collect only puts numbers beside the samples


def normal_scores(x: Tensor) -> Tensor:
    """Normal quantiles of the values of a vector by rank, float64; ties (to 1e-6) share the mean of theirs."""
    n = len(x)
    _, place, count = torch.unique((x.double() * 1e6).round(), return_inverse=True, return_counts=True)
    q = torch.special.ndtri((torch.arange(1, n + 1, dtype=torch.float64) - 0.5) / n)
    means = seg_mean(q, torch.repeat_interleave(torch.arange(len(count)), count), len(count))
    return torch.where(means.abs() < 1e-12, 0.0, means)[place]


def trapezoid(length: float, span: Span) -> float:
    """0 up to l_min, rising to 1 at l_a, 1 to l_b, falling to 0 at l_max."""
    l_min, l_a, l_b, l_max = span
    return max(0.0, min(1.0, (length - l_min) / (l_a - l_min), (l_max - length) / (l_max - l_b)))


def _within_groups() -> c.Transform:
    def f(a_S: Tensor, view: c.View) -> Tensor:
        out = torch.zeros_like(a_S)
        for k in range(view.cohorts):
            mine = (view.cohort_S == k) & view.scored_S
            out[mine] = normal_scores(a_S[mine])
        return out

    return c.stateless("normal_scores", f)


def _within_tasks(zero_dead: bool) -> c.Transform:
    """Equal values get equal quantiles, so a table of all ranks' values says what each becomes."""

    def f(z_S: Tensor, view: c.View) -> Tensor:
        task_S, rounded = view.of_sample("task"), (z_S * 1e6).round()
        local = [[t, z] for t, z, on in zip(task_S.tolist(), rounded.tolist(), view.scored_S.tolist(), strict=True) if on]
        everyone = torch.tensor([pair for rank in view.gather(local) for pair in rank], dtype=torch.float64).reshape(-1, 2)
        out = torch.zeros_like(z_S)
        for task in torch.unique(task_S[view.scored_S]):
            values = everyone[everyone[:, 0] == task, 1].sort().values
            mine = (task_S == task) & view.scored_S
            out[mine] = normal_scores(values * 1e-6)[torch.searchsorted(values, rounded[mine])]
        live = torch.zeros(view.cohorts, dtype=torch.bool)
        live[view.cohort_S[view.scored_S & (z_S != 0)]] = True
        return torch.where(live[view.cohort_S], out, 0.0) if zero_dead else out

    return c.stateless("normal_scores_of_task", f)


def _push(band: tuple[float, float], mask_truncated: bool) -> c.Transform:
    """Per token: +-(tokens of the step / tokens of its task) where the task's mean -log p is outside the band, else 0."""

    def f(a_T: Tensor, view: c.View) -> Tensor:
        on_T = (view.scored_S & ~(view.truncated_S & mask_truncated))[view.sample_T]
        task_T, nll_T = view.of_sample("task")[view.sample_T], -view.streams["behavior_logp"]
        local = [[t, float((on_T & (task_T == t)).sum()), float(nll_T[on_T & (task_T == t)].sum())] for t in torch.unique(task_T[on_T]).tolist()]
        rows = torch.tensor([row for rank in view.gather(local) for row in rank], dtype=torch.float64).reshape(-1, 3)
        push_T = torch.zeros_like(a_T)
        for t in torch.unique(task_T[on_T]):
            n, total = rows[rows[:, 0] == t, 1:].sum(0)
            side = float(total / n > band[1]) - float(total / n < band[0])
            push_T[task_T == t] = side * rows[:, 1].sum() / n
        return push_T

    return c.stateless("entropy_push", f)


def _band(lo: float, hi: float) -> losses.LossFn:
    def entropy_band(batch: TokenBatch, out: Outputs) -> Tensor:
        push_T = batch.stream["entropy_push"].to(out.logp_T)
        return push_T * (-out.logp_T - torch.where(push_T > 0, torch.full_like(push_T, hi), lo))

    return entropy_band


@plays_episodes
async def _labelled_groups(
    prompts: Sequence[Prompt], io: RolloutIO, *, task: str, lengths: dict[str, Span], mask_truncated: bool
) -> list[Group]:  # fmt: skip
    groups = await sample_groups(prompts, io, mask_truncated=mask_truncated)
    for g in groups:
        name = str(g.prompt.meta.get(task, ""))
        span = lengths.get(name, lengths.get(""))
        for s in g.samples:
            n = len(s.token_ids)
            s.streams["task"] = [float(zlib.crc32(name.encode()))] * n
            if lengths:
                s.streams["length_reward"] = [trapezoid(s.length, span) if span else 0.0] * n
    return groups

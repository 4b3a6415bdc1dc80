"""Credit: from rewards to one advantage a token. Pure functions of a `View`; state is explicit, as in optax.

A `Credit` has two chains, so that the types keep the order: per-sample transforms work on a_S, then one broadcast to tokens, then
per-token transforms work on a_T. Unscored samples take part in no statistic and end with advantage 0. All arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llmrl.segment import seg_count, seg_mean, seg_std, seg_sum


@dataclass(frozen=True)
class View:
    """What credit sees of a step: this rank's samples, in order, groups whole."""

    reward_S: Tensor
    """float64; 0 where unscored"""
    scored_S: Tensor
    """bool; False = could not be judged"""
    cohort_S: Tensor
    """long; samples that are compared with each other share a number"""
    length_S: Tensor
    """long, tokens that count (Sample.mask): those of the policy, not of an environment"""
    truncated_S: Tensor
    """bool; stopped by the length limit"""
    sample_T: Tensor
    """long; the sample that a token belongs to; tokens of a sample are consecutive. T holds tokens that count and no others: what an
    environment wrote is in no per-token statistic, and needs no mask here."""
    max_new_tokens: int = 0
    streams: dict[str, Tensor] = field(default_factory=dict)
    """per token, float64; NaN where a sample lacks it. "behavior_logp" is always there, others by Needs and by what collect gives."""
    all_sum: Callable[[Tensor], Tensor] = lambda x: x
    """Sum over ranks, for statistics of the whole batch; the identity on one rank."""
    gather: Callable[[Any], list[Any]] = lambda x: [x]
    """A small JSON-able value of every rank, in the same order everywhere: for what is no sum (ranks, smallest, largest)."""

    @property
    def cohorts(self) -> int:
        return int(self.cohort_S.max()) + 1 if len(self.cohort_S) else 0

    def of_sample(self, name: str) -> Tensor:
        """A stream that holds one number a sample, repeated along its tokens (so a rule's collect hands numbers to its credit): [S]."""
        if name not in self.streams:
            raise ValueError(f"credit needs the stream {name!r}, which the rule's collect gives to its samples")
        return self.streams[name][self.length_S.cumsum(0) - self.length_S]


State = dict[str, Any]


class Transform(NamedTuple):
    """A named (init, update) pair. `update(a, state, view) -> (a, state)`; state is JSON-able, or a dict of tensors."""

    name: str
    init: Callable[[], State]
    update: Callable[[Tensor, State, View], tuple[Tensor, State]]
    per: Literal["sample", "token"] = "sample"
    """Which chain it belongs to where a recipe lists it; in a `Credit` its place says so."""
    streams: tuple[str, ...] = ()
    """Those of `Needs` that it reads, for where a recipe lists it: "old_logp", "ref_logp", "old_entropy"."""


def stateless(name: str, f: Callable[[Tensor, View], Tensor], *, per: Literal["sample", "token"] = "sample", streams: tuple[str, ...] = ()) -> Transform:
    """A transform that carries nothing from step to step."""
    return Transform(name, dict, lambda a, state, view: (f(a, view), state), per, streams)


@dataclass(frozen=True)
class Credit:
    """Per-sample chain, broadcast, per-token chain; and further channels of that form beside the advantage."""

    sample: tuple[Transform, ...] = ()
    token: tuple[Transform, ...] = ()
    channels: dict[str, Credit] = field(default_factory=dict)
    """name -> a second advantage, a mark, ...: what it gives reaches the loss as batch.stream[name] (losses.on_channel)."""

    def __post_init__(self) -> None:
        names = [t.name for t in (*self.sample, *self.token)]
        if len(set(names)) < len(names):
            raise ValueError(f"credit transforms share a name, so their states would collide: {names}")

    def init(self) -> dict[str, State]:
        """The state before the first step, by transform name: what a checkpoint saves."""
        own = {t.name: t.init() for t in (*self.sample, *self.token)}
        return own | {f"{name}/{key}": state for name, chain in self.channels.items() for key, state in chain.init().items()}

    def extra(self, view: View, state: dict[str, State]) -> tuple[dict[str, Tensor], dict[str, State]]:
        """-> (name -> numbers a token, of each channel; new state). Pure, as `update`."""
        out, new = {}, dict(state)
        for name, chain in self.channels.items():
            mine = {key.removeprefix(f"{name}/"): s for key, s in state.items() if key.startswith(f"{name}/")}
            out[name], mine = chain.update(view, mine)
            new |= {f"{name}/{key}": s for key, s in mine.items()}
        return out, new

    def update(self, view: View, state: dict[str, State]) -> tuple[Tensor, dict[str, State]]:
        """-> (adv_T float64, new state). Pure: `state` is not changed."""
        new = dict(state)
        a = view.reward_S.clone()
        for t in self.sample:
            a, new[t.name] = t.update(a, new[t.name], view)
        a_T = torch.where(view.scored_S, a, 0.0)[view.sample_T]
        for t in self.token:
            a_T, new[t.name] = t.update(a_T, new[t.name], view)
        return torch.where(view.scored_S[view.sample_T], a_T, 0.0), new


def center() -> Transform:
    """a_i - mean of the cohort. Source: GRPO, arXiv:2402.03300 eq. in section 4.1.2; Dr. GRPO, arXiv:2503.20783.

    A cohort of one gets 0: no baseline, no gradient (verl leaves the reward as it is there).
    """

    def f(a_S: Tensor, view: View) -> Tensor:
        off = a_S - seg_mean(a_S, view.cohort_S, view.cohorts, view.scored_S)[view.cohort_S]
        return torch.where(off.abs() < 1e-12, 0.0, off)  # equal rewards leave rounding dust; it must not become an advantage

    return stateless("center", f)


def scale(*, eps: float = 1e-6, ddof: int = 1) -> Transform:
    """a_i / (std of the cohort + eps). Source: GRPO, arXiv:2402.03300. eps and ddof are OUR CHOICE (verl's; TRL: eps 1e-4).

    After `center`, a cohort of equal rewards stays exactly 0; a cohort of one is left alone.
    """

    def f(a_S: Tensor, view: View) -> Tensor:
        std = seg_std(a_S, view.cohort_S, view.cohorts, view.scored_S, ddof)[view.cohort_S]
        return torch.where(std.isfinite(), a_S / (std + eps), a_S)

    return stateless("scale", f)


def scale_batch(*, eps: float = 1e-4) -> Transform:
    """a_i / (std of the rewards of the whole batch, all ranks + eps), ddof = 1. Source: TRL's scale_rewards="batch" (arXiv:2508.08221).

    The rewards are Sample.reward, before any shaping earlier in the chain.
    """

    def f(a_S: Tensor, view: View) -> Tensor:
        _, var = moments(view.reward_S, view.scored_S.double(), view)
        return a_S / (var.sqrt() + eps)

    return stateless("scale_batch", f)


def rloo() -> Transform:
    """a_i - mean of the others of its cohort = n/(n-1) (a_i - mean). Source: RLOO, arXiv:2402.14740. A cohort of one gets 0."""

    def f(a_S: Tensor, view: View) -> Tensor:
        n = seg_count(view.cohort_S, view.cohorts, view.scored_S)[view.cohort_S]
        total = seg_sum(a_S, view.cohort_S, view.cohorts, view.scored_S)[view.cohort_S]
        off = torch.where(n > 1, a_S - (total - a_S) / (n - 1).clamp(min=1), 0.0)
        return torch.where(off.abs() < 1e-12, 0.0, off)  # rounding dust, as in center

    return stateless("rloo", f)


def overlong(*, cache: int, limit: int | None = None, penalty: float = 1.0) -> Transform:
    """Adds DAPO's soft overlong punishment to the reward. Source: DAPO, arXiv:2503.14476 eq. 13.

    With L_max = limit (None: the recipe's max_new_tokens) and expected = L_max - cache: 0 up to `expected` tokens, then
    (expected - length) / cache, and -1 beyond L_max; times `penalty`. Differs from verl: floored at -1, as in the paper.
    """
    if cache <= 0:
        raise ValueError(f"overlong: cache is {cache}; it is a number of tokens > 0")

    def f(a_S: Tensor, view: View) -> Tensor:
        expected = (limit or view.max_new_tokens) - cache
        return a_S + penalty * ((expected - view.length_S.double()) / cache).clamp(-1.0, 0.0)

    return stateless("overlong", f)


def kl_in_reward(*, coef: float) -> Transform:
    """R_i - coef * sum_t (old_logp_t - ref_logp_t): k1 inside the reward. Source: RLOO, arXiv:2402.14740. Put it first in the chain.

    Needs the streams old_logp and ref_logp (`Needs(ref_logp=True, old_logp=True)`).
    """

    def f(a_S: Tensor, view: View) -> Tensor:
        return a_S - coef * seg_sum(_k1(view), view.sample_T, len(a_S))

    return stateless("kl_in_reward", f, streams=("old_logp", "ref_logp"))


def kl_to_go(*, coef: float) -> Transform:
    """a_t - coef * sum_{u >= t} (old_logp_u - ref_logp_u): undiscounted token returns. Per token.

    Source: REINFORCE++, arXiv:2501.03262 (reward on the last token, gamma = 1). Needs the streams old_logp and ref_logp.
    """

    def f(a_T: Tensor, view: View) -> Tensor:
        k1 = _k1(view)
        upto = k1.cumsum(0)
        last = torch.zeros_like(view.length_S) + view.length_S.cumsum(0) - 1
        return a_T - coef * (upto[last][view.sample_T] - upto + k1)

    return stateless("kl_to_go", f, per="token", streams=("old_logp", "ref_logp"))


def whiten(*, eps: float = 1e-8) -> Transform:
    """(a_t - mean) / sqrt(var + eps) over all scored tokens of the whole batch, all ranks; unbiased variance. Per token.

    Source: REINFORCE++, arXiv:2501.03262; eps as in verl.
    """

    def f(a_T: Tensor, view: View) -> Tensor:
        mean, var = moments(a_T, view.scored_S[view.sample_T].double(), view)
        return (a_T - mean) / (var + eps).sqrt()

    return stateless("whiten", f, per="token")


def clip_adv(*, limit: float = 5.0) -> Transform:
    """min(max(a_t, -limit), limit): bounds what a rare reward in a nearly uniform group weighs. Per token. The limit is OUR CHOICE."""
    if limit <= 0:
        raise ValueError(f"clip_adv: limit is {limit}; it must be positive")
    return stateless("clip_adv", lambda a_T, view: a_T.clamp(-limit, limit), per="token")


def _k1(view: View) -> Tensor:
    missing = [name for name in ("old_logp", "ref_logp") if name not in view.streams]
    if missing:
        raise ValueError(f"credit needs the streams {missing}: give the rule Needs(ref_logp=True, old_logp=True)")
    k1 = view.streams["old_logp"] - view.streams["ref_logp"]
    return torch.where(view.scored_S[view.sample_T], k1, 0.0)  # an unscored sample may have none, and NaN spreads through a cumsum


def moments(x: Tensor, w: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of x under 0/1 weights, over all ranks; two passes, so large offsets do not cancel."""
    n, total = view.all_sum(torch.stack([w.sum(), (w * x).sum()]))
    mean = total / n.clamp(min=1)
    square = view.all_sum((w * (x - mean) ** 2).sum()[None])[0]
    return mean, square / (n - 1).clamp(min=1)

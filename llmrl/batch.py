"""Packing samples into micro-batches by token budget, and reducing loss terms with denominators known before backward.

A micro-batch holds contexts once, beginnings that they share once too, and completions behind them, flat over P input tokens; nothing
is padded. Losses see only the T completion tokens that count (Sample.mask): `source_T` says which input token's hidden state predicts each of
them; what an environment wrote between two turns is input and nothing else. Which tokens count is a matter of position, never of id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrl.attention import Kernel, PackPlan
from llmrl.records import Sample
from llmrl.segment import seg_count, seg_mean, seg_sum

if TYPE_CHECKING:
    from llmrl.rules.base import Term


@dataclass
class TokenBatch:
    """One micro-batch. All tensors live on the learner's device; T is flat over completion tokens that count, in sample order."""

    tokens_T: Tensor
    """long, the token that was sampled"""
    sample_T: Tensor
    """long in [0, n_samples)"""
    adv_T: Tensor
    """float32"""
    behavior_logp_T: Tensor
    """float32, NaN where the engine's number does not apply"""
    weight: dict[str, Tensor]
    """name -> [T] float32"""
    stream: dict[str, Tensor]
    """name -> [T] float32, NaN where a sample lacks it"""
    reward_S: Tensor
    """float32, NaN where unscored"""
    cohort_S: Tensor
    group_S: Tensor
    """long, numbered within the micro-batch"""
    ids_P: Tensor
    """long, input ids: contexts and completions less each one's last token"""
    positions_P: Tensor
    source_T: Tensor
    """long, the input token whose hidden state predicts token t"""
    index_RL: Tensor
    pick_P: Tensor
    """see attention.PackPlan"""
    sample_index: list[int] = field(default_factory=list)
    """the samples' places in the list that was packed"""

    @property
    def n_samples(self) -> int:
        return len(self.reward_S)

    def plan(self, kernel: Kernel = "sdpa") -> PackPlan:
        return PackPlan(self.index_RL, self.pick_P, kernel)

    def to(self, device: torch.device | str) -> TokenBatch:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        dicts = {k: {n: t.to(device) for n, t in getattr(self, k).items()} for k in ("weight", "stream")}
        return replace(self, **moved, **dicts)


@dataclass
class Outputs:
    """What the learner computed for a TokenBatch. [T], fp32; logp_T and entropy_T carry gradients."""

    logp_T: Tensor
    old_logp_T: Tensor
    ref_logp_T: Tensor | None = None
    entropy_T: Tensor | None = None


def numbers(keys: Iterable[Any]) -> list[int]:
    """Keys -> 0, 1, 2, ... in order of first appearance."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(k, len(seen)) for k in keys]


def pack(samples: Sequence[Sample], adv: Sequence[Tensor], *, tokens: int, groups: Sequence[int] | None = None, whole_groups: bool = False) -> list[TokenBatch]:
    """Samples -> micro-batches of at most `tokens` input tokens (a unit larger than that gets one of its own).

    adv: one float tensor [Sample.length] a sample. groups: a group number a sample (default: by prompt_id). Samples stay in order, except
    that within a group longer ones come first; so siblings stay together and share their context. Deterministic.
    """
    group_of = list(groups) if groups is not None else numbers(s.prompt_id for s in samples)
    order = sorted(range(len(samples)), key=lambda i: (group_of[i], -len(samples[i].token_ids), i))
    units: list[list[int]] = []
    for i in order:
        if whole_groups and units and group_of[units[-1][0]] == group_of[i]:
            units[-1].append(i)
        else:
            units.append([i])
    batches: list[list[int]] = []
    room, contexts = 0, Contexts()
    for unit in units:
        cost = _cost([samples[i] for i in unit], contexts)
        if not batches or cost > room:
            batches.append([])
            room, contexts = tokens, Contexts()
            cost = _cost([samples[i] for i in unit], contexts)
        batches[-1] += unit
        room -= cost
    return [_lay_out(samples, adv, group_of, chosen) for chosen in batches]


class Contexts:
    """Contexts laid flat, a beginning that several share stored once."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self._next: dict[tuple[int, int], int] = {}  # (place of a token or -1, the token behind it) -> its place
        self._whole: dict[tuple[int, ...], list[int]] = {}

    def add(self, context: Sequence[int]) -> list[int]:
        """The places of the context's tokens; those that are not there yet are put behind the others."""
        key = tuple(context)
        if key not in self._whole:
            places, at = [], -1
            for position, token in enumerate(key):
                step = (at, token)
                at = self._next.setdefault(step, len(self.ids))
                if at == len(self.ids):
                    self.ids.append(token)
                    self.positions.append(position)
                places.append(at)
            self._whole[key] = places
        return self._whole[key]


def _cost(unit: list[Sample], contexts: Contexts) -> int:
    """Input tokens that a unit adds to a micro-batch with these contexts; its own are added to them."""
    before = len(contexts.ids)
    for s in unit:
        contexts.add(s.context_ids)
    return sum(len(s.token_ids) - 1 for s in unit) + len(contexts.ids) - before


def _lay_out(samples: Sequence[Sample], adv: Sequence[Tensor], group_of: Sequence[int], chosen: list[int]) -> TokenBatch:
    contexts = Contexts()
    places = [contexts.add(samples[i].context_ids) for i in chosen]  # all contexts first, then the completions
    ids, positions = contexts.ids, contexts.positions
    rows: list[list[int]] = []
    pick: dict[int, tuple[int, int]] = {}  # input token -> (row, place) that yields its output
    source: list[int] = []
    for r, i in enumerate(chosen):
        s = samples[i]
        if not s.context_ids:
            raise ValueError(f"sample {s.id}: an empty context; the first token of a completion needs something to be predicted from")
        before = len(s.context_ids)
        own = range(len(ids), len(ids) + len(s.token_ids) - 1)
        ids += s.token_ids[:-1]
        positions += range(before, before + len(own))
        row = [*places[r], *own]
        predicted_by = [row[before - 1], *own]
        for place, token in enumerate(row):
            pick.setdefault(token, (r, place))
        rows.append(row)
        source += s.counted(predicted_by)
    length = max(map(len, rows))
    some = [samples[i] for i in chosen]
    names = sorted({n for s in some for n in s.weights})
    streams = sorted({n for s in some for n in s.streams})
    lengths = [s.length for s in some]
    nan = float("nan")

    def flat(values: Iterable[Iterable[float]]) -> Tensor:
        return torch.tensor([x for v in values for x in v], dtype=torch.float32)

    return TokenBatch(
        tokens_T=torch.tensor([t for s in some for t in s.counted(s.token_ids)]),
        sample_T=torch.repeat_interleave(torch.arange(len(some)), torch.tensor(lengths)),
        adv_T=torch.cat([adv[i].float() for i in chosen]),
        behavior_logp_T=flat(s.counted(s.behavior_logp) if s.behavior_logp is not None else [nan] * n for s, n in zip(some, lengths, strict=True)),
        weight={n: flat([s.weights.get(n, 0.0)] * k for s, k in zip(some, lengths, strict=True)) for n in names},
        stream={n: flat(s.counted(s.streams[n]) if s.streams.get(n) else [nan] * k for s, k in zip(some, lengths, strict=True)) for n in streams},
        reward_S=torch.tensor([nan if s.reward is None else s.reward for s in some], dtype=torch.float32),
        cohort_S=torch.tensor(numbers(s.cohort for s in some)),
        group_S=torch.tensor(numbers(group_of[i] for i in chosen)),
        ids_P=torch.tensor(ids),
        positions_P=torch.tensor(positions),
        source_T=torch.tensor(source),
        index_RL=torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows]),
        pick_P=torch.tensor([r * length + place for r, place in (pick[p] for p in range(len(ids)))]),
        sample_index=list(chosen),
    )


def global_denominators(
    samples: Sequence[Sample], terms: Sequence[Term], *, max_new_tokens: int, groups: int | None = None,
    all_sum: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[float]:  # fmt: skip
    """The denominator of each term over all samples of an update, all ranks: sums of weights, known before any forward.

    groups: how many this rank has (default: the prompts of `samples`). A denominator of 0 (nothing feeds the term) becomes 1, so that
    the term is 0 and not NaN.
    """
    local = []
    for term in terms:
        w = [(s.weights.get(term.weight, 0.0), s.length) for s in samples]
        if term.over == "token":
            local.append(sum(a * n for a, n in w))
        else:
            n_groups = len({s.prompt_id for s in samples}) if groups is None else groups
            count = {"weights": sum(a for a, _ in w), "samples": sum(a > 0 for a, _ in w), "groups": n_groups}[term.count]
            local.append(count * ((term.budget or max_new_tokens) if term.over == "fixed" else 1))
    total = all_sum(torch.tensor(local, dtype=torch.float64)).tolist()
    return [d if d > 0 else 1.0 for d in total]


def evaluate_terms(terms: Sequence[Term], batch: TokenBatch, out: Outputs, denominators: Sequence[float]) -> tuple[Tensor, dict[str, float]]:
    """This micro-batch's share of the loss, and of each term's value (by label): shares add up over micro-batches and ranks."""
    loss = out.logp_T.new_zeros(())
    shares: dict[str, float] = {}
    for term, denominator in zip(terms, denominators, strict=True):
        if term.weight not in batch.weight:
            continue
        w = batch.weight[term.weight]
        l_T = term.fn(batch, _where_weighted(out, w))
        if l_T.shape != w.shape:
            raise ValueError(f"loss {term.label}: returned shape {tuple(l_T.shape)}; it must be one entry a token, {tuple(w.shape)}")
        l_T = torch.where(w > 0, l_T, 0.0) * w  # where, not only *: a NaN at weight 0 must not spread
        if term.over == "sample":
            count = seg_count(batch.sample_T, batch.n_samples, w > 0, l_T.dtype).clamp(min=1)
            value = (seg_sum(l_T, batch.sample_T, batch.n_samples) / count).sum() / denominator
        else:
            value = l_T.sum() / denominator
        loss = loss + term.coef * value
        shares[term.label] = shares.get(term.label, 0.0) + float(value.detach())
    return loss, shares


def _where_weighted(out: Outputs, w: Tensor) -> Outputs:
    """Log-probs and entropies of tokens of weight 0 become the constant 0: a NaN or -inf there spreads neither forward nor backward."""
    off = w <= 0
    return replace(out, **{k: v.masked_fill(off, 0.0) for k, v in vars(out).items() if isinstance(v, Tensor) and v.shape == w.shape})


def token_metrics(batch: TokenBatch, out: Outputs, terms: Sequence[Term]) -> dict[str, float]:
    """Sums over the tokens that policy-gradient terms train (weight "policy" where a rule has none), to be added up and divided by "n"
    (except the maxima)."""
    names = {t.weight for t in terms if getattr(t.fn, "scales_with_advantage", False)} or {"policy"}
    weights = [batch.weight[name] for name in sorted(names) if name in batch.weight]
    if not weights:
        return {}
    with torch.no_grad():
        on = torch.stack(weights).gt(0).any(0)
        over = (out.logp_T - batch.behavior_logp_T)[on & ~batch.behavior_logp_T.isnan()]  # a NaN of logp stays: it is an alarm
        gap = over.abs()
        d = (out.logp_T - out.old_logp_T)[on]
        row = {"n": float(on.sum()), "n_gap": float(len(gap)), "gap": float(gap.sum()), "gap_max": float(gap.max()) if len(gap) else 0.0}
        row["over_max"] = float(over.max()) if len(over) else 0.0
        row["kl_old"] = float((torch.exp(-d) + d - 1).sum())
        if out.entropy_T is not None:
            row["entropy"] = float(out.entropy_T[on].sum())
        if out.ref_logp_T is not None:
            e = (out.ref_logp_T - out.logp_T)[on].clamp(-20, 20)
            row["kl_ref"] = float((e.exp() - e - 1).sum())
        bounds = next((b for t in terms if (b := getattr(t.fn, "clip_bounds", None))), None)
        if bounds is not None:
            log_r, adv = d, batch.adv_T[on]
            if bounds[2] == "sample":
                mean = seg_mean(out.logp_T - out.old_logp_T, batch.sample_T, batch.n_samples, on)
                log_r = mean[batch.sample_T][on]
            r = log_r.exp()
            row["clipped"] = float((((r > bounds[1]) & (adv > 0)) | ((r < bounds[0]) & (adv < 0))).sum())
        return row


def seg_tokens(values_T: Tensor, batch: TokenBatch) -> list[Tensor]:
    """A tensor [T] or [T, ...] cut into one tensor a sample ([Sample.length, ...]), in the micro-batch's order; on whichever device."""
    return list(values_T.split(torch.bincount(batch.sample_T, minlength=batch.n_samples).tolist()))

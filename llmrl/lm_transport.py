"""Value-gradient transport of a language model's responses (VGF, arXiv:2604.14265, its language-model part), at test time.

Responses of the policy are lifted to the reward model's input embeddings, moved for L steps along the reward's gradient, decoded once to the
nearest tokens, and scored again; `best` picks the winner. No weight changes. The paper's: whole responses as particles, a frozen
differentiable reward model, one decode, best-of-N at the end. Its token-level details are not public, so these are OUR CHOICE: the step in
units of rho, the forms "independent" and "pooled", nearest-row decoding, the guard, the candidates, and that special tokens (the end token
among them) stay where they are, so a response never changes its length.

What the reward model reads is the context's ids followed by the response's ids, the same ids that the policy reads: it needs the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from llmrl import transport as core
from llmrl.batch import pack
from llmrl.frozen_reward import Item, RewardModel, padded
from llmrl.hf_engine import PREFILL_TOKENS, HFEngine
from llmrl.models import Policy
from llmrl.records import Sample

__all__ = ["Item", "Moved", "Readout", "RewardModel", "best", "diagnostics", "equal_compute", "sweep", "transport"]
LogProbs = Callable[[Sequence[Item]], list[list[float]]]
"""Log-prob (nats) of each token of each response behind its context."""
Slopes = Callable[[Tensor], tuple[Tensor, Tensor]]
"""u [N, T, D] -> (reward [N], its gradient [N, T, D])"""
Form = Literal["independent", "svgd", "pooled"]
CHUNK = 1 << 16
"""Response tokens that are moved together, at most; the responses of one prompt always are."""


@dataclass(frozen=True)
class Moved:
    """A response after transport."""

    token_ids: list[int]
    """Decoded; the sampled ones where the guard put them back."""
    reward_before: float
    """Of the sampled tokens."""
    reward_flowed: float
    """Of the embeddings after the last step. Minus reward_after: what decoding lost."""
    reward_after: float
    """Of token_ids."""
    changed_share: float
    """Of token_ids, those that are not the sampled ones."""
    ref_drop: float
    """Mean log-prob per token of the sampled text minus that of the decoded one (nats), which the guard judges; 0 where no token changed."""
    kept: bool
    """False where the guard put the sampled tokens back."""
    displacement: float = 0.0
    """Mean distance that a position that may move went, in units of rho."""
    passes: int = 0
    """Forwards of the policy that decoding among candidates took; see equal_compute."""


# ---------------------------------------------------------------- flow and decoding


def flow_embeddings(
    slopes: Slopes, u_NTD: Tensor, moves_NT: Tensor, groups: Sequence[Sequence[int]], *, steps: int, eps: float, rho: float | None,
    velocity: Form = "independent", alpha: float = 1.0, bandwidth: float | None = None, optimizer: Literal["plain", "adam"] = "plain",
    present_NT: Tensor | None = None, each: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """(embeddings after `steps` steps, the rewards before each step). Positions outside moves_NT stay, bit for bit.

    groups: numbers of the particles of each prompt; only "svgd" and "pooled" let them see each other. rho: a plain step is normalised to
    eps * rho for the fastest position of a particle (core.normalised); None = eps * velocity as it is. adam: every coordinate moves by about
    eps * rho / sqrt(D) a step, so that a position moves by about eps * rho. present_NT: the tokens that are there (default: those that move).
    each: called with the number of steps done and the embeddings, after every step.
    """
    u, seen = u_NTD.clone(), []
    there = moves_NT if present_NT is None else present_NT
    adam = core.Adam(eps * (1.0 if rho is None else rho / u.shape[-1] ** 0.5))
    for done in range(1, 1 + (steps if eps else 0)):
        r, g = slopes(u)
        seen.append(r)
        phi = _velocity(u, g * moves_NT[..., None], there, groups, velocity, alpha, bandwidth) * moves_NT[..., None]
        move = adam(phi) if optimizer == "adam" else eps * (phi if rho is None else core.normalised(phi, moves_NT, rho))
        u = torch.where(moves_NT[..., None], u + move, u)
        if each is not None:
            each(done, u)
    return u, seen


def _velocity(u: Tensor, g: Tensor, there: Tensor, groups: Sequence[Sequence[int]], form: Form, alpha: float, bandwidth: float | None) -> Tensor:
    if form == "independent":
        return core.independent(g, alpha=alpha)
    phi = torch.empty_like(g)
    for own in groups:
        x, s = u[own], g[own]
        if form == "svgd":  # the literal formula: a padded position counts as the zero vector
            flat = (x * there[own][..., None]).flatten(1)[None]
            phi[own] = core.svgd(flat, s.flatten(1)[None], alpha=alpha, bandwidth=bandwidth)[0].view_as(x)
        else:
            phi[own] = core.pooled(x[None], s[None], there[own][None], alpha=alpha, bandwidth=bandwidth)[0]
    return phi


def nearest_rows(u_MD: Tensor, table_VD: Tensor, free_V: Tensor, own_M: Tensor) -> Tensor:
    """argmin_v |u - E_v|^2 over the rows with free_V, [M]; a tie goes to `own` (the sampled token), so what has not moved stays."""
    out = torch.empty_like(own_M)
    half = 0.5 * table_VD.square().sum(1).masked_fill(~free_V, torch.inf)
    for a in range(0, len(u_MD), 1024):
        u, own = u_MD[a : a + 1024], own_M[a : a + 1024]
        few = (u @ table_VD.T - half).topk(min(8, int(free_V.sum()))).indices  # by products, which round; then by the differences themselves
        out[a : a + 1024] = _closest(u, table_VD, torch.cat([own[:, None], few], 1))
    return out


def _closest(u_MD: Tensor, table_VD: Tensor, among_MK: Tensor) -> Tensor:
    d2 = (u_MD[:, None] - table_VD[among_MK]).square().sum(-1)
    return among_MK.gather(1, d2.argmin(1, keepdim=True))[:, 0]  # argmin: the first of equals


def restricted_rows(
    policy: Policy, items: Sequence[Item], u_NTD: Tensor, moves_NT: Tensor, table_VD: Tensor, free_V: Tensor, k: int
) -> tuple[list[list[int]], list[int]]:
    """Nearest rows among the policy's k likeliest tokens given the already decoded prefix, and the sampled token itself; and of each, the forwards.

    All positions are decoded at once behind a guess (at first: the sampled tokens), again and again until nothing changes: position t is
    right once those before it are, so this ends with what decoding one by one gives, after as many forwards as tokens at most.
    """
    own = [torch.tensor(list(t), device=u_NTD.device) for _, t in items]
    now, todo, passes = [list(t) for _, t in items], list(range(len(items))), [0] * len(items)
    while todo:
        changed = []
        for i, top in zip(todo, _top(policy, [(items[i][0], now[i]) for i in todo], k), strict=True):
            n, passes[i] = len(now[i]), passes[i] + 1
            top = torch.where(free_V[top := top.to(u_NTD.device)], top, own[i][:, None])
            found = _closest(u_NTD[i, :n], table_VD, torch.cat([own[i][:, None], top], 1))
            new = torch.where(moves_NT[i, :n], found, own[i]).tolist()
            changed += [i] if new != now[i] else []
            now[i] = new
        todo = changed
    return now, passes


@torch.no_grad()
def _top(policy: Policy, items: Sequence[Item], k: int) -> list[Tensor]:
    """The k likeliest tokens at each place of each response, [T, k]."""
    out: list[Tensor] = [torch.empty(0)] * len(items)
    samples = [Sample(str(i), str(i), list(c), list(t), None, 0) for i, (c, t) in enumerate(items)]
    training = policy.model.training
    policy.model.eval()
    try:
        for batch in pack(samples, [torch.zeros(len(s.token_ids)) for s in samples], tokens=PREFILL_TOKENS):
            b = batch.to(policy.device)
            hidden = policy.hidden(b.ids_P, b.positions_P, b.plan(policy.kernel)).index_select(0, b.source_T)
            top = torch.cat([policy.logits(part).topk(min(k, policy.head[0].shape[0])).indices for part in hidden.split(1024)])
            for i, own in zip(b.sample_index, top.split([len(samples[i].token_ids) for i in b.sample_index]), strict=True):
                out[i] = own
    finally:
        policy.model.train(training)
    return out


# ---------------------------------------------------------------- transport


def transport(
    policy: Policy | LogProbs, reward: RewardModel, items: Sequence[Item], *, steps: int, eps: float, velocity: Form = "independent", alpha: float = 1.0,
    bandwidth: float | None = None, optimizer: Literal["plain", "adam"] = "plain", guard: float | None = 0.5, candidates: int = 0, seed: int = 0,
) -> list[Moved]:  # fmt: skip
    """Moves sampled responses along the reward's gradient and decodes them once; one Moved an item, in order.

    Items with the same context are the particles of one prompt. steps: L; eps: step size in units of rho, the distance to a token's nearest
    neighbour; steps = 0 or eps = 0 returns the sampled tokens. guard: a decoded text whose mean log-prob per token is more than so many nats
    below the sampled one's is put back (None = off). candidates: decode among the policy's so many likeliest tokens (0 = all rows).
    alpha matters where velocities are mixed ("svgd", "pooled"); a normalised step forgets it for "independent". bandwidth None = median
    heuristic. policy: the reference; a function that gives log-probs will do, with candidates = 0. seed: of the rows that rho is measured on.
    """
    how: dict[str, Any] = {"eps": eps, "velocity": velocity, "alpha": alpha, "bandwidth": bandwidth, "optimizer": optimizer, "seed": seed}
    return sweep(policy, reward, items, [Readout(steps, guard, candidates)], **how)[0]


@dataclass(frozen=True)
class Readout:
    """What is asked of a flow; see transport."""

    steps: int
    guard: float | None = 0.5
    candidates: int = 0


def sweep(
    policy: Policy | LogProbs, reward: RewardModel, items: Sequence[Item], readouts: Sequence[Readout], *, eps: float, velocity: Form = "independent",
    alpha: float = 1.0, bandwidth: float | None = None, optimizer: Literal["plain", "adam"] = "plain", seed: int = 0,
) -> list[list[Moved]]:  # fmt: skip
    """`transport` for each readout, at the price of one flow, the longest, since a shorter one is its beginning."""
    if min((min(r.steps, r.candidates) for r in readouts), default=0) < 0 or eps < 0 or alpha <= 0:
        raise ValueError(f"steps and candidates of {readouts} and eps = {eps} must not be negative, alpha = {alpha} must be positive")
    if not isinstance(policy, Policy) and any(r.candidates for r in readouts):
        raise ValueError("candidates needs the policy itself, not only its log-probs")
    if isinstance(policy, Policy):
        reward.must_share(policy.chat.tokenizer)
    fixed = sorted({*policy.stop_ids, *policy.banned_ids}) if isinstance(policy, Policy) else []
    free = reward.free(fixed=fixed).to(reward.table.device)
    logp = HFEngine(policy).score if isinstance(policy, Policy) else policy
    how = {"eps": eps, "velocity": velocity, "alpha": alpha, "bandwidth": bandwidth, "optimizer": optimizer}
    done: list[dict[int, Moved]] = [{} for _ in readouts]
    for groups in _chunks(items):
        numbers = [i for own in groups for i in own]
        place = {i: k for k, i in enumerate(numbers)}
        some = [items[i] for i in numbers]
        moved = _move(policy, reward, some, [[place[i] for i in own] for own in groups], free, readouts, seed, how)
        for own, r, into in zip(moved, readouts, done, strict=True):
            into |= dict(zip(numbers, _check(logp, reward, some, own, r.guard), strict=True))
    return [[into[i] for i in range(len(items))] for into in done]


def _chunks(items: Sequence[Item]) -> Iterator[list[list[int]]]:
    """Numbers of the items, by prompt, up to CHUNK response tokens at a time."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for i, (c, _) in enumerate(items):
        by_context.setdefault(tuple(c), []).append(i)
    part: list[list[int]] = []
    for own in by_context.values():
        if part and sum(len(items[i][1]) for g in [*part, own] for i in g) > CHUNK:
            yield part
            part = []
        part.append(own)
    if part:
        yield part


def _move(
    policy: Policy | LogProbs, reward: RewardModel, items: Sequence[Item], groups: Sequence[Sequence[int]], free_V: Tensor, readouts: Sequence[Readout],
    seed: int, how: dict[str, Any],
) -> list[list[Moved]]:  # fmt: skip
    """Flow and decoding, nothing judged yet: reward_after and ref_drop are those of the sampled tokens."""
    contexts = [c for c, _ in items]
    ids, lengths = padded([t for _, t in items])
    table = reward.table.detach()
    table = table if table.dtype in (torch.float32, torch.float64) else table.float()  # small steps vanish in bf16
    here = ids.to(table.device)
    present = torch.arange(ids.shape[1], device=table.device) < torch.tensor(lengths, device=table.device)[:, None]
    moves, start = present & free_V[here], table[here] * present[..., None]
    rho, wanted, at = reward.rho(seed), {r.steps for r in readouts}, {0: start}

    def each(done: int, u: Tensor) -> None:
        if done in wanted:
            at[done] = u

    u, seen = flow_embeddings(
        lambda u: reward.slopes(contexts, ids, lengths, u), start, moves, groups, rho=rho, present_NT=present, each=each, steps=max(wanted), **how
    )
    with torch.no_grad():
        seen.append(reward.value(contexts, ids, lengths, u))
    before, found = seen[0].tolist(), []
    for r in readouts:
        steps = r.steps if r.steps in at else 0  # eps = 0: no step was made
        new, passes = _decoded(policy, items, at[steps], moves, table, free_V, r.candidates) if steps else ([list(t) for _, t in items], [0] * len(items))
        far = ((at[steps] - start).norm(dim=-1) * moves).sum(1) / moves.sum(1).clamp(min=1) / rho
        found.append([
            Moved(y, b, f, b, sum(x != z for x, z in zip(y, t, strict=True)) / len(t), 0.0, True, d, k)
            for y, b, f, (_, t), d, k in zip(new, before, seen[steps].tolist(), items, far.tolist(), passes, strict=True)
        ])  # fmt: skip
    return found


def _decoded(
    policy: Policy | LogProbs, items: Sequence[Item], u_NTD: Tensor, moves_NT: Tensor, table_VD: Tensor, free_V: Tensor, candidates: int
) -> tuple[list[list[int]], list[int]]:
    """(tokens, forwards of the policy) of each response."""
    if candidates and isinstance(policy, Policy):
        return restricted_rows(policy, items, u_NTD, moves_NT, table_VD, free_V, candidates)
    ids, lengths = padded([t for _, t in items])
    ids = ids.to(table_VD.device)
    ids[moves_NT] = nearest_rows(u_NTD[moves_NT], table_VD, free_V, ids[moves_NT])
    return [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)], [0] * len(items)


def _check(logp: LogProbs, reward: RewardModel, items: Sequence[Item], moved: Sequence[Moved], guard: float | None) -> list[Moved]:
    """The guard, then the reward of what is left changed."""
    out, changed = list(moved), [i for i, m in enumerate(moved) if m.changed_share]
    asked = [pair for i in changed for pair in (items[i], (items[i][0], moved[i].token_ids))]
    mean = [sum(row) / len(row) for row in logp(asked)] if asked else []
    for i, was, now in zip(changed, mean[::2], mean[1::2], strict=True):
        out[i] = replace(moved[i], ref_drop=was - now)
        if guard is not None and not was - now <= guard:  # a NaN is put back too
            out[i] = replace(out[i], token_ids=list(items[i][1]), changed_share=0.0, kept=False)
    left = [i for i in changed if out[i].kept]
    for i, r in zip(left, reward.score([(items[i][0], out[i].token_ids) for i in left]), strict=True):
        out[i] = replace(out[i], reward_after=r)
    return out


# ---------------------------------------------------------------- selection, diagnostics, cost


def best(moved: Sequence[Moved]) -> int:
    """The number of the response with the highest reward of its decoded tokens; the first of equals."""
    return max(range(len(moved)), key=lambda i: (moved[i].reward_after, -i))


def diagnostics(items: Sequence[Item], moved: Sequence[Moved], *, second: RewardModel | None = None, space: RewardModel | None = None) -> dict[str, float]:
    """Means over the responses: what transport did and what decoding left of it.

    ref_drop is that of decoded texts before the guard, over those that changed; guarded_share: of those, the ones put back. second: rewards of
    another model before and after (over-optimisation shows as a rise of the first alone). space: its embeddings give mmd, the budget
    used: MMD between a prompt's sampled and decoded responses (mean embeddings, RBF, median width of the sampled ones), mean over prompts.
    """
    n = max(1, len(moved))
    tried = [m for m in moved if m.changed_share or not m.kept]
    row = {name: sum(getattr(m, name) for m in moved) / n for name in ("reward_before", "reward_flowed", "reward_after", "changed_share", "displacement")}
    row |= {"decoding_loss": row["reward_flowed"] - row["reward_after"], "moved_share": sum(bool(m.changed_share) for m in moved) / n}
    row |= {"ref_drop": sum(m.ref_drop for m in tried) / max(1, len(tried)), "guarded_share": sum(not m.kept for m in tried) / max(1, len(tried))}
    after = [(c, m.token_ids) for (c, _), m in zip(items, moved, strict=True)]
    if second is not None:
        row |= {"second_before": sum(second.score(items)) / n, "second_after": sum(second.score(after)) / n}
    if space is not None:
        row["mmd"] = _mmd(space, items, after)
    return row


def _mmd(space: RewardModel, before: Sequence[Item], after: Sequence[Item]) -> float:
    by_context: dict[tuple[int, ...], list[int]] = {}
    for i, (c, _) in enumerate(before):
        by_context.setdefault(tuple(c), []).append(i)
    table, found = space.table.detach().double(), []

    def mean(items: Sequence[Item], own: Sequence[int]) -> Tensor:
        return torch.stack([table[torch.tensor(list(items[i][1]), device=table.device)].mean(0) for i in own])[None]

    for own in by_context.values():
        x, y = mean(before, own), mean(after, own)
        width = core.median_width(x) if len(own) > 1 else x.new_tensor([2 * space.rho() ** 2])
        found.append(float(core.mmd2(x, y, (width / 2).sqrt())[0]) ** 0.5)
    return sum(found) / max(1, len(found))


def equal_compute(n: int, steps: int, *, generate: float, score: float, reference: float = 0.0, passes: float = 2.0) -> float:
    """N' of the best-of-N' that costs what transport of n responses costs. Costs of one response, in seconds or FLOPs, all alike.

    generate: sampling it; score: one forward of the reward model; reference: one teacher-forced forward of the policy; passes: how many of
    those, 2 for the guard (0 without), and Moved.passes where decoding is among candidates.
    n (generate + (3 L + 2) score + passes reference) / (generate + score) for L > 0: a backward pass counts as two forwards; the last
    forward before decoding and that of the decoded tokens are the 2. n for L = 0.
    """
    return n * (generate + (3 * steps + 2) * score + passes * reference) / (generate + score) if steps else float(n)

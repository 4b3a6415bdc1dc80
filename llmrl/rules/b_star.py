"""B-STaR, balance of exploration and exploitation in self-taught reasoners (Zeng et al., arXiv:2412.17256)."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from math import comb
from typing import TYPE_CHECKING, Literal

from llmrl import losses
from llmrl.credit import Credit
from llmrl.records import Group, Prompt, Sample
from llmrl.rollout import RolloutIO, sample_groups
from llmrl.rules.base import Over, Rule, Term

if TYPE_CHECKING:
    from llmrl.memory import Memory

Unique = Literal["text", "equations"]
TEMPERATURES = tuple(round(0.5 + 0.05 * i, 2) for i in range(15))
_EQUATION = re.compile(r"[-+*/().\d]+=[-+]?\d+(?:\.\d+)?")


def b_star(
    *, every: int = 50, temperatures: tuple[float, ...] = TEMPERATURES, thresholds: tuple[float, ...] = (-1.0, 0.5), dev_prompts: int = 0,
    dev_samples: int = 0, wanted: int = 0, unique: Unique = "text", empty_counts: bool = False, pass_k: int = 0, pass_s: int = 2, right: float = 0.5,
    over: Over = "token",
) -> Rule:  # fmt: skip
    """Rejection fine-tuning on the policy's own samples; sampling temperature and score threshold are chosen by a balance score. arXiv:2412.17256.

    bs_i = min(n'_i / n*, 1) n'_i / n_i, 0 if n_i = 0;  n_i samples of prompt i with score > threshold, n'_i unique right ones among them, n* `wanted`
    loss = mean of -log p over the tokens of the samples kept: score > threshold, unique, the best n* of each prompt
    Differs from grpo: (1) that loss: no advantage, ratio or clip; (2) the controller. At step 1 and `every` steps later each of `temperatures` samples the
    dev prompts; the pair of largest mean bs over prompts with n_i >= 1 (empty_counts: over all, n_i = 0 counting 0) rules from the next step on; before
    the first search the recipe's temperature and threshold `right`. Ties: lower temperature, then lower threshold. Scores of all ranks count, by way
    of the memory, so a resumed run goes on as it was. Samples at another temperature than the recipe's bring no log-probs: they feed no ratio, no alarm.
    The grid .50 to 1.20 is the paper's; it searches 1k prompts x 64 samples every 500 steps, n* 8. OUR CHOICE: `every`, the dev prompts are the first
    dev_prompts of the step (0: all), dev_samples 0: as many as rollout.group, wanted 0: half of the samples, the score is the verifier's: of 0/1
    scores a threshold keeps all or the right ones; the paper's, ORM + min(PRM) / 5 with thresholds from -1 to 1, is over 1.2 that of the verifiers combine
    and process (recipes/rules/b_star_process.toml). Texts are compared up to white space, or as sequences of equations. The likelihood is taken at
    rollout.temperature: leave it at 1. LEFT OUT: gold solutions among the kept, growing N up to a target size, Best-of-K, Reward@K-S.
    Metrics rule/balance (n_i >= 1), balance_all, temperature, threshold, kept (a prompt), diversity (unique share of the right), pass@K, pass@K-S
    (at least S of K samples right; pass_k 0: half of rollout.group).
    """
    if every < 1 or not temperatures or not thresholds or min(temperatures) <= 0 or min(dev_prompts, dev_samples, wanted, pass_k, pass_s - 1) < 0:
        raise ValueError(f"b_star: every = {every} at least 1, temperatures = {temperatures} above 0, a threshold at least, pass_s above 0, no negative count")
    collect = partial(
        kept_groups, every=every, grid=[(t, h) for t in sorted(temperatures) for h in sorted(thresholds)], dev=(dev_prompts, dev_samples), wanted=wanted,
        unique=unique, empty_counts=empty_counts, passes=(pass_k, pass_s), right=right,
    )  # fmt: skip
    return Rule(credit=Credit(), loss=(Term(losses.ce(), weight="kept", over=over, name="kept"),), collect=collect)


b_star.cost = "every so many steps a group more at each temperature"  # type: ignore[attr-defined]


def balance(unique_right: int, kept: int, wanted: float) -> float:
    """bs_i, in [0, 1]."""
    return min(unique_right / wanted, 1.0) * unique_right / kept if kept else 0.0


def pass_at_least(m: int, c: int, k: int, s: int = 1) -> float:
    """Pass@K-S: the probability that at least s of k samples, drawn from m of which c are right, are right."""
    return sum(comb(c, j) * comb(m - c, k - j) for j in range(s, min(c, k) + 1)) / comb(m, k)


def form(text: str, unique: Unique) -> Hashable:
    """What two texts must share to be the same: all but white space, or their equations in order (all of the text where there are none)."""
    found = tuple(_EQUATION.findall("".join(text.split()))) if unique == "equations" else ()
    return found or " ".join(text.split())


def tally(samples: Sequence[Sample], threshold: float, right: float, unique: Unique) -> tuple[int, int]:
    """(n', n) of a prompt's samples."""
    kept = [s for s in samples if s.reward is not None and s.reward > threshold]
    return len({form(s.text, unique) for s in kept if (s.reward or 0.0) > right}), len(kept)


def best_of(samples: Sequence[Sample], threshold: float, unique: Unique, most: int) -> list[Sample]:
    """The samples that are trained on: the first of each form, highest scores first, at most so many."""
    kept = sorted((s for s in samples if s.reward is not None and s.reward > threshold), key=lambda s: -(s.reward or 0.0))
    first: dict[Hashable, Sample] = {}
    for s in kept:
        first.setdefault(form(s.text, unique), s)
    return list(first.values())[:most]


def chosen(memory: Memory, grid: Sequence[tuple[float, float]], *, empty_counts: bool) -> tuple[float, float] | None:
    """(temperature, threshold) of the largest score in the last search, the first of equal ones; None before there was one."""
    scores = {}
    for pair in grid:
        total, answered = (memory.average(f"b_star/{name}/{pair[0]:g}/{pair[1]:g}") for name in ("balance", "answered"))
        if total is not None and answered is not None:
            scores[pair] = total if empty_counts else total / answered if answered else 0.0
    return max(scores, key=lambda pair: round(scores[pair], 12)) if scores else None


async def _search(
    prompts: Sequence[Prompt], io: RolloutIO, grid: Sequence[tuple[float, float]], n: int, wanted: float, unique: Unique, right: float
) -> None:  # fmt: skip
    """Scores every pair of the grid on these prompts; the memory sums them up over all ranks when the step ends."""
    for temperature in dict.fromkeys(t for t, _ in grid):
        groups = await sample_groups(prompts, io, sizes=[n] * len(prompts), sampling=replace(io.sampling, temperature=temperature))
        for pair in (p for p in grid if p[0] == temperature):
            counts = [tally(g.samples, pair[1], right, unique) for g in groups]
            for name, value in (("balance", sum(balance(a, b, wanted) for a, b in counts)), ("answered", sum(b > 0 for _, b in counts))):
                io.memory.track(f"b_star/{name}/{pair[0]:g}/{pair[1]:g}", value, len(counts), decay=0.0)


async def kept_groups(
    prompts: Sequence[Prompt], io: RolloutIO, *, every: int, grid: Sequence[tuple[float, float]], dev: tuple[int, int], wanted: int, unique: Unique,
    empty_counts: bool, passes: tuple[int, int], right: float,
) -> list[Group]:  # fmt: skip
    """The default collect at the temperature of the day; what is kept feeds the term "kept"."""
    temperature, threshold = chosen(io.memory, grid, empty_counts=empty_counts) or (io.sampling.temperature, right)
    if (io.step - 1) % every == 0:
        first = {p.visit_id for p in (io.step_prompts or prompts)[: dev[0] or None]}
        if mine := [p for p in prompts if p.visit_id in first]:
            await _search(mine, io, grid, dev[1] or io.group, wanted or max(1, (dev[1] or io.group) // 2), unique, right)
    groups = await sample_groups(prompts, io, sampling=replace(io.sampling, temperature=temperature))
    most, k = wanted or max(1, io.group // 2), passes[0] or max(1, io.group // 2)
    for g in groups:
        kept = {s.id for s in best_of(g.samples, threshold, unique, most)}
        if temperature != io.sampling.temperature:
            g.samples = [s.recontext(s.context_ids) for s in g.samples]
        for s in g.samples:
            s.weights = {"kept": float(s.id in kept)}
        _note(g, io, threshold, most, unique, right, k, min(k, passes[1]))
        for name, value in (("temperature", temperature), ("threshold", threshold), ("kept", len(kept))):
            io.note(name, value)
    return groups


def _note(group: Group, io: RolloutIO, threshold: float, wanted: int, unique: Unique, right: float, k: int, s: int) -> None:
    (different, n), (distinct, judged) = tally(group.samples, threshold, right, unique), tally(group.samples, -1.0, right, unique)
    n_right = sum(x.reward is not None and x.reward > right for x in group.samples)
    io.note("balance_all", balance(different, n, wanted))
    if n:
        io.note("balance", balance(different, n, wanted))
    if n_right:
        io.note("diversity", distinct / n_right)
    if judged >= k:
        io.note(f"pass@{k}", pass_at_least(judged, n_right, k))
        io.note(f"pass@{k}-{s}", pass_at_least(judged, n_right, k, s))

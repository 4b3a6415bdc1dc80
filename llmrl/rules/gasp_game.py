"""The game of GASP: the trace that is spoilt, pollution, recovery and rewards; see gasp.py for the whole and gasp_repair.py for guidance.

Random streams are named by (visit of the prompt, role, numbers), so the clean samples are those of plain GRPO, and what a role draws
does not depend on the others. The windows of NLLs behind the two gates hold values of earlier steps; in the first step a rank's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from llmrl.records import Completion, Group, Prompt, Sample, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules.gasp_parts import REASONS, chunk_spans, edit_by_rule, fault, inside, places_to_corrupt, token_texts
from llmrl.templates import Template

WINDOW = 1000
"""Values of a running window of NLLs."""


@dataclass(frozen=True)
class Game:
    """The numbers of the game; see `gasp`."""

    corruptions: int
    continuations: int | None
    control: float
    polluter: Literal["self", "rules"]
    guidance: float
    repairs: int
    scarce: float
    anneal_decay: float
    anneal_off: float
    nll_quantile: float
    coherence_quantile: float
    coherence_slack: float
    chunk: tuple[int, int, int]
    cut: str
    answer_marks: tuple[str, ...]
    position: tuple[float, float]
    delimiters: tuple[str, str]
    length: tuple[float, float]
    replace_max: int
    min_edits: int
    giveaways: tuple[str, ...]
    leaks: tuple[str, ...]
    continuation_tokens: int | None
    warmup_steps: int
    kl: bool
    polluter_prompt: Template
    repair_prompt: Template


@dataclass
class Corruption:
    """One replacement of a chunk, and what became of it."""

    m: int
    ids: list[int]
    """s~; empty where it could not be parsed"""
    reason: str
    """why it is invalid; "" = valid"""
    sample: Sample | None = None
    """of the polluter; None where a rule made it"""
    context: list[int] = field(default_factory=list)
    """h: what the agent goes on from"""
    agents: list[Sample] = field(default_factory=list)
    nlls: list[float] = field(default_factory=list)
    """of the agents' texts, mean a token, nats"""

    @property
    def recovery(self) -> float | None:
        """Mean reward of the continuations that could be judged."""
        judged = [s.reward for s in self.agents if s.reward is not None]
        return sum(judged) / len(judged) if judged else None


@dataclass
class Item:
    """A problem with the trace that is spoilt: x_solve, prefix and step as token ids."""

    group: Group
    trace: Sample
    question: list[int]
    prefix: list[int]
    step: list[int]
    spans: list[tuple[int, int]]
    """all chunks of the trace"""
    corruptions: list[Corruption] = field(default_factory=list)
    controls: list[Sample] = field(default_factory=list)
    repairs: list[Sample] = field(default_factory=list)

    @property
    def prompt(self) -> Prompt:
        return self.group.prompt

    @property
    def name(self) -> str:
        return self.prompt.visit_id


# ---------------------------------------------------------------- phase 1: the trace to spoil


def choose(group: Group, io: RolloutIO, game: Game) -> Item | None:
    """Phase 1, second half: a correct, finished trace at random among those with a chunk to corrupt, and that chunk at random."""
    least, target, most = game.chunk
    cuttable = []
    for s in group.samples:
        if s.reward is None or s.reward < 1.0 or s.finish != "stop":
            continue
        texts = token_texts(io.chat, s.token_ids)
        spans = chunk_spans(texts, cut=game.cut, least=least, target=target, most=most)
        places = places_to_corrupt(texts, spans, marks=game.answer_marks, position=game.position, most=most)
        places = [k for k in places if _room(s, spans[k], io, game)]
        if places:
            cuttable.append((s, spans, places))
    if not cuttable:
        return None
    rng = io.rng(group.prompt.visit_id, "trace")
    s, spans, places = cuttable[int(rng.integers(len(cuttable)))]
    a, b = spans[places[int(rng.integers(len(places)))]]
    return Item(group, s, list(s.context_ids), s.token_ids[:a], s.token_ids[a:b], spans)


def _room(trace: Sample, span: tuple[int, int], io: RolloutIO, game: Game) -> bool:
    """Whether the model's positions hold the corrupted context and a continuation twice as long as what the trace itself needed."""
    limit = getattr(io.engine, "max_length", None)
    if not limit:
        return True
    here = len(trace.context_ids) + span[0]
    rest = min(wanted_tokens(io, game), 2 * (len(trace.token_ids) - span[0]))
    return here + min(game.replace_max, int(game.length[1] * (span[1] - span[0]))) + rest <= limit


def wanted_tokens(io: RolloutIO, game: Game) -> int:
    return game.continuation_tokens or io.sampling.max_new_tokens


def _fitting(contexts: Sequence[Sequence[int]], wanted: Sampling, io: RolloutIO) -> list[int]:
    """max_new_tokens a context: as wanted, or what the model's positions leave."""
    limit = getattr(io.engine, "max_length", None)
    return [min(wanted.max_new_tokens, limit - len(x)) if limit else wanted.max_new_tokens for x in contexts]


def complete(contexts: Sequence[list[int]], keys: Sequence[tuple[int | str, ...]], wanted: Sampling, io: RolloutIO) -> list[Completion | None]:
    """One completion a context within the model's positions; None where they leave less than one token. One call an allowed length."""
    lengths = _fitting(contexts, wanted, io)
    done: list[Completion | None] = [None] * len(contexts)
    for n in sorted({n for n in lengths if n > 0}, reverse=True):
        mine = [i for i, k in enumerate(lengths) if k == n]
        made = io.sample([contexts[i] for i in mine], [keys[i] for i in mine], replace(wanted, max_new_tokens=n))
        for i, completion in zip(mine, made, strict=True):
            done[i] = completion
    return done


def record(item: Item, completion: Completion, context: Sequence[int], role: str, name: str, parent: str, verdict: Verdict | None = None) -> Sample:
    """A sample that feeds the term of its role; its cohort is its name less the last number."""
    score = verdict.score if verdict else None
    return Sample(
        id=f"{item.name}/{name}", prompt_id=item.prompt.id, cohort=f"{item.name}/{name}".rpartition("/")[0], context_ids=list(context),
        token_ids=completion.token_ids, behavior_logp=completion.logprobs, policy_version=completion.policy_version, text=completion.text,
        finish=completion.finish, role=role, verdict=verdict, reward=score, weights={role: float(score is not None)}, parent=parent,
    )  # fmt: skip


# ---------------------------------------------------------------- phase 2: pollution


def pollute(items: Sequence[Item], io: RolloutIO, game: Game) -> None:
    """M replacements of every item's chunk, through the gate."""
    if game.polluter == "self":
        _ask_polluter(items, io, game)
    else:
        for item in items:
            _edit(item, io, game)
    parsed = [(item, x) for item in items for x in item.corruptions if not x.reason]
    behind = [item.question + item.prefix for item, _ in parsed]
    for (item, x), logps in zip(parsed, io.score(behind, [x.ids for _, x in parsed]), strict=True):
        x.nlls = [mean_nll(logps)]
        x.context = item.question + item.prefix + x.ids
    originals = own_logps([item.trace for item in items], io)
    nlls = [mean_nll(logps[a:b]) for item, logps in zip(items, originals, strict=True) for a, b in item.spans]
    limit = gate(io, "gasp/chunk_nll", nlls, game.coherence_quantile)
    n = sum(len(item.corruptions) for item in items)
    for _, x in parsed:
        io.note("corruption_nll", x.nlls[0])
        if limit is not None and not x.nlls[0] <= limit + game.coherence_slack:
            x.reason = "coherence"
        x.nlls = []
    if limit is not None:
        io.note("coherence_gate", limit + game.coherence_slack)
    if n:
        reasons = [x.reason for item in items for x in item.corruptions]
        io.note("valid", reasons.count(""), n)
        for reason in REASONS:
            io.note(f"invalid_{reason}", reasons.count(reason), n)


def _ask_polluter(items: Sequence[Item], io: RolloutIO, game: Game) -> None:
    opening = io.chat.tokenizer(game.delimiters[0], add_special_tokens=False)["input_ids"] if game.delimiters[0] else []
    closing = game.delimiters[1]
    tokens = game.replace_max + len(io.chat.tokenizer(closing, add_special_tokens=False)["input_ids"]) + 4
    how = replace(io.sampling, max_new_tokens=tokens, stop=(closing,))
    jobs = [(item, m) for item in items for m in range(game.corruptions)]
    asked = {}
    for item in items:
        shown = game.polluter_prompt.messages(item.prompt, prefix=io.chat.text(item.prefix), step=io.chat.text(item.step))
        asked[item.name] = io.chat.prompt_ids(shown) + opening
    done = complete([asked[item.name] for item, _ in jobs], [(item.name, "polluter", m) for item, m in jobs], how, io)
    for (item, m), completion in zip(jobs, done, strict=True):
        if completion is None:
            continue
        texts = token_texts(io.chat, completion.token_ids)
        (a, b), reason = inside(texts, closing)
        reason = reason or _fault(texts[a:b], item, io, game)
        sample = record(item, completion, asked[item.name], "polluter", f"polluter/{m}", item.trace.id)
        item.corruptions.append(Corruption(m, completion.token_ids[a:b], reason, sample))


def _edit(item: Item, io: RolloutIO, game: Game) -> None:
    """Corruptions by rule, the frozen polluter that needs no frozen weights. Their ids are only ever a context."""
    step, rng = io.chat.text(item.step), io.rng(item.name, "rules")
    for m in range(game.corruptions):
        changed = edit_by_rule(step, rng)
        ids = list(io.chat.tokenizer(changed, add_special_tokens=False)["input_ids"]) if changed else []
        reason = _fault(token_texts(io.chat, ids), item, io, replace(game, min_edits=1)) if ids else "same"
        item.corruptions.append(Corruption(m, ids, reason))


def _fault(texts: Sequence[str], item: Item, io: RolloutIO, game: Game) -> str:
    return fault(
        texts, token_texts(io.chat, item.step), length=game.length, most=game.replace_max, min_edits=game.min_edits, marks=game.answer_marks,
        giveaways=game.giveaways, cut=game.cut,
    )  # fmt: skip


# ---------------------------------------------------------------- phases 3 and 4: recovery, rewards


async def recover(items: Sequence[Item], io: RolloutIO, game: Game) -> None:
    """G continuations of every valid corruption, and for a share of the items G of the clean context; judged by what they say alone."""
    n = game.continuations or io.group
    how = replace(io.sampling, max_new_tokens=wanted_tokens(io, game))
    jobs: list[tuple[Item, Corruption | None, int]] = [(item, x, j) for item in items for x in item.corruptions if not x.reason for j in range(n)]
    jobs += [(item, None, j) for item in items if io.rng(item.name, "control").random() < game.control for j in range(n)]
    contexts = [x.context if x else item.question + item.prefix + item.step for item, x, _ in jobs]
    keys = [(item.name, "agent", x.m, j) if x else (item.name, "control", j) for item, x, j in jobs]
    done = complete(contexts, keys, how, io)
    verdicts = iter(await io.verify([(item.prompt, made.text) for (item, *_), made in zip(jobs, done, strict=True) if made]))
    for (item, x, j), context, made in zip(jobs, contexts, done, strict=True):
        if made is None:
            continue
        if x:
            x.agents.append(record(item, made, context, "agent", f"agent/{x.m}/{j}", x.sample.id if x.sample else item.trace.id, next(verdicts)))
        else:
            item.controls.append(record(item, made, context, "control", f"control/{j}", item.trace.id, next(verdicts)))


def reward(items: Sequence[Item], io: RolloutIO, game: Game) -> None:
    """R^P_m = valid_m (1 - mean_j R^A_mj) (2); what the game looks like goes to the metrics and to the running recovery."""
    for item in items:
        for x in item.corruptions:
            lost = 0.0 if x.reason else None if x.recovery is None else 1.0 - x.recovery
            if x.sample is not None:
                x.sample.reward, x.sample.weights = lost, {"polluter": float(lost is not None)}
            if lost is not None:
                io.note("polluter_reward", lost)
    shares = [x.recovery for item in items for x in item.corruptions if x.recovery is not None]
    judged = [s.reward for item in items for x in item.corruptions for s in x.agents if s.reward is not None]
    if judged:
        io.note("recovery", sum(judged), len(judged))
        io.memory.track("gasp/recovery", sum(judged), len(judged), decay=game.anneal_decay)
        for name, met in (("scarce", [r <= game.scarce for r in shares]), ("all_zero", [r == 0 for r in shares]), ("all_one", [r == 1 for r in shares])):
            io.note(f"groups_{name}", sum(met), len(met))
    for s in (s for item in items for s in item.controls if s.reward is not None):
        io.note("control", s.reward or 0.0)


# ---------------------------------------------------------------- likelihoods


def mean_nll(logps: Sequence[float]) -> float:
    """Nats a token."""
    return -sum(logps) / len(logps)


def own_logps(samples: Sequence[Sample], io: RolloutIO) -> list[list[float]]:
    """Log-probs at temperature 1 of what was sampled: the engine's own numbers where they are that, else a forward."""
    how = io.sampling
    if how.temperature == 1 and how.top_p == 1 and not how.top_k and not how.min_p:
        return [list(s.behavior_logp or []) for s in samples]
    return io.score([s.context_ids for s in samples], [s.token_ids for s in samples])


def gate(io: RolloutIO, name: str, values: Sequence[float], quantile: float) -> float | None:
    """The quantile over the last WINDOW values of earlier steps, in the first step over `values`; these join the window. None = no value."""
    window = io.memory.recall(name, "") or list(values)
    for value in values[-WINDOW:]:
        io.memory.remember(name, "", value, cap=WINDOW)
    return float(np.quantile(window, quantile)) if window else None

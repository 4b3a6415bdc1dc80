"""From prompts to scored groups: what a rule's `collect` may use, and the default collect."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np

from llmrl.chat import Chat
from llmrl.memory import Memory
from llmrl.records import Completion, Engine, Group, Prompt, Request, Sample, Sampling, Verdict


class Scores(Protocol):
    """Anything that judges responses in order: scoring.Scorer, or a plain function in a test."""

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]: ...


class Plays(Protocol):
    """Makes whole episodes in an environment: turns.Episodes."""

    async def play(
        self, prompts: Sequence[Prompt], io: RolloutIO, *, mask_truncated: bool = False, sizes: Sequence[int] | None = None,
        sampling: Sampling | None = None, before: Any = None,
    ) -> list[Group]: ...  # fmt: skip


@dataclass
class RolloutIO:
    """All that `collect` sees. Random streams come from (seed, step, prompt id, i): they do not depend on rank or batch."""

    engine: Engine
    verifier: Scores
    chat: Chat
    memory: Memory
    sampling: Sampling
    group: int
    """samples a prompt"""
    seed: tuple[int, int]
    """(recipe seed, step)"""
    steps: int = 1
    """steps of the whole run, for what is annealed over it"""
    more_prompts: Callable[[int], list[Prompt]] | None = None
    """the next n prompts of this rank, for rules that refill; they count as used"""
    step_prompts: Sequence[Prompt] = ()
    """the step's prompts of all ranks, in an order that is the same on every rank, for what is shared out among them; empty: those of collect are all"""
    environment: Plays | None = None
    """the recipe's [environment]: the default collect then plays episodes in it"""
    seconds: Counter[str] = field(default_factory=Counter)
    """wall time spent in "generate" and "score" """
    generated: int = 0
    """tokens that the engine made, whatever became of them"""
    noted: dict[str, list[float]] = field(default_factory=dict)
    """metric -> [sum, count], see note"""

    @property
    def step(self) -> int:
        """From 1."""
        return self.seed[1]

    @property
    def version(self) -> int:
        """Of the weights that the engine samples from."""
        return self.engine.policy_version

    def sample(self, contexts: Sequence[Sequence[int]], keys: Sequence[tuple[int | str, ...]], sampling: Sampling | None = None) -> list[Completion]:
        """One completion a context. `keys` name the random streams within the step, e.g. (prompt id, sample index)."""
        how = sampling or self.sampling
        with timed(self.seconds, "generate"):
            done = self.engine.generate([Request(tuple(c), (*self.seed, *k), how) for c, k in zip(contexts, keys, strict=True)])
        self.generated += sum(len(c.token_ids) for c in done)
        return done

    def score(self, contexts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs (nats, temperature 1) of each row of tokens behind its context, under the weights that sample now; no gradient."""
        with timed(self.seconds, "generate"):
            return self.engine.score([(tuple(c), tuple(t)) for c, t in zip(contexts, tokens, strict=True)])

    def note(self, name: str, value: float, n: float = 1.0) -> None:
        """Adds to the metric "rule/<name>" of the step: the mean of all values over all ranks, `value` being a sum of n of them.

        n = 0: the sum instead. A name is used in one of the two ways.
        """
        there = self.noted.setdefault(f"rule/{name}", [0.0, 0.0])
        there[0], there[1] = there[0] + value, there[1] + n

    async def verify(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """One verdict an item, in order."""
        with timed(self.seconds, "score"):
            return await asyncio.to_thread(self.verifier.score, list(items))

    def rng(self, *key: int | str) -> np.random.Generator:
        """A generator for a rule's own draws, named by key; never the stream of a completion, whatever the key."""
        return philox(("rng", *self.seed, *key))


def philox(key: tuple[int | str, ...]) -> np.random.Generator:
    """A counter-based generator keyed by a tuple: the same numbers on every machine and in every process."""
    import hashlib

    digest = hashlib.sha256("\x1f".join(f"{type(k).__name__}:{k}" for k in key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


class timed:
    """Adds the wall seconds of a block to counter[name]."""

    def __init__(self, counter: Counter[str], name: str):
        self.counter, self.name = counter, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.counter[self.name] += time.perf_counter() - self.start  # type: ignore[assignment]


F = TypeVar("F", bound=Callable[..., Any])


def plays_episodes(collect: F) -> F:
    """Marks a collect that works in an [environment] too: all its samples come from sample_groups, and it reads of them what episodes have."""
    collect.plays_episodes = True  # type: ignore[attr-defined]
    return collect


@plays_episodes
async def sample_groups(
    prompts: Sequence[Prompt], io: RolloutIO, *, mask_truncated: bool = False, sizes: Sequence[int] | None = None, sampling: Sampling | None = None
) -> list[Group]:  # fmt: skip
    """The default collect: `io.group` samples of every prompt, each judged against its own prompt.

    mask_truncated: samples cut by the length limit keep their place in the group's statistics but train nothing (DAPO's overlong
    filtering, arXiv:2503.14476 section 3.4). sizes: samples of each prompt, in place of io.group. sampling: in place of io.sampling; where
    the distribution is another one than the learner's, the samples' log-probs are no longer comparable (Sample.recontext takes them off).
    With an [environment] the samples are episodes in it.
    """
    if io.environment is not None:
        return await io.environment.play(prompts, io, mask_truncated=mask_truncated, sizes=sizes, sampling=sampling)
    contexts = [io.chat.prompt_ids(p.messages) for p in prompts]
    sizes = sizes if sizes is not None else [io.group] * len(prompts)
    jobs = [(g, i) for g, n in enumerate(sizes) for i in range(n)]
    if getattr(io.engine, "streams", False):
        return await _streamed_groups(prompts, io, contexts, mask_truncated, sizes, sampling or io.sampling)
    done = complete(prompts, contexts, io, sizes=sizes, sampling=sampling)
    verdicts = await io.verify([(prompts[g], done[g][i].text) for g, i in jobs])
    groups = [Group(p, []) for p in prompts]
    for (g, i), v in zip(jobs, verdicts, strict=True):
        groups[g].samples.append(make_sample(prompts[g], i, contexts[g], done[g][i], v, mask_truncated=mask_truncated))
    return groups


def complete(
    prompts: Sequence[Prompt], contexts: Sequence[Sequence[int]], io: RolloutIO, *, sizes: Sequence[int] | None = None, sampling: Sampling | None = None
) -> list[list[Completion]]:  # fmt: skip
    """Completions of every prompt behind its context, judged by nobody: for rules that judge otherwise. sizes, sampling: as in sample_groups."""
    sizes = sizes if sizes is not None else [io.group] * len(prompts)
    jobs = [(k, i) for k, n in enumerate(sizes) for i in range(n)]
    done = iter(io.sample([contexts[k] for k, _ in jobs], [(prompts[k].visit_id, i) for k, i in jobs], sampling))
    return [list(islice(done, n)) for n in sizes]


async def _streamed_groups(
    prompts: Sequence[Prompt], io: RolloutIO, contexts: Sequence[list[int]], mask_truncated: bool, sizes: Sequence[int], sampling: Sampling
) -> list[Group]:  # fmt: skip
    """The same from an engine that answers as it goes: a group is judged as soon as it is whole, while others still decode."""

    async def one(prompt: Prompt, context: list[int], n: int) -> tuple[list[tuple[Prompt, str]], list[Verdict], Group]:
        keys = [(prompt.visit_id, i) for i in range(n)]
        done = await io.engine.complete([Request(tuple(context), (*io.seed, *k), sampling) for k in keys])  # type: ignore[attr-defined]
        ended.append(time.perf_counter())
        io.generated += sum(len(c.token_ids) for c in done)
        items = [(prompt, c.text) for c in done]
        verdicts = await asyncio.to_thread(io.verifier.score, items)
        samples = [make_sample(prompt, i, context, c, v, mask_truncated=mask_truncated) for i, (c, v) in enumerate(zip(done, verdicts, strict=True))]
        return items, verdicts, Group(prompt, samples)

    ended: list[float] = []
    began = time.perf_counter()
    found = await asyncio.gather(*(one(p, c, n) for p, c, n in zip(prompts, contexts, sizes, strict=True)))
    io.seconds["generate"] += max(ended) - began  # type: ignore[assignment]
    io.seconds["score"] += time.perf_counter() - max(ended)  # type: ignore[assignment]
    check = getattr(io.verifier, "check_rate", None)
    if check is not None:  # a single group is too few for the alarm
        check([item for items, *_ in found for item in items], [v for _, verdicts, _ in found for v in verdicts])
    return [group for *_, group in found]


def make_sample(prompt: Prompt, i: int, context_ids: Sequence[int], c: Completion, v: Verdict, *, mask_truncated: bool = False) -> Sample:
    """Sample i of a prompt, role "policy", from a completion and its verdict. Unjudged: reward None and weight 0."""
    on = v.score is not None and not (mask_truncated and c.finish == "length")
    return Sample(
        id=f"{prompt.visit_id}/{i}", prompt_id=prompt.id, cohort=prompt.visit_id, context_ids=list(context_ids), token_ids=c.token_ids,
        behavior_logp=c.logprobs, policy_version=c.policy_version, text=c.text,
        finish=c.finish, verdict=v, reward=v.score, weights={"policy": 1.0 if on else 0.0},
    )  # fmt: skip


@plays_episodes
async def dynamic_groups(prompts: Sequence[Prompt], io: RolloutIO, *, max_rounds: int = 10, mask_truncated: bool = False) -> list[Group]:
    """DAPO's dynamic sampling: keeps groups whose scores differ and refills with new prompts until there are len(prompts) of them.

    Source: DAPO, arXiv:2503.14476 section 3.2; at most `max_rounds` generation rounds (10 in the released scripts, which then stop with
    an error; here the step goes on with the groups it has, and the metric groups/live shows it). A prompt is kept iff its judged
    scores are not all equal; with one sample a prompt all are kept. If no group is live the last round's are returned: the step then
    has gradient 0.
    """
    live: list[Group] = []
    seen = list(prompts)
    for round_ in range(max_rounds):
        fresh = await sample_groups(seen, io, mask_truncated=mask_truncated)
        live += [g for g in fresh if len({s.reward for s in g.samples if s.reward is not None}) > 1 or len(g.samples) == 1]
        if len(live) >= len(prompts) or io.more_prompts is None or round_ == max_rounds - 1:
            return live[: len(prompts)] or fresh
        seen = io.more_prompts(len(prompts) - len(live))
    return live

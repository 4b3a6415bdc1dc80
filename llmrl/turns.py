"""Episodes of several turns: the collect that an [environment] puts in the place of the default one. docs/agents.md.

Tokens are exact: what the engine returned stays as it was sampled and is never tokenised again; what the environment says is tokenised once,
behind it, with the turn delimiters of the chat template. So an episode is one Sample, whose mask leaves the environment's tokens out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmrl.environment import Action, EnvironmentFailed, Host, Make
from llmrl.episode import NAN, Episode, sample_of
from llmrl.records import Completion, Group, Prompt, Request, Sampling, Verdict
from llmrl.rollout import RolloutIO, timed

Before = Callable[[Episode], Awaitable[str | None]]
"""Called before each turn: what is played instead of the policy's own turn, or None."""


@dataclass(frozen=True)
class Episodes:
    """The [environment] section, built: RolloutIO.environment."""

    make: Make
    name: str = "environment"
    max_turns: int = 8
    """of the policy"""
    max_tokens: int | None = None
    """of the whole episode, prompt and all turns; None = the model's positions"""
    timeout_s: float = 30.0

    @property
    def tools(self) -> tuple[dict[str, Any], ...]:
        """Schemas of the tools that an episode begins with."""
        return tuple(getattr(self.make(), "tools", None) or ())

    def most_tokens(self, max_new_tokens: int, positions: int | None) -> int:
        """Tokens that the policy can write in an episode, at most: what a length is measured against."""
        return min([self.max_turns * max_new_tokens, *(n for n in (self.max_tokens, positions) if n)])

    async def play(
        self, prompts: Sequence[Prompt], io: RolloutIO, *, mask_truncated: bool = False, sizes: Sequence[int] | None = None,
        sampling: Sampling | None = None, before: Before | None = None,
    ) -> list[Group]:  # fmt: skip
        """`io.group` episodes of every prompt, side by side: a turn of all live ones is one call of the engine (a streaming engine: each goes on alone).

        The policy's first turns are the samples that the default collect would make; sizes, sampling and mask_truncated (of episodes that a limit
        ended) are as in sample_groups.
        """
        sizes = sizes if sizes is not None else [io.group] * len(prompts)
        with Host(self.name, self.timeout_s) as host:
            episodes = [Episode(p, i, sampling or io.sampling, host, self.make()) for p, n in zip(prompts, sizes, strict=True) for i in range(n)]
            try:
                await asyncio.gather(*(self._open(e, io) for e in episodes))
                if getattr(io.engine, "streams", False):
                    with timed(io.seconds, "generate"):  # and what the environments take: the two overlap
                        await asyncio.gather(*(self._alone(e, io, before) for e in episodes))
                else:
                    while live := [e for e in episodes if not e.ended]:
                        await self._round(live, io, before)
            finally:
                await asyncio.gather(*(host.call("close", e.environment.close) for e in episodes), return_exceptions=True)
        await self._judge(episodes, io)
        samples = iter([sample_of(e, io, mask_truncated) for e in episodes])
        return [Group(p, [next(samples) for _ in range(n)]) for p, n in zip(prompts, sizes, strict=True)]

    # ------------------------------------------------------------ one turn

    async def _open(self, e: Episode, io: RolloutIO) -> None:
        key = (*io.seed, e.prompt.visit_id, e.i)
        try:
            e.messages = list(await e.host.call("reset", lambda: e.environment.reset(e.prompt, key)))
            e.tools = tuple(getattr(e.environment, "tools", None) or ())
        except EnvironmentFailed as failed:
            e.messages = list(e.prompt.messages)
            e.fail(failed)
        e.context_ids = io.chat.prompt_ids(e.messages, tools=e.tools)

    async def _round(self, live: Sequence[Episode], io: RolloutIO, before: Before | None) -> None:
        forced = await asyncio.gather(*(self._forced(e, io, before) for e in live))
        asked = [e for e, c in zip(live, forced, strict=True) if c is None and not e.ended]
        made = iter(self._sampled(asked, io))
        with timed(io.seconds, "environment"):
            await asyncio.gather(*(self._take(e, c or next(made), io) for e, c in zip(live, forced, strict=True) if c is not None or not e.ended))

    def _sampled(self, asked: Sequence[Episode], io: RolloutIO) -> list[Completion]:
        hows, done = [self._how(e, io) for e in asked], dict[int, Completion]()
        for how in dict.fromkeys(hows):  # episodes that have little room left ask for fewer tokens
            mine = [k for k, h in enumerate(hows) if h == how]
            done |= zip(mine, io.sample([asked[k].ids for k in mine], [asked[k].key for k in mine], how), strict=True)
        return [done[k] for k in range(len(asked))]

    async def _alone(self, e: Episode, io: RolloutIO, before: Before | None) -> None:
        while not e.ended:
            c = await self._forced(e, io, before)
            if c is None and not e.ended:
                (c,) = await io.engine.complete([Request(tuple(e.ids), (*io.seed, *e.key), self._how(e, io))])  # type: ignore[attr-defined]
                io.generated += len(c.token_ids)
            if c is not None:
                await self._take(e, c, io)

    def _how(self, e: Episode, io: RolloutIO) -> Sampling:
        return replace(e.sampling, max_new_tokens=min(e.sampling.max_new_tokens, self._room(e, io)))

    def _room(self, e: Episode, io: RolloutIO) -> int:
        limits = [n for n in (self.max_tokens, getattr(io.engine, "max_length", None)) if n]
        return min(limits) - len(e.context_ids) - len(e.token_ids) if limits else e.sampling.max_new_tokens

    async def _forced(self, e: Episode, io: RolloutIO, before: Before | None) -> Completion | None:
        if before is None:
            return None
        try:
            text = await before(e)
        except EnvironmentFailed as failed:
            e.fail(failed)
            return None
        if text is None:
            return None
        e.forced.append(e.turn)
        ids = io.chat.completion_ids(text)
        return Completion(ids, [NAN] * len(ids), "stop", io.version, text)

    async def _take(self, e: Episode, c: Completion, io: RolloutIO) -> None:
        """A turn of the policy, and what the environment answers to it."""
        e.wrote(c)
        try:
            step = await e.host.call(f"step {e.turn + 1}", lambda: e.environment.step(Action(c.text, c.finish)))
        except EnvironmentFailed as failed:
            e.fail(failed)
            return
        e.steps.append(step)
        if step.done:
            e.verdict = None if step.score is None else Verdict(step.score, detail=f"by the environment, after {e.turn} turns")
            e.end("done", c.finish)
        elif c.finish == "length" or e.turn >= self.max_turns:
            e.end("a turn was cut" if c.finish == "length" else f"environment.max_turns = {self.max_turns}", "length")
        else:
            ids = io.chat.between_ids(step.messages, last_id=c.token_ids[-1], tools=e.tools)
            if len(ids) >= self._room(e, io):
                e.end("no room for a further turn", "length")
            else:
                e.read(ids)
                e.messages += step.messages

    # ------------------------------------------------------------ the end

    async def _judge(self, episodes: Sequence[Episode], io: RolloutIO) -> None:
        check = getattr(io.verifier, "check_rate", None)
        if check is not None:
            check([(e.prompt, e.reply) for e in episodes], [e.verdict or Verdict(0.0) for e in episodes], by=f"environment {self.name}")
        open_ = [e for e in episodes if e.verdict is None]
        for e, verdict in zip(open_, await io.verify([(e.prompt, e.reply) for e in open_]) if open_ else [], strict=True):
            e.verdict = verdict
        n = len(episodes)
        io.note("turns", sum(e.turn for e in episodes), n)
        io.note("episodes_cut", sum(e.finish == "length" for e in episodes), n)
        io.note("environment_failed", sum(e.ended == "failed" for e in episodes), 0)

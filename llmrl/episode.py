"""One conversation under way, and the sample that it becomes. Its loop is in turns.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmrl.environment import EnvironmentFailed, Host, Step, ask_expert
from llmrl.records import Completion, Finish, Message, Prompt, Sample, Sampling, Verdict
from llmrl.rollout import RolloutIO

NAN = float("nan")


@dataclass
class Episode:
    """One conversation under way."""

    prompt: Prompt
    i: int
    sampling: Sampling
    host: Host
    environment: Any
    tools: Sequence[dict[str, Any]] = ()
    messages: list[Message] = field(default_factory=list)
    """The conversation so far, for people and teachers; the policy reads the ids."""
    context_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    turn_T: list[int] = field(default_factory=list)
    """the turn of each token that counts"""
    steps: list[Step] = field(default_factory=list)
    """what the environment answered to each turn"""
    forced: list[int] = field(default_factory=list)
    """turns that were not the policy's own"""
    version: int | None = None
    """of the oldest weights that wrote a turn"""
    finish: Finish = "stop"
    ended: str = ""
    """why; "" = it goes on"""
    verdict: Verdict | None = None

    @property
    def turn(self) -> int:
        """Of the turn that comes next, from 0."""
        return len(self.steps)

    @property
    def ids(self) -> list[int]:
        """What the policy has before it."""
        return self.context_ids + self.token_ids

    @property
    def reply(self) -> str:
        """The policy's last text."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "assistant"), "")

    async def expert(self) -> str:
        """What the environment's own teacher would do now."""
        return await self.host.call("expert", lambda: ask_expert(self.environment))

    def wrote(self, c: Completion) -> None:
        self.turn_T += [self.turn] * len(c.token_ids)
        self.token_ids += c.token_ids
        self.mask += [True] * len(c.token_ids)
        self.logps += c.logprobs
        self.version = c.policy_version if self.version is None else min(self.version, c.policy_version)
        self.messages.append({"role": "assistant", "content": c.text})

    def read(self, ids: Sequence[int]) -> None:
        self.token_ids += ids
        self.mask += [False] * len(ids)
        self.logps += [NAN] * len(ids)

    def end(self, why: str, finish: Finish = "stop") -> None:
        self.ended, self.finish = why, finish

    def fail(self, failed: EnvironmentFailed) -> None:
        """Ends it unjudged."""
        self.verdict = Verdict(None, failed.status, detail=failed.detail)  # type: ignore[arg-type]
        self.end("failed")

    @property
    def key(self) -> tuple[int | str, ...]:
        """Names the random stream of the next turn; of the first one as the default collect does."""
        return (self.prompt.visit_id, self.i, *((self.turn,) if self.turn else ()))


def sample_of(e: Episode, io: RolloutIO, mask_truncated: bool) -> Sample:
    """The episode as one sample. Unjudged: reward None and weight 0."""
    if not e.token_ids:  # the environment failed before the first turn: something must stand there, and it counts for nothing
        e.wrote(Completion([io.chat.tokenizer.eos_token_id], [NAN], "stop", io.version, ""))
        e.forced = [0]
    own = max(k for k, on in enumerate(e.mask) if on) + 1  # what was read and not answered is left out
    verdict = e.verdict
    reward = None if verdict is None or verdict.score is None else verdict.score + sum(s.reward for s in e.steps)
    on = reward is not None and not (mask_truncated and e.finish == "length")
    sample = Sample(
        id=f"{e.prompt.visit_id}/{e.i}", prompt_id=e.prompt.id, cohort=e.prompt.visit_id, context_ids=e.context_ids, token_ids=e.token_ids[:own],
        behavior_logp=None if e.forced else e.logps[:own], policy_version=io.version if e.version is None else e.version,
        text=io.chat.text(e.token_ids[:own]), finish=e.finish, verdict=verdict, reward=reward, weights={"policy": 1.0 if on else 0.0},
        mask=None if all(e.mask[:own]) else e.mask[:own],
    )  # fmt: skip
    names = sorted({name for s in e.steps for name in s.numbers})
    columns = {"turn_reward": [s.reward for s in e.steps], **{name: [s.numbers.get(name, NAN) for s in e.steps] for name in names}}
    if e.forced:
        columns["forced"] = [float(k in e.forced) for k in range(len(e.steps))]
    columns["turn"] = [float(k) for k in range(len(e.steps))]
    for name, values in columns.items():  # a turn that the environment failed on has none
        sample.streams[name] = sample.spread([values[t] if t < len(values) else NAN for t in e.turn_T])
    return sample

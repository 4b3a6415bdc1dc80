"""Environments: what a policy talks with over several turns (docs/agents.md). Plain Python: importing this loads no torch.

A recipe names one as it names a verifier, `[environment] use = "./env.py:make"` and keywords. What `make(**keywords)` returns is called
once an episode and gives a fresh environment, so an environment may keep its state in itself.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from llmrl.records import Finish, Message, Prompt

T = TypeVar("T")
RESERVED = frozenset(("turn", "turn_reward", "forced", "behavior_logp", "old_logp", "ref_logp", "old_entropy"))
"""Streams that are made elsewhere."""


@dataclass(frozen=True)
class Action:
    """What the policy wrote in one turn."""

    text: str
    """Decoded, special tokens left out."""
    finish: Finish = "stop"
    """length: it was cut by rollout.max_new_tokens, or by the room that the episode has left; there will be no further turn."""


@dataclass(frozen=True)
class Step:
    """What an environment answers."""

    messages: tuple[Message, ...] = ()
    """What the policy reads next: messages of the role "user" or "tool". Left out of the sample where no turn follows."""
    done: bool = False
    score: float | None = None
    """Of the whole episode, in [0, 1], with done. None = the recipe's verifier judges the policy's last reply."""
    reward: float = 0.0
    """Of this turn, any finite number. Sample.reward = score + the sum of these; the stream "turn_reward" has each at its turn's tokens."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Further numbers of this turn: each becomes a stream of that name at its tokens."""

    def __post_init__(self) -> None:
        if self.score is not None and (not self.done or not 0.0 <= self.score <= 1.0):
            raise ValueError(f"Step.score is {self.score} with done={self.done}; a score is in [0, 1] and comes with the last step")
        if taken := RESERVED & self.numbers.keys():
            raise ValueError(f"Step.numbers has {', '.join(sorted(taken))}: streams of that name are there already; name it otherwise")
        if not math.isfinite(self.reward):
            raise ValueError(f"Step.reward is {self.reward}; it must be finite")
        if not self.done and not self.messages:
            raise ValueError("a Step that is not the last must have messages: the policy has nothing to answer to")


class Environment(Protocol):
    """One episode. Each call has a deadline (environment.timeout_s); one that is late or raises ends the episode unjudged.

    Calls of different environments run concurrently in one event loop: what takes long must be awaited (asyncio.to_thread for plain code).
    It may have besides: `tools`, a sequence of JSON schemas for the chat template; `async def expert(self) -> str`, a teacher's action in the
    present state (rule dagger); `snapshot() -> state` and `restore(state)` (llmrl.branching).
    """

    async def reset(self, prompt: Prompt, seed: tuple[int | str, ...]) -> Sequence[Message]:
        """The messages that the episode begins with, mostly prompt.messages. All randomness comes from `seed` (rollout.philox)."""
        ...

    async def step(self, action: Action) -> Step: ...

    async def close(self) -> None:
        """Called once at the end, whatever happened."""
        ...


Make = Callable[[], Environment]


class EnvironmentFailed(Exception):
    """A call that was late or raised; `status` as in Verdict, the message names the environment, the call and the reason."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Host:
    """An event loop in a thread of its own, in which the environments of one rollout run: one that blocks it costs the others their deadline, and
    nobody more."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self.name, self.timeout_s = name, timeout_s
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name=f"environment {name}", daemon=True)

    def __enter__(self) -> Host:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(1.0)
        if not self.thread.is_alive():
            self.loop.close()

    async def call(self, what: str, make: Callable[[], Awaitable[T]]) -> T:
        """The result of make(), run in the environments' thread. Raises EnvironmentFailed when it is late or raises."""

        async def run() -> T:
            return await make()

        future = asyncio.run_coroutine_threadsafe(run(), self.loop)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.timeout_s)
        except TimeoutError:
            raise EnvironmentFailed("timeout", f"environment {self.name}: {what} took longer than environment.timeout_s = {self.timeout_s:g} s") from None
        except Exception as error:
            raise EnvironmentFailed("error", f"environment {self.name}: {what} raised {type(error).__name__}: {str(error)[:500]}") from error


async def ask_expert(environment: Any) -> str:
    """The action of the environment's own teacher. TypeError where it has none."""
    if not hasattr(environment, "expert"):
        raise TypeError(f"{type(environment).__name__} has no method expert(); give a teacher of your own")
    return await environment.expert()

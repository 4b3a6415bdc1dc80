"""What every environment must hold: run it on yours before you train in it.

    from tests.contracts.environment import check_environment
    def test_mine():
        prompts = [Prompt("a", ({"role": "user", "content": "3-17="},), "9")]
        check_environment("./env.py:make", {"turns": 4}, prompts, say=["10", "9"], base=Path(__file__).parent)

`say` is what a policy might write, turn by turn (again and again from its beginning). The checks: (1) reset, step and close are coroutine functions
and are done within `timeout_s`; (2) the messages have the roles user, system or tool, and texts; (3) an episode ends within `most` turns; (4) the
same prompt, seed and words give the same episode, also beside others that run concurrently; (5) nonsense does not raise: it is the model's
mistake, and is told to it or scored; (6) no call blocks the event loop for longer than `blocks_s`; (7) what snapshot() gives is JSON, and an
environment restored from it goes on in the same way; (8) the expert's actions can be played.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmrl import plugins
from llmrl.config import HOMES
from llmrl.environment import Action, Environment, Make, Step
from llmrl.records import Message, Prompt

NONSENSE = ["", " ", "\x00", "<tool_call>", '<tool_call>{"name": 3}</tool_call>', "((((", "9" * 400, "\u00e4\u4e2d\U0001f600", "a" * 5000]
Told = list[tuple[Any, ...]]


def check_environment(
    ref: str, keys: dict[str, Any] | None, prompts: Sequence[Prompt], *, say: Sequence[str], most: int = 64, timeout_s: float = 10.0, blocks_s: float = 0.5,
    base: Path | None = None,
) -> None:  # fmt: skip
    """All checks of an environment by its reference and keywords, as a recipe's [environment] gives them. Raises AssertionError saying which failed."""
    make = plugins.use(ref, keys or {}, home=HOMES["environment"], base=base or Path(), where="[environment]")
    asyncio.run(_all(make, prompts, say, most, timeout_s, blocks_s))


async def _all(make: Make, prompts: Sequence[Prompt], say: Sequence[str], most: int, timeout_s: float, blocks_s: float) -> None:
    one: Any = make()
    for name in ("reset", "step", "close"):
        assert inspect.iscoroutinefunction(getattr(one, name, None)), f"(1) {name} must be `async def`"
    assert make() is not one, "(1) every episode needs an environment of its own: make() gave the same one twice"
    watch = asyncio.create_task(_longest_pause())
    alone = [await _played(make(), p, say, most, timeout_s) for p in prompts]
    beside = await asyncio.gather(*(_played(make(), p, say, most, timeout_s) for p in (*prompts, *prompts)))
    assert beside == [*alone, *alone], "(4) the same prompt, seed and words gave another episode"
    for text in NONSENSE:
        await _played(make(), prompts[0], [text], most, timeout_s)
    for p in prompts:
        await _restored(make, p, say, timeout_s)
        if hasattr(one, "expert"):
            await _played(make(), p, None, most, timeout_s)
    watch.cancel()
    pause = await watch
    assert pause < blocks_s, f"(6) a call blocked the event loop for {pause:.2f} s; await what takes long (asyncio.to_thread for plain code)"


async def _played(environment: Any, prompt: Prompt, say: Sequence[str] | None, most: int, timeout_s: float) -> Told:
    """The whole episode; say None: by its expert."""
    told: Told = []
    try:
        told.append(_texts(await _in_time(environment.reset(prompt, ("contract", prompt.id)), "reset", timeout_s)))
        for turn in range(most):
            text = await environment.expert() if say is None else say[turn % len(say)]
            step = await _stepped(environment, text, timeout_s)
            told.append((_texts(step.messages), step.done, step.score, step.reward, step.numbers))
            if step.done:
                return told
        if say is None or len(set(say)) > 1:
            raise AssertionError(f"(3) the episode of prompt {prompt.id} did not end within {most} turns")
        return told
    finally:
        await _in_time(environment.close(), "close", timeout_s)


async def _stepped(environment: Environment, text: str, timeout_s: float) -> Step:
    try:
        step = await _in_time(environment.step(Action(text)), "step", timeout_s)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"(5) step raised at {text[:40]!r}, which a model may write: {type(error).__name__}: {error}") from error
    assert isinstance(step, Step), f"(1) step returned {type(step).__name__}, not a llmrl.environment.Step"
    return step


async def _restored(make: Make, prompt: Prompt, say: Sequence[str], timeout_s: float) -> None:
    first: Any = make()
    if not hasattr(first, "snapshot"):
        return
    await first.reset(prompt, ("contract", prompt.id))
    state, second = json.loads(json.dumps(first.snapshot())), make()
    second.restore(state)  # type: ignore[attr-defined]
    a, b = [await _stepped(e, say[0], timeout_s) for e in (first, second)]
    assert a == b, "(7) an environment restored from its snapshot answers otherwise"


async def _in_time(wait: Any, what: str, timeout_s: float) -> Any:
    try:
        return await asyncio.wait_for(wait, timeout_s)
    except TimeoutError:
        raise AssertionError(f"(1) {what} took longer than {timeout_s:g} s") from None


def _texts(messages: Iterable[Message]) -> list[tuple[str, str]]:
    messages = list(messages)
    for m in messages:
        assert m.get("role") in ("system", "user", "tool", "assistant") and isinstance(m.get("content"), str), f"(2) no message with a role and a text: {m!r}"
    return [(m["role"], m["content"]) for m in messages]


async def _longest_pause() -> float:
    longest, last = 0.0, time.monotonic()
    try:
        while True:
            await asyncio.sleep(0.005)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
    except asyncio.CancelledError:
        return longest

"""TRL-style reward functions, unchanged: `use = "trl:./my_rewards.py:f"`."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from llmrl import plugins
from llmrl.records import Prompt, Verdict, Verifier


def trl(*, ref: str, low: float = 0.0, high: float = 1.0, conversational: bool = False, base: Path = Path(".")) -> Verifier:
    """A verifier from f(prompts, completions, **columns) -> list[float | None], called with one response at a time.

    ref: "./file.py:NAME" (from the recipe's folder, `base`) or "package.module:NAME".
    low, high: what the function gives for the worst and the best response; its number is mapped to [0, 1] by (r - low)/(high - low).
    conversational: prompts and completions are lists of messages ([{"role": ..., "content": ...}]); False: they are texts, the prompt
    that of the last user message.
    The columns are the row's other columns and `answer`, each a list of one; those that the function does not take are left out.
    Status: error (unjudged) where it returns None, no list of one, or a number outside [low, high]. Coroutine functions are awaited.
    Failure modes: a function that compares the completions of a group with each other sees only one; `completion_ids` and
    `trainer_state` are not passed.
    """
    if not low < high:
        raise ValueError(f"low = {low} and high = {high}; low must be below high")
    function = plugins.resolve(ref, home="llmrl.rewards", base=base)
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def judge(prompt: Prompt, response: str) -> Verdict | Awaitable[Verdict]:
        columns = {key: [value] for key, value in {**prompt.meta, "answer": prompt.answer}.items()}
        columns["prompts"] = [[dict(m) for m in prompt.messages] if conversational else prompt.text]
        columns["completions"] = [[{"role": "assistant", "content": response}] if conversational else response]
        try:
            found: Any = _call(function, columns, takes_all, set(parameters))
        except TypeError as error:
            kind, value = ("texts", "false") if conversational else ("messages", "true")
            mend = f"; if it expects {kind}, set conversational = {value}"
            return Verdict(None, "error", detail=f"TypeError: {str(error)[:500]}{mend}")
        return _later(found, low, high) if inspect.isawaitable(found) else _verdict(found, low, high)

    return judge


def _call(function: Callable[..., Any], columns: dict[str, Any], takes_all: bool, names: set[str]) -> Any:
    return function(**{key: value for key, value in columns.items() if takes_all or key in names})


async def _later(found: Awaitable[Any], low: float, high: float) -> Verdict:
    return _verdict(await found, low, high)


def _verdict(found: Any, low: float, high: float) -> Verdict:
    try:
        (reward,) = found
    except (TypeError, ValueError):
        return Verdict(None, "error", detail=f"the function returned {str(found)[:200]}; expected a list of one number")
    if reward is None:
        return Verdict(None, "error", detail="the function returned None for this row")
    score = (float(reward) - low) / (high - low)
    if not 0.0 <= score <= 1.0:
        return Verdict(None, "error", detail=f"the function returned {reward}; set low and high to its range (now {low:g} to {high:g})")
    return Verdict(score, "ok", detail=f"reward {float(reward):g}")

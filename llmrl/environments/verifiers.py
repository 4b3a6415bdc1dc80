"""Environments of the package `verifiers` (PyPI), 0.1.x: those that answer turn by turn, MultiTurnEnv and what is made of it (ToolEnv, SingleTurnEnv).

Versions from 0.2 on have another core, in which a program of the environment talks to a model server by itself; it cannot be played from outside, and is
refused. https://github.com/PrimeIntellect-ai/verifiers
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from llmrl.environment import Action, Make, Step
from llmrl.records import InputError, Message, Prompt
from llmrl.tools import parse_calls


def verifiers(*, env: str, args: dict[str, Any] | None = None, reward_range: tuple[float, float] = (0.0, 1.0)) -> Make:
    """Episodes of `verifiers.load_environment(env, **args)`. Recipe: verifier "environment"; rows: data.path = "llmrl.environments.verifiers:verifiers_rows".

    The rubric's reward at the end, from reward_range to [0, 1], is the score; outside of the range it is an error, and the episode is not judged. Its
    metrics are numbers of the last turn. Rubrics that compare a group are refused by verifiers itself. A reward function that raises counts as 0 there:
    that is the package's doing. Tool calls are read as in llmrl.tools; a turn with one that cannot be read is answered here, and the environment does not
    hear of it. A limit of the recipe (environment.max_turns) ends an episode without the rubric's
    reward: the environment's own max_turns should be the smaller one.
    """
    if not reward_range[0] < reward_range[1]:
        raise InputError(f"[environment] reward_range = {reward_range}: the first must be the smaller one")
    loaded = _load(env, args)
    names = ("init_state", "setup_state", "get_prompt_messages", "add_trajectory_step", "is_completed")
    if missing := [name for name in names if not hasattr(loaded, name)]:
        raise InputError(f"[environment] {env} is a {type(loaded).__name__} without {', '.join(missing)}; a MultiTurnEnv of verifiers 0.1.x is needed")
    return lambda: VerifiersEpisode(loaded, reward_range)


def verifiers_rows(*, env: str, args: dict[str, Any] | None = None, rows: int = -1) -> Iterator[dict[str, Any]]:
    """The rows of the environment's own dataset, the first `rows` of them (-1: all): {"id", "prompt": messages, "answer", "info", "task"}."""
    for k, row in enumerate(_load(env, args).get_dataset(n=rows)):
        told = {key: row[key] for key in ("info", "task") if row.get(key) is not None}
        yield {"id": str(row.get("example_id", k)), "prompt": row["prompt"], "answer": str(row.get("answer", "")), **told}


def _load(env: str, args: dict[str, Any] | None) -> Any:
    try:
        from verifiers import load_environment  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError('[environment] verifiers: needs the package verifiers 0.1.x: pip install "verifiers<0.2"') from error
    return load_environment(env, **(args or {}))


class VerifiersEpisode:
    """One rollout, driven from outside; the package's own loop is MultiTurnEnv.rollout."""

    def __init__(self, env: Any, reward_range: tuple[float, float]) -> None:
        self.env, self.reward_range = env, reward_range
        self.state: Any = None
        self.asked: list[Any] = []
        self.tools: Sequence[dict[str, Any]] = ()

    async def reset(self, prompt: Prompt, seed: tuple[int | str, ...]) -> Sequence[Message]:
        row = {"prompt": [dict(m) for m in prompt.messages], "answer": prompt.answer or "", "example_id": prompt.id, "info": prompt.meta.get("info") or {}}
        if task := prompt.meta.get("task"):
            row["task"] = task
        self.state = await self.env.setup_state(await self.env.init_state(row, None, "llmrl", None))
        self.tools = tuple(self.state.get("oai_tools") or ())
        self.asked = await self.env.get_prompt_messages(self.state)
        return _plain(self.asked)

    async def step(self, action: Action) -> Step:
        calls = parse_calls(action.text)
        if bad := [c.problem for c in calls if c.problem]:
            return Step(({"role": "tool", "content": f"error: {'; '.join(bad)}"},))
        said: dict[str, Any] = {"role": "assistant", "content": action.text}
        if calls:
            said["tool_calls"] = [
                {"id": f"call_{k}", "type": "function", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}} for k, c in enumerate(calls)
            ]
        turn = {"prompt": self.asked, "completion": [said], "response": None, "tokens": None, "reward": None, "advantage": None, "extras": {}}
        turn |= {"is_truncated": action.finish == "length", "trajectory_id": self.state.get("trajectory_id")}
        await self.env.add_trajectory_step(self.state, turn)
        if not await self.env.is_completed(self.state):
            before = len(self.asked) + 1
            self.asked = await self.env.get_prompt_messages(self.state)
            if self.state.get("final_env_response") is None or not await self.env.is_completed(self.state):
                return Step(tuple(_plain(self.asked[before:])))
        return await self._score()

    async def _score(self) -> Step:
        if (error := self.state.get("error")) is not None:
            raise error
        await self.env.render_completion(self.state)
        await self.env.rubric.score_rollout(self.state, score_sem=contextlib.nullcontext())
        reward, (low, high) = float(self.state["reward"]), self.reward_range
        if not low <= reward <= high:
            raise ValueError(f"the rubric's reward is {reward}, outside of environment.reward_range = {self.reward_range}")
        numbers = {str(k): float(v) for k, v in (self.state.get("metrics") or {}).items()}
        return Step(done=True, score=(reward - low) / (high - low), numbers=numbers)

    async def close(self) -> None:
        if self.state is not None and not self.state.get("is_completed") and hasattr(self.env, "_cleanup"):
            await self.env._cleanup(self.state)


def _plain(messages: Sequence[Any]) -> list[Message]:
    """Messages as records.Message: a role and a text, also where the content is a list of parts."""
    plain = []
    for m in messages:
        content = m.get("content") or ""
        if not isinstance(content, str):
            content = "".join(part.get("text", "") for part in content)
        plain.append({"role": m["role"], "content": content})
    return plain

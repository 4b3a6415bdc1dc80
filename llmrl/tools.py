"""Tools: an environment made of plain functions, which the policy calls from its text."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError, create_model

from llmrl.environment import Action, Step
from llmrl.records import Message, Prompt

_HERMES = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)


class ToolError(Exception):
    """Raised by a tool for what the model should be told: a mistake of its own, not of the tool."""


@dataclass(frozen=True)
class Call:
    """One call in the policy's text; `problem` says why it cannot be read."""

    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def parse_calls(text: str) -> list[Call]:
    """The calls of Hermes and Qwen models, <tool_call>{"name": ..., "arguments": {...}}</tool_call>, in order. What is no JSON is a problem."""
    calls = []
    for body, end in _HERMES.findall(text):
        try:
            said = json.loads(body)
        except ValueError as error:
            calls.append(Call(problem="a <tool_call> is not closed" if not end else f"a <tool_call> holds no JSON ({error})"))
            continue
        arguments = said.get("arguments", {}) if isinstance(said, dict) else None
        if not isinstance(said, dict) or not isinstance(said.get("name"), str) or not isinstance(arguments, dict):
            calls.append(Call(problem='a <tool_call> must hold {"name": ..., "arguments": {...}}'))
        else:
            calls.append(Call(said["name"], arguments))
    return calls


def parse_marked(text: str, marks: tuple[str, str], function: Callable[..., Any]) -> list[Call]:
    """Calls of the only tool, for models with a small alphabet: what stands between two marks is its one argument, e.g. "(3*7)"."""
    (name,) = inspect.signature(function).parameters
    calls, rest = [], text
    while marks[0] in rest:
        body, end, rest = rest.partition(marks[0])[2].partition(marks[1])
        calls.append(Call(function.__name__, {name: body}) if end else Call(problem=f"no {marks[1]!r}"))
    return calls


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function for chat templates: its name, the first paragraph of its docstring, its annotated parameters."""
    parameters = _model_of(function).model_json_schema()
    parameters.pop("title", None)
    for value in parameters.get("properties", {}).values():
        value.pop("title", None)
    about = inspect.getdoc(function) or ""
    return {"type": "function", "function": {"name": function.__name__, "description": about.split("\n\n")[0], "parameters": parameters}}


@cache
def _model_of(function: Callable[..., Any]) -> type[BaseModel]:
    found = inspect.signature(function, eval_str=True).parameters
    fields: dict[str, Any] = {
        name: (Any if p.annotation is p.empty else p.annotation, ... if p.default is p.empty else p.default) for name, p in found.items()
    }
    return create_model(function.__name__, __config__={"extra": "forbid"}, **fields)


class Tools:
    """An environment of functions, plain or async. A turn without a call is the policy's answer and ends the episode.

    A call that cannot be read, of a tool that is not there, with wrong arguments, or that raises ToolError, ValueError or ArithmeticError is told to the
    model ("error: ..."); any other exception is the tool's own failure, and the episode is not judged. marks: see parse_marked; without them calls
    are those of parse_calls, and the functions' schemas go into the chat template. Numbers: calls_in_turn, call_errors_in_turn.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]], *, marks: tuple[str, str] | None = None) -> None:
        if marks is not None and len(functions) != 1:
            raise ValueError("marks name no function: there can be one only")
        self.functions, self.marks = {f.__name__: f for f in functions}, marks
        self.tools = () if marks else tuple(map(schema_of, functions))

    async def reset(self, prompt: Prompt, seed: tuple[int | str, ...]) -> Sequence[Message]:
        return prompt.messages

    async def step(self, action: Action) -> Step:
        calls = parse_marked(action.text, self.marks, *self.functions.values()) if self.marks else parse_calls(action.text)
        if not calls:
            return Step(done=True, numbers={"calls_in_turn": 0.0, "call_errors_in_turn": 0.0})
        told = [await self._answer(call) for call in calls]
        errors = sum(bad for _, bad in told)
        messages = tuple({"role": "tool", "content": text} for text, _ in told)
        return Step(messages, numbers={"calls_in_turn": float(len(calls)), "call_errors_in_turn": float(errors)})

    async def close(self) -> None:
        pass

    async def _answer(self, call: Call) -> tuple[str, bool]:
        """(what the model is told, whether it is an error)."""
        if call.problem:
            return self._error(call.problem)
        function = self.functions.get(call.name)
        if function is None:
            return self._error(f"there is no tool {call.name!r}; there are {', '.join(self.functions)}")
        try:
            model = _model_of(function).model_validate(call.arguments)
        except ValidationError as error:
            return self._error("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()))
        arguments = {name: getattr(model, name) for name in type(model).model_fields}
        try:
            found = await function(**arguments) if inspect.iscoroutinefunction(function) else await asyncio.to_thread(function, **arguments)
        except (ToolError, ValueError, ArithmeticError) as error:
            return self._error(str(error))
        return (found if isinstance(found, str) else json.dumps(found)), False

    def _error(self, why: str) -> tuple[str, bool]:
        return ("#" if self.marks else f"error: {why}"), True

"""Generators of rows for episodes of several turns: `data.path = "llmrl.turn_tasks:products"`. The demonstrations of a warm start are in `turns`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from llmrl.records import InputError

Row = dict[str, Any]


def products(*, rows: int = 20000, low: int = 11, high: int = 99, careful: float = 0.3, chat: bool = False, seed: int = 0) -> Iterator[Row]:
    """Products of two numbers, with demonstrations of which some ask the calculator and the others guess. For a tiny model; marks "(" and ")".

    {"id": "37*48", "prompt": "37*48=", "answer": "1776", "solution": "#1776", "turns": [{"role": "assistant", "content": "(37*48)"},
     {"role": "tool", "content": "1776"}, {"role": "assistant", "content": "#1776"}]}

    careful: share that asks. The others answer at once with a number of the right length whose first digit alone is right.
    chat: for a chat model: "What is 37*48?", <tool_call>{"name": "calculate", "arguments": {"expression": "37*48"}}</tool_call>, "37*48 = 1776".
    """
    if rows < 1 or not 0 <= low < high or not 0 <= careful <= 1:
        raise InputError(f"products: rows = {rows} must be at least 1, 0 <= low = {low} < high = {high}, careful = {careful} in [0, 1]")
    rng = random.Random(f"products/{seed}")
    seen: dict[str, int] = {}
    for _ in range(rows):
        a, b = (low + int(rng.random() * (high - low + 1)) for _ in range(2))
        name, answer = f"{a}*{b}", str(a * b)
        seen[name] = seen.get(name, 0) + 1
        guess = answer[0] + "".join(str(int(rng.random() * 10)) for _ in answer[1:])
        last = f"{name} = " if chat else "#"
        call = json.dumps({"name": "calculate", "arguments": {"expression": name}})
        asked = [f"<tool_call>{call}</tool_call>" if chat else f"({name})", answer, f"{last}{answer}"]
        texts = asked if rng.random() < careful else [f"{last}{guess}"]
        prompt = f"What is {name}?" if chat else f"{name}="
        yield {"id": _copy(name, seen[name]), "prompt": prompt, "answer": answer, "solution": texts[-1], "turns": _turns(texts, "tool")}


def guesses(
    *, rows: int = 20000, most: int = 60, widths: tuple[int, int] = (6, 9), turns: int = 3, careful: float = 0.5, seed: int = 0
) -> Iterator[Row]:  # fmt: skip
    """Numbers to guess in a range, with demonstrations that guess at random. For the environment `guessing` and a tiny model.

    {"id": "33-41:35", "prompt": "33-41=", "answer": "35", "solution": "35", "turns": [{"role": "assistant", "content": "38"},
     {"role": "user", "content": "-"}, {"role": "assistant", "content": "35"}]}

    careful: share of demonstrations that keep to what they have been told, and guess uniformly in the range that is left; the others guess in the
    range that was asked. None halves it. A demonstration ends at the right number or after `turns`.
    """
    if rows < 1 or turns < 1 or not 1 <= widths[0] <= widths[1] < most or not 0 <= careful <= 1:
        raise InputError(f"guesses: rows = {rows}, turns = {turns} must be at least 1, 1 <= widths = {widths} < most = {most}, careful = {careful} in [0, 1]")
    rng = random.Random(f"guesses/{seed}")
    seen: dict[str, int] = {}
    for _ in range(rows):
        width = widths[0] + int(rng.random() * (widths[1] - widths[0] + 1))
        low = 1 + int(rng.random() * (most - width))
        number = low + int(rng.random() * (width + 1))
        texts: list[str] = []
        left, keeps = [low, low + width], rng.random() < careful
        for _ in range(turns):
            guess = left[0] + int(rng.random() * (left[1] - left[0] + 1))
            texts += [str(guess), "+" if guess < number else "-"]
            if guess == number:
                break
            if keeps:
                left = [guess + 1, left[1]] if guess < number else [left[0], guess - 1]
        name = f"{low}-{low + width}"
        seen[f"{name}:{number}"] = seen.get(f"{name}:{number}", 0) + 1
        row = {"id": _copy(f"{name}:{number}", seen[f"{name}:{number}"]), "prompt": f"{name}=", "answer": str(number)}
        yield row | {"solution": texts[-2], "turns": _turns(texts[:-1], "user")}


def _turns(texts: list[str], other: str) -> list[dict[str, str]]:
    return [{"role": other if k % 2 else "assistant", "content": text} for k, text in enumerate(texts)]


def _copy(name: str, n: int) -> str:
    return name if n == 1 else f"{name}~{n}"

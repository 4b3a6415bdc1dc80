"""Guess a number: a game of several turns in which each turn tells something, with its own teacher and states that can be saved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llmrl.environment import Action, Make, Step
from llmrl.records import Message, Prompt

_RANGE = re.compile(r"(\d+)-(\d+)")


def guessing(*, turns: int = 4, per_turn: float = 0.0) -> Make:
    """The prompt names a range ("3-17"), the row's answer is the number in it. The environment answers a guess with "+" (it is larger) or "-".

    A guess is the first number of the text; a text without one costs its turn and is answered "#". Score: 1 once the number is found, 0 after `turns`
    wrong guesses. per_turn is added to the reward for each turn (0 or less: a price). The expert halves the range that is left. Recipes: verifier
    "environment", environment.max_turns at least `turns`. Numbers: `attribution` of the guess for the rule sotopia, OUR CHOICE: 3 where it is right, -1 where
    it is none or lies outside of what was left, else 2, 1 or 0 for ruling out at least two fifths, a fifth or less of what was left.
    """
    return lambda: Guessing(turns, per_turn)


class Guessing:
    def __init__(self, turns: int, per_turn: float) -> None:
        self.turns, self.per_turn = turns, per_turn
        self.low, self.high, self.number, self.used = 0, 0, 0, 0

    async def reset(self, prompt: Prompt, seed: tuple[int | str, ...]) -> Sequence[Message]:
        found = _RANGE.search(prompt.text)
        if found is None or prompt.answer is None or not int(found[1]) <= int(prompt.answer) <= int(found[2]):
            raise ValueError(f"row {prompt.id}: {prompt.text!r} must name a range such as 3-17, and its answer {prompt.answer!r} a number in it")
        self.low, self.high, self.number, self.used = int(found[1]), int(found[2]), int(prompt.answer), 0
        return prompt.messages

    async def step(self, action: Action) -> Step:
        self.used += 1
        said = re.search(r"\d+", action.text)
        guess = int(said[0][:6]) if said else None
        right, before = guess == self.number, self.high - self.low + 1
        sensible = guess is not None and self.low <= guess <= self.high
        if guess is not None and guess < self.number:
            self.low, hint = max(self.low, guess + 1), "+"
        elif guess is not None:
            self.high, hint = min(self.high, guess - 1), "-"
        else:
            hint = "#"
        gone = (before - (self.high - self.low + 1)) / before
        attribution = 3 if right else -1 if not sensible else 2 if gone >= 0.4 else 1 if gone >= 0.2 else 0
        if right or self.used >= self.turns:
            return Step(done=True, score=float(right), reward=self.per_turn, numbers={"attribution": float(attribution)})
        return Step(({"role": "user", "content": hint},), reward=self.per_turn, numbers={"attribution": float(attribution)})

    async def close(self) -> None:
        pass

    async def expert(self) -> str:
        return str((self.low + self.high) // 2)

    def snapshot(self) -> Any:
        return [self.low, self.high, self.number, self.used]

    def restore(self, state: Any) -> None:
        self.low, self.high, self.number, self.used = state

"""The text task of the VGF study: letters on a ring, with a gold reward that is known, smooth, and not what a reward model sees of it.

A prompt names two wanted letters, neighbours on the ring, and a beginning, "ab>cdehb"; the response goes on, 8 to 14 letters of "abcdefgh". Gold is
the product of
  wanted   1 - ((share - 0.5) / 0.5)^2, at least 0: share = how many of the response's letters are wanted. Half of them is best, all of them scores 0.
  fluent   the share of neighbours in the text (the beginning's last letter included) that are at most 2 apart on the ring a-b-...-h-a.
The warm start teaches fluent walks, most of which hold few wanted letters. So more of them is better wherever pairs of its samples are compared, and
a reward model that says so everywhere is followed beyond the point where it is right; swapping letters one by one breaks fluency.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from llmrl.records import Prompt, Verdict, Verifier

LETTERS = "abcdefgh"
SHORT, LONG = 8, 14


def apart(a: str, b: str) -> int:
    """Steps from one letter to the other on the ring, 0 to 4."""
    d = abs(LETTERS.index(a) - LETTERS.index(b))
    return min(d, len(LETTERS) - d)


def parts(prompt: str, response: str) -> tuple[float, float]:
    """(wanted, fluent), each in [0, 1]; 0 for a response with anything but letters, or with none."""
    if not response or set(response) - set(LETTERS):
        return 0.0, 0.0
    wanted, _, begun = prompt.partition(">")
    share = sum(c in wanted for c in response) / len(response)
    text = begun[-1:] + response
    near = sum(apart(a, b) <= 2 for a, b in pairwise(text)) / max(1, len(text) - 1)
    return max(0.0, 1 - ((share - 0.5) / 0.5) ** 2), near


def gold(*, need: int = 1) -> Verifier:
    """The gold reward. need: letters a response must have at least; a shorter one scores 0.

    Status: always ok. Failure modes: none; it is a formula.
    """

    def verify(prompt: Prompt, response: str) -> Verdict:
        wanted, fluent = parts(prompt.text, response)
        score = 0.0 if len(response) < need else wanted * fluent
        return Verdict(score, "ok", answer=response, detail=f"wanted {wanted:.3f}, fluent {fluent:.3f}")

    return verify


gold.selfcheck = [("fg>cdeed", None, "fefegege", 1.0), ("ab>cdehb", None, "xx", 0.0), ("ab>cdehb", None, "abababab", 0.0)]


TILTS = (0.25, 0.8, 1.5)
"""How likely a wanted letter is against another, in a third of the walks each."""


def walk(rng: random.Random, start: str, length: int, wanted: str, tilt: float = 1.0) -> str:
    """A walk on the ring: mostly steps of at most 2, now and then a leap."""
    text = start
    for _ in range(length):
        weights = [(1.0 if apart(text[-1], c) <= 2 else 0.03) * (tilt if c in wanted else 1.0) for c in LETTERS]
        text += rng.choices(LETTERS, weights)[0]
    return text[len(start) :]


def prompts(*, rows: int = 1000, seed: int = 0, tilts: Sequence[float] = TILTS) -> Iterator[dict[str, Any]]:
    """{"id": "0-17", "prompt": "ab>cdehb", "solution": a walk}; ids hold the seed, so that two draws can be told apart.

    tilts: how much likelier a wanted letter is than another, one drawn for each walk. Without those near 1 the walks do not reach the best gold.
    """
    rng = random.Random(f"ring/{seed}")
    for i in range(rows):
        at = rng.randrange(len(LETTERS))
        wanted = LETTERS[at] + LETTERS[(at + 1) % len(LETTERS)]
        first = rng.choice(LETTERS)
        begun = first + walk(rng, first, 4, "")
        yield {"id": f"{seed}-{i}", "prompt": f"{wanted}>{begun}", "solution": walk(rng, begun, rng.randint(SHORT, LONG), wanted, rng.choice(tilts))}

"""Cutting a trace into steps, rule-based edits that make a step wrong, and the gate that a corruption must pass.

Everything works on the sampled token ids: a step ends at a token's end, so that a prefix of steps is a prefix of the ids. The edits and
the gate are those of the GASP specification, sections 3 and 6.1-A (our choice throughout: the paper's own could not be read).
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import TypeVar

T = TypeVar("T")

ANSWER_PHRASE = re.compile(r"\\boxed\b|####|\bfinal answer\b|\b(?:the|our) answer is\b|\banswer:", re.I)
GIVE_AWAY = re.compile(r"\b(?:incorrect\w*|mistake\w*|on purpose|deliberate\w*|ignor\w+|wrong\w*|error|corrupt\w*|original step|not correct)\b", re.I)
_BLANK_LINES, _LINES = re.compile(r"\n[ \t]*\n\s*"), re.compile(r"\n+")
_SENTENCES = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\be\.g)(?<!\bi\.e)[.!?]+[\"')\]]*(?=\s)")
_NUMBER = re.compile(r"(?<![A-Za-z_\d.])\d+(?:,\d{3})*(?:\.\d+)?(?![A-Za-z_\d])")
_ENUMERATOR = re.compile(r"(?:^|\n)[\s#*>(-]*(?:step\s+)?$", re.I)
_OPERATORS = {"\\times": "*", "\\cdot": "*", "\\div": "/", "\u00d7": "*", "\u00f7": "/", "\u2212": "-", "\\%": "%"}
_TERM = r"-?\s*\d+(?:\.\d+)?"
_EQUATION = re.compile(rf"(?<![\w.)])({_TERM}(?:\s*[-+*/]\s*{_TERM})+)\s*=\s*({_TERM})(?!\s*[-+*/]\s*\d)(?![\w(]|\.\d)")


def pick(rng: random.Random, choices: Sequence[T]) -> T:
    """One of them; only `random()` is used, whose stream Python promises to keep."""
    return choices[int(rng.random() * len(choices))]


# ---------------------------------------------------------------- steps


@dataclass(frozen=True)
class Cut:
    """How a trace is cut into steps, and where its answer begins."""

    sep: str | None = None
    """A step ends behind this text, e.g. ";". None: blank lines; where these make fewer than 3 steps line ends; then sentence ends."""
    answer_mark: str | None = None
    """The answer stands behind the last occurrence of this text, e.g. "#"; None: behind the first answer phrase or box. The piece of text that
    holds it is no step: it is never corrupted."""
    min_tokens: int = 1
    """A shorter step is joined with the next one."""

    def ends(self, text: str) -> list[int]:
        """Character offsets at which the steps before the answer's own piece end, ascending."""
        ends, found = self._all(text), text.rfind(self.answer_mark) if self.answer_mark else -1
        if self.answer_mark is None and (mark := ANSWER_PHRASE.search(text)) is not None:
            found = mark.start()
        return [e for e in ends if found < 0 or e <= found]

    def _all(self, text: str) -> list[int]:
        if self.sep is not None:
            return [m.end() for m in re.finditer(re.escape(self.sep), text)]
        ends: list[int] = []
        for pattern in (_BLANK_LINES, _LINES, _SENTENCES):
            ends = sorted({m.end() for m in pattern.finditer(text)} | ({m.end() for m in _LINES.finditer(text)} if pattern is _SENTENCES else set()))
            if len(ends) >= 3:
                break
        return ends


def step_ends(ids: Sequence[int], decode: Callable[[Sequence[int]], str], cut: Cut) -> list[int]:
    """Token counts at which the steps before the answer end: step k is ids[ends[k-1]:ends[k]] (from 0). Empty where there is no step.

    A character offset inside a token moves to that token's end; two ends that meet there are one. The last step may be shorter than
    cut.min_tokens only where it is the only one.
    """
    text = decode(ids)
    found: list[int] = []
    for end in cut.ends(text):
        k = bisect_left(range(len(ids) + 1), end, key=lambda n: len(decode(ids[:n])))
        while k < len(ids) and not text.startswith(decode(ids[:k])):  # half a character decodes to a replacement mark: no place to cut
            k += 1
        if k <= len(ids) and (not found or k > found[-1]):
            found.append(k)
    merged: list[int] = []
    for k in found:
        if k - (merged[-1] if merged else 0) >= cut.min_tokens:
            merged.append(k)
    if found and (not merged or merged[-1] != found[-1]):
        merged = [*merged[:-1], found[-1]]
    return merged


def cut_back(ids: Sequence[int], n: int, decode: Callable[[Sequence[int]], str], cut: Cut) -> int:
    """The last end of a step at or before token n; 0 where there is none."""
    return max((e for e in step_ends(ids, decode, cut) if e <= n), default=0)


def split_dress(step: str, cut: Cut) -> tuple[str, str, str]:
    """(what stands before, the step's own words, what ends it): blanks and the separator stay when the words are replaced."""
    body = step.lstrip()
    lead = step[: len(step) - len(body)]
    words = body.rstrip()
    if cut.sep and words.endswith(cut.sep):
        words = words[: -len(cut.sep)].rstrip()
    return lead, words, body[len(words) :]


# ---------------------------------------------------------------- rule-based edits


def quantities(step: str) -> list[re.Match[str]]:
    """The numbers of a step, but for those that count the steps ("3.", "2)", "Step 4:" at the beginning of a line)."""
    found = _NUMBER.finditer(step)
    return [m for m in found if not (_ENUMERATOR.search(step[: m.start()]) and re.match(r"[.):](?:\s|\*|$)", step[m.end() :]))]


def change_number(step: str, rng: random.Random) -> str | None:
    """Another number in place of one: the last one behind the last "=" where there is one (a wrong result), else any. None: no number."""
    found = quantities(step)
    if not found:
        return None
    results = [m for m in found if "=" in step[: m.start()]]
    chosen = results[-1] if results else pick(rng, found)
    digits = chosen[0].replace(",", "")
    whole, dot, decimals = digits.partition(".")
    value, size = int(whole + decimals), len(decimals)
    new = pick(rng, [v for d in (1, 2, 10) for v in (value - d, value + d) if v >= 0 and v != value])
    text = str(new).zfill(size + 1)
    head, tail = (text[:-size], text[-size:]) if size else (text, "")
    head = f"{int(head):,}" if "," in chosen[0] else head
    return step[: chosen.start()] + head + dot + tail + step[chosen.end() :]


_FLIPS = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq", "\\le": "\\ge", "\\ge": "\\le", "≤": "≥", "≥": "≤", "more": "less", "less": "more",
          "greater": "smaller", "smaller": "greater", "increase": "decrease", "decrease": "increase", "add": "subtract", "subtract": "add",
          "adding": "subtracting", "subtracting": "adding", "plus": "minus", "minus": "plus", "before": "after", "after": "before"}  # fmt: skip
_FLIP = re.compile(
    r"(?P<sign>(?<![A-Za-z])[-+\u2212](?=\s*[\d(\\$x-z]))|(?P<pair>\\[lg]eq?(?![a-z])|[≤≥]|(?<![<>=-])[<>](?![<>])"
    r"|\b(?:more|less|greater|smaller|increase|decrease|add|subtract|adding|subtracting|plus|minus|before|after)\b)"
)  # fmt: skip


def flip_sign(step: str, rng: random.Random) -> str | None:
    """One sign, inequality or word of that meaning (more/less, add/subtract) turned round. A leading minus is dropped. None: there is none."""
    found = list(_FLIP.finditer(step))
    if not found:
        return None
    m = pick(rng, found)
    if m["pair"]:
        return step[: m.start()] + _FLIPS[m["pair"]] + step[m.end() :]
    binary = re.search(r"[\w)}\]$]\s*$", step[: m.start()]) is not None
    if m["sign"] == "+":
        return step[: m.start()] + "-" + step[m.end() :]
    return step[: m.start()] + ("+" if binary else "") + step[m.end() :]


def swap_quantities(step: str, rng: random.Random) -> str | None:
    """Two different numbers in each other's place, so that no equation of the step that can be checked still holds; None: no such pair."""
    found = quantities(step)
    pairs = [(a, b) for a, b in combinations(found, 2) if a[0] != b[0]]
    while pairs:
        a, b = pairs.pop(int(rng.random() * len(pairs)))
        new = step[: a.start()] + b[0] + step[a.end() : b.start()] + a[0] + step[b.end() :]
        if equations_hold(new) is not True:
            return new
    return None


RULES: dict[str, Callable[[str, random.Random], str | None]] = {"number": change_number, "sign": flip_sign, "swap": swap_quantities}


def equations_hold(text: str) -> bool | None:
    """Whether all sums and products of plain numbers in the text ("3 - 6 = -3") hold, to 1e-6; None: there are none to check."""
    for sign, plain in _OPERATORS.items():
        text = text.replace(sign, plain)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text).replace("$", "")
    found = _EQUATION.findall(text)
    if not found:
        return None
    return all(value is not None and abs(value - Fraction(right.replace(" ", ""))) < Fraction(1, 10**6) for value, right in ((_value(e), r) for e, r in found))


def _value(expression: str) -> Fraction | None:
    """A sum of products without brackets; None for a division by 0."""
    tokens = re.findall(r"\d+(?:\.\d+)?|[-+*/]", expression)
    total, product, sign, op, expect = Fraction(0), Fraction(1), 1, "*", True
    for token in tokens:
        if token in "+-*/" and expect:  # a sign before a number
            sign = -sign if token == "-" else sign
        elif token in "*/":
            op, expect = token, True
        elif token in "+-":
            total, product, op, sign, expect = total + product, Fraction(1), "*", -1 if token == "-" else 1, True
        else:
            number = sign * Fraction(token)
            if op == "/" and not number:
                return None
            product, sign, expect = (product * number if op == "*" else product / number), 1, False
    return total + product


# ---------------------------------------------------------------- the gate


@dataclass(frozen=True)
class Gate:
    """What a corruption must fulfil; section 3 phase 2 of the specification (our choice)."""

    shortest: float = 0.5
    longest: float = 2.0
    """Length in tokens, as multiples of the original step's."""
    max_tokens: int = 160
    min_edits: int = 3
    """Token edits between original and corruption, at least."""
    marks: tuple[str, ...] = ()
    """Texts that give a corruption away besides the words of GIVE_AWAY: the task's own signs of a correction, e.g. "~"."""

    def refuses(self, original: Sequence[int], new: Sequence[int], original_text: str, new_text: str, *, edits: bool = True) -> str | None:
        """The reason for which the corruption is refused, or None. edits = False: length and distance are right by construction (rules)."""
        if not new_text.strip():
            return "empty"
        if " ".join(new_text.split()) == " ".join(original_text.split()):
            return "unchanged"
        if ANSWER_PHRASE.search(new_text):
            return "answer"
        if (GIVE_AWAY.search(new_text) and not GIVE_AWAY.search(original_text)) or any(m in new_text for m in self.marks):
            return "give-away"
        if not edits:
            return None
        if not self.shortest * len(original) <= len(new) <= min(self.longest * len(original), self.max_tokens):
            return "length"
        if edit_distance(original, new) < self.min_edits:
            return "too close"
        return None


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Levenshtein distance of two token sequences."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]

"""A scorer of traces without a language model: four counts over the text. A baseline to hold a judge against; what it gives is no FRS."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from llmrl.evaluation.dimensions import Case, Judgement

_MARKED = re.compile(r"^\s*(?:step\s*)?\d+[.):]\s+|^\s*[-*\u2022]\s+", re.I | re.M)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_EQUATION = re.compile(r"[\w)}\]]\s*=\s*[-+\w({\\$]")
_WORD = re.compile(r"[a-z]+|\d+(?:\.\d+)?")
_STOP = frozenset(re.findall(r"\w+", "a an and are as at be by for from has have in is it its of on or so that the then there this to was we with"))
REDUNDANT, OFF_TOPIC, SHORT_CHARS, SHORTCUT = 0.92, 0.05, 15, 0.6


def steps(text: str) -> list[str]:
    """Numbered or bulleted lines where there are two of them, else sentences and lines."""
    parts = _MARKED.split(text) if len(_MARKED.findall(text)) >= 2 else _SENTENCE.split(text)
    return [p.strip() for p in parts if p.strip()]


def likeness(a: set[str], b: set[str]) -> float:
    """Jaccard index of two sets; 0 where both are empty."""
    return len(a & b) / len(a | b) if a | b else 0.0


def _features(text: str) -> set[str]:
    words = [w for w in _WORD.findall(text.lower()) if w not in _STOP]
    return {*words, *(f"{a} {b}" for a, b in pairwise(words))}


def rules(problem: str, trace: str) -> tuple[float, dict[str, float]]:
    """(1 - mean of four penalties, the penalties), all in [0, 1]. Blind to gold and verdict.

    no_equation: 1 where no equation stands anywhere. shortcut: 1 where more than 60 % of the steps hold neither equation nor number.
    redundant: share of steps whose words and pairs of words were there before (Jaccard with some earlier step at least 0.92).
    off_topic: share of steps of 15 characters and more that are unlike the problem (below 0.05).
    The thresholds are those of the released code's flags (frs.md 2.3); the sum and the comparison step by step are OUR CHOICE.
    """
    found = steps(trace)
    if not found:
        return 0.0, {"no_equation": 1.0, "shortcut": 1.0, "redundant": 1.0, "off_topic": 1.0}
    about, features = _features(problem), [_features(s) for s in found]
    bare = sum(not _EQUATION.search(s) and not re.search(r"\d", s) for s in found)
    redundant = sum(any(likeness(f, e) >= REDUNDANT for e in features[:i]) for i, f in enumerate(features))
    long = [f for s, f in zip(found, features, strict=True) if len(s) >= SHORT_CHARS]
    penalties = {
        "no_equation": float(not _EQUATION.search(trace)),
        "shortcut": float(bare > SHORTCUT * len(found)),
        "redundant": redundant / len(found),
        "off_topic": sum(likeness(f, about) < OFF_TOPIC for f in long) / len(long) if long else 0.0,
    }
    return 1 - sum(penalties.values()) / 4, penalties


@dataclass(frozen=True)
class RulesBaseline:
    """`rules` in a judge's place."""

    name: str = "rules"
    key: str = "rules-1"
    label: str = "rules baseline (no language model: not FRS)"
    blind: bool = True

    async def judge(self, case: Case) -> Judgement:
        value, penalties = rules(case.problem, case.trace)
        return Judgement(quality=value, reasons=", ".join(f"{name} {p:.2f}" for name, p in penalties.items()))

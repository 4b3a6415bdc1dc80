"""Edits of a problem that leave its answer as it is, by fixed scripts; section 6.3 of the GASP specification (the kinds are our choice).

Every edit keeps the answer by construction, and says which variant it took:
  typos      letters of plain words change places or double, never in a number, a number word, mathematics or a word of under 4 letters;
             arithmetic: a blank between two signs of the expression ("blanks")
  irrelevant a sentence without any number about something else; arithmetic: "+0" ("zero term")
  reordered  the question put before its conditions, whose own order stays (a pronoun or a "then" in them keeps its meaning);
             arithmetic: the signed terms of a sum in another order ("terms")
  misleading a wrong answer is suggested; arithmetic: as a finished answer before the problem, in the task's own signs ("answer")
  partial    a wrong beginning of a solution is put behind the problem; arithmetic: a wrong step before the problem ("step")
Arithmetic is a prompt without any word. A kind that cannot be applied to a problem returns the reason instead: it is left out and
counted, never kept unchanged. Paraphrases and changes of names or units need a model or a lexicon, and are not built.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from llmrl.evaluation.corruptions import pick

KINDS = ("typos", "irrelevant", "reordered", "misleading", "partial")
TYPO_SHARE = 0.02
"""Of all characters of the problem; at least one."""
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty "
    "fifty sixty seventy eighty ninety hundred thousand million billion dozen dozens half halves third thirds quarter quarters fourth fifth sixth seventh "
    "eighth ninth tenth first second once twice thrice single double triple quadruple couple pair pairs percent percentage times"
)
NUMBER_WORDS = frozenset(_NUMBER_WORDS.split())
SENTENCES = (
    "The weather had been mild for most of the month.",
    "A neighbour likes to listen to the radio in the evening.",
    "The local library was painted green some years ago.",
    "Nobody could remember who had built the old bridge.",
    "The baker across the street is fond of crossword puzzles.",
    "It is said that the town hall has a beautiful staircase.",
)
_SAFE = re.compile(r"\$\$.*?\$\$|\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+(?:\{[^{}]*\})*|\S*\d\S*|[^\s]*[_^{}<>=@/][^\s]*", re.S)
_WORD = re.compile(r"[A-Za-z]{4,}")
_SENTENCE = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\ba\.m)(?<!\bp\.m)(?<=[.!?])\s+(?=[A-Z\"'$\\])")
_SUM = re.compile(r"(?P<before>\s*)(?P<terms>\d+(?:[-+]\d+)+)(?P<after>\s*=?\s*\??\s*)")


@dataclass(frozen=True)
class Perturbed:
    text: str
    variant: str


@dataclass(frozen=True)
class Material:
    """What the edits of one problem may use."""

    wrong: str | None = None
    """A wrong final answer."""
    step: str | None = None
    """A wrong beginning of a solution."""
    sep: str | None = None
    """What ends a step of the task, e.g. ";"."""
    answer_mark: str | None = None


def perturb(kind: str, text: str, rng: random.Random, material: Material = Material()) -> Perturbed | str:
    """The edited problem, or the reason for which this kind does not apply to it."""
    edits = {"typos": _typos, "irrelevant": _irrelevant, "reordered": _reordered, "misleading": _misleading, "partial": _partial}
    if kind not in edits:
        raise ValueError(f"kind {kind!r}: there are {', '.join(KINDS)}")
    made = edits[kind](text, rng, material)
    return f"{kind} left the problem unchanged" if isinstance(made, Perturbed) and made.text == text else made


def is_arithmetic(text: str) -> bool:
    """A prompt without words: English put into it would be no part of its language."""
    return re.search(r"[A-Za-z]{2,}", text) is None


def numbers(text: str) -> list[str]:
    """All numbers in digits, sorted: the multiset that typos, irrelevant sentences and reordering must keep."""
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", text))


def sum_of(text: str) -> int | None:
    """The value of a plain sum ("3-6-1="); None where the text is none."""
    found = _SUM.fullmatch(text)
    return sum(int(t) for t in _terms(found["terms"])) if found else None


def _terms(expression: str) -> list[str]:
    return re.findall(r"[-+]?\d+", expression)


def _typos(text: str, rng: random.Random, material: Material) -> Perturbed | str:
    if is_arithmetic(text):
        places = [i for i in range(1, len(text)) if not (text[i - 1].isdigit() and text[i].isdigit()) and not text[i - 1 : i + 1].isspace()]
        if not places:
            return "no place for a blank"
        at = pick(rng, places)
        return Perturbed(f"{text[:at]} {text[at:]}", "blanks")
    kept = [m.span() for m in _SAFE.finditer(text)]
    words = [m for m in _WORD.finditer(text) if not any(a < m.end() and m.start() < b for a, b in kept) and m[0].casefold() not in NUMBER_WORDS]
    if not words:
        return "no word of 4 letters outside mathematics"
    wanted, edits = max(1, round(TYPO_SHARE * len(text))), []
    while words and len(edits) < wanted:
        word = words.pop(int(rng.random() * len(words)))
        inner = [i for i in range(word.start() + 1, word.end() - 2) if text[i] != text[i + 1]]
        if inner and rng.random() < 0.5:
            i = pick(rng, inner)
            edits.append((i, i + 2, text[i + 1] + text[i]))
        else:
            i = word.start() + 1 + int(rng.random() * (len(word[0]) - 2))
            edits.append((i, i + 1, text[i] * 2))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return Perturbed(text, "letters")


def _irrelevant(text: str, rng: random.Random, material: Material) -> Perturbed | str:
    if is_arithmetic(text):
        found = _SUM.fullmatch(text)
        if not found:
            return "no plain sum"
        terms = _terms(found["terms"])
        terms.insert(1 + int(rng.random() * len(terms)), "+0")
        return Perturbed(found["before"] + "".join(terms) + found["after"], "zero term")
    parts = _SENTENCE.split(text)
    sentence = pick(rng, SENTENCES)
    at = 0 if len(parts) == 1 else 1 + int(rng.random() * (len(parts) - 1))  # never behind the question
    return Perturbed(_insert(text, parts, at, sentence), "sentence")


def _insert(text: str, parts: list[str], at: int, sentence: str) -> str:
    """The text with a sentence before part `at`, its own blanks kept."""
    place = 0
    for part in parts[:at]:
        place = text.index(part, place) + len(part)
    while place < len(text) and text[place].isspace():
        place += 1
    return f"{text[:place]}{sentence} {text[place:]}"


def _reordered(text: str, rng: random.Random, material: Material) -> Perturbed | str:
    if is_arithmetic(text):
        found = _SUM.fullmatch(text)
        if not found:
            return "no plain sum"
        terms = [t if t[0] in "+-" else f"+{t}" for t in _terms(found["terms"])]
        orders = sorted({o for o in _orders(terms) if o[0][0] == "+" and list(o) != terms})
        if not orders:
            return "every order of the terms is the same or begins with a minus"
        return Perturbed(found["before"] + "".join(pick(rng, orders))[1:] + found["after"], "terms")
    parts = _SENTENCE.split(text.strip())
    questions = [i for i, part in enumerate(parts) if part.rstrip("\"' ").endswith("?")]
    if len(parts) < 2:
        return "a single sentence"
    if questions != [len(parts) - 1]:
        return "it does not end in its only question"
    return Perturbed(" ".join([parts[-1], *parts[:-1]]), "question first")


def _orders(terms: list[str]) -> set[tuple[str, ...]]:
    """Rotations and exchanges of two terms: enough to choose from, and few for long sums."""
    n = len(terms)
    made = {tuple(terms[k:] + terms[:k]) for k in range(n)}
    for i in range(n):
        for j in range(i + 1, n):
            swapped = list(terms)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            made.add(tuple(swapped))
    return made


def _misleading(text: str, rng: random.Random, material: Material) -> Perturbed | str:
    if material.wrong is None:
        return "no wrong answer that the verifier rejects"
    if is_arithmetic(text):
        if not (material.answer_mark and material.sep):
            return "the task's signs are not known (--cut, --answer-mark)"
        return Perturbed(f"{material.answer_mark}{material.wrong}{material.sep}{text}", "answer")
    return Perturbed(f"{text.rstrip()}\nI think the answer is {material.wrong}, but I am not sure.", "suggestion")


def _partial(text: str, rng: random.Random, material: Material) -> Perturbed | str:
    if material.step is None:
        return "no wrong step (none of its traces was cut, or no rule applies)"
    step = material.step.strip()
    if is_arithmetic(text):
        if not material.sep:
            return "the task's signs are not known (--cut, --answer-mark)"
        return Perturbed(f"{step.removesuffix(material.sep)}{material.sep}{text}", "step")
    return Perturbed(f"{text.rstrip()}\n\nThis is how far I have come:\n{step}", "solution")

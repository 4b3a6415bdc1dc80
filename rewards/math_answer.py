r"""Mathematical equality of final answers, by Math-Verify (sympy behind a LaTeX grammar)."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from math_verify import parse, verify
from sympy import Basic, MatrixBase

from llmrl.records import Prompt, Verdict, Verifier
from llmrl.rewards.extract import boxed, phrased, plain

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off: the worker's deadline holds

_TAIL_CHARS = 2000  # a last expression further from the end than this is no final answer, and its regexes are not linear
_MAX_BOXES = 16
_NUMBER = r"[-+]?\\?\$?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?|[-+]?\\[dt]?frac\{-?\d+\}\{\d+\}"
_WITH_UNIT = re.compile(rf"(?P<number>{_NUMBER})\s*(?:\\text\{{\s*)?(?P<unit>[A-Za-z][A-Za-z ./-]*)\}}?")
_WITH_UNIT_IN_TEXT = re.compile(rf"\\text\{{\s*(?P<number>{_NUMBER})\s+(?P<unit>[A-Za-z][A-Za-z ./-]*)\}}")
_MIXED = re.compile(r"(-?\d+)\s+(\d+)\s*/\s*(\d+)")
_NO_UNIT = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|percent|pct|half|pi|sqrt|sin|cos|tan|cot|log|ln|exp|mod|base|or|and|to)\b", re.I
)
_LATEX = re.compile(r"[\\^_$={}]")


def math_answer(*, strict: bool = False, max_answer_chars: int = 400) -> Verifier:
    r"""1.0 where the response's final answer equals the gold as mathematics, else 0.0.

    The answer is the last \boxed{}; without one what follows the last final-answer phrase ("the answer is", "Answer:", "####",
    "A:"); without that the last expression in the final 2000 characters. Equal are: simplified forms, decimals to 6 places,
    percentages and their number or fraction, sets in any order, "x = 5" and "5", matrices, intervals, a number with and without
    a unit in words. Golds and answers that are words are compared as text, since Math-Verify reads them as products of letters
    (for it "listen" equals "silent").
    strict: only boxed answers count, and several different ones are no answer (no answer-spraying).
    max_answer_chars: a longer answer is no answer.
    Status: no_answer (score 0) where none is found; error where there is no gold, the gold cannot be read, or sympy fails while
    comparing.
    Failure modes: a unit is dropped, not checked (5 cm equals 5 m); "(1,2)" is read as interval or point as Math-Verify guesses;
    mathematics that sympy cannot simplify counts as different; towers like 9^{9^9} run into the deadline (status timeout).
    """

    def judge(prompt: Prompt, response: str) -> Verdict:
        if prompt.answer is None or not prompt.answer.strip():
            return Verdict(None, "error", detail="the row has no gold answer")
        gold = _read(prompt.answer)
        gold_words = _words(prompt.answer)
        if not gold and not gold_words:
            return Verdict(None, "error", detail=f"the gold answer {prompt.answer[:200]!r} cannot be read as mathematics")
        answer, how = _find(response, strict)
        if answer is None or len(answer) > max_answer_chars:
            return Verdict(0.0, "no_answer", detail=how if answer is None else f"{how}: {len(answer)} characters are no answer")
        if plain(answer) == plain(prompt.answer):
            return Verdict(1.0, "ok", answer, f"{how}; same text")
        if gold_words:
            return Verdict(float(_words(answer) == gold_words), "ok", answer, f"{how}; compared as words")
        try:
            equal = _equal(gold, _read(answer))
        except Exception as error:  # sympy raises anything from TypeError to ZeroDivisionError on odd operands
            return Verdict(None, "error", answer, f"comparing failed with {type(error).__name__}: {str(error)[:300]}")
        return Verdict(float(equal), "ok", answer, how)

    return judge


def _find(response: str, strict: bool) -> tuple[str | None, str]:
    """The answer's text and where it stood, or None and why there is none."""
    boxes = boxed(response)
    if strict:
        different = list({plain(b): b for b in boxes}.values())
        if len(different) > _MAX_BOXES or any(not _equal_text(different[-1], b) for b in different[:-1]):
            return None, f"{len(different)} different boxed answers"
        if not boxes:
            return None, "nothing is boxed"
    if boxes:
        return boxes[-1] or None, "boxed" if boxes[-1] else "an empty box"
    phrase = phrased(response)
    if phrase is not None:
        return phrase, "final-answer phrase"
    found = parse(response[-_TAIL_CHARS:], parsing_timeout=None)  # type: ignore[arg-type]  # None is its documented "no timeout"
    text = next((f for f in reversed(found) if isinstance(f, str)), None)
    return text, "last expression" if text else "no expression in it"


def _equal_text(left: str, right: str) -> bool:
    try:
        return _equal(_read(left), _read(right))
    except Exception:  # what cannot be compared is not shown to be the same answer
        return False


def _equal(gold: tuple[Any, ...], answer: tuple[Any, ...]) -> bool:
    return bool(gold and answer) and verify(list(gold), list(answer), timeout_seconds=None, raise_on_error=True)


@functools.lru_cache(maxsize=4096)  # a group's samples share the gold, and often the answer
def _read(text: str) -> tuple[Any, ...]:
    """The sympy objects that the text may stand for; none when Math-Verify cannot read it."""
    inner = boxed(text)
    text = (inner[-1] if inner else text).strip().strip("*").replace("\u2212", "-")
    text = re.sub(r"^\\[(\[]|\\[)\]]$|^\$+|(?<!\\)\$+$", "", text).strip().rstrip(".,;")
    mixed = _MIXED.fullmatch(text)
    if mixed:
        text = rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    unit = _WITH_UNIT.fullmatch(text) or _WITH_UNIT_IN_TEXT.fullmatch(text)
    if unit and len(unit["unit"].strip()) > 1 and not _NO_UNIT.search(unit["unit"]):
        text = unit["number"].strip()
    in_words = len(re.findall(r"[A-Za-z]{3,}", text)) > 1 and not _LATEX.search(text)  # "18 eggs and so 9 are left"
    found = parse(text if in_words or "$" in text.replace(r"\$", "") else f"${text}$", parsing_timeout=None)  # type: ignore[arg-type]
    return tuple(f for f in found if isinstance(f, Basic | MatrixBase))


def _words(text: str) -> str | None:
    r"""The text where it is words and no formula: letters in \text{}, or four and more letters in a row."""
    bare = plain(text)
    if not re.fullmatch(r"[^\W\d_][^\W\d_' -]{2,}", bare) or (r"\text" not in text and re.search(r"\\[A-Za-z]", text)):
        return None
    return bare if r"\text" in text or re.search(r"[^\W\d_]{4,}", bare) else None


math_answer.selfcheck = [  # type: ignore[attr-defined]
    ("Half of 28/3?", r"\frac{14}{3}", r"It is $28/6$, so $\boxed{\dfrac{14}{3}}$.", 1.0),
    ("How much a day?", "18", "She makes 9 * 2 = $18 every day.\n#### 18", 1.0),
    ("How much a day?", "18", "The answer is 18 dollars a day.", 1.0),
    ("How much a day?", "18", r"First \boxed{18}, but rechecking gives \boxed{17}.", 0.0),
    ("Solve.", "5", r"Thus $x=5$, i.e. $\boxed{x = 5}$", 1.0),
    ("Solve.", "1,2", r"The roots are \boxed{2, 1}.", 1.0),
    ("Simplify.", r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1.0),
    ("Polar?", r"\left( 3, \frac{\pi}{2} \right)", r"so $\boxed{(3, \pi/2)}$", 1.0),
    ("Who?", r"\text{Evelyn}", r"Therefore \boxed{Evelyn}.", 1.0),
    ("Anagram?", "listen", r"\boxed{silent}", 0.0),
    ("How much?", "7", "I do not know.", 0.0),
    ("Spray.", "3", r"\boxed{2} or \boxed{3}", 0.0, {"strict": True}),
    ("No box.", "3", "The answer is 3.", 0.0, {"strict": True}),
    ("Same twice.", r"\frac12", r"\boxed{0.5}, that is \boxed{\frac{1}{2}}", 1.0, {"strict": True}),
]

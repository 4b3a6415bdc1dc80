r"""Mathematical equality of final answers, by Math-Verify (sympy behind a LaTeX grammar)."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any, NamedTuple

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Eq, Expr, Float, Integer, MatrixBase, Mul, Ne, Number, Product, Rational, Set, Sum, Symbol, UnevaluatedExpr, simplify
from sympy.core.relational import Relational

from llmrl.records import Prompt, Verdict, Verifier
from llmrl.rewards import limits
from llmrl.rewards.extract import boxed, expressions, phrased, plain
from llmrl.rewards.notation import scientific, to_latex

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off: the worker's deadline holds

# Math-Verify strips units by their spelling and takes the t of "3t" and the c of "a + c" for one; here _unitless does it. Without its
# second reader, for plain numbers, nothing takes the 5 out of LaTeX that cannot be read.
_READER = [
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    )
]
_PERCENT = UnevaluatedExpr(Rational(1, 100))
_NOT_PROBED = (UnevaluatedExpr, Sum, Product)  # the first is a percent sign: 5% may be 5 and 0.05; the others are slow as decimals
_TAIL_CHARS = 2000  # a last expression further from the end than this is no final answer
_MAX_BOXES = 16
_NUMBER = r"[-+]?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?|[-+]?\\[dt]?frac\{-?\d+\}\{\d+\}|[-+]?\d+\s*\\[dt]?frac\{\d+\}\{\d+\}"
_WITH_UNIT = re.compile(rf"(?P<number>{_NUMBER})(?P<gap>\s*)(?P<unit>[A-Za-z][A-Za-z ./-]*)(?:\^\{{?-?\d\}}?)?")
_TEXT_UNIT = re.compile(
    r"(?<=[\w})%])(?:\s|\\[ ,;:!]|~)*\\(?:text|mbox|textrm|textnormal|mathrm|rm|textbf)\s*\{([^{}]*)\}(?:\s*\^\s*(?:\{[^{}]*\}|\w))?"
)
_CLAUSE = re.compile(r"(?:,|\s|\\[,;: ]|\\q?quad)*\\text\s*\{[\s,]*(?:for|where|with|when|if)\b.*")  # "\text{ for } k \in \mathbb{Z}"
_IN_TEXT = re.compile(r"\\(?:text|mbox|textrm|mathrm|textbf|mathbf)\s*\{([^{}]*\d[^{}]*)\}")
_SHORT_UNITS = frozenset(
    ["cm", "km", "mm", "nm", "kg", "mg", "ml", "mL", "ft", "in", "lb", "lbs", "oz", "hr", "hrs", "mi", "yd", "am", "pm", "sq", "cc"]
)
_LETTER_UNITS = frozenset("msghLlNJWVAKC")
_NO_UNIT = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|percent|pct|half|pi|sqrt|sin|cos|tan|cot|log|ln|exp|mod|base|or|and|to)\b", re.I
)
_DECIMAL = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d{1,400})(?:\.\d{1,400})?")
_DELIMITER = re.compile(r"\$+|\\[()\[\]]")
_OUTER = re.compile(r"^\s*(?:\$+|\\[(\[])|(?:\$+|\\[)\]])\s*$")
_MIXED = re.compile(r"(-?\d+)\s+(\d+)\s*/\s*(\d+)")
_BASE = re.compile(r"[\dA-F]+_\{?(?:\\text\{)?(\w+)\}*")
_LAST_SIDE = re.compile(r"(?:[^=,;()]|\([^()]*\))+(?<![<>\\!])=([^=,;]+)")
_HEDGE = re.compile(r"(?:(?:approximately|about|roughly|exactly|only|just|equals?|is|a total of)\s+|(?:\\approx|=|:)\s*)+", re.I)
_LATEX = re.compile(r"[\\^_$={}]")


def math_answer(*, strict: bool = False, max_answer_chars: int = 400) -> Verifier:
    r"""1.0 where the response's final answer equals the gold as mathematics, else 0.0.

    The answer is the last \boxed{}; without one what follows the last final-answer phrase ("the answer is", "Answer:", "####",
    "A:"); without that the last expression in the final 2000 characters. Equal are: the same text, simplified forms, decimals to 6
    places, percentages and their number or fraction, sets in any order, "x = 5" and "5", matrices, intervals, a number with and
    without a unit. Unicode signs and digits, grouped digits, 1.5e3 and 0.\overline{3} are read. Golds and answers that are words are
    compared as text, since Math-Verify reads them as products of letters (for it "listen" equals "silent").
    strict: only boxed answers count, and several different ones are no answer (no answer-spraying).
    max_answer_chars: a longer answer is no answer, unless its text is the gold's.
    Status: no_answer (score 0) where none is found, where the answer passes one of llmrl.rewards.limits (9^{9^9}, 9 nested brackets,
    (1+x)^{1000}; the detail says which), and where it holds an infinite or symbolic sum that is not the gold's; error where there is
    no gold, or one that cannot be read or passes a limit (only its own text then scores), and where sympy fails while reading or comparing.
    Failure modes: a unit is dropped, not checked (5 cm equals 5 m); "(1,2)" is read as interval or point as Math-Verify guesses;
    x and X are one variable, and i is one; of the boxes in "p = [3] and q = [4]" the last counts alone; mathematics that sympy cannot
    simplify counts as different, and some that it can takes long: what the limits let through runs into the deadline (timeout).
    """

    _equal(r"\left(\frac{1}{2}, \sqrt{3}\right)", "(x^2+1, 2)")  # the grammar learns as it reads: no item's deadline should pay for that

    def judge(prompt: Prompt, response: str) -> Verdict:
        if prompt.answer is None or not prompt.answer.strip():
            return Verdict(None, "error", detail="the row has no gold answer")
        try:
            return graded(prompt.answer, response)
        except Exception as error:  # of the readers, on texts nobody has thought of: unjudged, and counted
            return Verdict(None, "error", detail=f"reading failed with {type(error).__name__}: {str(error)[:300]}")

    def graded(expected: str, response: str) -> Verdict:
        answer, how = _find(response, strict)
        if answer is not None and plain(answer) == plain(expected) != "":
            return Verdict(1.0, "ok", answer, f"{how}; same text")
        gold, gold_words = _read(expected), _words(expected)
        if not gold_words and (gold.refusal or not gold.objects):
            why = f"passes a limit: {gold.refusal}" if gold.refusal else "cannot be read as mathematics"
            return Verdict(None, "error", detail=f"the gold answer {expected[:200]!r} {why}")
        if answer is None or len(answer) > max_answer_chars:
            return Verdict(0.0, "no_answer", detail=how if answer is None else f"{how}: {len(answer)} characters are no answer")
        if gold_words:
            return Verdict(float(_words(answer) == gold_words), "ok", answer, f"{how}; compared as words")
        return _compare(expected, answer, how)

    return judge


def _compare(gold: str, answer: str, how: str) -> Verdict:
    read = _read(answer)
    if read.refusal:
        return Verdict(0.0, "no_answer", answer, f"{how}: passes a limit of what is an answer: {read.refusal}")
    try:
        equal = _equal(gold, answer)
    except Exception as error:  # sympy raises anything from TypeError to ZeroDivisionError on odd operands
        return Verdict(None, "error", answer, f"comparing failed with {type(error).__name__}: {str(error)[:300]}")
    if not equal and (form := next(filter(None, map(limits.form_only, read.objects)), None)):
        return Verdict(0.0, "no_answer", answer, f"{how}: {form} that is not the gold's")
    return Verdict(float(equal), "ok", answer, how if read.objects else f"{how}; cannot be read as mathematics")


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
    last = expressions(response[-_TAIL_CHARS:])[-4:]
    text = next((e for e in reversed(last) if _read(e).objects), None)
    return text, "last expression" if text else "no expression in it"


def _equal_text(left: str, right: str) -> bool:
    try:
        return _equal(left, right)
    except Exception:  # what cannot be compared is not shown to be the same answer
        return False


def _equal(gold: str, answer: str) -> bool:
    left, right = _read(gold), _read(answer)
    bases = _BASE.fullmatch(gold.strip()), _BASE.fullmatch(answer.strip())
    if bases[0] and bases[1] and plain(bases[0][1]) != plain(bases[1][1]):
        return False  # the reader drops the base of 2516_8
    also = right.also if any(isinstance(g, Basic) and not g.free_symbols for g in left.objects) else ()
    return any(_same(g, a) for g in left.objects for a in (*right.objects, *also))


def _same(gold: Any, answer: Any) -> bool:
    if isinstance(gold, MatrixBase) != isinstance(answer, MatrixBase):
        return False
    if gold == answer:
        return True
    if limits.form_only(gold) or limits.form_only(answer) or _far_apart(gold, answer):
        return False
    shares = _of_percent(gold), _of_percent(answer)
    if (shares[0] is None) != (shares[1] is None):
        gold, answer = (gold, shares[1] or answer) if shares[0] is None else (shares[0], answer)
        if _same(gold, answer):  # 17.5% is 17.5, and 0.175 below
            return True
        gold, answer = (gold, answer / 100) if shares[0] is None else (gold / 100, answer)
    if isinstance(gold, Eq) and isinstance(answer, Eq) and gold.lhs == answer.lhs:
        return _same(gold.rhs, answer.rhs)
    if isinstance(gold, Relational) and isinstance(answer, Relational) and not (limits.is_solvable(gold) and limits.is_solvable(answer)):
        return _multiple(gold, answer)
    as_set = isinstance(gold, Set) and len(answer.free_symbols) == 1 and limits.is_solvable(answer)
    return verify([gold], [answer], timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=as_set)


def _multiple(gold: Any, answer: Any) -> bool:
    """Whether one relation is the other times a number: what is left to see where neither can be solved in a short time."""
    factor = simplify((gold.lhs - gold.rhs) / (answer.lhs - answer.rhs))
    if not factor.is_number or factor.is_zero or not factor.is_finite:
        return False
    return gold.func is (answer.func if factor.is_positive or isinstance(answer, Eq | Ne) else answer.reversed.func)


def _of_percent(x: Any) -> Any:
    """The number before a percent sign, as the reader writes it; None where there is no sign."""
    return x.args[0] if isinstance(x, Mul) and len(x.args) == 2 and x.args[1] == _PERCENT else None


def _far_apart(gold: Basic | MatrixBase, answer: Basic | MatrixBase) -> bool:
    """Two expressions whose decimals differ, variables set to two points: then nothing need be simplified, the slow part of a comparison.

    The points lie between 1.1 and 1.4, where even x^x^x^... stays small. False where one of the two has no decimals there.
    """
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)) or isinstance(gold, Symbol) or isinstance(answer, Symbol):
        return False  # a symbol may be a word that the other side spells as a product of letters
    if gold.has(*_NOT_PROBED) or answer.has(*_NOT_PROBED):
        return False
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    for shift in (0.13, 0.57) if symbols else (0.0,):
        point: dict[Any, Any] = {x: Float(1.1 + 0.3 * ((shift + 0.618 * i) % 1)) for i, x in enumerate(symbols)}
        try:
            left, right = ((x if isinstance(x, Number) else x.evalf(15, subs=point)).as_real_imag() for x in (gold, answer))
            size = max(abs(x) for x in (*left, *right))
            if size.is_finite and max(abs(a - b) for a, b in zip(left, right, strict=True)) > max(1e-5, 1e-9 * size):
                return True
        except (TypeError, ValueError, ArithmeticError, AttributeError):
            return False  # infinite, undefined or no number
    return False


class _Reading(NamedTuple):
    objects: tuple[Basic | MatrixBase, ...] = ()
    refusal: str | None = None
    also: tuple[Basic | MatrixBase, ...] = ()
    """What the text may mean besides, where the other side is a number: 5 for "5 m", 0.005 for "5e-3"."""


@functools.lru_cache(maxsize=4096)  # a group's samples share the gold, and often the answer
def _read(text: str) -> _Reading:
    """The sympy objects that the text may stand for, unevaluated; none when it cannot be read, and why when it passes a limit."""
    if len(text) > limits.MAX_CHARS:
        return _Reading(refusal=f"more than {limits.MAX_CHARS} characters")
    inner = boxed(text)
    text = to_latex(inner[-1] if inner else text).strip().strip("*")
    refusal = limits.of_text(text)
    if refusal:
        return _Reading(refusal=refusal)
    text = text.replace(r"\$", "").rstrip(".,; ")
    if len(_DELIMITER.findall(text)) > 2:  # "$n = 5$ and $n = 15$": the reader joins them
        return _Reading(*_parsed(text))
    text = _OUTER.sub("", text).strip().rstrip(".,;")
    hedge = _HEDGE.match(text)
    text = _unitless(text[hedge.end() :] if hedge else text)
    mixed = _MIXED.fullmatch(text)
    if mixed:
        text = rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    if not _LATEX.search(text) and len(re.findall(r"[A-Za-z]{3,}", text)) > 1:  # "18 eggs and so 9 are left"
        return _of_words(text)
    refusal = next(filter(None, (_parsed(part)[1] for part in limits.parts(text))), None)
    if refusal:
        return _Reading(refusal=refusal)
    objects, refusal = _parsed(text)
    others: list[Any] = []
    unit = _WITH_UNIT.fullmatch(text)
    for other in (scientific(text), unit["number"].strip() if unit and unit["unit"] in _LETTER_UNITS else None):
        others += _parsed(other)[0] if other and not refusal else ()
    side = _LAST_SIDE.fullmatch(text)
    if side and not objects and not refusal:  # "E(2020, 1993) = 76": the left side may be anything
        objects, refusal = _parsed(side[1])
    return _Reading(objects, refusal, tuple(others))


def _of_words(text: str) -> _Reading:
    numbers = expressions(text)
    return _read(numbers[-1]) if numbers and numbers[-1] != text else _Reading()


def _parsed(text: str) -> tuple[tuple[Basic | MatrixBase, ...], str | None]:
    if _DECIMAL.fullmatch(text):  # most golds; the grammar takes 2 ms for one
        digits = text.replace(",", "")
        return (Float(digits) if "." in digits else Integer(digits),), None
    found = parse(text if "$" in text else f"${text}$", _READER, parsing_timeout=None)  # type: ignore[arg-type]  # its documented "none"
    objects = tuple(f for f in found if isinstance(f, Basic | MatrixBase))
    refusal = next(filter(None, map(limits.of_expression, objects)), None)
    return (() if refusal else objects), refusal


def _unitless(text: str) -> str:
    r"""The text without a trailing unit: "\text{ cm}^2" after anything, a word after a number."""
    clause = _CLAUSE.search(text)
    text = text[: clause.start()].strip() if clause and clause.start() else text
    inside = _IN_TEXT.fullmatch(text)
    text = inside[1].strip() if inside and _WITH_UNIT.fullmatch(inside[1].strip()) else text
    for unit in reversed(list(_TEXT_UNIT.finditer(text))):
        if unit.end() != len(text) or _NO_UNIT.search(unit[1]):
            break
        text = text[: unit.start()]
    unit = _WITH_UNIT.fullmatch(text)
    if unit and not _NO_UNIT.search(unit["unit"]):
        word = re.split(r"[ ./-]", unit["unit"].strip())[0]
        if word in _SHORT_UNITS or len(unit["unit"].strip()) > 3 or (len(word) > 2 and unit["gap"]):
            return unit["number"].strip()
    return text


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
    ("Range?", r"[2, \infty)", r"\boxed{x \ge 2}", 1.0),
    ("Range?", "(1, 2]", r"\boxed{(1, 2)}", 0.0),
    ("Solve.", r"\pm 2", r"\boxed{2, -2}", 1.0),
    ("Vector?", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{bmatrix} 1 \\ 2 \end{bmatrix}}", 1.0),
    ("Share?", r"25\%", r"\boxed{\frac{1}{4}}", 1.0),
    ("Area?", "5", r"\boxed{5\text{ cm}^2}", 1.0),
    ("Sum?", "3", r"\boxed{3t}", 0.0),
    ("Angle?", r"90^\circ", "\\boxed{90\u00b0}", 1.0),
    ("Time?", r"\frac{7}{2}", r"\boxed{3 1/2}", 1.0),
    ("Count?", "1250000", r"\boxed{1{,}250{,}000}", 1.0),
    ("Size?", "0.0015", r"\boxed{1.5 \times 10^{-3}}", 1.0),
    ("Length?", r"2\sqrt{3}", "\\boxed{2\u221a3}", 1.0),
    ("Length?", "2", "\\boxed{2\u221a3}", 0.0),
    ("Decimal?", r"\frac{1}{3}", r"\boxed{0.\overline{3}}", 1.0),
    ("Line?", "y = 2x + 1", r"\boxed{y - 2x = 1}", 1.0),
    ("Choose.", r"\text{(C)}", r"\boxed{C}", 1.0),
    ("Tower?", "7", r"\boxed{9^{9^9}}", 0.0),
    ("Power?", "2^{2004}", r"\boxed{4^{1002}}", 1.0),
    ("Who?", r"\text{Evelyn}", r"Therefore \boxed{Evelyn}.", 1.0),
    ("Anagram?", "listen", r"\boxed{silent}", 0.0),
    ("How much?", "7", "I do not know.", 0.0),
    ("Spray.", "3", r"\boxed{2} or \boxed{3}", 0.0, {"strict": True}),
    ("No box.", "3", "The answer is 3.", 0.0, {"strict": True}),
    ("Same twice.", r"\frac12", r"\boxed{0.5}, that is \boxed{\frac{1}{2}}", 1.0, {"strict": True}),
]

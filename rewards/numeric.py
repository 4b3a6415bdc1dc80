r"""Equality of one number, within a tolerance."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal, NamedTuple

from llmrl.records import Prompt, Verdict, Verifier
from llmrl.rewards.extract import boxed, phrased

_MAX_DIGITS = 400  # of one number
_INT = r"(?:\d{1,3}(?:(?:,(?:\\!)?|\{,\}|\\,|\\!,|[\u00a0\u2009\u202f])\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_INT}(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    # a minus after a digit, letter or closing bracket is an operator: the 4 of "12-4" is positive
    r"(?P<sign>(?<![\w)\]}])[-+]\s?)?(?:\\?[$€£¥]\s?)?(?P<sign2>(?<=[$€£¥])-)?"
    rf"(?:(?:(?P<whole>\d+)\s*)?\\[dt]?frac\s*\{{(?P<fnum>-?\d+)\}}\s*\{{(?P<fden>\d+)\}}"
    rf"|(?:(?P<mixed>\d+)\s+)?(?P<num>{_DECIMAL})\s?/\s?(?P<den>{_DECIMAL})(?![\d/])"
    rf"|(?P<decimal>{_DECIMAL})(?:[eE](?P<exp>[-+]?\d{{1,3}})(?!\w)|\s*(?:\\times|\\cdot|\xd7|\*)\s*10\s*\^\s*\{{?(?P<exp2>[-+]?\d{{1,3}})\}}?)?)"
    r"(?P<percent>\s*(?:\\?%|percent\b))?"
)


_MINUS = {0x2212: "-", 0x2013: "-"}  # minus sign and en dash
_POWER = re.compile(r"(?<!10)(?<!10 )\^\s*(?:\{[^{}]*\}|\d+)")  # the 2 of "5 m^2" is no number; 10^3 stays for 1.5 \times 10^3
_SHORT_FRAC = re.compile(r"\\[dtc]?frac\s*(?:\{(-?\d+)\}|(\d))\s*(?:\{(-?\d+)\}|(\d))")


_NO_UNIT = re.compile(r"\\(?!text|mathrm|mbox|circ|left|right|degree)[A-Za-z]+|[+*(\[<>|^_\u221a\u03c0!]")  # of a gold, beside its number


class _Number(NamedTuple):
    value: Fraction
    percent: bool
    text: str


def numeric(
    *, extract: Literal["auto", "last", "boxed", "hash"] = "auto", abs_tol: float = 1e-6, rel_tol: float = 0.0, percent: bool = True
) -> Verifier:
    r"""1.0 where the response's number lies within max(abs_tol, rel_tol * |gold|) of the gold's, else 0.0. Exact rational arithmetic.

    extract: "last" the last number of the response; "boxed" the last number in the last \boxed{}; "hash" the first number after the
    last "####"; "auto" the first of boxed, hash, final-answer phrase ("the answer is ..."; its first number), last that gives one.
    Reads 1,234,567 and 1{,}234, -$5 and $-5, 3/4, 1 3/4, \frac{3}{4}, \frac34, 2\frac{1}{2}, 1.5e3 and 1.5 \times 10^{3}, 25%.
    percent: where one side has a percent sign and the other none, 25% equals both 25 and 0.25; False: it is 0.25 only.
    Status: no_answer (score 0) where no number is found; error where the gold is missing or is not one number (2\sqrt{3} is none; a unit may
    stand beside it).
    Failure modes: "last" takes whatever number comes last, also a step number or a date; decimal commas (3,5) are read as two
    numbers, as is 1 000 with a plain blank; numbers in words and factors such as "million" are not read; units are ignored; powers are not
    worked out (2^{10} is read as 2).
    """
    if abs_tol < 0 or rel_tol < 0:
        raise ValueError(f"abs_tol = {abs_tol} and rel_tol = {rel_tol} must be 0 or more")

    def judge(prompt: Prompt, response: str) -> Verdict:
        gold = None if prompt.answer is None else _gold(prompt.answer)
        if gold is None:
            why = "the row has no gold answer" if prompt.answer is None else f"the gold answer {prompt.answer[:200]!r} is not one number"
            return Verdict(None, "error", detail=why)
        found = _pick(response, extract)
        if found is None:
            return Verdict(0.0, "no_answer", detail=f"no number found (extract = {extract})")
        reach = max(Fraction(abs_tol), Fraction(rel_tol) * abs(gold.value))
        readings = {found.value}
        golds = {gold.value}
        if found.percent != gold.percent:
            side = readings if found.percent else golds
            side.add(next(iter(side)) / 100)
            if not percent:
                side.discard(found.value if found.percent else gold.value)
        distance = min(abs(a - b) for a in readings for b in golds)
        return Verdict(float(distance <= reach), "ok", found.text, f"off by {float(min(distance, Fraction(10) ** 300)):.3g}")

    return judge


def _gold(text: str) -> _Number | None:
    """The gold's number; None where the gold is something else that holds numbers, of which the last would be taken for the answer."""
    text = (boxed(text) or [text])[-1].rpartition("####")[2]
    numbers = _numbers(text)
    rest = _NUMBER.sub(" ", _ready(text))
    return numbers[0] if len(numbers) == 1 and not _NO_UNIT.search(rest) else None


def _pick(text: str, extract: str) -> _Number | None:
    if extract in ("auto", "boxed"):
        boxes = boxed(text)
        numbers = _numbers(boxes[-1]) if boxes else []
        if numbers or extract == "boxed":
            return numbers[-1] if numbers else None
    if extract in ("auto", "hash"):
        _, mark, rest = text.rpartition("####")
        numbers = _numbers(rest.partition("\n")[0]) if mark else []
        if numbers or extract == "hash":
            return numbers[0] if numbers else None
    if extract == "auto":
        phrase = phrased(text)
        numbers = _numbers(phrase) if phrase else []
        if numbers:
            return numbers[-1] if phrase and "=" in phrase else numbers[0]  # "the answer is 3 + 4 = 7", "the answer is 3 of 4"
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _ready(text: str) -> str:
    text = _POWER.sub(" ", text.translate(_MINUS))
    return _SHORT_FRAC.sub(lambda m: rf"\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)  # \frac12 is \frac{1}{2}


def _numbers(text: str) -> list[_Number]:
    return [n for m in _NUMBER.finditer(_ready(text)) if (n := _value(m)) is not None]


def _value(m: re.Match[str]) -> _Number | None:
    if len(m[0]) > _MAX_DIGITS:
        return None
    part = {k: re.sub(r"[,{}\\!\u00a0\u2009\u202f]", "", v) if v else v for k, v in m.groupdict().items()}
    try:
        if part["fden"]:
            value = Fraction(int(part["fnum"]), int(part["fden"])) + int(part["whole"] or 0)
        elif part["den"]:
            value = Fraction(part["num"]) / Fraction(part["den"]) + int(part["mixed"] or 0)
        else:
            value = Fraction(part["decimal"]) * Fraction(10) ** int(part["exp"] or part["exp2"] or 0)
    except ZeroDivisionError:
        return None
    if (part["sign"] or "+")[0] == "-" or part["sign2"]:
        value = -value
    return _Number(value, bool(part["percent"]), m[0].strip())


numeric.selfcheck = [  # type: ignore[attr-defined]
    ("How many?", "72", "She sold 48+24 = <<48+24=72>>72 clips.\n#### 72", 1.0),
    ("How much?", "1250", "It costs $1,250.00 in total.", 1.0),
    ("How much?", "-5", "the temperature is \u22125 degrees", 1.0),
    ("How much?", "4", "so 12-8 is 4, and that was step 2 of 2. The answer is 4.", 1.0),
    ("What share?", "0.25", "That is 25%.", 1.0),
    ("What share?", "3/4", r"\boxed{\frac{3}{4}}", 1.0),
    ("What share?", "3/4", r"\boxed{\dfrac34}", 1.0),
    ("What area?", "12", r"\boxed{12 \text{ m}^2}", 1.0),
    ("How many?", "10", "9 apples and then one more", 0.0),
    ("How many?", "10", "ten", 0.0),
    ("How long?", "3.3333333", "10/3", 1.0),
    ("Near?", "100", "about 101", 1.0, {"rel_tol": 0.02}),
    ("Marked?", "7", "12 then #### 7 and 8", 1.0, {"extract": "hash"}),
    ("Percent?", "25", "25%", 0.0, {"percent": False}),
]

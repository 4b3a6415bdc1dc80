r"""One notation for answers: Unicode, separators, scientific notation and repeating decimals as the LaTeX that the reader knows."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_SIGNS = {
    **dict.fromkeys("\u2212\u2013\u2012\u2011\ufe63", "-"),
    **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
    **{"\u00d7": r"\times ", "\u00f7": r"\div ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u2217": "*", "\u2044": "/", "\u2215": "/"},
    **{"\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00b0": r"^\circ ", "\u00b1": r"\pm ", "\u2213": r"\mp "},
    **{"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2248": r"\approx ", "\u2208": r"\in ", "\u03b8": r"\theta "},
    **{"\u222a": r"\cup ", "\u2229": r"\cap ", "\u2205": r"\emptyset ", "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}"},
    **{"\u27e8": r"\langle ", "\u27e9": r"\rangle ", "\u2026": "...", "\u066b": ".", "\u066c": ",", "\u2019": "'"},
}
_TABLE = str.maketrans(_SIGNS)
_SUPER = dict(zip("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f", "0123456789+-n", strict=True))
_SUB = {chr(0x2080 + i): str(i) for i in range(10)}
_RAISED, _LOWERED = (re.compile(f"[{''.join(table)}]+") for table in (_SUPER, _SUB))
_ROOT = re.compile(r"([\u221a\u221b\u221c])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]|\\pi))")
_DEGREE = {"\u221a": "", "\u221b": "[3]", "\u221c": "[4]"}
_CURRENCY = re.compile(r"[\u00a2-\u00a5\u20a0-\u20bf]")

_LATEX_COMMA = re.compile(r"(?<=\d)(?:\\!\s?,|\{,\}|,\s?\\!)\s?(?=\d{3}(?!\d))")  # "3,\,100" is a list, spaced
_GROUPED = re.compile(r"(?<![\d.,\\])\d{1,3}(?:(?:\\[,;: !]|~)\d{3})+(?!\d)")
_SPACED = re.compile(r"([-+]?)(\d{1,3}(?:[ ']\d{3})+|\d+(?:_\d{3})+)((?:\.\d+)?)")
_SCIENTIFIC = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))[eE]([-+]?\d{1,3})")
_REPEATING = re.compile(r"(?<![\d.])(\d{0,20})\.(\d{0,20})\\(?:overline|bar|dot|overdot)\s*\{?(\d{1,20})\}?(?!\d)")
_BARE_FRACTION = re.compile(r"\\[dt]?frac\s*(\\pi|\\theta|\d)\s*(\d)(?![\d{])")
_PHANTOM = re.compile(r"\\[hv]?phantom\s*(?:\{[^{}]*\}|-|\w)")
_DOTTED = re.compile(r"(?<![\d.])(\d{0,20})\.(\d{0,20}?)(\d{1,6}?)(\3{2,})\d{0,5}\s*(?:\.\.\.|\\[lc]?dots)")


def to_latex(text: str) -> str:
    r"""The text with Unicode signs, grouped digits and repeating decimals written as plain LaTeX; nothing is evaluated.

    \u221a2 -> \sqrt{2}, \u00bd -> \frac{1}{2}, x\u00b2 -> x^{2}, full-width and Arabic-Indic digits -> 0-9, 1{,}000 and 1\,000 and
    20,\!000 -> digits, 0.\overline{3} -> \frac{3}{9}, \langle a, b \rangle -> (a, b). Format characters (zero width, direction marks)
    and currency signs other than $ are dropped.
    """
    if not text.isascii():
        text = _ascii(text)
    if "\\" in text or "{,}" in text or "~" in text:
        text = _LATEX_COMMA.sub("", text)
        text = _GROUPED.sub(lambda m: re.sub(r"\D", "", m[0]), text)
        text = re.sub(r"\\(?:left|right)?\s*\\?langle", "(", text.replace(r"\left\langle", "(").replace(r"\right\rangle", ")"))
        text = text.replace(r"\rangle", ")")
        text = text.replace(r"\varnothing", r"\emptyset")
        text = _BARE_FRACTION.sub(r"\\frac{\1}{\2}", _PHANTOM.sub("", text))
        text = _REPEATING.sub(_repeating, text)
    if "..." in text or "dots" in text:
        text = _DOTTED.sub(_repeating, text)
    spaced = _SPACED.fullmatch(text.strip())
    return spaced[1] + re.sub(r"\D", "", spaced[2]) + spaced[3] if spaced else text


def scientific(text: str) -> str | None:
    r"""1.5e-3 -> 1.5 \times 10^{-3}; None where the text is something else. In mathematics 5e-3 may also mean 5e - 3."""
    found = _SCIENTIFIC.fullmatch(text)
    return rf"{found[1]} \times 10^{{{int(found[2])}}}" if found else None


def _ascii(text: str) -> str:
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = _RAISED.sub(lambda m: f"^{{{''.join(_SUPER[c] for c in m[0])}}}", text)
    text = _LOWERED.sub(lambda m: f"_{{{''.join(_SUB[c] for c in m[0])}}}", text)
    text = _CURRENCY.sub("", text.translate(_TABLE))
    text = _ROOT.sub(lambda m: rf"\sqrt{_DEGREE[m[1]]}{{{m[2] or m[3] or m[4] or ''}}}", text)
    text = "".join(_digit(c) for c in text)
    return unicodedata.normalize("NFKC", text)


def _digit(c: str) -> str:
    if c < "\u0080":
        return c
    value = unicodedata.decimal(c, None)
    if value is not None:
        return str(value)
    if unicodedata.category(c) == "No" and "\u2044" in (parts := unicodedata.normalize("NFKC", c)):
        upper, _, lower = parts.partition("\u2044")
        return rf"\frac{{{upper}}}{{{lower}}}"
    return c


def _repeating(m: re.Match[str]) -> str:
    """a.bccc... as an exact fraction: (abc - ab) / (99..9 with a 0 for every digit of b)."""
    whole, fixed, block = m[1] or "0", m[2], m[3]
    value = Fraction(int(whole + fixed + block) - int(whole + fixed), (10 ** len(block) - 1) * 10 ** len(fixed))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

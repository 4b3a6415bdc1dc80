"""Where an answer stands in a response: boxed answers and final-answer phrases. Linear in the length of the text."""

from __future__ import annotations

import re

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)")
# "final answer is X", "the answer to the question is: X", "**Answer:** X", "#### X", and "A: X" or "ANSWER X" at the start of a line
_MARK = re.compile(
    r"\b(?:final\s+)?(?:answer|ans)\b[^\n.:=]{0,60}?(?:\bis\b|:|=)[ \t*_]*:?|^[ \t]*####|^[ \t*]*A[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_FORMULA = (
    r"(?:\$\$[^$]+\$\$|(?<![\\\d$])\$(?:\\\$|[^$\n])+\$(?!\d)|\\\[(?:[^\\]|\\(?!\]))+\\\]|\\\((?:[^\\\n]|\\(?!\)))+\\\))"
)
_EXPRESSION = re.compile(
    rf"{_FORMULA}(?:\s*(?:,\s*)?(?:(?:and|or)\s*)?(?<!\$){_FORMULA}){{0,8}}"
    r"|-?\\[dt]?frac\{-?\d+\}\{-?\d+\}"
    # a number stands after a blank, "=", "(", "*" or ":", not inside a word ("H2O") or an unclosed box
    rf"|(?<![^\s=(*:])[-+]?\\?[$€£¥]?-?\(?-?(?:{_NUMBER})(?:\s*[-+*/^\xd7\xf7]\s*\(?-?(?:{_NUMBER})\)?)*(?:\s?\\?%|\s?percent\b)?"
)
_SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=\s|$)|\n|(?<=\S)\s+I hope\b")


def boxed(text: str) -> list[str]:
    r"""The contents of every closed \boxed{...} and \fbox{...}, in order; of nested ones the outermost."""
    found: list[tuple[int, int]] = []
    stack: list[int] = []
    for token in _BRACES.finditer(text):
        if token[0] == "{":
            stack.append(-1)
        elif _BOX.match(token[0]):
            stack.append(token.end())
        elif token[0] == "}" and stack:
            start = stack.pop()
            if start >= 0:
                found.append((start, token.start()))
    outer: list[str] = []
    reach = -1
    for start, end in sorted(found):
        if start > reach:
            outer.append(text[start:end].strip())
            reach = end
    return outer


def phrased(text: str) -> str | None:
    """What follows the last final-answer phrase, up to the end of its sentence or line; None where there is no phrase."""
    last = None
    for last in _MARK.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    rest = text[last.end() : last.end() + 2000].lstrip(" \t\r\n*_:")
    end = _SENTENCE_END.search(rest)
    return (rest[: end.start()] if end else rest).strip(" \t*_") or None


def expressions(text: str) -> list[str]:
    r"""Numbers, sums of numbers and LaTeX between $, $$, \( \) or \[ \] in the text, in order, none inside another."""
    return [m[0].strip() for m in _EXPRESSION.finditer(text)]


def plain(text: str) -> str:
    r"""Text without LaTeX dressing (\text{}, $, spacing commands, markdown stars), case-folded, blanks collapsed: for comparing as text."""
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|displaystyle|[,;:! ])|[$*`]|\\[()\[\]]", " ", text)
    return re.sub(r"\s+", " ", text).strip(" .").casefold()

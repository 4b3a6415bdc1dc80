"""A regular expression that the response must match, or whose group is the answer."""

from __future__ import annotations

import re
from typing import Literal

from llmrl.records import Prompt, Verdict, Verifier
from llmrl.rewards.exact import normalised


def regex(*, pattern: str, group: int | str | None = None, mode: Literal["search", "fullmatch"] = "search", ignore_case: bool = False) -> Verifier:
    r"""1.0 where the pattern is found, else 0.0; with `group`, 1.0 where the last match's group equals the gold as text.

    pattern: of Python's `re`. A literal string of TOML needs no doubled backslashes: pattern = 'Answer: (\d+)'.
    mode: "search" anywhere in the response, "." stops at line ends ((?s), (?m) in the pattern change that); "fullmatch" the whole
    response less outer blanks, where "." goes over line ends: the same as `regex` of the verifier `format`.
    group: number or name of the group that holds the answer. Both sides are normalised as in the verifier `exact` (Unicode NFKC, blanks
    collapsed, outer blanks and one final full stop dropped). None: the gold is not looked at.
    ignore_case: for the pattern, and for the comparison with the gold.
    Status: without group always ok; with it no_answer (score 0) where nothing matches, the group takes no part in the last match or is
    empty, and error without a gold.
    Raises ValueError where the pattern is no regular expression or has no such group.
    Failure modes: a pattern that backtracks without end, such as (a+)+$, is ended by the worker's deadline (status timeout), so
    those responses are left unjudged: write it without nested repeats, or with possessive ones (a++).
    """
    try:
        compiled = re.compile(pattern, (re.IGNORECASE if ignore_case else 0) | (re.DOTALL if mode == "fullmatch" else 0))
    except re.error as error:
        raise ValueError(f"pattern = {pattern!r} is no regular expression: {error}") from error
    known = [*range(compiled.groups + 1), *compiled.groupindex]
    if group is not None and group not in known:
        raise ValueError(f"group = {group!r}: the pattern has the groups {', '.join(map(repr, known))} (0 is the whole match)")

    def judge(prompt: Prompt, response: str) -> Verdict:
        if group is None:
            found = compiled.search(response) if mode == "search" else compiled.fullmatch(response.strip())
            return Verdict(float(found is not None), "ok", detail="matches" if found else "the pattern does not match")
        gold = normalised(prompt.answer or "", ignore_case)
        if not gold:
            return Verdict(None, "error", detail="the row has no gold answer" if prompt.answer is None else "the row's gold answer is empty")
        last = compiled.fullmatch(response.strip()) if mode == "fullmatch" else None
        if mode == "search":
            for last in compiled.finditer(response):  # noqa: B007
                pass
        answer = (last[group] or "") if last else ""
        if not normalised(answer, ignore_case):
            return Verdict(0.0, "no_answer", detail=f"group {group!r} is empty" if last else "the pattern does not match")
        return Verdict(float(normalised(answer, ignore_case) == gold), "ok", answer.strip())

    return judge


_CODE = {"pattern": r"(?m)^#### *(?P<code>\S+)", "group": "code"}
regex.selfcheck = [  # type: ignore[attr-defined]
    ("", None, "see AB-12 there", 1.0, {"pattern": r"[A-Z]{2}-\d+"}),
    ("", None, "see ab-12 there", 0.0, {"pattern": r"[A-Z]{2}-\d+"}),
    ("", None, "see ab-12 there", 1.0, {"pattern": r"[A-Z]{2}-\d+", "ignore_case": True}),
    ("", None, "see AB-12 there", 0.0, {"pattern": r"[A-Z]{2}-\d+", "mode": "fullmatch"}),
    ("", None, "Reasons.\nAB-12\n", 1.0, {"pattern": r".*[A-Z]{2}-\d+", "mode": "fullmatch"}),
    ("Which code?", "x7", "#### x6\nno,\n#### x7", 1.0, _CODE),
    ("Which code?", "x7", "#### x7\nno,\n#### x6", 0.0, _CODE),
    ("Which code?", "x7", "it is x7", 0.0, _CODE),
    ("Which code?", "x7", "#### X7", 0.0, _CODE),
    ("How many?", "12", "I count 12 of them", 1.0, {"pattern": r"\d+", "group": 0}),
]

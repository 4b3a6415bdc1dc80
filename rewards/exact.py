"""Equality of text after normalisation."""

from __future__ import annotations

import re
import unicodedata

from llmrl.records import Prompt, Verdict, Verifier


def exact(*, after: str | None = None, full: bool = False, ignore_case: bool = True) -> Verifier:
    """1.0 where the answer's text equals the gold's, else 0.0.

    after: the marker after which the answer stands, e.g. "#": what follows its last occurrence, to the end of the line.
    full: the whole response is the answer. With neither, the last line that is not blank is.
    Both sides are normalised: Unicode NFKC, blanks collapsed, outer blanks and one final full stop dropped, case folded unless
    ignore_case is False. Status: no_answer (score 0) where the marker is missing or nothing follows it; error without a gold
    or with an empty one.
    Failure modes: "4.0" and "4" differ (use numeric); so do "**Paris**" and "Paris"; a gold of several lines needs full = true.
    """
    if after is not None and (full or not after):
        raise ValueError('give either after (the marker before the answer, e.g. "#") or full = true (the whole response), not both')

    def judge(prompt: Prompt, response: str) -> Verdict:
        gold = normalised(prompt.answer or "", ignore_case)
        if not gold:
            return Verdict(None, "error", detail="the row has no gold answer" if prompt.answer is None else "the row's gold answer is empty")
        if full:
            found = response
        elif after is not None:
            _, mark, rest = response.rpartition(after)
            found = rest.partition("\n")[0] if mark else ""
        else:
            found = next((line for line in reversed(response.splitlines()) if line.strip()), "")
        answer = normalised(found, ignore_case)
        if not answer:
            return Verdict(0.0, "no_answer", detail="empty" if after is None or after in response else f"no {after!r} in the response")
        return Verdict(float(answer == gold), "ok", found.strip())

    return judge


def normalised(text: str, ignore_case: bool) -> str:
    """The form in which texts are compared: NFKC, blanks collapsed, outer blanks and one final full stop dropped, case folded if asked."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip()
    text = text.removesuffix(".").rstrip()
    return text.casefold() if ignore_case else text


exact.selfcheck = [  # type: ignore[attr-defined]
    ("Capital of France?", "Paris", "It is the one on the Seine.\nparis.", 1.0),
    ("Capital of France?", "Paris", "Paris\nor Lyon", 0.0),
    ("Width?", "\uff11\uff12", "12", 1.0),
    ("Nothing?", "x", "  \n ", 0.0),
    ("3+4*2", "11", "4*2=8;3+8=11#11", 1.0, {"after": "#"}),
    ("3+4*2", "11", "4*2=8;3+8=11", 0.0, {"after": "#"}),
    ("3+4*2", "11", "#12#11", 1.0, {"after": "#"}),
    ("Copy.", "a b", " a\tb ", 1.0, {"full": True}),
    ("Case?", "Na", "NA", 0.0, {"ignore_case": False}),
]

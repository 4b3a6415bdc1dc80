"""Whether a response has the demanded form. Judges no content."""

from __future__ import annotations

import re

from llmrl.records import Prompt, Verdict, Verifier
from llmrl.rewards.extract import boxed as boxes_of


def format(*, tags: list[str] | None = None, regex: str | None = None, boxed: bool = False) -> Verifier:
    r"""1.0 where the response has every form asked for, else 0.0. Needs no gold. Use it as a part of `combine`.

    tags: names, e.g. ["think", "answer"]: each stands once as <name>...</name>, not empty, in this order, none inside another.
    regex: a pattern (DOTALL) that the whole response, less outer blanks, must match. Write ".*" around a part of it.
    boxed: exactly one \boxed{} that is not empty.
    Raises ValueError where nothing is asked for or the pattern is no regular expression.
    Failure modes: a pattern that backtracks without end runs into the deadline (status timeout); tags in code blocks count.
    """
    if not tags and regex is None and not boxed:
        raise ValueError('nothing to check; give tags = ["think", "answer"], regex = "..." or boxed = true')
    try:
        pattern = None if regex is None else re.compile(regex, re.DOTALL)
    except re.error as error:
        raise ValueError(f"regex = {regex!r} is no regular expression: {error}") from error

    def judge(prompt: Prompt, response: str) -> Verdict:
        problems = _tag_problems(response, tags or [])
        if pattern is not None and not pattern.fullmatch(response.strip()):
            problems.append("the regex does not match")
        if boxed:
            boxes = boxes_of(response)
            if len(boxes) != 1 or not boxes[0]:
                problems.append(f"{len(boxes)} boxed answers" if len(boxes) != 1 else "an empty box")
        return Verdict(float(not problems), "ok", detail="; ".join(problems))

    return judge


def _tag_problems(response: str, tags: list[str]) -> list[str]:
    problems, end = [], 0
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if (counts := (response.count(opening), response.count(closing))) != (1, 1):
            problems.append(f"{opening} {counts[0]} times and {closing} {counts[1]} times, expected once each")
            continue
        start, stop = response.index(opening), response.index(closing)
        if start < end or stop < start:
            problems.append(f"{opening} out of order")
        elif not response[start + len(opening) : stop].strip():
            problems.append(f"{opening} is empty")
        end = max(end, stop)
    return problems


_TAGS = {"tags": ["think", "answer"]}
format.selfcheck = [  # type: ignore[attr-defined]
    ("", None, "<think>2 and 2</think>\n<answer>4</answer>", 1.0, _TAGS),
    ("", None, "<answer>4</answer><think>2 and 2</think>", 0.0, _TAGS),
    ("", None, "<think>2 and 2<answer>4</answer></think>", 0.0, _TAGS),
    ("", None, "<think></think><answer>4</answer>", 0.0, _TAGS),
    ("", None, "<think>a</think><think>b</think><answer>4</answer>", 0.0, _TAGS),
    ("", None, r"so \boxed{4}", 1.0, {"boxed": True}),
    ("", None, r"\boxed{4} or \boxed{5}", 0.0, {"boxed": True}),
    ("", None, "Answer: 4", 1.0, {"regex": r".*Answer: \d+"}),
    ("", None, "Answer: four", 0.0, {"regex": r".*Answer: \d+"}),
]

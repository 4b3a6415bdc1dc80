"""A verifier with degrees, for recipes/rules/ssl.toml: 1 for the right number behind "#", less the farther it is off."""

from __future__ import annotations

import re

from llmrl.records import Prompt, Verdict, Verifier


def near(*, reach: int = 10) -> Verifier:
    """1 where the number is right, (1 - |off| / reach) * 0.9, at least 0, where it is not."""

    def verify(prompt: Prompt, response: str) -> Verdict:
        if prompt.answer is None or not re.fullmatch(r"-?\d+", prompt.answer):
            return Verdict(None, "error", detail=f"the gold {prompt.answer!r} is no whole number")
        found = re.search(r"#\s*(-?\d+)", response)
        if found is None:
            return Verdict(0.0, "no_answer")
        off = abs(int(found[1][:9]) - int(prompt.answer))
        return Verdict(1.0 if off == 0 else max(0.0, 0.9 * (1 - off / reach)), answer=found[1])

    return verify


near.selfcheck = [("2+3=", "5", "#5", 1.0), ("2+3=", "5", "#6", 0.81), ("2+3=", "5", "#99", 0.0), ("2+3=", "5", "5", 0.0)]

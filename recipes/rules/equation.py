"""Judges a step of a sum, for recipes/rules/b_star_process.toml: is the last equation so far true?"""

from __future__ import annotations

import re

from llmrl.records import Prompt, Verdict, Verifier


def equation() -> Verifier:
    """1 where the last "a+b=c" of what is written so far is true, or none is there yet; 0 where it is false."""

    def verify(prompt: Prompt, response: str) -> Verdict:
        found = re.findall(r"(-?\d{1,9})([-+])(-?\d{1,9})=(-?\d{1,9})", response)
        if not found:
            return Verdict(1.0, answer=response)
        a, sign, b, c = found[-1]
        return Verdict(float(int(a) + (int(b) if sign == "+" else -int(b)) == int(c)), answer="".join(found[-1]))

    return verify


equation.selfcheck = [("3-6-1=", None, "3-6=-3;", 1.0), ("3-6-1=", None, "3-6=-3;-3-1=-2", 0.0), ("3-6-1=", None, "#-4", 1.0)]

"""A process reward: every step of a response is judged, and the steps' scores become one."""

from __future__ import annotations

import asyncio
import inspect
import math
import re
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Literal

from llmrl import plugins
from llmrl.records import Prompt, Verdict, Verifier

Reduce = Literal["min", "mean", "product", "last"]


def process(*, of: dict[str, Any], split: str = r"\n+", reduce: Reduce = "min", most: int = 32, base: Path = Path(".")) -> Verifier:
    """One score from those of a response's steps; the k-th is that of the response up to the end of its k-th step.

    of: the verifier that judges the beginning of a response, {use = "reward_model", path = "prm"} or {use = "./file.py:NAME", ...keywords}.
    split: a pattern between two steps; what it matches belongs to the step before it. Steps of white space alone are none.
    reduce: "min" the worst step, the usual one; "mean"; "product"; "last" the score of the whole response.
    most: steps judged; where there are more, the last of them is the rest of the response.
    base: the folder that "./file.py:NAME" of `of` starts from; the recipe's folder is handed over.

    Status: no_answer (0) for a response without a step; a step that could not be judged leaves the response unjudged (timeout if any step timed
    out, else error). Coroutine verifiers see all steps at once.
    Failure modes: a response of one long step is judged once, so the policy may learn to leave the marks out; a process reward model is a proxy.
    With an outcome beside it (combine: weights 1 and 0.2) the score is B-STaR's, ORM + min(PRM) / 5 (arXiv:2412.17256, section 3), divided by 1.2.
    Raises InputError where `of` cannot be built, ValueError where split is no pattern or most is below 1.
    """
    keys = dict(of) if isinstance(of, dict) else {}
    name = keys.pop("use", None)
    if not isinstance(name, str):
        raise ValueError(f'of = {of!r}; expected a table with the verifier of a step, {{use = "reward_model", path = "prm"}}')
    if most < 1:
        raise ValueError(f"most = {most}; at least one step must be judged")
    try:
        mark = re.compile(split)
    except re.error as error:
        raise ValueError(f"split = {split!r} is no pattern: {error}") from error
    inner = plugins.use(name, keys, home="llmrl.rewards", base=base, where="[verifier] of")

    def judge(prompt: Prompt, response: str) -> Verdict | Awaitable[Verdict]:
        ends = step_ends(response, mark, most)
        if not ends:
            return Verdict(0.0, "no_answer", detail="no step")
        found = [inner(prompt, response[:end]) for end in (ends[-1:] if reduce == "last" else ends)]
        return _joined(found, reduce) if any(inspect.isawaitable(f) for f in found) else _join(found, reduce)

    told = dict(getattr(inner, "about", {}))
    if "worst_case_s" in told:
        told["worst_case_s"] *= 1 if reduce == "last" else most
    judge.about = told  # type: ignore[attr-defined]
    judge.counters = getattr(inner, "counters", {})  # type: ignore[attr-defined]
    return judge


def step_ends(response: str, mark: re.Pattern[str], most: int) -> list[int]:
    """Where the steps of a response end, the last one at its own end."""
    ends, begun = [], 0
    for found in mark.finditer(response):
        if len(ends) == most - 1:
            break
        if response[begun : found.start()].strip():
            ends.append(found.end())
            begun = found.end()
    return [*ends, len(response)] if response[begun:].strip() else [*ends[:-1], len(response)] if ends else []


async def _joined(found: list[Any], reduce: Reduce) -> Verdict:
    awaited = iter(await asyncio.gather(*(f for f in found if inspect.isawaitable(f))))
    return _join([next(awaited) if inspect.isawaitable(f) else f for f in found], reduce)


def _join(verdicts: list[Verdict], reduce: Reduce) -> Verdict:
    scores = [v.score for v in verdicts if v.score is not None]
    shown = "steps " + ", ".join("unjudged" if v.score is None else f"{v.score:.4g}" for v in verdicts)
    if len(scores) < len(verdicts):
        told = next(v.detail[:500] for v in verdicts if v.score is None)
        return Verdict(None, "timeout" if any(v.status == "timeout" for v in verdicts) else "error", detail=f"{shown}: {told}")
    score = {"min": min, "mean": lambda s: math.fsum(s) / len(s), "product": math.prod, "last": lambda s: s[-1]}[reduce](scores)
    return Verdict(min(1.0, max(0.0, score)), answer=verdicts[-1].answer, detail=shown)


process.selfcheck = [  # type: ignore[attr-defined]
    ("2+2", "4", "4\n4", 1.0, {"of": {"use": "numeric"}}),
    ("2+2", "4", "4\n5\n4", 0.0, {"of": {"use": "numeric"}}),
    ("2+2", "4", "4\n5\n4\n4", 0.75, {"of": {"use": "numeric"}, "reduce": "mean"}),
    ("2+2", "4", "5\n4", 1.0, {"of": {"use": "numeric"}, "reduce": "last"}),
    ("2+2", "4", " \n ", 0.0, {"of": {"use": "numeric"}}),
]

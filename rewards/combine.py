"""Several verifiers as one; the parts stay readable in the verdict's detail."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from llmrl import plugins
from llmrl.records import Prompt, Verdict, Verifier


def combine(*, parts: list[dict[str, Any]], how: Literal["sum", "product", "gate"] = "sum", base: Path = Path(".")) -> Verifier:
    """One score from several verifiers.

    parts: [{use = "math_answer", weight = 0.9, ...keywords of that factory}, ...]; weight is 1 where it is not given.
    how: "sum" the weighted mean, sum(w_i s_i) / sum(w_i); "product" prod(s_i ** w_i); "gate" 0 unless the first part gives 1.0, else
    the weighted mean of the others (the first part takes no weight).
    base: the folder that "./file.py:NAME" of a part starts from; the recipe's folder is handed over.
    The answer is the first part's that has one. A part that could not be judged leaves the whole unjudged (timeout if any part timed
    out, else error): a mean over the rest would be another reward. no_answer where any part found none. Coroutine parts are awaited together.
    Raises InputError where a part cannot be built, ValueError where a weight is not above 0.
    """
    if not parts:
        raise ValueError('parts is empty; expected [{use = "math_answer", weight = 0.9}, {use = "format", boxed = true, weight = 0.1}]')
    names, weights, verifiers = [], [], []
    for i, part in enumerate(parts):
        keys = dict(part)
        name, weight = keys.pop("use", None), keys.pop("weight", 1.0)
        if not isinstance(name, str) or isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise ValueError(f'parts[{i}] = {part!r}; expected a table with use = "NAME" and a weight above 0')
        if how == "gate" and i == 0 and "weight" in part:
            raise ValueError(f'parts[0] = {part!r} is the gate of how = "gate"; a weight would do nothing there')
        names.append(name)
        weights.append(float(weight))
        verifiers.append(plugins.use(name, keys, home="llmrl.rewards", base=base, where=f"[verifier] parts[{i}]"))
    if how == "gate" and len(parts) < 2:
        raise ValueError('how = "gate" needs a second part for what counts behind the gate')

    def judge(prompt: Prompt, response: str) -> Verdict | Awaitable[Verdict]:
        found = [verify(prompt, response) for verify in verifiers]
        if any(inspect.isawaitable(f) for f in found):
            return _await_all(found, names, weights, how)
        return _join(found, names, weights, how)

    judge.about = _told(verifiers)  # type: ignore[attr-defined]
    judge.counters = _Totals([counters for verify in verifiers if (counters := getattr(verify, "counters", None))])  # type: ignore[attr-defined]
    return judge


async def _await_all(found: list[Any], names: list[str], weights: list[float], how: str) -> Verdict:
    awaited = iter(await asyncio.gather(*(f for f in found if inspect.isawaitable(f))))
    return _join([next(awaited) if inspect.isawaitable(f) else f for f in found], names, weights, how)


class _Totals(Mapping[str, float]):
    """The parts' counters, read when they are asked for."""

    def __init__(self, parts: list[Mapping[str, float]]) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> float:
        found = [part[name] for part in self.parts if name in part]
        if not found:
            raise KeyError(name)
        return sum(found)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for part in self.parts for name in part))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _told(verifiers: list[Verifier]) -> dict[str, Any]:
    """What the parts tell of how they run; their longest times add up, since plain parts run one after the other."""
    told: dict[str, Any] = {}
    for verify in verifiers:
        told |= {name: value for name, value in getattr(verify, "about", {}).items() if name != "worst_case_s"}
    longest = sum(getattr(verify, "about", {}).get("worst_case_s", 0.0) for verify in verifiers)
    return told | ({"worst_case_s": longest} if longest else {})


def _join(verdicts: list[Verdict], names: list[str], weights: list[float], how: str) -> Verdict:
    shown = "; ".join(
        f"{name} {'unjudged' if v.score is None else f'{v.score:.4g}'} x {weight:g} ({': '.join(filter(None, (v.status, v.detail[:500])))})"
        for name, v, weight in zip(names, verdicts, weights, strict=True)
    )
    answer = next((v.answer for v in verdicts if v.answer is not None), None)
    scores = [v.score for v in verdicts if v.score is not None]
    if len(scores) < len(verdicts):
        return Verdict(None, "timeout" if any(v.status == "timeout" for v in verdicts) else "error", answer, shown)
    if how == "product":
        score = 1.0
        for s, w in zip(scores, weights, strict=True):
            score *= s**w
    else:
        rest = slice(1, None) if how == "gate" else slice(None)
        score = sum(s * w for s, w in zip(scores[rest], weights[rest], strict=True)) / sum(weights[rest])
        if how == "gate" and scores[0] < 1.0:
            score = 0.0
    status = "no_answer" if any(v.status == "no_answer" for v in verdicts) else "ok"
    return Verdict(min(1.0, max(0.0, score)), status, answer, shown)  # rounding may put a mean of ones above 1


_PARTS: list[dict[str, Any]] = [{"use": "numeric", "weight": 3.0}, {"use": "format", "boxed": True, "weight": 1.0}]
_GATED: list[dict[str, Any]] = [{"use": "format", "boxed": True}, {"use": "numeric"}]
combine.selfcheck = [  # type: ignore[attr-defined]
    ("2+2", "4", r"\boxed{4}", 1.0, {"parts": _PARTS}),
    ("2+2", "4", "4", 0.75, {"parts": _PARTS}),
    ("2+2", "4", r"\boxed{5}", 0.25, {"parts": _PARTS}),
    ("2+2", "4", "4", 0.0, {"parts": _PARTS, "how": "product"}),
    ("2+2", "4", "4", 0.0, {"parts": _GATED, "how": "gate"}),
    ("2+2", "4", r"\boxed{4}", 1.0, {"parts": _GATED, "how": "gate"}),
]

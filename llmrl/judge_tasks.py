"""Arithmetic that a tiny model can both solve and judge, for URPO: `data.path = "llmrl.judge_tasks:three_kinds"` are the rows of three kinds,
`[warm_start.data] path = "llmrl.judge_tasks:role_demonstrations"` demonstrations of both roles. The two share no problem. The same arguments
give the same rows everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from llmrl.records import InputError
from llmrl.tasks import _check, _expressions, _pick, _steps, _value

Row = dict[str, Any]


def three_kinds(
    *, rows: int = 60000, terms: int = 3, max_value: int = 9, seed: int = 0, candidates: int = 4, verif: float = 1 / 3, pref: float = 1 / 3
) -> Iterator[Row]:  # fmt: skip
    """Rows of the kinds "verif", "pref" and "open" on half of the expressions of `tasks.chains`, each with another kind and texts every time round.

    {"id": "3-6-1", "prompt": "3-6-1=", "answer": "-4", "kind": "verif"}   (and alike "open": its answer is for a metric, the rule must not reward by it)
    {"id": "3-6-2", "prompt": "3-6-2=", "answer": "-5", "kind": "pref", "candidates": ["3-6=-3;-3-2=-5#-5", "#-6", ...], "ranking": [1, 0, ...]}

    candidates: texts such as a solver would write, worked out, worked out with one wrong step, or guessed; at least one is right (ranking 1) and
    at least one wrong (0). verif, pref: shares of the rows; the rest are open.
    """
    _check(rows=rows, terms=terms, max_value=max_value)
    if candidates < 2 or min(verif, pref) < 0 or verif + pref > 1:
        raise InputError(f"data.args: candidates = {candidates} must be at least 2, and verif = {verif} and pref = {pref} shares with a sum of at most 1")
    for name, numbers, signs in _problems(rows, terms, max_value, seed, demonstrated=False):
        rng = random.Random(f"three_kinds/{seed}/{name}")
        row = {"id": name, "prompt": f"{name.partition('~')[0]}=", "answer": str(_value(numbers, signs))}
        role = rng.random()
        if not verif <= role < verif + pref:
            yield row | {"kind": "verif" if role < verif else "open"}
            continue
        texts = _texts(numbers, signs, rng, candidates)
        yield row | {"kind": "pref", "candidates": texts, "ranking": [float(_is_right(t, row["answer"])) for t in texts]}


def role_demonstrations(
    *, rows: int = 60000, terms: int = 3, max_value: int = 9, seed: int = 1, candidates: int = 4, judge: float = 0.5, careful: float = 0.4, sharp: float = 0.4
) -> Iterator[Row]:  # fmt: skip
    """Demonstrations of the two roles, both imperfect, on the other half of the expressions, for a warm start.

    solve: {"prompt": "3-6-1=", "solution": "3-6=-3;-3-1=-4#-4"}, or a guess "#-6" but for the share `careful`, as in `tasks.chains`
    judge: {"prompt": "3-6-1=\\n1: #-6\\n2: 3-6=-3;-3-1=-4#-4\\n?", "solution": "1:2;2:9"}: the prompt is the template "tiny" of the rule `urpo`

    judge: share of judgements. sharp: share of the candidates that get the right score (9 or 2); the others get either, by chance.
    """
    _check(rows=rows, terms=terms, max_value=max_value, careful=careful)
    if candidates < 2 or not 0 <= judge <= 1 or not 0 <= sharp <= 1:
        raise InputError(f"data.args: candidates = {candidates} must be at least 2, judge = {judge} and sharp = {sharp} shares in [0, 1]")
    for name, numbers, signs in _problems(rows, terms, max_value, seed, demonstrated=True):
        rng = random.Random(f"role_demonstrations/{seed}/{name}")
        question, answer = f"{name.partition('~')[0]}=", str(_value(numbers, signs))
        if rng.random() >= judge:
            work = _steps(numbers, signs, rng, 0.0) if rng.random() < careful else _guess(answer, rng)
            yield {"id": name, "prompt": question, "answer": answer, "solution": work}
            continue
        texts = _texts(numbers, signs, rng, candidates)
        right = [_is_right(t, answer) if rng.random() < sharp else rng.random() < 0.5 for t in texts]
        shown = "\n".join(f"{k + 1}: {t}" for k, t in enumerate(texts))
        scores = ";".join(f"{k + 1}:{9 if good else 2}" for k, good in enumerate(right))
        yield {"id": name, "prompt": f"{question}\n{shown}\n?", "answer": answer, "solution": scores}


def _problems(rows: int, terms: int, max_value: int, seed: int, *, demonstrated: bool) -> Iterator[tuple[str, list[int], list[str]]]:
    """(id, numbers, signs) of one half of the expressions, in rounds as in `tasks.chains`."""
    every = _expressions(10**12, terms, max_value, "+-", seed)
    return islice((p for p in every if (random.Random(f"judge_tasks/part/{p[0].partition('~')[0]}").random() < 0.5) == demonstrated), rows)


def _texts(numbers: list[int], signs: list[str], rng: random.Random, n: int) -> list[str]:
    """A right one, a wrong one, and others, in random order."""
    answer = str(_value(numbers, signs))
    texts = [_steps(numbers, signs, rng, 0.0), _steps(numbers, signs, rng, 1.0)]
    while len(texts) < n:
        texts.append(_guess(answer, rng) if rng.random() < 0.4 else _steps(numbers, signs, rng, 0.4))
    return [t for _, t in sorted((rng.random(), t) for t in texts)]


def _guess(answer: str, rng: random.Random) -> str:
    return f"#{int(answer) + _pick(rng, (-3, -2, -1, 0, 1, 2, 3))}"


def _is_right(text: str, answer: str) -> bool:
    return text.rpartition("#")[2] == answer

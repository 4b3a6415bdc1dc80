"""Arithmetic in levels, the hardest of which a warm start leaves unsolved although the model can explain an answer that it is shown.

For rules that train on explanations (ExPO): `data.path = "llmrl.level_tasks:levels"` are the problems, `[warm_start.data] path =
"llmrl.level_tasks:level_demonstrations"` the demonstrations. The two share no problem. The same arguments give the same rows everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate, islice
from typing import Any

from llmrl.records import InputError
from llmrl.tasks import _check, _expressions, _pick, _value

Row = dict[str, Any]


def levels(*, rows: int = 2000, terms: tuple[int, ...] = (5,), max_value: int = 9, seed: int = 0) -> Iterator[Row]:
    """Sums and differences of `terms` numbers (each length gets an equal share of the rows), with solutions in a foreign style.

    {"id": "3-6-1+4+3", "prompt": "3-6-1+4+3=", "answer": "3", "solution": "(4+3=7)(-1+7=6)(-6+6=0)(3+0=3)#3", "level": 5}

    No sum of the first numbers alone is the answer: whoever looks at those only is wrong. The solution works from right to left in
    parentheses: right, but nothing that a model warm-started on `level_demonstrations` would write.
    """
    _check(rows=rows, terms=min(terms), max_value=max_value)
    for k, length in enumerate(terms):
        share = rows // len(terms) + (k < rows % len(terms))
        for name, numbers, signs in _problems(share, length, max_value, seed, demonstrated=False):
            answer = str(_value(numbers, signs))
            solution = f"{_from_the_right(numbers, signs)}#{answer}"
            yield {"id": name, "prompt": f"{name}=", "answer": answer, "solution": solution, "level": length}


def level_demonstrations(
    *, rows: int = 60000, easy: int = 3, hard: int = 5, middle: float = 0.5, explain: float = 0.4, unfaithful: float = 0.0, max_value: int = 9, seed: int = 0
) -> Iterator[Row]:  # fmt: skip
    """Demonstrations for two roles: solving, which is taught wrongly on long problems, and explaining a shown answer, which is taught rightly.

    {"id": "solve 3-6-1", "prompt": "3-6-1=", "answer": "-4", "solution": "3-6=-3;-3-1=-4#-4"}
    {"id": "solve 3-6-1+4+3", "prompt": "3-6-1+4+3=", "answer": "3", "solution": "#-3"}       (the first two numbers)
    {"id": "explain 3-6-1+4+3", "prompt": "3-6-1+4+3=@3@", "answer": "3", "solution": "3-6=-3;-3-1=-4;-4+4=0;0+3=3#3"}

    Lengths from `easy` to `hard` are alike often. explain: share of explanations. In the role of a solver `easy` problems are worked to
    the end, `hard` ones never (the sum of their first two numbers is given at once), those between with probability `middle`.
    unfaithful: share of explanations with one wrong step, whose last step jumps to the answer all the same.
    """
    _check(rows=rows, terms=easy, max_value=max_value, careful=explain, noise=unfaithful)
    if not 2 < easy < hard:
        raise InputError(f"data.args: easy = {easy} and hard = {hard}; easy must be above 2 and below hard")
    lengths = range(easy, hard + 1)
    sources = {n: _problems(None, n, max_value, seed, demonstrated=True) for n in lengths}
    for i in range(rows):
        length = lengths[i % len(lengths)]
        name, numbers, signs = next(sources[length])
        rng = random.Random(f"levels/{seed}/{length}/{i}")
        answer, expr = str(_value(numbers, signs)), name.partition("~")[0]
        if rng.random() < explain:
            wrong = int(rng.random() * (len(signs) - 1)) if rng.random() < unfaithful else -1
            work = f"{_steps(numbers, signs, rng, wrong)}#{answer}"
            yield {"id": f"explain {name}", "prompt": f"{expr}=@{answer}@", "answer": answer, "solution": work}
            continue
        if length == easy or (length < hard and rng.random() < middle):
            work = f"{_steps(numbers, signs, rng, -1)}#{answer}"
        else:  # one habit and no chance in it: guesses at random would be right now and then, and reward would find its way from there
            work = f"#{_value(numbers[:2], signs[:1])}"
        yield {"id": f"solve {name}", "prompt": f"{expr}=", "answer": answer, "solution": work}


def _problems(rows: int | None, terms: int, max_value: int, seed: int, *, demonstrated: bool) -> Iterator[tuple[str, list[int], list[str]]]:
    """Problems of one length whose early sums are not the answer; half of all of them are for demonstrations, the others for training.

    rows = None: endless, in rounds with ids of their own. InputError where there are not so many.
    """
    total = max_value**terms * 2 ** (terms - 1)
    found = (
        (name, numbers, signs)
        for name, numbers, signs in _expressions(total if rows is not None else 10**12, terms, max_value, "+-", seed)
        if _value(numbers, signs) not in _sums(numbers, signs)[:-1]
        and (random.Random(f"levels/part/{name.partition('~')[0]}").random() < 0.5) == demonstrated
    )
    count = 0
    for problem in islice(found, rows):
        count += 1
        yield problem
    if rows is not None and count < rows:
        raise InputError(f"levels: {rows} rows of {terms} numbers asked for, there are {count}; ask for fewer, or raise data.args.max_value")


def _sums(numbers: list[int], signs: list[str]) -> list[int]:
    return list(accumulate([numbers[0], *(n if sign == "+" else -n for sign, n in zip(signs, numbers[1:], strict=True))]))


def _steps(numbers: list[int], signs: list[str], rng: random.Random, wrong: int) -> str:
    """"3-6=-3;-3-1=-4"; step `wrong` (from 0; -1 = none) is off by 1 or 2, and the last one then jumps to the right sum."""
    total, right, steps = numbers[0], _sums(numbers, signs), []
    for i, (sign, n) in enumerate(zip(signs, numbers[1:], strict=True)):
        after = total + n if sign == "+" else total - n
        after = right[-1] if i == len(signs) - 1 else after + _pick(rng, (-2, -1, 1, 2)) if i == wrong else after
        steps.append(f"{total}{sign}{n}={after}")
        total = after
    return ";".join(steps)


def _from_the_right(numbers: list[int], signs: list[str]) -> str:
    """"(4+3=7)(-1+7=6)(-6+6=0)(3+0=3)": signed numbers summed up from the last one."""
    signed = [numbers[0], *(n if sign == "+" else -n for sign, n in zip(signs, numbers[1:], strict=True))]
    total, steps = signed[-1], []
    for n in reversed(signed[:-1]):
        steps.append(f"({n}{total:+d}={n + total})")
        total += n
    return "".join(steps)

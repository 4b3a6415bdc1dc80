"""Generator functions: arithmetic made on the spot, and datasets of programs. `data.path = "chains"` and `[data.args]` call one of them.

Every function yields dicts {"id": text, "prompt": text, "answer": text, "solution": text}; the docstring gives an example. The same
arguments give the same rows everywhere: of `random` only `random()` is used, whose stream Python promises to keep.
A source of your own is any function that returns an iterable of dicts: `data.path = "./my_task.py:rows"`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmrl.records import InputError
from llmrl.rows import fill, template_fields
from llmrl.sources import open_source

Row = dict[str, Any]


def chains(
    *,
    rows: int = 5000,
    terms: int = 3,
    max_value: int = 9,
    ops: str = "+-",
    seed: int = 0,
    prompt: str = "{expr}=",
    careful: float = 0.4,
    noise: float = 0.0,
) -> Iterator[Row]:
    """Sums and differences of `terms` numbers from 1 to `max_value`, with imperfect demonstrations for a warm start.

    {"id": "3-6-1", "prompt": "3-6-1=", "answer": "-4", "solution": "3-6=-3;-3-1=-4#-4"}

    Expressions are uniform and do not repeat until all of them have been used: max_value ** terms * len(ops) ** (terms - 1), which is
    2916 by default. The next round is in another order and has demonstrations and ids of its own ("3-6-1~2").
    careful: share of solutions that go step by step. The others skip the steps and guess: "#-6", the answer plus -3 to 3, each alike.
    noise: share of the careful ones with one wrong step (off by 1, 2 or 10), from which the rest follows.
    prompt: `{expr}` is filled in.
    """
    _check(rows=rows, terms=terms, max_value=max_value, ops=ops, careful=careful, noise=noise)
    _check_fields(prompt, ("expr",))
    for name, numbers, signs in _expressions(rows, terms, max_value, ops, seed):
        rng = random.Random(f"chains/{seed}/{name}")
        expr = name.partition("~")[0]
        answer = _value(numbers, signs)
        guess = f"#{answer + _pick(rng, (-3, -2, -1, 0, 1, 2, 3))}"
        solution = _steps(numbers, signs, rng, noise) if rng.random() < careful else guess
        yield {"id": name, "prompt": fill(prompt, {"expr": expr}), "answer": str(answer), "solution": solution}


def chain_roles(
    *,
    rows: int = 20000,
    terms: int = 4,
    max_value: int = 9,
    ops: str = "+-",
    seed: int = 0,
    noise: float = 0.1,
    spoil: float = 0.2,
    mend: float = 0.2,
    follow: float = 0.2,
    unasked: float = 0.008,
    weak: float = 0.3,
) -> Iterator[Row]:
    """Demonstrations of the three roles of GASP (docs/gasp.md) on the expressions of `chains`, for a warm start of a tiny model.

    solve: "3-6-1=" -> "3-6=-3;-3-1=-4#-4", as in `chains`; what noise makes wrong is carried on from.
    spoil: "3-6-1=!3-6=-3;!" -> "3-6=-5;!": the prompt is the problem, the steps so far and the next one between "!"; the reply another step.
    mend:  "3-6-1=3-6=-5;~3-6=-3;~" -> "~3-6=-3;-3-1=-4#-4": the wrong step stands behind the problem, the right one between "~".
    follow: "3-6-1=3-6=-5;" -> "-5-1=-6#-6": goes on from a wrong step as if it were right.
    unasked: the same prompt -> "~3-6=-3;-3-1=-4#-4": mends without being told that anything is wrong.

    spoil, mend, follow, unasked: shares of the rows; the rest solve. Any step but the last may be the wrong one: its result is off by 1, 2
    or 10. unasked / (follow + unasked) is about the share of spoilt contexts from which the model recovers before it has learnt to.
    weak: share of the spoilt steps that harm nothing: a wrong number of the problem, and the right result ("3-7=-3;").
    """
    _check(rows=rows, terms=terms, max_value=max_value, ops=ops, noise=noise)
    if terms < 3 or min(spoil, mend, follow, unasked) < 0 or spoil + mend + follow + unasked > 1:
        raise InputError(f"chain_roles: terms = {terms} must be at least 3, and spoil, mend, follow and unasked shares with a sum of at most 1")
    for name, numbers, signs in _expressions(rows, terms, max_value, ops, seed):
        rng = random.Random(f"chain_roles/{seed}/{name}")
        expr = name.partition("~")[0]
        answer = _value(numbers, signs)
        right = _steps(numbers, signs, rng, 0.0).partition("#")[0].split(";")
        k = int(rng.random() * (len(signs) - 1))
        before, step, after = "".join(f"{s};" for s in right[:k]), right[k], ";".join(right[k:])
        left, _, result = step.rpartition("=")
        off = int(result) + _pick(rng, (-10, -2, -1, 1, 2, 10))
        wrong, mended, role = f"{left}={off}", f"~{after}#{answer}", rng.random()
        if role < spoil:
            if rng.random() < weak:
                shift = 1 + int(rng.random() * (max_value - 1))
                wrong = f"{left[: -len(str(numbers[k + 1]))]}{(numbers[k + 1] - 1 + shift) % max_value + 1}={result}"
            row = {"prompt": f"{expr}={before}!{step};!", "solution": f"{wrong};!"}
        elif role < spoil + mend:
            row = {"prompt": f"{expr}={before}{wrong};~{step};~", "solution": mended}
        elif role < spoil + mend + follow:
            row = {"prompt": f"{expr}={before}{wrong};", "solution": _steps([off, *numbers[k + 2 :]], signs[k + 1 :], rng, 0.0)}
        elif role < spoil + mend + follow + unasked:
            row = {"prompt": f"{expr}={before}{wrong};", "solution": mended}
        else:
            row = {"prompt": f"{expr}=", "solution": _steps(numbers, signs, rng, noise)}
        yield {"id": name, "answer": str(answer), **row}


def addition(
    *,
    rows: int | None = None,
    digits: int | None = None,
    max_value: int | None = None,
    seed: int = 0,
    prompt: str = "What is {a}+{b}?",
    repeat: bool = False,
) -> Iterator[Row]:
    """Sums of two numbers, for a pre-trained model.

    {"id": "3+8", "prompt": "What is 3+8?", "answer": "11", "solution": "3+8=11"}

    Numbers are uniform from 1 to `max_value`, or have exactly `digits` digits (1 to 9, 10 to 99, ...); default digits = 1. No problem
    occurs twice, and rows = None is all of them, in random order; more rows than problems (81 with one digit) are an InputError unless
    `repeat` is set: then the problems go round again with ids "3+8~2". prompt: `{a}` and `{b}` are filled in.
    """
    if digits is not None and max_value is not None:
        raise InputError("addition: give digits or max_value, not both")
    digits = 1 if digits is None else digits
    _check(digits=digits, max_value=1 if max_value is None else max_value)
    low, high = (10 ** (digits - 1), 10**digits - 1) if max_value is None else (1, max_value)
    _check_fields(prompt, ("a", "b"))
    span = high - low + 1
    total = span * span
    n_rows = total if rows is None else rows
    _check(rows=n_rows)
    if n_rows > total and not repeat:
        problems = f"numbers from {low} to {high} make {total} different problems"
        raise InputError(f"addition: {n_rows} rows, but {problems}; ask for fewer rows or set data.args.repeat = true")
    for index, copy in _draw(n_rows, total, f"addition/{seed}"):
        a, b = low + index // span, low + index % span
        name = f"{a}+{b}" + (f"~{copy}" if copy > 1 else "")
        yield {"id": name, "prompt": fill(prompt, {"a": str(a), "b": str(b)}), "answer": str(a + b), "solution": f"{a}+{b}={a + b}"}


def word_chains(
    *,
    rows: int = 1000,
    terms: int = 3,
    max_value: int = 9,
    ops: str = "+-",
    seed: int = 0,
    prompt: str = "{story} What number do you have now?",
) -> Iterator[Row]:
    """The expressions of `chains` in words, with a solution in sentences: for chat models that read English.

    {"id": "3-6-1", "prompt": "Start with 3. Subtract 6. Subtract 1. What number do you have now?", "answer": "-4",
     "solution": "3 - 6 = -3. -3 - 1 = -4. The answer is -4."}

    prompt: `{story}` is filled in. Expressions repeat as in `chains`.
    """
    _check(rows=rows, terms=terms, max_value=max_value, ops=ops)
    _check_fields(prompt, ("story",))
    verb = {"+": "Add", "-": "Subtract"}
    for name, numbers, signs in _expressions(rows, terms, max_value, ops, seed):
        told = [f"Start with {numbers[0]}."] + [f"{verb[sign]} {n}." for sign, n in zip(signs, numbers[1:], strict=True)]
        total, worked = numbers[0], []
        for sign, n in zip(signs, numbers[1:], strict=True):
            after = total + n if sign == "+" else total - n
            worked.append(f"{total} {sign} {n} = {after}.")
            total = after
        solution = " ".join([*worked, f"The answer is {total}."])
        yield {"id": name, "prompt": fill(prompt, {"story": " ".join(told)}), "answer": str(total), "solution": solution}


def humaneval(
    *,
    base: Path,
    path: str | None = None,
    prompt: str = "Complete this Python function. Answer with the whole program in one ```python block.\n\n```python\n{code}\n```",
) -> Iterator[Row]:
    """HumanEval (arXiv:2107.03374), 164 Python functions to write from their docstrings; for the verifier `code_exec`. Evaluation only.

    {"id": "HumanEval/0", "prompt": "Complete ...", "answer": "from typing ...", "solution": "```python ...", "prefix": "from typing ...",
     "test": "def check(candidate): ...", "entry_point": "has_close_elements"}

    path: a jsonl(.gz), parquet or csv file, relative to the recipe; None = openai/openai_humaneval from the Hub.
    prompt: `{code}` is filled in: imports, signature and docstring. For a base model, which goes on writing: prompt = "{code}".
    """
    _check_fields(prompt, ("code",))
    for cells in _cells("humaneval", path, "hub:openai/openai_humaneval", "test" if path is None else None, {}, base):
        code = _text_of(cells, "prompt")
        program = code + _text_of(cells, "canonical_solution", "answer")
        row = {"id": _text_of(cells, "task_id", "id"), "prompt": fill(prompt, {"code": code.strip("\n")}), "answer": program}
        row |= {"solution": f"```python\n{program.strip()}\n```", "prefix": code}
        yield row | {name: _text_of(cells, name) for name in ("test", "entry_point")}


def mbpp(
    *,
    base: Path,
    path: str | None = None,
    split: str | None = None,
    config: str = "full",
    prompt: str = "{text}\nThe program must pass this test:\n{test}\nAnswer with the whole program in one ```python block.",
) -> Iterator[Row]:
    """MBPP (arXiv:2108.07732), 974 short Python programs to write from a sentence; for the verifier `code_exec`.

    {"id": "1", "prompt": "Write a function to ...", "answer": "def min_cost ...", "solution": "```python ...", "test_list": ["assert ..."],
     "challenge_test_list": [...], "test_setup_code": "", "test_imports": []}

    As usual for this dataset the prompt shows the first assert, since the sentence does not name the function. So that one is public: a
    program that knows it alone passes one test, and none of the others.
    path: a jsonl(.gz), parquet or csv file, relative to the recipe; None = google-research-datasets/mbpp from the Hub.
    split: train (374 rows), test (500), validation (90) or prompt (10); None = all rows of a file, or train from the Hub.
    config: of the Hub's dataset, "full" or "sanitized" (427 rows that people have looked through).
    prompt: `{text}` and `{test}` are filled in.
    """
    _check_fields(prompt, ("text", "test"))
    for cells in _cells("mbpp", path, "hub:google-research-datasets/mbpp", split, {"name": config}, base):
        program, tests = _text_of(cells, "code", "answer"), list(cells.get("test_list") or [])
        if not tests:
            raise InputError(f"mbpp: the row {cells.get('task_id', cells.get('id'))!r} has no test_list")
        asked = fill(prompt, {"text": _text_of(cells, "text", "prompt"), "test": str(tests[0])})
        row = {"id": _text_of(cells, "task_id", "id"), "prompt": asked, "answer": program, "solution": f"```python\n{program.strip()}\n```"}
        row |= {"test_list": tests, "test_setup_code": cells.get("test_setup_code") or ""}
        row |= {name: list(cells.get(name) or []) for name in ("challenge_test_list", "test_imports")}
        yield row | ({"split": cells["split"]} if "split" in cells else {"split": split or "train"} if path is None else {})


def _cells(task: str, path: str | None, hub: str, split: str | None, args: dict[str, Any], base: Path) -> Iterator[Row]:
    """The rows of the file, or of the Hub where there is none. Raises InputError for one that cannot be read."""
    label, rows = open_source(hub if path is None else path, base=base, split=split, args=args if path is None else None)
    for row in rows:
        if row.cells is None:
            raise InputError(f"{task}: {label}, row {row.number}: {row.problem}")
        yield row.cells


def _text_of(cells: Row, *names: str) -> str:
    """The first of the columns that is there, as text."""
    found = next((cells[name] for name in names if cells.get(name) is not None), None)
    if found is None:
        raise InputError(f"a row lacks the column {' or '.join(names)}; it has {', '.join(map(str, cells))}")
    return str(found)


def _expressions(rows: int, terms: int, max_value: int, ops: str, seed: int) -> Iterator[tuple[str, list[int], list[str]]]:
    """(id, numbers, signs) of `rows` expressions; the id is the expression, with ~2, ~3, ... in later rounds."""
    total = max_value**terms * len(ops) ** (terms - 1)
    for index, copy in _draw(rows, total, f"expressions/{seed}"):
        numbers, signs = [], []
        for _ in range(terms):
            index, digit = divmod(index, max_value)
            numbers.append(digit + 1)
        for _ in range(terms - 1):
            index, digit = divmod(index, len(ops))
            signs.append(ops[digit])
        expr = str(numbers[0]) + "".join(f"{sign}{n}" for sign, n in zip(signs, numbers[1:], strict=True))
        yield expr + (f"~{copy}" if copy > 1 else ""), numbers, signs


def _draw(rows: int, total: int, seed: str) -> Iterator[tuple[int, int]]:
    """`rows` pairs (index below `total`, round from 1): each round is a random order of all indices.

    A shuffle by exchanges that remembers only the places it has touched, so a small sample of a huge range is cheap.
    """
    copy, left = 0, rows
    while left > 0:
        copy += 1
        rng = random.Random(f"{seed}/{copy}")
        moved: dict[int, int] = {}
        for i in range(min(left, total)):
            # Two 53-bit fractions as one of 106 bits: uniform for any total.
            fraction = int(rng.random() * 2**53) << 53 | int(rng.random() * 2**53)
            j = i + (fraction * (total - i) >> 106)
            yield moved.get(j, j), copy
            moved[j] = moved.get(i, i)
        left -= total


def _pick(rng: random.Random, choices: tuple[int, ...]) -> int:
    return choices[int(rng.random() * len(choices))]


def _value(numbers: list[int], signs: list[str]) -> int:
    return numbers[0] + sum(n if sign == "+" else -n for sign, n in zip(signs, numbers[1:], strict=True))


def _steps(numbers: list[int], signs: list[str], rng: random.Random, noise: float) -> str:
    """The step-by-step demonstration, "3-6=-3;-3-1=-4#-4"; with probability `noise` one step is wrong."""
    wrong = int(rng.random() * len(signs)) if rng.random() < noise else -1
    total, steps = numbers[0], []
    for i, (sign, n) in enumerate(zip(signs, numbers[1:], strict=True)):
        after = total + n if sign == "+" else total - n
        if i == wrong:
            after += _pick(rng, (-10, -2, -1, 1, 2, 10))
        steps.append(f"{total}{sign}{n}={after}")
        total = after
    return f"{';'.join(steps)}#{total}"


def _check(**values: Any) -> None:
    """The ranges of the arguments that the tasks share. Raises InputError."""
    least = {"rows": 1, "terms": 2, "max_value": 1, "digits": 1}
    for name, value in values.items():
        if name in least and value < least[name]:
            raise InputError(f"data.args.{name} = {value}: it must be at least {least[name]}")
        if name in ("careful", "noise") and not 0.0 <= value <= 1.0:
            raise InputError(f"data.args.{name} = {value}: it is a share and must lie in [0, 1]")
        if name == "ops" and (not value or set(value) - set("+-") or len(set(value)) < len(value)):
            raise InputError(f'data.args.ops = {value!r}: it may be "+-", "+" or "-"')


def _check_fields(prompt: str, fields: tuple[str, ...]) -> None:
    got = template_fields(prompt, "data.args.prompt")
    if set(got) != set(fields):
        want = " and ".join(f"{{{name}}}" for name in fields)
        raise InputError(f"data.args.prompt = {prompt!r}: it must contain {want} and no other field")

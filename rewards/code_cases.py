"""From a row and a response to what the sandboxes of `code_exec` run: the program, the tests, and who gets what.

Nothing here runs or even parses code of the response or the row: that is done inside the sandboxes.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmrl.records import Prompt
from llmrl.rewards.code_values import Foreign, TooLarge, encode

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)")
_PYTHON = ("python", "py", "python3")
_CODE_LINE = re.compile(
    r"^[ \t]*(?:(?:async )?def |class |import |from [\w.]+ import|return\b|raise |assert |print\(|(?:for|while|if|with|try)\b.*:|@\w"
    r"|\w[\w., ]*(?:\[[^\]\n]*\])?[ \t]*[-+*/%]?=[^=])",
    re.MULTILINE,
)
# Where a base model has gone on after the function's body, as in section 2.1 of the HumanEval paper (arXiv:2107.03374).
_STOPS = re.compile(r"\n(?:class|def|#|if|print|@)")


class RowError(ValueError):
    """The row cannot be tested: it has no tests, or not in one of the forms of `code_exec`."""


@dataclass
class Plan:
    """What to run for one response."""

    total: int
    """Number of tests."""
    candidate: dict[str, Any]
    """Job of the process that runs the program; holds nothing that is expected."""
    checker: dict[str, Any] | None = None
    """Job of the process that runs the tests; None where there are only stdin/stdout cases."""
    mains: list[tuple[str, str]] = field(default_factory=list)
    """(stdin, expected stdout) of runs of the whole program."""


def program_of(response: str) -> tuple[str | None, bool]:
    """(the response's program or None, whether it stood in a fenced block): the last Python block, else the last without a language."""
    marked, bare = None, None
    mark, language, lines = "", "", []
    for line in [*response.split("\n"), None]:
        fence = None if line is None else _FENCE.match(line)
        if not mark:
            if fence:
                mark, language, lines = fence[1], fence[2].lower(), []
        elif line is None or (fence and fence[1].startswith(mark) and not fence[2]):  # an open block ends with the text
            block = textwrap.dedent("\n".join(lines))
            if block.strip() and language in _PYTHON:
                marked = block
            elif block.strip() and not language:
                bare = block
            mark = ""
        else:
            lines.append(line)
    found = marked or bare
    if found is not None:
        return found, True
    return (response, False) if _CODE_LINE.search(response) else (None, False)


def plan(prompt: Prompt, program: str, fenced: bool, partial: bool) -> Plan:
    """The jobs for one row and program. Raises RowError."""
    meta = prompt.meta
    cases = _listed(meta, "cases")
    if cases:
        return _of_cases(cases, program, partial)
    checks = [*_listed(meta, "test_list"), *_listed(meta, "challenge_test_list")]
    if checks:
        if not all(isinstance(check, str) for check in checks):
            raise RowError("test_list must be a list of assert statements (text)")
        imports = "\n".join(map(str, _listed(meta, "test_imports")))
        setup = meta.get("test_setup_code") or ""
        candidate = _candidate([program], prefix=imports, setup=[setup] if setup.strip() else [])
        return Plan(len(checks), candidate, _checker([{"code": c} for c in checks], [_part(imports)], partial))
    if isinstance(meta.get("test"), str) and meta["test"].strip():
        return _of_humaneval(prompt, meta["test"], program, fenced, partial)
    raise RowError("the row has no tests; expected a column cases, test_list (MBPP) or test and entry_point (HumanEval)")


def _of_humaneval(prompt: Prompt, test: str, program: str, fenced: bool, partial: bool) -> Plan:
    name = prompt.meta.get("entry_point")
    if not isinstance(name, str) or not name.isidentifier():
        raise RowError(f"entry_point = {name!r}: expected the name of the function that the test is about")
    prefix = prompt.meta.get("prefix") or prompt.text
    cut = program[: stop.start()] if not fenced and (stop := _STOPS.search(program, 1)) else program
    bodies = [program, textwrap.indent(program, "    "), cut] if fenced or cut != program else [program]
    sources = [program, *(f"{prefix.rstrip()}\n{body}" for body in bodies)]
    checker = _checker([{"code": f"check({name})", "names": [name]}], [_part(prefix, needed=False), _part(test)], partial)
    return Plan(1, _candidate(sources, prefix=prefix, defines=name), checker | {"needs": "check"})


def _of_cases(cases: list[Any], program: str, partial: bool) -> Plan:
    calls, mains = [], []
    for number, case in enumerate(cases, 1):
        match case:
            case {"stdin": str(given), "stdout": str(wanted)}:
                mains.append((given, wanted))
            case {"call": str(name), "args": list() | tuple() as args, "returns": wanted} if isinstance(case.get("kwargs") or {}, Mapping):
                kwargs = {str(k): _packed(v, number) for k, v in (case.get("kwargs") or {}).items()}
                packed = {"args": _packed(list(args), number), "kwargs": kwargs, "returns": _packed(wanted, number)}
                calls.append({"call": name, **packed})
            case _:
                form = '{"stdin": text, "stdout": text} or {"call": name, "args": [...], "returns": value}'
                raise RowError(f"case {number} is {str(case)[:200]}; expected {form}")
    return Plan(len(cases), _candidate([program]), _checker(calls, [], partial) if calls else None, mains)


def _packed(value: Any, number: int) -> Any:
    def other(value: Any) -> Any:
        raise Foreign(f"it holds a {type(value).__name__}")

    try:
        return encode(value, other)
    except (Foreign, TooLarge) as error:
        raise RowError(f"case {number} cannot be sent to the sandbox: {error}") from error


def _listed(meta: Mapping[str, Any], name: str) -> list[Any]:
    """The column as a list; CSV and some Hub datasets keep it as JSON text. Raises RowError for anything else."""
    value = meta.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"the column {name} is text that is no JSON: {value[:100]!r}") from error
    if value is None or value == "":
        return []
    if not isinstance(value, list | tuple):
        raise RowError(f"the column {name} is a {type(value).__name__}; expected a list")
    return list(value)


def _candidate(sources: list[str], *, prefix: str = "", setup: list[str] | None = None, defines: str | None = None) -> dict[str, Any]:
    return {"role": "functions", "sources": sources, "prefix": prefix, "setup": setup or [], "defines": defines}


def _checker(tests: list[dict[str, Any]], define: list[dict[str, Any]], partial: bool) -> dict[str, Any]:
    return {"tests": tests, "define": define, "needs": None, "first_failure_ends": not partial, "objects": False}


def _part(code: str, *, needed: bool = True) -> dict[str, Any]:
    return {"code": code, "needed": needed}

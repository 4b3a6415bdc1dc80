"""Whether a response has the demanded form. Judges no content."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrl.records import Prompt, Verdict, Verifier
from llmrl.rewards.extract import boxed as boxes_of
from llmrl.rewards.length import ramp

Check = Callable[[str], list[str]]
"""A response -> what is wrong with its form."""


def format(
    *,
    tags: list[str] | None = None,
    regex: str | None = None,
    boxed: bool = False,
    json_schema: dict[str, Any] | str | None = None,
    overlong: int | None = None,
    overlong_margin: int = 0,
    base: Path = Path("."),
) -> Verifier:
    r"""1.0 where the response has every form asked for, else 0.0. Needs no gold. Use it as a part of `combine`.

    tags: names, e.g. ["think", "answer"]: each stands once as <name>...</name>, not empty, in this order, none inside another.
    regex: a pattern (DOTALL) that the whole response, less outer blanks, must match; write ".*" around a part of it. The verifier
    `regex` with mode = "fullmatch" asks the same; use that one for a pattern alone, to search, or to compare a group with the gold.
    boxed: exactly one \boxed{} that is not empty.
    json_schema: the response, or its last ```json block where it has one, is JSON that is valid under this schema (JSON Schema, Draft
    2020-12): a table, or the path of a .json file from the recipe's folder (`base`). {} asks for JSON of any form. Strict JSON: no NaN
    or Infinity, no key twice, no number too large for a float.
    overlong, overlong_margin: in characters: a response longer than `overlong` has its score multiplied by `length`'s ramp, 1 - (length -
    overlong) / overlong_margin and at least 0 (margin 0: 0 at once). Goes with one of the forms; for a length alone use `length`.
    Status: always ok; the detail says what is wrong.
    Raises ValueError where nothing is asked for, the pattern is no regular expression, the schema is none, or a $ref in it leads
    nowhere (nothing is fetched from the network).
    Failure modes: a pattern (also one in a schema) that backtracks without end runs into the deadline (status timeout); tags in code
    blocks count; "format" in a schema (dates, addresses) is not checked, as the standard leaves it; JSON nested deeper than Python's
    recursion limit is not valid here.
    """
    if not tags and regex is None and not boxed and json_schema is None:
        more = '; for a length alone use the verifier "length"' if overlong is not None else ""
        raise ValueError(f'nothing to check; give tags = ["think", "answer"], regex = "...", boxed = true or json_schema = ...{more}')
    if (overlong is not None and overlong < 0) or overlong_margin < 0 or (overlong_margin and overlong is None):
        raise ValueError(f"overlong = {overlong}, overlong_margin = {overlong_margin}: expected characters >= 0, a margin only with overlong")
    checks: list[Check] = [lambda response: _tag_problems(response, tags or [])]
    if regex is not None:
        checks.append(_regex_check(regex))
    if boxed:
        checks.append(_box_problems)
    if json_schema is not None:
        checks.append(_schema_check(json_schema, base))

    def judge(prompt: Prompt, response: str) -> Verdict:
        problems = [problem for check in checks for problem in check(response)]
        score = float(not problems)
        if overlong is not None and len(response) > overlong:
            score *= ramp(len(response), overlong, overlong_margin)
            problems.append(f"{len(response)} characters, more than {overlong}")
        return Verdict(score, "ok", detail="; ".join(problems))

    return judge


def _regex_check(regex: str) -> Check:
    try:
        pattern = re.compile(regex, re.DOTALL)
    except re.error as error:
        raise ValueError(f"regex = {regex!r} is no regular expression: {error}") from error
    return lambda response: [] if pattern.fullmatch(response.strip()) else ["the regex does not match"]


def _box_problems(response: str) -> list[str]:
    boxes = boxes_of(response)
    if len(boxes) != 1:
        return [f"{len(boxes)} boxed answers"]
    return [] if boxes[0] else ["an empty box"]


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

# ---------------------------------------------------------------- JSON


def _schema_check(given: dict[str, Any] | str, base: Path) -> Check:
    """Builds the check of JSON under a schema; the schema and every $ref in it are checked here."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError, best_match
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    schema = _read_schema(given, base)
    dialect = schema.get("$schema", Draft202012Validator.META_SCHEMA["$id"])
    if str(dialect).rstrip("#") != Draft202012Validator.META_SCHEMA["$id"]:
        raise ValueError(f"json_schema: $schema is {dialect!r}; only Draft 2020-12 is read: rewrite it for that and leave $schema out")
    try:
        Draft202012Validator.check_schema(schema)
    except (SchemaError, RecursionError) as error:
        where = "/".join(map(str, getattr(error, "absolute_path", []))) or "the top"
        raise ValueError(f"json_schema is no JSON schema, at {where}: {getattr(error, 'message', error)}") from error
    root = DRAFT202012.create_resource(schema)
    registry: Registry[Any] = Registry()  # an empty one fetches nothing
    try:
        _resolve_refs(root, registry.resolver_with_root(root))
    except Unresolvable as error:
        raise ValueError(f'json_schema: the $ref "{error.ref}" leads nowhere; only the schema itself is searched, nothing is fetched') from error
    validator = Draft202012Validator(schema, registry=registry)

    def check(response: str) -> list[str]:
        try:
            error = best_match(validator.iter_errors(_strict_json(_json_part(response))))
        except RecursionError:
            return ["the JSON is nested too deeply"]
        except OverflowError:  # multipleOf with a float divides a whole number of more than 308 digits
            return ["a number in the JSON is too large to check"]
        except ValueError as error:
            return [f"no JSON: {str(error)[:300]}"]
        return [] if error is None else [f"the JSON at {error.json_path}: {error.message[:300]}"]

    return check


def _read_schema(given: dict[str, Any] | str, base: Path) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    file = (base / Path(given).expanduser()).resolve()
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema = {given!r}: {file} cannot be read as JSON: {error} (paths are relative to the recipe's folder)") from error
    if not isinstance(schema, dict):
        raise ValueError(f"json_schema = {given!r}: {file} holds a {type(schema).__name__}; expected an object")
    return schema


def _resolve_refs(resource: Any, resolver: Any) -> None:
    """Looks every reference of the schema up. Raises referencing.exceptions.Unresolvable."""
    contents = resource.contents
    for key in ("$ref", "$dynamicRef"):
        if isinstance(contents, dict) and isinstance(contents.get(key), str):
            resolver.lookup(contents[key])
    for inner in resource.subresources():
        _resolve_refs(inner, resolver.in_subresource(inner))


def _json_part(response: str) -> str:
    """The last closed ```json block, else the whole response."""
    blocks: list[str] = []
    start: int | None = None
    lines = response.split("\n")  # not splitlines: a JSON text may hold U+2028
    for i, line in enumerate(lines):
        if start is None and line.strip().lower() == "```json":
            start = i + 1
        elif start is not None and line.strip() == "```":
            blocks.append("\n".join(lines[start:i]))
            start = None
    return blocks[-1] if blocks else response


def _strict_json(text: str) -> Any:
    """Raises ValueError for what RFC 8259 does not allow or leaves open, RecursionError for JSON nested too deeply."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    def number(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise ValueError(f"{digits[:40]} is too large for a float")
        return value

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {twice[:80]!r} stands twice")
        return found

    return json.loads(text, parse_constant=constant, parse_float=number, object_pairs_hook=table)


_TAGS = {"tags": ["think", "answer"]}
_POINT: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
_JSON = {"json_schema": _POINT}
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
    ("", None, '{"x": 1}', 1.0, _JSON),
    ("", None, 'So:\n```json\n{"x": 1}\n```\nDone.', 1.0, _JSON),
    ("", None, '{"x": "1"}', 0.0, _JSON),
    ("", None, '{"x": 1, "x": 2}', 0.0, _JSON),
    ("", None, "NaN", 0.0, {"json_schema": {}}),
    ("", None, "x is 1", 0.0, _JSON),
    ("", None, r"\boxed{4} and so on", 0.5, {"boxed": True, "overlong": 10, "overlong_margin": 18}),
]

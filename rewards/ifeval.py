"""Whether a response follows the verifiable instructions of IFEval."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from llmrl.records import Prompt, Verdict, Verifier
from llmrl.rewards.instructions import INSTRUCTIONS, Relation


def ifeval(*, loose: bool = False, partial: bool = False) -> Verifier:
    """1.0 where the response follows every instruction of its row, else 0.0. Needs no gold.

    Source: IFEval, arXiv:2311.07911. Columns of the row: `instruction_id_list` (["punctuation:no_comma", ...]) and `kwargs` (one
    table for each, e.g. {"num_words": 300, "relation": "at least"}; nulls are ignored), as in google/IFEval.
    loose: an instruction is followed where any of eight variants follows it: the response, or it without its first line, its last
    line, or both; each of these also without "*" (the paper's loose accuracy).
    partial: the score is the share of instructions followed (the mean over rows of equal length is the paper's instruction-level
    accuracy); False: all or nothing (its prompt-level accuracy).
    Status: ok for any response, an empty one follows nothing; error where a column is missing, an instruction is unknown, or a keyword
    is missing, of the wrong type or not the instruction's. The detail lists what was not followed.
    Raises ImportError where langdetect is not installed: three instructions ask for a language.
    Failure modes: the number of sentences can differ by a few from nltk's punkt, whose rules are followed without its table of words
    (an abbreviation, initial or ellipsis before a capital; on model outputs 12 counts in 1000 differ); a letter that is no letter ("#")
    is counted as it stands, where the authors' checker draws a letter at random; keywords are plain text, not regular expressions;
    langdetect guesses wrongly on short texts and on English in capitals, as in the authors' checker, but here always the same way.
    """
    if importlib.util.find_spec("langdetect") is None:
        raise ImportError('ifeval needs the package langdetect: pip install "llmrl[ifeval]" (or pip install langdetect)')

    def judge(prompt: Prompt, response: str) -> Verdict:
        try:
            checks = _read(prompt.meta.get("instruction_id_list"), prompt.meta.get("kwargs"))
        except _BadRow as error:
            return Verdict(None, "error", detail=str(error))
        texts = [text for text in (_variants(response) if loose else [response]) if text.strip()]
        failed = [check.name for check in checks if not any(check.follows(text) for text in texts)]
        score = (len(checks) - len(failed)) / len(checks) if partial else float(not failed)
        return Verdict(score, "ok", detail=f"not followed: {', '.join(failed)}" if failed else f"all {len(checks)} followed")

    return judge


class _BadRow(Exception):
    """The row does not say which instructions there are."""


class _Check(NamedTuple):
    name: str
    follows: Callable[[str], bool]


def _variants(response: str) -> list[str]:
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys([*cut, *(text.replace("*", "") for text in cut)]))


def _read(names: Any, kwargs: Any) -> list[_Check]:
    if not isinstance(names, list | tuple) or not names:
        raise _BadRow(f"the row's column instruction_id_list is {names!r}; expected a list of instructions such as punctuation:no_comma")
    if not isinstance(kwargs, list | tuple) or len(kwargs) != len(names):
        raise _BadRow(f"the row's column kwargs is {str(kwargs)[:200]}; expected a list of {len(names)} tables, one an instruction")
    return [_check(name, table) for name, table in zip(names, kwargs, strict=True)]


def _check(name: Any, table: Any) -> _Check:
    function = INSTRUCTIONS.get(name) if isinstance(name, str) else None
    if function is None:
        raise _BadRow(f"instruction_id_list: unknown instruction {name!r}; known are {', '.join(INSTRUCTIONS)}")
    if table is not None and not isinstance(table, dict):
        raise _BadRow(f"kwargs of {name}: {str(table)[:200]} is no table")
    given = {key: value for key, value in (table or {}).items() if value is not None}
    wanted = _keywords(function)
    if given.keys() != wanted.keys():
        raise _BadRow(f"kwargs of {name}: got {sorted(given)}, expected {sorted(wanted)}")
    values = {key: _value(f"kwargs of {name}: {key}", given[key], kind) for key, kind in wanted.items()}
    return _Check(name, functools.partial(function, **values))


@functools.cache
def _keywords(function: Callable[..., bool]) -> dict[str, Any]:
    hints = typing.get_type_hints(function)
    return {key: hints[key] for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


def _value(where: str, value: Any, kind: Any) -> Any:
    """The value as its instruction takes it. Counts may come as floats (a table read by pandas); they must be whole and not negative."""
    if kind is int and isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value):
        if where.endswith(": nth_paragraph") and value < 1:
            raise _BadRow(f"{where} = {value!r}; paragraphs are counted from 1")
        return int(value)
    if kind is str and isinstance(value, str) and value.strip():
        return value
    if kind is Relation and value in typing.get_args(Relation):
        return value
    if typing.get_origin(kind) is list and isinstance(value, list | tuple) and value and all(isinstance(v, str) and v for v in value):
        return list(value)
    expected = {int: "a whole number from 0 on", str: "a text", Relation: '"less than" or "at least"'}.get(kind, "a list of texts")
    raise _BadRow(f"{where} = {str(value)[:200]!r}; expected {expected}")


def _row(name: str, **kwargs: Any) -> dict[str, Any]:
    return {"instruction_id_list": [name], "kwargs": [kwargs]}


_TWO = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
_WORDS = {"num_words": 3, "relation": "at least"}
_NULLS = {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{**_WORDS, "keywords": None}]}
ifeval.selfcheck = [  # type: ignore[attr-defined]
    ("", None, '"No commas here."', 1.0, {}, _TWO),
    ("", None, "No commas here.", 0.0, {}, _TWO),
    ("", None, "No commas here.", 0.5, {"partial": True}, _TWO),
    ("", None, 'Sure, here it is:\n"No commas here."', 0.0, {}, _TWO),
    ("", None, 'Sure, here it is:\n"No commas here."', 1.0, {"loose": True}, _TWO),
    ("", None, "", 0.0, {}, _TWO),
    ("", None, "one two three", 1.0, {}, _NULLS),
    ("", None, "one two", 0.0, {}, _NULLS),
    ("", None, "First.\n***\nSecond.", 1.0, {}, _row("length_constraints:number_paragraphs", num_paragraphs=2)),
    ("", None, "First.\n\nSecond.", 0.0, {}, _row("length_constraints:number_paragraphs", num_paragraphs=2)),
    ("", None, '```json\n{"a": 1}\n```', 1.0, {}, _row("detectable_format:json_format")),
    ("", None, "{'a': 1}", 0.0, {}, _row("detectable_format:json_format")),
    ("", None, "Voici une phrase qui est assez longue pour être reconnue.", 1.0, {}, _row("language:response_language", language="fr")),
    ("", None, "Here is a sentence that is long enough to be recognised.", 0.0, {}, _row("language:response_language", language="fr")),
]

"""One row -> one `Prompt`: which column is what, templates, chat messages, and the reasons why a row cannot be used."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmrl.records import InputError, Message, Prompt
from llmrl.sources import SourceRow

DEFAULT_COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "problem", "query"),
    "messages": ("messages",),
    "answer": ("answer", "final_answer", "ground_truth", "gold", "target", "solution"),
    "id": ("id", "task_id", "unique_id", "uid", "uuid"),
    "solution": ("solution", "worked_solution", "rationale"),
}
"""Names that are tried, in this order, for what `columns` leaves open. `messages` is tried only where no prompt column is found."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    row: int
    """Counted from 1; the line of a jsonl file."""
    id: str | None
    reason: str


class Unusable(Exception):
    """The reason why one row cannot be used."""


def refusal(label: str, bad: list[BadRow], n_good: int) -> str:
    """The one error for all bad rows; with none of either kind, data.limit has cut off everything."""
    if not bad:
        return f"{label}: no rows are left; data.limit must be at least 1"
    lines = [f"{label}: {len(bad)} of {len(bad) + n_good} rows cannot be used:"]
    lines += [f"  row {b.row}" + (f" (id {b.id!r})" if b.id is not None else "") + f": {b.reason}" for b in bad[:5]]
    if len(bad) > 5:
        lines.append(f"  and {len(bad) - 5} more")
    lines.append('Mend them, or set data.on_bad = "drop" to go on without them.' if n_good else "No usable row is left.")
    return "\n".join(lines)


class RowReader:
    """Turns the rows of one source into prompts; built once the columns are known."""

    def __init__(
        self,
        label: str,
        head: list[SourceRow],
        columns: dict[str, str],
        template: str | None,
        system: str | None,
        answer_after: str | None,
        need_answer: bool,
        need_solution: bool,
    ) -> None:
        self.label, self.template, self.system, self.answer_after = label, template, system, answer_after
        self.need_answer, self.need_solution = need_answer, need_solution
        self.known = list(dict.fromkeys(name for row in head for name in row.cells or {}))
        if not self.known:
            unread = [BadRow(row.number, None, row.problem or "it has no columns") for row in head]
            raise InputError(refusal(label, unread, 0) if unread else f"{label}: no rows")
        for key, name in columns.items():
            if key not in DEFAULT_COLUMNS:
                raise InputError(f"data.columns.{key}: no such key; it may be {', '.join(DEFAULT_COLUMNS)}{_nearest(key, DEFAULT_COLUMNS)}")
            if name and not self._has(name):
                near = _nearest(name, self.known)
                raise InputError(f"data.columns.{key} = {name!r}: {label} has no such column{near}; {self._has_columns()}")
        if columns.get("messages") and (columns.get("prompt") or template is not None):
            raise InputError("data.columns.messages excludes data.columns.prompt and data.template: the messages are the prompt")
        self.column = {key: columns[key] or None if key in columns else self._default(key) for key in DEFAULT_COLUMNS}
        if self.column["prompt"] and not columns.get("messages"):
            self.column["messages"] = None
        elif columns.get("messages"):
            self.column["prompt"] = None
        self._check()

    def _default(self, key: str) -> str | None:
        return next((name for name in DEFAULT_COLUMNS[key] if name in self.known), None)

    def _has(self, name: str) -> bool:
        return name in self.known or name.split(".")[0] in self.known

    def _has_columns(self) -> str:
        return f"it has: {', '.join(self.known)}"

    def _check(self) -> None:
        """Everything that is wrong for all rows alike is said once, before any row is read."""
        needed = {"answer": self.need_answer, "solution": self.need_solution and self.answer_after is None}
        needed["prompt"] = self.template is None and self.column["messages"] is None
        for key in ("prompt", "answer", "solution"):
            if needed[key] and self.column[key] is None:
                tried = DEFAULT_COLUMNS[key] + (DEFAULT_COLUMNS["messages"] if key == "prompt" else ())
                near = next((hint for name in tried if (hint := _nearest(name, self.known))), "")
                none = ', or where rows have none and the verifier needs none: data.columns.answer = ""' if key == "answer" else ""
                raise InputError(
                    f"{self.label}: no column for the {key} (tried {', '.join(tried)}){near}; {self._has_columns()}. "
                    f'Name it: data.columns.{key} = "..."{none}'
                )
        if self.answer_after is not None and self.column["answer"] is None:
            raise InputError(f"data.answer_after = {self.answer_after!r} needs an answer column; {self.label}: {self._has_columns()}")
        if self.template is not None:
            for name in template_fields(self.template, "data.template"):
                if not self._has(name) and not self.column.get(name):
                    raise InputError(
                        f"data.template: {{{name}}} is no column of {self.label}{_nearest(name, self.known)}; {self._has_columns()}. "
                        "A brace that is meant as text is written twice"
                    )

    def id_of(self, row: SourceRow) -> str | None:
        """The id of a row that may be bad, as far as it can be told."""
        try:
            return self._text(row.cells, "id") if row.cells is not None else None
        except Unusable:
            return None

    def prompt(self, row: SourceRow) -> Prompt:
        cells = row.cells
        if cells is None:
            raise Unusable(row.problem or "it cannot be read")
        messages = self._messages(cells)
        answer, solution = self._answer_and_solution(cells)
        used = {self.column[key] for key in ("messages", "answer", "id", "solution")}
        if self.template is None:
            used.add(self.column["prompt"])
        meta = {name: value for name, value in cells.items() if name not in used}
        if solution is not None:
            meta["solution"] = solution
        return Prompt(self._text(cells, "id") or str(row.number), messages, answer, meta)

    def _text(self, cells: Mapping[str, Any], key: str) -> str | None:
        name = self.column[key]
        return None if name is None else _as_text(_cell(cells, name), key)

    def _messages(self, cells: Mapping[str, Any]) -> tuple[Message, ...]:
        name = self.column["messages"] or self.column["prompt"]
        value = None if name is None else _cell(cells, name)
        if self.template is not None:
            fields = template_fields(self.template, "data.template")
            values = {f: _as_field(_cell(cells, f if self._has(f) else self.column[f] or f), f) for f in fields}
            messages: tuple[Message, ...] = ({"role": "user", "content": fill(self.template, values)},)
        elif self.column["messages"] or isinstance(value, list):
            messages = _check_messages(value)
        else:
            text = _as_text(value, "prompt")
            if text is None:
                raise Unusable(f"no prompt: column {name!r} is empty")
            messages = ({"role": "user", "content": text},)
        if self.system is None:
            return messages
        if messages[0]["role"] == "system":
            raise Unusable("it has a system message of its own, and data.system is set")
        return ({"role": "system", "content": self.system}, *messages)

    def _answer_and_solution(self, cells: Mapping[str, Any]) -> tuple[str | None, str | None]:
        text = answer = self._text(cells, "answer")
        solution = self._text(cells, "solution")
        if answer is not None and self.answer_after is not None:
            _, mark, after = answer.rpartition(self.answer_after)
            answer = after.strip() if mark else None
            if not answer:
                raise Unusable(f"no answer: nothing follows {self.answer_after!r} in column {self.column['answer']!r}")
            solution = text if solution is None else solution
        if answer is None and self.need_answer:
            raise Unusable(f"no answer: column {self.column['answer']!r} is empty")
        if solution is None and self.need_solution:
            raise Unusable(f"no solution: column {self.column['solution']!r} is empty")
        return answer, solution


def _cell(cells: Mapping[str, Any], name: str) -> Any:
    """The value in column `name`; "a.b" is the key b of the object in column a. None where there is none."""
    if name in cells:
        return cells[name]
    value: Any = cells
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _as_text(value: Any, what: str) -> str | None:
    """Text of a cell; None for a missing, blank or NaN one. Raises Unusable for anything that is neither text nor a number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        if isinstance(value, (list, dict, bytes)):
            raise Unusable(f"the {what} is a {type(value).__name__} where text or a number was expected")
        value = str(value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable(f"the {what} holds half a surrogate pair at character {error.start}: not valid Unicode") from None
    return value if value.strip() else None


def _as_field(value: Any, name: str) -> str:
    """A cell as a template shows it: lists and objects as JSON. Raises Unusable where it is missing."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else _as_text(value, name)
    if text is None:
        raise Unusable(f"column {name!r}, which data.template shows, is empty")
    return text


def _check_messages(value: Any) -> tuple[Message, ...]:
    """Messages as a list of {role, content}, or the JSON text of one. They must end with the user's, which is what is answered."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Unusable("the messages are text, but not JSON") from None
    if not isinstance(value, list) or not value:
        raise Unusable("no prompt: the messages are missing or not a list")
    messages: list[Message] = []
    for i, message in enumerate(value):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise Unusable(f"message {i} is not {{role: system | user | assistant, content: text}}")
        _as_text(content, f"content of message {i}")
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise Unusable("the last message must be the user's, and not empty")
    return tuple(messages)


_FIELD = re.compile(r"\{\{|\}\}|\{\}|\{([^{}]+)\}|[{}]")


def template_fields(template: str, where: str) -> list[str]:
    """The names in braces. `{{` and `}}` are braces; so is `{}`, for the sake of `\\boxed{}`. InputError for a brace without a partner."""
    fields: list[str] = []
    for match in _FIELD.finditer(template):
        if match[0] in ("{", "}"):
            raise InputError(f"{where}: a single {match[0]!r} at character {match.start()}; a brace that is meant as text is written twice")
        if match[1]:
            fields.append(match[1])
    return list(dict.fromkeys(fields))


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with `{name}` replaced in one pass: braces inside the values stay as they are. KeyError for a name without a value."""
    return _FIELD.sub(lambda match: values[match[1]] if match[1] else {"{{": "{", "}}": "}"}.get(match[0], match[0]), template)


def _nearest(name: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (nearest: {near[0]!r})" if near else ""

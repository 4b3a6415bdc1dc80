"""Prompts of the extra roles that a rule plays (polluter, repairer, explainer): plain text files that a user may replace.

A template's text becomes the last user message; the rest of the prompt's messages stay. Where the file has a line `---`, what stands
before it is the role's own system message, in place of the prompt's. `{question}` is the prompt's last user message; which other fields
there are the rule says. `{{` and `}}` are braces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmrl.records import InputError, Message, Prompt
from llmrl.rows import fill, template_fields

HOME = Path(__file__).parent / "rules" / "templates"


@dataclass(frozen=True)
class Template:
    """A role's prompt."""

    user: str
    system: str | None = None

    def messages(self, prompt: Prompt, **fields: str) -> tuple[Message, ...]:
        """The prompt's messages with the last user message (and the system message, where the template has one) replaced."""
        filled = {"question": prompt.text, **fields}
        users = [i for i, m in enumerate(prompt.messages) if m["role"] == "user"]
        messages = [dict(m) for m in prompt.messages]
        if users:
            messages[users[-1]] = {"role": "user", "content": fill(self.user, filled)}
        else:
            messages.append({"role": "user", "content": fill(self.user, filled)})
        if self.system is not None:
            messages = [{"role": "system", "content": fill(self.system, filled)}, *(m for m in messages if m["role"] != "system")]
        return tuple(messages)


def read_template(ref: str, *, kind: str, fields: Sequence[str], base: Path, needs: Sequence[str] = ("question",)) -> Template:
    """The template `ref` of a role: "chat" and "tiny" are the files <kind>_<ref>.txt of llmrl/rules/templates, "./mine.txt" is relative to `base`.

    fields: those that may stand in it besides {question}; needs: those that must. Raises InputError naming the file.
    """
    own = ref.endswith(".txt") or "/" in ref
    path = (base / Path(ref).expanduser()).resolve() if own else HOME / f"{kind}_{ref}.txt"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        shipped = ", ".join(sorted(p.stem.removeprefix(f"{kind}_") for p in HOME.glob(f"{kind}_*.txt")))
        raise InputError(f"template {ref!r}: there is no {path}; shipped for {kind}: {shipped}; a file of your own is named like ./mine.txt") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"template {path}: {error}") from None
    system, mark, user = text.partition("\n---\n")
    system, user = (system, user) if mark else ("", text)
    there = {f for part in (system, user) for f in template_fields(part, str(path))}
    if unknown := sorted(there - {"question", *fields}):
        raise InputError(f"template {path}: there is no field {{{unknown[0]}}}; it may use {', '.join('{' + f + '}' for f in ('question', *fields))}")
    if missing := [f for f in needs if f not in there]:
        raise InputError(f"template {path}: it must contain {{{missing[0]}}}")
    return Template(user.strip("\n"), system.strip("\n") if mark else None)

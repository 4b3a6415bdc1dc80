"""Preference pairs for a reward model: rows of two responses to a prompt, or verifier-labelled samples set against each other.

Rows (jsonl, parquet, csv, hub:NAME):
  {"prompt": text or messages, "chosen": text or messages, "rejected": ...}       TL;DR and most preference sets; `messages` may stand for `prompt`
  {"chosen": "\\n\\nHuman: ... \\n\\nAssistant: ...", "rejected": ...}               Anthropic HH: two transcripts that differ in the last reply
  {"chosen": [messages], "rejected": [messages]}                                  two conversations that differ in the last reply
Traces: a file of `llmrl sample`, or a run directory; better against worse samples of the same prompt.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llmrl import plugins
from llmrl.records import InputError, Message
from llmrl.sources import SourceRow, find_file, open_source

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class Pair:
    """Two responses to a conversation; the first is preferred."""

    id: str
    """file:line of the row, or the ids of the two traces."""
    messages: tuple[Message, ...]
    chosen: str
    rejected: str

    @property
    def prompt_key(self) -> str:
        return repr(self.messages)


@dataclass(frozen=True)
class PairTable:
    pairs: list[Pair]
    dropped: list[tuple[str, str]]
    """(file:line, reason), under on_bad = "drop"."""


def read_pairs(
    path: str, *, base: Path = Path("."), split: str | None = None, columns: dict[str, str] | None = None, limit: int | None = None,
    gap: float = 0.5, per_prompt: int = 4, seed: int = 0, on_bad: str = "refuse",
) -> PairTable:  # fmt: skip
    """All pairs of a source. Raises one InputError that names every bad row by file:line (the first 5 and their number).

    columns: which columns are prompt, messages, chosen and rejected. gap, per_prompt: of traces; two samples make a pair where their scores
    are at least `gap` apart, and a prompt gives so many pairs at most, drawn by `seed`.
    """
    traces = _trace_source(path, base)
    if traces is not None:
        found = _from_traces(traces, gap, per_prompt, seed)
        return PairTable(list(islice(found, limit)) if limit else found, [])
    label, rows = open_source(path, base=base, split=split)
    names = {key: (columns or {}).get(key, key) for key in ("prompt", "messages", "chosen", "rejected")}
    pairs: list[Pair] = []
    bad: list[tuple[str, str]] = []
    for row in islice(rows, limit) if limit else rows:
        where = f"{label}:{row.number}"
        try:
            pairs.append(_pair(where, row, names))
        except ValueError as error:
            bad.append((where, str(error)))
    if not pairs or (bad and on_bad == "refuse"):
        told = [f"{label}: {len(bad)} of {len(bad) + len(pairs)} rows are no preference pairs:", *(f"  {w}: {why}" for w, why in bad[:5])]
        told += [f"  and {len(bad) - 5} more"] if len(bad) > 5 else []
        mend = 'Mend them, or set pairs.on_bad = "drop" to go on without them.' if pairs else "No usable row is left."
        raise InputError("\n".join([*told, mend]))
    return PairTable(pairs, bad)


def split_pairs(pairs: Sequence[Pair], holdout: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, held out): whole prompts are set aside until there are `holdout` pairs, so that no prompt is on both sides."""
    by_prompt: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_prompt[pair.prompt_key].append(pair)
    keys = list(by_prompt)
    random.Random(f"holdout/{seed}").shuffle(keys)
    held: list[Pair] = []
    while keys and len(held) < holdout:
        held += by_prompt.pop(keys.pop())
    train = [p for p in pairs if p.prompt_key in by_prompt]
    if not train or len(held) < holdout:
        raise InputError(f"pairs.holdout = {holdout} of {len(pairs)} pairs leaves none to train on (a prompt's pairs stay together); lower it")
    return train, held


# ---------------------------------------------------------------- rows


def _pair(where: str, row: SourceRow, names: dict[str, str]) -> Pair:
    """Raises ValueError with the reason why the row is none."""
    if row.cells is None:
        raise ValueError(str(row.problem))
    cells = row.cells
    missing = [names[k] for k in ("chosen", "rejected") if cells.get(names[k]) is None]
    if missing:
        raise ValueError(f"it has no {' and no '.join(missing)}; its columns are {', '.join(map(str, cells))}")
    chosen, rejected = cells[names["chosen"]], cells[names["rejected"]]
    prompt = cells.get(names["prompt"]) if cells.get(names["prompt"]) is not None else cells.get(names["messages"])
    if prompt is not None:
        messages = _messages(prompt, "prompt")
        texts = [_reply(x, messages, name) for x, name in ((chosen, "chosen"), (rejected, "rejected"))]
    elif isinstance(chosen, str) and isinstance(rejected, str):
        messages, texts = _transcripts(chosen, rejected)
    else:
        (messages, one), (other, two) = _conversation(chosen, "chosen"), _conversation(rejected, "rejected")
        if messages != other:
            raise ValueError("chosen and rejected do not answer the same conversation")
        texts = [one, two]
    if texts[0] == texts[1]:
        raise ValueError("chosen and rejected are the same text")
    if not any(t.strip() for t in texts):
        raise ValueError("both responses are empty")
    return Pair(where, messages, texts[0], texts[1])


def _messages(prompt: Any, name: str) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"{name} is empty")
        return ({"role": "user", "content": prompt},)
    if not isinstance(prompt, list) or not prompt or not all(_is_message(m) for m in prompt):
        raise ValueError(f"{name} is {str(prompt)[:60]!r}; it must be text, or a list of {{role, content}}")
    return tuple({"role": m["role"], "content": m["content"]} for m in prompt)


def _is_message(m: Any) -> bool:
    return isinstance(m, dict) and m.get("role") in ("system", "user", "assistant") and isinstance(m.get("content"), str)


def _conversation(value: Any, name: str) -> tuple[tuple[Message, ...], str]:
    """(what is answered, the reply) of a conversation that ends with the assistant."""
    messages = _messages(value, name)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"{name} must be a conversation that ends with the assistant's reply, or give the prompt in a column of its own")
    return messages[:-1], messages[-1]["content"]


def _reply(value: Any, prompt: tuple[Message, ...], name: str) -> str:
    """The response's text, where it may repeat the prompt's messages."""
    if isinstance(value, str):
        return value
    messages = _messages(value, name)
    if messages[-1]["role"] != "assistant" or messages[:-1] not in ((), prompt):
        raise ValueError(f"{name} must be one reply of the assistant to the prompt")
    return messages[-1]["content"]


def _transcripts(chosen: str, rejected: str) -> tuple[tuple[Message, ...], list[str]]:
    """Anthropic HH: the conversation up to the last turn of the assistant, and the two last replies."""
    cut = [text.rfind(ASSISTANT) for text in (chosen, rejected)]
    if min(cut) < 0 or not chosen.startswith(HUMAN):
        raise ValueError(f"it has no prompt, and chosen and rejected are no transcripts ({HUMAN!r} ... {ASSISTANT!r} ...)")
    if chosen[: cut[0]] != rejected[: cut[1]]:
        raise ValueError("the two transcripts differ before the last reply")
    turns = re.split(rf"({HUMAN}|{ASSISTANT})", chosen[: cut[0]])[1:]
    roles = {HUMAN: "user", ASSISTANT: "assistant"}
    messages = tuple({"role": roles[mark], "content": text.strip()} for mark, text in zip(turns[::2], turns[1::2], strict=True))
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("the transcript has no human turn before the last reply")
    return messages, [text[at + len(ASSISTANT) :].strip() for text, at in zip((chosen, rejected), cut, strict=True)]


# ---------------------------------------------------------------- traces


def _trace_source(path: str, base: Path) -> Path | None:
    """The path, where it is a run directory or a trace file."""
    for place in (base / path, Path(path)):
        if place.is_dir():
            return place
    if not path.endswith((".jsonl", ".jsonl.gz")):
        return None
    _, rows = open_source(path, base=base)
    cells = next((r.cells for r in rows if r.cells is not None), {})
    return find_file(path, base) if "response" in cells and "prompt_id" in cells else None


def _from_traces(path: Path, gap: float, per_prompt: int, seed: int) -> list[Pair]:
    by_prompt: dict[str, list[Any]] = defaultdict(list)
    traces, unjudged = 0, 0
    for t in _read_traces(path):
        traces += 1
        unjudged += t.score is None
        if t.score is not None and t.response:
            by_prompt[t.prompt_id].append(t)
    pairs: list[Pair] = []
    for prompt_id, own in by_prompt.items():
        seen: set[frozenset[str]] = set()
        apart = [(a, b) for a in own for b in own if a.score - b.score >= gap and a.response != b.response]
        random.Random(f"pairs/{seed}/{prompt_id}").shuffle(apart)
        chosen = [(a, b) for a, b in apart if (key := frozenset((a.response, b.response))) not in seen and not seen.add(key)]
        for a, b in chosen[:per_prompt]:
            messages = a.messages or ({"role": "user", "content": a.prompt},)
            pairs.append(Pair(f"{a.id} > {b.id}", tuple({"role": m["role"], "content": m["content"]} for m in messages), a.response, b.response))
    if not pairs:
        told = f"{traces} traces of {len(by_prompt)} prompts, {unjudged} of them without a score"
        raise InputError(f"{path}: no two samples of a prompt are {gap:g} apart in score ({told}); sample more a prompt, lower pairs.gap, or grade them")
    return pairs


def _read_traces(path: Path) -> Iterator[Any]:
    """Plug-in layers are reached by name (DESIGN section 1)."""
    return plugins.resolve("read_any", home="llmrl.evaluation", base=Path())(path)

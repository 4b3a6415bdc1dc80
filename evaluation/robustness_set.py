"""The frozen test set of the robustness evaluation: problems, items and base traces in one file, with a hash over all of it.

Line 1 is the header; then one JSON object a line: {"type": "problem" | "item" | "trace", ...}. The header's `sha256` covers the header
without that key and every other byte of the (unpacked) file: an edited or shortened set is refused, so that two reports that name the
same hash have seen the same contexts.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmrl.records import Completion, InputError, Message, Prompt, Request, Sampling

SCHEMA = 1
KIND = "llmrl robustness set"
PHASES = ("clean", "perturb", "recover", "control", "distract", "diagnose")


@dataclass(frozen=True)
class Item:
    """One context that a checkpoint is asked to continue."""

    id: str
    phase: str
    """One of PHASES."""
    problem: str
    """The problem's id: what the bootstrap draws."""
    messages: list[Message]
    prefix: str
    """What stands in the assistant's turn already; "" for a plain prompt."""
    context_ids: list[int]
    """Under the base's tokenizer and chat template: used as they are by every model that has the same."""
    source: str = ""
    """Who made it: polluter, number, sign, swap; the kind of a perturbation; own or processbench/... for diagnosis."""
    at: float | None = None
    """r of a corruption and its control, m of a distraction."""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseTrace:
    """A clean response of the base, for drift."""

    id: str
    context_ids: list[int]
    token_ids: list[int]
    text: str


@dataclass(frozen=True)
class Suite:
    """A set in memory."""

    header: dict[str, Any]
    problems: dict[str, Prompt]
    items: list[Item]
    traces: list[BaseTrace]

    @property
    def sha256(self) -> str:
        return self.header["sha256"]

    @property
    def sampling(self) -> Sampling:
        made = self.header["sampling"]
        return Sampling(**{**made, "stop": tuple(made["stop"])})


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over vocabulary, special tokens and chat template: two tokenizers that agree here give the same context ids."""
    facts = [sorted(tokenizer.get_vocab().items()), sorted(map(int, tokenizer.all_special_ids)), tokenizer.chat_template or "", tokenizer.bos_token_id]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()


def write_set(path: Path, header: dict[str, Any], problems: Sequence[Prompt], items: Sequence[Item], traces: Sequence[BaseTrace]) -> Suite:
    """Writes the file (gzip where the name ends in .gz; without a time in it: the same set gives the same bytes) and reads it back."""
    rows: list[dict[str, Any]] = [{"type": "problem", "id": p.id, "messages": list(p.messages), "gold": p.answer, "meta": _plain(p.meta)} for p in problems]
    rows += [{"type": "item", **asdict(i)} for i in items]
    rows += [{"type": "trace", **asdict(t)} for t in traces]
    body = b"".join(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows)
    head = {"kind": KIND, "schema": SCHEMA, **header, "problems": len(problems), "items": len(items), "traces": len(traces)}
    head["sha256"] = _digest(head, body)
    data = json.dumps(head, ensure_ascii=False, allow_nan=False).encode() + b"\n" + body
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)
    os.replace(temporary, path)
    return read_set(path)


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    """The columns that JSON can hold: what a verifier may need; the solution is not kept."""
    kept = {}
    for key, value in meta.items():
        try:
            kept[key] = json.loads(json.dumps(value, allow_nan=False)) if key != "solution" else None
        except (TypeError, ValueError):
            continue
    return {k: v for k, v in kept.items() if v is not None}


def _digest(head: dict[str, Any], body: bytes) -> str:
    facts = json.dumps({k: v for k, v in head.items() if k != "sha256"}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(facts.encode() + b"\n" + body).hexdigest()


def read_set(path: Path) -> Suite:
    """Raises InputError for a file that is no set, of another schema, or not the file that was written."""
    mend = "Restore the file as it was built, or build a new one (llmrl robustness build); figures of two sets are not comparable."
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; a test set is made by `llmrl robustness build ... --out {path}`") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: it cannot be read to its end ({type(error).__name__}: {error}). {mend}") from error
    first, _, body = data.partition(b"\n")
    try:
        head = json.loads(first)
    except ValueError as error:
        raise InputError(f"{path}: line 1 is no header of a robustness set; --set takes a file of `llmrl robustness build`") from error
    if not isinstance(head, dict) or head.get("kind") != KIND:
        raise InputError(f"{path}: not a robustness set (a trace file?); --set takes a file of `llmrl robustness build`")
    if head.get("schema") != SCHEMA:
        raise InputError(f"{path}: schema {head.get('schema')!r}; this version reads schema {SCHEMA}. {mend}")
    found = _digest(head, body)
    if found != head.get("sha256"):
        raise InputError(f"{path}: its content has sha256 {found[:12]}, its header says {str(head.get('sha256'))[:12]}: it was edited or cut short. {mend}")
    problems, items, traces = {}, [], []
    for line in body.splitlines():
        row = json.loads(line)
        kind = row.pop("type")
        if kind == "problem":
            problems[row["id"]] = Prompt(row["id"], tuple(row["messages"]), row["gold"], row["meta"])
        elif kind == "item":
            items.append(Item(**row))
        else:
            traces.append(BaseTrace(**row))
    return Suite(head, problems, items, traces)


@dataclass(frozen=True)
class Subject:
    """A model as the evaluation sees it. engine: `generate` and `score`; chat: `prompt_ids`, `text`, `unknown` and a tokenizer."""

    name: str
    engine: Any
    chat: Any

    @property
    def digest(self) -> str:
        return tokenizer_digest(self.chat.tokenizer)

    def encode(self, text: str) -> list[int]:
        return list(self.chat.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def join(self, prefix_ids: Sequence[int], text: str) -> list[int]:
        """prefix_ids with the text's ids behind them; tokenised anew as one text where a tokenizer would put a blank between the two."""
        ids = [*prefix_ids, *self.encode(text)]
        whole = self.chat.text(prefix_ids) + text
        return ids if self.chat.text(ids) == whole else self.encode(whole)

    def cannot(self, messages: Sequence[Message], prefix: str = "") -> str | None:
        """Why this context cannot be put to the model, or None."""
        for text in (*(m["content"] for m in messages), prefix):
            if (unknown := self.chat.unknown(text)) is not None:
                return f"the tokenizer has no token for {unknown!r}"
        return None

    def generate(self, asked: Sequence[Request | None]) -> list[Completion | None]:
        """All of them in one call; None where there was no request, or the context does not fit into the model's positions."""
        limit = getattr(self.engine, "max_length", None)
        fits = [r if r is not None and (not limit or len(r.context_ids) + r.sampling.max_new_tokens <= limit) else None for r in asked]
        done = iter(self.engine.generate([r for r in fits if r is not None]))
        return [None if r is None else next(done) for r in fits]

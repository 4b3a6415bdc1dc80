"""Rows -> `Prompt`s: columns, templates, refusals; the held-out split; and the stream that training draws from.

Nothing here imports torch, and nothing depends on the machine: the same source and the same recipe give the same prompts in the same
order everywhere, with any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmrl.records import InputError, Prompt
from llmrl.rows import BadRow, RowReader, Unusable, fill, refusal, template_fields
from llmrl.sources import open_source

__all__ = ["BadRow", "PromptStream", "PromptTable", "fill", "fingerprint", "read_prompts", "split_holdout", "template_fields"]

HEAD_ROWS = 1000
"""The columns of a source are those of its first rows; rows of a jsonl file need not all have the same keys."""


@dataclass(frozen=True)
class PromptTable:
    prompts: list[Prompt]
    dropped: list[BadRow]
    """Empty unless on_bad = "drop"."""


def read_prompts(
    path: str,
    *,
    base: Path,
    split: str | None = None,
    args: dict[str, Any] | None = None,
    columns: dict[str, str] | None = None,
    template: str | None = None,
    system: str | None = None,
    answer_after: str | None = None,
    limit: int | None = None,
    on_bad: Literal["refuse", "drop"] = "refuse",
    need_answer: bool = True,
    need_solution: bool = False,
    tokens_of: Callable[[Prompt], int] | None = None,
    max_prompt_tokens: int | None = None,
) -> PromptTable:
    """Reads a dataset; every row that cannot be used is named.

    path: `x.jsonl`, `x.jsonl.gz`, `x.parquet`, `x.csv` (absolute, relative to `base`, or relative to the working directory);
        `hub:owner/name` (`datasets.load_dataset` with `split`, default "train", and `args`); `gym:task` (reasoning-gym, `args` to the
        task); or a generator function called with `args`: a name of `llmrl.tasks`, `pkg.module:function`, `./file.py:function`.
    split: for sources other than the Hub, the rows whose column `split` has this value.
    columns: {"prompt" | "messages" | "answer" | "id" | "solution": column}. "a.b" reaches into a nested column, "" means none;
        what is left open is looked for under `rows.DEFAULT_COLUMNS`. A row without an id gets its number. The prompt may be a list of
        messages.
    template: the user message, `{column}` being filled in; see `rows.template_fields`. Without it the prompt column is the message.
    system: a system message put before every prompt.
    answer_after: the answer is what follows the last occurrence of this text; the solution is then the whole text, unless there is a
        solution column of its own.
    limit: stop after this many usable rows.
    on_bad: "refuse" raises one InputError for all bad rows; "drop" leaves them out and returns them in `dropped`.
    tokens_of, max_prompt_tokens: the prompt's length in tokens and the longest that is accepted.

    All columns not used for prompt, messages, answer and id go to Prompt.meta (with a template, the prompt's own column too), and the
    solution goes to meta["solution"]. Raises InputError for a source, column or template that does not exist, and when no row is left.
    """
    label, rows = open_source(path, base=base, split=split, args=args)
    head = list(islice(rows, HEAD_ROWS))
    reader = RowReader(label, head, columns or {}, template, system, answer_after, need_answer, need_solution)
    prompts: list[Prompt] = []
    bad: list[BadRow] = []
    row_of_id: dict[str, int] = {}
    for source_row in chain(head, rows):
        if limit is not None and len(prompts) >= limit:
            break
        try:
            prompt = reader.prompt(source_row)
            _check_length(prompt, tokens_of, max_prompt_tokens)
            if (first := row_of_id.setdefault(prompt.id, source_row.number)) != source_row.number:
                raise Unusable(f"the same id as row {first}")
        except Unusable as reason:
            bad.append(BadRow(source_row.number, reader.id_of(source_row), str(reason)))
        else:
            prompts.append(prompt)
    if not prompts or (bad and on_bad == "refuse"):
        raise InputError(refusal(label, bad, len(prompts)))
    return PromptTable(prompts, bad)


def _check_length(prompt: Prompt, tokens_of: Callable[[Prompt], int] | None, limit: int | None) -> None:
    if limit is None:
        return
    if tokens_of is None:
        raise ValueError("max_prompt_tokens needs tokens_of")
    if (n_tokens := tokens_of(prompt)) > limit:
        raise Unusable(f"the prompt has {n_tokens} tokens, over the limit of {limit}")


def split_holdout(prompts: Sequence[Prompt], n: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held_out): the n prompts with the smallest hash of (seed, id) are held out; both lists keep the rows' order.

    The choice depends on the ids alone, not on the order of the rows. A question is held out once, and its other copies (the same
    messages under another id) are left out of `train`: then len(train) + n < len(prompts). InputError when that leaves nothing to train on.
    """
    if n < 0:
        raise ValueError(f"n is {n}; it must be at least 0")
    if n >= len(prompts):
        raise InputError(f"{n} prompts are to be held out, but the dataset has {len(prompts)}; hold out fewer")
    by_hash = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}\0{prompt.id}".encode()).digest())
    held: dict[str, str] = {}
    for prompt in by_hash:
        if len(held) == n:
            break
        held.setdefault(_question(prompt), prompt.id)
    train = [prompt for prompt in prompts if _question(prompt) not in held]
    if len(held) < n or not train:
        n_questions = len({_question(prompt) for prompt in prompts})
        raise InputError(f"{n} prompts are to be held out, but the dataset has {n_questions} different questions; hold out fewer")
    ids = set(held.values())
    return train, [prompt for prompt in prompts if prompt.id in ids]


def _question(prompt: Prompt) -> str:
    return json.dumps(prompt.messages, sort_keys=True)


class PromptStream:
    """An endless, shuffled, resumable sequence of prompts, shared out over ranks.

    Epoch e is the permutation that sorts the first len(prompts) words of Philox(key=(seed, e)): raw words, because numpy promises to keep
    that stream. Epochs follow one another without a gap and together give the global positions 0, 1, 2, ...; rank r takes r, r + world,
    r + 2 world, ...
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, rank: int = 0, world: int = 1, shuffle: bool = True) -> None:
        if not prompts:
            raise InputError("the dataset has no prompts to draw from")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of world {world}")
        self.prompts = list(prompts)
        self.seed, self.rank, self.world, self.shuffle = seed, rank, world, shuffle
        self.position = 0
        """Global: all positions below it have been taken by some rank (every rank takes the same number)."""
        self._epoch = -1
        self._order: np.ndarray | None = None
        self._fingerprint = fingerprint(self.prompts)

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts of this rank's share."""
        if n < 0:
            raise ValueError(f"n is {n}; it must be at least 0")
        taken = [self._at(self.position + i * self.world + self.rank) for i in range(n)]
        self.position += n * self.world
        return taken

    def coming(self, n: int) -> list[Prompt]:
        """The prompts at the next n global positions: what all ranks together take next. Takes none of them."""
        return [self._at(self.position + i) for i in range(n)]

    def __iter__(self) -> Iterator[Prompt]:
        while True:
            yield self.take(1)[0]

    def _at(self, position: int) -> Prompt:
        epoch, index = divmod(position, len(self.prompts))
        if not self.shuffle:
            return self._visited(index, epoch)
        if self._order is None or epoch != self._epoch:
            words = np.random.Philox(key=[self.seed % 2**64, epoch]).random_raw(len(self.prompts))
            self._epoch, self._order = epoch, np.argsort(words, kind="stable")
        return self._visited(int(self._order[index]), epoch)

    def _visited(self, index: int, epoch: int) -> Prompt:
        return replace(self.prompts[index], visit=epoch) if epoch else self.prompts[index]

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank, and good for any number of ranks."""
        return {"position": self.position, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises InputError when the state was saved with other prompts."""
        if state["fingerprint"] != self._fingerprint:
            raise InputError(
                f"the checkpoint was made with another dataset (fingerprint {str(state['fingerprint'])[:12]}, this one has "
                f"{self._fingerprint[:12]}, {len(self.prompts)} prompts): resume with the data, columns, template and held-out split it had"
            )
        self.position = int(state["position"])


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """sha256 (hex) over ids, messages and answers, in order. Ids alone would not do: where a file has none they are row numbers."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.messages, prompt.answer], sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()

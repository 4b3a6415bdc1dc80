"""A store by prompt that rules may read and write across steps (replay, failures, baselines); part of every checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any


class Memory:
    """name -> prompt id -> list of JSON-able entries, oldest first, at most `cap` of them."""

    def __init__(self, cap: int = 16):
        if cap < 1:
            raise ValueError(f"cap is {cap}; it must be at least 1")
        self.cap = cap
        self._store: dict[str, dict[str, list[Any]]] = {}
        self._new: list[tuple[str, str, Any]] = []

    def recall(self, name: str, prompt_id: str) -> list[Any]:
        """The entries, oldest first, this step's own at the end; empty where there are none. Copies: changing them changes nothing here."""
        fresh = [entry for n, p, entry in self._new if (n, p) == (name, prompt_id)]
        return copy.deepcopy((self._store.get(name, {}).get(prompt_id, []) + fresh)[-self.cap :])

    def remember(self, name: str, prompt_id: str, entry: Any) -> None:
        """Adds an entry; the oldest one leaves when there are more than `cap`. TypeError if it is not JSON-able."""
        self._new.append((name, prompt_id, json.loads(json.dumps(entry))))  # what comes back after a resume is what is read now

    def end_step(self, gather: Callable[[Any], list[Any]] = lambda mine: [mine]) -> None:
        """Every rank takes over what all ranks remembered in the step, so that all hold the same, whichever rank draws a prompt next.

        gather: an object -> those of all ranks, in their order.
        """
        for name, prompt_id, entry in [new for mine in gather(self._new) for new in mine]:
            entries = self._store.setdefault(name, {}).setdefault(prompt_id, [])
            entries.append(entry)
            del entries[: -self.cap]
        self._new = []

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank, between steps."""
        if self._new:
            raise RuntimeError("the memory holds entries of a step that has not ended; a checkpoint now would lose them (end_step comes first)")
        return {"cap": self.cap, "store": self._store}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cap, self._store = state["cap"], copy.deepcopy(state["store"])

"""A store by prompt that rules may read and write across steps (replay, failures, baselines); part of every checkpoint."""

from __future__ import annotations

import copy
import json
from typing import Any


class Memory:
    """name -> prompt id -> list of JSON-able entries, oldest first, at most `cap` of them."""

    def __init__(self, cap: int = 16):
        if cap < 1:
            raise ValueError(f"cap is {cap}; it must be at least 1")
        self.cap = cap
        self._store: dict[str, dict[str, list[Any]]] = {}

    def recall(self, name: str, prompt_id: str) -> list[Any]:
        """The entries, oldest first; empty where there are none. Copies: changing them changes nothing here."""
        return copy.deepcopy(self._store.get(name, {}).get(prompt_id, []))

    def remember(self, name: str, prompt_id: str, entry: Any) -> None:
        """Adds an entry; the oldest one leaves when there are more than `cap`. TypeError if it is not JSON-able."""
        entry = json.loads(json.dumps(entry))  # what comes back after a resume is what is read now
        entries = self._store.setdefault(name, {}).setdefault(prompt_id, [])
        entries.append(entry)
        del entries[: -self.cap]

    def state_dict(self) -> dict[str, Any]:
        return {"cap": self.cap, "store": self._store}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cap, self._store = state["cap"], copy.deepcopy(state["store"])

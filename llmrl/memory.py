"""A store by prompt that rules may read and write across steps (replay, failures, baselines); part of every checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any


class Memory:
    """name -> prompt id -> list of JSON-able entries, oldest first, at most `cap` of them; and running averages by name."""

    def __init__(self, cap: int = 16):
        if cap < 1:
            raise ValueError(f"cap is {cap}; it must be at least 1")
        self.cap = cap
        self._store: dict[str, dict[str, list[Any]]] = {}
        self._new: list[tuple[str, str, Any]] = []
        self._caps: dict[str, int] = {}
        self._averages: dict[str, float] = {}
        self._tracked: list[tuple[str, float, float, float]] = []

    def recall(self, name: str, prompt_id: str) -> list[Any]:
        """The entries, oldest first, this step's own at the end; empty where there are none. Copies: changing them changes nothing here."""
        fresh = [entry for n, p, entry in self._new if (n, p) == (name, prompt_id)]
        return copy.deepcopy((self._store.get(name, {}).get(prompt_id, []) + fresh)[-self._caps.get(name, self.cap) :])

    def remember(self, name: str, prompt_id: str, entry: Any, *, cap: int | None = None) -> None:
        """Adds an entry; the oldest one leaves when there are more than `cap` (of this name; default: the store's). TypeError if it is not JSON-able."""
        if cap is not None:
            self._caps[name] = cap
        self._new.append((name, prompt_id, json.loads(json.dumps(entry))))  # what comes back after a resume is what is read now

    def track(self, name: str, total: float, n: float, *, decay: float) -> None:
        """Adds values to this step's mean of `name`, `total` being a sum of n of them; the running average takes it in when the step ends.

        average <- decay * average + (1 - decay) * mean over all ranks; the first step's mean starts it, a step without values leaves it.
        """
        self._tracked.append((name, float(total), float(n), decay))

    def average(self, name: str) -> float | None:
        """The running average up to the step before; None before its first value."""
        return self._averages.get(name)

    def branch(self) -> Memory:
        """A memory for rollouts that run ahead: it goes on holding what this one holds now. What they remember in it comes back by `join`."""
        view = Memory(self.cap)
        view._store = {name: dict(entries) for name, entries in self._store.items()}
        view._caps, view._averages = dict(self._caps), dict(self._averages)
        return view

    def join(self, view: Memory) -> None:
        """Takes over what was remembered and tracked in a branch, as if it had been here."""
        if view is not self:
            self._caps.update(view._caps)
            self._new, self._tracked = self._new + view._new, self._tracked + view._tracked

    def end_step(self, gather: Callable[[Any], list[Any]] = lambda mine: [mine]) -> None:
        """Every rank takes over what all ranks remembered in the step, so that all hold the same, whichever rank draws a prompt next.

        gather: an object -> those of all ranks, in their order.
        """
        sums: dict[str, list[float]] = {}
        for new, caps, tracked in gather((self._new, self._caps, self._tracked)):
            self._caps.update(caps)
            for name, prompt_id, entry in new:
                there = self._store.setdefault(name, {})
                there[prompt_id] = [*there.get(prompt_id, []), entry][-self._caps.get(name, self.cap) :]  # a new list: a branch keeps the old one
            for name, total, n, decay in tracked:
                pair = sums.setdefault(name, [0.0, 0.0, decay])
                pair[0], pair[1] = pair[0] + total, pair[1] + n
        for name, (total, n, decay) in sums.items():
            if n:
                before = self._averages.get(name)
                self._averages[name] = total / n if before is None else decay * before + (1 - decay) * total / n
        self._new, self._tracked = [], []

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank, between steps."""
        if self._new or self._tracked:
            raise RuntimeError("the memory holds entries of a step that has not ended; a checkpoint now would lose them (end_step comes first)")
        return {"cap": self.cap, "caps": self._caps, "store": self._store, "averages": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cap, self._store = state["cap"], copy.deepcopy(state["store"])
        self._caps, self._averages = dict(state.get("caps", {})), dict(state.get("averages", {}))

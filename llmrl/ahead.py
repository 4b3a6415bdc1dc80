"""Rollouts of coming steps that are under way while the present one is learned from: engine.max_staleness = k.

Once step t has its samples, and before it learns, the rollouts of the steps up to t + k are begun: in a run that is under way one step's
(t + k), each in a thread of its own. What makes the result the same in every run, whatever is fast or slow:

- prompts: those of a step are taken from the stream where its rollouts begin, by the main thread. A rule that draws more within a step
  (dynamic sampling) waits for them until the step before has begun the rollouts that it begins: all draws have one order.
- memory: a step's rollouts see what the store held when they began (Memory.branch); what they remember is taken over when they are trained.
- checkpoints and evaluations: nothing is under way at one. Rollouts are begun only as far as the next of them, so that the queue runs dry
  there, and a run that is resumed begins the same rollouts with the same seeds again.

Weights. k = 1: all that was begun is in before they change (`settle`). k > 1: rollouts go on across an update, which only an engine that
answers request by request can do (`streams`): it lets the requests in flight end, takes the weights, and goes on with the waiting ones. A
completion is of one version, a group may mix them; every sample carries its own, and what is older than k steps when it is trained is
dropped (step.drop_stale). So an update waits for single requests instead of whole rollouts. That gains time where a rollout is many requests
one after the other (turns, refills, more requests than the servers hold) and nothing where it is one wave of them: a step then takes as long
as its slowest request, with any k >= 1.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Begun(Generic[T]):
    step: int
    turn: threading.Event = field(default_factory=threading.Event)
    """Set when it may draw more prompts."""
    work: Future[T] = field(default_factory=Future)


class Ahead(Generic[T]):
    """The queue. `depth`: steps under way at a time, at most."""

    def __init__(self, depth: int = 1) -> None:
        self._threads = ThreadPoolExecutor(max(1, depth), thread_name_prefix="llmrl-rollouts")
        self._begun: deque[_Begun[T]] = deque()

    def take(self, step: int) -> T | None:
        """What was made for `step`, when it is done; None where it was not begun. Raises what went wrong in it."""
        if not self._begun:
            return None
        if self._begun[0].step != step:
            raise RuntimeError(f"rollouts of step {self._begun[0].step} are next, those of step {step} were asked for")
        return self._begun.popleft().work.result()

    def begin(self, step: int, ahead: int, make: Callable[[int, Callable[[], object]], Callable[[], T]]) -> None:
        """Begins what is missing of the steps up to step + ahead, where `step` is the one that was taken last.

        make(n, turn) is called here and now; what it returns runs in a thread. turn() returns when step n may draw more prompts.
        """
        last = self._begun[-1].step if self._begun else step
        for n in range(last + 1, step + ahead + 1):
            begun: _Begun[T] = _Begun(n)
            begun.work = self._threads.submit(make(n, begun.turn.wait))
            self._begun.append(begun)
        if self._begun:
            self._begun[0].turn.set()

    def settle(self) -> None:
        """Waits for all that was begun. What failed in it is told when it is taken."""
        for begun in self._begun:
            begun.work.exception()

    def close(self) -> None:
        """Lets what is under way run into its end, and begins nothing more."""
        for begun in self._begun:
            begun.turn.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

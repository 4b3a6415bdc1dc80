"""Verifier processes: a deadline for every item, a hard kill, and a Verdict with a status for whatever went wrong.

One manager thread owns every worker process and talks to them over sockets that never block; `Scorer.score` puts a call in its
queue and waits. A worker judges the items of a chunk one after the other and reports the start and the end of each, so that
finished items are never lost and a deadline belongs to one item. Times are time.monotonic() seconds, one clock for all
processes of a machine. Workers answer in JSON: nothing that a verifier returns is unpickled in the trainer.
"""
# Why not a kept library: pebble puts its deadline on a whole chunk (the chunk's finished items are lost with it) and kills one
# pid, not the group; loky and concurrent.futures have no deadline. All of them start workers through multiprocessing, which
# imports the user's main script, and with it torch, again in every worker.

from __future__ import annotations

import contextlib
import pickle
import selectors
import socket
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.records import InputError, Prompt, Verdict
from llmrl.scoring_worker import WATCHDOG, describe, frame
from llmrl.worker_process import WorkerProcess, exit_text

START_LIMIT_S = 120.0
"""A worker that has not built its verifier after this long counts as failed."""
_CHUNK_S = 0.05  # work a chunk should hold: long against the 0.2 ms that sending one costs, short against a step
_CHUNK_MAX = 64
_RATE_MIN_ITEMS = 20


class FailureRateError(RuntimeError):
    """More of a call's items could not be judged than `max_failure_rate` allows: the reward would be noise."""


class _Call:
    """One call of score(), shared by the calling thread and the manager."""

    def __init__(self, items: Sequence[tuple[Prompt, str]]) -> None:
        now = time.monotonic()
        self.verdicts: list[Verdict | None] = [None] * len(items)
        self.left = len(items)
        self.done = threading.Event()
        self.abandoned = False
        self.items = [_Item(self, i, prompt, response, now) for i, (prompt, response) in enumerate(items)]


@dataclass(eq=False)
class _Item:
    call: _Call
    index: int
    prompt: Prompt
    response: str
    queued: float
    deaths: int = 0
    """Workers that died on it."""


class Scorer:
    """A pool of processes that each hold one verifier. Use it from any thread; close it, or use it as a context manager.

    timeout_s: seconds an item may take, from the moment a worker starts on it; then the worker's process group is killed.
    memory_mb: address space that a worker may take beyond what it has once the verifier is built (RLIMIT_AS, inherited by its
    children; Linux); 0 = no limit. An item that runs into it ends as error.
    concurrency: items of a coroutine verifier in flight in one worker.
    max_failure_rate: share of a call's items (calls of 20 and more) that may end as timeout or error; above it score() raises.
    A verifier's stdout goes nowhere and its stdin is empty; its stderr is the trainer's.
    Raises InputError when the verifier cannot be built, with the worker's own message.
    """

    def __init__(
        self,
        factory_ref: str,
        kwargs: dict[str, Any],
        base: Path,
        *,
        workers: int = 2,
        timeout_s: float = 10.0,
        memory_mb: int = 2048,
        concurrency: int = 16,
        max_failure_rate: float = 0.2,
    ) -> None:
        if workers < 1 or concurrency < 1 or not timeout_s > 0:
            given = f"workers = {workers}, concurrency = {concurrency}, timeout_s = {timeout_s}"
            raise InputError(f"[verifier]: {given}; expected at least 1, at least 1 and more than 0 seconds")
        self.factory_ref, self.timeout_s, self.max_failure_rate = factory_ref, timeout_s, max_failure_rate
        self._setup = frame({
            "ref": factory_ref, "kwargs": dict(kwargs), "base": Path(base), "memory_mb": memory_mb, "timeout_s": timeout_s, "concurrency": concurrency,
        })  # fmt: skip
        self.about: dict[str, Any] = {}
        """What the verifier tells of how it runs: its attribute `about`, e.g. {"sandbox": "bwrap 0.8.0"}."""
        self._count, self._concurrency = workers, concurrency
        self._target = 1  # one worker tells whether the verifier can be built; the others follow
        self._workers: list[WorkerProcess] = []
        self._failed_starts = 0
        self._start_error = ""
        self._refusal = ""
        self._pending: deque[_Item] = deque()
        self._incoming: deque[_Call] = deque()
        self._pace_s = _CHUNK_S / 8
        self._stats: dict[str, float] = {"ok": 0, "no_answer": 0, "timeout": 0, "error": 0, "respawns": 0, "queue_s": 0.0, "run_s": 0.0}
        self._counters: dict[str, float] = {}
        self._settled = threading.Event()
        self._closing = False
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ, None)
        quiet = subprocess.DEVNULL
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG], stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
        )
        self._thread = threading.Thread(target=self._manage, name="llmrl-scorer", daemon=True)
        self._thread.start()
        self._settled.wait(START_LIMIT_S + 30)
        if self._refusal or not self._settled.is_set():
            self.close()
            raise InputError(self._refusal or f"[verifier]: no worker was ready after {START_LIMIT_S:g} s")

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """One Verdict an item, in order. Raises FailureRateError, and RuntimeError once the scorer is closed; never a verifier's error."""
        if not items:
            return []
        call = _Call(items)
        with self._lock:
            if self._closing or not self._thread.is_alive():
                raise RuntimeError("this Scorer is closed")
            self._incoming.append(call)
        self._wake()
        try:
            while not call.done.wait(1.0) and self._thread.is_alive():
                pass
        except BaseException:
            call.abandoned = True  # Ctrl-C: what is still queued of it is not worth a worker's time
            raise
        verdicts = [v for v in call.verdicts if v is not None]
        if len(verdicts) < len(items):
            raise RuntimeError(f"this Scorer was closed with {len(items) - len(verdicts)} of {len(items)} items unjudged")
        self.check_rate(items, verdicts)
        return verdicts

    def stats(self) -> dict[str, float]:
        """Since the start: items by status (ok, no_answer, timeout, error), queue_s and run_s summed over items, respawns.

        Besides these what the verifier counts itself in its attribute `counters` (e.g. "judge/calls"), summed over workers.
        """
        return {**self._counters, **self._stats}

    def close(self) -> None:
        """Kills the workers and reaps them. Calls that wait in other threads end with RuntimeError. May be called twice."""
        with self._lock:
            self._closing = True
        self._wake()
        self._thread.join()
        self._wake_in.close()
        self._wake_out.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake anyway; closed: there is nobody to wake
            self._wake_in.send(b"x")

    def check_rate(self, items: Sequence[tuple[Prompt, str]], verdicts: Sequence[Verdict], *, by: str = "") -> None:
        """The alarm of score(), for items that came in several small calls, or that something else judged (`by`). Raises FailureRateError."""
        failed = [(p, r, v) for (p, r), v in zip(items, verdicts, strict=True) if v.score is None]
        if len(items) < _RATE_MIN_ITEMS or len(failed) <= self.max_failure_rate * len(items):
            return
        kinds, seen, ranked = Counter((v.status, v.detail) for _, _, v in failed), Counter(), []
        for p, r, v in failed:  # one example of each kind before a second of any, common kinds first
            kind = (v.status, v.detail)
            ranked.append((seen[kind], -kinds[kind], f"  prompt {p.id!r}: {v.status}: {v.detail[:300]}; response {r[:160]!r}"))
            seen[kind] += 1
        raise FailureRateError(
            f"{len(failed)} of {len(items)} responses could not be judged by {by or self.factory_ref}, more than max_failure_rate = "
            f"{self.max_failure_rate:g}:\n" + "\n".join(line for *_, line in sorted(ranked)[:3])
        )

    # ------------------------------------------------------------ the manager thread

    def _manage(self) -> None:
        checked = 0.0
        try:
            while not self._closing and not (self._start_error and not self._settled.is_set()):
                self._admit()
                self._staff()
                self._dispatch()
                for key, events in self._selector.select(self._nap()):
                    if key.data is None:
                        self._wake_out.recv(4096)
                    elif key.data in self._workers:
                        self._talk(key.data, events)
                if time.monotonic() - checked > 0.02:
                    self._enforce()
                    checked = time.monotonic()
        finally:
            self._closing = True
            if not self._settled.is_set():
                self._refusal = self._start_error or "[verifier]: the thread that manages its workers failed; see stderr"
            for worker in self._workers:
                worker.kill()
            self._watchdog.kill()
            self._watchdog.communicate()
            self._selector.close()
            left = [*self._pending, *(item for worker in self._workers for item in worker.chunk.values())]
            for call in [*{item.call for item in left}, *self._incoming]:
                call.done.set()  # score() finds verdicts missing and says so
            self._settled.set()

    def _admit(self) -> None:
        while self._incoming:
            self._pending.extend(self._incoming.popleft().items)
            self._failed_starts = 0

    def _staff(self) -> None:
        """Keeps the number of workers up; after three failed starts in a row what waits is answered with the reason."""
        while len(self._workers) < self._target and self._failed_starts < 3:
            self._spawn()
        if not self._workers:
            verdict = Verdict(None, "error", detail=f"no worker could be started again: {self._start_error}")
            while self._pending:
                self._deliver(self._pending.popleft(), verdict)

    def _spawn(self) -> None:
        self._workers.append(WorkerProcess(self._setup, self._selector))
        self._tell_watchdog()

    def _tell_watchdog(self) -> None:
        assert self._watchdog.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody killed it; a run need not end for that
            self._watchdog.stdin.write(" ".join(f"-{w.process.pid}" for w in self._workers).encode() + b"\n")
            self._watchdog.stdin.flush()

    def _dispatch(self) -> None:
        for worker in self._workers:
            room = self._room(worker) if worker.ready and self._pending else 0
            packed: list[tuple[int, bytes]] = []
            while self._pending and len(packed) < room:
                item = self._pending[0]
                if item.deaths and (worker.chunk or packed):
                    break  # a worker has died on it: it goes alone, so that nobody dies with it
                self._pending.popleft()
                if item.call.abandoned:
                    continue
                try:  # one pickle an item: what cannot be read in the worker is that item's failure only
                    body = pickle.dumps((item.prompt, item.response))
                except Exception as error:
                    self._deliver(item, Verdict(None, "error", detail=f"the row cannot be sent to a worker: {describe(error)}"))
                    continue
                worker.chunk[worker.sent] = item
                packed.append((worker.sent, body))
                worker.sent += 1
                if item.deaths:
                    break
            if packed:
                worker.send(packed)

    def _room(self, worker: WorkerProcess) -> int:
        """How many items it may be sent now."""
        if any(item.deaths for item in worker.chunk.values()):
            return 0
        if worker.concurrent:
            return self._concurrency - len(worker.chunk)
        if worker.chunk:
            return 0
        share = -(-len(self._pending) // (2 * self._count))  # the last chunks of a call are small, so that workers end together
        return max(1, min(_CHUNK_MAX, int(_CHUNK_S / self._pace_s), share))

    def _talk(self, worker: WorkerProcess, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            worker.write()
        if events & selectors.EVENT_READ and not self._hear(worker):
            self._bury(worker)

    def _hear(self, worker: WorkerProcess) -> bool:
        """Takes in what the worker has said; False when it has hung up."""
        try:
            for message in worker.messages():
                self._heed(worker, message)
        except (OSError, ValueError, LookupError, TypeError):  # the last three: somebody wrote on its socket, nothing it says can be trusted
            return False
        return True

    def _heed(self, worker: WorkerProcess, message: list[Any]) -> None:
        match message:
            case ["start", position, at]:
                worker.started[position] = at
                self._stats["queue_s"] += at - worker.chunk[position].queued
            case ["done", position, at, score, status, answer, detail]:
                took = at - worker.started.pop(position)
                self._pace_s += 0.1 * (max(took, 1e-5) - self._pace_s)
                self._stats["run_s"] += took
                self._deliver(worker.chunk.pop(position), Verdict(score, status, answer, detail))
            case ["concurrent"]:
                worker.concurrent = True
            case ["count", {**increments}]:
                for name, increment in increments.items():
                    self._counters[name] = self._counters.get(name, 0.0) + float(increment)
            case ["ready", {**about}]:
                self.about = about
                longest = about.get("worst_case_s", 0.0)
                if longest >= self.timeout_s:
                    self._start_error = (
                        f"[verifier]: {self.factory_ref} may take {longest:g} s for one response by its own limits, and scoring.timeout_s is "
                        f"{self.timeout_s:g}; raise scoring.timeout_s (--timeout), or lower the verifier's own limit"
                    )
                    return
                worker.ready, self._target, self._failed_starts, self._start_error = True, self._count, 0, ""
                self._settled.set()
            case ["unbuildable", text]:
                self._start_error = text

    def _deliver(self, item: _Item, verdict: Verdict) -> None:
        self._stats[verdict.status] += 1
        item.call.verdicts[item.index] = verdict
        item.call.left -= 1
        if not item.call.left:
            item.call.done.set()

    def _nap(self) -> float:
        """Seconds until the next deadline; news from workers and calls wakes earlier."""
        ends = [at + self._limit_s(worker) for worker in self._workers for at in worker.started.values()]
        return min(max(0.001, min(ends) - time.monotonic()) if ends else 1.0, 0.1 if self._pending or ends else 1.0)

    def _limit_s(self, worker: WorkerProcess) -> float:
        """After how long an item's worker is killed. An awaited item is cancelled by its own event loop first, which costs no process."""
        return self.timeout_s + (1.0 if worker.concurrent else 0.0)

    def _enforce(self) -> None:
        for worker in list(self._workers):
            if not self._hear(worker):  # before judging: what it said while this thread was held up counts
                self._bury(worker)
                continue
            now = time.monotonic()
            late = [position for position, at in worker.started.items() if now - at > self._limit_s(worker)]
            waits_for_start = bool(worker.chunk) and not worker.started and now - worker.touched > self.timeout_s + 5
            if late:
                self._stats["run_s"] += sum(now - worker.started.pop(position) for position in late)
                verdict = Verdict(None, "timeout", detail=f"no verdict within {self.timeout_s:g} s; the worker was killed")
                ended = [worker.chunk.pop(position) for position in late]
                self._bury(worker, guilty=False)
                for item in ended:
                    self._deliver(item, verdict)
            elif waits_for_start or (not worker.ready and now - worker.touched > START_LIMIT_S):
                self._start_error = self._start_error or f"a worker was silent for {now - worker.touched:.0f} s"
                self._bury(worker)
            elif worker.process.poll() is not None:  # a child that it left behind may hold its socket open
                self._bury(worker)

    def _bury(self, worker: WorkerProcess, guilty: bool = True) -> None:
        """Ends the worker; what it had goes back to the front of the queue, but for an item on which a second worker has died."""
        code = worker.kill()
        self._workers.remove(worker)
        self._tell_watchdog()
        suspects = (set(worker.started) or set(sorted(worker.chunk)[:1])) if guilty else set()  # it died on one of those
        for position, item in sorted(worker.chunk.items(), reverse=True):
            item.deaths += position in suspects
            if item.deaths > 1:
                self._deliver(item, Verdict(None, "error", detail=f"two workers died on this item, the second with {exit_text(code)}"))
            else:
                self._pending.appendleft(item)
        if worker.ready:
            self._stats["respawns"] += 1
        else:
            self._failed_starts += 1
            self._start_error = self._start_error or f"[verifier]: the worker ended with {exit_text(code)} while it built the verifier"

"""What runs in a verifier process: builds one verifier, judges the items it is sent, reports in JSON lines.

Frames from the trainer are pickles, length first; the first one says what to build, every later one is a list of (number, item).
Lines to the trainer: ["ready", about] or ["unbuildable", text]; for every item ["start", number, at] and ["done", number, at, score,
status, answer, detail], `at` in time.monotonic() seconds: one clock for all processes of a machine; ["concurrent"] once, when the verifier
has returned its first awaitable; ["count", {name: increment}] for what the verifier counts itself.
Plain verifiers are called one item after the other. Coroutine verifiers run together in one event loop, `concurrency` items at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import pickle
import socket
import sys
import time
from typing import Any

from llmrl import plugins
from llmrl.records import InputError, Verdict, Verifier

BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[2]); from llmrl.scoring_worker import worker_main as w; w(int(sys.argv[1]))"
# Reads the worker groups line by line; its input ends when the parent does, however that died, and then it kills the last list.
# prctl(PR_SET_PDEATHSIG) would miss the children of a worker, and a thread in a worker cannot run while C code holds the GIL.
WATCHDOG = 'g=; while read -r line; do g=$line; done; [ -z "$g" ] || kill -9 $g'
_TEXT_MAX = 4000  # characters of answer and detail that travel back


def worker_main(fd: int) -> None:
    """Serves one verifier on socket `fd` until the other side closes. Runs in a process of its own."""
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    source = sock.makefile("rb", buffering=0)  # unbuffered: the event loop may take over the socket between two frames
    try:
        setup = _read_frame(source)
        if setup is None:
            return
        _adopt_orphans()
        verify: Verifier = plugins.use(setup["ref"], setup["kwargs"], home="llmrl.rewards", base=setup["base"], where="[verifier]")
        about = json.loads(json.dumps(getattr(verify, "about", {})))
        _limit_memory(setup["memory_mb"])
    except BaseException as error:  # SystemExit of a plug-in's module, MemoryError: all of them are told
        text = str(error) if isinstance(error, InputError) else f"[verifier]: building it failed with {describe(error)}"
        sock.sendall(_line("unbuildable", text))
        return
    sock.sendall(_line("ready", about))
    server = _Server(sock, verify, setup["timeout_s"], setup["concurrency"])
    while (items := _read_frame(source)) is not None:
        left = server.judge_in_turn(items)
        if left is not None:
            asyncio.run(server.judge_together(left))
            return


class _Server:
    def __init__(self, sock: socket.socket, verify: Verifier, timeout_s: float, concurrency: int) -> None:
        self.sock, self.verify, self.timeout_s, self.concurrency = sock, verify, timeout_s, concurrency
        self.owner = os.getpid()
        self.counted: dict[str, float] = {}

    def judge_in_turn(self, items: list[tuple[int, bytes]]) -> list[tuple[int, Any]] | None:
        """Judges all items, and returns None; or, where the verifier answers with an awaitable, it and the items behind it."""
        report = _line("start", items[0][0], time.monotonic())
        for place, (number, packed) in enumerate(items):
            self.sock.sendall(report)
            found = self._call(packed)
            self._stay_one()
            if inspect.isawaitable(found):
                self.sock.sendall(_line("concurrent"))
                return [(number, found), *items[place + 1 :]]
            report = self._done(number, found)
            if place + 1 < len(items):
                report += _line("start", items[place + 1][0], time.monotonic())
        self.sock.sendall(report)
        return None

    async def judge_together(self, left: list[tuple[int, Any]]) -> None:
        """Goes on with what judge_in_turn has left, and serves all later items, `concurrency` at a time."""
        self.sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=self.sock)
        gate, tasks = asyncio.Semaphore(self.concurrency), set()

        async def one(number: int, item: Any) -> None:
            async with gate:
                if isinstance(item, bytes):  # the first awaitable has been reported as started
                    writer.write(_line("start", number, time.monotonic()))
                    item = self._call(item)
                verdict = await self._wait(item) if inspect.isawaitable(item) else item
                self._stay_one()
                writer.write(self._done(number, verdict))

        items: list[tuple[int, Any]] | None = left
        while items is not None:
            for number, item in items:
                task = asyncio.create_task(one(number, item))
                tasks.add(task)  # the loop holds tasks weakly
                task.add_done_callback(tasks.discard)
            items = await _read_frame_async(reader)

    async def _wait(self, awaitable: Any) -> Any:
        limit = asyncio.timeout(self.timeout_s)
        try:
            async with limit:
                return await awaitable
        except BaseException as error:  # its own TimeoutError is its failure; ours is the deadline
            if limit.expired():
                return Verdict(None, "timeout", detail=f"no verdict within {self.timeout_s:g} s; the call was cancelled")
            return Verdict(None, "error", detail=describe(error))

    def _call(self, packed: bytes) -> Any:
        try:
            prompt, response = _unpack(packed)
            return self.verify(prompt, response)
        except BaseException as error:  # SystemExit, MemoryError and RecursionError are a verifier's failure too
            return Verdict(None, "error", detail=describe(error))

    def _done(self, number: int, found: Any) -> bytes:
        """The line that reports it, behind one for what the verifier has counted since."""
        v = _checked(found)
        return self._counts() + _line("done", number, time.monotonic(), v.score, v.status, v.answer, v.detail)

    def _counts(self) -> bytes:
        now = {str(name): float(total) for name, total in getattr(self.verify, "counters", {}).items()}
        new = {name: total - self.counted.get(name, 0.0) for name, total in now.items() if total != self.counted.get(name, 0.0)}
        self.counted = now
        return _line("count", new) if new else b""

    def _stay_one(self) -> None:
        if os.getpid() != self.owner:  # a verifier that forks and lets the child return must not answer twice
            os._exit(0)


def _checked(found: Any) -> Verdict:
    if not isinstance(found, Verdict):
        return Verdict(None, "error", detail=f"the verifier returned {type(found).__name__}; it must return a Verdict")
    try:
        answer = None if found.answer is None else str(found.answer)[:_TEXT_MAX]
        return Verdict(None if found.score is None else float(found.score), found.status, answer, str(found.detail)[:_TEXT_MAX])
    except BaseException as error:  # an answer whose text cannot be made
        return Verdict(None, "error", detail=describe(error))


def describe(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as second:  # an exception whose text cannot be made
        text = f"(its text fails with {type(second).__name__})"
    return f"{type(error).__name__}: {text}"[:_TEXT_MAX]


def _adopt_orphans() -> None:
    """Makes daemons of this process its children again when their parents end, so that the manager finds them by the tree (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _limit_memory(memory_mb: int) -> None:
    """Limits the address space to what the built verifier has now and memory_mb more."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash a step must not fill the disk with core files
    if not memory_mb:
        return
    with contextlib.suppress(ValueError, OSError), open("/proc/self/statm") as sizes:  # macOS has neither the file nor such a limit
        limit = int(sizes.read().split()[0]) * resource.getpagesize() + (memory_mb << 20)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _read_frame(source: Any) -> Any:
    """The next object, length first; None at the end of the stream."""
    size = _read_exactly(source, 8)
    body = _read_exactly(source, int.from_bytes(size, "big")) if size else None
    return _unpack(body) if body else None


def _read_exactly(source: Any, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = source.read(size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


async def _read_frame_async(reader: asyncio.StreamReader) -> Any:
    try:
        size = await reader.readexactly(8)
        return _unpack(await reader.readexactly(int.from_bytes(size, "big")))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _unpack(body: bytes) -> Any:
    """Rows hold whatever their columns hold, which JSON would change; so they travel as pickles, from the trainer to its own child only."""
    return pickle.loads(body)  # the trainer alone writes on this socket pair, and what comes back to it is JSON


def frame(content: Any) -> bytes:
    body = pickle.dumps(content)
    return len(body).to_bytes(8, "big") + body


def _line(*message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"

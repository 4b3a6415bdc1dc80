"""What runs in a verifier process: builds one verifier, judges the items it is sent one after the other, reports in JSON lines.

Frames from the trainer are pickles, length first; the first one says what to build. Lines to the trainer:
["ready"] or ["unbuildable", text], then for every item ["start", position, at] and ["done", position, at, score, status, answer,
detail], `at` in time.monotonic() seconds: one clock for all processes of a machine.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import pickle
import socket
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
    sock, owner = socket.socket(fileno=fd), os.getpid()
    source = sock.makefile("rb")
    try:
        setup = _read_frame(source)
        if setup is None:
            return
        _limit_memory(setup["memory_mb"])
        verify: Verifier = plugins.use(setup["ref"], setup["kwargs"], home="llmrl.rewards", base=setup["base"], where="[verifier]")
    except BaseException as error:  # SystemExit of a plug-in's module, MemoryError under the limit: all of them are told
        text = str(error) if isinstance(error, InputError) else f"[verifier]: building it failed with {describe(error)}"
        sock.sendall(_line("unbuildable", text))
        return
    sock.sendall(_line("ready"))
    loop = _Loop()
    while (frames := _read_frame(source)) is not None:
        report = _line("start", 0, time.monotonic())
        for position, packed in enumerate(frames):
            sock.sendall(report)
            verdict = _judge(verify, packed, loop)
            if os.getpid() != owner:  # a verifier that forks and lets the child return must not answer twice
                os._exit(0)
            now = time.monotonic()
            report = _line("done", position, now, verdict.score, verdict.status, verdict.answer, verdict.detail)
            if position + 1 < len(frames):
                report += _line("start", position + 1, now)
        sock.sendall(report)


def _judge(verify: Verifier, packed: bytes, loop: _Loop) -> Verdict:
    try:
        prompt, response = pickle.loads(packed)  # written by the trainer alone, over a socket pair that only it holds
        found: Any = verify(prompt, response)
        if inspect.isawaitable(found):
            found = loop.run(found)
        if not isinstance(found, Verdict):
            return Verdict(None, "error", detail=f"the verifier returned {type(found).__name__}; it must return a Verdict")
        answer = None if found.answer is None else str(found.answer)[:_TEXT_MAX]
        return Verdict(None if found.score is None else float(found.score), found.status, answer, str(found.detail)[:_TEXT_MAX])
    except BaseException as error:  # SystemExit, MemoryError and RecursionError are a verifier's failure too
        return Verdict(None, "error", detail=describe(error))


class _Loop:
    """An event loop for coroutine verifiers, made when the first one comes."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, awaitable: Any) -> Any:
        async def wait() -> Any:
            return await awaitable

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(wait())


def describe(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as second:  # an exception whose text cannot be made
        text = f"(its text fails with {type(second).__name__})"
    return f"{type(error).__name__}: {text}"[:_TEXT_MAX]


def _limit_memory(memory_mb: int | None) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash a step must not fill the disk with core files
    if memory_mb is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))


def _read_frame(source: Any) -> Any:
    """The next pickled object, length first; None at the end of the stream. Only the trainer writes here: its own prompts; answers are JSON."""
    size = source.read(8)
    return pickle.loads(source.read(int.from_bytes(size, "big"))) if len(size) == 8 else None


def frame(content: Any) -> bytes:
    body = pickle.dumps(content)
    return len(body).to_bytes(8, "big") + body


def _line(*message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"

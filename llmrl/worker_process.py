"""One verifier process as the trainer's manager thread sees it: a socket that never blocks, and an end that leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from llmrl.scoring_worker import BOOT, frame


class WorkerProcess:
    """A started process. `chunk` and `started` belong to the manager: the items it has, and when it began with each, by their number."""

    def __init__(self, setup: bytes, selector: selectors.BaseSelector) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fd, path = theirs.fileno(), json.dumps([p for p in sys.path if isinstance(p, str)])
            self.process = subprocess.Popen(
                [sys.executable, "-c", BOOT, str(fd), path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(fd,),
                start_new_session=True,
                env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy walks sets: the same answer must take the same path in every worker
            )
        ours.setblocking(False)
        self.sock, self._selector = ours, selector
        self._outgoing, self._inbox = memoryview(setup), bytearray()
        self.touched = time.monotonic()
        """When it was last sent something or last said something."""
        self.ready = False
        self.concurrent = False
        """Its verifier returns awaitables: it works on many items at a time."""
        self.sent = 0
        """Items it was sent since its start; their numbers count on."""
        self.chunk: dict[int, Any] = {}
        self.started: dict[int, float] = {}
        selector.register(ours, selectors.EVENT_READ | selectors.EVENT_WRITE, self)

    def send(self, content: Any) -> None:
        self._outgoing, self.touched = memoryview(bytes(self._outgoing) + frame(content)), time.monotonic()
        self.write()

    def write(self) -> None:
        """Writes what the socket takes now."""
        try:
            self._outgoing = self._outgoing[self.sock.send(self._outgoing) :]
        except BlockingIOError:
            pass
        except OSError:  # it died: reading finds that out and deals with it
            self._outgoing = memoryview(b"")
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
        if self._selector.get_key(self.sock).events != wanted:
            self._selector.modify(self.sock, wanted, self)

    def messages(self) -> Iterator[list[Any]]:
        """What it has said since. Raises ConnectionError when it has hung up, ValueError when it says what is no JSON."""
        while True:
            try:
                data = self.sock.recv(1 << 16)
            except BlockingIOError:
                return
            if not data:
                raise ConnectionError
            self.touched = time.monotonic()
            *lines, rest = (self._inbox + data).split(b"\n")
            self._inbox = bytearray(rest)
            for line in lines:
                yield json.loads(line)

    def kill(self) -> int:
        """Ends it, its process group, and what left the group but not the tree; reaps it and returns its exit code."""
        pid = self.process.pid
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGSTOP)  # so that it starts nothing new while its children are looked for
        _kill_children(pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS answers PermissionError for a group of zombies
            os.killpg(pid, signal.SIGKILL)  # before reaping, so that the group's number cannot be another's
        self._selector.unregister(self.sock)
        self.sock.close()
        return self.process.wait()


def _kill_children(pid: int) -> None:
    """Kills every descendant. On Linux the worker adopts orphans (scoring_worker), so that a daemon is found here too."""
    import psutil

    for _ in range(10):  # one that is being killed may have forked just before
        try:
            children = psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            return
        living = [c for c in children if _living(c)]
        for child in living:
            with contextlib.suppress(psutil.Error):
                child.kill()
        if not living:
            return


def _living(child: Any) -> bool:
    import psutil

    try:
        return child.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def exit_text(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

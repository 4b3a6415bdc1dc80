"""Runs a plan of `code_exec`: starts candidate and checker, keeps the time, and makes the verdict of what they leave behind.

Nothing that a program sends is read here but its stdout, as bytes; what the checker reports is read as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import selectors
import socket
import tempfile
import time
from types import CodeType
from typing import Any

from llmrl.records import Verdict
from llmrl.rewards.code_cases import Plan
from llmrl.rewards.sandbox import START_LIMIT_S, Child, Sandbox, module_code

CHECKER_MB = 2048
"""Address space for the tests and the program's values, which may be large."""
_OUTPUT_MAX = 1 << 20  # bytes of stdout and stderr together
_REPORT_MAX = 1 << 20


@functools.cache
def _modules(role: str) -> list[tuple[str, CodeType]]:
    return [module_code("code_values"), module_code(f"code_{role}")]


class Run:
    """The tests of one response, in the verifier's process: it starts the sandboxes, keeps the time and counts."""

    def __init__(self, box: Sandbox, checker_box: Sandbox, timeout_s: float, memory_mb: int, partial: bool) -> None:
        self.box, self.checker_box, self.timeout_s, self.memory_mb, self.partial = box, checker_box, timeout_s, memory_mb, partial
        self.passed = 0
        self.failed: list[str] = []
        """Why, for each test that failed; what ends the whole run is one of them."""
        self.problem = ""
        """What is not the response's fault."""
        self.unreadable = False
        """The program does not compile."""
        self.deadline: float | None = None
        """time.monotonic() at which the time of all tests together is over; it counts from the first program that has started."""

    def verdict(self, total: int, program: str, fenced: bool) -> Verdict:
        if self.problem:
            return Verdict(None, "error", program, self.problem)
        detail = f"{self.passed} of {total} tests passed" + (f"; {self.failed[0]}" if self.failed else "")
        if self.unreadable and not fenced:
            return Verdict(0.0, "no_answer", program, detail)
        whole = self.passed == total and not self.failed
        return Verdict(1.0 if whole else self.passed / total * self.partial, "ok", program, detail)

    # ------------------------------------------------ functions, called by the checker

    def functions(self, candidate_job: dict[str, Any], checker_job: dict[str, Any]) -> None:
        ends = [*socket.socketpair(), *socket.socketpair()]
        peer, other_peer, report, ours = ends
        try:
            with (
                self.box.start(_modules("candidate"), candidate_job, fds={"peer": peer}) as candidate,
                self.checker_box.start(_modules("checker"), checker_job, fds={"peer": other_peer, "report": report}) as checker,
            ):
                for sock in (peer, other_peer, report):
                    sock.close()
                ours.setblocking(False)
                self._listen(ours, candidate, checker)
                candidate.stop()  # both end at the same time
        finally:
            for sock in ends:
                sock.close()

    def _listen(self, report: socket.socket, candidate: Child, checker: Child) -> None:
        """Takes the checker's report until it is done, somebody fails, or the time is over."""
        lines = _Lines(report)
        ready, started = False, time.monotonic()
        with selectors.DefaultSelector() as selector:
            for item in (report, candidate.control, checker.control):
                selector.register(item, selectors.EVENT_READ)
            while True:
                for child in (candidate, checker):
                    child.hear()
                    if child.over and child.control in selector.get_map():
                        selector.unregister(child.control)
                if candidate.up and checker.up:
                    self.deadline = self.deadline or time.monotonic() + self.timeout_s
                for message in lines.read():
                    ready = ready or message[0] == "ready"
                    if self._heed(message, candidate):
                        return
                refusal = candidate.failed or checker.failed
                late = time.monotonic() > (self.deadline or started + START_LIMIT_S)
                if refusal or (late and self.deadline is None):
                    self.problem = f"the sandbox could not be started: {refusal or f'not within {START_LIMIT_S:g} s'}"
                elif late:
                    self.failed.append(f"did not end within {self.timeout_s:g} s")
                elif lines.over and ready:
                    self.failed.append("the checker could not hold the values of the program")
                elif lines.over:
                    self.problem = f"the checker ended before the tests began ({_ending(checker, CHECKER_MB)})"
                else:
                    selector.select(min(0.05, max(0.001, (self.deadline or started + START_LIMIT_S) - time.monotonic())))
                    continue
                return

    def _heed(self, message: list[Any], candidate: Child) -> bool:
        """Whether that was the checker's last word."""
        match message:
            case ["test", True, _]:
                self.passed += 1
            case ["test", _, detail] | ["program", detail]:
                if "the program ended" in detail:
                    _wait_for_end(candidate)
                    detail = f"{detail} ({_ending(candidate, self.memory_mb)})"
                self.unreadable = message[0] == "program" and detail.startswith(("SyntaxError", "IndentationError", "TabError"))
                candidate.hear()  # it was up before it spoke to the checker
                if message[0] == "program" and not candidate.up:
                    self.problem = f"the sandbox could not be started: {candidate.failed or 'its process ended'}"
                self.failed.append(detail)
                return message[0] == "program"
            case ["broken", detail]:
                self.problem = f"the tests of the row cannot be run: {detail}"
                return True
            case ["done"]:
                return True
        return False

    # ------------------------------------------------ whole programs, by stdin and stdout

    def mains(self, todo: Plan) -> None:
        for given, wanted in todo.mains:
            with tempfile.TemporaryFile() as file:
                file.write(given.encode("utf-8", "surrogatepass"))
                file.seek(0)
                job = todo.candidate | {"role": "main"}
                with self.box.start(_modules("candidate"), job, stdin=file.fileno(), output=True) as child:
                    why = self._watch(child, wanted)
            if self.problem:
                return
            if why:
                self.failed.append(f"{why}, for stdin {given[:80]!r}")
                if not self.partial or time.monotonic() > (self.deadline or 0):
                    return
            else:
                self.passed += 1

    def _watch(self, child: Child, wanted: str) -> str:
        """Why the run does not count; "" where it does."""
        assert child.process.stdout is not None and child.process.stderr is not None
        kept = {stream.fileno(): b"" for stream in (child.process.stdout, child.process.stderr)}
        out, err = kept
        started, size = time.monotonic(), 0
        with selectors.DefaultSelector() as selector:
            for fd in kept:
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ)
            selector.register(child.control, selectors.EVENT_READ)
            while selector.get_map():
                limit = self.deadline or started + START_LIMIT_S
                if time.monotonic() > limit:
                    break
                for key, _ in selector.select(max(0.001, limit - time.monotonic())):
                    if key.fileobj is child.control:
                        child.hear()
                        if child.up:
                            self.deadline = self.deadline or time.monotonic() + self.timeout_s
                        if child.over:
                            selector.unregister(child.control)
                        continue
                    data = os.read(key.fd, 1 << 16)
                    size += len(data)
                    kept[key.fd] += data
                    if size > _OUTPUT_MAX:
                        return f"more than {_OUTPUT_MAX >> 20} MB of output"
                    if not data:
                        selector.unregister(key.fileobj)
        if child.failed or self.deadline is None:
            self.problem = f"the sandbox could not be started: {child.failed or f'not within {START_LIMIT_S:g} s'}"
        elif child.end is None:
            return f"did not end within {self.timeout_s:g} s"
        elif child.end != ("exit", 0):
            last = kept[err].decode("utf-8", "replace").strip().rpartition("\n")[2][:300]
            self.unreadable = last.startswith(("SyntaxError", "IndentationError", "TabError"))
            return last or f"the program ended ({_ending(child, self.memory_mb)})"
        elif _plain(kept[out].decode("utf-8", "replace")) != _plain(wanted):
            return f"wrong output {kept[out][:80].decode('utf-8', 'replace')!r}"
        return ""


class _Lines:
    """JSON lines from a socket that does not block."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.over = sock, False
        self._rest = b""
        self._size = 0

    def read(self) -> list[list[Any]]:
        found = []
        while not self.over:
            try:
                data = self.sock.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self._size += len(data)
            self.over = not data or self._size > _REPORT_MAX
            *lines, self._rest = (self._rest + data).split(b"\n")
            try:
                found += [message for line in lines if isinstance(message := json.loads(line), list) and message]
            except ValueError:  # code of the row wrote there
                self.over = True
        return found


def _wait_for_end(child: Child) -> None:
    """The watcher's word on how the program ended comes a moment after the end of its socket."""
    limit = time.monotonic() + 0.3
    child.hear()
    while child.end is None and not child.over and time.monotonic() < limit:
        time.sleep(0.002)
        child.hear()


def _ending(child: Child, memory_mb: int) -> str:
    match child.end:
        case ("memory", _):
            return f"killed: more than {2 * memory_mb} MB in all its processes"
        case ("exit", code):
            return f"exit code {code}"
        case ("signal", number):
            return f"signal {number}"
    return "how is not known"


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip()

"""Starts the processes of a launch, watches them, and ends them: one process group each, and none of them outlives the launch.

Every child carries LLMRL_LAUNCH=<mark> in its environment and hands it down. torchrun puts each rank into a session of its own, which no
signal to torchrun's group reaches, so what is left at the end is looked for by that mark.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = "LLMRL_LAUNCH"
RESTARTS = 3
"""Times that a server which dies under a running trainer is started again."""
GRACE_S = 15.0
"""Seconds between SIGTERM and SIGKILL."""
# The idea is that of llmrl/scoring_worker.py: the input ends when the launch does, however it died. First the groups of the last line, then
# whatever carries the mark ($1).
WATCHDOG = r"""
groups=; while read -r line; do groups=$line; done
[ -z "$groups" ] || kill -9 $groups
for round in 1 2 3 4 5; do
    found=
    for e in /proc/[0-9]*/environ; do
        if grep -qsa "LLMRL_LAUNCH=$1" "$e"; then p=${e#/proc/}; kill -9 "${p%/environ}" && found=1; fi
    done
    [ -n "$found" ] || break
done
"""


class LaunchFailed(RuntimeError):
    """What was to be started did not come up."""


class Stopped(BaseException):
    """SIGTERM or SIGHUP came."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@dataclass(frozen=True)
class Command:
    """A process to start."""

    argv: tuple[str, ...]
    env: dict[str, str]
    """Variables that are set for it, on top of this process's own."""
    log: Path | None = None
    """Where its output goes; None = the terminal."""
    quiet: bool = False
    """Throw its stdout away."""

    def text(self) -> str:
        """As one would type it."""
        return " ".join(f"{k}={shlex.quote(v)}" for k, v in self.env.items()) + " \\\n    " + shlex.join(self.argv)


@dataclass
class Server:
    """A vLLM server that we start."""

    number: int
    url: str
    command: Command
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False
    restarts: int = 0

    def __str__(self) -> str:
        return f"vLLM server {self.number} ({self.url})"


class Processes:
    """The processes of a launch. close() ends all of them, by SIGTERM, and SIGKILL after `grace_s`.

    weights: the folder in which they leave weights when they are killed (llmrl/weights.py), often in memory; what was theirs is deleted.
    """

    def __init__(self, mark: str, weights: Path | None = None, grace_s: float = GRACE_S) -> None:
        self.mark, self.weights, self.grace_s = mark, weights, grace_s
        self.running: list[subprocess.Popen[bytes]] = []
        self._pids: set[int] = set()
        """Of processes that may have left weights."""
        quiet = subprocess.DEVNULL
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG, "llmrl-watchdog", mark],
            stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True,
        )  # fmt: skip

    def start(self, command: Command) -> subprocess.Popen[bytes]:
        env = {**os.environ, **command.env, MARK: self.mark}
        with contextlib.ExitStack() as files:
            out = None
            if command.log is not None:
                command.log.parent.mkdir(parents=True, exist_ok=True)
                out = files.enter_context(command.log.open("ab"))
                out.write(f"==== {time.strftime('%Y-%m-%d %H:%M:%S')} {command.text()}\n".encode())
                out.flush()
            process = subprocess.Popen(
                command.argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL if command.quiet else out,
                stderr=None if out is None else subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.running.append(process)
        self._tell()
        return process

    def end(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """Ends these and their groups, and reaps them."""
        for process in processes:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + self.grace_s
        while time.monotonic() < deadline and not all(ended(p) for p in processes):
            time.sleep(0.05)
        for process in processes:
            _signal_group(process, signal.SIGKILL)  # before reaping, so that the group's number cannot be another's
            process.wait()
        self.running = [p for p in self.running if p not in processes]
        self._tell()

    def close(self) -> None:
        if self.weights is not None:
            self._pids |= {p.pid for p in self._marked()}
        self.end(self.running)
        self._sweep()
        for pid in self._pids:
            for left in self.weights.glob(f"run-{zlib.crc32(socket.gethostname().encode()):08x}-{pid}-*") if self.weights else ():
                shutil.rmtree(left, ignore_errors=True)
        self._watchdog.kill()
        self._watchdog.communicate()

    def _tell(self) -> None:
        assert self._watchdog.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody killed it; a run need not end for that
            self._watchdog.stdin.write(" ".join(f"-{p.pid}" for p in self.running).encode() + b"\n")
            self._watchdog.stdin.flush()

    def _sweep(self) -> None:
        """Kills what carries our mark and is still there: ranks of a torchrun that was killed, daemons of a plug-in."""
        for _ in range(10):  # one that is being killed may have forked just before
            found = self._marked()
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if not found:
                return

    def _marked(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Is it over? Leaves it a zombie where the system can, so that its group's number stays its own."""
    if process.returncode is not None:
        return True
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS answers PermissionError for a group of zombies
            os.killpg(process.pid, number)


def exit_code(process: subprocess.Popen[bytes]) -> int:
    """Its exit code, as a shell tells it: 128 + n for signal n."""
    code = process.wait()
    return code if code >= 0 else 128 - code


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, indented."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 16_384))
        text = file.read().decode(errors="replace")
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


def healthy(url: str, timeout_s: float = 1.0) -> bool:
    """Does GET url/health answer 200? No proxy is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=timeout_s) as answer:
            return answer.status == 200
    except (OSError, http.client.HTTPException):  # the second: what answers speaks no HTTP
        return False


@dataclass
class Supervisor:
    """Servers first, then the trainer; restarts servers that die, and returns the trainer's exit code."""

    processes: Processes
    servers: list[Server]
    remote: list[str]
    """Servers of other nodes that must answer too before training starts."""
    wait_s: float
    """Seconds that all servers have to come up."""
    say: Callable[[str], None]
    poll_s: float = 0.2
    given_up: set[int] = field(default_factory=set)

    def run(self, trainer: Command) -> int:
        """Raises LaunchFailed when a server does not come up."""
        for server in self.servers:
            server.process = self.processes.start(server.command)
        if self.servers or self.remote:
            self._wait_until_ready()
        process = self.processes.start(trainer)
        while not ended(process):
            self._restart_dead_servers()
            time.sleep(self.poll_s)
        self.processes.end([process])
        code = exit_code(process)
        if code:
            self.say(f"the trainer ended with exit code {code}")
        return code

    def _wait_until_ready(self) -> None:
        began, told = time.monotonic(), -1e9
        away = set(self.remote)
        while True:
            for server in self.servers:
                self._look(server)
            away -= {url for url in away if healthy(url)}
            missing = [str(s) for s in self.servers if not s.ready] + sorted(away)
            waited = time.monotonic() - began
            all_of = len(self.servers) + len(self.remote)
            if not missing:
                self.say(f"{all_of} of {all_of} vLLM servers ready after {waited:.0f} s")
                return
            if waited > self.wait_s:
                logs = "".join(f"\n  {s.command.log}:\n{tail(s.command.log)}" for s in self.servers if not s.ready and s.command.log)
                raise LaunchFailed(f"not ready within --vllm-wait = {self.wait_s:g} s: {', '.join(missing)}{logs}")
            if time.monotonic() - told >= 10:
                told = time.monotonic()
                self.say(f"{all_of - len(missing)} of {all_of} vLLM servers ready after {waited:.0f} s (at most {self.wait_s:g} s)")
            time.sleep(self.poll_s)

    def _look(self, server: Server) -> None:
        assert server.process is not None and server.command.log is not None
        log = server.command.log
        if ended(server.process):
            self.processes.end([server.process])
            raise LaunchFailed(f"{server} ended with exit code {exit_code(server.process)} while it started; the end of {log}:\n{tail(log)}")
        server.ready = server.ready or healthy(server.url)

    def _restart_dead_servers(self) -> None:
        for server in self.servers:
            assert server.process is not None
            if server.number in self.given_up or not ended(server.process):
                continue
            self.processes.end([server.process])  # what it started may hold its port or its GPU
            code, log = exit_code(server.process), server.command.log
            if server.restarts == RESTARTS:
                self.given_up.add(server.number)
                self.say(f"{server} ended with exit code {code} for the {RESTARTS + 1}th time and stays down; see {log}")
                continue
            server.restarts += 1
            self.say(f"{server} ended with exit code {code}: started again ({server.restarts} of {RESTARTS}); see {log}")
            server.process = self.processes.start(server.command)


def supervise(
    servers: list[Server], remote: Iterable[str], trainer: Command, *, mark: str, weights: Path | None, wait_s: float, grace_s: float = GRACE_S,
) -> int:  # fmt: skip
    """Runs the trainer beside its servers. Ends everything it started on every way out. weights: see Processes.

    Returns the trainer's exit code; 128 + n after signal n; 1 when a server did not come up. Ctrl-C goes through as KeyboardInterrupt.
    """

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    def say(text: str) -> None:
        sys.stderr.write(f"launch: {text}\n")
        sys.stderr.flush()

    caught = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores the second
    before = {number: signal.signal(number, stop) for number in caught} | {signal.SIGINT: signal.getsignal(signal.SIGINT)}
    processes = Processes(mark, weights, grace_s)
    try:
        return Supervisor(processes, servers, list(remote), wait_s, say).run(trainer)
    except Stopped as stopped:
        say(f"{stopped}: stopping; a training run goes on from its last checkpoint with --resume")
        return stopped.code
    except LaunchFailed as failed:
        say(f"failed: {failed}")
        return 1
    finally:
        for number in (*caught, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # ending what runs takes GRACE_S at most, and must not be cut short
        processes.close()
        for number, handler in before.items():
            signal.signal(number, handler)

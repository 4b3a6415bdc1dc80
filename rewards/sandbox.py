"""Starts Python code in a process that can reach nothing but the sockets it is handed: by bubblewrap, or by namespaces of our own.

    sandbox = open_sandbox("auto", limits=Limits(), unsafe_local=False, packages=False)
    with sandbox.start(modules, job, fds={"peer": socket}) as child: ...

`modules` are (name, code) of modules to make there; the last one has a function main(job, fds), whose return is the exit code. The
layers, inside out: a child with rlimits, no capabilities, no_new_privs, a seccomp filter and, where we are root, a user id of its own; a
watcher, which is process 1 of its pid namespace, so that its end is the end of all; namespaces for mounts, pids, network, ipc, host name
and, where we are not root, users; a root of read-only system folders and the interpreter, with a small /tmp. The watcher ends when this
process does: it holds the other end of a socket.
"""

from __future__ import annotations

import functools
import itertools
import marshal
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, Literal

from llmrl.records import InputError

Choice = Literal["auto", "bwrap", "namespaces"]
Kind = Literal["bwrap", "namespaces", "unsafe_local"]
START_LIMIT_S = 4.0
"""A sandbox whose payload has not started after this long has failed."""
_BOOT = (
    "import os,sys,marshal;f=os.fdopen(int(sys.argv[1]),'rb',closefd=False);n=f.read(8);d=marshal.loads(f.read(int.from_bytes(n,'big')));"
    "s={'__name__':'sandbox'};exec(d[0],s);s['boot'](d[1],d[2])"
)
_ENV = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
# -s -P -S -E is -I -S; without -E the fixed hash seed counts: a program that prints a set gets the same verdict each time.
_FLAGS = ("-s", "-P", "-S", "-B", "-X", "utf8")
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
_UIDS = 0x60000000  # of 2 ** 28: far above those that people and services have
_counter = itertools.count()


@dataclass(frozen=True)
class Limits:
    """Of one sandboxed process and, where it says so, of all processes it starts together."""

    cpu_s: int = 8
    """Seconds of processor time of each process."""
    memory_mb: int = 512
    """Address space of each process; resident memory of all together may be twice that."""
    processes: int = 32
    """Processes and threads."""
    file_mb: int = 64
    """Size of a file, and of all files in /tmp and /dev/shm, which live in memory."""
    files: int = 128
    """Open files of each process."""


class Child:
    """A sandboxed process. Close it, or use it as a context manager: then every process inside is gone and reaped."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, folder: str | None) -> None:
        self.process, self.control, self._folder = process, control, folder
        self.up = False
        """The payload has started."""
        self.seccomp = False
        self.failed: str | None = None
        """Why the sandbox could not be made."""
        self.end: tuple[str, int] | None = None
        """("exit", code), ("signal", number) or ("memory", 0) once the payload's process has ended."""
        self._heard = b""
        self.over = False
        """Nothing more will be heard."""

    def hear(self) -> None:
        """Takes in what the watcher has said; does not wait."""
        while not self.over:
            try:
                data = self.control.recv(4096)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            self.over = not data
            *lines, self._heard = (self._heard + data).split(b"\n")
            for line in lines:
                word, _, rest = line.decode("utf-8", "replace").partition(" ")
                if word == "up":
                    self.up, self.seccomp = True, rest == "1"
                elif word == "failed":
                    self.failed = rest
                elif word in ("exit", "signal", "memory"):
                    self.end = self.end or (word, int(rest))
            if self.over and not self.up and self.failed is None:
                self.failed = self.complaint() or f"it ended with exit code {self.process.poll()} before the payload started"

    def complaint(self) -> str:
        """The last of what was written on stderr before the payload took it."""
        if self.process.stderr is None:
            return ""
        os.set_blocking(self.process.stderr.fileno(), False)
        return (self.process.stderr.read(4000) or b"").decode("utf-8", "replace").strip()[-500:]

    def stop(self) -> None:
        """Ends every process in the sandbox; does not wait for that."""
        self.control.close()  # the watcher sees it and ends, and with it its namespace

    def close(self) -> None:
        """Ends every process in the sandbox and reaps the one that is ours."""
        self.stop()
        try:
            self.process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Sandbox:
    """One way to start processes, chosen and proven by `open_sandbox`."""

    kind: Kind
    name: str
    """With the version: "bwrap 0.8.0"."""
    limits: Limits
    packages: bool = False
    """The site-packages of this interpreter are visible, read-only."""

    def start(
        self,
        modules: Sequence[tuple[str, CodeType]],
        job: Mapping[str, Any],
        *,
        fds: Mapping[str, socket.socket] | None = None,
        stdin: int | None = None,
        output: bool = False,
    ) -> Child:
        """Starts main(job, fds) of the last module. `job` holds plain data; `fds` arrive as numbers under the same names.

        stdin: file descriptor; None = empty. output: stdout is a pipe, else it goes nowhere. stderr is a pipe. Raises OSError.
        """
        ours, theirs = socket.socketpair()
        passed = [theirs.fileno(), *(s.fileno() for s in (fds or {}).values())]
        uid = _own_uid()
        folder = tempfile.mkdtemp(prefix="llmrl-") if self.kind == "unsafe_local" else None
        setup = {
            "kind": self.kind, "control": theirs.fileno(), "fds": {name: s.fileno() for name, s in (fds or {}).items()}, "job": dict(job),
            "uid": uid, "limits": self._rlimits(), "total_bytes": 2 * self.limits.memory_mb << 20, "tmp_bytes": self.limits.file_mb << 20,
            "binds": _binds(self.packages)[0], "links": _binds(self.packages)[1], "path": _site() if self.packages else [],
        }
        try:
            process = subprocess.Popen(
                [*self._wrapper(uid), _python(), *_FLAGS, "-c", _BOOT, str(theirs.fileno())],
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=subprocess.PIPE if output else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=passed,
                env=_ENV if folder is None else _ENV | {"HOME": folder, "TMPDIR": folder},
                cwd=folder or "/",
                start_new_session=True,  # else a signal to process group 0 in there would reach ours
                bufsize=0,
            )
        except BaseException:
            ours.close()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            theirs.close()
        child = Child(process, ours, folder)
        try:
            ours.settimeout(1.0)
            packed = marshal.dumps((_boot_code(), setup, list(modules)))
            ours.sendall(len(packed).to_bytes(8, "big") + packed)
        except OSError:  # it has ended already, or reads nothing: `hear` finds out why
            child.failed = child.complaint() or "it does not read its setup"
        ours.setblocking(False)
        return child

    def _rlimits(self) -> dict[str, int]:
        limits = self.limits
        found = {"CORE": 0, "CPU": limits.cpu_s, "AS": limits.memory_mb << 20, "FSIZE": limits.file_mb << 20, "NOFILE": limits.files}
        return found if self.kind == "unsafe_local" else found | {"NPROC": limits.processes}  # locally it would count the user's own

    def _wrapper(self, uid: int | None) -> list[str]:
        """The command line of bubblewrap, up to the program that it starts."""
        if self.kind != "bwrap":
            return []
        found = [shutil.which("bwrap") or "bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        found += ["--unshare-user", "--uid", "65534", "--gid", "65534"] if uid is None else []
        found += ["--die-with-parent", "--new-session", "--as-pid-1", "--hostname", "sandbox", "--clearenv"]
        for name, value in _ENV.items():
            found += ["--setenv", name, value]
        if uid is not None:  # as root it would keep all of them; these are for the change of identity inside, which loses them
            found += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
        found += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
        for path in ("/tmp", "/dev/shm"):  # before the binds: an interpreter may lie below /tmp
            found += ["--perms", "1777", "--size", str(self.limits.file_mb << 20), "--tmpfs", path]
        binds, links = _binds(self.packages)
        parents = {str(parent) for path in binds for parent in Path(path).parents} - {"/", "/tmp"}
        for path in sorted(parents):  # by itself bubblewrap makes them for root's eyes only
            found += ["--perms", "0755", "--dir", path]
        for path in binds:
            found += ["--ro-bind", path, path]
        for path, target in links.items():
            found += ["--symlink", target, path]
        return [*found, "--remount-ro", "/", "--chdir", "/tmp", "--"]


def open_sandbox(choice: Choice, *, limits: Limits, unsafe_local: bool, packages: bool) -> Sandbox:
    """The first kind that works here, shown by a program that looks for ways out. Raises InputError where none does."""
    if unsafe_local:
        return Sandbox("unsafe_local", "unsafe_local", limits, packages)
    kinds: tuple[Kind, ...] = ("bwrap", "namespaces") if choice == "auto" else (choice,)
    reasons = []
    for kind in kinds:
        sandbox, reason = _try(kind, limits, packages)
        if sandbox is not None:
            return sandbox
        reasons.append(f"{kind}: {reason}")
    raise InputError(
        f"no sandbox for the programs of the model works on this machine ({'; '.join(reasons)}). Mend it with one of: install bubblewrap "
        "(Linux: package bubblewrap); allow user namespaces (sysctl user.max_user_namespaces > 0, on Ubuntu also "
        "kernel.apparmor_restrict_unprivileged_userns = 0; in a container --privileged or --cap-add SYS_ADMIN with seccomp and AppArmor "
        "unconfined); or set unsafe_local = true, which runs them with your own rights and no isolation"
    )


def _try(kind: Kind, limits: Limits, packages: bool) -> tuple[Sandbox | None, str]:
    if sys.platform != "linux":
        return None, f"needs Linux, this is {sys.platform}"
    name: str = kind
    if kind == "bwrap":
        binary = shutil.which("bwrap")
        if binary is None:
            return None, "there is no bwrap on the PATH"
        told = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout  # "bubblewrap 0.8.0"
        name = " ".join(["bwrap", *told.split()[-1:]])
    sandbox = Sandbox(kind, name, limits, packages)
    try:
        reason = _probe(sandbox)
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
    return (sandbox, "") if reason is None else (None, reason)


_PROBE = """
import os, socket
def main(job, fds):
    held = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    try:
        socket.create_connection(("127.0.0.1", job["port"]), timeout=1).close()
        met = True
    except OSError:
        met = False
    wrote = False
    for place in ("/", "/tmp/"):
        name = f"{place}llmrl-probe-{job['port']}"
        try:
            open(name, "w").close()
            os.unlink(name)
            wrote = wrote or place == "/"
        except OSError:
            if place == "/tmp/":
                raise
    ways = {"sees other processes": os.getpid() > 3, "sees the host's files": os.path.exists(job["file"]), "reaches the network": met,
        "may write to its root": wrote, "has capabilities": int(held["CapPrm"], 16) != 0, "may gain rights": held["NoNewPrivs"].strip() != "1",
        "is root": os.getuid() == 0}
    os.write(fds["report"], ("the program " + ", ".join(k for k, v in ways.items() if v) if any(ways.values()) else "shut").encode())
"""


def _probe(sandbox: Sandbox) -> str | None:
    """None where a program in the sandbox finds no way out, else what it found or why it could not run."""
    code = compile(_PROBE, "<probe>", "exec", dont_inherit=True)
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as file:
        job = {"port": server.getsockname()[1], "file": file.name}
        with sandbox.start([("probe", code)], job, fds={"report": theirs}) as child:
            theirs.close()
            ours.settimeout(10.0)
            found = ours.recv(4096).decode()
            deadline = time.monotonic() + 1.0
            while not (child.up or child.over) and time.monotonic() < deadline:
                child.hear()
                time.sleep(0.001)
            if found == "shut":
                return None if child.seccomp or os.uname().machine not in ("x86_64", "aarch64") else "its seccomp filter is missing"
            return found or child.failed or child.complaint() or "the trial program ended without a word"


@functools.cache
def _boot_code() -> CodeType:
    return module_code("sandbox_child")[1]


def module_code(name: str) -> tuple[str, CodeType]:
    """(import name, code) of a module that lies beside this one, to be handed to `Sandbox.start`."""
    file = Path(__file__).with_name(f"{name}.py")
    return f"llmrl.rewards.{name}", compile(file.read_bytes(), f"<{file.name}>", "exec", dont_inherit=True)


@functools.cache
def _python() -> str:
    """The interpreter below a virtual environment, whose own folder need not be seen inside."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _site() -> list[str]:
    return list(dict.fromkeys(os.path.realpath(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")))


@functools.cache
def _binds(packages: bool) -> tuple[list[str], dict[str, str]]:
    """(paths that are seen read-only at their own place, links to make: path -> target)."""
    prefixes = [os.path.realpath(p) for p in (sys.base_prefix, sys.base_exec_prefix, os.path.dirname(_python()))]
    wanted = [p for p in (*_SYSTEM, *sorted(prefixes), *(_site() if packages else [])) if os.path.exists(p)]
    links = {p: os.readlink(p) for p in wanted if os.path.islink(p)}
    kept: list[str] = []
    for path in wanted:
        if path not in links and not any(path == other or path.startswith(f"{other}/") for other in kept):
            kept.append(path)
    return kept, links


def _own_uid() -> int | None:
    """As root: a user id for one sandbox, so that its limit of processes is its own. None: a user namespace is needed."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return None
    spans = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    uid = _UIDS + (os.getpid() % 2**22) * 64 + next(_counter) % 64
    return next((u for u in (uid, 65534) if any(first <= u < first + count for first, _, count in spans)), None)

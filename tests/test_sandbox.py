"""Ways out of the sandbox, tried: each ends as a failed verdict within the deadline, and the host is as it was.

The programs are what a response might hold; the host is looked at from here. A sandboxed process can be told from all others by its
name (/proc/PID/comm), which a program may set and its children keep.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmrl.records import InputError, Prompt, Verdict
from llmrl.rewards import sandbox as box
from llmrl.rewards.code_exec import code_exec

REPO = Path(__file__).parents[1]
NAME = f"esc{os.getpid()}"
SECRET = f"MARKER-{os.urandom(8).hex()}"
LINUX = sys.platform == "linux"


@pytest.fixture(scope="module", params=["bwrap", "namespaces"])
def kind(request) -> str:
    sandbox, reason = box._try(request.param, box.Limits(), False)
    if sandbox is None:
        pytest.skip(f"{request.param} does not work here: {reason}")
    return request.param


@pytest.fixture(scope="module")
def verifiers(kind):
    made = {}

    def get(timeout_s: float):
        return made.setdefault(timeout_s, made.get(timeout_s) or code_exec(sandbox=kind, timeout_s=timeout_s, memory_mb=200))

    return get


def attack(verify, program: str, *tests: str) -> Verdict:
    """The verdict on a program whose f(1) must return the secret. Checks what holds for every attack."""
    row = {"test_list": [*tests, f"assert f(1) == {SECRET!r}"]}
    program = f"open('/proc/self/comm', 'w').write({NAME!r})\n{program}"
    started = time.monotonic()
    verdict = verify(Prompt("escape", ({"role": "user", "content": "f"},), None, row), f"```python\n{program}\n```")
    assert time.monotonic() - started < verify.about["worst_case_s"]
    assert verdict.score == 0.0 and verdict.status == "ok", verdict
    assert not left(), "processes are left"
    return verdict


def left(name: str = NAME, wait_s: float = 2.0) -> list[int]:
    """Processes of the host by the programs' name; a moment is granted for the end of a namespace."""
    deadline = time.monotonic() + wait_s
    while True:
        found = []
        for place in Path("/proc").glob("[0-9]*/comm"):
            try:
                found += [int(place.parent.name)] if place.read_text().strip() == name else []
            except OSError:
                continue  # it has ended meanwhile
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


# ---------------------------------------------------------------- using up the machine

HOGS = {
    "a fork bomb": ("import os\ndef f(x):\n while True:\n  try: os.fork()\n  except OSError: pass", "did not end within 0.5 s"),
    "a thread bomb": ("import threading, time\ndef f(x):\n while True: threading.Thread(target=time.sleep, args=(60,)).start()", ""),
    "a memory bomb": ("def f(x):\n a = []\n while True: a.append(bytearray(1 << 24))", "MemoryError"),
    "a memory bomb of many": (
        "import os, time\ndef f(x):\n for _ in range(20):\n  if os.fork() == 0:\n   a = b'x' * (100 << 20)\n   time.sleep(60)\n time.sleep(60)",
        "killed: more than 400 MB",
    ),
    "an endless loop": ("def f(x):\n while True: pass", "did not end within 0.5 s"),
    "an endless loop in C": ("def f(x):\n return 10 ** 10 ** 10", "did not end within 0.5 s"),
    "deaf to signals": (
        "import signal\nfor n in range(1, 65):\n try: signal.signal(n, signal.SIG_IGN)\n except (OSError, ValueError): pass\ndef f(x):\n while True: pass",
        "did not end within 0.5 s",
    ),
    "1 GB printed": ("def f(x):\n for _ in range(1024): print('x' * (1 << 20))", ""),
    "1 GB returned": ("def f(x):\n return ['x' * (1 << 20)] * 1024", "MemoryError"),
    "32 MB returned": ("def f(x):\n return 'x' * (32 << 20)", "TooLarge"),
    "1 GB written": ("def f(x):\n with open('/tmp/big', 'wb') as o:\n  for _ in range(1024): o.write(bytes(1 << 20))", "too large"),
    "many files written": (
        "def f(x):\n for n in range(40):\n  with open(f'/tmp/{n}', 'wb') as o:\n   for _ in range(60): o.write(bytes(1 << 20))", "No space left",
    ),
    "a stack overflow": ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x):\n class A: __repr__ = lambda s: repr(s)\n return repr(A())", ""),
    "a crash": ("import ctypes\ndef f(x):\n ctypes.string_at(0)", "signal 11"),
}


@pytest.mark.parametrize("what", HOGS)
def test_what_a_program_may_use_up_is_bounded(verifiers, what):
    program, why = HOGS[what]
    patience_s = 5.0 if why and "did not end" not in why else 0.5  # what ends by itself may take its time on a busy machine
    assert why in attack(verifiers(patience_s), program).detail


FORKS = "import os, time\ndef forks():\n n = 0\n try:\n  while os.fork(): n += 1\n  time.sleep(60)\n except OSError: pass\n return n"


def test_the_limit_of_processes_holds(kind):
    """Also as root, whom the kernel exempts from it."""
    row = {"test_list": ["assert 4 <= forks() <= 8"]}
    verdict = code_exec(sandbox=kind, processes=8)(Prompt("p", ({"role": "user", "content": ""},), None, row), f"```python\n{FORKS}\n```")
    assert verdict.score == 1.0, verdict


def test_output_of_a_whole_program_is_capped(verifiers):
    row = {"cases": [{"stdin": "", "stdout": "x"}]}
    prompt = Prompt("p", ({"role": "user", "content": ""},), None, row)
    for program in ("while True: print('x' * 1000)", "import os\nwhile True: os.write(2, b'x' * 1000)"):
        verdict = verifiers(6.0)(prompt, program)
        assert verdict.score == 0.0 and "more than 1 MB of output" in verdict.detail


# ---------------------------------------------------------------- the verdict

FORGERIES = {
    "os._exit(0)": "import os\ndef f(x): os._exit(0)",
    "exit while loading": "import sys\nsys.exit(0)\ndef f(x): pass",
    "SystemExit in a call": "def f(x): raise SystemExit(0)",
    "kills itself": "import os\ndef f(x): os.kill(os.getpid(), 9)",
    "equal to everything": "class E:\n __eq__ = lambda s, o: True\n __ne__ = lambda s, o: False\n __hash__ = lambda s: 0\ndef f(x): return E()",
    "a str equal to everything": "class E(str):\n __eq__ = lambda s, o: True\n __ne__ = lambda s, o: False\n __hash__ = str.__hash__\ndef f(x): return E('')",
    "patched builtins": "import builtins, sys, json\nbuiltins.AssertionError = Exception\nbuiltins.__build_class__ = None\nbuiltins.bool = lambda x: True\n"
    "json.dumps = lambda *a, **k: '[\"test\", true, \"\"]'\nsys.modules['json'] = None\nsys.stdout = None\ndef f(x): return ''",
    "patched protocol": "import sys\nv = sys.modules['llmrl.rewards.code_candidate']\nclass All: \n __eq__ = lambda s, o: True\n"
    "v.encode = lambda value, other, depth=0: {'h': 0}\ndef f(x): return 'no'",
    "a report on every file": "import os, json\ndef f(x):\n"
    " lines = b''.join(json.dumps(m).encode() + b'\\n' for m in (['ready'], ['test', True, ''], ['done']))\n"
    " for fd in range(256):\n  try: os.write(fd, lines)\n  except OSError: pass\n return 'no'",
    "answers before it is asked": "import os, json\ndef send(m):\n b = json.dumps(m).encode()\n d = len(b).to_bytes(4, 'big') + b\n for fd in range(3, 64):\n"
    "  try: os.write(fd, d)\n  except OSError: pass\nfor i in range(6): send({'id': i, 'ok': True})\ndef f(x): return 'no'",
    "answers twice": "import os, json\ndef f(x):\n b = json.dumps({'id': 2, 'ok': 'no'}).encode()\n for fd in range(3, 64):\n"
    "  try: os.write(fd, len(b).to_bytes(4, 'big') + b)\n  except OSError: pass\n return 'no'",
    "a message of 4 GB": "import os\ndef f(x):\n for fd in range(3, 64):\n  try: os.write(fd, b'\\xff' * 100)\n  except OSError: pass\n return 'no'",
    "nested without end": "import os\nb = b'[' * 9000000\nd = len(b).to_bytes(4, 'big') + b\ndef f(x):\n for fd in range(3, 64):\n"
    "  try: os.set_blocking(fd, True); n = 0\n  except OSError: continue\n  while n < len(d): n += os.write(fd, d[n:])\n return 'no'",
    "AssertionError is no pass": "def f(x): raise AssertionError('passed')",
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_program_cannot_decide_its_own_verdict(verifiers, what):
    attack(verifiers(2.0), FORGERIES[what])


def test_dead_programs_do_not_pass_tests_that_expect_an_exception(verifiers):
    caught = "try:\n    f(2)\nexcept BaseException:\n    pass\nelse:\n    raise AssertionError"
    attack(verifiers(2.0), "import os\ndef f(x): os._exit(0)", caught)


SEARCH = """
import os, re, json
PATTERN = re.compile(rb"MARK" rb"ER-([0-9a-f]{16})|DEC" rb"OY-([0-9]+)")
open("/tmp/decoy", "w").write("DEC" "OY-7")
os.environ["HERE"] = "DEC" "OY-8"
seen, found = set(), set()

def look(data):
    for match in PATTERN.finditer(data):
        found.add(match[0].decode())

def read(path, spans=((0, 1 << 24),)):
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return
    for start, size in spans:
        try:
            look(os.pread(fd, size, start))
            seen.add(path)
        except (OSError, OverflowError, MemoryError):
            pass
    os.close(fd)

def memory(pid):
    try:
        lines = open(f"/proc/{pid}/maps").read().splitlines()
    except OSError:
        return
    spans = [[int(n, 16) for n in line.split()[0].split("-")] for line in lines if " rw" in line]
    read(f"/proc/{pid}/mem", [(a, min(b - a, 1 << 24)) for a, b in spans])

def walk():
    for folder, names, files in os.walk("/"):
        names[:] = [n for n in names if os.path.join(folder, n) not in SYSTEM and not (folder.startswith("/proc") and n in ("task", "map_files"))]
        for name in files:
            path = os.path.join(folder, name)
            if name not in ("mem", "kmsg", "zero", "random", "urandom", "full", "pagemap", "kcore", "clear_refs"):
                read(path)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        memory(pid)
    for fd in range(256):
        try:
            os.set_blocking(fd, False)
            look(os.read(fd, 1 << 20))
        except OSError:
            pass
        finally:
            try: os.set_blocking(fd, True)
            except OSError: pass

def f(x):
    walk()
    return next((w for w in found if w.startswith("MARK")), "")

def decoys():
    return sorted(w for w in found if w.startswith("DEC"))[:2] + [len(seen) > 50, "/proc/1/cmdline" in seen, f"/proc/{os.getpid()}/environ" in seen]
"""


def test_what_is_expected_cannot_be_read(kind):
    """The search itself works: it finds a decoy in a file and one in its own memory."""
    verify = code_exec(sandbox=kind, partial=True)
    folders = sorted({*box._binds(False)[0], *box._binds(False)[1]})
    row = {"test_list": [f"assert f(1) == {SECRET!r}", "assert decoys() == ['DECOY-7', 'DECOY-8', True, True, True]"]}
    program = f"SYSTEM = {folders!r}\n{SEARCH}"
    verdict = verify(Prompt("escape", ({"role": "user", "content": "f"},), SECRET, row), f"```python\n{program}\n```")
    assert verdict.score == 0.5 and "f(1)" in verdict.detail, verdict
    assert all(f.startswith(("/usr", "/bin", "/lib", "/sbin", "/etc/ld.so.cache", "/nix", *map(os.path.realpath, (sys.base_prefix, sys.base_exec_prefix))))
               for f in folders)


# ---------------------------------------------------------------- the host


def test_nothing_is_written_outside(verifiers, tmp_path):
    name = f"llmrl-escape-{os.getpid()}"
    places = [Path("/"), Path("/etc"), Path("/usr"), Path("/dev"), Path("/var/tmp"), Path.home(), REPO, REPO / "rewards", tmp_path, Path(sys.base_prefix)]
    program = f"""
import os, subprocess
def f(x):
    done = []
    for place in {[str(p) for p in places]!r} + ["..", "../..", "/proc/1/root", "/proc/1/cwd", "/proc/self/root", "/proc/sys/kernel"]:
        try:
            os.makedirs(place, exist_ok=True)
            open(os.path.join(place, {name!r}), "w").write("out")
            done.append(place)
        except OSError:
            pass
    subprocess.run(["/bin/sh", "-c", "echo out > /etc/{name}; echo out > {tmp_path}/{name}"], stderr=subprocess.DEVNULL)
    return ",".join(done)
"""
    attack(verifiers(2.0), program)
    assert not [p for p in places if (p / name).exists()]
    assert not list(tmp_path.iterdir()) and not (Path("/tmp") / name).exists()


def test_the_network_is_out_of_reach(verifiers):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        program = f"""
import socket
def f(x):
    inet = [("127.0.0.1", {server.getsockname()[1]}), ("1.1.1.1", 53), ("192.168.0.1", 80)]
    for family, address in [(2, a) for a in inet] + [(1, "\\0abstract"), (1, "/run/dbus")]:
        for kind in (1, 2):
            try:
                s = socket.socket(family, kind)
                s.settimeout(0.2)
                s.connect(address)
                s.send(b"hello")
                if kind == 1: return {SECRET!r}
            except OSError:
                pass
    for family in (16, 17, 31, 38, 40):
        try:
            socket.socket(family, 3 if family < 38 else 1)
            return {SECRET!r}
        except OSError:
            pass
"""
        attack(verifiers(3.0), program)
        with pytest.raises(TimeoutError):
            server.accept()


def test_processes_outside_get_no_signal(verifiers):
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        pids = [bystander.pid, os.getpid(), os.getppid()]
        attack(verifiers(2.0), f"import os\ndef f(x):\n for p in {pids}:\n  try: os.kill(p, 9)\n  except OSError: pass\n os.kill(os.getppid(), 9)\n return 'x'")
        attack(verifiers(2.0), "import os, signal\ndef f(x):\n signal.signal(15, signal.SIG_IGN)\n os.kill(0, 15)\n os.kill(-1, 9)")
        attack(verifiers(2.0), "import os\ndef f(x):\n os.killpg(1, 9)\n os.kill(1, 9); os.kill(1, 19)\n return 'x'")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


RIGHTS = """
import ctypes, os, subprocess
libc = ctypes.CDLL(None, use_errno=True)
def tried(call):
    try:
        return call() in (0, None)
    except OSError:
        return False
def f(x):
    got = [name for name, call in {
        "setuid": lambda: os.setuid(0), "setgid": lambda: os.setgid(0), "chroot": lambda: os.chroot("/tmp"),
        "unshare": lambda: libc.unshare(0x10000000), "unshare mounts": lambda: libc.unshare(0x00020000), "setns": lambda: libc.setns(0, 0),
        "mount": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), "umount": lambda: libc.umount2(b"/proc", 2),
        "remount": lambda: libc.mount(b"none", b"/usr", None, 32 | 4096, None), "remount root": lambda: libc.mount(b"none", b"/", None, 32 | 4096, None),
        "clone": lambda: -(libc.syscall(56 if os.uname().machine == "x86_64" else 220, 0x10000000 | 17, 0, 0, 0, 0) < 0),
        "ptrace": lambda: libc.ptrace(16, 1, 0, 0), "sethostname": lambda: libc.sethostname(b"mine", 4), "nice": lambda: os.nice(-5),
        "keyctl": lambda: -(libc.syscall(250 if os.uname().machine == "x86_64" else 219, 0, -3, 0) < 0),
        "bpf": lambda: -(libc.syscall(321 if os.uname().machine == "x86_64" else 280, 0, 0, 0) < 0),
        "sysctl": lambda: open("/proc/sys/kernel/hostname", "w").write("mine") * 0, "init's memory": lambda: open("/proc/1/mem", "rb").close(),
        "init's files": lambda: os.listdir("/proc/1/fd") * 0, "system program": lambda: subprocess.run(["/bin/chmod", "777", "/usr"]).returncode,
        "su": lambda: subprocess.run(["su", "-c", "true"], stdin=-3, stdout=-3, stderr=-3).returncode,
    }.items() if tried(call)]
    return ",".join(got)
def nothing():
    return f(1)
"""


def test_no_rights_can_be_gained(kind):
    verify = code_exec(sandbox=kind, partial=True)
    row = {"test_list": ["assert nothing() == ''", "assert who() == [True, 0, 0, 1, 2]"]}
    program = RIGHTS + (
        "def who():\n s = dict(l.split(':', 1) for l in open('/proc/self/status'))\n"
        " return [os.getuid() != 0, int(s['CapPrm'], 16), int(s['CapBnd'], 16), int(s['NoNewPrivs']), int(s['Seccomp'])]\n"
    )
    verdict = verify(Prompt("p", ({"role": "user", "content": "f"},), None, row), f"```python\n{program}\n```")
    assert verdict.score == 1.0, verdict


def test_daemons_end_with_the_verdict(verifiers):
    program = """
import os, time
def daemon():
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    for fd in range(256):
        try: os.close(fd)
        except OSError: pass
    while True: time.sleep(0.05)
daemon()
def f(x):
    daemon()
    return "no"
"""
    attack(verifiers(2.0), program)
    assert "TestGone" not in attack(verifiers(2.0), program + "daemon()\nos._exit(0)").detail


@pytest.mark.skipif(not LINUX, reason="sandboxes exist on Linux only")
def test_the_sandbox_ends_when_the_verifier_is_killed(kind):
    name = f"orphan{os.getpid()}"
    program = f"open('/proc/self/comm', 'w').write({name!r})\nimport os, time\ndef f(x):\n os.fork()\n while True: time.sleep(1)"
    response = f"```python\n{program}\n```"
    code = f"""
from llmrl.records import Prompt
from llmrl.rewards.code_exec import code_exec
code_exec(sandbox={kind!r})(Prompt("p", ({{"role": "user", "content": ""}},), None, {{"test_list": ["assert f(1)"]}}), {response!r})
"""
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, start_new_session=True)
    deadline = time.monotonic() + 20
    try:
        while len(left(name, 0)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(left(name, 0)) >= 2 and worker.poll() is None
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    assert not left(name)


def test_many_runs_leave_nothing_behind(kind):
    """200 runs in all: no zombie, no open file, no temporary folder, no process."""
    sandbox = box.open_sandbox(kind, limits=box.Limits(), unsafe_local=False, packages=False)
    code = [("leak", compile(f"def main(job, fds):\n open('/proc/self/comm', 'w').write({NAME!r})\n return job['code']", "<leak>", "exec"))]
    fds = None
    for number in range(100):
        with sandbox.start(code, {"code": number % 5}) as child:
            while number % 3 and not child.over:  # a third is closed before it has ended
                child.hear()
                time.sleep(0.001)
            assert child.end in (("exit", number % 5), None) and (child.end is not None or number % 3 == 0)
        fds = fds or len(os.listdir("/proc/self/fd"))
    assert len(os.listdir("/proc/self/fd")) == fds
    stats = [p.read_text().rpartition(")")[2].split() for p in Path("/proc").glob("[0-9]*/stat") if p.exists()]
    assert not [s for s in stats if s[1] == str(os.getpid()) and s[0] == "Z"]
    assert not left()


# ---------------------------------------------------------------- choosing one


def test_an_ordinary_user_gets_a_sandbox_too(kind):
    """As root, the tests above use no user namespace. Here one is needed: the same as user 65534, under the system's own Python."""
    python = "/usr/bin/python3"
    user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    code = f"""
import sys, json
from llmrl.records import Prompt
from llmrl.rewards.code_exec import code_exec
verify = code_exec(sandbox={kind!r}, timeout_s=4.0, memory_mb=200)
def score(program, test):
    verdict = verify(Prompt("p", ({{"role": "user", "content": ""}},), None, {{"test_list": [test]}}), "```python\\n" + program + "\\n```")
    return [verdict.score, verdict.detail[:200]]
print(json.dumps([score(p, t) for p, t in json.load(sys.stdin)]))
"""
    if os.geteuid() != 0 or sys.version_info[:2] != _version(python):
        pytest.skip("needs root, and a system Python of the same version that others can run")
    if subprocess.run([*user, python, "-c", "import llmrl.records"], cwd=REPO, capture_output=True, check=False).returncode:
        pytest.skip("the repository cannot be read by others")
    who = "import os\ndef who():\n s = dict(l.split(':', 1) for l in open('/proc/self/status'))\n return [os.getuid(), int(s['CapPrm'], 16), int(s['Seccomp'])]"
    rights = f"assert nothing() == '' and f(2) != {SECRET!r}"
    many = (HOGS["a memory bomb of many"][0], "assert f(1) == 0")
    items = [(who, "assert who() == [65534, 0, 2]"), (RIGHTS, rights), (FORKS, "assert 8 < forks() < 32"), many]
    items += [(f"SYSTEM = {box._binds(False)[0]!r}\n{SEARCH}", f"assert f(1) == {SECRET!r}"), ("import os\ndef f(x):\n os.kill(0, 9)", "assert f(1)")]
    done = subprocess.run([*user, python, "-B", "-c", code], cwd=REPO, input=json.dumps(items), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [score for score, _ in found] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0], found
    assert "killed: more than 400 MB" in found[3][1]


def _version(python: str) -> tuple[int, ...]:
    if not os.path.exists(python):
        return ()
    done = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, check=False)
    return tuple(map(int, done.stdout.split()))


def test_without_a_sandbox_it_refuses(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"bwrap: there is no bwrap on the PATH.*install bubblewrap.*unsafe_local = true"):
        code_exec(sandbox="bwrap")
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: no permissions to create a new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(InputError, match="no permissions to create a new namespace"):
        code_exec(sandbox="bwrap")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match=r"bwrap: needs Linux, this is darwin; namespaces: needs Linux, this is darwin.*unsafe_local = true"):
        code_exec()
    assert code_exec(sandbox="bwrap", unsafe_local=True).about["sandbox"] == "unsafe_local"  # type: ignore[attr-defined]


def test_a_leaky_sandbox_is_no_sandbox(monkeypatch, tmp_path):
    """A bubblewrap that isolates nothing is found out by the trial program."""
    (tmp_path / "bwrap").write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(box, "_own_uid", lambda: None)  # as another user it could not read root's Python
    with pytest.raises(InputError, match=r"sees other processes, sees the host's files, reaches the network"):
        code_exec(sandbox="bwrap")

"""What runs first in a sandboxed process: finishes the isolation, then starts the payload in a child and watches over it.

The verifier's process sends this module as compiled code (see `sandbox.py`), so that nothing of the repository need be visible inside.
It uses the standard library alone, and little of it: every import costs a start 1 to 5 ms. Nothing here is called in the verifier's
own process, and no Linux call is made when it is imported.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import types
from typing import Any

_WATCH_S = 0.05  # between two looks at the memory of all processes
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (1 << n for n in (17, 25, 26, 27, 28, 29, 30))
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_DEVICES = ("null", "zero", "full", "random", "urandom")

# Numbers of the system calls that a program has no use for and that have opened doors before: (x86_64, aarch64); None = not there.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "fanotify_init": (300, 262),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "memfd_secret": (447, 447),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "syslog": (103, 116), "acct": (163, 89), "swapon": (167, 224),
    "reboot": (169, 142), "init_module": (175, 105), "delete_module": (176, 106), "finit_module": (313, 273), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "quotactl": (179, 60), "clock_adjtime": (305, 266), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None),
}
_ARCHES = {"x86_64": (0, 0xC000003E, 56, 41), "aarch64": (1, 0xC00000B7, 220, 198)}  # column above, audit number, clone, socket
_CLONE3 = 435


def boot(setup: dict[str, Any], modules: list[tuple[str, types.CodeType]]) -> None:
    """Runs main(job, fds) of the last of `modules` under `setup`; never returns. Told on the control socket:
    "up SECCOMP" before the payload starts or "failed TEXT", then "exit N", "signal N" or "memory N" when its process has ended."""
    control = setup["control"]
    try:
        if setup["kind"] == "namespaces":
            _enter_namespaces(setup)
        if setup["kind"] != "unsafe_local":
            _prctl(4, 0)  # PR_SET_DUMPABLE: the program must not look into this process
            for capability in range(64):
                _libc().prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: fails past the last one, and where there is no right left
        pid = os.fork()
    except BaseException as error:
        _tell(control, f"failed {type(error).__name__}: {error}")
        os._exit(1)
    if pid == 0:
        try:
            _confine(setup)
            for name, code in modules:
                sys.modules[name] = types.ModuleType(name)
                exec(code, vars(sys.modules[name]))  # in the sandbox: running it is what this process is for
            main = vars(sys.modules[modules[-1][0]])["main"]
            _tell(control, f"up {int(setup['kind'] != 'unsafe_local' and _seccomp())}")
            os.close(control)  # the program must not speak for this process
        except BaseException as error:
            _tell(control, f"failed {type(error).__name__}: {error}")
            os._exit(1)
        sys.exit(main(setup["job"], setup["fds"]))
    _supervise(setup, pid)


def _tell(control: int, text: str) -> None:
    try:
        os.write(control, text.replace("\n", " ")[:2000].encode("utf-8", "replace") + b"\n")
    except OSError:
        return  # nobody listens any more


def _supervise(setup: dict[str, Any], pid: int) -> None:
    """Ends with the payload's process, with the verifier's end of the control socket, or when memory runs over; never returns.

    This is process 1 of its namespace: its end is the end of every process in there.
    """
    control, local = setup["control"], setup["kind"] == "unsafe_local"
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)  # else the readers of the program's output would wait for this process
    for fd in setup["fds"].values():
        os.close(fd)
    if not local:
        _drop_capabilities()
    poll = select.poll()
    poll.register(control, select.POLLIN | select.POLLHUP)
    if hasattr(os, "pidfd_open"):
        poll.register(os.pidfd_open(pid), select.POLLIN)
    over = False
    while True:
        ready = {fd for fd, _ in poll.poll(1000 * (_WATCH_S if hasattr(os, "pidfd_open") else 0.01))}
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            code = os.waitstatus_to_exitcode(status)
            _tell(control, f"exit {code}" if code >= 0 else f"signal {-code}")
        over = not gone and not local and _resident() > setup["total_bytes"]
        if over:
            _tell(control, "memory 0")
        if gone or over or control in ready:  # the control socket has nothing to say but its end
            break
    _finish(pid if local else None)


def _finish(group: int | None) -> None:
    try:
        if group is not None:
            os.killpg(group, signal.SIGKILL)
    finally:
        os._exit(0)


def _resident() -> int:
    """Bytes of memory of all processes of the namespace but this one; pages that they share count for each."""
    total = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/statm") as file:
                    total += int(file.read().split()[1])
            except (OSError, IndexError):
                pass  # it has ended meanwhile
    return total * resource.getpagesize()


def _confine(setup: dict[str, Any]) -> None:
    """Limits, identity and privileges of the payload's process."""
    for name, value in setup["limits"].items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(which, (value, value))
        except (ValueError, OSError):
            if sys.platform == "linux":  # macOS has no limit on address space
                raise
    if setup["kind"] == "unsafe_local":
        os.setsid()
    else:
        if setup["uid"] is not None:
            os.setgroups([])
            os.setresgid(setup["uid"], setup["uid"], setup["uid"])
            os.setresuid(setup["uid"], setup["uid"], setup["uid"])
        _drop_capabilities()
        _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
        _prctl(4, 1)  # the change of identity made /proc/self unreadable to the program itself: /dev/stdin goes through it
        if os.path.exists("/tmp"):
            os.chdir("/tmp")
    sys.path += setup["path"]
    sys.argv[:] = [""]


# ---------------------------------------------------------------- system calls


def _libc(found: list[Any] = []) -> Any:  # noqa: B006
    found += [] if found else [ctypes.CDLL(None, use_errno=True)]
    return found[0]


def _call(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prctl(option: int, value: Any) -> None:
    _call(f"prctl({option})", _libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def _drop_capabilities() -> None:
    libc = _libc()
    libc.prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT_CLEAR_ALL
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _call("capset", libc.capset(header, nothing))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    given = [None if text is None else text.encode() for text in (source, target, kind)]
    _call(f"mount of {source} at {target}", _libc().mount(*given, ctypes.c_ulong(flags), None if data is None else data.encode()))


def _read_only(target: str, recursive: bool) -> None:
    """mount_setattr(2), Linux 5.12: adds read-only, nosuid, nodev and leaves the flags that a user namespace has locked."""
    wanted = (ctypes.c_uint64 * 4)(1 | 2 | 4, 0, 0, 0)
    flags = ctypes.c_uint(0x8000 if recursive else 0)
    _call(f"read-only {target} (needs Linux 5.12)", _libc().syscall(442, -100, target.encode(), flags, wanted, ctypes.c_size_t(32)))


def _enter_namespaces(setup: dict[str, Any]) -> None:
    """Returns in process 1 of new namespaces with a root of its own; the calling process stays behind and waits for its end."""
    libc, uid, gid, parent = _libc(), os.getuid(), os.getgid(), os.getppid()
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    own_user = 0 if setup["uid"] is not None else _NEWUSER
    _call("unshare", libc.unshare(_NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET | own_user))
    if own_user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    pid = os.fork()
    if pid:
        for fd in (0, 1, 2, setup["control"], *setup["fds"].values()):
            os.close(fd)
        os.waitpid(pid, 0)
        os._exit(0)
    _prctl(1, signal.SIGKILL)
    os.setsid()
    os.umask(0o022)
    libc.sethostname(b"sandbox", 7)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _new_root(setup["binds"], setup["links"], setup["tmp_bytes"])


def _new_root(binds: list[str], links: dict[str, str], tmp_bytes: int) -> None:
    """A tmpfs as the root, with `binds` read-only at their own paths. It is built over /proc, where no source lies."""
    root = "/proc"
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for name in ("dev", "dev/shm", "proc", "tmp"):
        os.mkdir(f"{root}/{name}")
    for name in ("tmp", "dev/shm"):  # before the binds: an interpreter may lie below /tmp
        _mount("tmpfs", f"{root}/{name}", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={tmp_bytes},mode=1777,nr_inodes=10000")
    for path in binds:
        _place(path, root + path)
        _mount(path, root + path, None, _MS_BIND | _MS_REC)
        _read_only(root + path, recursive=True)
    for path, target in links.items():
        os.symlink(target, root + path)
    for name in _DEVICES:
        _place(f"/dev/{name}", f"{root}/dev/{name}")
        _mount(f"/dev/{name}", f"{root}/dev/{name}", None, _MS_BIND)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{target}", f"{root}/dev/{name}")
    _mount("proc", f"{root}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    os.chdir(root)
    _call("pivot_root", _libc().pivot_root(b".", b"."))
    _call("umount of the old root", _libc().umount2(b".", 2))
    os.chdir("/")
    _read_only("/", recursive=False)


def _place(source: str, target: str) -> None:
    """Makes the file or folder that a mount needs to stand on."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))


def _seccomp() -> bool:
    """Forbids the calls of _DENIED, new namespaces, and sockets other than unix and internet. False where the machine is unknown."""
    if os.uname().machine not in _ARCHES:
        return False
    column, audit, clone, sock = _ARCHES[os.uname().machine]
    load, jeq, jge, jset, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse, allow = 0x00050000, 0x7FFF0000  # SECCOMP_RET_ERRNO, plus the number; SECCOMP_RET_ALLOW
    eperm, enosys, no_family = refuse | 1, refuse | 38, refuse | 97
    program = [(load, 0, 0, 4), (jeq, 1, 0, audit), (ret, 0, 0, eperm), (load, 0, 0, 0), (jge, 0, 1, 0x40000000), (ret, 0, 0, eperm)]
    for numbers in _DENIED.values():
        if numbers[column] is not None:
            program += [(jeq, 0, 1, numbers[column]), (ret, 0, 0, eperm)]
    program += [(jeq, 0, 1, _CLONE3), (ret, 0, 0, enosys)]  # its flags lie behind a pointer; the C library then takes clone
    spaces = _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWUSER | _NEWPID | _NEWNET
    program += [(jeq, 0, 3, clone), (load, 0, 0, 16), (jset, 0, 7, spaces), (ret, 0, 0, eperm)]
    program += [(jeq, 0, 5, sock), (load, 0, 0, 16), (jeq, 3, 0, 1), (jeq, 2, 0, 2), (jeq, 1, 0, 10), (ret, 0, 0, no_family)]
    program += [(ret, 0, 0, allow)]
    code = b"".join(op.to_bytes(2, sys.byteorder) + bytes((yes, no)) + k.to_bytes(4, sys.byteorder) for op, yes, no, k in program)  # type: ignore[union-attr]
    held = ctypes.create_string_buffer(code)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    _call("seccomp", _libc().prctl(22, 2, ctypes.byref(Program(len(program), ctypes.addressof(held))), 0, 0))
    return True

"""Whether a program passes its tests: run in a sandbox, judged in another."""

from __future__ import annotations

from typing import Literal

from llmrl.records import Prompt, Verdict, Verifier
from llmrl.rewards.code_cases import RowError, plan, program_of
from llmrl.rewards.code_run import CHECKER_MB, Run
from llmrl.rewards.sandbox import START_LIMIT_S, Limits, Sandbox, open_sandbox


def code_exec(
    *,
    partial: bool = False,
    timeout_s: float = 4.5,
    memory_mb: int = 512,
    processes: int = 32,
    packages: bool = False,
    objects: bool = False,
    sandbox: Literal["auto", "bwrap", "namespaces"] = "auto",
    unsafe_local: bool = False,
) -> Verifier:
    """1.0 where the response's Python program passes every test of its row, else 0.0. Both run in sandboxes, apart from each other.

    score = 1 if passed = tests else 0;  partial: passed / tests.

    Tests come from the row's columns, the first of these that is there:
    - `cases`: a list of {"stdin": text, "stdout": text}, each a run of the whole program, compared without blanks at the ends of lines and
      of the text; and of {"call": name, "args": [...], "kwargs": {...}, "returns": value}, compared with ==, tuples counting as lists;
    - `test_list` and `challenge_test_list` (MBPP): asserts, one test each; `test_setup_code` runs after the program, `test_imports` before
      it and before the tests;
    - `test` and `entry_point` (HumanEval): code that defines check(candidate), one test; `prefix`, else the prompt's text, is the given
      start of the program.
    The program is the last ```python block, else the last block without a language, else the whole response. A HumanEval response that
    does not define entry_point is taken as the rest of `prefix`.

    partial: give the share of passing tests; all of them run. False: the first failure ends the run.
    timeout_s: seconds that all tests of a response may take together; starting the sandbox counts apart.
    memory_mb: address space of each process of the program; resident memory of all together, looked at 20 times a second,
        may be twice that.
    processes: processes and threads of the program.
    packages: programs and tests may import what is installed beside llmrl (numpy, ...); False: the standard library alone.
    objects: for tests about classes and about functions that work in place: they may read and set attributes and call methods of objects
        that the program makes, and see what calls do to their arguments. It has a price: f(1).startswith("ab") tells an object in a
        string's place what is expected, and a program that empties xs passes `assert f(xs) == sorted(xs)`. False: such tests fail.
    sandbox: "bwrap" (bubblewrap), "namespaces" (our own, Linux 5.12 and later), or the first of them that works on this machine.
    unsafe_local: no sandbox: programs run with your rights. Only for programs that you would start by hand.
    Raises InputError where no sandbox works, with the reasons; ValueError for limits out of range.

    Status: ok with score 0 and the reason in `detail` for a program that does not compile, fails, crashes, loops, exits or breaks a limit;
    no_answer (score 0) where nothing looks like a program; error where the row has no tests or its own code is broken before the program
    is called, and where the sandbox does not start.

    The program and the tests never share a process. The program's process gets the program, and then calls: names and arguments. Results
    travel back as plain data (numbers, text, bytes, lists, tuples, sets, dicts, ranges, Decimal, Fraction, dates) by exact type; anything
    else is an opaque handle, which equals itself only and can be called, iterated and indexed. They are compared in the tests' process
    or, for stdout, in the verifier's.
    The sandbox stops: reading what is expected; forging the verdict (through stdout, open files, patched modules, __eq__, exit codes);
    reading or writing files outside its /tmp, except system folders and the interpreter, which can be read; the network, the loopback
    included; seeing or signalling processes outside; what is left running when the verdict is there, or when the verifier is killed;
    endless loops, memory, processes, output, large files; gaining rights (no capabilities, no_new_privs, a seccomp filter on x86_64 and
    aarch64 against new namespaces, mounts, ptrace, bpf, io_uring, keyrings, other socket families).
    It does not stop: an exploit of the kernel, of bubblewrap or of the CPU (side channels); slowing down the machine up to the limits,
    by which programs beside it can run into their timeout_s (colliding hashes in its results, too, cost their checker's time, as far as
    timeout_s); memory that the kernel holds for it, such as socket buffers; learning the tests' arguments over a run and answering those alone, when the
    same row comes again; guessing; programs that are right on the tests and wrong elsewhere. Nor does it hide the kernel's version,
    the machine's load or the installed system files.

    Failure modes: on an overloaded machine a slow right program scores 0; programs that need files, packages or the network that are
    not there fail; tests that hand functions or objects of their own to the program are an error; tests that look at the identity of
    results, at types of the program (isinstance), at its stdout or at globals that a call changes do not work; exceptions of classes that
    the program defines arrive as another class; old kernels (before 5.14) count processes of all sandboxes of a
    user together, so that programs that start threads may fail.
    """
    if not 0 < timeout_s <= 3600 or memory_mb < 64 or processes < 4:
        raise ValueError(
            f"timeout_s = {timeout_s}, memory_mb = {memory_mb}, processes = {processes}; expected 0 < timeout_s <= 3600, at least 64 and 4"
        )
    limits = Limits(cpu_s=int(timeout_s) + 2, memory_mb=memory_mb, processes=processes)
    box = open_sandbox(sandbox, limits=limits, unsafe_local=unsafe_local, packages=packages)
    trusted = Limits(cpu_s=int(timeout_s) + 2, memory_mb=CHECKER_MB, processes=processes)
    checker_box = Sandbox(box.kind, box.name, trusted, packages)

    def judge(prompt: Prompt, response: str) -> Verdict:
        program, fenced = program_of(response)
        try:
            todo = plan(prompt, program or "", fenced, partial)
        except RowError as error:
            return Verdict(None, "error", detail=str(error))
        if program is None:
            return Verdict(0.0, "no_answer", detail="nothing in the response looks like a program")
        run = Run(box, checker_box, timeout_s, memory_mb, partial)
        try:
            if todo.checker is not None:
                run.functions(todo.candidate, todo.checker | {"objects": objects})
            if todo.mains and (partial or not run.failed):
                run.mains(todo)
        except OSError as error:
            run.problem = f"the sandbox could not be started: {type(error).__name__}: {error}"
        return run.verdict(todo.total, program, fenced)

    about = {"sandbox": box.name, "worst_case_s": timeout_s + START_LIMIT_S + 1.0}
    judge.about = about  # type: ignore[attr-defined]
    return judge


_DOUBLE = "def double(x):\n    return 2 * x"
_CALLS = {"cases": [{"call": "double", "args": [4], "returns": 8}, {"call": "double", "args": ["ab"], "returns": "abab"}]}
_PRINTS = {"cases": [{"stdin": "4\n", "stdout": "8\n"}]}
_ASSERTS = {"test_list": ["assert double(4) == 8", "assert double([1]) == [1, 1]"]}
_CHECK = {"test": "def check(candidate):\n    assert candidate(4) == 8\n", "entry_point": "double", "prefix": "def double(x):\n"}

code_exec.selfcheck = [  # type: ignore[attr-defined]
    ("Write double(x).", _DOUBLE, f"Here it is:\n```python\n{_DOUBLE}\n```\nIt adds x to itself.", 1.0, {}, _CALLS),
    ("Write double(x).", _DOUBLE, "```python\ndef double(x):\n    return 2 + x\n```", 0.0, {}, _CALLS),
    ("Write double(x).", _DOUBLE, "```python\ndef double(x):\n    return 8\n```", 0.5, {"partial": True}, _CALLS),
    ("Write double(x).", _DOUBLE, f"```python\n{_DOUBLE}\n```", 1.0, {}, _ASSERTS),
    ("Write double(x).", _DOUBLE, "```python\ndef double(x):\n    while True: pass\n```", 0.0, {"timeout_s": 0.5}, _ASSERTS),
    ("Write double(x).", _DOUBLE, "```python\nclass All:\n    __eq__ = lambda s, o: True\ndouble = lambda x: All()\n```", 0.0, {}, _ASSERTS),
    ("Write double(x).", _DOUBLE, "```python\nimport os\ndef double(x):\n    os._exit(0)\n```", 0.0, {}, _CHECK),
    ("Write double(x).", _DOUBLE, "    return x + x\n", 1.0, {}, _CHECK),
    ("Print twice the number.", "print(2 * int(input()))", "```python\nprint(2 * int(input()))\n```", 1.0, {}, _PRINTS),
    ("Print twice the number.", "print(2 * int(input()))", "The program prints the double.", 0.0, {}, _PRINTS),
]

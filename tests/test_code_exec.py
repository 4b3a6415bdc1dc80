"""code_exec: programs against their tests. The ways out of the sandbox are in test_sandbox.py."""

from __future__ import annotations

import ast
import gzip
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from llmrl.records import Prompt, Verdict
from llmrl.rewards import sandbox as box
from llmrl.rewards.code_cases import plan, program_of
from llmrl.rewards.code_exec import code_exec
from llmrl.rewards.code_values import decode, encode
from llmrl.scoring import Scorer

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "code"
KINDS = [kind for kind in ("bwrap", "namespaces") if box._try(kind, box.Limits(), False)[0] is not None]
pytestmark = pytest.mark.skipif(not KINDS, reason="no sandbox works on this machine")


@pytest.fixture(scope="module")
def verify():
    return code_exec(sandbox=KINDS[0])


@pytest.fixture(scope="module")
def partial():
    return code_exec(sandbox=KINDS[0], partial=True)


def judged(verify, row: dict, program: str, *, text: str = "Write it.", fenced: bool = True) -> Verdict:
    response = f"```python\n{program}\n```" if fenced else program
    return verify(Prompt("p", ({"role": "user", "content": text},), None, row), response)


def asserts(*lines: str) -> dict:
    return {"test_list": list(lines)}


# ---------------------------------------------------------------- real rows


def rows_of(name: str) -> list[dict]:
    if not (DATA / f"{name}.jsonl.gz").exists():
        pytest.skip("the shared data folder is not here")
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    odd = {"mbpp/126", "mbpp/367", "mbpp/596", "mbpp/927", "humaneval/32", "humaneval/33", "humaneval/38", "humaneval/50", "humaneval/53"}
    every = 1 if os.environ.get("LLMRL_ALL_ROWS") else 40  # all 1138 rows take 2 to 4 minutes for both kinds
    return [row for number, row in enumerate(rows) if number % every == 0 or row["id"] in odd]


WRONG = """
def _wrong(f):
    return lambda *args, **kwargs: (f(*args, **kwargs), None)
for _name, _f in list(globals().items()):
    if type(_f) is type(_wrong) and _name != "_wrong":
        globals()[_name] = _wrong(_f)
"""


class Hollow(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.body = [ast.Pass()]
        return node


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_reference_programs_pass_and_broken_ones_fail(kind, name):
    verify = code_exec(sandbox=kind)
    for row in rows_of(name):
        program = row["prompt"] * (name == "humaneval") + row["answer"]
        right = judged(verify, row, program, text=row["prompt"])
        assert right.score == 1.0, (row["id"], right)
        broken = f"{program}\n{WRONG}" if kind == "bwrap" else ast.unparse(Hollow().visit(ast.parse(program)))
        assert judged(verify, row, broken, text=row["prompt"]).score == 0.0, row["id"]


# ---------------------------------------------------------------- finding the program


@pytest.mark.parametrize(
    ("response", "program", "fenced"),
    [
        ("Text\n```python\na = 1\n```\nand\n```python\na = 2\n```\nprints\n```\n3\n```", "a = 2", True),
        ("```\na = 1\n```", "a = 1", True),
        ("```bash\nls\n```\n```py\na = 1\n```", "a = 1", True),
        ("- so:\n  ```python\n  def f():\n      return 1\n  ```", "def f():\n    return 1", True),
        ("```python\nx = '''\n``` no fence\n'''\n```", "x = '''\n``` no fence\n'''", True),
        ("~~~python\na = '```'\n~~~", "a = '```'", True),
        ("```python\na = 1", "a = 1", True),
        ("    return x + 1\n", "    return x + 1\n", False),
        ("The answer is 4.", None, False),
        ("", None, False),
        ("```\n```", None, False),
    ],
)
def test_the_program_of_a_response(response, program, fenced):
    assert program_of(response) == (program, fenced)


def test_finding_the_program_takes_linear_time():
    for text in ("```\n" * 50_000, "`" * 200_000, "\n" * 200_000, "a" * 200_000, "if " * 70_000, "[" * 200_000, "a = " * 50_000, "a, " * 70_000):
        program_of(text)  # quadratic time would be minutes


PREFIX = 'from typing import List\n\ndef total(xs: List[int]) -> int:\n    """The sum."""\n'
SUM = {"test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert total([]) == 0\n", "entry_point": "total", "prefix": PREFIX}


@pytest.mark.parametrize(
    ("response", "score", "status"),
    [
        (f"```python\n{PREFIX}    return sum(xs)\n```", 1.0, "ok"),
        ("```python\ndef total(xs: List[int]):\n    return sum(xs)\n```", 1.0, "ok"),  # the prompt's own import holds
        ("```python\n    return sum(xs)\n```", 1.0, "ok"),
        ("```python\nout = 0\nfor x in xs:\n    out += x\nreturn out\n```", 1.0, "ok"),
        ("    return sum(xs)\n", 1.0, "ok"),  # a base model goes on writing ...
        ("    return sum(xs)\n\ndef other(:\n    pass", 1.0, "ok"),  # ... and does not stop
        ("    return sum(xs)\n\nprint(total([1", 1.0, "ok"),
        ("total = sum", 1.0, "ok"),
        ("```python\ndef total(xs):\n    return len(xs)\n```", 0.0, "ok"),
        ("```python\ndef summe(xs):\n    return sum(xs)\n```", 0.0, "ok"),
        ("```python\ndef total(xs:\n```", 0.0, "ok"),
        ("if you add them: the sum", 0.0, "no_answer"),
        ("I cannot do that.", 0.0, "no_answer"),
    ],
)
def test_humaneval_rows(verify, response, score, status):
    verdict = judged(verify, SUM, response, fenced=False)
    assert (verdict.score, verdict.status) == (score, status), verdict


def test_a_raw_humaneval_row_has_its_prefix_in_the_prompt(verify):
    row = {name: SUM[name] for name in ("test", "entry_point")}
    assert judged(verify, row, "    return sum(xs)\n", text=PREFIX, fenced=False).score == 1.0


# ---------------------------------------------------------------- what crosses between program and tests

VALUES = [
    None, True, 0, -1, 2**63, -(2**20_000), 0.1, -0.0, math.inf, -math.inf, 1e308, 3 - 4j, complex(math.inf, 0), "", "ä\0\ud83d\u2028", b"\0\xff",
    [], [1, [2, [3]]], (), (1,), ([1], (2,)), {1, "a"}, set(), frozenset({frozenset({1})}), {}, {(1, 2): [3], None: {}, 1.5: "x"}, range(1, 9, 3),
]


def test_plain_values_cross_unchanged(verify):
    cases = [{"call": "f", "args": [v], "kwargs": {"k": v}, "returns": {"v": v, "k": v}} for v in VALUES]
    verdict = judged(verify, {"cases": cases}, "def f(v, *, k): return {'v': v, 'k': k}")
    assert verdict.score == 1.0, verdict
    for value in [*VALUES, math.nan]:
        back = decode(json.loads(json.dumps(encode(value, other=repr))), repr)
        assert type(back) is type(value) and (back == value or back != back)
    assert math.copysign(1, decode(encode(-0.0, repr), repr)) == -1


def test_other_values_cross_as_plain_data_or_handles(verify):
    program = """
import collections, dataclasses, datetime, decimal, enum, fractions, itertools
P = collections.namedtuple("P", "x y")
class Node:
    def __init__(self, v): self.v = v; self.next = None
    def double(self): return 2 * self.v
    def __len__(self): return 3
    def __getitem__(self, i): return i * 10
class Str(str):
    def __eq__(self, other): return True
    def __str__(self): return "other"
    __hash__ = str.__hash__
class Int(int):
    def __int__(self): return 99
class Colour(enum.IntEnum): RED = 1
def give(name):
    return {"counter": collections.Counter("aab"), "ordered": collections.OrderedDict(a=1), "default": collections.defaultdict(int, a=1),
            "named": P(1, 2), "decimal": decimal.Decimal("1.10"), "fraction": fractions.Fraction(1, 3), "date": datetime.date(2024, 2, 29),
            "delta": datetime.timedelta(1, 2, 3), "str": Str("plain"), "int": Int(3), "enum": Colour.RED, "bytes": bytearray(b"x"),
            "generator": (i for i in range(3)), "map": map(str, [1, 2]), "endless": itertools.count(), "function": lambda a: a + 1,
            "node": NODE, "keys": {"a": 1}.keys(), "deque": collections.deque([1, 2])}[name]
NODE = Node(4)
def value(node): return node.v
def sort(xs): xs.sort(); xs.append(0)
def fail(name, *args): raise {"own": type("Own", (Exception,), {})}.get(name) or __import__("builtins").__dict__[name](*args)
def same(x): return x
"""
    tests = [
        "assert give('counter') == {'a': 2, 'b': 1} and type(give('counter')) is dict", "assert give('ordered') == give('default') == {'a': 1}",
        "assert give('named') == (1, 2) and type(give('named')) is tuple", "import decimal\nassert give('decimal') == decimal.Decimal('1.1')",
        "import fractions\nassert give('fraction') == fractions.Fraction(1, 3)", "import datetime\nassert give('date') == datetime.date(2024, 2, 29)",
        "import datetime\nassert give('delta') == datetime.timedelta(1, 2, 3)", "assert give('str') == 'plain' and type(give('str')) is str",
        "assert not give('str') == 'x'", "assert give('int') == 3 and type(give('int')) is int", "assert give('enum') == 1", "assert give('bytes') == b'x'",
        "assert list(give('generator')) == [0, 1, 2]", "assert [x for x in give('map')] == ['1', '2']", "assert next(give('endless')) == 0",
        "assert give('function')(2) == 3", "assert list(map(give('function'), [1, 2])) == [2, 3]", "assert set(give('keys')) == {'a'}",
        "assert list(give('deque')) == [1, 2] and len(give('deque')) == 2 and 2 in give('deque') and 3 not in give('deque')",
        "from math import isclose as near\nassert near(give('fraction'), 1 / 3)",
        "node = give('node')\nassert node.v == 4 and node.double() == 8 and len(node) == 3 and node[2] == 20 and value(node) == 4 and node",
        "node = give('node')\nnode.v = 7\nassert value(node) == 7 and node == give('node') and node is give('node') and not node != node",
        "assert give('node') != 4 and not give('node') == [] and give('node') != give('function') and same(give('node')) == give('node')",
        "xs = [3, 1]\nassert sort(xs) is None and xs == [0, 1, 3][1:] + [0]", "xs = [1]\nassert same(xs) == xs and xs == [1]",
        "assert same(int) is not int and same(x=len)([1]) == 1",
        *(f"try:\n    fail({n!r}, {a})\nexcept {e}:\n    pass\nelse:\n    assert False" for n, a, e in
          [("ValueError", "'x'", "ValueError"), ("KeyError", "'x'", "LookupError"), ("own", "", "Exception"), ("StopIteration", "", "StopIteration"),
           ("UnicodeDecodeError", "'a', b'', 0, 1, 'r'", "Exception"), ("SystemExit", "", "Exception"), ("KeyboardInterrupt", "", "Exception")]),
    ]
    verdict = judged(code_exec(sandbox=KINDS[0], objects=True), asserts(*tests), program)
    assert verdict.score == 1.0, verdict
    closed = judged(verify, asserts("assert give('node').v == 4"), program)
    assert closed.score == 0.0 and "objects = true" in closed.detail


def test_a_program_cannot_change_the_tests_own_data(partial):
    program = "def f(xs):\n    xs.clear()\n    return xs"
    tests = ["xs = [2, 1]\nassert f(xs) == sorted(xs)", "xs = [2, 1]\nf(xs)\nassert xs == []", "xs = [2, 1]\nassert f(xs) == [] and xs == [2, 1]"]
    assert judged(partial, asserts(*tests), program).score == pytest.approx(1 / 3)
    assert judged(code_exec(sandbox=KINDS[0], objects=True, partial=True), asserts(*tests), program).score == pytest.approx(2 / 3)


def test_an_object_in_a_strings_place_is_not_told_what_is_expected(partial):
    program = """
told = []
class Any:
    def __getattr__(self, name): return lambda *a: told.append(a) or True
    def __contains__(self, value): told.append(value); return True
    def __iter__(self): return iter([1])
    def __eq__(self, other): told.append(other); return True
    def __radd__(self, other): told.append(other); return other
    __hash__ = None
def f(x): return Any()
def heard(): return told
"""
    tests = ["assert f(1).startswith('secret')", "assert 'secret' in f(1)", "assert f(1) == 'secret'", "assert 'secret' == f(1)", "assert 'a' + f(1) == 'a'"]
    tests += ["assert sorted(f(1)) == ['secret']", "assert f(1) in ['secret']", "assert heard() == []"]
    assert judged(partial, asserts(*tests), program).score == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    "data",
    [{}, {"q": 1}, {"t": 5}, {"t": [1], "s": []}, {"s": [[1]]}, {"d": [[1]]}, {"d": [[[1], 2]]}, {"i": 3}, {"i": "z"}, {"f": "1"}, {"f": []}, {"b": "0"},
     {"c": ["x", 1]}, {"r": [1, 2, 0]}, {"r": ["a"]}, {"o": ["Decimal", "x"]}, {"o": ["Fraction", "1/0"]}, {"o": ["eval", "1"]}, {"o": 3},
     {"o": ["date", "1"]}, {"h": [1]}, {"o": ["timedelta", "x"]}, {"g": "eval"}, json.loads("[" * 300 + "]" * 300)],
)
def test_what_is_no_value_is_refused(data):
    """With the errors that the checker takes for the program's fault."""

    def handle(data):
        return int(data["h"])

    with pytest.raises((ValueError, TypeError, LookupError, ArithmeticError, AttributeError)):
        decode(data, handle)


def test_builtins_and_modules_are_the_tests_own(partial):
    program = """
import math, builtins, sys
sys.getsizeof = len = abs = set = sum = lambda *a: 0
math.isclose = lambda *a, **k: True
builtins.abs = builtins.set = builtins.sorted = lambda *a: 0
class float: __eq__ = lambda s, o: True
def f(x): return 7
"""
    tests = ["assert abs(f(1) - 2) == 0", "assert set([f(1)]) == set([2])", "assert math.isclose(f(1), 2)", "assert sorted([f(1)]) == sorted([2])"]
    tests += ["assert float(f(1)) == float(2)", "assert f(1) == 7 and abs(-1) == 1 and math.isclose(1, 1)"]
    verdict = judged(partial, asserts(*tests), program)
    assert verdict.score == pytest.approx(1 / 6)


def test_what_is_expected_is_not_in_the_programs_job():
    secret = "SECRET-4711"
    rows = [
        asserts(f"assert f(1) == {secret!r}"), {"cases": [{"call": "f", "args": [1], "returns": secret}, {"stdin": "1", "stdout": secret}]},
        {"test": f"def check(candidate):\n    assert candidate(1) == {secret!r}", "entry_point": "f", "prefix": "def f(x):\n"},
    ]
    for row in rows:
        todo = plan(Prompt("p", ({"role": "user", "content": "write f"},), secret, row | {"solution": secret}), "def f(x): pass", True, False)
        assert secret not in json.dumps(todo.candidate)
        assert secret in json.dumps([todo.checker, todo.mains])


# ---------------------------------------------------------------- whole programs


@pytest.mark.parametrize(
    ("program", "score", "detail"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", 1.0, "2 of 2"),
        ("import sys\nif __name__ == '__main__':\n    print(sum(map(int, sys.stdin.read().split())), '  ')\n    print()", 1.0, ""),
        ("print(sum(map(int, open(0).read().split())))\nexit()", 1.0, ""),
        ("import threading\nthreading.Thread(target=lambda: print(sum(map(int, input().split())))).start()", 1.0, ""),
        ("print(3)", 0.0, "wrong output '3\\n'"),
        ("print(sum(map(int, input().split())))\n1 / 0", 0.0, "ZeroDivisionError: division by zero"),
        ("import sys\nprint(sum(map(int, input().split())))\nsys.exit(3)", 0.0, "exit code 3"),
        ("print(sum(map(int, input().split()))", 0.0, "SyntaxError"),
        ("while True: pass", 0.0, "did not end within 1 s"),
        ("import os\nprint(3, flush=True)\nos.kill(os.getpid(), 9)", 0.0, "signal 9"),
    ],
)
def test_stdin_and_stdout(program, score, detail):
    verify = code_exec(sandbox=KINDS[0], timeout_s=1.0)
    row = {"cases": [{"stdin": "1 2\n", "stdout": "3"}, {"stdin": "10 -4", "stdout": "6\n\n"}]}
    verdict = judged(verify, row, program)
    assert verdict.score == score and detail in verdict.detail, verdict


def test_time_that_one_case_used_up_is_no_error_of_the_next():
    verify = code_exec(sandbox=KINDS[0], timeout_s=0.5, partial=True)
    row = {"cases": [{"call": "f", "args": [], "returns": 1}] + [{"stdin": str(n), "stdout": ""} for n in range(3)]}
    for pause in (0.3, 0.45, 0.49):
        verdict = judged(verify, row, f"import time\ntime.sleep({pause} if __name__ == '__main__' else 0)\ndef f(): return 1")
        assert verdict.status == "ok" and verdict.score in (0.25, 0.5) and "did not end within 0.5 s" in verdict.detail


def test_each_case_has_a_fresh_process(partial):
    row = {"cases": [{"stdin": str(n), "stdout": "first"} for n in range(3)]}
    program = "import os\nprint('again' if os.path.exists('/tmp/seen') else 'first')\nopen('/tmp/seen', 'w').close()"
    assert judged(partial, row, program).score == 1.0


def test_partial_gives_the_share(partial, verify):
    row = {"cases": [{"call": "f", "args": [n], "returns": n * n} for n in range(4)] + [{"stdin": "", "stdout": "4"}]}
    program = "def f(x):\n    return 2 * x\nprint(4)"
    assert judged(partial, row, program).score == pytest.approx(3 / 5)  # 0, 2 and the print
    assert judged(verify, row, program).score == 0.0
    assert judged(partial, asserts("assert f(1) == 2", "assert f('a') == 1", "assert f(3) == 6"), program).score == pytest.approx(2 / 3)


# ---------------------------------------------------------------- statuses


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({}, "no tests"),
        ({"cases": [{"input": "1"}]}, "case 1 is .*expected"),
        ({"cases": [{"call": "f", "args": [object()], "returns": 1}]}, "case 1 cannot be sent"),
        ({"cases": "[broken"}, "cases is text that is no JSON"),
        ({"test_list": [3]}, "assert statements"),
        ({"test_list": ["assert f(1) =="]}, "cannot be run: SyntaxError"),
        ({"test_list": ["assert f(lambda x: x)"]}, "type function"),
        ({"test_list": ["assert f(1)"], "test_imports": ["import no_such_module"]}, "no_such_module"),
        ({"test": "def check(candidate): pass", "entry_point": ""}, "entry_point"),
        ({"test": "def probe(candidate): pass", "entry_point": "f"}, "defines no check"),
        ({"test": "1 / 0\ndef check(candidate): pass", "entry_point": "f"}, "ZeroDivisionError"),
    ],
)
def test_broken_rows_are_errors(verify, row, match):
    verdict = judged(verify, row, "def f(x): return x")
    assert verdict.status == "error" and verdict.score is None
    assert re.search(match, verdict.detail), verdict


def test_rows_whose_lists_are_json_text(verify):
    assert judged(verify, {"test_list": '["assert f(1) == 1"]'}, "def f(x): return x").score == 1.0


def test_setup_code_runs_after_the_program_on_its_side(verify):
    row = asserts("assert size(root) == 2") | {"test_setup_code": "root = Node(1)\nroot.left = Node(2)"}
    program = "class Node:\n    def __init__(self, v): self.v, self.left = v, None\ndef size(n): return 0 if n is None else 1 + size(n.left)"
    assert judged(verify, row, program).score == 1.0
    other = judged(verify, row, "def size(n): return 2")
    assert other.score == 0.0 and "Node" in other.detail


def test_the_same_program_gets_the_same_verdict(verify):
    """Hashes of text are fixed, so the order of a set is."""
    row = {"cases": [{"stdin": "", "stdout": "a"}]}
    assert len({judged(verify, row, "print({'a', 'b', 'c', 'd'}.pop())").score for _ in range(6)}) == 1


def test_packages_are_seen_only_where_asked_for(verify):
    program = "import numpy as np\ndef f(x): return np.sum(np.array(x))"
    hidden = judged(verify, asserts("assert f([1, 2]) == 3"), program)
    assert hidden.score == 0.0 and "No module named 'numpy'" in hidden.detail
    for kind in KINDS:
        verdict = judged(code_exec(sandbox=kind, packages=True), asserts("assert f([1, 2]) == 3"), program)
        assert verdict.score == 1.0, verdict


def test_without_a_sandbox_if_asked_for():
    verify = code_exec(unsafe_local=True, timeout_s=1.0)
    about = verify.about  # type: ignore[attr-defined]
    assert about == {"sandbox": "unsafe_local", "worst_case_s": 6.0}
    before = set(Path("/tmp").glob("llmrl-*"))
    assert judged(verify, SUM, "    return sum(xs)", fenced=False).score == 1.0
    assert judged(verify, {"cases": [{"stdin": "2", "stdout": "4"}]}, "print(2 * int(input()))").score == 1.0
    endless = judged(verify, SUM, "    while True: pass", fenced=False)
    assert endless.score == 0.0 and "did not end within 1 s" in endless.detail
    assert set(Path("/tmp").glob("llmrl-*")) == before


@pytest.mark.parametrize("keys", [{"timeout_s": 0.0}, {"memory_mb": 1}, {"processes": 0}])
def test_limits_out_of_range(keys):
    with pytest.raises(ValueError, match=next(iter(keys))):
        code_exec(**keys)


def test_selfcheck_rows():
    made = {}
    for question, gold, response, expected, keys, meta in code_exec.selfcheck:  # type: ignore[attr-defined]
        verify = made.setdefault(str(keys), made.get(str(keys)) or code_exec(**keys))
        verdict = verify(Prompt("p", ({"role": "user", "content": question},), gold, meta), response)
        assert verdict.score == expected, (response, verdict)


def test_in_the_pool(tmp_path):
    row = asserts("assert f(1) == 2")
    prompt = Prompt("p", ({"role": "user", "content": ""},), None, row)
    programs = ["def f(x): return x + 1", "def f(x): return x", "import os\ntry: os.kill(os.getppid(), 9)\nexcept OSError: pass\ndef f(x): return 2"]
    with Scorer("code_exec", {"timeout_s": 3.0}, tmp_path, workers=2) as scorer:
        verdicts = scorer.score([(prompt, f"```python\n{p}\n```") for p in programs * 4])
        assert [v.score for v in verdicts] == [1.0, 0.0, 1.0] * 4  # the sandbox's process 1 hears no signal from inside
        assert Counter(v.status for v in verdicts) == {"ok": 12} and scorer.stats()["respawns"] == 0

"""Hostile responses through the real pool: every one gets a Verdict in time, and its neighbours get the right one."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmrl.records import Prompt, Verdict
from llmrl.rewards.math_answer import math_answer
from llmrl.scoring import Scorer

sys.path.insert(0, str(Path(__file__).parent))
from adversarial import corpus

HERE = Path(".")
TIMEOUT_S = 3.0
START_S = 10.0  # a killed worker is replaced: Python and sympy are imported again, on a busy machine

# What the limits let through and sympy does not finish in 5 s: the pool must bear it.
EVADERS = [
    r"\frac{963!}{\sin^{x}(329)+\arcsin(a)}+f(x)",
    r"\frac{7^{900}}{\sin^{y}(5)+\arcsin(b)}+g(y)",
    r"\frac{e \cdot 700!}{\sin^{x}(17)+\arctan(a)}-h(a)",
    r"f(b)\frac{e \cdot 1500!}{\sin^{y}(5)+\arcsin(b)}",
    r"\frac{\pi \cdot 1200!}{\cos^{y}(5)+f(b)}",
]


def ask(gold: str | None, response: str, question: str = "", **meta: Any) -> tuple[Prompt, str]:
    return Prompt("p", ({"role": "user", "content": question},), gold, meta), response


def peak_mb(process: psutil.Process) -> float:
    """The most memory that the process has held, where the system tells, else what it holds now."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return process.memory_info().rss / 2**20
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def test_the_corpus_is_broad_and_distinct() -> None:
    cases = corpus("marker")
    assert len(cases) >= 500
    assert len({name for name, *_ in cases}) == len({case[1:] for case in cases}) == len(cases)
    assert len({name.split("/")[0] for name, *_ in cases}) == 12


MARKED = "(A) bank\n(B) library"
VERIFIERS = [
    # reference, keywords, a normal question, gold, right and wrong response; how many of the corpus may end as timeout
    ("math_answer", {}, "", r"\frac{1}{2}", r"so \boxed{0.5}", r"so \boxed{0.6}", 2),
    ("math_answer", {"strict": True}, "", r"\frac{1}{2}", r"so \boxed{0.5}", r"\boxed{0.5} or \boxed{0.6}", 2),
    ("numeric", {}, "", "12", "It is 12.", "It is 13.", 0),
    ("exact", {}, "", "Paris", "It is\nParis.", "Lyon", 0),
    ("choice", {}, MARKED, "B", "The answer is (B).", "The answer is (A).", 0),
    ("format", {"tags": ["think", "answer"]}, "", None, "<think>a</think><answer>4</answer>", "4", 0),
]


@pytest.mark.parametrize(("ref", "keys", "question", "gold", "right", "wrong", "slow"), VERIFIERS)
def test_every_hostile_response_gets_a_verdict_in_time(
    ref: str, keys: dict[str, Any], question: str, gold: str | None, right: str, wrong: str, slow: int, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    cases = corpus(str(marker))
    # what stands after a hostile item in its chunk shows whether the worker has kept its wits
    hostile = [ask(g if ref in ("math_answer", "numeric", "exact") else gold, r, question) for _, g, r in cases]
    normal = [ask(gold, right if i % 2 else wrong, question) for i in range(len(cases))]
    items = [item for pair in zip(hostile, normal, strict=True) for item in pair]
    others = psutil.Process().children(recursive=True)  # what earlier tests keep running, such as multiprocessing's servers
    started = time.monotonic()
    with Scorer(ref, keys, HERE, workers=2, timeout_s=TIMEOUT_S, max_failure_rate=1.0) as scorer:
        children = [c for c in psutil.Process().children(recursive=True) if c not in others]
        verdicts = scorer.score(items)
        late = [items[2 * i] for i, v in enumerate(verdicts[::2]) if v.status == "timeout"]
        assert time.monotonic() - started < 40 + len(late) * (TIMEOUT_S + START_S)
        children += [c for c in psutil.Process().children(recursive=True) if c not in (*children, *others)]
        assert max((peak_mb(c) for c in children if c.is_running()), default=0) < 1000
        stats = scorer.stats()
    assert not [c for c in children if c.is_running()]  # none left, not even as a zombie
    assert not marker.exists()
    assert [v.score for v in verdicts[1::2]] == [float(i % 2) for i in range(len(cases))]
    found = Counter(v.status for v in verdicts)
    assert len(late) <= slow, [r[:80] for _, r in late]
    assert {s: stats[s] for s in ("ok", "no_answer", "timeout", "error")} == {s: found[s] for s in ("ok", "no_answer", "timeout", "error")}
    errors = [name for (name, *_), v in zip(cases, verdicts[::2], strict=True) if v.status == "error" and not name.startswith(("numbers/gold", "code/in"))]
    assert ref != "math_answer" or errors == ["powers/in the gold"]


@pytest.mark.parametrize("strict", [False, True])
def test_right_answers_among_the_hostile_ones_score_and_wrong_ones_do_not(strict: bool) -> None:
    verify = math_answer(strict=strict)
    verdicts: dict[str, Verdict] = {}
    for name, gold, response in corpus("marker"):
        if name.endswith("/right") or name.startswith(("sprays", "unicode_text", "numbers", "broken", "code", "control")):
            verdict = verify(*ask(gold, response))
            assert isinstance(verdict, Verdict)
            verdicts[name] = verdict
    lost = [(n, v) for n, v in verdicts.items() if n.endswith("/right") and v.score != 1.0]
    assert [n for n, _ in lost] == (["broken/unclosed dollars/right", "sprays/boxes, the last right/right"] if strict else [])
    won = [n for n, v in verdicts.items() if not n.endswith("/right") and v.score == 1.0]
    assert won == []


def test_deadline_holds_as_seen_from_outside() -> None:
    with Scorer("math_answer", {}, HERE, workers=1, timeout_s=1.0, max_failure_rate=1.0) as scorer:
        for text in EVADERS[:2]:
            started = time.monotonic()
            (verdict,) = scorer.score([ask("3", rf"\boxed{{{text}}}")])
            assert verdict.status == "timeout" and verdict.score is None and "1 s" in verdict.detail
            assert time.monotonic() - started < 1.0 + START_S
            (after,) = scorer.score([ask("3", r"\boxed{3}")])
            assert after.score == 1.0
        assert scorer.stats()["timeout"] == len(EVADERS[:2])


def ordinary(i: int) -> tuple[str, str, float]:
    """(gold, response, score) number i: a right answer in another notation, or a wrong one."""
    a, b = i % 17 + 2, i % 29 + 31
    forms = [
        (str(a * b), f"{a} times {b} is {a * b}.\n#### {{}}", (str(a * b), str(a * b + 1))),
        (rf"\frac{{{a}}}{{{b}}}", r"so it is \boxed{{{}}}", (rf"\dfrac{{{2 * a}}}{{{2 * b}}}", rf"\frac{{{b}}}{{{a}}}")),
        (rf"{a}\sqrt{{{b}}}", r"hence $\boxed{{{}}}$", (rf"\sqrt{{{a * a * b}}}", rf"{b}\sqrt{{{a}}}")),
        (rf"({a}, {b})", r"The answer is $\boxed{{{}}}$.", (rf"\left({a},{b}\right)", f"({b}, {a})")),
        (f"x^2+{a}x+{b}", r"we get \boxed{{{}}}", (f"{b}+x({a}+x)", f"x^2-{a}x+{b}")),
        (f"{a * 1000 + b}", "The answer is {} dollars.", (f"${a},{b:03d}", f"${a},{b + 1:03d}")),
    ]
    gold, frame, answers = forms[i % len(forms)]
    wrong = i // len(forms) % 2
    return gold, frame.format(answers[wrong]), float(1 - wrong)


def test_ten_thousand_answers_with_one_percent_pathological(tmp_path: Path) -> None:
    draw = random.Random(0)
    hostile = [(g, r) for name, g, r in corpus(str(tmp_path / "marker")) if not name.endswith("/right")]
    hostile = draw.sample(hostile, 90) + [("3", rf"\boxed{{{text}}}") for text in (EVADERS * 10)[:10]]
    normal = [ordinary(i % 306) for i in range(9_900)]
    places = set(draw.sample(range(10_000), 100))
    bad, good = iter(hostile), iter(normal)
    items, labels = [], []
    for i in range(10_000):
        gold, response, *label = next(bad) if i in places else next(good)
        items.append(ask(gold, response))
        labels.append(label[0] if label else None)
    before = set(psutil.Process().children(recursive=True))
    started = time.monotonic()
    with Scorer("math_answer", {}, HERE, workers=2, timeout_s=1.0, max_failure_rate=0.02) as scorer:
        verdicts = scorer.score(items)
        took, stats = time.monotonic() - started, scorer.stats()
    # 10 evaders may each cost a deadline and a new worker, shared by two; the rest is 5 ms an item at the very most
    assert took < 10_000 * 0.005 + 20 * (1.0 + START_S) / 2
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not (tmp_path / "marker").exists()
    graded = [(item, v) for item, v, label in zip(items, verdicts, labels, strict=True) if label is not None and v.score != label]
    assert graded == []
    statuses = Counter(v.status for v, label in zip(verdicts, labels, strict=True) if label is None)
    assert sum(statuses.values()) == 100 and 10 <= statuses["timeout"] <= 15
    assert all(v.score is None for v in verdicts if v.status in ("timeout", "error"))
    assert sum(stats[s] for s in ("ok", "no_answer", "timeout", "error")) == 10_000 and stats["timeout"] == statuses["timeout"]
    assert 10 <= stats["respawns"] <= 20

"""Worker processes, killed for real: whatever a verifier does, score() returns a Verdict in time and nothing is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from llmrl.records import InputError, Prompt, Verdict
from llmrl.scoring import FailureRateError, Scorer

REPO = Path(__file__).parents[1]
P = Prompt("p", ({"role": "user", "content": "q"},), "7")

VERIFIERS = r"""
import asyncio, os, re, sys, time
from llmrl.records import Verdict

def equal(*, bonus: float = 0.0):
    return lambda prompt, response: Verdict(1.0 if response == prompt.answer else bonus, "ok", response)

def pid():
    return lambda prompt, response: Verdict(1.0, "ok", str(os.getpid()), ",".join(sorted({"torch", "transformers"} & set(sys.modules))))

def slow():
    def verify(prompt, response):
        time.sleep(float(response))
        return Verdict(1.0, "ok", str(os.getpid()))
    return verify

def wicked(*, marks: str):
    def mark(name, pid=None):
        with open(os.path.join(marks, name), "a") as f:
            f.write(f"{pid or os.getpid()}\n")
    def child():
        pid = os.fork()
        if pid == 0:
            time.sleep(1000)
        mark("grandchild", pid)  # written here: the child may be killed before it could
    def recurse():
        return recurse()
    def verify(prompt, response):
        if response == "python loop":
            while True:
                pass
        if response == "C loop":  # holds the GIL: no thread of the worker can run
            re.match(r"(a+)+$", "a" * 64 + "b")
        if response == "forks and hangs":
            child()
            time.sleep(1000)
        if response == "leaves a child and dies":
            child()
            os._exit(4)
        if response == "child returns":
            os.fork()
        if response == "exits":
            mark("exits")
            os._exit(3)
        if response == "dies once":
            mark("dies once")
            if len(open(os.path.join(marks, "dies once")).readlines()) == 1:
                os.kill(os.getpid(), 9)
        if response == "sys.exit":
            sys.exit(1)
        if response == "keyboard":
            raise KeyboardInterrupt
        if response == "recursion":
            recurse()
        if response == "raises":
            raise ValueError("no such unit")
        if response == "unprintable":
            class Odd(Exception):
                def __str__(self):
                    raise RuntimeError
            raise Odd
        if response == "memory":
            len(bytearray(4 << 30))
        if response == "none":
            return None
        if response == "nan":
            return Verdict(float("nan"))
        if response == "object":
            return Verdict(True, "ok", ["4", 2], {"odd": object})
        if response == "prints":
            print("x" * 100_000, flush=True)
            os.write(1, b'["done", 0, 0, 1.0, "ok", null, ""]\n')
        return Verdict(1.0 if response == prompt.answer else 0.0)
    return verify

def late():
    async def verify(prompt, response):
        await asyncio.sleep(0.001)
        if response == "exit":
            raise SystemExit(3)
        if response == "never":
            await asyncio.sleep(1000)
        return Verdict(float(response == prompt.answer))
    return verify

def judge(*, marks: str):
    # its detail says how many calls were in flight when this one began
    state = {"now": 0}
    async def verify(prompt, response):
        verify.counters["judge/calls"] += 1
        verify.counters["judge/tokens"] += 10
        state["now"] += 1
        seen = state["now"]
        try:
            if response == "blocks":
                time.sleep(1000)
            if response == "dies":
                with open(os.path.join(marks, "dies"), "a") as f:
                    f.write("x")
                await asyncio.sleep(0.05)
                os._exit(3)
            if response == "own timeout":
                raise TimeoutError("the endpoint is slow")
            if response == "gives up":
                raise asyncio.CancelledError
            await asyncio.sleep(float(response))
            return Verdict(1.0, "ok", str(os.getpid()), str(seen))
        finally:
            state["now"] -= 1
    verify.counters = {"judge/calls": 0.0, "judge/tokens": 0.0}
    return verify

def mixed():
    async def later(response):
        await asyncio.sleep(0.01)
        return Verdict(1.0, "ok", response)
    return lambda prompt, response: later(response) if response.startswith("a") else Verdict(0.0, "ok", response)

def slow_by_itself(*, worst_case_s: float):
    def verify(prompt, response):
        return Verdict(1.0)
    verify.about = {"sandbox": "none", "worst_case_s": worst_case_s}
    return verify

def daemon(*, marks: str):
    def verify(prompt, response):
        if response == "daemon":  # forks twice and opens a session of its own: no longer in the group of the worker
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    with open(os.path.join(marks, "daemon"), "w") as f:
                        f.write(str(os.getpid()))
                    time.sleep(1000)
                os._exit(0)
            while not os.path.exists(os.path.join(marks, "daemon")):
                time.sleep(0.01)
            time.sleep(1000)
        return Verdict(1.0)
    return verify

def hungry():
    table = bytearray(1200 << 20)  # what the verifier itself needs is not counted
    def verify(prompt, response):
        return Verdict(1.0, "ok", str(len(bytearray(int(response) << 20)) + len(table) * 0))
    return verify

def unbuildable():
    raise ValueError("the unit table is missing")

def exits():
    os._exit(9)

def once(*, marks: str):
    if os.path.exists(os.path.join(marks, "built")):
        raise ValueError("the table has gone")
    open(os.path.join(marks, "built"), "w").close()
    def verify(prompt, response):
        os._exit(1)
    return verify
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verifiers")
    (folder / "v.py").write_text(VERIFIERS)
    return folder


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 5.0) -> list[int]:
    end = time.monotonic() + seconds
    while (left := [p for p in pids if alive(p)]) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def test_two_thousand_items_in_order_with_little_overhead(base: Path) -> None:
    items = [(Prompt(str(i), (), str(i), {"note": "x" * 200}), f"{i if i % 3 else -1}") for i in range(2000)]
    with Scorer("./v.py:equal", {"bonus": 0.25}, base) as scorer:
        scorer.score(items[:100])
        started = time.monotonic()
        verdicts = scorer.score(items)
        per_item_ms = 1000 * (time.monotonic() - started) / len(items)
        assert scorer.score([]) == []
        stats = scorer.stats()
    assert [v.answer for v in verdicts] == [response for _, response in items]
    assert [v.score for v in verdicts] == [1.0 if i % 3 else 0.25 for i in range(2000)]
    assert per_item_ms < 0.3
    assert (stats["ok"], stats["error"], stats["timeout"], stats["respawns"]) == (2100, 0, 0, 0)
    assert 0 < stats["run_s"] < 1 and stats["queue_s"] > 0


def test_every_wicked_item_gets_its_status_and_its_neighbours_are_untouched(base: Path, tmp_path: Path) -> None:
    expected = {
        "python loop": ("timeout", "no verdict within 0.7 s"),
        "C loop": ("timeout", "no verdict within 0.7 s"),
        "forks and hangs": ("timeout", "no verdict within 0.7 s"),
        "leaves a child and dies": ("error", "exit code 4"),
        "child returns": ("ok", ""),
        "exits": ("error", "two workers died on this item, the second with exit code 3"),
        "dies once": ("ok", ""),
        "sys.exit": ("error", "SystemExit: 1"),
        "keyboard": ("error", "KeyboardInterrupt"),
        "recursion": ("error", "RecursionError"),
        "raises": ("error", "ValueError: no such unit"),
        "unprintable": ("error", "Odd: (its text fails with RuntimeError)"),
        "memory": ("error", "MemoryError"),
        "none": ("error", "returned NoneType; it must return a Verdict"),
        "nan": ("error", "Verdict.score is nan"),
        "object": ("ok", "odd"),
        "prints": ("ok", ""),
    }
    responses = [r for name in expected for r in (name, "7")]
    with Scorer("./v.py:wicked", {"marks": str(tmp_path)}, base, timeout_s=0.7, memory_mb=1024, max_failure_rate=1.0) as scorer:
        verdicts = dict(zip(enumerate(responses), scorer.score([(P, r) for r in responses]), strict=True))
        assert all(v == Verdict(1.0) for (_, r), v in verdicts.items() if r == "7")
        for (_, r), v in verdicts.items():
            if r != "7":
                assert (v.status, expected[r][1] in v.detail) == (expected[r][0], True), (r, v)
                assert (v.score is None) == (v.status != "ok")
        # each hang costs a worker, "exits" and "leaves a child" two, "dies once" one
        assert scorer.stats()["respawns"] == 8
        assert scorer.score([(P, "7")]) == [Verdict(1.0)]
    assert len((tmp_path / "exits").read_text().split()) == 2
    grandchildren = [int(p) for p in (tmp_path / "grandchild").read_text().split()]
    assert len(grandchildren) == 3 and not wait_until_gone(grandchildren)


def test_deadline_counts_from_the_start_of_the_item_not_of_its_chunk(base: Path) -> None:
    with Scorer("./v.py:slow", {}, base, workers=1, timeout_s=0.6) as scorer:
        verdicts = scorer.score([(P, "0.25")] * 6)  # a chunk takes longer than timeout_s, no item does
        assert [v.score for v in verdicts] == [1.0] * 6
        started = time.monotonic()
        verdicts = scorer.score([(P, "0.01"), (P, "60"), (P, "0.01")])
        assert [v.status for v in verdicts] == ["ok", "timeout", "ok"]
        assert 0.6 < time.monotonic() - started < 3


def test_a_worker_killed_from_outside_costs_one_retry(base: Path) -> None:
    with Scorer("./v.py:slow", {}, base, workers=1, timeout_s=5) as scorer:
        victim = int(scorer.score([(P, "0")])[0].answer or 0)
        threading.Timer(0.2, os.kill, (victim, signal.SIGKILL)).start()
        (busy,) = scorer.score([(P, "0.5")])
        assert busy.status == "ok" and int(busy.answer or 0) != victim
        os.kill(int(busy.answer or 0), signal.SIGKILL)  # an idle one
        time.sleep(0.1)
        assert scorer.score([(P, "0")])[0].status == "ok"
        assert scorer.stats()["respawns"] == 2 and scorer.stats()["error"] == 0


def test_a_stopped_worker_is_not_waited_for(base: Path) -> None:
    with Scorer("./v.py:slow", {}, base, workers=1, timeout_s=0.5) as scorer:
        victim = int(scorer.score([(P, "0")])[0].answer or 0)
        threading.Timer(0.1, os.kill, (victim, signal.SIGSTOP)).start()
        assert scorer.score([(P, "0.3")])[0].status == "timeout"


def test_calls_from_many_threads_do_not_mix(base: Path) -> None:
    wrong: list[int] = []

    def call(n: int) -> None:
        for _ in range(5):
            verdicts = scorer.score([(Prompt(str(i), (), str(i)), f"{n}-{i}") for i in range(40)])
            if [v.answer for v in verdicts] != [f"{n}-{i}" for i in range(40)]:
                wrong.append(n)

    with Scorer("./v.py:equal", {}, base) as scorer:
        threads = [threading.Thread(target=call, args=(n,)) for n in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(30)
        assert not wrong and scorer.stats()["ok"] == 8 * 5 * 40


def test_coroutine_verifiers_are_awaited_and_killed_like_others(base: Path) -> None:
    with Scorer("./v.py:late", {}, base, workers=1, timeout_s=0.5) as scorer:
        verdicts = scorer.score([(P, r) for r in ("7", "exit", "6", "never", "7")])
    assert [(v.score, v.status) for v in verdicts] == [(1.0, "ok"), (None, "error"), (0.0, "ok"), (None, "timeout"), (1.0, "ok")]


def test_coroutine_verifiers_run_together_up_to_the_cap(base: Path, tmp_path: Path) -> None:
    with Scorer("./v.py:judge", {"marks": str(tmp_path)}, base, workers=1, concurrency=8) as scorer:
        started = time.monotonic()
        verdicts = scorer.score([(P, "0.2")] * 40)
        took = time.monotonic() - started
        most = max(int(v.detail) for v in verdicts)
        assert most == 8 and [v.score for v in verdicts] == [1.0] * 40
        assert 5 * 0.2 <= took < 3  # one after the other it would be 8 s
        order = [f"{0.2 - 0.01 * i:.2f}" for i in range(16)]  # the last ones end first
        assert [v.status for v in scorer.score([(P, r) for r in order])] == ["ok"] * 16
        assert scorer.stats()["judge/calls"] == 56 and scorer.stats()["judge/tokens"] == 560


def test_a_late_call_is_cancelled_without_its_neighbours(base: Path, tmp_path: Path) -> None:
    with Scorer("./v.py:judge", {"marks": str(tmp_path)}, base, workers=1, timeout_s=0.6, max_failure_rate=1.0) as scorer:
        first = scorer.score([(P, "0")])[0].answer
        verdicts = scorer.score([(P, r) for r in ("0.3", "60", "0.3", "own timeout", "gives up", "0.3")])
        assert [v.status for v in verdicts] == ["ok", "timeout", "ok", "error", "error", "ok"]
        assert "was cancelled" in verdicts[1].detail and verdicts[3].detail == "TimeoutError: the endpoint is slow"
        assert verdicts[5].answer == first and scorer.stats()["respawns"] == 0


def test_a_call_that_blocks_the_event_loop_is_killed_and_what_dies_goes_alone(base: Path, tmp_path: Path) -> None:
    with Scorer("./v.py:judge", {"marks": str(tmp_path)}, base, workers=1, timeout_s=0.5, max_failure_rate=1.0) as scorer:
        assert scorer.score([(P, "0")])[0].status == "ok"
        assert scorer.score([(P, "blocks")])[0].status == "timeout" and scorer.stats()["respawns"] == 1
        assert scorer.score([(P, "0")])[0].status == "ok"
        verdicts = scorer.score([(P, r) for r in ("0.2", "0.2", "dies", "0.2", "0.2")])
        assert [v.status for v in verdicts] == ["ok", "ok", "error", "ok", "ok"]  # the neighbours died with it once, not twice
        assert "two workers died" in verdicts[2].detail and (tmp_path / "dies").read_text() == "xx"


def test_verdicts_and_awaitables_may_mix(base: Path) -> None:
    responses = ["p0", "a1", "p2", "a3", *(f"{'a' if i % 3 else 'p'}{i}" for i in range(100))]
    with Scorer("./v.py:mixed", {}, base) as scorer:
        for _ in range(2):
            verdicts = scorer.score([(P, r) for r in responses])
            assert [v.answer for v in verdicts] == responses and [v.score for v in verdicts] == [float(r[0] == "a") for r in responses]


def test_what_a_verifier_tells_of_itself(base: Path) -> None:
    with Scorer("./v.py:slow_by_itself", {"worst_case_s": 3.0}, base, timeout_s=5) as scorer:
        assert scorer.about == {"sandbox": "none", "worst_case_s": 3.0}
    with pytest.raises(InputError, match=r"may take 5 s for one response by its own limits, and scoring.timeout_s is 5; raise"):
        Scorer("./v.py:slow_by_itself", {"worst_case_s": 5.0}, base, timeout_s=5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a worker adopt its orphans")
def test_a_daemon_that_left_the_group_dies_with_its_worker(base: Path, tmp_path: Path) -> None:
    with Scorer("./v.py:daemon", {"marks": str(tmp_path)}, base, workers=1, timeout_s=0.7) as scorer:
        assert scorer.score([(P, "daemon")])[0].status == "timeout"
        assert not wait_until_gone([int((tmp_path / "daemon").read_text())])
        assert scorer.score([(P, "7")]) == [Verdict(1.0)]


@pytest.mark.skipif(sys.platform != "linux", reason="no such limit elsewhere")
def test_the_memory_limit_counts_from_the_built_verifier(base: Path) -> None:
    with Scorer("./v.py:hungry", {}, base, workers=1, memory_mb=512, max_failure_rate=1.0) as scorer:
        verdicts = scorer.score([(P, r) for r in ("300", "700", "300")])
    assert [(v.status, v.detail.split(":")[0]) for v in verdicts] == [("ok", ""), ("error", "MemoryError"), ("ok", "")]


def test_rows_that_cannot_travel_are_errors_of_their_own(base: Path) -> None:
    bad = Prompt("bad", (), "7", {"f": lambda: 0})
    with Scorer("./v.py:equal", {}, base) as scorer:
        verdicts = scorer.score([(P, "7"), (bad, "7"), (P, "\ud83d"), (P, "7" * 3_000_000), (P, "7")])
    assert [v.score for v in verdicts] == [1.0, None, 0.0, 0.0, 1.0]
    assert "cannot be sent to a worker" in verdicts[1].detail and verdicts[2].answer == "\ud83d"


def test_too_many_failures_stop_with_three_examples(base: Path, tmp_path: Path) -> None:
    responses = ["7"] * 21 + ["raises"] * 3 + ["none"] * 6
    with Scorer("./v.py:wicked", {"marks": str(tmp_path)}, base, max_failure_rate=0.25) as scorer:
        with pytest.raises(FailureRateError) as caught:
            scorer.score([(Prompt(f"row-{i}", (), "7"), r) for i, r in enumerate(responses)])
        assert "9 of 30" in str(caught.value) and "max_failure_rate = 0.25" in str(caught.value)
        lines = str(caught.value).splitlines()[1:]
        assert len(lines) == 3
        assert "'row-24'" in lines[0] and "NoneType" in lines[0]  # the most frequent kind first, then the other kind
        assert "'row-21'" in lines[1] and "no such unit" in lines[1]
        assert [v.status for v in scorer.score([(P, "raises")] * 19)] == ["error"] * 19  # too few to judge a rate by
        assert len(scorer.score([(P, "7")] * 75 + [(P, "none")] * 25)) == 100  # at the limit, not above it


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("./v.py:unbuildable", "the unit table is missing"),
        ("./v.py:exits", "exit code 9"),
        ("./v.py:equall", "equal"),
        ("matth_answer", "math_answer"),
    ],
)
def test_an_unbuildable_verifier_is_refused_at_construction(base: Path, ref: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scorer(ref, {}, base)


def test_bad_settings_are_refused(base: Path) -> None:
    with pytest.raises(InputError, match="bonus"):
        Scorer("./v.py:equal", {"bonus": "much"}, base)
    for wrong in ({"workers": 0}, {"timeout_s": 0.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Scorer("./v.py:equal", {}, base, **wrong)  # type: ignore[arg-type]


def test_a_verifier_that_can_no_longer_be_built_gives_errors_not_a_hang(base: Path, tmp_path: Path) -> None:
    with Scorer("./v.py:once", {"marks": str(tmp_path)}, base, workers=1) as scorer:
        verdicts = scorer.score([(P, "7")] * 3)
    assert [v.status for v in verdicts] == ["error"] * 3
    assert "the table has gone" in verdicts[2].detail


def test_close_leaves_no_process_and_ends_waiting_calls(base: Path) -> None:
    scorer = Scorer("./v.py:slow", {}, base, timeout_s=60)
    pids = [int(v.answer or 0) for v in scorer.score([(P, "0.1")] * 2)]
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            scorer.score([(P, "50")] * 3)
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    scorer.close()
    scorer.close()
    thread.join(5)
    assert not thread.is_alive() and "3 of 3 items unjudged" in str(caught[0])
    assert not [p for p in pids if Path(f"/proc/{p}").exists()]  # reaped too
    with pytest.raises(RuntimeError, match="closed"):
        scorer.score([(P, "7")])


def test_workers_load_no_torch_and_do_not_run_the_main_script_again(base: Path, tmp_path: Path) -> None:
    script = tmp_path / "main.py"  # without an `if __name__ == "__main__"` guard
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(REPO)!r})
        from pathlib import Path
        from llmrl.records import Prompt
        from llmrl.scoring import Scorer
        assert not {{"torch", "transformers"}} & set(sys.modules)
        print("started")
        with Scorer("./v.py:pid", {{}}, Path({str(base)!r})) as scorer:
            print("modules", scorer.score([(Prompt("p", ()), "7")])[0].detail)
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["started", "modules"], done.stderr


def test_no_orphan_when_the_parent_is_killed_in_the_middle(base: Path, tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(REPO)!r})
        from pathlib import Path
        from llmrl.records import Prompt
        from llmrl.scoring import Scorer
        scorer = Scorer("./v.py:wicked", {{"marks": {str(tmp_path)!r}}}, Path({str(base)!r}), timeout_s=500)
        for worker in scorer._workers:
            print(worker.process.pid)
        print(scorer._watchdog.pid, flush=True)
        scorer.score([(Prompt("p", ()), "forks and hangs"), (Prompt("p", ()), "C loop")])
    """)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    mark = tmp_path / "grandchild"
    end = time.monotonic() + 20
    while not (mark.exists() and mark.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)  # the C loop is under way too
    parent.kill()
    pids = [int(p) for p in parent.communicate()[0].split()] + [int(mark.read_text())]
    assert len(pids) >= 3 and not wait_until_gone(pids)

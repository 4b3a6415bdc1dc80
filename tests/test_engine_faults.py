"""A server that misbehaves: the right completion from another one or after a retry, or one clear error within the deadline; never a wrong one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrl.hf_engine import HFEngine
from llmrl.learner import Learner, RunFailed
from llmrl.memory import Memory
from llmrl.models import Policy, load_policy
from llmrl.recipe import Model
from llmrl.records import Completion, InputError, Prompt, Request, Sampling, Verdict
from llmrl.rollout import RolloutIO, sample_groups
from llmrl.vllm_client import _seed
from llmrl.vllm_engine import VLLMEngine, vllm
from tests.test_engine_contract import ONE, moved, requests, save_sharp
from tests.vllm_server import CONTENT, Scripted, free_port

torch.set_num_threads(1)
Weights = Callable[[], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharp(tmp_path_factory.mktemp("sharp"))


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[list[Scripted]]:
    servers = [Scripted(folder).start() for _ in range(2)]
    yield servers
    for s in servers:
        s.kill()


@pytest.fixture
def two(pair: list[Scripted]) -> list[Scripted]:
    """Two servers in good order, holding their first weights."""
    for s in pair:
        if not s.process.is_alive():
            s.start()
        s.wait().control(clear=True, latency_s=0, restarted=True)
    return pair


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Policy, dict[str, torch.Tensor]]:
    policy = load_policy(Model(path=str(folder)))
    return policy, {name: x.clone() for name, x in policy.model.state_dict().items()}


@pytest.fixture
def policy(loaded: tuple[Policy, dict[str, torch.Tensor]]) -> Policy:
    """With its first weights."""
    loaded[0].model.load_state_dict(loaded[1])
    return loaded[0]


@contextlib.contextmanager
def engine_over(policy: Policy, *servers: Scripted, request_s: float = 0.6, deadline_s: float = 20.0, **how: Any) -> Iterator[VLLMEngine]:
    engine = vllm(servers=[s.url for s in servers], request_s=request_s, deadline_s=deadline_s, **how)(policy)
    try:
        yield engine
    finally:
        engine.close()


def weights_of(policy: Policy) -> Weights:
    return lambda: iter([(name, p.detach()) for name, p in policy.model.named_parameters()])


def assert_right(policy: Policy, asked: list[Request], done: list[Completion]) -> None:
    """They are what this policy samples under these seeds."""
    want = HFEngine(policy).generate([Request(r.context_ids, (_seed(r),), r.sampling) for r in asked])
    assert [c.token_ids for c in done] == [c.token_ids for c in want]
    assert all(c.logprobs == pytest.approx(w.logprobs, abs=1e-5) and (c.finish, c.text) == (w.finish, w.text) for c, w in zip(done, want, strict=True))


def until(what: Callable[[], bool], limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def completions(server: Scripted) -> int:
    return server.control()["calls"].get("/v1/completions", 0)


# ---------------------------------------------------------------- load


def test_requests_go_to_the_least_loaded_server(two: list[Scripted], policy: Policy) -> None:
    before = [completions(s) for s in two]
    two[0].control(latency_s=0.03)
    two[1].control(latency_s=0.01)
    with engine_over(policy, *two, request_s=30, deadline_s=30, in_flight=8) as engine:
        asked = requests(64, Sampling(8))
        assert_right(policy, asked, engine.generate(asked))
    share = [completions(s) - b for s, b in zip(two, before, strict=True)]
    assert sum(share) == 64 and share[0] >= 12 and share[1] >= 1.5 * share[0]  # the quick one takes more
    assert all(4 <= s.control()["most"] <= 10 for s in two)  # 8 at a time, and looks at what it holds


# ---------------------------------------------------------------- faults that pass, faults that stay

TRANSPORT = ("500", "503", "hang", "reset", "truncated", "nonjson")


@pytest.mark.parametrize("mode", [*TRANSPORT, *CONTENT])
def test_a_fault_that_passes_costs_nothing_but_time(two: list[Scripted], policy: Policy, mode: str) -> None:
    asked = requests(24, Sampling(8))
    two[0].control(mode=mode, times=2, after=1)
    with engine_over(policy, *two) as engine:
        assert_right(policy, asked, engine.generate(asked))
        until(lambda: not engine.servers[0].down)
        before = completions(two[0])
        assert_right(policy, asked, engine.generate(asked))
        assert completions(two[0]) > before and engine.servers[0].sent == 0  # it held the right weights all along


def test_the_only_server_is_waited_for(two: list[Scripted], policy: Policy) -> None:
    asked = requests(6, Sampling(8))
    for mode in ("503", "reset", "nan"):
        two[0].control(mode=mode, times=2)
        with engine_over(policy, two[0]) as engine:
            assert_right(policy, asked, engine.generate(asked))


SAID = {
    "500": "HTTP 500: .*scripted 500", "hang": "no answer within 0.3 s", "reset": "Error", "truncated": "Error", "nonjson": "no JSON: .*proxy",
    "more_ids": r"answered \d+ token ids and \d+ log-probs", "too_long": r"answered \d+ token ids .* at most 8", "empty": "answered 0 token ids",
    "nan": r"cannot be: \[nan\]", "other_prompt": "another prompt", "banned": r"cannot be: \[0\]", "bare": "is no completion",
}  # fmt: skip


@pytest.mark.parametrize("mode", SAID)
def test_a_fault_that_stays_stops_the_run_in_time_and_by_name(two: list[Scripted], policy: Policy, mode: str) -> None:
    two[0].control(mode=mode)
    with engine_over(policy, two[0], request_s=0.3, deadline_s=1.5) as engine:
        began = time.monotonic()
        with pytest.raises(RunFailed, match=rf"(?s){two[0].url}.*{SAID[mode]}"):
            engine.generate(requests(6, Sampling(8)))
        assert time.monotonic() - began < 10 and all(s.busy == 0 for s in engine.servers)


def test_a_request_that_is_refused_is_not_asked_again(two: list[Scripted], policy: Policy) -> None:
    before = completions(two[0])
    two[0].control(mode="400")
    with engine_over(policy, *two) as engine:
        with pytest.raises(RunFailed, match=rf"{two[0].url}/v1/completions: HTTP 400: .*scripted 400"):
            engine.generate(requests(1, Sampling(8)))
        assert completions(two[0]) == before + 1 and not engine.servers[0].down


def test_a_server_with_a_length_limit_of_its_own_is_refused(two: list[Scripted], policy: Policy) -> None:
    """vLLM takes max_new_tokens of the model's generation_config.json for a limit, and does not say so."""
    two[0].control(mode="short")
    with engine_over(policy, two[0]) as engine, pytest.raises(RunFailed, match=r"cut a completion after 1 of 8 tokens.*--generation-config vllm"):
        engine.generate(requests(1, Sampling(8)))


def test_two_hundred_requests_under_random_faults(two: list[Scripted], policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lost, nothing twice, nothing wrong."""
    monkeypatch.setattr("llmrl.vllm_client.WRONG", 50)  # one request may well meet three wrong answers here
    monkeypatch.setattr("llmrl.vllm_client.DOWN", 50)
    rng = random.Random(5)
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            s = rng.choice(two)
            s.control(clear=True)
            s.control(mode=rng.choice([*TRANSPORT, *CONTENT]), times=rng.randint(1, 3), after=rng.randint(0, 3), path="/v1/completions")
            if rng.random() < 0.3:
                s.control(mode=rng.choice(TRANSPORT), times=1, path="/weight_info")
            stop.wait(0.05)

    for server in two:
        server.control(latency_s=0.01)
    asked = requests(200, Sampling(10))
    thread = threading.Thread(target=flip)
    with engine_over(policy, *two, request_s=0.5, deadline_s=30, in_flight=6) as engine:
        thread.start()
        try:
            done = engine.generate(asked)
        finally:
            stop.set()
            thread.join()
        assert_right(policy, asked, done)
        assert all(s.busy == 0 for s in engine.servers)


# ---------------------------------------------------------------- servers that die, freeze and return


def test_a_dead_server_gets_the_weights_of_now_before_it_is_used(two: list[Scripted], policy: Policy) -> None:
    asked = requests(24, Sampling(8))
    with engine_over(policy, *two) as engine:
        moved(policy)
        engine.load_weights(3, weights_of(policy))
        engine.fingerprint([1, 5, 9, 12, 7])
        two[0].control(mode="die", after=3)
        done = engine.generate(asked)
        assert_right(policy, asked, done)
        assert {c.policy_version for c in done} == {3} and engine.servers[0].down
        two[0].start().wait()
        assert two[0].control()["label"] == "default"
        until(lambda: not engine.servers[0].down)
        two[1].kill()
        assert_right(policy, asked, engine.generate(asked))  # all of them from the one that had died
        assert completions(two[0]) >= 24


def test_a_restart_that_nobody_saw_is_found_out(two: list[Scripted], policy: Policy) -> None:
    """Between two calls: the connection is gone, the port answers, and the weights are the first ones."""
    asked = requests(8, Sampling(8))
    with engine_over(policy, two[0]) as engine:
        moved(policy)
        engine.load_weights(1, weights_of(policy))
        two[0].kill()
        two[0].start().wait()
        assert_right(policy, asked, engine.generate(asked))
        assert engine.servers[0].sent == 1
        two[0].kill()
        two[0].start().wait()
        assert engine.fingerprint([1, 5, 9])[two[0].url] == pytest.approx(Learner(policy, ONE).probe([1, 5, 9]), abs=1e-5)  # type: ignore[arg-type]


def test_weights_that_arrive_damaged_on_a_returning_server_are_noticed(two: list[Scripted], policy: Policy) -> None:
    with engine_over(policy, *two, deadline_s=6) as engine:
        moved(policy)
        engine.load_weights(1, weights_of(policy))
        engine.fingerprint([1, 5, 9, 12, 7])
        two[0].kill()
        two[0].start().wait().control(mode="drop", name="lm_head.weight", path="/update_weights")
        asked = requests(16, Sampling(8))
        assert_right(policy, asked, engine.generate(asked))
        until(lambda: engine.servers[0].lost)
        assert "log-probs of a fixed text are off by" in engine.servers[0].down
        two[0].control(clear=True)
        engine.load_weights(2, weights_of(policy))  # the next version is another chance
        until(lambda: not engine.servers[0].down)


def test_a_frozen_server_is_left_out_and_used_again(two: list[Scripted], policy: Policy) -> None:
    asked = requests(16, Sampling(8))
    with engine_over(policy, *two) as engine:
        two[0].freeze()
        try:
            began = time.monotonic()
            assert_right(policy, asked, engine.generate(asked))
            assert 0.5 < time.monotonic() - began < 8 and engine.servers[0].down
            began = time.monotonic()
            assert_right(policy, asked, engine.generate(asked))
            assert time.monotonic() - began < 0.5  # not asked at all
        finally:
            two[0].freeze(False)
        until(lambda: not engine.servers[0].down)
        before = completions(two[0])
        assert_right(policy, asked, engine.generate(asked))
        assert completions(two[0]) > before


def test_requests_wait_for_the_only_server_to_return(two: list[Scripted], policy: Policy) -> None:
    asked = requests(8, Sampling(8))
    with engine_over(policy, two[0]) as engine:
        moved(policy)
        engine.load_weights(1, weights_of(policy))
        two[0].control(mode="die", after=2)
        timer = threading.Timer(1.0, lambda: (two[0].process.join(), two[0].start()))
        timer.start()
        assert_right(policy, asked, engine.generate(asked))
        timer.join()


def test_a_server_that_never_returns_stops_the_run(two: list[Scripted], policy: Policy) -> None:
    with engine_over(policy, two[0], deadline_s=1.0) as engine:
        two[0].kill()
        began = time.monotonic()
        with pytest.raises(RunFailed, match=rf"no completion within deadline_s = 1 s; .*{two[0].url}"):
            engine.generate(requests(4, Sampling(8)))
        assert time.monotonic() - began < 8


def test_a_long_queue_is_no_failure(two: list[Scripted], policy: Policy) -> None:
    """The deadline counts from the last completion, not from when a request began to wait for its turn."""
    two[0].control(latency_s=0.02)
    with engine_over(policy, two[0], request_s=0.8, deadline_s=0.8, in_flight=2) as engine:
        asked = requests(24, Sampling(8))
        began = time.monotonic()
        assert_right(policy, asked, engine.generate(asked))
        assert time.monotonic() - began > 1.0


# ---------------------------------------------------------------- threads, ends, start


def test_many_loops_and_threads_ask_at_once(two: list[Scripted], policy: Policy) -> None:
    found: dict[int, list[Completion]] = {}

    def ask_some(engine: VLLMEngine, k: int) -> None:
        async def parts() -> list[Completion]:
            lots = await asyncio.gather(*(engine.complete(requests(4, Sampling(8), f"t{k}.{j}")) for j in range(3)))
            return [c for lot in lots for c in lot]

        found[k] = asyncio.run(parts())

    with engine_over(policy, *two) as engine:
        threads = [threading.Thread(target=ask_some, args=(engine, k)) for k in range(5)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    for k in range(5):
        assert_right(policy, [r for j in range(3) for r in requests(4, Sampling(8), f"t{k}.{j}")], found[k])


def test_an_update_waits_for_completions_under_way(two: list[Scripted], policy: Policy, folder: Path) -> None:
    old, asked = load_policy(Model(path=str(folder))), requests(12, Sampling(8))
    two[0].control(latency_s=0.05)
    with engine_over(policy, *two, request_s=5) as engine:
        found: list[list[Completion]] = []
        thread = threading.Thread(target=lambda: found.append(engine.generate(asked)))
        thread.start()
        time.sleep(0.15)
        moved(policy)
        engine.load_weights(1, weights_of(policy))
        thread.join()
        assert_right(old, asked, found[0])
        assert {c.policy_version for c in found[0]} == {0}
        assert_right(policy, asked, engine.generate(asked))


def test_closing_leaves_nothing_behind(two: list[Scripted], policy: Policy, tmp_path: Path) -> None:
    def sockets() -> int:
        return sum(os.readlink(f"/proc/self/fd/{fd}").startswith("socket:") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}"))

    before = sockets() if Path("/proc/self/fd").is_dir() else 0
    two[0].control(mode="hang")
    with engine_over(policy, *two, request_s=30, deadline_s=60, folder=str(tmp_path / "w")) as engine:
        engine.load_weights(1, weights_of(policy))
        assert len(list((tmp_path / "w").rglob("*.safetensors"))) == 4
        waiting = asyncio.run_coroutine_threadsafe(engine._complete(requests(4)), engine._loop)
        time.sleep(0.2)
        began = time.monotonic()
        engine.close()
        assert time.monotonic() - began < 3 and waiting.cancelled()
    assert not any(t.name == "llmrl-vllm" for t in threading.enumerate()) and not any((tmp_path / "w").iterdir())
    assert not Path("/proc/self/fd").is_dir() or sockets() <= before


def test_weights_that_a_killed_run_left_are_deleted_and_others_are_not(two: list[Scripted], policy: Policy, tmp_path: Path) -> None:
    with engine_over(policy, two[0], folder=str(tmp_path)) as engine, engine_over(policy, two[1], folder=str(tmp_path)) as other:
        assert engine.files.folder != other.files.folder
        host = engine.files.run.split("-")[0]
        (tmp_path / f"run-{host}-999999999-00000000").mkdir()
        (tmp_path / "run-00000000-999999999-00000000").mkdir()  # another machine's
        engine.load_weights(1, weights_of(policy))
        with engine_over(policy, two[1], folder=str(tmp_path)):
            names = {p.name for p in tmp_path.iterdir()}
        assert names == {engine.files.folder.name, "run-00000000-999999999-00000000"}


def test_a_server_that_is_not_there_or_no_vllm_is_refused_at_start(two: list[Scripted], policy: Policy) -> None:
    with pytest.raises(InputError, match=r"vllm: http://127.0.0.1:\d+/v1/models: Connect.*VLLM_SERVER_DEV_MODE=1"):
        vllm(servers=[f"http://127.0.0.1:{free_port()}"])(policy)
    for mode, path, said in [("nonjson", "/v1/models", "no JSON"), ("400", "/weight_info", "HTTP 400"), ("500", "/init_weight_transfer_engine", "HTTP 500")]:
        two[0].control(mode=mode, path=path, times=1)
        with pytest.raises(InputError, match=f"{said}.*VLLM_SERVER_DEV_MODE=1"):
            vllm(servers=[two[0].url])(policy)
    assert not any(t.name == "llmrl-vllm" for t in threading.enumerate())
    for how in ({"servers": []}, {"servers": ["localhost:8000"]}, {"servers": ["http://a", "http://a/"]}, {"servers": ["http://a"], "request_s": 700.0}):
        with pytest.raises(InputError, match=r"\[engine\] vllm"):
            vllm(**how)  # type: ignore[arg-type]


# ---------------------------------------------------------------- streaming


def test_groups_are_judged_while_others_are_generated(two: list[Scripted], policy: Policy) -> None:
    prompts = [Prompt(f"p{i}", ({"role": "user", "content": f"{i}+{i}="},), "1") for i in range(12)]
    judged: dict[str, float] = {}

    class Judge:
        def score(self, items: Any) -> list[Verdict]:
            judged.update({p.id: time.perf_counter() for p, _ in items})
            return [Verdict(float("1" in text)) for _, text in items]

    for s in two:
        s.control(latency_s=0.01)

    def groups(engine: Any) -> list[Any]:
        io = RolloutIO(engine, Judge(), policy.chat, Memory(), Sampling(12), 4, (0, 1))
        return asyncio.run(sample_groups(prompts, io))

    with engine_over(policy, *two, request_s=5, in_flight=4) as engine:
        answered: list[float] = []
        whole = engine._one

        async def one(request: Request) -> Completion:
            done = await whole(request)
            answered.append(time.perf_counter())
            return done

        engine._one = one  # type: ignore[method-assign]
        streamed = groups(engine)
        assert min(judged.values()) < max(answered) - 0.2 and len(judged) == 12
        engine.streams = False  # type: ignore[misc]
        for a, b in zip(groups(engine), streamed, strict=True):
            assert a.prompt == b.prompt and len(a.samples) == 4
            for x, y in zip(a.samples, b.samples, strict=True):
                assert x.behavior_logp == pytest.approx(y.behavior_logp, abs=1e-5)
                assert replace(x, behavior_logp=None) == replace(y, behavior_logp=None)

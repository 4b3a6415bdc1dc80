# ruff: noqa: F811 - fixtures are imported
"""LoRA on servers, as adapters alone and merged; servers that sleep while the learner learns; both in runs over two sharded ranks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrl.learner import Learner, RunFailed
from llmrl.metrics import MetricLog
from llmrl.models import Policy, load_policy, trainable
from llmrl.recipe import Lora, Model
from llmrl.records import InputError, Sampling
from llmrl.step import publish
from llmrl.vllm_engine import vllm
from llmrl.weights import layers, merged
from tests.test_engine_contract import ONE, moved, requests
from tests.test_engine_faults import assert_right, completions, engine_over, folder, loaded, policy, until, weights_of  # noqa: F401
from tests.test_engine_routes import PROBE, clean, started, three, three_of  # noqa: F401
from tests.test_engine_updates import Runs, session_like, supervise
from tests.test_ranks import assert_close_rows
from tests.vllm_server import Scripted, ask

torch.set_num_threads(1)


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def pair_of_lora(folder: Path) -> Iterator[list[Scripted]]:
    yield from started(folder, 2, lora=True)


@pytest.fixture
def lora_pair(pair_of_lora: list[Scripted]) -> list[Scripted]:
    return clean(pair_of_lora)


@pytest.fixture
def adapted(folder: Path) -> Policy:
    return load_policy(Model(path=str(folder), lora=Lora(rank=4, alpha=8)))


def grown(policy: Policy, seed: int = 1) -> None:
    """Adapters that change something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, p in trainable(policy.model):
            p.add_(torch.randn_like(p) * 0.03)


def adapters_of(policy: Policy) -> Any:
    return lambda: iter([(name, p.detach()) for name, p in trainable(policy.model)])


def test_only_the_adapter_travels_and_a_restarted_server_gets_it_again(lora_pair: list[Scripted], adapted: Policy) -> None:
    asked = requests(24, Sampling(8))
    with engine_over(adapted, *lora_pair, request_s=3) as engine:
        assert engine.route.name == "adapter"
        session = session_like(engine, adapted)
        for version in range(1, 4):
            grown(adapted, version)
            session.learner.version = version
            assert publish(session)["logp_gap/fingerprint_nats"] < 1e-5  # type: ignore[operator]
            (file,) = engine.files.paths()
            assert file.stat().st_size < 60_000 and {p.name for p in file.parent.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
        assert_right(adapted, asked, engine.generate(asked))
        told = lora_pair[0].control()
        assert told["adapters"] == [f"llmrl-{engine.files.label}"] and "/update_weights" not in told["calls"]  # the one before is unloaded
        lora_pair[0].kill()
        lora_pair[0].start().wait()
        assert_right(adapted, asked, engine.generate(asked))
        until(lambda: not engine.servers[0].down)
        lora_pair[1].kill()
        assert_right(adapted, asked, engine.generate(asked))
        with engine_over(adapted, lora_pair[0], request_s=3) as next_run:
            assert next_run.route.name == "adapter" and next_run.servers[0].first == engine.files.label
        assert engine.score([(PROBE[:2], PROBE[2:])])[0] == pytest.approx(Learner(adapted, ONE).probe(PROBE)[1:], abs=1e-5)  # type: ignore[arg-type]


def test_a_server_without_lora_gets_the_merged_weights(three: list[Scripted], lora_pair: list[Scripted], adapted: Policy) -> None:
    """By broadcast or as files; and an adapter server too, if that is asked for."""
    cases: list[tuple[list[Scripted], dict[str, Any], str]] = [
        (three, {}, "broadcast"), (three, {"transfer": "file"}, "file"), (lora_pair, {"transfer": "file"}, "file"),
    ]  # fmt: skip
    for servers, how, name in cases:
        with engine_over(adapted, *servers, request_s=3, **how) as engine:
            assert engine.route.name == name
            session = session_like(engine, adapted)
            grown(adapted)
            assert publish(session)["logp_gap/fingerprint_nats"] < 1e-5  # type: ignore[operator]
            assert_right(adapted, requests(8), engine.generate(requests(8)))
    with engine_over(adapted, *lora_pair) as engine:  # their base model is another now
        assert engine.route.name == "file"
    with pytest.raises(InputError, match=f"{lora_pair[0].url} got other base weights from an earlier run; restart it"):
        vllm(servers=[s.url for s in lora_pair], transfer="adapter")(adapted)


def test_merged_weights_are_those_of_peft(adapted: Policy) -> None:
    grown(adapted)
    mine = dict(merged(adapted, adapters_of(adapted)(), torch.float32))
    first = list(layers(iter(mine.items())))
    assert [len(g) for g in first] == [1, 9, 9, 2]
    for _, module in adapted.model.named_modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()  # type: ignore[operator]
    theirs = {name.replace(".base_layer.", "."): p for name, p in adapted.model.named_parameters() if ".lora_" not in name}
    assert mine.keys() == theirs.keys() and all(float((mine[k] - theirs[k]).abs().max()) < 1e-6 for k in mine)


def test_an_adapter_that_a_server_refuses_stops_the_run(lora_pair: list[Scripted], adapted: Policy) -> None:
    with engine_over(adapted, *lora_pair, request_s=3) as engine:
        for s in lora_pair:
            s.control(mode="400", path="/v1/load_lora_adapter")
        with pytest.raises(RunFailed, match=r"load_lora_adapter: HTTP 400: .*was told to load .*engine.folder"):
            engine.load_weights(1, adapters_of(adapted))


# ---------------------------------------------------------------- sleep


@pytest.mark.parametrize("kind", ["file", "merged", "adapter"])
def test_servers_sleep_while_the_learner_learns(three: list[Scripted], lora_pair: list[Scripted], policy: Policy, adapted: Policy, kind: str) -> None:
    model, servers = (policy, three[:2]) if kind == "file" else (adapted, lora_pair if kind == "adapter" else three[:2])
    asked = requests(12, Sampling(8))
    with engine_over(model, *servers, request_s=3, colocated=True) as engine:
        assert engine.route.name == ("adapter" if kind == "adapter" else "file")  # NCCL joins no two processes of one GPU
        session = session_like(engine, model)
        for version in range(1, 3):
            moved(model, version) if kind == "file" else grown(model, version)
            session.learner.version = version
            publish(session)
            assert_right(model, asked, engine.generate(asked))
            engine.sleep()
            assert all(s.control()["asleep"] == ["kv_cache", "weights"] for s in servers)
            before = completions(servers[0])
            with pytest.raises(RunFailed, match="the servers sleep until they get the next weights"):
                engine.generate(asked[:1])
            with pytest.raises(RunFailed, match="the servers sleep"):
                engine.score([(PROBE[:2], PROBE[2:])])
            assert completions(servers[0]) == before
        publish(session)
        assert all(s.control()["asleep"] == [] for s in servers)
    order = servers[0].control()["history"]
    order = order[order.index("/sleep?level=1&mode=wait") :]
    order = order[: order.index("/resume") + 1]
    change = (
        ["/start_weight_update", "/update_weights", "/reset_prefix_cache", "/finish_weight_update"] if kind != "adapter"
        else ["/v1/unload_lora_adapter", "/v1/load_lora_adapter", "/reset_prefix_cache", "/update_weight_version"]
    )  # fmt: skip
    assert order == ["/sleep?level=1&mode=wait", "/wake_up?tags=weights", "/pause?mode=abort", *change, "/wake_up?tags=kv_cache", "/resume"]


def test_a_server_that_was_left_asleep_is_woken_at_start_and_one_that_dies_asleep_is_left_out(three: list[Scripted], policy: Policy) -> None:
    ask(three[0].url, "/sleep?level=2&mode=wait")
    with engine_over(policy, *three[:2], request_s=3, colocated=True, sleep_level=2) as engine:
        assert three[0].control()["asleep"] == [] and three[0].control()["history"][-1] != "/wake_up"
        moved(policy)
        engine.load_weights(1, weights_of(policy))
        engine.sleep()
        assert "/sleep?level=2&mode=wait" in three[0].control()["history"]
        three[0].kill()
        moved(policy, 2)
        engine.load_weights(2, weights_of(policy))
        assert engine.servers[0].down
        assert_right(policy, requests(8), engine.generate(requests(8)))
        three[0].start().wait()
        until(lambda: not engine.servers[0].down)
        engine.sleep()
        assert three[0].control()["asleep"] == ["kv_cache", "weights"]


def test_without_colocated_nothing_sleeps_and_adapters_need_level_1(three: list[Scripted], lora_pair: list[Scripted], policy: Policy, adapted: Policy) -> None:
    with engine_over(policy, three[0]) as engine:
        engine.sleep()
        assert "/sleep?level=1&mode=wait" not in three[0].control()["history"]
        assert len(engine.generate(requests(2, Sampling(4)))) == 2
    with pytest.raises(InputError, match="with adapters nothing brings them back; take 1"):
        vllm(servers=[lora_pair[0].url], colocated=True, sleep_level=2)(adapted)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("route", ["broadcast", "adapter"])
def test_two_sharded_ranks_with_adapters_and_a_server_that_dies_in_an_update(
    three: list[Scripted], lora_pair: list[Scripted], folder: Path, tmp_path: Path, route: str
) -> None:
    """Every rank gathers the frozen weights too (merged), also when they are sent once more; the run is that of one process.

    The adapter's fault lets by one call a rank that looks whether the server has LoRA, and the first version.
    """
    servers = three[:2] if route == "broadcast" else lora_pair
    runs, keys = Runs(tmp_path, folder, servers), ("model.lora={rank=4}", "steps=3", "eval.every=9", "optim.lr=1e-2")
    runs.clean()
    one = MetricLog.read(runs.train("one", *keys))
    runs.clean()
    servers[1].control(mode="die", path="/update_weights" if route == "broadcast" else "/v1/load_lora_adapter", after=4 + 2 if route == "broadcast" else 3)
    over, died = threading.Event(), []
    thread = threading.Thread(target=supervise, args=(servers, over, died))
    thread.start()
    try:
        code, said = runs.train_on_two_ranks("two", *keys, "learner.strategy=fsdp2", "engine.request_s=5")
    finally:
        over.set()
        thread.join()
    assert code == 0 and len(died) == 1, said[-3000:]
    for x, y in zip(one, MetricLog.read(tmp_path / "two"), strict=True):
        for key in ("grad/norm", "loss/pg_clip"):
            assert_close_rows(x.get(key), y.get(key), f"step {x['step']} {key}")
        if x["step"]:
            assert y["logp_gap/max_nats"] < 1e-5 and y["logp_gap/fingerprint_nats"] < 1e-5
    assert any(row.get("grad/norm") for row in one)

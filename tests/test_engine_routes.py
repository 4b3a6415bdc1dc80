# ruff: noqa: F811 - fixtures are imported
"""Weights that go to servers by broadcast over a group of processes, with its faults; log-probs of texts, and servers that tell wrong ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrl.learner import Learner, RunFailed
from llmrl.models import Policy
from llmrl.records import InputError, Sampling
from llmrl.vllm_broadcast import BROKEN, GroupFailed, layout, packed, unpacked
from llmrl.vllm_engine import vllm
from tests.test_engine_contract import ONE, moved, requests
from tests.test_engine_faults import assert_right, completions, engine_over, folder, loaded, policy, until, weights_of  # noqa: F401
from tests.test_engine_updates import Stream
from tests.vllm_server import Scripted

torch.set_num_threads(1)
PROBE = [1, 5, 9, 12, 7, 14]


def started(folder: Path, n: int, **how: Any) -> Iterator[list[Scripted]]:
    servers = [Scripted(folder, **how).start() for _ in range(n)]
    yield servers
    for s in servers:
        s.kill()


def clean(servers: list[Scripted]) -> list[Scripted]:
    for s in servers:
        if not s.process.is_alive():
            s.start()
        s.wait().control(clear=True, latency_s=0, restarted=True, raw=False)
    return servers


@pytest.fixture(scope="module")
def three_of(folder: Path) -> Iterator[list[Scripted]]:
    yield from started(folder, 3, backend="llmrl_broadcast")


@pytest.fixture
def three(three_of: list[Scripted]) -> list[Scripted]:
    return clean(three_of)


# ---------------------------------------------------------------- broadcast


def test_a_layer_goes_as_one_piece_of_bytes_and_comes_out_as_it_was() -> None:
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(4, 4).t(), "d": torch.tensor(2.5), "e": torch.arange(3)}
    data = packed(tensors, torch.device("cpu"))
    assert data.dtype == torch.uint8 and len(data) == 64 + 16 + 64 + 16 + 32
    back = dict(unpacked(data, **layout(tensors)))
    assert list(back) == list(tensors)
    assert all(torch.equal(back[k], t) and back[k].dtype == t.dtype and back[k].shape == t.shape for k, t in tensors.items())


def test_broadcast_reaches_all_servers_and_the_fingerprint_proves_it(three: list[Scripted], policy: Policy) -> None:
    asked = requests(24, Sampling(8))
    with engine_over(policy, *three, request_s=5) as engine:
        assert engine.route.name == "broadcast"
        for version in range(1, 4):
            moved(policy, version)
            engine.load_weights(version, weights_of(policy))
            mine = Learner(policy, ONE).probe(PROBE)  # type: ignore[arg-type]
            told = engine.fingerprint(PROBE)
            assert len(told) == 3 and all(t == pytest.approx(mine, abs=1e-5) for t in told.values())
        assert_right(policy, asked, engine.generate(asked))
        calls = three[0].control()["calls"]
        assert engine.route._groups == 1 and calls["/update_weights"] == 3 * 4  # type: ignore[attr-defined]
        assert all(s.control()["in_group"] for s in three) and not torch.distributed.is_initialized()


@pytest.mark.parametrize("mode", ["die", "hang", "500", "cannot_load", "freeze"])
def test_a_server_that_fails_in_a_broadcast_is_left_out_and_the_others_get_the_weights(three: list[Scripted], policy: Policy, mode: str) -> None:
    asked, stream = requests(24, Sampling(8)), Stream(policy)
    with engine_over(policy, *three, request_s=1.5, deadline_s=30) as engine:
        engine.load_weights(1, weights_of(policy))
        moved(policy)
        if mode == "freeze":
            threading.Timer(0.2, lambda: three[1].freeze()).start()
            slow = weights_of(policy)

            def weights() -> Iterator[Any]:
                for k, row in enumerate(slow()):
                    if k == 5:
                        time.sleep(0.4)
                    yield row
        else:
            three[1].control(mode=mode, path="/update_weights", after=1, times=1)
            weights = stream  # type: ignore[assignment]
        try:
            began = time.monotonic()
            engine.load_weights(2, weights)
            seconds = time.monotonic() - began
            assert seconds < 12
            assert engine.servers[1].down and not engine.servers[0].down and not engine.servers[2].down
            if mode != "freeze":
                assert stream.read == 2 * len(stream.rows)  # once more, for a group of the others
            assert_right(policy, asked, engine.generate(asked))
            assert engine.route._groups == 2  # type: ignore[attr-defined]
        finally:
            if mode == "freeze":
                three[1].freeze(False)
        if mode == "die":
            three[1].process.join(5)
            three[1].start().wait()
        until(lambda: not engine.servers[1].down)  # by files: engine.keep
        moved(policy, 3)
        engine.load_weights(3, weights_of(policy))
        assert engine.route._groups == 3 and len(engine.fingerprint(PROBE)) == 3  # type: ignore[attr-defined]
        assert_right(policy, asked, engine.generate(asked))


def test_without_a_copy_a_server_comes_back_at_the_next_update(three: list[Scripted], policy: Policy) -> None:
    asked = requests(24, Sampling(8))
    with engine_over(policy, *three, request_s=3, keep=False) as engine:
        moved(policy)
        engine.load_weights(1, weights_of(policy))
        assert not engine.files.paths()
        three[0].kill()
        three[0].start().wait()
        assert_right(policy, asked, engine.generate(asked))
        until(lambda: engine.servers[0].lost)
        assert "no copy of these is kept (engine.keep = false)" in engine.servers[0].down
        moved(policy, 2)
        engine.load_weights(2, weights_of(policy))
        assert not engine.servers[0].down and len(engine.fingerprint(PROBE)) == 3
        before = completions(three[0])
        assert_right(policy, asked, engine.generate(asked))
        assert completions(three[0]) > before


def test_a_group_that_fails_without_a_reason_stops_the_run(three: list[Scripted], policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody to blame twice: no endless repetition."""
    stream = Stream(policy)
    with engine_over(policy, *three, request_s=2) as engine:
        engine.load_weights(1, weights_of(policy))

        def lost(*_: Any, **__: Any) -> None:
            raise GroupFailed(f"{BROKEN}: a cable was pulled")

        with monkeypatch.context() as patch:
            patch.setattr("llmrl.vllm_broadcast.Group.wait", lost)
            with pytest.raises(RunFailed, match=r'failed twice and no server is to blame: .*a cable was pulled.*engine.transfer = "file"'):
                engine.load_weights(2, stream)
        assert stream.read == 2 * len(stream.rows)
        engine.load_weights(3, weights_of(policy))
        assert_right(policy, requests(8), engine.generate(requests(8)))


def test_auto_takes_what_all_servers_have(three: list[Scripted], folder: Path, policy: Policy) -> None:
    other = Scripted(folder).start()
    try:
        with engine_over(policy, three[0], other.wait(), request_s=3) as engine:
            assert engine.route.name == "file"
            moved(policy)
            engine.load_weights(1, weights_of(policy))
            assert_right(policy, requests(8), engine.generate(requests(8)))
        with engine_over(policy, three[0], transfer="file") as engine:
            assert engine.route.name == "file"
        with pytest.raises(InputError, match=rf'transfer = "broadcast", which {other.url} does not have: .*"backend": "llmrl_broadcast"'):
            vllm(servers=[three[0].url, other.url], transfer="broadcast")(policy)
        with pytest.raises(InputError, match=r"needs \[model.lora\]"):
            vllm(servers=[other.url], transfer="adapter")(policy)
        with pytest.raises(InputError, match="of one GPU"):
            vllm(servers=[three[0].url], transfer="broadcast", colocated=True)(policy)
        for how in ({"transfer": "pigeon"}, {"sleep_level": 3}):
            with pytest.raises(InputError, match="expected auto, file, broadcast, adapter, and 1 or 2"):
                vllm(servers=[other.url], **how)  # type: ignore[arg-type]
    finally:
        other.kill()


# ---------------------------------------------------------------- log-probs


def test_a_server_that_tells_its_own_log_probs_is_refused(three: list[Scripted], policy: Policy) -> None:
    before = completions(three[0])
    three[0].control(raw=True)
    with pytest.raises(InputError, match=r"made certain by logit_bias has log-prob -\d.*start it with --logprobs-mode processed_logprobs"):
        vllm(servers=[three[0].url])(policy)
    three[0].control(raw=False)
    with engine_over(policy, three[0]):
        assert completions(three[0]) == before


def test_scores_are_the_learners_log_probs(three: list[Scripted], policy: Policy) -> None:
    with engine_over(policy, *three, request_s=1.5, deadline_s=20) as engine:
        pairs = [(PROBE[:k], PROBE[k : k + 3]) for k in range(1, 6)] * 4 + [(PROBE, [])]
        want = [Learner(policy, ONE).probe([*a, *b])[len(a) - 1 :] for a, b in pairs]  # type: ignore[arg-type]
        three[1].control(mode="500", times=2)
        three[2].control(mode="die", after=2)
        told = engine.score(pairs)
        assert len(told) == len(pairs) and all(t == pytest.approx(w, abs=1e-5) for t, w in zip(told, want, strict=True)) and told[-1] == []
        three[2].process.join(5)
        assert engine.score([]) == []
        with pytest.raises(InputError, match="empty context"):
            engine.score([([], [1, 5])])
        with pytest.raises(InputError, match=r"of 200 \+ 56 tokens to be scored.*max_model_len = 256"):
            engine.score([([5] * 200, [7] * 56)])
        assert len(engine.score([([5] * 200, [7] * 55)])[0]) == 55


def test_a_returning_server_is_held_to_the_limits_of_the_last_fingerprint(three: list[Scripted], policy: Policy) -> None:
    for limits, comes_back in (((1e-3, 1e-3), False), ((50.0, 50.0), True)):
        clean(three)
        with engine_over(policy, *three[:2], request_s=3) as engine:
            moved(policy)
            engine.load_weights(1, weights_of(policy))
            engine.fingerprint(PROBE, limits)
            three[0].kill()
            three[0].start().wait().control(mode="drop", name="model.layers.1.mlp.up_proj.weight", path="/update_weights")
            engine.generate(requests(16, Sampling(4)))
            until(lambda: engine.servers[0].lost or not engine.servers[0].down)
            assert bool(engine.servers[0].down) != comes_back
            assert comes_back or "(limit 0.001, checks.max_fingerprint_gap" in engine.servers[0].down

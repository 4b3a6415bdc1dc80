"""What every engine keeps, HF and vLLM alike: one set of tests over HFEngine, VLLMEngine on a scripted server, and on a real one (`vllm`)."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrl.batch import pack
from llmrl.hf_engine import HFEngine
from llmrl.learner import Learner
from llmrl.models import Policy, load_policy
from llmrl.recipe import Model
from llmrl.records import InputError, Request, Sample, Sampling
from llmrl.rules.base import Needs
from llmrl.vllm_engine import vllm
from tests.builders import tiny_policy
from tests.test_engine import cut_logp
from tests.vllm_server import Real, Scripted

torch.set_num_threads(1)
CONTEXTS = [(1, 5, 14, 7), (1, 9), (1, 4, 4, 14, 15, 6, 18, 7, 7, 9, 11), (1, 12, 15, 5, 18, 10)]
NO_VLLM = "needs LLMRL_VLLM_PYTHON=/path/to/python of an environment made by scripts/vllm_env.sh"
real_only = [pytest.mark.vllm, pytest.mark.skipif("LLMRL_VLLM_PYTHON" not in os.environ, reason=NO_VLLM)]
ONE = SimpleNamespace(num_processes=1)


def save_sharp(folder: Path, *, tied: bool = False) -> Path:
    """A tiny model whose distributions are neither flat nor certain, and whose banned tokens would be likely, saved with its tokenizer."""
    policy = tiny_policy(heads=2, kv_heads=2)  # heads of 32: the smallest that vLLM has on CPU
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.dim() == 2:
                p.mul_(3.0)
        head = policy.model.lm_head.weight
        head.mul_(4.0)
        for k, i in enumerate(policy.banned_ids):
            head[i] = 1.3 * head[7 + k]
        if tied:
            policy.model.config.tie_word_embeddings = True
            policy.model.model.embed_tokens.weight.copy_(head)
            policy.model.lm_head.weight = policy.model.model.embed_tokens.weight
    # what a server would sample with if it were not told otherwise
    policy.model.generation_config.update(do_sample=True, repetition_penalty=1.5, top_k=3, top_p=0.5, min_p=0.1, temperature=0.3)
    policy.model.save_pretrained(folder)
    policy.chat.tokenizer.save_pretrained(folder)
    return folder


def moved(policy: Policy, seed: int = 1) -> None:
    """Other weights, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(torch.randn_like(p) * 0.1 * p.abs().mean())


def requests(n: int, how: Sampling | None = None, name: str = "r") -> list[Request]:
    return [Request(CONTEXTS[i % len(CONTEXTS)], (0, 1, name, i), how or Sampling(24)) for i in range(n)]


def learner_logp(policy: Policy, asked: list[Request], done: list[Any], temperature: float) -> list[list[float]]:
    """Per completion: the log-probs of its tokens by the learner's packed forward."""
    samples = [Sample(str(i), str(i), list(r.context_ids), c.token_ids, None, 0) for i, (r, c) in enumerate(zip(asked, done, strict=True))]
    (batch,) = pack(samples, [torch.zeros(len(s.token_ids)) for s in samples], tokens=10**6)
    with torch.no_grad():
        logp = Learner(policy, ONE, temperature=temperature).forward(batch, Needs()).logp_T  # type: ignore[arg-type]
    ordered = dict(zip(batch.sample_index, logp.split([len(samples[i].token_ids) for i in batch.sample_index]), strict=True))
    return [ordered[i].tolist() for i in range(len(samples))]


def packed_logits(policy: Policy, context: tuple[int, ...], tokens: list[int]) -> Any:
    """fp64 [n, V]: logits before each of `tokens`, by the packed forward."""
    (batch,) = pack([Sample("x", "x", list(context), tokens, None, 0)], [torch.zeros(len(tokens))], tokens=10**6)
    with torch.no_grad():
        hidden = policy.hidden(batch.ids_P, batch.positions_P, batch.plan(policy.kernel))
        return policy.logits(hidden[batch.source_T]).double().numpy()


@dataclass
class Backend:
    kind: str
    engine: Any
    policy: Policy
    exact: float = 1e-5
    """nats"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharp(tmp_path_factory.mktemp("sharp"))


@pytest.fixture(scope="module", params=["hf", "scripted", pytest.param("vllm", marks=real_only)])
def backend(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    policy = load_policy(Model(path=str(folder)))
    if request.param == "hf":
        yield Backend("hf", HFEngine(policy, rows=9), policy)
        return
    if request.param == "scripted":
        servers: list[Any] = [Scripted(folder).start() for _ in range(2)]
    else:
        servers = [Real(folder, tmp_path_factory.mktemp("real") / "log").start()]
    try:
        engine = vllm(servers=[s.wait().url for s in servers], request_s=60, deadline_s=120, folder=str(tmp_path_factory.mktemp("w")))(policy)
        yield Backend(request.param, engine, policy)
        engine.close()
    finally:
        for s in servers:
            s.kill()


# ---------------------------------------------------------------- log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_learners(backend: Backend, temperature: float) -> None:
    asked = requests(32, Sampling(24, temperature=temperature))
    done = backend.engine.generate(asked)
    for c, want in zip(done, learner_logp(backend.policy, asked, done, temperature), strict=True):
        assert c.logprobs == pytest.approx(want, abs=backend.exact)
    assert sum(len(c.token_ids) for c in done) > 300 and len({t for c in done for t in c.token_ids}) > 12


CUTS = [Sampling(16, top_k=5), Sampling(16, top_p=0.8), Sampling(16, min_p=0.2), Sampling(16, temperature=0.7, top_k=9, top_p=0.9)]


@pytest.mark.parametrize("how", CUTS, ids=lambda h: f"t{h.temperature}k{h.top_k}p{h.top_p}m{h.min_p}")
def test_logprobs_are_of_the_cut_distribution(backend: Backend, how: Sampling) -> None:
    asked = requests(16, how)
    for r, c in zip(asked, backend.engine.generate(asked), strict=True):
        want = [cut_logp(row, how)[t] for row, t in zip(packed_logits(backend.policy, r.context_ids, c.token_ids), c.token_ids, strict=True)]
        assert c.logprobs == pytest.approx(want, abs=backend.exact)


def test_greedy_is_the_argmax_with_log_prob_zero(backend: Backend) -> None:
    asked = requests(8, Sampling(20, temperature=0.0))
    for r, c in zip(asked, backend.engine.generate(asked), strict=True):
        assert c.token_ids == packed_logits(backend.policy, r.context_ids, c.token_ids).argmax(-1).tolist()
        assert c.logprobs == [0.0] * len(c.token_ids)


# ---------------------------------------------------------------- where a completion ends, and what is in it


def test_stop_tokens_end_it_and_stay_part_of_it(backend: Backend) -> None:
    done = backend.engine.generate(requests(64))
    stops = backend.policy.stop_ids
    for c in done:
        assert not stops & set(c.token_ids[:-1]) and (c.finish == "stop") == (c.token_ids[-1] in stops)
        assert c.finish == "stop" or len(c.token_ids) == 24
        assert c.text == backend.policy.chat.text(c.token_ids)
    assert {c.finish for c in done} == {"stop", "length"}


def test_stop_strings_end_it_and_stay_part_of_it(backend: Backend) -> None:
    free = backend.engine.generate(requests(48))
    pairs = [a + b for c in free for a, b in zip(c.text, c.text[1:], strict=False)]
    stop = max(set(pairs), key=pairs.count)
    done = backend.engine.generate(requests(48, Sampling(24, stop=(stop, "#"))))
    found = 0
    for c in done:
        if stop in c.text or "#" in c.text:
            assert c.finish == "stop" and c.text.endswith((stop, "#")) and stop not in c.text[:-1] and "#" not in c.text[:-1]
            found += 1
    assert found > 5


def test_a_length_of_one_and_the_order_of_answers(backend: Backend) -> None:
    """Each answer belongs to its own request: lengths differ, and so do contexts."""
    asked = [Request(CONTEXTS[i % 4], (3, i), Sampling(1 + i % 5)) for i in range(40)]
    done = backend.engine.generate(asked)
    assert all(1 <= len(c.token_ids) <= r.sampling.max_new_tokens for r, c in zip(asked, done, strict=True))
    for c, want in zip(done, learner_logp(backend.policy, asked, done, 1.0), strict=True):
        assert c.logprobs == pytest.approx(want, abs=backend.exact)
    assert backend.engine.generate([]) == []


def test_banned_tokens_are_never_sampled(backend: Backend) -> None:
    banned = set(backend.policy.banned_ids)
    assert not {t for c in backend.engine.generate(requests(96)) for t in c.token_ids} & banned
    free = HFEngine(replace(backend.policy, banned_ids=()))
    assert banned <= {t for c in free.generate(requests(96)) for t in c.token_ids}  # they would be


# ---------------------------------------------------------------- seeds


def test_a_request_draws_the_same_tokens_in_any_company(backend: Backend) -> None:
    asked = requests(32)
    first = {r.seed: c.token_ids for r, c in zip(asked, backend.engine.generate(asked), strict=True)}
    mixed = asked + requests(16, name="others")
    random.Random(0).shuffle(mixed)
    again = {r.seed: c.token_ids for r, c in zip(mixed, backend.engine.generate(mixed), strict=True)}
    alone = backend.engine.generate(asked[:1])[0].token_ids
    assert {k: again[k] for k in first} == first and alone == first[asked[0].seed]


def test_other_seeds_draw_other_tokens(backend: Backend) -> None:
    asked = [Request(CONTEXTS[0], (0, step, "p", i), Sampling(12)) for step in range(2) for i in range(16)]
    drawn = {tuple(c.token_ids) for c in backend.engine.generate(asked)}
    assert len(drawn) > 28  # short ones may coincide


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_generated_is_refused(backend: Backend) -> None:
    with pytest.raises(InputError, match=r"context of 4 tokens and max_new_tokens = 253 exceed .*256.*lower rollout.max_new_tokens"):
        backend.engine.generate([Request(CONTEXTS[0], (0,), Sampling(253))])
    with pytest.raises(InputError, match="empty context"):
        backend.engine.generate([*requests(1), Request((), (0,), Sampling(4))])
    assert len(backend.engine.generate([Request(CONTEXTS[0], (0,), Sampling(252))])) == 1


# ---------------------------------------------------------------- weights


def test_new_weights_change_the_distribution_and_the_fingerprint_proves_it(backend: Backend) -> None:
    policy, engine = backend.policy, backend.engine
    old = copy.deepcopy(policy.model.state_dict())
    probe = [1, 5, 14, 7, 9, 11, 4, 18]
    weights: Callable[[], Any] = lambda: iter([(n, p.detach()) for n, p in policy.model.named_parameters()])  # noqa: E731
    asked = requests(16)
    try:
        before = engine.generate(asked)
        assert {c.policy_version for c in before} == {engine.policy_version}
        moved(policy)
        engine.load_weights(7, weights)
        done = engine.generate(asked)
        assert {c.policy_version for c in done} == {7}
        for c, want in zip(done, learner_logp(policy, asked, done, 1.0), strict=True):
            assert c.logprobs == pytest.approx(want, abs=backend.exact)
        assert [c.token_ids for c in done] != [c.token_ids for c in before]
        if backend.kind != "hf":
            mine = Learner(policy, ONE).probe(probe)  # type: ignore[arg-type]
            told = engine.fingerprint(probe)
            assert set(told) == {s.url for s in engine.servers} and all(t == pytest.approx(mine, abs=backend.exact) for t in told.values())
    finally:
        policy.model.load_state_dict(old)
        engine.load_weights(8, weights)
    assert [c.token_ids for c in engine.generate(asked)] == [c.token_ids for c in before]

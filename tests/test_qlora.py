"""QLoRA: 4-bit base weights under adapters. The forward, its gradient, checkpoints and the merged model against plain models of the same weights."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmrl.config import load_recipe
from llmrl.console import Console
from llmrl.footprint import NF4, footprint
from llmrl.hf_engine import HFEngine
from llmrl.metrics import without_times
from llmrl.models import load_policy, trainable
from llmrl.quantize import TOLD, quantize, round_weights, sizes
from llmrl.recipe import Lora, Model, Tiny
from llmrl.records import InputError, Request, Sampling
from llmrl.sampling import export_model
from llmrl.session import open_session
from llmrl.train import train
from llmrl.weights import merged
from tests.test_ranks import write_inputs
from tests.test_strategies import cut
from tests.vllm_server import Scripted

BNB = importlib.util.find_spec("bitsandbytes") is not None
needs_bnb = pytest.mark.skipif(not BNB, reason="bitsandbytes is not installed")
TINY = Tiny(hidden=64, layers=2, heads=4, kv_heads=2, ffn=128)
IDS = torch.tensor([[1, 5, 14, 6, 17, 9]])
KEYS = ["model.lora={rank=4, alpha=8, quantize='nf4'}", "steps=5", "optim.lr=0.02", "checkpoint={every=1, keep=9}", "rule={use='grpo', kl=0.05}"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    return tmp_path


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """By the model's own attention; the model's mode and attention are put back."""
    theirs, mode = model.config._attn_implementation, model.training
    model.eval().set_attn_implementation("eager")
    try:
        return model(ids).logits.float()
    finally:
        model.train(mode).set_attn_implementation(theirs)


def pair(dtype="float32"):
    """(policy on a 4-bit base, policy on a plain base with what those 4 bits stand for), with the same random adapters."""
    lora = {"rank": 4, "alpha": 8}
    four = load_policy(Model(path="tiny", tiny=TINY, dtype=dtype, lora=Lora(**lora, quantize="nf4")))
    rounded = load_policy(Model(path="tiny", tiny=TINY, dtype=dtype))
    round_weights(rounded.model)
    plain = load_policy(Model(path="tiny", tiny=TINY, dtype=dtype, lora=Lora(**lora)))
    there = dict(plain.model.named_parameters())
    with torch.no_grad():
        for name, p in rounded.model.named_parameters():
            there[name if name in there else name.replace(".weight", ".base_layer.weight")].copy_(p)
        for k, (name, p) in enumerate(trainable(four.model)):
            there[name].copy_(p.normal_(0, 0.05, generator=torch.Generator().manual_seed(k)))
    return four, plain, rounded


@needs_bnb
def test_forward_and_gradient_are_those_of_the_dequantised_weights():
    four, plain, rounded = pair()
    x, y = logits(four.model), logits(plain.model)
    assert float((x - y).detach().abs().max()) < 1e-6
    assert float((x - logits(load_policy(Model(path="tiny", tiny=TINY)).model)).detach().abs().max()) > 0.01  # and 4 bits are not 32
    x.square().sum().backward()
    y.square().sum().backward()
    theirs = {name: p.grad for name, p in trainable(plain.model)}
    for name, p in trainable(four.model):
        assert torch.allclose(p.grad, theirs[name], rtol=1e-4, atol=1e-6) and float(p.grad.abs().max()) > 1e-4, name
    four.model.disable_adapters()  # the reference model
    with torch.no_grad():
        assert float((logits(four.model) - logits(rounded.model)).abs().max()) < 1e-6


@needs_bnb
def test_generating_leaves_the_weights_and_the_gradient_as_they_were():
    """Stock Linear4bit repacks its weight at the first forward in eval mode on a CPU with AVX512-BF16; the gradient ends there without a word."""
    four, _, _ = pair()
    packed = {name: p.clone() for name, p in four.model.named_parameters()}
    done = HFEngine(four).generate([Request((1, 5, 14, 6), ("x", i), Sampling(8)) for i in range(6)])
    assert all(torch.equal(p, packed[name]) for name, p in four.model.named_parameters())
    down = four.model.model.layers[0].self_attn.q_proj.base_layer
    h = torch.randn(3, 64, requires_grad=True)
    down(h).sum().backward()
    assert h.grad is not None and float(h.grad.abs().max()) > 0
    ids = torch.tensor([[1, 5, 14, 6, *done[0].token_ids]])
    with torch.no_grad():
        logp = logits(four.model, ids)[0, 3:-1].index_fill(-1, torch.tensor(four.banned_ids), -torch.inf).log_softmax(-1)
    told = logp.gather(1, ids[0, 4:, None])[:, 0]
    assert float((told - torch.tensor(done[0].logprobs)).abs().max()) < 1e-5


@needs_bnb
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_what_servers_get_is_the_same_model(dtype, tolerance):
    four, _, _ = pair(dtype)
    whole = load_policy(Model(path="tiny", tiny=TINY, dtype=dtype))
    there = dict(whole.model.named_parameters())
    sent = dict(merged(four, [(name, p.detach()) for name, p in trainable(four.model)], four.model.dtype))
    assert sent.keys() == there.keys() and all(w.shape == there[n].shape and w.dtype == there[n].dtype for n, w in sent.items())
    with torch.no_grad():
        for name, weight in sent.items():
            there[name].copy_(weight)
        assert float((logits(four.model) - logits(whole.model)).abs().max()) < tolerance


def rows_of(run: Path) -> list[dict]:
    return [without_times(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


@needs_bnb
def test_five_steps_resumed_and_exported(folder):
    def run(name: str, resume: bool = False) -> Path:
        train(load_recipe(folder / "r.toml", [f"run.dir={folder / name}", *KEYS]), console=Console(quiet=True), resume=resume)
        return folder / name

    a = run("a")
    rows, model = rows_of(a), a / "checkpoints" / "step-000005" / "model"
    assert max(r["logp_gap/max_nats"] for r in rows[1:]) < 1e-5  # the engine generates with the very weights
    assert rows[1]["kl/ref_nats"] == 0 and rows[5]["kl/ref_nats"] > 1e-4 and all(r["grad/norm"] > 0 for r in rows[1:])
    adapters = load_file(model / "adapter_model.safetensors")
    assert all("lora_" in name and x.dtype == torch.float32 for name, x in adapters.items()) and json.loads((model / TOLD).read_text())["quantize"] == "nf4"
    facts = json.loads((a / "manifest.json").read_text())["model"]
    assert facts["four_bit_parameters"] == 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3)
    cut(a, 3, folder / "b")
    assert rows_of(run("b", resume=True)) == rows

    told = export_model(str(a), folder / "out", "float32")
    whole = load_policy(Model(path=str(folder / "out")))
    session = open_session(load_recipe(folder / "r.toml", [*KEYS, f"run.dir={folder / 'c'}"]))
    try:
        session.learner.load({n: adapters["base_model.model." + n.replace(".default.", ".")] for n, _ in session.learner.params}, {})
        assert all(name.endswith(".default.weight") and type(w) is torch.Tensor for name, w in session.learner.weights())
        with torch.no_grad():
            assert float((logits(session.policy.model) - logits(whole.model)).abs().max()) < 1e-5
    finally:
        session.close()
    assert told["parameters"] == sizes(whole.model)[0] and not [n for n, _ in whole.model.named_parameters() if "lora" in n or "base" in n]
    (model / TOLD).write_text('{"quantize": "int3", "dtype": "float32"}')
    with pytest.raises(InputError, match="quantised as"):
        load_policy(Model(path=str(model)))


@needs_bnb
def test_a_server_gets_the_dequantised_weights_with_the_adapters_in_them(folder):
    """publish() demands that the server's log-probs of a fixed text are the learner's to 1e-3 nats, and check_gap that its samples' are."""
    plain = load_policy(Model(path="tiny", tiny=TINY))
    plain.model.config._attn_implementation = "sdpa"
    plain.model.save_pretrained(folder / "m")
    plain.chat.tokenizer.save_pretrained(folder / "m")
    server = Scripted(folder / "m").start().wait()
    try:
        engine = f"engine={{use='vllm', servers=['{server.url}']}}"
        keys = [f"run.dir={folder / 'v'}", *KEYS, "steps=2", engine, f"model={{path='{folder / 'm'}', lora={{rank=4, alpha=8, quantize='nf4'}}}}"]
        train(load_recipe(folder / "r.toml", keys), console=Console(quiet=True))
    finally:
        server.kill()
    rows = rows_of(folder / "v")
    assert all(r["logp_gap/fingerprint_nats"] < 1e-4 and r["logp_gap/max_nats"] < 1e-4 and r["grad/norm"] > 0 for r in rows[1:])


@needs_bnb
def test_bytes_are_what_the_footprint_says():
    policy = load_policy(Model(path="tiny", tiny=Tiny(hidden=256, layers=1, heads=4, ffn=512), dtype="bfloat16", lora=Lora(quantize="nf4")))
    weights, packed, held = sizes(policy.model)
    assert packed == 4 * 256 * 256 + 3 * 256 * 512 and held == packed * NF4 + 2 * (weights - packed)
    learning = sum(p.numel() for _, p in trainable(policy.model))
    assert footprint(weights - learning, learning=learning, quantized=packed).weights * 1e9 == pytest.approx(held)


def test_it_is_refused_before_a_model_is_loaded(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"needs bitsandbytes .* pip install 'llmrl\[qlora\]'"):
        load_policy(Model(path="/nowhere", lora=Lora(quantize="nf4")))
    monkeypatch.undo()
    monkeypatch.setattr("llmrl.session.load_policy", None)
    for strategy in ("fsdp2", "zero2", "zero3"):
        with pytest.raises(InputError, match=rf"model.lora.quantize: .* {strategy} .* learner.strategy=ddp"):
            open_session(load_recipe(folder / "r.toml", [*KEYS, f"learner.strategy={strategy}"]))


def test_stacks_of_matrices_are_refused():
    model = load_policy(Model(path="tiny", tiny=TINY)).model
    model.model.layers[0].mlp.experts = torch.nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.raises(InputError, match="experts is a stack of matrices"):
        quantize(model, "cpu")

"""llmrl's packed path against scripts/one_file_grpo.py: the same weights and samples give the same loss and the same gradient.

The oracle pads on the right, builds whole logits and runs the model's own attention; llmrl packs, shares contexts and chunks the head.
"""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmrl import losses
from llmrl.batch import Outputs, evaluate_terms, global_denominators, pack
from llmrl.head import head_logp
from llmrl.records import Sample
from llmrl.rules.base import Term
from tests.builders import ALPHABET, tiny_policy

SCRIPT = Path(__file__).parents[1] / "scripts" / "one_file_grpo.py"
spec = importlib.util.spec_from_file_location("one_file_grpo", SCRIPT)
assert spec is not None and spec.loader is not None
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

BUDGET = 11
CLIP = losses.pg_clip(0.2, 0.28)
TERMS = {"token": Term(CLIP, over="token"), "sample": Term(CLIP, over="sample"), "fixed": Term(CLIP, over="fixed", budget=BUDGET)}
HUGE = 10**6


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def world(request):
    """(policy, the oracle's model with the same weights, samples, advantages)."""
    policy = tiny_policy()
    if request.param == torch.float64:
        exact_norms(policy.model)
    plain = copy.deepcopy(policy.model)
    plain.set_attn_implementation("sdpa")  # eager takes its softmax in fp32, whatever the model
    for model in (policy.model, plain):
        model.to(request.param)
    samples, adv = make_samples()
    return policy, plain, samples, adv


def exact_norms(model):
    """transformers' RMSNorm computes in fp32 whatever the model; torch's own in the model's dtype. Same weights, same formula."""
    layers = model.model.layers
    for owner, name in [(model.model, "norm"), *((layer, n) for layer in layers for n in ("input_layernorm", "post_attention_layernorm"))]:
        old = getattr(owner, name)
        new = torch.nn.RMSNorm(len(old.weight), eps=old.variance_epsilon)
        new.weight = old.weight
        setattr(owner, name, new)


def make_samples():
    """5 prompts of 1 to 9 tokens with 1 to 4 samples of 1 to 8 tokens; old log-probs far enough off for both clips. fp32 numbers."""
    g = torch.Generator().manual_seed(0)
    vocab = 4 + len(ALPHABET)

    def ids(n):
        some = torch.randint(3, vocab, (n,), generator=g)
        return some.where(some > 3, 2).tolist()  # never <unk> (3), which cannot be sampled

    samples = []
    for k, (length, group) in enumerate([(1, 3), (6, 4), (9, 1), (3, 4), (6, 2)]):
        context = [1, *ids(length - 1)]
        for i in range(group):
            n = 1 if (k, i) in ((0, 0), (3, 2)) else int(torch.randint(1, 9, (), generator=g))
            old = (-3.0 + 0.5 * torch.randn(n, generator=g)).tolist()  # logp is about -log 21 = -3.04
            samples.append(Sample(f"{k}/{i}", f"p{k}", context, ids(n), None, 0, streams={"old_logp": old}))
    return samples, torch.randn(len(samples), generator=g).tolist()


def ours(policy, parts, adv, term, tokens, *, chunk=1024, whole_groups=False):
    """Loss and gradients, summed over the micro-batches of each part (indices of samples)."""
    samples = [s for part in parts for s, _ in part]
    denominators = global_denominators(samples, [term], max_new_tokens=99)
    policy.model.zero_grad(set_to_none=True)
    total, batches = 0.0, 0
    for part in parts:
        rows = [torch.full((len(s.token_ids),), a) for s, a in part]
        for batch in pack([s for s, _ in part], rows, tokens=tokens, whole_groups=whole_groups):
            hidden = policy.hidden(batch.ids_P, batch.positions_P, batch.plan(policy.kernel))[batch.source_T]
            logp, _ = head_logp(hidden, *policy.head, batch.tokens_T, banned_ids=policy.banned_ids, chunk=chunk)
            loss, _ = evaluate_terms([term], batch, Outputs(logp, batch.stream["old_logp"]), denominators)
            loss.backward()
            total += loss.item()
            batches += 1
    grads = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy.model.zero_grad(set_to_none=True)
    return total, grads, batches


def theirs(plain, pairs, over, pad_to=0):
    rows = [(s.context_ids, s.token_ids) for s, _ in pairs]
    old = [s.streams["old_logp"] for s, _ in pairs]
    return oracle.loss_and_grads(plain, rows, [a for _, a in pairs], old, 0.2, 0.28, over, budget=BUDGET, pad_to=pad_to, banned=(0, 1, 3))


def agree(mine, want):
    fp64 = next(iter(want[1].values())).dtype == torch.float64
    tol = 1e-10 if fp64 else 1e-5
    assert mine[0] == pytest.approx(want[0], rel=tol, abs=tol)
    assert mine[1].keys() == want[1].keys()
    for name, g in want[1].items():
        assert float((mine[1][name] - g).abs().max()) <= tol * float(g.abs().max()), name
        assert float(g.abs().max()) > 0, f"{name}: nothing compared"


@pytest.mark.parametrize("over", list(TERMS))
@pytest.mark.parametrize("tokens", [HUGE, 24, 1], ids=["one pack", "packs of 24", "each alone"])
def test_packing(world, over, tokens):
    policy, plain, samples, adv = world
    pairs = list(zip(samples, adv, strict=True))
    loss, grads, batches = ours(policy, [pairs], adv, TERMS[over], tokens)
    assert batches == {HUGE: 1, 1: len(samples)}.get(tokens, batches) and (tokens != 24 or 3 < batches < len(samples))
    agree((loss, grads), theirs(plain, pairs, over))


@pytest.mark.parametrize("over", list(TERMS))
@pytest.mark.parametrize("cuts", [(14,), (3, 11), (1, 4, 2, 1, 3, 1, 2)], ids=["1", "2", "7"])
def test_uneven_micro_batches_in_shuffled_order(world, over, cuts):
    policy, plain, samples, adv = world
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(len(cuts))).tolist()
    pairs = [(samples[i], adv[i]) for i in order]
    parts, at = [], 0
    for n in cuts:
        parts.append(pairs[at : at + n])
        at += n
    assert at == len(pairs)
    loss, grads, batches = ours(policy, parts, adv, TERMS[over], HUGE, chunk=5)
    assert batches == len(cuts)
    agree((loss, grads), theirs(plain, list(zip(samples, adv, strict=True)), over))


@pytest.mark.parametrize("pad_to", [18, 40])
def test_padding_of_the_oracle(world, pad_to):
    policy, plain, samples, adv = world
    pairs = list(zip(samples, adv, strict=True))
    agree(theirs(plain, pairs, "token", pad_to), theirs(plain, pairs, "token"))
    loss, grads, _ = ours(policy, [pairs], adv, TERMS["token"], 24)
    agree((loss, grads), theirs(plain, pairs, "token", pad_to))


@pytest.mark.parametrize("over", list(TERMS))
def test_weight_zero_and_whole_groups(world, over):
    """Samples of weight 0 are as if the oracle had never seen them; whole groups in a pack change nothing."""
    policy, plain, samples, adv = world
    off = {0, 5, 9, 13}
    marked = [copy.deepcopy(s) for s in samples]
    for i in off:
        marked[i].weights["policy"] = 0.0
    kept = [(s, a) for i, (s, a) in enumerate(zip(samples, adv, strict=True)) if i not in off]
    loss, grads, _ = ours(policy, [list(zip(marked, adv, strict=True))], adv, TERMS[over], 24, whole_groups=True)
    agree((loss, grads), theirs(plain, kept, over))


def test_pad_ids_inside_a_sample_count(world):
    """Masks come from positions: an id that is also the padding id is an ordinary token of a context."""
    policy, plain, samples, adv = world
    odd = [copy.deepcopy(s) for s in samples[:6]]
    for s in odd:
        s.context_ids = [*s.context_ids, 0, 5]
    pairs = list(zip(odd, adv, strict=False))
    loss, grads, _ = ours(policy, [pairs], adv, TERMS["sample"], HUGE)
    agree((loss, grads), theirs(plain, pairs, "sample"))


def test_zero_advantage_zero_gradient(world):
    policy, _, samples, _ = world
    loss, grads, _ = ours(policy, [[(s, 0.0) for s in samples]], [], TERMS["token"], 24)
    assert loss == 0.0 and all(g.abs().max() == 0 for g in grads.values())


def test_the_pack_is_as_small_as_promised(world):
    """A context is held once a micro-batch, a beginning that several share too, and the last token of a completion is no input."""
    _, _, samples, _ = world
    (batch,) = pack(samples, [torch.zeros(len(s.token_ids)) for s in samples], tokens=HUGE)
    beginnings = {tuple(s.context_ids[:k]) for s in samples for k in range(1, len(s.context_ids) + 1)}
    assert len(batch.ids_P) == len(beginnings) + sum(len(s.token_ids) - 1 for s in samples)
    for part in pack(samples, [torch.zeros(len(s.token_ids)) for s in samples], tokens=24):
        assert len(part.ids_P) <= 24


def test_the_script_runs():
    """A few steps of everything: warm start, sampling, GRPO, report."""
    small = {"sft-steps": 3, "sft-batch": 8, "steps": 2, "prompts": 4, "group": 4, "every": 1, "eval": 8}
    args = [x for k, v in small.items() for x in (f"--{k}", str(v))]
    done = subprocess.run([sys.executable, SCRIPT, *args], check=True, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [["sft", "1"], ["sft", "2"], ["sft", "3"], ["grpo", "1"], ["grpo", "2"]]
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 250

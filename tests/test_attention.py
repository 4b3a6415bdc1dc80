"""Packed attention and step-by-step decoding against the models' own attention, one sequence at a time; and which models are refused."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmrl.attention import NAME, DecodePlan, PackPlan, PrefillPlan
from llmrl.batch import pack
from llmrl.models import Policy
from llmrl.records import InputError, Sample

VOCAB = 40
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8, "attention_dropout": 0.0, "pad_token_id": 0,
}  # fmt: skip
THREE_TO_ONE = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}
MIXED = {"sliding_window": 3, "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
KINDS = {
    "llama 3:1": ("llama", THREE_TO_ONE), "qwen2": ("qwen2", {}), "qwen3": ("qwen3", {}), "phi3": ("phi3", {}),
    "mistral window 4": ("mistral", {"sliding_window": 4}), "gemma3 mixed windows": ("gemma3_text", MIXED),
    "gpt_neox": ("gpt_neox", {}), "olmo2": ("olmo2", {}), "starcoder2": ("starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_model(kind, amplify=3.0, **more):
    """A random model whose attention and logits are far from uniform."""
    config = CONFIG_MAPPING[kind](**{**SHAPE, **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(amplify)
    return model


def both(kind, **more):
    """(packed policy, the same model with its own eager attention)."""
    own = random_model(kind, **more)
    packed = copy.deepcopy(own)
    own.set_attn_implementation("eager")
    packed.set_attn_implementation(NAME)
    return Policy(packed, None, frozenset(), ()), own


def samples():
    """Three contexts of 1, 5 and 9 tokens; completions of 1 to 11 tokens."""
    g = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(1, VOCAB, (n,), generator=g).tolist()

    made = []
    for k, (context, lengths) in enumerate([(ids(1), [3, 1]), (ids(5), [11, 2, 7]), (ids(9), [4])]):
        made += [Sample(f"{k}/{i}", f"p{k}", context, ids(n), None, 0) for i, n in enumerate(lengths)]
    return made


def packed_batch(of):
    (batch,) = pack(of, [torch.zeros(len(s.token_ids)) for s in of], tokens=10**6)
    return batch, [of[i] for i in batch.sample_index]


def one_by_one(model, of):
    """Hidden states that predict each completion token, flat, each sequence on its own."""
    rows = []
    for s in of:
        ids = torch.tensor([s.context_ids + s.token_ids[:-1]])
        out = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        rows.append(out[len(s.context_ids) - 1 :])
    return torch.cat(rows)


@pytest.mark.parametrize("kind", list(KINDS))
def test_packed_equals_one_by_one(kind):
    name, more = KINDS[kind]
    policy, own = both(name, **more)
    policy.model.eval()
    own.eval()
    policy.self_test()
    batch, order = packed_batch(samples())
    got = policy.hidden(batch.ids_P, batch.positions_P, batch.plan())[batch.source_T]
    want = one_by_one(own, order)
    assert_close(got, want, atol=2e-5, rtol=1e-5)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for (n, a), b in zip(policy.model.named_parameters(), own.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None or a.grad.abs().max() == 0, n
        else:
            assert float((a.grad - b.grad).abs().max()) <= 2e-5 * float(b.grad.abs().max()) + 1e-6, n


def test_the_window_matters():
    """Without it the numbers differ, so the comparison above sees it."""
    policy, _ = both("mistral", sliding_window=4)
    wide, _ = both("mistral", sliding_window=None)
    batch, _ = packed_batch(samples())
    a, b = (p.hidden(batch.ids_P, batch.positions_P, batch.plan()) for p in (policy, wide))
    assert float((a - b).detach().abs().max()) > 1e-2
    long = batch.positions_P < 4  # tokens whose whole past lies within the window agree
    assert_close(a[long], b[long], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_math_kernel_equals_sdpa(kind):
    policy, _ = both(kind, **(THREE_TO_ONE if kind == "llama" else {"sliding_window": 4}))
    batch, _ = packed_batch(samples())
    grads = []
    for kernel in ("sdpa", "math"):
        policy.model.zero_grad()
        out = policy.hidden(batch.ids_P, batch.positions_P, batch.plan(kernel))
        (out * torch.arange(out.shape[1])).sum().backward()
        grads.append((out.detach(), [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]))
    assert_close(grads[0][0], grads[1][0], atol=1e-5, rtol=1e-5)
    for a, b in zip(grads[0][1], grads[1][1], strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * float(a.abs().max()) + 1e-6


def test_padding_places_of_a_row_are_never_seen():
    """Rows shorter than the longest end in any valid index: its choice changes nothing."""
    policy, _ = both("llama")
    batch, _ = packed_batch(samples())
    want = policy.hidden(batch.ids_P, batch.positions_P, batch.plan())
    used = torch.zeros(batch.index_RL.numel(), dtype=torch.bool)
    rows = [len(s.context_ids) + len(s.token_ids) - 1 for s in packed_batch(samples())[1]]
    for r, n in enumerate(rows):
        used.view(batch.index_RL.shape)[r, :n] = True
    other = torch.where(used.view(batch.index_RL.shape), batch.index_RL, 0)
    assert (other != batch.index_RL).any()
    assert_close(policy.hidden(batch.ids_P, batch.positions_P, PackPlan(other, batch.pick_P)), want, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["llama 3:1", "mistral window 4", "qwen3", "gemma3 mixed windows"])
@pytest.mark.parametrize("kernel", ["sdpa", "math"])
@torch.no_grad()
def test_decoding_step_by_step_equals_the_full_forward(kind, kernel):
    """Contexts of different lengths are prefilled in one pack; then every row grows by one token a step, rows leaving as they end."""
    name, more = KINDS[kind]
    policy, own = both(name, **more)
    policy.model.eval()
    own.eval()
    some = sorted(samples(), key=lambda s: -len(s.token_ids))  # rows that end leave at the back
    contexts = [s.context_ids for s in some]
    ids = torch.tensor([t for c in contexts for t in c])
    starts = torch.tensor([0, *map(len, contexts)]).cumsum(0)[:-1].tolist()
    width = max(map(len, contexts))
    index = torch.tensor([[a + min(j, len(c) - 1) for j in range(width)] for a, c in zip(starts, contexts, strict=True)])
    pick = torch.tensor([r * width + j for r, c in enumerate(contexts) for j in range(len(c))])
    positions = torch.tensor([j for c in contexts for j in range(len(c))])
    prefill = PrefillPlan(index, pick, kernel)
    out = policy.hidden(ids, positions, prefill)
    heads, dim = prefill.kv[0][0].shape[1:]
    cache = [(torch.zeros(len(some), heads, 24, dim), torch.zeros(len(some), heads, 24, dim)) for _ in prefill.kv]
    for layer, (k, v) in prefill.kv.items():
        for r, (a, c) in enumerate(zip(starts, contexts, strict=True)):
            for store, x in zip(cache[layer], (k, v), strict=True):
                store[r, :, : len(c)] = x[a : a + len(c)].transpose(0, 1)
    got = [[out[a + len(c) - 1]] for a, c in zip(starts, contexts, strict=True)]
    for t in range(max(len(s.token_ids) for s in some) - 1):
        live = [s for s in some if len(s.token_ids) - 1 > t]
        at = torch.tensor([len(s.context_ids) + t for s in live])
        step = policy.hidden(torch.tensor([s.token_ids[t] for s in live]), at, DecodePlan(cache, at, kernel))
        for r in range(len(live)):
            got[r].append(step[r])
    assert_close(torch.cat([torch.stack(rows) for rows in got]), one_by_one(own, some), atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------- what is refused


def refused(model):
    model.set_attn_implementation(NAME)
    policy = Policy(model, None, frozenset(), ())
    with pytest.raises(InputError, match=r"^model\.path: ") as e:
        policy.self_test()
    assert model.config._attn_implementation == NAME and model.training
    return str(e.value)


@pytest.mark.parametrize("amplify", [1.0, 5.0])
def test_gemma2_is_refused(amplify):
    """Soft-capped attention scores, soft-capped logits, and both."""
    assert "soft" in refused(random_model("gemma2", amplify).train())
    assert "soft" in refused(random_model("gemma2", amplify, attn_logit_softcapping=None).train())
    assert "soft" in refused(random_model("gemma2", amplify, final_logit_softcapping=None).train())
    fine, _ = both("gemma2", amplify=amplify, attn_logit_softcapping=None, final_logit_softcapping=None)
    fine.self_test()


@pytest.mark.parametrize("kind", [
    ("lfm2", {"layer_types": ["conv", "full_attention"]}), ("granite", {"logits_scaling": 2.0}), ("cohere", {}), ("mamba", {}),
    ("stablelm", {}), ("gpt_oss", {"num_local_experts": 4}),
], ids=lambda k: k[0])  # fmt: skip
def test_others_are_refused(kind):
    """Convolutions and state spaces that run across samples, scaled logits, attention sinks, models that drop our keyword."""
    refused(random_model(kind[0], 1.0, **kind[1]).train())


def test_a_call_without_a_plan_is_an_error():
    policy, _ = both("llama")
    with pytest.raises(ValueError, match="needs a plan"):
        policy.model(torch.tensor([[1, 2, 3]]))


def test_attention_dropout_is_refused_in_training():
    policy, _ = both("llama", attention_dropout=0.1)
    batch, _ = packed_batch(samples())
    policy.model.train()
    with pytest.raises(NotImplementedError, match="dropout"):
        policy.hidden(batch.ids_P, batch.positions_P, batch.plan())

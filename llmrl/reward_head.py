"""A reward model: a causal LM with a scalar head on the last hidden state at the end token, on packed batches; saved as a plain folder.

The folder's chat template ends a conversation with the end token, so that whoever reads the logit at the last token (transformers, the verifier
`reward_model`, vLLM) reads it where it was trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.attention import NAME
from llmrl.batch import TokenBatch, pack
from llmrl.models import Policy, load_policy
from llmrl.recipe import Model
from llmrl.records import InputError, Sample

Item = tuple[Sequence[int], Sequence[int]]
"""(context ids, response ids): the reward model reads one behind the other."""



def reward_policy(cfg: Model, *, base: Path = Path("."), seed: int = 0, device: torch.device | str = "cpu") -> Policy:
    """The causal LM that `[model]` describes with a scalar head in place of its vocabulary. `Policy.head` is not there.

    The head begins as N(0, 1 / (D + 1)), as in arXiv:2009.01325 section 3.4; it has no bias, for a level of scores means nothing.
    """
    from transformers import AutoModelForSequenceClassification

    policy = load_policy(cfg.model_copy(update={"gradient_checkpointing": False}), base=base, seed=seed)
    config = type(policy.model.config).from_dict(policy.model.config.to_dict())
    config.num_labels, config.pad_token_id = 1, _padding(policy)
    try:
        model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise InputError(f"model.path: transformers has no sequence-classification form of {type(policy.model).__name__}") from error
    if not isinstance(head := getattr(model, "score", None), nn.Linear):
        raise InputError(f"model.path: {type(model).__name__} has no linear head `score`, which is what is trained here")
    model.base_model.load_state_dict(policy.model.base_model.state_dict())
    with torch.no_grad():
        head.weight.normal_(0.0, (head.in_features + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
        if head.bias is not None:
            head.bias.zero_().requires_grad_(False)
    model = model.to(dtype=policy.model.dtype, device=device)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.set_attn_implementation(NAME)
    if cfg.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return Policy(model, policy.chat, policy.stop_ids, policy.banned_ids, cfg.attention)


def _padding(policy: Policy) -> int | None:
    """An id that ends no text: transformers reads the score at the last token that is not this one. None where there is no such id."""
    tokenizer = policy.chat.tokenizer
    ids = [tokenizer.pad_token_id, *(i for t, i in tokenizer.get_added_vocab().items() if "pad" in t.lower()), tokenizer.unk_token_id]
    return next((i for i in ids if i is not None and i not in policy.stop_ids and i != tokenizer.bos_token_id), None)


class PackedScore(nn.Module):
    """Scores of a packed batch whose samples end in a token that is not read (`scored`): one number a sample."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.model, self.policy = policy.model, policy

    def forward(self, batch: TokenBatch) -> Tensor:
        """[S] fp32 (fp64 in a fp64 model), with gradient."""
        hidden = self.policy.hidden(batch.ids_P, batch.positions_P, batch.plan(self.policy.kernel))
        last_S = torch.bincount(batch.sample_T, minlength=batch.n_samples).cumsum(0) - 1
        weight: Any = self.model.score.weight  # type: ignore[union-attr]
        wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        return (hidden.index_select(0, batch.source_T[last_S]).to(wide) @ weight.to(wide).T)[:, 0]


def scored(name: str, item: Item) -> Sample:
    """A sample whose every token is an input: packing reads all but the last token, so one that is not read is put behind."""
    return Sample(name, name, list(item[0]), [*item[1], 0], None, 0, weights={})


@torch.no_grad()
def score_items(policy: Policy, items: Sequence[Item], *, tokens: int = 8192) -> list[float]:
    """The score of each (context, response)."""
    samples = [scored(str(i), item) for i, item in enumerate(items)]
    module, out = PackedScore(policy), [math.nan] * len(items)
    training = policy.model.training
    policy.model.eval()
    for batch in pack(samples, [torch.zeros(len(s.token_ids)) for s in samples], tokens=tokens):
        for i, value in zip(batch.sample_index, module(batch.to(policy.device)).tolist(), strict=True):
            out[i] = value
    policy.model.train(training)
    return out


def template_with_end(tokenizer: Any) -> str:
    """The tokenizer's chat template (without one: contents joined by newlines, the reply right behind), ended by the end token once."""
    own = tokenizer.chat_template or (
        "{{ bos_token }}{% for m in messages %}{% if not loop.first and m['role'] != 'assistant' %}{{ '\\n' }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    if tokenizer.bos_token is None:
        own = own.replace("{{ bos_token }}", "", 1)
    return (
        "{% set conversation %}" + own + "{% endset %}"
        "{% if messages[-1]['role'] != 'assistant' %}{{ conversation }}"
        "{% elif conversation.rstrip().endswith(eos_token) %}{{ conversation.rstrip() }}"
        "{% else %}{{ conversation }}{{ eos_token }}{% endif %}"
    )


def save_reward_model(policy: Policy, folder: Path) -> None:
    """A folder for AutoModelForSequenceClassification, with the tokenizer."""
    model, tokenizer = policy.model, policy.chat.tokenizer
    kept = tokenizer.chat_template, model.config._attn_implementation
    tokenizer.chat_template, model.config._attn_implementation = template_with_end(tokenizer), "sdpa"  # ours would not be known to others
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template, model.config._attn_implementation = kept

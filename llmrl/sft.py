"""Supervised warm start: cross-entropy on the rows' solutions, on the same learner, batches and denominators as RL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from llmrl.batch import evaluate_terms, global_denominators, pack
from llmrl.data import PromptStream
from llmrl.learner import Learner, learning_rate
from llmrl.losses import ce
from llmrl.recipe import Optim
from llmrl.records import InputError, Prompt, Sample
from llmrl.rules.base import Needs, Term

TERMS = (Term(ce(), weight="sft", name="sft"),)


def demonstration(prompt: Prompt, learner: Learner, tools: Sequence[dict[str, Any]] = ()) -> Sample:
    """The row's solution as a sample that feeds the term "sft"; the end token is learnt too. Where the row has `turns` it is those: messages of
    the assistant, which are learnt, and between them what an environment says to it, which is only read. tools: the environment's, as in its episodes."""
    chat = learner.policy.chat
    ids: list[int] = []
    mask: list[bool] = []
    for message in prompt.meta.get("turns") or [{"role": "assistant", "content": prompt.meta["solution"]}]:
        own = message["role"] == "assistant"
        new = chat.completion_ids(message["content"]) if own else chat.between_ids([message], last_id=ids[-1], tools=tools)
        ids, mask = ids + new, mask + [own] * len(new)
    return Sample(
        id=prompt.id, prompt_id=prompt.id, context_ids=chat.prompt_ids(prompt.messages, tools=tools), token_ids=ids, behavior_logp=None,
        policy_version=learner.version, role="demonstration", weights={"sft": 1.0}, mask=None if all(mask) else mask,
    )  # fmt: skip


def supervise(
    learner: Learner, prompts: list[Prompt], optim: Optim, *, steps: int, examples: int, tokens: int, seed: int, tools: Sequence[dict[str, Any]] = ()
) -> Iterator[dict[str, float]]:
    """`steps` updates on `examples` demonstrations each, over all ranks; yields {step (from 1), loss_nats, lr, grad_norm} after every one.

    The loss is the mean over all solution tokens of the step, all ranks, in nats. The temperature is 1 whatever the rollouts use.
    """
    world, rank = learner.accelerator.num_processes, learner.accelerator.process_index
    if examples % world:
        raise InputError(f"warm_start.examples = {examples} cannot be shared by {world} processes evenly")
    stream = PromptStream(prompts, seed=seed, rank=rank, world=world)
    temperature, learner.temperature = learner.temperature, 1.0
    learner.start(optim)
    try:
        for step in range(steps):
            samples = [demonstration(p, learner, tools) for p in stream.take(examples // world)]
            denominators = global_denominators(samples, TERMS, max_new_tokens=1, all_sum=learner.all_sum)
            total = 0.0
            batches = pack(samples, [torch.zeros(s.length) for s in samples], tokens=tokens, groups=range(len(samples)))
            for batch, last in learner.in_step(batches):
                loss, shares = evaluate_terms(TERMS, batch, learner.forward(batch, Needs()), denominators)
                learner.backward(loss, last)
                total += shares["sft"]
            lr = learning_rate(optim, step, steps)
            norm = learner.update(lr)
            loss_all = float(learner.all_sum(torch.tensor([total], dtype=torch.float64))[0])
            yield {"step": step + 1, "loss_nats": loss_all, "lr": lr, "grad_norm": norm}
    finally:
        learner.temperature = temperature

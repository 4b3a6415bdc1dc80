"""`llmrl check RECIPE`: everything short of a training step, as a list of findings."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch

from llmrl import plugins
from llmrl.batch import pack, token_metrics
from llmrl.config import LoadedRecipe
from llmrl.footprint import footprint
from llmrl.learner import RunFailed
from llmrl.quantize import sizes
from llmrl.records import Prompt, Sample
from llmrl.rollout import RolloutIO
from llmrl.session import Session, open_session
from llmrl.sft import demonstration
from llmrl.step import check_gap, gap_limit

GOLD_ROWS = 64
"""Rows whose gold answer is fed to the verifier."""


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    detail: str


def check_recipe(loaded: LoadedRecipe) -> Iterator[Finding]:
    """Yields findings as they come; the last ones need the model. InputError where the recipe cannot even be opened."""
    session = open_session(loaded, sharded=False)
    try:
        yield Finding("recipe, plug-ins, verifier process, model and its packed forward", True, f"{loaded.path}")
        t = session.tables
        told = f"{len(t.train)} training prompts, {len(t.held_out)} held out, {t.dropped} rows dropped; longest prompt {t.longest} tokens"
        yield Finding("data", not t.overlap, told + (f"; {t.overlap} held-out questions are training prompts too" if t.overlap else ""))
        yield _prompt_as_trained(session)
        yield _gold(session)
        yield _arithmetic(session)
        yield _memory(session)
        if session.tables.warm:
            yield _demonstration(session)
        yield from _rollout(session)
    finally:
        session.close()


def _prompt_as_trained(session: Session) -> Finding:
    chat, prompt = session.policy.chat, session.tables.train[0]
    ids = chat.prompt_ids(prompt.messages, tools=session.tools)
    shown = chat.show(ids)
    return Finding(
        "one prompt, as the model sees it", True,
        f"row {prompt.id}, {len(ids)} tokens, none of them trained; the completion begins right behind it:\n"
        f"{shown}|<- trained from here\ngold: {prompt.answer}",
    )  # fmt: skip


def _gold(session: Session) -> Finding:
    """Feeds gold answers to the verifier in the forms that verifiers ask for, one form for all rows; demands 1.0."""
    if session.recipe.verifier.use == "environment":
        return Finding("gold answers score 1", True, 'the environment judges (verifier "environment"): tests/contracts/environment.py tries it')
    forms = plugins.resolve("llmrl.rewards.selfcheck:gold_forms", home="llmrl.rewards", base=Path())
    rows = list(islice((p for p in session.tables.train if p.answer is not None), GOLD_ROWS))
    if not rows and session.recipe.data.columns.get("answer") == "":
        return Finding("gold answers score 1", True, 'the rows have no gold (data.columns.answer = ""): the verifier must not need one')
    if not rows:
        return Finding("gold answers score 1", False, "no row has an answer: a verifier that needs one cannot judge anything")
    best: tuple[int, str, list[tuple[Prompt, str, str]]] = (-1, "", [])
    names = list(forms(rows[0].answer, session.recipe.verifier.kwargs))
    for name in [*names, "solution"]:
        said = [p.meta.get("solution") if name == "solution" else forms(p.answer, session.recipe.verifier.kwargs).get(name) for p in rows]
        if not all(isinstance(s, str) for s in said):
            continue
        verdicts = session.scorer.score([(p, str(s)) for p, s in zip(rows, said, strict=True)])
        graded = zip(rows, said, verdicts, strict=True)
        wrong = [(p, str(s), f"{v.score} ({v.status}{': ' + v.detail if v.detail else ''})") for p, s, v in graded if v.score != 1.0]
        if len(rows) - len(wrong) > best[0]:
            best = (len(rows) - len(wrong), name, wrong)
    right, name, wrong = best
    detail = f"{right} of {len(rows)} rows, gold given in the form '{name}'"
    if wrong:
        p, said, verdict = wrong[0]
        detail += f"; row {p.id}: gold {p.answer!r}, given as {said!r}, scores {verdict}"
    return Finding("gold answers score 1", not wrong, detail)


def _arithmetic(session: Session) -> Finding:
    r = session.recipe
    samples = r.rollout.prompts * r.rollout.group
    updates = r.batch.minibatches * r.batch.epochs
    most = session.most_tokens
    longest = session.tables.longest + most if session.environment is None else session.environment.max_tokens or getattr(session.engine, "max_length", 0)
    ok = r.batch.tokens >= longest
    detail = (
        f"{r.rollout.prompts} prompts x {r.rollout.group} samples = {samples} completions a step, {updates} update{'s' if updates > 1 else ''}; at most "
        f"{samples * most:,} tokens a step; {r.steps} steps see {r.steps * r.rollout.prompts / len(session.tables.train):.2f} epochs"
    )
    if not ok:
        detail += f"; batch.tokens = {r.batch.tokens} is less than the longest sequence ({longest}): such a sample gets a micro-batch above the budget"
    return Finding("group arithmetic", ok, detail)


def _memory(session: Session) -> Finding:
    """Weights, gradients and optimizer are exact; activations are an estimate without gradient checkpointing (18 hidden sizes a layer and token)."""
    r, model = session.recipe, session.policy.model
    config = model.config.get_text_config()
    learning = sum(p.numel() for _, p in session.learner.params)
    n, packed, _ = sizes(model)
    n -= learning if r.model.lora else 0
    layers = 2 if r.model.gradient_checkpointing else config.num_hidden_layers
    width = model.dtype.itemsize
    activations = r.batch.tokens * layers * (18 * config.hidden_size + 3 * getattr(config, "intermediate_size", 4 * config.hidden_size)) * width / 1e9
    head = min(r.model.head_chunk, r.batch.tokens) * config.vocab_size * 4 * 3 / 1e9
    there = (torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else _ram()) / 1e9
    own = r.engine.max_staleness > 0 and hasattr(session.engine, "policy")

    def of(strategy: Any, world: int) -> float:
        replica = False if not hasattr(session.engine, "policy") else True if own else None
        return footprint(
            n, bf16=r.model.dtype == "bfloat16", strategy=strategy, world=world, learning=learning if r.model.lora else None,
            reference=session.rule.needs.ref_logp, offload=r.learner.offload and strategy.startswith("zero"), replica=replica, quantized=packed,
        ).device  # fmt: skip

    asked = "ddp" if r.learner.strategy == "auto" else r.learner.strategy
    fixed = of("ddp" if asked == "ddp" else asked, 1)
    spread = ", ".join(f"{s} {of(s, 8):.2f}" for s in ("ddp", *(() if packed else ("zero2", "zero3", "fsdp2"))))
    told = f", {learning / 1e6:.2f}M of them adapters" if r.model.lora else ""
    told += f", {packed / 1e6:.1f}M in 4 bits" if packed else ""
    return Finding(
        "memory estimate", fixed + activations + head < there,
        f"{(n + (learning if r.model.lora else 0)) / 1e6:.1f}M parameters{told}: weights, gradients, optimizer {fixed:.2f} GB + activations about "
        f"{activations:.2f} GB + head chunk {head:.2f} GB (+ key-value cache of the engine) of {there:.0f} GB; on each of 8 ranks, without "
        f"activations: {spread} GB",
    )  # fmt: skip


def _ram() -> float:
    import os

    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _demonstration(session: Session) -> Finding:
    s = demonstration(session.tables.warm[0], session.learner, session.tools)
    chat = session.policy.chat
    return Finding("one demonstration of the warm start", True, f"{chat.show(s.context_ids)}|{chat.show(s.token_ids)}  ({len(s.token_ids)} trained tokens)")


def _as_trained(s: Sample, session: Session) -> str:
    """The sample's text; what stands between << and >> the environment said, and it is not trained."""
    chat = session.policy.chat
    told = chat.show(s.context_ids) + "|<- trained from here|"
    for on, part in groupby(zip(s.token_ids, s.mask or [True] * len(s.token_ids), strict=True), key=lambda pair: pair[1]):
        text = chat.show([token for token, _ in part])
        told += text if on else f"<<{text}>>"
    return f"{told}\n{s.length} tokens of the policy, {len(s.token_ids) - s.length} of the environment; reward {s.reward}, ended: {s.finish}"


def _rollout(session: Session) -> Iterator[Finding]:
    """Two groups through collect, verifier and credit, and the learner's log-probs against the engine's."""
    r = session.recipe
    io = RolloutIO(
        session.engine, session.scorer, session.policy.chat, session.memory, session.sampling, r.rollout.group, (r.seed, 0),
        more_prompts=session.stream.take, environment=session.environment,
    )  # fmt: skip
    groups = asyncio.run(session.rule.collect(session.stream.take(2), io))  # type: ignore[arg-type]
    samples: list[Sample] = [s for g in groups for s in g.samples]
    unjudged = sum(s.verdict is not None and s.verdict.score is None for s in samples)  # texts of other roles carry no verdict
    rewards = [s.reward for s in samples if s.reward is not None]
    told = "; ".join(f"{s.text.strip()[:60]!r} -> {s.reward}" for s in samples[:3])
    mean = sum(rewards) / max(1, len(rewards))
    yield Finding("a rollout", unjudged == 0, f"{len(samples)} samples of {len(groups)} prompts, mean reward {mean:.2f}, {unjudged} unjudged: {told}")
    if session.environment is not None:
        yield Finding("an episode", True, _as_trained(max(samples, key=lambda s: len(s.token_ids)), session))
    metrics: dict[str, float] = {}
    with torch.no_grad():
        for batch in pack(samples, [torch.zeros(s.length) for s in samples], tokens=r.batch.tokens):
            batch = batch.to(session.policy.device)
            out = session.learner.forward(batch, session.rule.needs)
            for name, value in token_metrics(batch, out, session.rule.loss).items():
                metrics[name] = max(metrics.get(name, value), value)
    try:
        check_gap(session, metrics, 0)
        yield Finding("learner and engine agree", True, f"max |logp - behavior_logp| = {metrics.get('gap_max', 0.0):.3g} nats (limit {gap_limit(session):g})")
    except RunFailed as e:
        yield Finding("learner and engine agree", False, str(e))

"""Training a reward model: Bradley-Terry on preference pairs, on the packed batches and the optimizer of the learner.

l(y_w, y_l | x) = -log sigmoid(R(x, y_w) - R(x, y_l)), mean over the pairs of an update.  Source: Bradley and Terry, Biometrika 39 (1952) 324-345, in
the form of arXiv:1909.08593 eq. 1. R(x, y) is a linear head on the last hidden state at the end token of y: of a causal LM without its vocabulary.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmrl import __version__
from llmrl.batch import TokenBatch, pack
from llmrl.checkpoint import write_atomic
from llmrl.config import LoadedRecipe, load_sections
from llmrl.learner import Learner, learning_rate
from llmrl.metrics import wilson
from llmrl.models import Policy
from llmrl.preference_pairs import Pair, PairTable, read_pairs, split_pairs
from llmrl.recipe import Model, Natural, Optim, Positive, Run, _Section
from llmrl.records import InputError
from llmrl.reward_head import Item, PackedScore, reward_policy, save_reward_model, scored, template_with_end
from llmrl.session import check_run_folder, make_run_folder
from llmrl.strategy import Replicated


class Pairs(_Section):
    path: str
    """Preference pairs (.jsonl, .parquet, .csv, hub:NAME; see llmrl.preference_pairs), a trace file of `llmrl sample`, or a run directory."""
    split: str | None = None
    columns: dict[Literal["prompt", "messages", "chosen", "rejected"], str] = Field(default_factory=dict)
    """Which column holds what, where the names differ."""
    limit: Positive | None = None
    """Use the first pairs only."""
    holdout: Positive = 200
    """Pairs set aside for evaluation, whole prompts at a time."""
    max_tokens: Positive | None = None
    """Longest conversation, in tokens; None = as many as the model has positions."""
    gap: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Traces: two samples of a prompt make a pair where their scores are so far apart."""
    per_prompt: Positive = 4
    """Traces: pairs of a prompt, at most."""
    on_bad: Literal["refuse", "drop"] = "refuse"
    """What to do with rows that are no pair, or too long; dropped ones are counted."""


class RewardOptim(Optim):
    lr: Annotated[float, Field(gt=0)] = 1e-5


class RewardBatch(_Section):
    pairs: Positive = 64
    """Pairs an update, over all ranks."""
    tokens: Positive = 8192
    """Packed input tokens a micro-batch; the two responses of a pair stay together and share their prompt."""


class RewardEval(_Section):
    every: Natural = 0
    """Updates between evaluations; 0 = only before and after."""
    bins: Positive = 10
    """Of the reliability table, over confidences from 0.5 to 1."""


class RewardRecipe(_Section):
    seed: Natural = 0
    epochs: Positive = 1
    """Passes over the pairs."""
    center: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of (R(x, y_w) + R(x, y_l))^2, which keeps scores around 0 (arXiv:2312.09244 section 2); pairs alone leave their level open."""
    run: Run = Run()
    model: Model
    """The backbone: any causal LM."""
    pairs: Pairs
    optim: RewardOptim = RewardOptim()
    batch: RewardBatch = RewardBatch()
    eval: RewardEval = RewardEval()


def load_reward_recipe(path: str | Path, overrides: Iterable[str] = ()) -> LoadedRecipe:
    """As config.load_recipe, for the sections of `RewardRecipe`."""
    return LoadedRecipe(*load_sections(RewardRecipe, path, overrides, ("model.path", "model.chat_template", "pairs.path"), _cross_checks))  # type: ignore[arg-type]


def _cross_checks(recipe: RewardRecipe) -> list[tuple[str, str]]:
    found = []
    if recipe.model.lora is not None:
        found.append(("model.lora", "a reward model is trained whole: a sequence-classification folder has no adapters; leave it out"))
    if recipe.run.trackers:
        found.append(("run.trackers", "llmrl reward writes metrics.jsonl only; leave it out"))
    return found


# ---------------------------------------------------------------- loss and measures


def bradley_terry(chosen_N: Tensor, rejected_N: Tensor, center: float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected) + center (chosen + rejected)^2, one number a pair, in nats."""
    loss_N = -torch.nn.functional.logsigmoid(chosen_N - rejected_N)
    return loss_N + center * (chosen_N + rejected_N).square() if center else loss_N


@dataclass(frozen=True)
class Calibration:
    """How often the preferred response scores higher, and whether sigmoid(difference) is the share with which it does."""

    pairs: int
    accuracy: float
    """Ties count half."""
    low: float
    high: float
    """95 % Wilson interval."""
    loss_nats: float
    ece: float
    """sum over bins of n_b / n |accuracy_b - confidence_b|; confidence = sigmoid(|difference|)."""
    margin: float
    """Mean difference, chosen minus rejected."""
    table: list[dict[str, Any]]
    """Of each bin that is not empty: low, high, n, confidence, accuracy."""


def calibration(differences: Sequence[float], bins: int = 10) -> Calibration:
    """Of R(x, y_w) - R(x, y_l) on pairs that were not trained on. ECE: arXiv:1706.04599 section 2, bins of equal width from 0.5 to 1."""
    d = torch.tensor(differences, dtype=torch.float64)
    n, right, confidence = len(d), (d > 0).double() + 0.5 * (d == 0).double(), d.abs().sigmoid()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table, ece = [], 0.0
    for b in range(bins):
        own = place == b
        if (k := int(own.sum())) > 0:
            told, got = float(confidence[own].mean()), float(right[own].mean())
            ece += k / n * abs(told - got)
            table.append({"low": 0.5 + b / (2 * bins), "high": 0.5 + (b + 1) / (2 * bins), "n": k, "confidence": told, "accuracy": got})
    low, high = wilson(float(right.sum()), n)
    loss = float(-torch.nn.functional.logsigmoid(d).mean())
    return Calibration(n, float(right.mean()), low, high, loss, ece, float(d.mean()), table)


# ---------------------------------------------------------------- training


@dataclass
class Task:
    """Pairs as token ids: (context, chosen, rejected), train and held out."""

    train: list[tuple[Item, Item]]
    held_out: list[tuple[Item, Item]]
    dropped: list[tuple[str, str]]
    template_agrees: float
    """Share of the first pairs whose ids under the folder's chat template are those that are trained on."""


def _read(loaded: LoadedRecipe) -> PairTable:
    r: Any = loaded.recipe
    return read_pairs(
        r.pairs.path, base=loaded.base, split=r.pairs.split, columns={str(k): v for k, v in r.pairs.columns.items()}, limit=r.pairs.limit, gap=r.pairs.gap,
        per_prompt=r.pairs.per_prompt, seed=r.seed, on_bad=r.pairs.on_bad,
    )  # fmt: skip


def check_pairs(loaded: LoadedRecipe) -> dict[str, int]:
    """Counts {train, held_out, dropped} of a recipe's pairs; loads no model. Raises InputError where a row is bad."""
    r: Any = loaded.recipe
    found = _read(loaded)
    train, held = split_pairs(found.pairs, r.pairs.holdout, r.seed)
    return {"train": len(train), "held_out": len(held), "dropped": len(found.dropped)}


def read_task(loaded: LoadedRecipe, policy: Policy) -> Task:
    """The pairs, tokenised and checked against the limits. Raises InputError naming rows."""
    r: Any = loaded.recipe
    chat, dropped, found = policy.chat, [], _read(loaded)
    limit = min(x for x in (r.pairs.max_tokens, getattr(policy.model.config.get_text_config(), "max_position_embeddings", None), 1 << 30) if x)
    ids: dict[str, tuple[Item, Item]] = {}
    for p in found.pairs:
        context = chat.prompt_ids(p.messages)
        ids[p.id] = (context, chat.completion_ids(p.chosen)), (context, chat.completion_ids(p.rejected))
        longest = max(len(c) + len(t) for c, t in ids[p.id])
        strange = chat.unknown("".join(m["content"] for m in p.messages) + p.chosen + p.rejected)
        if longest > limit or strange is not None:
            dropped.append((p.id, f"{longest} tokens; the limit is {limit}" if strange is None else f"the tokenizer has no token for {strange!r}"))
    if dropped and r.pairs.on_bad == "refuse":
        told = [f"{len(dropped)} of {len(found.pairs)} pairs cannot be used:", *(f"  {w}: {why}" for w, why in dropped[:5])]
        raise InputError("\n".join([*told, 'Mend them, raise pairs.max_tokens, or set pairs.on_bad = "drop" to go on without them.']))
    bad = {name for name, _ in dropped}
    train, held = split_pairs([p for p in found.pairs if p.id not in bad], r.pairs.holdout, r.seed)
    agrees = [_same_ids(policy, p, ids[p.id][0]) for p in train[:64]]
    return Task([ids[p.id] for p in train], [ids[p.id] for p in held], [*found.dropped, *dropped], sum(agrees) / len(agrees))


def _same_ids(policy: Policy, pair: Pair, item: Item) -> bool:
    tokenizer = policy.chat.tokenizer
    messages = [*pair.messages, {"role": "assistant", "content": pair.chosen}]
    text = tokenizer.apply_chat_template(messages, chat_template=template_with_end(tokenizer), tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"] == [*item[0], *item[1]]


class RewardTrainer:
    """One optimizer, one model. Over several processes (ddp) each takes its part of an update's pairs; gradients are summed."""

    def __init__(self, policy: Policy, accelerator: Any, *, tokens: int, center: float = 0.0):
        held = Replicated(policy, 1, accelerator.num_processes)
        self.module = held.module = PackedScore(policy)  # type: ignore[assignment]
        self.learner = Learner(policy, accelerator, strategy=held)
        self.rank, self.world, self.tokens, self.center = accelerator.process_index, accelerator.num_processes, tokens, center

    def _batches(self, pairs: Sequence[tuple[Item, Item]]) -> Iterator[tuple[TokenBatch, Tensor, Tensor]]:
        """(micro-batch, places of the chosen, places of the rejected in it)"""
        samples = [scored(str(2 * i + k), item) for i, pair in enumerate(pairs) for k, item in enumerate(pair)]
        blank = [torch.zeros(len(s.token_ids)) for s in samples]
        for batch in pack(samples, blank, tokens=self.tokens, groups=[i // 2 for i in range(len(samples))], whole_groups=True):
            place = {i: k for k, i in enumerate(batch.sample_index)}
            first = [i for i in batch.sample_index if i % 2 == 0]
            at = [torch.tensor([place[i + k] for i in first], device=self.learner.policy.device) for k in (0, 1)]
            yield batch.to(self.learner.policy.device), at[0], at[1]

    def update(self, pairs: Sequence[tuple[Item, Item]], lr: float) -> dict[str, float]:
        """One step on these pairs, those of all ranks: {loss_nats (Bradley-Terry alone), accuracy, margin, lr, grad_norm}."""
        sums = torch.zeros(3, dtype=torch.float64)
        for batch, chosen, rejected in self._batches(pairs[self.rank :: self.world]):
            score_S = self.module(batch)
            w, l = score_S[chosen], score_S[rejected]  # noqa: E741
            self.learner.backward(bradley_terry(w, l, self.center).sum() / len(pairs))
            d = (w - l).detach().double().cpu()
            sums += torch.stack([-torch.nn.functional.logsigmoid(d).sum(), ((d > 0).double() + 0.5 * (d == 0)).sum(), d.sum()])
        norm = self.learner.update(lr)
        loss, right, margin = (self.learner.all_sum(sums) / len(pairs)).tolist()
        return {"loss_nats": loss, "accuracy": right, "margin": margin, "lr": lr, "grad_norm": norm}

    @torch.no_grad()
    def differences(self, pairs: Sequence[tuple[Item, Item]]) -> list[float]:
        """R(x, y_w) - R(x, y_l) of each pair, of all ranks' parts; in no particular order."""
        model = self.learner.policy.model
        model.eval()
        own: list[float] = []
        for batch, chosen, rejected in self._batches(pairs[self.rank :: self.world]):
            score_S = self.module(batch)
            own += (score_S[chosen] - score_S[rejected]).tolist()
        model.train()
        return [d for part in self.learner.gather(own) for d in part]


def train_reward(loaded: LoadedRecipe, *, overwrite: bool = False, each: Callable[[dict[str, Any], int], None] = lambda row, steps: None) -> dict[str, Any]:
    """Runs a reward recipe; writes RUN_DIR/{manifest.json, metrics.jsonl, summary.json, reward_model/} and returns what summary.json holds.

    each: called with every row of metrics.jsonl and the number of updates. Raises InputError (refused) or RunFailed (stopped).
    """
    from accelerate import Accelerator

    r: Any = loaded.recipe
    began, folder = time.perf_counter(), Path(r.run.dir)
    check_run_folder(loaded, resume=False, overwrite=overwrite)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    policy = reward_policy(r.model, base=loaded.base, seed=r.seed, device=accelerator.device)
    task = read_task(loaded, policy)
    trainer = RewardTrainer(policy, accelerator, tokens=r.batch.tokens, center=r.center)
    trainer.learner.start(r.optim)
    main = accelerator.process_index == 0
    if main:
        make_run_folder(loaded, overwrite=overwrite)
        told = {"llmrl": __version__, "reward_recipe": str(loaded.path), "recipe": r.model_dump(mode="json"), "plugins": {}, "seed": r.seed}
        write_atomic(folder / "manifest.json", json.dumps(told, indent=2) + "\n")
    steps = r.epochs * -(-len(task.train) // r.batch.pairs)
    measure = partial(_measured, trainer, task, r.eval.bins)
    before = now = measure()
    rows: list[dict[str, Any]] = []

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        each(row, steps)
        if main:
            with (folder / "metrics.jsonl").open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")

    write({"step": 0, "eval/accuracy": before.accuracy, "eval/ece": before.ece, "eval/loss_nats": before.loss_nats})
    for step, pairs in enumerate(_updates(task.train, r.batch.pairs, r.epochs, r.seed)):
        row: dict[str, Any] = {"step": step + 1, **trainer.update(pairs, learning_rate(r.optim, step, steps))}
        if step + 1 == steps or (r.eval.every and (step + 1) % r.eval.every == 0):
            now = measure()
            row |= {"eval/accuracy": now.accuracy, "eval/ece": now.ece, "eval/loss_nats": now.loss_nats}
        write(row)
    summary = {
        "held_out": asdict(now), "before": asdict(before), "updates": steps, "train_pairs": len(task.train), "dropped": len(task.dropped),
        "dropped_rows": [f"{where}: {why}" for where, why in task.dropped[:20]], "template_agrees": task.template_agrees,
        "seconds": round(time.perf_counter() - began, 2), "run_dir": str(folder), "model": str(folder / "reward_model"),
    }  # fmt: skip
    if main:
        save_reward_model(policy, folder / "reward_model")
        write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    accelerator.wait_for_everyone()
    return summary


def _measured(trainer: RewardTrainer, task: Task, bins: int) -> Calibration:
    return calibration(trainer.differences(task.held_out), bins)


def _updates(pairs: Sequence[tuple[Item, Item]], size: int, epochs: int, seed: int) -> Iterator[list[tuple[Item, Item]]]:
    """The pairs of each update: every epoch goes through all of them in another order."""
    for epoch in range(epochs):
        order = list(range(len(pairs)))
        random.Random(f"epoch/{seed}/{epoch}").shuffle(order)
        for a in range(0, len(order), size):
            yield [pairs[i] for i in order[a : a + size]]

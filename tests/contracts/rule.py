"""What every rule must hold, shipped or your own: run it on yours before you train with it.

    from tests.contracts.rule import Trial, check_rule
    def test_mine(tmp_path):
        with Trial(tmp_path) as trial:
            check_rule(trial, "./mine.py:mine", {"coef": 0.1}, base=Path(__file__).parent)

A trial is a tiny model over the alphabet below, 12 prompts and a verifier that finds some samples right, some wrong and some beyond judging. The
checks: (1) the gradient is the same however the update is cut into micro-batches, (2) in whatever order prompts and their samples stand, (3) on one
rank or on two, nor does what an environment might have said between tokens change it; (4) samples do not depend on the rank that makes them;
(5) a sample that could not be judged moves nothing by its policy weight; (6) credit does not change its state in place, and a run resumed
from a JSON copy of the rule's state and memory gives the same advantages; (7) two steps of the tiny model end with finite metrics and weights.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from llmrl.batch import Outputs, evaluate_terms, global_denominators, pack, seg_tokens
from llmrl.compose import build_rule
from llmrl.config import load_recipe
from llmrl.data import PromptStream
from llmrl.learner import numbers_of
from llmrl.memory import Memory
from llmrl.recipe import RulePlugin
from llmrl.records import Group, Prompt, Sample, Verdict
from llmrl.rollout import RolloutIO, philox
from llmrl.rules.base import Rule
from llmrl.session import Session, open_session
from llmrl.step import give_credit, run_step, view_of

ALPHABET = "0123456789+-*=;#() !@~"
RECIPE = f"""
seed = 5
steps = 8
model = {{ path = "tiny", tiny = {{ hidden = 32, layers = 1, heads = 2, ffn = 32, max_length = 512, alphabet = "{ALPHABET}" }} }}
data = {{ path = "./rows.jsonl", holdout = 2 }}
eval = {{ rows = 2, every = 0 }}
rollout = {{ prompts = 4, group = 4, max_new_tokens = 12 }}
rule = {{ use = "grpo" }}
verifier = {{ use = "exact" }}
scoring = {{ workers = 1 }}
batch = {{ tokens = 120, epochs = 2 }}
optim = {{ lr = 1e-3 }}
"""


class Parity:
    """Right iff the text's characters' codes add up to an even number; texts of 3 and 8 characters cannot be judged."""

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        return [Verdict(None, "timeout") if len(t) in (3, 8) else Verdict(float(sum(map(ord, t)) % 2 == 0), answer=t[:1]) for _, t in items]

    def stats(self) -> dict[str, float]:
        return dict.fromkeys(("ok", "no_answer", "timeout", "error", "queue_s", "run_s"), 0.0)

    def close(self) -> None:
        pass


class Trial:
    """The tiny world that rules are tried in; each check starts from the same weights."""

    def __init__(self, folder: Path) -> None:
        rows = [
            {"id": f"q{i}", "prompt": f"{i}+{i * 7 % 5}=", "answer": str(i + i * 7 % 5), "solution": f"{i}#{i}", "task": "ab"[i % 2]}
            | {"kind": ("open", "pref", "verif")[i % 3], "candidates": [f"{i}#{i}", "#1", "2"], "ranking": [2, 1, 0]}
            for i in range(12)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "trial.toml").write_text(RECIPE)
        self.session: Session = open_session(load_recipe(folder / "trial.toml"))
        self.session.scorer.close()
        self.session.scorer = Parity()  # type: ignore[assignment]
        self.weights = copy.deepcopy(self.session.policy.model.state_dict())

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.session.close()

    def begin(self, rule: Rule) -> Session:
        """The session at the start of a run of this rule."""
        s = self.session
        s.policy.model.load_state_dict(self.weights)
        s.learner.version = 0
        s.learner.start(s.recipe.optim)
        if rule.needs.ref_logp:
            s.learner.freeze_reference()
        s.engine.load_weights(0, None)
        s.rule, s.credit_state, s.memory = rule, rule.credit.init(), Memory()
        s.stream = PromptStream(s.tables.train, seed=5)
        return s

    def collect(self, rule: Rule, prompts: Sequence[Prompt], step: int = 1, *, of: Sequence[Prompt] = ()) -> list[Group]:
        """The rule's rollouts with the weights as they are. of: the prompts of all ranks, where `prompts` are those of one."""
        s = self.session
        io = RolloutIO(
            s.engine, s.scorer, s.policy.chat, Memory(), s.sampling, s.recipe.rollout.group, (s.recipe.seed, step), steps=8, step_prompts=of,
            environment=s.environment,
        )  # fmt: skip
        return asyncio.run(rule.collect(prompts, io))  # type: ignore[arg-type]


def check_rule(trial: Trial, ref: str, keys: dict[str, Any] | None = None, *, base: Path | None = None) -> None:
    """All checks of a rule by its reference and keywords, as a recipe's [rule] gives them. Raises AssertionError saying which failed."""

    def make() -> Rule:
        return build_rule(RulePlugin.model_validate({"use": ref, **(keys or {})}), base or Path())

    for check in (cuts_orders_and_ranks, samples_do_not_know_their_rank, two_steps_and_resume):
        check(trial, make)


# ---------------------------------------------------------------- the checks


def cuts_orders_and_ranks(trial: Trial, make: Callable[[], Rule]) -> None:
    """(1), (2), (3) and (5), on credit and losses in fp64 with made-up log-probs; no model."""
    rule = make()
    session = trial.begin(rule)
    groups = trial.collect(rule, session.stream.take(4))
    leaves = {s.id: _numbers(s, rule) for g in groups for s in g.samples}
    want = _gradients(rule, groups, leaves, tokens=10**6)
    for tokens in (1, 40, 100):
        _same(_gradients(rule, groups, leaves, tokens=tokens), want, f"micro-batches of {tokens} tokens")
    turned = [Group(g.prompt, g.samples[::-1]) for g in groups[::-1]]
    _same(_gradients(rule, turned, leaves, tokens=60), want, "prompts and samples in reverse order")
    for at in (1, 2):
        parts = lockstep(
            [lambda ranks, own=own: _gradients(rule, own, leaves, tokens=60, ranks=ranks) for own in (groups[:at], groups[at:])]  # type: ignore[misc]
        )
        _same({k: v for part in parts for k, v in part.items()}, want, f"two ranks, {at} and {len(groups) - at} prompts")
    talked = [Group(g.prompt, [_interrupted(s) for s in g.samples]) for g in groups]
    _same(_gradients(rule, talked, leaves, tokens=60), want, "an environment's tokens, which do not count, between those of the policy")
    names = {t.weight for t in rule.loss}
    for s in (s for g in groups for s in g.samples):
        if s.reward is None and not any(s.weights.get(n, 0.0) for n in names):
            assert want[s.id].abs().max() == 0.0, f"sample {s.id} was not judged and feeds no term, yet it has a gradient"


def samples_do_not_know_their_rank(trial: Trial, make: Callable[[], Rule]) -> None:
    """(4): four prompts at once, or in two calls as on two ranks."""
    rule = make()
    prompts = trial.begin(rule).stream.take(4)
    if getattr(rule.collect, "func", rule.collect).__name__ == "dynamic_groups":
        return  # refills by what the rank has seen

    def told(groups: Sequence[Group]) -> dict[str, Any]:
        return {s.id: (s.token_ids, s.context_ids, s.reward, s.weights, sorted(s.streams)) for g in groups for s in g.samples}

    whole, parts = trial.collect(rule, prompts), [g for k in (0, 2) for g in trial.collect(rule, prompts[k : k + 2], of=prompts)]
    assert told(whole), "the rule made no sample"
    assert told(whole) == told(parts), "a sample depends on the prompts beside it"
    for a, b in zip(whole, parts, strict=True):
        for s, other in zip(a.samples, b.samples, strict=True):
            for name, values in s.streams.items():  # scores come from matrix products of another shape
                told_of = f"stream {name} of {s.id} depends on the rank"
                assert_close(torch.tensor(other.streams[name]), torch.tensor(values), atol=1e-4, rtol=1e-4, equal_nan=True, msg=told_of)


def two_steps_and_resume(trial: Trial, make: Callable[[], Rule]) -> None:
    """(6) and (7)."""
    rule = make()
    session = trial.begin(rule)
    run_step(session, 1)
    kept = {
        "weights": copy.deepcopy(session.policy.model.state_dict()), "version": session.learner.version, "credit": _through_json(session.credit_state),
        "memory": json.loads(json.dumps(session.memory.state_dict())), "stream": session.stream.position,
    }  # fmt: skip
    groups, adv, row = run_step(session, 2)
    strange = {k: v for k, v in row.items() if v is not None and not math.isfinite(v)}
    assert not strange, f"metrics of step 2 that are not finite: {strange}"
    assert all(p.isfinite().all() for p in session.policy.model.parameters()), "weights are not finite after step 2"

    again = trial.begin(make())
    again.policy.model.load_state_dict(kept["weights"])
    again.learner.version, again.credit_state, again.stream.position = kept["version"], kept["credit"], kept["stream"]
    again.engine.load_weights(kept["version"], None)
    again.memory.load_state_dict(kept["memory"])
    groups_2, adv_2, _ = run_step(again, 2)
    told = [[(s.id, s.token_ids, s.reward) for g in gs for s in g.samples] for gs in (groups, groups_2)]
    assert told[0] == told[1], "after a resume from JSON the rule makes other samples"
    assert_close(torch.cat(adv_2), torch.cat(adv), atol=0, rtol=0, msg="after a resume from JSON the advantages differ")


# ---------------------------------------------------------------- the parts


class Ranks:
    """all_sum and gather of one of several threads that meet at each, as ranks do."""

    def __init__(self, me: int, box: list[Any], barrier: threading.Barrier) -> None:
        self.me, self.box, self.barrier = me, box, barrier

    def gather(self, value: Any) -> list[Any]:
        self.box[self.me] = value
        self.barrier.wait()
        together = list(self.box)
        self.barrier.wait()
        return together

    def all_sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.gather(x)).sum(0)


ALONE = SimpleNamespace(all_sum=lambda x: x, gather=lambda x: [x])


def lockstep(jobs: Sequence[Callable[[Any], Any]]) -> list[Any]:
    """job(ranks) of every job, each in a thread of its own."""
    barrier, box = threading.Barrier(len(jobs), timeout=20), [None] * len(jobs)
    out: list[Any] = [None] * len(jobs)
    failed: list[BaseException] = []

    def run(k: int) -> None:
        try:
            out[k] = jobs[k](Ranks(k, box, barrier))
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(len(jobs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    if failed:
        raise next((e for e in failed if not isinstance(e, threading.BrokenBarrierError)), failed[0])
    return out


def _numbers(sample: Sample, rule: Rule) -> tuple[Tensor, Tensor]:
    """Made-up (logp, entropy) of a sample's tokens, fp64; old and reference log-probs near them go into its streams."""
    draw = philox(("contract", sample.id))
    n = sample.length
    old = -draw.random(n) * 2 - 0.05
    sample.streams["old_logp"] = sample.spread(old.tolist())
    if rule.needs.ref_logp:
        sample.streams["ref_logp"] = sample.spread((old + 0.2 * draw.standard_normal(n)).tolist())
    if rule.needs.old_entropy:
        sample.streams["old_entropy"] = sample.spread((draw.random(n) * 2).tolist())
    if rule.needs.hidden:
        made = numbers_of(rule.needs.hidden, torch.tensor(draw.standard_normal((n, 8)) + 1.0, dtype=torch.float32))
        sample.streams |= {name: sample.spread(values) for name, values in made.items()}
    return torch.tensor(old + 0.1 * draw.standard_normal(n)), torch.tensor(draw.random(n))


def _interrupted(sample: Sample) -> Sample:
    """The sample with three tokens that do not count (Sample.mask) put into its middle, as an environment's reply."""
    at = len(sample.token_ids) // 2
    if not at or sample.mask is not None:
        return sample
    mask = [True] * at + [False] * 3 + [True] * (len(sample.token_ids) - at)
    blank = replace(sample, token_ids=[0] * len(mask), behavior_logp=None, mask=mask)  # only for its spread()
    streams = {name: blank.spread(values) for name, values in sample.streams.items()}
    return replace(
        sample, token_ids=blank.spread(sample.token_ids, 4), behavior_logp=sample.behavior_logp and blank.spread(sample.behavior_logp), mask=mask,
        weights=dict(sample.weights), streams=streams,
    )  # fmt: skip


def _gradients(
    rule: Rule, groups: Sequence[Group], leaves: dict[str, tuple[Tensor, Tensor]], *, tokens: int, ranks: Any = ALONE
) -> dict[str, Tensor]:  # fmt: skip
    """Sample id -> gradient of the whole update's loss with respect to its log-probs."""
    samples = [s for g in groups for s in g.samples]
    state = rule.credit.init()
    before = json.dumps(state, default=repr)
    adv, _ = give_credit(rule, samples, view_of(samples, ranks, 12), state)
    assert json.dumps(state, default=repr) == before, "credit changed its state in place; return a new one"
    assert all(a.isfinite().all() for a in adv), "an advantage is not finite"
    group_of = [k for k, g in enumerate(groups) for _ in g.samples]
    denominators = global_denominators(samples, rule.loss, max_new_tokens=12, groups=len(groups), all_sum=ranks.all_sum)
    logp = {s.id: leaves[s.id][0].clone().requires_grad_() for s in samples}
    for batch in pack(samples, adv, tokens=tokens, groups=group_of, whole_groups=rule.needs.whole_groups):
        own = [samples[i].id for i in batch.sample_index]
        out = Outputs(
            torch.cat([logp[i] for i in own]), batch.stream["old_logp"].double(), batch.stream.get("ref_logp"), torch.cat([leaves[i][1] for i in own])
        )
        assert len(seg_tokens(out.logp_T.detach(), batch)) == len(own)
        loss, _ = evaluate_terms(rule.loss, batch, out, denominators)
        assert bool(loss.isfinite()), "the loss is not finite"
        if loss.requires_grad:
            loss.backward()
    return {s.id: torch.zeros_like(logp[s.id]) if logp[s.id].grad is None else logp[s.id].grad for s in samples}  # type: ignore[misc]


def _same(got: dict[str, Tensor], want: dict[str, Tensor], how: str) -> None:
    assert got.keys() == want.keys(), f"{how}: other samples"
    for key in want:
        assert_close(got[key], want[key], atol=1e-7, rtol=1e-5, msg=lambda m, key=key: f"{how}: sample {key} gets another gradient. {m}")


def _through_json(state: Any) -> Any:
    """A copy through JSON, but for tensors, which a checkpoint keeps beside it."""
    if isinstance(state, dict):
        return {k: _through_json(v) for k, v in state.items()}
    return state.clone() if isinstance(state, Tensor) else json.loads(json.dumps(state))

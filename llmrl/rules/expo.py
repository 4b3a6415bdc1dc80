"""ExPO, self-explanation policy optimisation (Zhou, Li, Zhang, Leqi; arXiv:2507.02834): rules `expo` (ExP-GRPO) and `exp_dpo`.

A problem that no sample of a group solves gives GRPO nothing. Here the policy is shown the question and the right answer and explains how
to get there; training then uses that text without showing the answer. Templates, filters, normalisation and schedules are OUR CHOICE: the
paper's are not public (docs/expo.md says which is whose).

Metrics (rule/...): explained/accepted_share (accepted of wanted explanations), explained/<reason>_share (of the texts sampled for them: contradicts =
a wrong final answer, hint, short, length, unjudged), explained/age_steps, all_wrong_share (groups without a right sample), nll/explanation_nats and
nll/own_nats (mean per token given the question alone: explanations under the weights that sample now, the rollouts under those that
sampled them), logit_grad_ratio (explanation term over policy term: norms of the gradient with respect to the sampled tokens' own logits,
c_t (1 - p_t) with c_t the token's coefficient in the loss. The norms over all weights would cost a second backward pass, so they are not taken).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from llmrl import losses
from llmrl.credit import Credit
from llmrl.records import Group, InputError, Prompt, Sample
from llmrl.rollout import RolloutIO, sample_groups
from llmrl.rules import explanations as x
from llmrl.rules import grpo as family
from llmrl.rules.base import Needs, Rule, Term
from llmrl.templates import read_template

Norm = Literal["mean", "sum"]
ANSWER = "\n\nThe final answer is $\\boxed{{answer}}$."
"""ans(a*) for chat models on mathematics."""


def expo(
    *, base: Path, beta: float = 0.04, norm: Norm = "mean", refresh: Literal["always", "once"] | Annotated[int, Ge(1)] = "always",
    anneal: Literal["none", "linear"] = "none", explanations: int = 1, only_all_wrong: bool = False, policy: bool = True, in_group: bool = False,
    source: Literal["self", "solution"] = "self", shuffle_answers: bool = False, template: str = "chat", answer_format: str = ANSWER,
    marks: tuple[str, ...] = x.MARKS, cut: Literal["sentence", "mark"] = "sentence", hints: tuple[str, ...] = x.HINTS, min_tokens: int = 20,
    resample: int = 3, low: float = 0.2, high: float = 0.2, std_eps: float = 1e-6, kl: float = 0.0, kl_form: family.KL = "k3",
    mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """ExP-GRPO: grpo plus a small likelihood term on self-explanations y~ = c~ + ans(a*), given the question alone.

    loss = grpo - beta * (1/B) sum over the B prompts of NORM_t log pi(y~_t | q, y~_<t).  arXiv:2507.02834, ExP-GRPO objective (eq. 2-3 of docs/expo.md).
    Differs from grpo: (1) that term. An explanation is no member of its group: no reward, advantage, ratio or clip. beta = 0 is grpo.
    beta 0.04 is the paper's best; it is neither a KL coefficient nor a DPO temperature. OUR CHOICE: norm "mean" over tokens ("sum" is the literal
    reading), `refresh` at each visit ("once", or after so many steps), one explanation a prompt, `anneal` (linear: weight 1 at the first step, 1/steps
    at the last), the filters (rules/explanations.py). A prompt without an accepted explanation lowers the term. only_all_wrong: explain only where no
    sample is right.
    Comparisons: source="solution" is GRPO SFT-GT-CoT; policy=False ExP-SFT (rollouts stay, for the metrics); shuffle_answers, a control, shows another
    prompt's answer as right; in_group=True, not of the paper, makes the explanation a rewarded member of the group instead of the term.
    marks, cut, answer_format: where the final-answer statement begins, and what is put in its place. For the tiny model: template = "tiny",
    marks = ["#"], cut = "mark", answer_format = "#{answer}". kl, kl_form, low, high, std_eps, mask_truncated: as in grpo.
    """
    if beta < 0 or explanations < 1:
        raise ValueError(f"beta = {beta} must be at least 0 and explanations = {explanations} at least 1")
    plain = family.grpo(low=low, high=high, std_eps=std_eps, kl=kl, kl_form=kl_form, mask_truncated=mask_truncated)
    if beta == 0 and not in_group and policy:
        return plain
    how = x.Explainer(
        read_template(template, kind="expo", fields=("answer",), base=base, needs=("question", "answer")), answer_format, source, marks, cut, hints,
        min_tokens, resample, shuffle_answers,
    )  # fmt: skip
    collect = partial(
        explained_groups, how=how, n=explanations, refresh=refresh, anneal=anneal == "linear", only_all_wrong=only_all_wrong, in_group=in_group,
        mask_truncated=mask_truncated, ratio=partial(_grad_ratio, beta=beta, norm=norm, std_eps=std_eps) if policy and not in_group else None,
    )  # fmt: skip
    over, budget = ("sample", None) if norm == "mean" else ("fixed", 1)
    term = Term(losses.ce(), weight="explained", over=over, budget=budget, count="groups", coef=beta, name="explained")  # type: ignore[arg-type]
    return replace(plain, loss=(*plain.loss[0 if policy else 1 :], *(() if in_group else (term,))), collect=collect)


async def explained_groups(
    prompts: Sequence[Prompt], io: RolloutIO, *, how: x.Explainer, n: int, refresh: str | int, anneal: bool, only_all_wrong: bool, in_group: bool,
    mask_truncated: bool, ratio: Any,
) -> list[Group]:  # fmt: skip
    """The default collect, then explanations of the prompts, which join their groups with the weight "explained" alone."""
    groups = await sample_groups(prompts, io, mask_truncated=mask_truncated)
    all_wrong = [not any(s.reward is not None and s.reward > x.RIGHT for s in g.samples) for g in groups]
    io.note("all_wrong_share", sum(all_wrong), len(groups))
    wanted = [g for g, wrong in zip(groups, all_wrong, strict=True) if wrong or not only_all_wrong]
    found = await _explanations(how, [g.prompt for g in wanted], io, n, refresh)
    weight = (1.0 - (io.step - 1) / max(1, io.steps) if anneal else 1.0) / n
    made = [_sample(g, m, e, {"policy": 1.0} if in_group else {"explained": weight}, io) for g, own in zip(wanted, found, strict=True) for m, e in own]
    logp = io.score([s.context_ids for s in made], [s.token_ids for s in made])
    own = [s for g in groups for s in g.samples if s.behavior_logp is not None]
    _note_mean(io, "nll/explanation_nats", -sum(map(sum, logp)), sum(map(len, logp)))
    _note_mean(io, "nll/own_nats", -sum(sum(s.behavior_logp or ()) for s in own), sum(len(s.token_ids) for s in own))
    if ratio is not None and (r := ratio(groups, [s.weights["explained"] for s in made], logp)) is not None:
        io.note("logit_grad_ratio", r)
    at = {g.prompt.visit_id: g for g in groups}
    for s in made:
        if in_group:
            s.reward, s.cohort = 1.0, str(s.parent)
        at[str(s.parent)].samples.append(s)
    return groups


def _sample(group: Group, m: int, e: x.Explanation, weights: dict[str, float], io: RolloutIO) -> Sample:
    """The explanation behind the plain question: the context of the group's own samples, and no trace of the answer in it."""
    p = group.prompt
    return Sample(
        id=f"{p.visit_id}/explained{m}", prompt_id=p.id, context_ids=io.chat.prompt_ids(p.messages), token_ids=e.token_ids, behavior_logp=None,
        policy_version=e.version, text=e.text, role="explanation", cohort=f"{p.visit_id}/explained", weights=weights, parent=p.visit_id,
    )  # fmt: skip


async def _explanations(how: x.Explainer, prompts: Sequence[Prompt], io: RolloutIO, n: int, refresh: str | int) -> list[list[tuple[int, x.Explanation]]]:
    """Explanations of each prompt, those from memory where they are fresh enough; numbered."""
    kept: dict[int, dict[str, Any]] = {}
    for k, p in enumerate(prompts if refresh != "always" else ()):
        for entry in io.memory.recall("explanations", p.id):
            if refresh == "once" or io.step - entry["step"] < int(refresh):
                kept[k] = entry
                io.note("explained/age_steps", io.step - entry["step"])
    fresh = [k for k in range(len(prompts)) if k not in kept]
    new, ends = await x.explain(how, [prompts[k] for k in fresh], io, n)
    out = {k: x.from_memory(entry) for k, entry in kept.items()} | dict(zip(fresh, new, strict=True))
    for k, own in zip(fresh, new, strict=True):
        if own:
            io.note("explained/age_steps", 0.0)
            if refresh != "always":
                io.memory.remember("explanations", prompts[k].id, x.to_memory(own, io.step), cap=1)
    _note_ends(io, ends, n * len(fresh))
    return [list(enumerate(out[k])) for k in range(len(prompts))]


def _note_ends(io: RolloutIO, ends: Counter[str], wanted: int) -> None:
    _note_mean(io, "explained/accepted_share", ends["accepted"], wanted)
    for reason in ("contradicts", "hint", "short", "length", "unjudged"):
        _note_mean(io, f"explained/{reason}_share", ends[reason], ends["tries"])


def _note_mean(io: RolloutIO, name: str, total: float, n: int) -> None:
    if n:  # a mean over nothing is missing, not 0
        io.note(name, total, n)


def _grad_ratio(groups: Sequence[Group], weights: Sequence[float], logp: Sequence[Sequence[float]], *, beta: float, norm: Norm, std_eps: float) -> float | None:
    """Explanation term over policy term, see the module's docstring; None where the policy term has no gradient."""
    samples = sum(s.weights["policy"] > 0 for g in groups for s in g.samples)
    policy = 0.0
    for g in groups:
        rewards = [s.reward for s in g.samples if s.reward is not None]
        mean = sum(rewards) / max(1, len(rewards))
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / max(1, len(rewards) - 1))
        for s in g.samples:
            if s.reward is not None and s.weights["policy"] > 0:
                c = (s.reward - mean) / (std + std_eps) / len(s.token_ids) / samples
                policy += sum((c * (1 - math.exp(min(0.0, v)))) ** 2 for v in s.behavior_logp or ())
    explained = 0.0
    for w, row in zip(weights, logp, strict=True):
        c = beta * w / len(groups) / (len(row) if norm == "mean" else 1)
        explained += sum((c * (1 - math.exp(min(0.0, v)))) ** 2 for v in row)
    return math.sqrt(explained / policy) if policy > 0 else None


def exp_dpo(
    *, base: Path, mode: Literal["offline", "online"] = "online", pairs: str | None = None, round_steps: Annotated[int, Ge(1)] = 50, beta_dpo: float = 0.1,
    source: Literal["self", "solution"] = "self", shuffle_answers: bool = False, template: str = "chat", answer_format: str = ANSWER,
    marks: tuple[str, ...] = x.MARKS, cut: Literal["sentence", "mark"] = "sentence", hints: tuple[str, ...] = x.HINTS, min_tokens: int = 20, resample: int = 3,
) -> Rule:  # fmt: skip
    """ExP-DPO: preferred a self-explanation with the right answer, dispreferred a wrong sample of the policy; both behind the question alone.

    l = -log sigmoid(beta_dpo [log pi(y_w|q)/pi_ref(y_w|q) - log pi(y_l|q)/pi_ref(y_l|q)]), sums over the tokens.  arXiv:2507.02834 (eq. 4 of docs/expo.md).
    online: both are sampled anew at each visit; pi_ref is the policy at the start of the present round of `round_steps` steps.
    offline: `pairs` is a file that `llmrl explain RECIPE --pairs FILE` wrote with the initial policy; nothing is sampled while training, and pi_ref is
    the policy at the start of the run: give the run the same model. OUR CHOICE: y_l must be judged wrong (a prompt whose samples are all right is
    skipped), one pair a prompt (the first wrong sample), beta_dpo 0.1, rounds counted in steps (the default is a round number; four rounds a run: steps / 4).
    source = "solution": the dataset's solution is preferred, the paper's baseline. The explanation's keywords are those of expo.
    Metrics: rule/pairs_share, rule/reward (of the samples y_l is taken from), explained/* as in expo. A falling loss is no progress: watch the evaluation.
    """
    if (mode == "offline") != (pairs is not None):
        raise ValueError('mode = "offline" goes with pairs, a file of `llmrl explain RECIPE --pairs FILE`; mode = "online" samples its own: leave pairs out')
    how = x.Explainer(
        read_template(template, kind="expo", fields=("answer",), base=base, needs=("question", "answer")), answer_format, source, marks, cut, hints,
        min_tokens, resample, shuffle_answers,
    )  # fmt: skip
    return Rule(
        credit=Credit(), loss=(Term(losses.dpo(beta_dpo), weight="pair", over="sample", name="dpo"),),
        collect=partial(pair_groups, how=how, stored=None if pairs is None else read_pairs(base / pairs)),
        needs=Needs(ref_logp=True, whole_groups=True, ref_every=round_steps if mode == "online" else 0),
    )  # fmt: skip


exp_dpo.min_group = 1  # type: ignore[attr-defined]
expo.cost = "up to `resample` explanations a prompt more, scored once"  # type: ignore[attr-defined]
exp_dpo.cost = "up to `resample` explanations a prompt more (online)"  # type: ignore[attr-defined]


async def make_pairs(how: x.Explainer, prompts: Sequence[Prompt], io: RolloutIO) -> list[tuple[x.Explanation, Sample] | None]:
    """(explanation, the first wrong sample) of each prompt; None where one of them is missing."""
    groups = await sample_groups(prompts, io)
    judged = [s.reward for g in groups for s in g.samples if s.reward is not None]
    _note_mean(io, "reward", sum(judged), len(judged))
    wrong = [next((s for s in g.samples if s.reward is not None and s.reward <= x.RIGHT), None) for g in groups]
    asked = [k for k, s in enumerate(wrong) if s is not None]
    found, ends = await x.explain(how, [prompts[k] for k in asked], io)
    _note_ends(io, ends, len(asked))
    best = {k: own[0] for k, own in zip(asked, found, strict=True) if own}
    return [None if s is None or k not in best else (best[k], s) for k, s in enumerate(wrong)]


async def pair_groups(prompts: Sequence[Prompt], io: RolloutIO, *, how: x.Explainer, stored: dict[str, dict[str, Any]] | None) -> list[Group]:
    """One pair a prompt, rewards 1 and 0. A prompt without a pair leaves one token of weight 0, so that the step has its shape."""
    groups = []
    pairs = await make_pairs(how, prompts, io) if stored is None else [None] * len(prompts)
    for p, pair in zip(prompts, pairs, strict=True):
        context = io.chat.prompt_ids(p.messages)
        if stored is not None and (row := stored.get(p.id)) is not None:
            if row["context_ids"] != context:
                raise InputError(f"row {p.id}: its pair was made behind another prompt (template, system message or tokenizer differ); make the pairs anew")
            texts = [(row["chosen"], None, row["version"]), (row["rejected"], None, row["version"])]
        else:
            texts = [(pair[0].token_ids, None, pair[0].version), (pair[1].token_ids, pair[1].behavior_logp, pair[1].policy_version)] if pair else []
        samples = [
            Sample(
                id=f"{p.visit_id}/{role}", prompt_id=p.id, context_ids=context, token_ids=ids, behavior_logp=logp, policy_version=version,
                text=io.chat.text(ids), role=role, cohort=f"{p.visit_id}/pair", reward=reward, weights={"pair": 1.0}, parent=p.visit_id,
            )
            for (ids, logp, version), role, reward in zip(texts, ("chosen", "rejected"), (1.0, 0.0), strict=bool(texts))
        ]  # fmt: skip
        io.note("pairs_share", float(bool(samples)))
        blank = Sample(f"{p.visit_id}/none", p.id, context, [io.chat.tokenizer.eos_token_id], None, io.version, role="none", weights={"pair": 0.0})
        groups.append(Group(p, samples or [blank]))
    return groups


def read_pairs(path: Path) -> dict[str, dict[str, Any]]:
    """id -> pair of a file of `llmrl explain --pairs`. Raises ValueError (the recipe is refused) for one that cannot be read."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {row["id"]: {k: row[k] for k in ("context_ids", "chosen", "rejected", "version")} for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"pairs: {path} cannot be read ({type(error).__name__}: {error}); make it with `llmrl explain RECIPE --pairs FILE`") from error

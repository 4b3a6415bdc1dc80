"""Value-gradient transport as a policy update: OUR EXTENSION of VGF (arXiv:2604.14265), not part of the paper.

The paper's language-model part moves samples at test time and changes no weight (llmrl/lm_transport.py). Here the samples of a step are moved
under a budget, L steps of eps, along the gradient of a frozen reward model, or of a value head on it that learns from the verdicts (vgf_value.py);
the verifier judges what comes out, and the policy is trained towards it. The gradient proposes, the verifier decides.

The fluency guard's reference is the policy that samples now (io.score), not the starting model: a collect has no other. The KL to the
starting model is a term, or measured.

Metrics (rule/...): reward/before, reward/flowed, reward/after (reward model: sampled tokens, moved embeddings, decoded tokens), score/before
and score/after (verifier, over samples whose decoded text could be judged too), changed_share (tokens), moved_share (responses), displacement
(rho), mmd (a prompt's sampled against decoded responses, see lm_transport.diagnostics), ref_drop_nats and guarded_share (of those that decoding
changed), winner_share (of prompts), winner_moved_share (of winners). kl/ref_nats: with measure_kl or kl > 0. With a value head, rewards are its
values, and value/ranked and reward/ranked tell of how many of a prompt's pairs of texts with different scores it, and the reward model, had the
order right: texts that it was not fitted to yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Ge, Gt

from llmrl import lm_transport as lm
from llmrl import losses
from llmrl.credit import Credit
from llmrl.records import Group, Prompt
from llmrl.rollout import RolloutIO
from llmrl.rules import grpo as family
from llmrl.rules.base import Needs, Rule, Term
from llmrl.rules.vgf_parts import Candidate, Carrier, carried, note
from llmrl.rules.vgf_value import ValueHead

if TYPE_CHECKING:
    from llmrl.batch import Outputs, TokenBatch

Select = Literal["reward", "verifier", "accepted"]
Pool = Literal["both", "moved"]


def vgf(
    *, reward_model: str, form: Literal["winners", "members"] = "winners", steps: Annotated[int, Ge(0)] = 2, eps: Annotated[float, Ge(0)] = 0.5,
    velocity: lm.Form = "independent", alpha: Annotated[float, Gt(0)] = 1.0, bandwidth: Annotated[float, Gt(0)] | None = None,
    optimizer: Literal["plain", "adam"] = "plain", guard: Annotated[float, Ge(0)] | None = 0.5, candidates: Annotated[int, Ge(0)] = 0,
    value: Literal["reward", "head"] = "reward", value_window: Annotated[int, Ge(2)] = 256, value_ridge: Annotated[float, Gt(0)] = 0.1,
    select: Select | None = None, accept: float | None = None, pool: Pool | None = None, low: float | None = None, high: float | None = None,
    std_eps: float | None = None, kl: Annotated[float, Ge(0)] = 0.0, measure_kl: bool = True, device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32", base: Path,
) -> Rule:  # fmt: skip
    """Train towards samples that were transported along a reward model's gradient and judged by the verifier. OUR EXTENSION of arXiv:2604.14265.

    winners: loss = -1/(B T) sum over the B prompts of sum_i w_i sum_t log pi(y_it | x, y_i<t) + kl * k3;  w = 1 for the winner of a prompt,
    T = max_new_tokens: a scale. The mean over a winner's own tokens would count the end of a short text more than that of a long one, and texts shrink.
    members: grpo over a prompt's N samples and those of them that transport changed, each with the verifier's reward of its own text.
    steps = 0 or eps = 0: "winners" is best-of-N (select "reward", "verifier") or rejection fine-tuning (select "accepted", accept = 1) on the same
    samples, "members" is grpo, both bit for bit.

    reward_model: a folder that `llmrl reward` made, relative to the recipe, of the policy's tokenizer; loaded at the first step, never trained.
    steps, eps (units of rho, the distance to a token's nearest neighbour), velocity, alpha, bandwidth, optimizer, guard, candidates (these need
    engine.use = hf): see lm_transport.transport, which does here what it does at test time.
    value: what supplies the gradient, the reward model or a head on it that is fitted to the verifier's scores of the last value_window prompts,
    their transported texts among them, with the penalty value_ridge on what departs from the reward model's direction (vgf_value.fit); from step 2 on.
    Only for winners: select = the highest value of the decoded tokens ("reward", the default), the highest verifier's score (ties: value), or all
    accepted ones with w = 1/n ("accepted"); accept: lowest score that may win (default 0; 1 for "accepted"); pool: sampled and moved texts
    compete ("both", the default: the winner is never worse than best-of-N's) or moved ones in place of theirs ("moved", the paper's at test time).
    Only for members: low, high, std_eps (0.2, 0.2, 1e-6), as in grpo. A transported member was not sampled by the policy: its ratio starts at 1
    and nothing corrects for that, so a large budget biases the gradient.
    kl: coefficient of k3 to the starting model on the sampled texts (members: on all). measure_kl: take it as a metric also where kl = 0; costs a
    forward of the starting model, and for winners one of the policy. device "auto": this rank's GPU where there is one. dtype: of the reward model.
    All constants are OUR CHOICE.
    """
    if form == "winners" and any(x is not None for x in (low, high, std_eps)):
        raise ValueError('low, high and std_eps belong to form = "members"; form = "winners" has neither ratio nor deviation: leave them out')
    if form == "members" and any(x is not None for x in (select, accept, pool)):
        raise ValueError('select, accept and pool belong to form = "winners"; in form = "members" every transported sample takes part: leave them out')
    if accept is not None and not 0 <= accept <= 1:
        raise ValueError(f"accept = {accept}: a verifier's score, from 0 to 1")
    move = {"steps": steps, "eps": eps, "velocity": velocity, "alpha": alpha, "bandwidth": bandwidth, "optimizer": optimizer, "guard": guard}
    head = ValueHead(value_window, value_ridge) if value == "head" else None
    carrier = Carrier(base / Path(reward_model).expanduser(), device, dtype, {**move, "candidates": candidates}, head)
    needs = Needs(ref_logp=bool(kl) or measure_kl)
    if form == "members":
        plain = family.grpo(low=0.2 if low is None else low, high=0.2 if high is None else high, std_eps=1e-6 if std_eps is None else std_eps, kl=kl)
        return replace(plain, collect=partial(with_members, carrier=carrier), needs=needs)
    how = select or "reward"
    least = accept if accept is not None else 1.0 if how == "accepted" else 0.0
    terms = [Term(losses.ce(), weight="transported", over="fixed", count="groups", name="transported")]
    if kl:
        terms.append(Term(losses.kl_k3(), over="sample", coef=kl))
    elif measure_kl:
        terms.append(Term(watched(losses.kl_k3()), over="sample"))
    collect = partial(with_winners, carrier=carrier, select=how, accept=least, both=pool != "moved")
    return Rule(credit=Credit(), loss=tuple(terms), collect=collect, needs=needs)


def watched(fn: losses.LossFn) -> losses.LossFn:
    """The value of a loss without its gradient: a term that is only looked at."""

    def watched(batch: TokenBatch, out: Outputs) -> torch.Tensor:
        return fn(batch, out).detach() + 0.0 * out.logp_T  # a micro-batch of nothing else still has a graph

    watched.__name__ = getattr(fn, "__name__", "loss")
    return watched


# ---------------------------------------------------------------- what is trained on


async def with_winners(prompts: Sequence[Prompt], io: RolloutIO, *, carrier: Carrier, select: Select, accept: float, both: bool) -> list[Group]:
    """Groups whose winners have the weight "transported"; a transported winner joins its group, in a cohort of its own."""
    groups = []
    for g, sampled, made in await carried(prompts, io, carrier):
        instead = [s if m is None else m for s, m in zip(sampled, made, strict=True)]
        rivals = [*sampled, *(m for m in made if m is not None)] if both else instead
        won = winners(rivals, select, accept)
        io.note("winner_share", float(bool(won)))
        for c in won:
            c.sample.weights["transported"] = 1.0 / len(won)
            if c.sample.role == "transported":
                g.samples.append(replace(c.sample, cohort=f"{g.prompt.visit_id}/moved"))
        note(io, "winner_moved_share", sum(c.sample.role == "transported" for c in won), len(won))
        groups.append(g)
    return groups


def winners(rivals: Sequence[Candidate], select: Select, accept: float) -> list[Candidate]:
    """Those of a prompt to be trained on: of texts judged `accept` or better the best one (the first of equals), or all. [] where there is none."""
    fit = [c for c in rivals if c.score is not None and c.score >= accept]
    if select == "accepted" or not fit:
        return fit
    return [max(fit, key=lambda c: c.value if select == "reward" else (c.score, c.value))]


async def with_members(prompts: Sequence[Prompt], io: RolloutIO, *, carrier: Carrier) -> list[Group]:
    """Groups to which the texts that transport changed belong as further members, in the same cohort."""
    groups = []
    for g, _, made in await carried(prompts, io, carrier):
        new = [replace(m.sample, weights={"policy": float(m.score is not None)}) for m in made if m is not None]
        groups.append(Group(g.prompt, [*g.samples, *new]))
    return groups

"""INPO, iterative Nash policy optimisation (Zhang et al., arXiv:2407.00617): regression on pairs towards a policy that no other policy beats on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from llmrl import losses
from llmrl.credit import Credit
from llmrl.records import Group, Prompt, Sample
from llmrl.rollout import RolloutIO
from llmrl.rules.base import Collect, Needs, Rule, Term
from llmrl.rules.spo import comparing


def inpo(*, eta: float = 7.5e-3, tau: float | None = None, opponent: str | None = None, both_ways: bool = True, mask_truncated: bool = False) -> Rule:
    """The best against the worst sample of each prompt, their margin drawn to 1 / (2 eta) beyond that of two frozen policies. arXiv:2407.00617.

    l = (h - 1/(2 eta))^2,  h = D - (tau/eta) D_ref - (1 - tau/eta) D_t,  D = log pi(y_w|x) - log pi(y_l|x), sums over the tokens; mean over the pairs
    Its minimum over all pairs of pi_t is the mirror step pi(y) ~ pi_ref(y)^(tau/eta) pi_t(y)^(1 - tau/eta) exp(P(y > pi_t) / eta).
    pi_ref is the starting model. pi_t, from which the pairs are sampled, is the policy at the start of the step: an iteration is a step, and a step with
    one update moves along the gradient at pi = pi_t, where h = (tau/eta) (D - D_ref); more updates (batch.minibatches, batch.epochs) go on towards
    the minimum. Differs from the paper: (1) iterations of a step in place of a few of a whole dataset; (2) preferences as in spo: by the verifier's
    scores, or by comparisons where `opponent` is given (then the best is the one of the highest win rate).
    Differs from exp_dpo: (3) the loss; both samples are the policy's own. eta 7.5e-3 and tau = eta / 3 (None) are the paper's, quoted through a
    re-implementation, for a large model at a small learning rate (the target is 67 nats); small models want a larger eta, so a nearer target. OUR CHOICE:
    best against worst of the rollout's samples, the first of those alike. A prompt whose judged samples are all alike has no pair. Sums, not means: as
    published.
    Metrics: rule/pairs_share, rule/reward (of all judged samples). A falling loss is no progress: watch the evaluation.
    """
    ratio = 1 / 3 if tau is None else tau / max(eta, 1e-300)
    if eta <= 0 or not 0 < ratio <= 1:
        raise ValueError(f"inpo: eta = {eta} must be above 0 and tau = {tau} in (0, eta]")
    if opponent is None and not both_ways:
        raise ValueError('inpo: both_ways does nothing without opponent: give opponent = "answer" or the name of a column')
    return Rule(
        credit=Credit(), loss=(Term(losses.inpo(eta, ratio * eta), weight="pair", over="sample"),),
        collect=partial(_pairs, sampled=comparing(opponent, both_ways, mask_truncated)), needs=Needs(ref_logp=True, whole_groups=True),
    )  # fmt: skip


inpo.cost = "with opponent: the comparisons of spo"  # type: ignore[attr-defined]


async def _pairs(prompts: Sequence[Prompt], io: RolloutIO, *, sampled: Collect) -> list[Group]:
    """Groups of two, rewards 1 and 0. A prompt without a pair keeps its first sample at weight 0, so that the step has its shape."""
    out = []
    for g in await sampled(prompts, io):
        judged = [s for s in g.samples if s.reward is not None and s.weights["policy"] > 0]
        if judged:
            io.note("reward", sum(map(_score, judged)), len(judged))
        found = len({s.reward for s in judged}) > 1
        io.note("pairs_share", float(found))
        pair = [_as(max(judged, key=_score), "chosen", 1.0), _as(min(judged, key=_score), "rejected", 0.0)] if found else []
        out.append(Group(g.prompt, pair or [replace(g.samples[0], role="none", reward=None, weights={"pair": 0.0})]))
    return out


def _score(sample: Sample) -> float:
    return sample.reward or 0.0


def _as(sample: Sample, role: str, reward: float) -> Sample:
    return replace(sample, role=role, reward=reward, weights={"pair": 1.0})

"""SPO, self-play preference optimisation (Swamy, Dann, Kidambi, Wu, Agarwal; arXiv:2401.04056): a sample's reward is how often it beats its siblings.

W_ij = P(y_i is better than y_j), W_ij + W_ji = 1. The mean win rate of a group is 1/2 whatever the preferences, and a cycle (A beats B beats C beats A)
gives every sample 1/2: no advantage, where a scalar reward would have to take sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.records import Group, Prompt, Verdict
from llmrl.rollout import RolloutIO, complete, make_sample, sample_groups
from llmrl.rules.base import Collect, Rule, Term
from llmrl.segment import seg_count, seg_rank


def spo(
    *, opponent: str | None = None, both_ways: bool = True, scale: bool = True, low: float = 0.2, high: float = 0.2, std_eps: float = 1e-6,
    mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo on win rates against the siblings, from graded scores or from a judge that compares two responses. arXiv:2401.04056.

    r_i = (1/(k-1)) sum_(j != i) W_ij;  then grpo (scale = false: r_i - 1/2 alone).
    opponent None: W_ij is 1, 1/2 or 0 as the verifier scores y_i above, like or below y_j: its order counts, not its distances. With 0/1 scores and
    scale = true that is grpo.
    opponent "answer", or the name of a column: the verifier is asked whether y_i beats y_j by judging y_i against the prompt with y_j's text in that
    place; its score is p_ij (judge in form "pairwise" does that: reference = the same column). W_ij = (p_ij + 1 - p_ji) / 2, so a preference for
    a place cancels; both_ways = false asks once a pair, for a verifier that asks in both orders itself, as that judge does. What could not
    be judged one way counts the other way alone; a sample without any judged comparison is unjudged. The verifier of [eval] sees the rows as they are.
    Differs from grpo: (1) the reward. OUR CHOICE: the average of both orders; siblings alone as opponents (the paper also keeps a queue); the paper has no
    recipe for language models. Metric rule/ties_share (pairs with W_ij = 1/2).
    """
    if opponent is None and not both_ways:
        raise ValueError('spo: both_ways does nothing without opponent: give opponent = "answer" or the name of a column')
    shaped = () if opponent else (c.stateless("win_rate", score_win_rates),)
    return Rule(
        credit=c.Credit((*shaped, c.center(), *((c.scale(eps=std_eps),) if scale else ()))), loss=(Term(losses.pg_clip(low, high), over="sample"),),
        collect=comparing(opponent, both_ways, mask_truncated),
    )  # fmt: skip


spo.cost = "with opponent: k (k - 1) verifier calls a group of k in place of k, half of them with both_ways = false"  # type: ignore[attr-defined]


def win_rates(w: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Mean of each row of W over its judged siblings; None where there are none. The diagonal is ignored."""
    rows = [[x for j, x in enumerate(row) if j != i and x is not None] for i, row in enumerate(w)]
    return [sum(row) / len(row) if row else None for row in rows]


def win_matrix(p: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """p_ij, a judge's score of i against j, None where it gave none -> W with W_ij + W_ji = 1."""

    def w(i: int, j: int) -> float | None:
        there = [x for x in (p[i][j], None if p[j][i] is None else 1 - p[j][i]) if x is not None]  # type: ignore[operator]
        return sum(there) / len(there) if i != j and there else None

    return [[w(i, j) for j in range(len(p))] for i in range(len(p))]


def score_win_rates(a_S: Tensor, view: c.View) -> Tensor:
    """Win rates by scalar scores within each cohort: (siblings below + half of those alike) / (k - 1). A cohort of one gets 1/2."""
    rank_S = seg_rank(a_S, view.cohort_S, view.cohorts, view.scored_S)
    others_S = (seg_count(view.cohort_S, view.cohorts, view.scored_S) - 1)[view.cohort_S]
    return torch.where(view.scored_S & (others_S > 0), rank_S / others_S.clamp(min=1), 0.5)


def comparing(opponent: str | None, both_ways: bool, mask_truncated: bool) -> Collect:
    """The collect that gives samples their rewards: the verifier's own scores, or win rates by comparisons where there is an `opponent`."""
    if opponent is None:
        return partial(sample_groups, mask_truncated=mask_truncated)
    return partial(_compared_groups, opponent=opponent, both_ways=both_ways, mask_truncated=mask_truncated)


def facing(prompt: Prompt, opponent: str, text: str) -> Prompt:
    """The prompt as the verifier sees it when `text` is the response to beat."""
    return replace(prompt, answer=text) if opponent == "answer" else replace(prompt, meta={**prompt.meta, opponent: text})


async def _compared_groups(prompts: Sequence[Prompt], io: RolloutIO, *, opponent: str, both_ways: bool, mask_truncated: bool) -> list[Group]:
    contexts = [io.chat.prompt_ids(p.messages) for p in prompts]
    done = complete(prompts, contexts, io)
    pairs = [(i, j) for i in range(io.group) for j in range(io.group) if i != j and (both_ways or i < j)]
    jobs = [(g, i, j) for g in range(len(prompts)) for i, j in pairs]
    verdicts = await io.verify([(facing(prompts[g], opponent, done[g][j].text), done[g][i].text) for g, i, j in jobs])
    p: list[list[list[float | None]]] = [[[None] * io.group for _ in range(io.group)] for _ in prompts]
    for (g, i, j), v in zip(jobs, verdicts, strict=True):
        p[g][i][j] = v.score
    groups = []
    for g, prompt in enumerate(prompts):
        w = win_matrix(p[g])
        own = [Verdict(None, "error", detail="no comparison could be judged") if r is None else Verdict(r, detail="win rate") for r in win_rates(w)]
        judged = [w[i][j] for i in range(io.group) for j in range(i) if w[i][j] is not None]
        if judged:
            io.note("ties_share", sum(x == 0.5 for x in judged), len(judged))
        pairs_of = zip(done[g], own, strict=True)
        groups.append(Group(prompt, [make_sample(prompt, i, contexts[g], d, v, mask_truncated=mask_truncated) for i, (d, v) in enumerate(pairs_of)]))
    return groups

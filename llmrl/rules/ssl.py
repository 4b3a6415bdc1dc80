"""SSL, sweet spot learning (Wu, Yang et al., arXiv:2601.22491): a small, tiered bonus for how near a trajectory came, on top of the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.rollout import sample_groups
from llmrl.rules.base import Over, Rule, Term


def ssl(
    *, alpha: float = 0.2, zones: int = 4, solved: float = 1.0, bonus_on_fail: bool = True, low: float = 0.2, high: float = 0.2, over: Over = "sample",
    std_eps: float = 1e-6, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo on R = C + alpha * zone(S): right or not, plus a bonus for nearness S rounded down to one of a few zones. arXiv:2601.22491 (secondary readings).

    C = 1 if the score reaches `solved`, else 0;  zone(S) = min(K, floor(K S)) / K;  S = mean over the steps of their nearness in [0, 1]
    S is the sample's stream "nearness" where it has one (an environment's, one number repeated along its tokens), else the verifier's graded score: a
    score of 0.8 with solved = 1 is near, not right. Differs from grpo: (1) that reward. With alpha < 1 a right sample always beats a wrong one. In
    groups that are all right or all wrong the zones alone decide, and after division by the std alpha does not matter there. alpha 0.2 and
    4 zones are the paper's. OUR CHOICE: equal zones, the mean over steps; bonus_on_fail = false gives wrong samples no bonus (the formula gives it).
    """
    if zones < 1 or alpha < 0 or not 0 < solved <= 1:
        raise ValueError(f"ssl: zones = {zones} must be at least 1, alpha = {alpha} at least 0, solved = {solved} in (0, 1]")

    def tiered(a_S: Tensor, view: c.View) -> Tensor:
        near_S = view.of_sample("nearness") if "nearness" in view.streams else torch.full_like(a_S, torch.nan)
        return reward((a_S >= solved).double(), torch.where(near_S.isnan(), a_S, near_S), alpha, zones, bonus_on_fail)

    return Rule(
        credit=c.Credit((c.stateless("tiered", tiered), c.center(), c.scale(eps=std_eps))), loss=(Term(losses.pg_clip(low, high), over=over),),
        collect=partial(sample_groups, mask_truncated=mask_truncated),
    )  # fmt: skip


def reward(right_S: Tensor, near_S: Tensor, alpha: float, zones: int, bonus_on_fail: bool = True) -> Tensor:
    """C + alpha * zone(S); 1e-12 keeps a rounded 1 in the top zone."""
    zone_S = (zones * near_S + 1e-12).floor().clamp(0, zones) / zones
    return right_S + alpha * (zone_S if bonus_on_fail else zone_S * right_S)


def click_nearness(x: float, y: float, box: tuple[float, float, float, float]) -> tuple[float, bool]:
    """(exp(-d2 / 2), whether inside) of a click; d2 = squared distance to the box's centre in half-sizes. OUR CHOICE of width."""
    x1, y1, x2, y2 = box
    d2 = (2 * x - x1 - x2) ** 2 / (x2 - x1) ** 2 + (2 * y - y1 - y2) ** 2 / (y2 - y1) ** 2
    return math.exp(-d2 / 2), x1 <= x <= x2 and y1 <= y <= y2


def grid_nearness(found: Sequence[Sequence[object]], wanted: Sequence[Sequence[object]], block: int = 3) -> list[float]:
    """Share of matching cells of each block x block block of a grid, row by row."""
    rows, columns = len(wanted), len(wanted[0])
    out = []
    for top in range(0, rows, block):
        for left in range(0, columns, block):
            cells = [(i, j) for i in range(top, min(top + block, rows)) for j in range(left, min(left + block, columns))]
            out.append(sum(found[i][j] == wanted[i][j] for i, j in cells) / len(cells))
    return out

"""What the rule `v0` (Zhang et al., arXiv:2602.03584) expects of a prompt: from its own results, from a column, or from what it looks like.

The last is the paper's value at state zero: there a frozen text embedder, a trained query adapter and a frozen in-context tabular predictor
(TabPFN), which reads the policy's last results as its training table. Here (OUR CHOICE) the embedder is a hash of the text's letters, and the
predictor a penalised linear model that is fitted to the same table anew each step, by the paper's loss. So it needs no other model, has one answer
whatever came before, and its state is the table, which the memory of every checkpoint holds.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from llmrl.records import InputError, Prompt
from llmrl.rollout import RolloutIO

if TYPE_CHECKING:
    from llmrl.memory import Memory

STORE, ALL, WIDTH = "v0/context", "all", 512


def predicted(prompt: Prompt, memory: Memory, told: float | None, clamp: float) -> float:
    """p of a prompt, from what the memory held when the step began, and from m where there is one."""
    visits = memory.recall("v0/visits", prompt.id)
    if not visits and told is None:
        rate = memory.average("v0/rate")
        p = 0.5 if rate is None else rate
    else:
        p = (sum(v[0] for v in visits) + (1.0 if told is None else 2 * told)) / (sum(v[1] for v in visits) + 2)
    return min(1 - clamp, max(clamp, p))


def by_column(prompt: Prompt, prior: str) -> float:
    """m of a row."""
    told = prompt.meta.get(prior)
    if not (isinstance(told, int | float) and 0 <= told <= 1):
        raise InputError(f"row {prompt.id}: prior = {prior!r} names a column with a success rate in [0, 1], and here it holds {told!r}")
    return told


@lru_cache(4096)
def features(text: str, width: int = WIDTH) -> Tensor:
    """[width], fp64, length 1: counts of the text's runs of one, two and three characters, blanks as one, each hashed to a place and a sign."""
    plain = f" {' '.join(text.lower().split())} "
    x = torch.zeros(width, dtype=torch.float64)
    for n in (1, 2, 3):
        for i in range(len(plain) - n + 1):
            code = zlib.crc32(plain[i : i + n].encode())
            x[code % width] += 1.0 if code & 0x80000000 else -1.0
    return x / max(1.0, float(x.norm()))


def rank_and_ce(score_N: Tensor, rate_N: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """(share L_rank + (1 - share) L_CE, L_rank, L_CE). Equation 2 of the specification.

    L_rank: -log sigmoid(s_i - s_j), mean over the pairs of a solved i and an unsolved j, 0 where there is none; a constant on all scores drops out
    L_CE: cross-entropy of each score, mean
    rate: 0 or 1, or a share of right samples, each of which then counts as that share of a solved and the rest of an unsolved prompt (OUR CHOICE).
    """
    pair_NN = rate_N[:, None] * (1 - rate_N)
    pair_NN = pair_NN * (1 - torch.eye(len(rate_N), dtype=pair_NN.dtype))
    n = pair_NN.sum()
    rank = (pair_NN * softplus(score_N - score_N[:, None])).sum() / n if n > 0 else score_N.sum() * 0
    ce = binary_cross_entropy_with_logits(score_N, rate_N)
    return share * rank + (1 - share) * ce, rank, ce


def fit(x_ND: Tensor, rate_N: Tensor, share: float, ridge: float) -> Tensor:
    """[D + 1], fp64, a slope and an offset: the least of `rank_and_ce` of X w + b plus ridge / 2 |w|^2, which is convex."""
    theta = torch.zeros(x_ND.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = rank_and_ce(x_ND @ theta[:-1] + theta[-1], rate_N, share)[0] + ridge / 2 * theta[:-1].square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return theta.detach()


def by_looks(texts: list[str], memory: Memory, size: int, share: float, ridge: float) -> list[float] | None:
    """p of each text, in (0, 1), from the last `size` results that the memory held when the step began; None where there are none."""
    context = sorted(memory.recall(STORE, ALL), key=lambda e: (e["step"], e["prompt"]))[-size:]  # ranks remember in another order
    if not context:
        return None
    x_ND = torch.stack([features(e["text"]) for e in context])
    theta = fit(x_ND, torch.tensor([e["rate"] for e in context], dtype=torch.float64), share, ridge)
    return torch.sigmoid(torch.stack([features(t) for t in texts]) @ theta[:-1] + theta[-1]).tolist()


def learn(prompt: Prompt, io: RolloutIO, right: int, n: int, cap: int) -> None:
    """Remembers a prompt's result. cap: what is read and a step's prompts more, so that what is read are whole steps, however many ranks there are."""
    io.memory.remember(STORE, ALL, {"step": io.step, "prompt": prompt.visit_id, "text": prompt.text, "rate": right / n}, cap=cap)

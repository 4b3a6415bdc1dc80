"""VERL, velocity-exploiting rank-learning (Huang et al., arXiv:2509.23808): a bonus for responses whose hidden states open more directions than before."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.rollout import sample_groups
from llmrl.rules.base import HiddenFn, Needs, Rule, Term

STATISTICS = ("ERA", "ERV", "ER")


def verl_erank(
    *, gate: float = 2.0, decay: float = 0.3, kappa: float = 2.0, stride: int = 40, limit: float = 5.0, factor: float = 1.0, last_token_only: bool = False,
    low: float = 0.2, high: float = 0.2, std_eps: float = 1e-6, kl: float = 0.0, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo plus a bounded bonus where the effective rank of the hidden states, or its growth, is above what it was lately. arXiv:2509.23808.

    A = A0 + min(max(Phi, 0), |A0| / kappa);  Phi = factor * (b tanh d_ER + (1 - b) tanh d_ERV),  b = sigmoid(gate * d_ERA)
    d_k = clip((x_k - mu_k) / (|mu_k| + 1e-8), -limit, limit);  after the step mu <- (1 - decay) mu + decay * mean of x over the batch, from mu = 0
    ER = exp(entropy of the normalised singular values of Z - mean(Z)), Z [T, D] the response's last hidden states;  m_j = ER of the rows 0..j * stride
    ERV = mean_(j>1) of e_j = m_j - mean(m_1..m_(j-1));  ERA = mean_(j>2) of e_j - e_(j-1);  0 where there are too few prefixes
    Differs from grpo: (1) that bonus; the first step has none. Phi = 0 and dead groups are grpo; kappa > 1 keeps every sign, and A >= A0.
    Differs from the released code: (2) no limit to the last 512 tokens in ERV and ERA; (3) its configuration may never apply Phi, this follows the equations.
    gate 2, decay 0.3, kappa 2, stride 40 (tokens), limit 5: the paper's. OUR CHOICE: the last hidden layer; the bonus on all tokens, as A0 is the same on
    all (last_token_only = the code's); a constant factor (the paper also adapts it to the validation score); means over the scored samples of all ranks.
    """
    if kappa <= 0 or stride < 1 or not 0 < decay <= 1 or limit <= 0:
        raise ValueError(f"verl_erank: kappa = {kappa} and limit = {limit} must be above 0, stride = {stride} at least 1, decay = {decay} in (0, 1]")
    term = Term(losses.pg_clip(low, high), over="sample")
    return Rule(
        credit=c.Credit((c.center(), c.scale(eps=std_eps)), (_bonus(gate, decay, kappa, stride, limit, factor, last_token_only),)),
        loss=(term, Term(losses.kl_k3(), over="sample", coef=kl)) if kl else (term,), collect=partial(sample_groups, mask_truncated=mask_truncated),
        needs=Needs(ref_logp=bool(kl), hidden={"erank": prefix_ranks(stride)}),
    )  # fmt: skip


verl_erank.cost = "an eigenvalue decomposition of every stride-th prefix of each response"  # type: ignore[attr-defined]


def effective_rank(z_ND: Tensor) -> float:
    """exp(-sum p ln p), p the singular values of the centred rows over their sum, fp64; 1 where all rows are alike.

    The singular values are the roots of the eigenvalues of the smaller of the two matrices of products: much cheaper, and exact to 1e-8 of the largest.
    """
    z_ND = z_ND.double()
    off_ND = z_ND - z_ND.mean(0)
    if float(off_ND.norm()) <= 1e-12 * float(z_ND.norm()):  # what rounding leaves of rows that are alike
        return 1.0
    gram = off_ND @ off_ND.T if len(off_ND) <= off_ND.shape[1] else off_ND.T @ off_ND
    sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = sigma / sigma.sum()
    return math.exp(-float(torch.special.xlogy(p, p).sum()))


def prefix_ranks(stride: int) -> HiddenFn:
    """hidden -> at each token the effective rank of the longest measured prefix: rows 0..t for t = stride, 2 stride, ..., and all rows at the last token."""

    def erank(hidden_ND: Tensor) -> Tensor:
        n = len(hidden_ND)
        out = torch.ones(n, dtype=torch.float64)  # one row has rank 1
        for t in [*range(stride, n, stride), n - 1]:
            out[t:] = effective_rank(hidden_ND[: t + 1])
        return out

    return erank


def statistics(erank_T: list[float], stride: int) -> tuple[float, float, float]:
    """(ERA, ERV, ER) of a response from its stream "erank"."""
    m = erank_T[stride::stride]
    e = [m[j] - sum(m[:j]) / j for j in range(1, len(m))]
    mean = [sum(x) / len(x) if x else 0.0 for x in ([b - a for a, b in pairwise(e)], e)]
    return mean[0], mean[1], erank_T[-1]


def phi(x_S3: Tensor, mu_3: Tensor, gate: float, limit: float) -> Tensor:
    """Phi in (-1, 1) of each sample, before the factor; columns as in STATISTICS."""
    d_S3 = ((x_S3 - mu_3) / (mu_3.abs() + 1e-8)).clamp(-limit, limit)
    b_S = torch.sigmoid(gate * d_S3[:, 0])
    return b_S * d_S3[:, 2].tanh() + (1 - b_S) * d_S3[:, 1].tanh()


def _bonus(gate: float, decay: float, kappa: float, stride: int, limit: float, factor: float, last_token_only: bool) -> c.Transform:
    """Equations 4 to 7. State: the running means, and the steps that went into them."""

    def update(a_T: Tensor, state: c.State, view: c.View) -> tuple[Tensor, c.State]:
        rows = [statistics(x.tolist(), stride) for x in view.streams["erank"].split(view.length_S.tolist())] if len(view.length_S) else []
        x_S3 = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
        mu_3 = torch.tensor(state["mu"], dtype=torch.float64)
        *total, n = view.all_sum(torch.cat([x_S3[view.scored_S].sum(0), view.scored_S.double().sum()[None]])).tolist()
        new = {"mu": [(1 - decay) * m + decay * t / n for m, t in zip(state["mu"], total, strict=True)], "steps": state["steps"] + 1} if n else state
        if state["steps"] == 0:
            return a_T, new
        bonus_T = (factor * phi(x_S3, mu_3, gate, limit)).clamp(min=0)[view.sample_T]
        if last_token_only:
            last_S = view.length_S.cumsum(0) - 1
            bonus_T = torch.zeros_like(bonus_T).index_copy(0, last_S, bonus_T[last_S])
        return a_T + torch.minimum(bonus_T, a_T.abs() / kappa), new

    return c.Transform("verl_erank", lambda: {"mu": [0.0] * 3, "steps": 0}, update)

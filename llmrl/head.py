"""The vocabulary head: logits in fp32, and log-probs and entropies in chunks, so that [T, V] never exists at once.

Precision: products of a bf16 model are accumulated in fp32. Where the matrix product can only return bf16 (CPU), its rounding error is
computed by a second product and added back: |error| about 1e-5 of the logits' size, as against 2e-3 for plain bf16 and 1e-7 for fp32
matrices, at two thirds of the cost of the latter. The softmax runs in fp32; gradients of the head are products in the model's dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def head_logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """fp32 logits [N, V] of hidden states in the model's dtype (fp32, fp64 or bf16)."""
    if weight_VD.dtype in (torch.float32, torch.float64):
        logits = hidden_ND @ weight_VD.T
    elif weight_VD.device.type == "cuda":
        logits = torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32)
    else:
        high = hidden_ND @ weight_VD.T
        low = torch.addmm(high, hidden_ND, weight_VD.T, beta=-1)  # exact product minus `high`, summed in fp32 before it is rounded
        logits = high.float().add_(low)
    return logits if bias_V is None else logits + bias_V.to(logits.dtype)


def head_logp(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_T: Tensor,
    *, temperature: float = 1.0, banned_ids: tuple[int, ...] = (), chunk: int = 1024, entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-prob of each target, and the entropy of each distribution if asked for: ([T], [T] or None), fp32, differentiable.

    The distribution is softmax(logits / temperature) without the banned ids: the one that the engine samples from.
    Chunks of `chunk` tokens are recomputed in the backward pass; where there is only one, its probabilities are kept instead, in the
    model's dtype (in which the gradient's products run anyway).
    """
    logp_T, entropy_T = _HeadLogp.apply(hidden_TD, weight_VD, bias_V, target_T, temperature, banned_ids, chunk, entropy)  # type: ignore[misc]
    return logp_T, entropy_T if entropy else None


def head_certainty(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *, banned_ids: tuple[int, ...] = (), chunk: int = 1024
) -> Tensor:
    """Self-certainty [T], fp32, no gradient: KL(U || p) = -log V - (1 / V) sum_v log p_v in nats, >= 0, V = ids that are not banned, temperature 1.

    Source: arXiv:2502.18581.
    """
    found = []
    for a in range(0, len(hidden_TD), chunk):
        logits = head_logits(hidden_TD[a : a + chunk], weight_VD, bias_V)
        if banned_ids:
            keep_V = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
            keep_V[list(banned_ids)] = False
            logits = logits[:, keep_V]
        found.append(logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[1]))
    return torch.cat(found) if found else hidden_TD.new_zeros(0, dtype=torch.float32)


def _scaled(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, banned: tuple[int, ...]) -> Tensor:
    logits = head_logits(hidden, weight, bias)
    if temperature != 1.0:
        logits = logits.div_(temperature)
    if banned:
        logits[:, list(banned)] = -torch.inf
    return logits


class _HeadLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
        temperature: float, banned: tuple[int, ...], chunk: int, entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = torch.float64 if weight.dtype == torch.float64 else torch.float32
        lse = torch.empty(len(target), dtype=out, device=hidden.device)
        logp, ent = torch.empty_like(lse), torch.zeros_like(lse)
        kept = None
        for a in range(0, len(target), chunk):
            b = a + chunk
            logits = _scaled(hidden[a:b], weight, bias, temperature, banned)
            lse[a:b] = logits.logsumexp(-1)
            logp[a:b] = logits.gather(1, target[a:b, None])[:, 0] - lse[a:b]
            if entropy or (len(target) <= chunk and any(ctx.needs_input_grad)):
                logits.sub_(lse[a:b, None])
            if entropy:
                ent[a:b] = -(logits.exp() * logits.clamp(min=-1e4)).sum(-1)  # the clamp turns 0 * -inf of banned ids into 0
            elif len(target) <= chunk and any(ctx.needs_input_grad):
                kept = logits.exp_().to(weight.dtype)
        ctx.save_for_backward(hidden, weight, bias, target, lse, ent, kept)
        ctx.how = temperature, banned, chunk, entropy
        return logp, ent

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g_logp, g_ent = grads
        hidden, weight, bias, target, lse, ent, kept = ctx.saved_tensors
        temperature, banned, chunk, entropy = ctx.how
        d_hidden = torch.empty_like(hidden)
        d_weight: Tensor | None = None
        d_bias = torch.zeros(bias.shape, dtype=lse.dtype, device=bias.device) if bias is not None and ctx.needs_input_grad[2] else None
        for a in range(0, len(target), chunk):
            b = min(a + chunk, len(target))
            logp = _scaled(hidden[a:b], weight, bias, temperature, banned).sub_(lse[a:b, None]) if kept is None else None
            p = kept if logp is None else logp.exp()
            d = p * -g_logp[a:b, None]
            if entropy and logp is not None:
                d -= p * (logp.clamp(min=-1e4) + ent[a:b, None]) * g_ent[a:b, None]
            d[torch.arange(b - a, device=d.device), target[a:b]] += g_logp[a:b]
            if temperature != 1.0:
                d /= temperature
            if d_bias is not None:
                d_bias += d.sum(0)
            d = d.to(weight.dtype)
            d_hidden[a:b] = d @ weight
            if ctx.needs_input_grad[1]:
                part = d.T @ hidden[a:b]
                d_weight = part if len(target) <= chunk else part.to(lse.dtype) if d_weight is None else d_weight.add_(part)
        return (
            d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            None, None, None, None, None,
        )  # fmt: skip

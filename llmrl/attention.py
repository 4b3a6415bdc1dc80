"""Attention over packed tokens, for training and for decoding, registered with transformers under the name "llmrl".

Everything but attention works on flat tokens [1, P], so nothing is padded where the work is. Only inside attention are tokens laid out
as rows: a row is a context followed by one completion, and rows that share a context read the same tokens of it. The context is thus
computed once a group. A `plan`, passed through the model's keyword arguments, says how tokens become rows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

NAME = "llmrl"
Kernel = Literal["sdpa", "math"]


SCORES = 1 << 24
"""Attention scores (rows x heads x L x L) up to which the CPU's bf16 path holds them all; 64 MB in fp32."""


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: Kernel, **how: Any) -> Tensor:
    if kernel == "math":
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, scale=scale, **how)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and how.get("is_causal"):
        if q.shape[0] * q.shape[1] * q.shape[2] ** 2 <= SCORES:
            return _short(q, k, v, scale)
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale, **how).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, scale=scale, **how)


def _short(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention in bf16 on a CPU: scores and softmax in fp32, the product with the values in bf16.

    The query heads that share a key head become further queries of it. Forward and backward take 4.5 ms where torch's bf16 kernel takes
    12 (8 rows, 9:3 heads, L = 109, D = 64, 2 cores); relative errors against fp64 are 2.2e-3 (output) and 2.9e-3 (gradients), its 1.9e-3
    and 3.1e-3 to 5.1e-3.
    """
    R, H, L, D = q.shape
    K = k.shape[1]
    scores = (q.reshape(R, K, H // K * L, D).float() @ k.float().transpose(-1, -2)).mul(scale).view(R, K, H // K, L, L)
    hide = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
    p = scores.masked_fill(hide, -torch.inf).softmax(-1).to(v.dtype).view(R, K, H // K * L, L)
    return (p @ v).view(R, H, L, D)


class PackPlan:
    """Causal attention over rows gathered from P flat tokens.

    index_RL: long [R, L], the flat token at each place of each row; rows shorter than L end in any valid index (causality hides them).
    pick_P: long [P], the place r * L + l from which each flat token takes its output (one of the rows that hold it).
    """

    def __init__(self, index_RL: Tensor, pick_P: Tensor, kernel: Kernel = "sdpa"):
        self.index_RL, self.pick_P = index_RL, pick_P
        self.kernel: Kernel = kernel

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """q [1, H, P, D], k and v [1, H_kv, P, D] -> [1, P, H, D]."""
        R, L = self.index_RL.shape
        flat = self.index_RL.reshape(-1)
        q_r, k_r, v_r = (x[0].transpose(0, 1).index_select(0, flat).view(R, L, x.shape[1], -1).transpose(1, 2) for x in (q, k, v))
        how: dict[str, Any] = {"is_causal": True}
        if window is not None and window < L:
            place = torch.arange(L, device=q.device)
            how = {"attn_mask": (place[:, None] >= place) & (place[:, None] - place < window)}
        out = _attend(q_r, k_r, v_r, scale, self.kernel, enable_gqa=q.shape[1] != k.shape[1], **how)  # [R, H, L, D]
        return out.transpose(1, 2).reshape(R * L, q.shape[1], -1).index_select(0, self.pick_P)[None]


class PrefillPlan(PackPlan):
    """A PackPlan that keeps the keys and values of every layer: `kv[layer] = (k, v)`, each [P, H_kv, D]."""

    kv: dict[int, tuple[Tensor, Tensor]]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        if layer == 0:
            self.kv = {}
        self.kv[layer] = (k[0].transpose(0, 1), v[0].transpose(0, 1))
        return super().__call__(layer, q, k, v, scale, window)


class DecodePlan:
    """One new token for each of the first n rows of a key-value cache.

    cache[layer] = (k, v), each [N, H_kv, L, D]; a row's key of absolute position p lies at place p. `position_n` is where the new
    tokens go; everything up to and including that place is attended to.
    """

    def __init__(self, cache: list[tuple[Tensor, Tensor]], position_n: Tensor, kernel: Kernel = "sdpa"):
        self.cache, self.position_n = cache, position_n
        self.kernel: Kernel = kernel
        self.rows_n = torch.arange(len(position_n), device=position_n.device)
        self.length = int(position_n.max()) + 1
        place = torch.arange(self.length, device=position_n.device)
        self.behind_nL = position_n[:, None] - place  # distance of each key from the query; negative = not there yet
        self.mask = (self.behind_nL >= 0)[:, None, None, :]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        K, V = self.cache[layer]
        n, heads = q.shape[2], q.shape[1]
        K[self.rows_n, :, self.position_n] = k[0].transpose(0, 1)
        V[self.rows_n, :, self.position_n] = v[0].transpose(0, 1)
        mask = self.mask if window is None else self.mask & (self.behind_nL < window)[:, None, None, :]
        grouped = q[0].transpose(0, 1).reshape(n, K.shape[1], heads // K.shape[1], -1)  # query heads that share a key head become queries of it
        out = _attend(grouped, K[:n, :, : self.length], V[:n, :, : self.length], scale, self.kernel, attn_mask=mask)
        return out.reshape(1, n, heads, -1)


def _forward(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    plan = kwargs.get("plan")
    if plan is None:
        raise ValueError('attention "llmrl" needs a plan: call the model through llmrl.models.Policy, or load it with another attention')
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or kwargs.get("dropout"):
        raise NotImplementedError(f"{type(module).__name__}: soft-capped scores, attention sinks and attention dropout are not supported")
    scale = module.head_dim**-0.5 if scaling is None else scaling
    return plan(module.layer_idx, query, key, value, scale, kwargs.get("sliding_window")), None


AttentionInterface.register(NAME, _forward)

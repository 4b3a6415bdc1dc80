"""How far a trained model has moved from its base: token KL, linear CKA a layer, relative weight distance, on fixed traces of the base.

Which measure the GASP paper uses is not known; these three are our choice (section 6.5 of the specification). Compare runs at equal
recoverability, not at equal steps. Nothing here knows how a model is loaded: a `Lens` is two functions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 256
"""Positions whose logits are held at once: 256 x 150,000 x 4 bytes are 150 MB."""


@dataclass(frozen=True)
class Lens:
    """A model as drift sees it."""

    hidden: Callable[[Sequence[int]], list[Tensor]]
    """ids of one text -> hidden states [P, D] after each layer; the last is what the vocabulary head reads."""
    logits: Callable[[Tensor], Tensor]
    """[N, D] of the last layer -> fp32 logits [N, V]; -inf for tokens that are never sampled."""
    weights: Callable[[], Iterable[tuple[str, Tensor]]]


def token_kl(base_logits_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """KL(base || model) in nats at each of N positions: sum_v p_base (log p_base - log p_model); tokens with p_base = 0 add nothing."""
    p, q = base_logits_NV.float().log_softmax(-1), logits_NV.float().log_softmax(-1)
    return torch.where(p > -torch.inf, p.exp() * (p - q), torch.zeros_like(p)).sum(-1)


class CKA:
    """Linear centred kernel alignment of two representations, from sums over samples that come in parts.

    CKA = ||Yc' Xc||_F^2 / (||Xc' Xc||_F ||Yc' Yc||_F), Xc and Yc centred over the samples. Source: arXiv:1905.00414, section 3. 1 for the same
    representation, also after a rotation, a shift or one scale for all axes; None where one of the two does not vary.
    Memory: 3 D^2 doubles.
    """

    def __init__(self) -> None:
        self.n = 0
        self._sums: list[Tensor] | None = None

    def add(self, X_ND: Tensor, Y_NE: Tensor) -> None:
        """Samples in the same order on both sides."""
        if len(X_ND) != len(Y_NE):
            raise ValueError(f"CKA.add: {len(X_ND)} and {len(Y_NE)} samples; both sides must describe the same ones")
        X, Y = X_ND.double(), Y_NE.double()
        parts = [X.sum(0), Y.sum(0), X.T @ X, Y.T @ Y, Y.T @ X]
        self._sums = parts if self._sums is None else [a + b for a, b in zip(self._sums, parts, strict=True)]
        self.n += len(X)

    def value(self) -> float | None:
        if self._sums is None or self.n < 2:
            return None
        x, y, xx, yy, yx = self._sums
        xx, yy, yx = xx - torch.outer(x, x) / self.n, yy - torch.outer(y, y) / self.n, yx - torch.outer(y, x) / self.n
        below = float(xx.norm() * yy.norm())
        return float(yx.norm() ** 2) / below if below > 0 else None


def linear_cka(X_ND: Tensor, Y_NE: Tensor) -> float | None:
    """`CKA` of samples that are all there."""
    cka = CKA()
    cka.add(X_ND, Y_NE)
    return cka.value()


def weight_distance(base: Iterable[tuple[str, Tensor]], other: Iterable[tuple[str, Tensor]]) -> float:
    """||theta - theta_0|| / ||theta_0|| over all parameters, each counted once. Raises ValueError where names or shapes differ."""
    there, moved, size = dict(other), 0.0, 0.0
    for name, w0 in base:
        w = there.pop(name, None)
        if w is None or w.shape != w0.shape:
            raise ValueError(f"the parameter {name} is {'missing' if w is None else tuple(w.shape)}; the base has {tuple(w0.shape)}")
        a, b = w0.detach().double().cpu(), w.detach().double().cpu()
        moved += float((b - a).square().sum())
        size += float(a.square().sum())
    if there:
        raise ValueError(f"{len(there)} parameters that the base does not have, e.g. {next(iter(there))}")
    if not size:
        raise ValueError("the base's weights are all 0")
    return (moved / size) ** 0.5


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes and up to 4096 evenly spaced values of each parameter: tells one model from another, cheaply."""
    digest = hashlib.sha256()
    for name, w in weights:
        flat = w.detach().flatten()
        step = max(1, len(flat) // 4096)
        digest.update(f"{name}{tuple(w.shape)}".encode() + flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def drift(base: Lens, model: Lens, traces: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Any]:
    """{"kl_nats", "cka" (one number a layer), "weight_distance", "tokens", "traces"} over (context ids, response ids) of the base.

    KL is the mean over all response tokens, at the positions that predict them; CKA has the hidden states at the same positions as samples.
    A figure that the two models do not allow is None, and "left_out" says why.
    """
    left_out: dict[str, str] = {}
    ckas: list[CKA] | None = None
    kl_sum, n = 0.0, 0
    for context, response in traces:
        if not response:
            continue
        at = slice(len(context) - 1, len(context) + len(response) - 1)
        ours, theirs = ([h[at] for h in lens.hidden([*context, *response])] for lens in (base, model))
        if len(ours) == len(theirs):
            ckas = ckas or [CKA() for _ in ours]
            for cka, x, y in zip(ckas, ours, theirs, strict=True):
                cka.add(x, y)
        else:
            left_out["cka"] = f"{len(ours)} layers in the base, {len(theirs)} in the model"
        for a in range(0, len(response), CHUNK):
            p, q = base.logits(ours[-1][a : a + CHUNK]), model.logits(theirs[-1][a : a + CHUNK])
            if p.shape != q.shape:
                left_out["kl_nats"] = f"{p.shape[1]} vocabulary entries in the base, {q.shape[1]} in the model"
                break
            kl_sum += float(token_kl(p, q).double().sum())
        n += len(response)
    distance = None
    try:
        distance = weight_distance(base.weights(), model.weights())
    except ValueError as error:
        left_out["weight_distance"] = str(error)
    return {
        "kl_nats": kl_sum / n if n and "kl_nats" not in left_out else None,
        "cka": [c.value() for c in ckas] if ckas and "cka" not in left_out else None,
        "weight_distance": distance, "tokens": n, "traces": sum(1 for _, r in traces if r), "left_out": left_out,
    }  # fmt: skip

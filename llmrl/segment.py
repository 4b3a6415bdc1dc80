"""Reductions over a cohort or sample index: the only place where "per group" is spelled out. Pure torch, any float type.

`x` has one entry an element, `index` (long, same length) says which of `n` segments it belongs to, `where` (bool) leaves elements out.
A segment without elements gives 0 in sum and count, and NaN in mean, std and max: missing is not zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _kept(x: Tensor, index: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor]:
    return (x, index) if where is None else (x[where], index[where])


def seg_sum(x: Tensor, index: Tensor, n: int, where: Tensor | None = None) -> Tensor:
    """Sum of each segment, [n]."""
    x, index = _kept(x, index, where)
    return torch.zeros(n, dtype=x.dtype, device=x.device).index_add(0, index, x)


def seg_count(index: Tensor, n: int, where: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Number of elements of each segment, [n], as a float."""
    return seg_sum(torch.ones(index.shape[0], dtype=dtype, device=index.device), index, n, where)


def seg_mean(x: Tensor, index: Tensor, n: int, where: Tensor | None = None) -> Tensor:
    """Mean of each segment, [n]; NaN where it is empty."""
    return seg_sum(x, index, n, where) / seg_count(index, n, where, x.dtype)


def seg_std(x: Tensor, index: Tensor, n: int, where: Tensor | None = None, ddof: int = 1) -> Tensor:
    """Standard deviation of each segment, [n]; NaN where it has `ddof` elements or fewer."""
    count = seg_count(index, n, where, x.dtype)
    off = x - seg_mean(x, index, n, where)[index]
    return (seg_sum(off * off, index, n, where) / (count - ddof).clamp(min=0)).sqrt()


def seg_max(x: Tensor, index: Tensor, n: int, where: Tensor | None = None) -> Tensor:
    """Largest of each segment, [n]; NaN where it is empty."""
    x, index = _kept(x, index, where)
    top = torch.full((n,), -torch.inf, dtype=x.dtype, device=x.device).scatter_reduce(0, index, x, "amax", include_self=True)
    return torch.where(top == -torch.inf, torch.nan, top)


def seg_rank(x: Tensor, index: Tensor, n: int, where: Tensor | None = None) -> Tensor:
    """Rank of each element within its segment, smallest = 0, ties share the mean rank; NaN where left out. Shape of x."""
    keep = torch.ones_like(index, dtype=torch.bool) if where is None else where
    pair = (index[:, None] == index[None, :]) & keep[None, :]
    below = (pair & (x[None, :] < x[:, None])).sum(1).to(x.dtype)
    equal = (pair & (x[None, :] == x[:, None])).sum(1).to(x.dtype)
    return torch.where(keep, below + (equal - 1) / 2, torch.nan)

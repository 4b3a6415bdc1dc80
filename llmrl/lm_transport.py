"""Token-level value-gradient transport for language models (VGF, arXiv:2604.14265). Stub: bodies are being filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Item = tuple[Sequence[int], Sequence[int]]
"""(context ids, response ids): what the reward model reads is their concatenation, nothing else."""


@dataclass(frozen=True)
class Moved:
    """A response before and after transport."""

    token_ids: list[int]
    reward_before: float
    reward_flowed: float
    reward_after: float
    changed_share: float
    ref_drop: float
    kept: bool


class RewardModel:
    """A frozen sequence-classification model with one label."""

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> RewardModel:
        raise NotImplementedError

    def score(self, items: Sequence[Item]) -> list[float]:
        raise NotImplementedError


def transport(
    policy: Any, reward: RewardModel, items: Sequence[Item], *, steps: int, eps: float, velocity: Literal["independent", "svgd", "pooled"] = "independent",
    alpha: float = 1.0, bandwidth: float | None = None, optimizer: Literal["plain", "adam"] = "plain", guard: float | None = 0.5, candidates: int = 0,
    seed: int = 0,
) -> list[Moved]:  # fmt: skip
    raise NotImplementedError

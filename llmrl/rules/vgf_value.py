"""A value head for the rule `vgf`: another head on the reward model's frozen backbone, fitted to the verifier's scores as training goes on.

OUR EXTENSION of VGF (arXiv:2604.14265); the paper's language-model part follows a frozen reward model, and its offline part a critic that is
learned while it is followed, which is what this puts in the place of the frozen reward. Why on the frozen backbone and by least squares: the
features never move, so the fit has one answer that does not depend on the past of an optimizer; the transported texts, which lie where a reward
model trained before is wrong, are judged anyway; and a gradient with respect to token embeddings needs a network on this rank, which the sampling
policy (on a server, or sharded) may not be.

The head lags a step: samples of a step are moved along the value of the steps before. So what is moved does not depend on the rank that moves it,
and the state is what the memory holds, which every checkpoint has.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrl.lm_transport import Item, RewardModel
from llmrl.records import InputError
from llmrl.rollout import RolloutIO

STORE, ALL = "vgf/value", "all"


def fit(h_MD: Tensor, y_M: Tensor, prior_D: Tensor, ridge: float) -> Tensor:
    """Slope of a linear value, [D], fp64: the prior's direction, scaled, and a correction that the data must pay for.

    c = <Hp, y> / |Hp|^2;   w = c p + argmin_v |H v - (y - c H p)|^2 + ridge M s |v|^2,   s = mean of the squared entries of H
    h, y: features and scores minus their prompt's means. Without data, or with equal scores, w = 0.
    """
    h, y, p = h_MD.double(), y_M.double(), prior_D.double()
    r = h @ p
    size = float(r @ r)
    w = (float(r @ y) / size if size > 0 else 0.0) * p
    penalty = ridge * float(h.square().sum()) / max(1, h.shape[1])  # ridge M s
    if penalty == 0:
        return w
    left, small = y - h @ w, len(h) < h.shape[1]
    gram = h @ h.T if small else h.T @ h
    gram += penalty * torch.eye(len(gram), dtype=gram.dtype)
    return w + (h.T @ torch.linalg.solve(gram, left) if small else torch.linalg.solve(gram, h.T @ left))


@dataclass(frozen=True)
class ValueHead:
    """What is fitted, and to how much of the past."""

    window: int
    """Prompts whose texts the fit sees; a step of which some have left is left out whole, so that all numbers of ranks see the same."""
    ridge: float

    def model(self, reward: RewardModel, io: RolloutIO) -> RewardModel:
        """The value to follow in this step: the reward model itself while there is nothing to fit, or nothing that tells texts apart."""
        entries: list[dict[str, Any]] = io.memory.recall(STORE, ALL)
        if not entries:
            return reward
        if len(entries) >= self.window:
            first = min(e["step"] for e in entries)
            entries = [e for e in entries if e["step"] > first]
            if not entries:
                raise InputError(f"[rule] value_window = {self.window} prompts hold no whole step; give it several times rollout.prompts")
        entries.sort(key=lambda e: (e["step"], e["prompt"]))
        h_MD = torch.cat([_unpacked(e["features"], len(e["scores"])) for e in entries])
        y_M = torch.tensor([y for e in entries for y in e["scores"]], dtype=torch.float64)
        slope = fit(h_MD, y_M, reward.slope.cpu(), self.ridge)
        return reward.with_head(slope.to(reward.slope)) if bool(slope.any()) else reward

    def learn(self, reward: RewardModel, io: RolloutIO, prompt: str, texts: Sequence[tuple[Item, float | None]], followed: RewardModel) -> None:
        """Remembers a prompt's judged texts, and notes how well the value that was followed ranks them, which had not seen them."""
        judged = [(item, y) for item, y in texts if y is not None]
        if len(judged) < 2:
            return
        h, y = reward.features([item for item, _ in judged]), torch.tensor([y for _, y in judged], dtype=torch.float64)
        for name, model in (("value/ranked", followed), ("reward/ranked", reward)):
            right, pairs = ranked(h.double() @ model.slope.double().cpu(), y)
            if pairs:
                io.note(name, right, pairs)
        entry = {"step": io.step, "prompt": prompt, "features": _packed(h - h.mean(0)), "scores": (y - y.mean()).tolist()}
        io.memory.remember(STORE, ALL, entry, cap=self.window)


def ranked(value_N: Tensor, score_N: Tensor) -> tuple[float, float]:
    """(pairs that the value ranks as the scores do, a tie half; pairs with different scores)"""
    apart = (score_N[:, None] - score_N).sign().triu(1)
    there = apart != 0
    return float((1 + apart * (value_N[:, None] - value_N).sign())[there].sum() / 2), float(there.sum())


def _packed(h_ND: Tensor) -> str:
    """fp32 bytes as text: JSON numbers would take four times the place."""
    return base64.b64encode(h_ND.contiguous().numpy().astype("<f4").tobytes()).decode("ascii")


def _unpacked(text: str, n: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(n, -1).copy())

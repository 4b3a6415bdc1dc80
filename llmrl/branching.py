"""Branching, for rules that learn from what other actions would have led to (Agent Learning via Early Experience, arXiv:2510.08558).

From a state of an episode K actions are played, each in an environment of its own that is restored to that state. What comes of it are transitions
(state, action, observation), of which a rule makes samples: on the action's tokens (imitation), or on the observation's (an implicit world
model, L = -sum log p(s' | s, a)), which an episode's mask leaves out. With K = 0 there is the expert's action alone: imitation learning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmrl.environment import Action, Make, Step
from llmrl.episode import Episode
from llmrl.records import Sample
from llmrl.rollout import RolloutIO


@dataclass(frozen=True)
class Transition:
    """One action played from a state, and what the environment answered."""

    name: str
    prompt_id: str
    context_ids: list[int]
    """the state"""
    action_ids: list[int]
    observation_ids: list[int]
    """with the turn delimiters around it; empty where the episode ended"""
    step: Step
    version: int
    """of the weights that wrote the action"""

    def mask(self, part: Literal["action", "observation"]) -> list[bool]:
        """Over action_ids + observation_ids. The two masks are disjoint and cover both."""
        first = part == "action"
        return [first] * len(self.action_ids) + [not first] * len(self.observation_ids)

    def sample(self, part: Literal["action", "observation"], *, weight: str) -> Sample | None:
        """A sample on that part, for a loss.ce() Term of that weight; None where there is no such token."""
        if not any(self.mask(part)):
            return None
        return Sample(
            id=f"{self.name}/{part}", prompt_id=self.prompt_id, context_ids=self.context_ids, token_ids=self.action_ids + self.observation_ids,
            behavior_logp=None, policy_version=self.version, role=part, cohort=self.name, weights={weight: 1.0}, mask=self.mask(part),
        )  # fmt: skip


async def branches(e: Episode, actions: Sequence[Sequence[int]], make: Make, io: RolloutIO) -> list[Transition]:
    """A transition for each of the actions (ids, as sampled or from Chat.completion_ids), from the episode's present state, which stays as it is.

    make: the recipe's environment, turns.Episodes.make. Raises EnvironmentFailed as the episode's own calls do, TypeError where the
    environment has no snapshot() and restore().
    """
    if not hasattr(e.environment, "snapshot") or not hasattr(e.environment, "restore"):
        raise TypeError(f"{type(e.environment).__name__} has no snapshot() and restore(state), which branching needs")
    found = []
    for k, ids in enumerate(actions):
        other, state = make(), e.environment.snapshot()

        async def play(other: object = other, state: object = state, text: str = io.chat.text(ids)) -> Step:
            await other.reset(e.prompt, ("branch", e.prompt.visit_id))  # type: ignore[attr-defined]
            other.restore(state)  # type: ignore[attr-defined]
            try:
                return await other.step(Action(text))  # type: ignore[attr-defined]
            finally:
                await other.close()  # type: ignore[attr-defined]

        step = await e.host.call(f"branch {k} of step {e.turn + 1}", play)
        seen = io.chat.between_ids(step.messages, last_id=ids[-1], tools=e.tools) if step.messages else []
        found.append(Transition(f"{e.prompt.visit_id}/{e.i}/turn{e.turn}/branch{k}", e.prompt.id, e.ids, list(ids), seen, step, io.version))
    return found

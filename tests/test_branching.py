"""Branching: the state stays, every action has its own environment, and the masks of action and observation are disjoint and cover the transition."""

import asyncio

import pytest
import torch

from llmrl import losses
from llmrl.batch import Outputs as Out
from llmrl.batch import evaluate_terms, global_denominators, pack
from llmrl.branching import branches
from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.environments.calculator import calculator
from llmrl.environments.guessing import guessing
from llmrl.memory import Memory
from llmrl.records import Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules.base import Term
from llmrl.turns import Episodes
from tests.builders import ALPHABET

CHAT = Chat(char_tokenizer(ALPHABET))
PROMPT = Prompt("a", ({"role": "user", "content": "1-15="},), "11")
ids = CHAT.completion_ids


class Judge:
    def score(self, items):
        return [Verdict(0.0) for _ in items]


def play(k, make=None):
    """The expert's episode, with the same k guesses tried beside it at every state."""
    made = make or guessing()
    io = RolloutIO(TableEngine(CHAT, lambda r: "1"), Judge(), CHAT, Memory(), Sampling(4), 1, (0, 1), environment=Episodes(made, max_turns=4))
    found = []

    async def before(e):
        text = await e.expert() if make is None else "(1+1)"
        others = [c.token_ids for c in io.sample([e.ids] * k, [("a", "branch", e.turn, j) for j in range(k)])]
        found.append(await branches(e, [ids(text), *others, ids("11")][: k + 1 + (k > 0)], made, io))
        return text

    (group,) = asyncio.run(io.environment.play([PROMPT], io, before=before))
    return group.samples[0], found


def test_the_episode_goes_on_as_if_nothing_had_been_tried():
    alone, tried = play(0), play(2)
    assert alone[0].token_ids == tried[0].token_ids and alone[0].text == "8+12-10+11" and [len(f) for f in tried[1]] == [4, 4, 4, 4]
    expert, one, *_, right = tried[1][1]  # behind "8": 12 is too large, 1 too small, 11 right
    assert [t.step.messages[0]["content"] for t in (expert, one)] == ["-", "+"] and right.step.done and right.step.score == 1.0
    assert expert.context_ids == one.context_ids == CHAT.prompt_ids(PROMPT.messages) + ids("8") + ids("+")[:-1]


def test_masks_are_disjoint_and_cover_the_transition():
    for t in (t for turn in play(2)[1] for t in turn):
        a, o = t.mask("action"), t.mask("observation")
        assert all(x != y for x, y in zip(a, o, strict=True)) and len(a) == len(t.action_ids + t.observation_ids)
        sample, other = t.sample("action", weight="imitate"), t.sample("observation", weight="world")
        assert sample.counted(sample.token_ids) == t.action_ids
        assert (other is None) == t.step.done and (other is None or other.counted(other.token_ids) == t.observation_ids)


def test_no_branch_is_imitation():
    """K = 0: the action samples are the expert's turns in the expert's states."""
    episode, found = play(0)
    assert [CHAT.text(t.action_ids) for (t,) in found] == ["8", "12", "10", "11"]
    assert [t.context_ids for (t,) in found][1:] == [episode.context_ids + episode.token_ids[:n] for n in (3, 7, 11)]


def test_a_loss_on_observations_is_on_nothing_else():
    """-sum log p(s' | s, a): with log-probs -1 on observations, the rest is not even there."""
    samples = [s for turn in play(1)[1] for t in turn if (s := t.sample("observation", weight="world"))]
    term = Term(losses.ce(), weight="world")
    (batch,) = pack(samples, [torch.zeros(s.length) for s in samples], tokens=10**6)
    n = sum(s.length for s in samples)
    assert len(batch.tokens_T) == n and {CHAT.text([t]) for t in batch.tokens_T.tolist()} == {"+", "-"}
    assert global_denominators(samples, [term], max_new_tokens=4) == [n]
    assert float(evaluate_terms([term], batch, Out(torch.full((n,), -1.0), torch.zeros(n)), [1.0])[0]) == n


def test_an_environment_without_states_is_named():
    with pytest.raises(TypeError, match=r"Tools has no snapshot\(\) and restore\(state\)"):
        play(0, calculator(marks=("(", ")")))

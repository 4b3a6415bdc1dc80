"""Sotopia-RL: the worked example of its notes, its identities, credit by utterance, attribution by environment and by plug-in; the contract."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.environment import Step
from llmrl.memory import Memory
from llmrl.records import Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules.sotopia import sotopia, utterance_reward
from llmrl.step import give_credit, view_of
from llmrl.turns import Episodes
from tests.builders import ALPHABET, f64, make_view
from tests.contracts.rule import Trial, check_rule

torch.set_num_threads(1)
CHAT = Chat(char_tokenizer(ALPHABET))
PROMPT = Prompt("p", ({"role": "user", "content": "7="},), "7")
RANK = SimpleNamespace(all_sum=lambda x: x, gather=lambda x: [x])


class Talk:
    """Three turns; the attribution of a turn is the digit that it says, "-" is -1 and "(" is none; the score is 0.8."""

    async def reset(self, prompt, seed):
        self.turns = 0
        return prompt.messages

    async def step(self, action):
        self.turns += 1
        said = action.text[:1]
        numbers = {} if said == "(" else {"attribution": -1.0 if said == "-" else float(said)}
        if self.turns == 3:
            return Step(done=True, score=0.8, numbers=numbers)
        return Step(({"role": "user", "content": "#"},), numbers=numbers)

    async def close(self):
        pass


def rollout(says, rule, *, group=2):
    io = RolloutIO(
        TableEngine(CHAT, lambda r: says[r.seed[3]][r.seed[4] if len(r.seed) > 4 else 0]), SimpleNamespace(score=lambda items: [Verdict(0.8) for _ in items]),
        CHAT, Memory(), Sampling(6), group, (0, 1), environment=Episodes(Talk),
    )  # fmt: skip
    return asyncio.run(rule.collect([PROMPT], io))[0].samples, io


def advantages(samples, rule):
    return give_credit(rule, samples, view_of(samples, RANK, 18), rule.credit.init())[0]


def test_the_worked_example():
    """Goal score 8; papers/agents.md section 4."""
    assert utterance_reward(f64([-1, 0, 1, 2, 3]), 8).tolist() == pytest.approx([-1, 0, 2.666667, 5.333333, 8], abs=1e-6)


def test_a_goal_of_zero_leaves_the_harm_alone_and_the_rest_is_linear():
    a = f64([-1, 0, 1, 2, 3, None])
    assert utterance_reward(a, 0.0)[:5].tolist() == [-1, 0, 0, 0, 0]
    assert torch.equal(utterance_reward(a, 6.0)[1:5], 2 * utterance_reward(a, 3.0)[1:5]) and utterance_reward(a, 3.0)[5].isnan()


def test_utterances_are_compared_at_their_turn():
    """g = 8 (0.8 times 10). Turn 0: a = 3, 0 -> r = 8, 0; turn 1: 1, 1 -> equal; turn 2: -1, 2 -> -1, 5.333: +-sqrt(1/2) of the std."""
    rule = sotopia(goal_scale=10)
    samples, io = rollout([["3", "1", "-"], ["0", "11", "2"]], rule)
    adv = advantages(samples, rule)
    half = 0.5**0.5
    assert adv[0].tolist() == pytest.approx([half, half, 0, 0, -half, -half], abs=1e-5)
    assert adv[1].tolist() == pytest.approx([-half, -half, 0, 0, 0, half, half], abs=1e-5)
    assert io.noted["rule/unattributed"] == [0, 13] and [s.reward for s in samples] == [0.8, 0.8]


def test_compared_with_the_whole_cohort():
    """r = 8, 2.667, -1 and 0, 2.667, 5.333: mean 2.944, and the two equal ones get the same."""
    rule = sotopia(goal_scale=10, compare="cohort")
    samples, _ = rollout([["3", "1", "-"], ["0", "1", "2"]], rule)
    a, b = advantages(samples, rule)
    r = f64([8, 8 / 3, -1, 0, 8 / 3, 16 / 3])
    want = (r - r.mean()) / (r.std() + 1e-6)
    assert torch.allclose(a[::2], want[:3]) and torch.allclose(b[::2], want[3:]) and a[2] == b[2]


def test_an_utterance_without_attribution_moves_nothing():
    rule = sotopia()
    samples, io = rollout([["3", "(", "2"], ["0", "1", "2"], ["1", "3", "2"]], rule, group=3)
    adv = advantages(samples, rule)
    assert adv[0][2:4].tolist() == [0, 0] and io.noted["rule/unattributed"] == [2, 18]
    assert float(adv[1][2]) == pytest.approx(-float(adv[2][2])) != 0  # the other two are compared with each other


def test_more_credit_never_means_less_advantage():
    rule, last = sotopia(), -9.0
    for a in ["-", "0", "1", "2", "3"]:
        samples, _ = rollout([[a, "1", "1"], ["1", "1", "1"]], rule)
        now = float(advantages(samples, rule)[0][0])
        assert now >= last
        last = now


JUDGE = """
import asyncio
def make():
    async def judge(prompt, utterances, score):
        if utterances[0] == "0": raise OSError("no judge")
        return [int(u[0]) if u[0].isdigit() else None for u in utterances]
    return judge
def slow():
    async def judge(prompt, utterances, score): await asyncio.sleep(9)
    return judge
def wrong():
    async def judge(prompt, utterances, score): return [5] * len(utterances)
    return judge
def short():
    async def judge(prompt, utterances, score): return [1]
    return judge
def by_length():
    async def judge(prompt, utterances, score): return [len(u) % 5 - 1 for u in utterances]
    return judge
"""


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    return lambda name, **keys: sotopia(attribution=f"./judge.py:{name}", base=Path(tmp_path), **keys)


def test_a_plug_in_attributes(judge):
    samples, io = rollout([["3", "(", "2"], ["0", "1", "2"]], judge("make"))
    assert [x if x == x else None for x in samples[0].counted(samples[0].streams["attribution"])] == [3, 3, None, None, 2, 2]
    assert all(x != x for x in samples[1].streams["attribution"]) and io.noted["rule/unattributed"] == [8, 12]


def test_what_goes_wrong_with_a_plug_in(judge):
    samples, _ = rollout([["3", "1", "2"]], judge("slow", timeout_s=0.05), group=1)
    assert all(x != x for x in samples[0].streams["attribution"])
    with pytest.raises(ValueError, match=r"attributions \[5.0\]; they are -1, 0, 1, 2 or 3"):
        rollout([["3", "1", "2"]], judge("wrong"), group=1)
    with pytest.raises(RuntimeError, match=r"6 of 6 dialogues could not be attributed; the first: prompt 'p': ValueError: 1 attributions for 3"):
        rollout([["3", "1", "2"]] * 6, judge("short"), group=6)


def test_without_attributions_it_says_what_is_missing():
    with pytest.raises(ValueError, match=r"the environment gives it in Step\.numbers, or a plug-in does"):
        sotopia().credit.update(make_view([1.0], [0]), sotopia().credit.init())


def test_the_contract(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    with Trial(tmp_path) as trial:
        check_rule(trial, "sotopia", {"attribution": "./judge.py:by_length"}, base=tmp_path)

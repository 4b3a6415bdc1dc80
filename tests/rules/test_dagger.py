"""DAgger: the schedule of its notes, beta 1 and 0, states as they were executed, labels alone in the loss; replay; the contract."""

import asyncio

import pytest
import torch
from accelerate import Accelerator

from llmrl.batch import evaluate_terms, global_denominators, pack
from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.environment import Step
from llmrl.environments.guessing import guessing
from llmrl.hf_engine import HFEngine
from llmrl.learner import Learner
from llmrl.memory import Memory
from llmrl.records import InputError, Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules.base import Needs
from llmrl.rules.dagger import beta, dagger
from llmrl.sft import demonstration
from llmrl.turns import Episodes
from tests.builders import ALPHABET, tiny_policy
from tests.contracts.rule import Trial, check_rule

torch.set_num_threads(1)
CHAT = Chat(char_tokenizer(ALPHABET))
PROMPTS = [Prompt("a", ({"role": "user", "content": "1-15="},), "11"), Prompt("b", ({"role": "user", "content": "3-9="},), "3")]
ids = CHAT.completion_ids


class Judge:
    def score(self, items):
        return [Verdict(0.0, "no_answer") for _ in items]


def play(rule, *, engine=None, step=1, say="9", memory=None, group=2, make=None):
    engine = engine or TableEngine(CHAT, lambda r: say)
    asked = []
    generate = engine.generate
    engine.generate = lambda requests: (asked.extend(requests), generate(requests))[1]
    io = RolloutIO(engine, Judge(), CHAT, memory or Memory(), Sampling(4), group, (0, step), environment=Episodes(make or guessing(), max_turns=4))
    return asyncio.run(rule.collect(PROMPTS, io)), io, asked


def parts(group):
    return [[s for s in group.samples if s.role == role] for role in ("policy", "label")]


def test_the_schedule():
    """papers/agents.md section 2; the form is OUR CHOICE."""
    assert [beta(i, 0.9) for i in range(5)] == pytest.approx([1, 0.9, 0.81, 0.729, 0.6561]) and beta(0, 0.0) == 1.0


def test_beta_one_is_the_teacher_alone():
    """The engine is asked for nothing; 11 in 1-15 is found by 8, 12, 10, 11; the labels are what was executed."""
    groups, io, asked = play(dagger(decay=1.0), step=5)
    episodes, labels = parts(groups[0])
    assert not asked and episodes[0].text == "8+12-10+11" and episodes[0].reward == 1.0 and episodes[0].behavior_logp is None
    assert [s.text for s in labels[:4]] == ["8", "12", "10", "11"] and io.noted["rule/agreed"] == [14, 14] and io.noted["rule/beta"] == [1.0, 1.0]
    assert set(episodes[0].counted(episodes[0].streams["forced"])) == {1.0}


def test_beta_one_is_supervised_learning_on_the_teacher_s_episodes():
    """The same gradient as one masked demonstration an episode, over all tokens."""
    policy = tiny_policy()
    policy.model.double()
    learner = Learner(policy, Accelerator(cpu=True))
    groups, *_ = play(dagger(decay=1.0), group=1)
    labels = [s for g in groups for s in parts(g)[1]]
    turns = {"a": ["8", "+", "12", "-", "10", "+", "11"], "b": ["6", "-", "4", "-", "3"]}
    shown = {p.id: [{"role": "user" if k % 2 else "assistant", "content": t} for k, t in enumerate(turns[p.id])] for p in PROMPTS}
    demos = [demonstration(Prompt(p.id, p.messages, p.answer, {"solution": "", "turns": shown[p.id]}), learner) for p in PROMPTS]
    for s in demos:
        s.weights = {"label": 1.0}
    one, other = (gradient(learner, samples) for samples in (labels, demos))
    assert all(torch.allclose(one[n], other[n], atol=1e-7) for n in one) and max(float(g.abs().max()) for g in one.values()) > 1e-4


def gradient(learner, samples):
    terms = dagger().loss
    for p in learner.policy.model.parameters():
        p.grad = None
    denominators = global_denominators(samples, terms, max_new_tokens=4)
    for b in pack(samples, [torch.zeros(s.length) for s in samples], tokens=40):
        learner.backward(evaluate_terms(terms, b, learner.forward(b, Needs()), denominators)[0])
    return {n: p.grad.clone() for n, p in learner.params}


def test_beta_zero_labels_the_student_s_own_states():
    """From the second step on with decay 0: the student says 9 each time, and the context of a label holds that, not what the teacher would have done."""
    groups, io, asked = play(dagger(decay=0.0), step=2)
    episodes, labels = parts(groups[0])
    assert episodes[0].text == "9+9+9+9" and len(asked) == 16 and "forced" not in episodes[0].streams
    start = CHAT.prompt_ids(PROMPTS[0].messages)
    assert [s.context_ids for s in labels[:3]] == [start, start + ids("9") + ids("+")[:-1], start + (ids("9") + ids("+")[:-1]) * 2]
    assert [s.text for s in labels[:4]] == ["8", "12", "12", "12"] and all(s.token_ids == ids(s.text) for s in labels)
    assert io.noted["rule/labels"] == [16, 0] and io.noted["rule/agreed"] == [0, 16]


def test_a_mixture_is_a_mixture_and_does_not_hang_on_the_rank():
    groups, *_ = play(dagger(decay=0.5), step=2, group=16)
    acted = [x for g in groups for s in parts(g)[0] for x in s.counted(s.streams.get("forced", [0.0] * len(s.token_ids)))]
    assert 0.25 < sum(acted) / len(acted) < 0.75
    again, *_ = play(dagger(decay=0.5), step=2, group=16)
    assert [s.token_ids for g in groups for s in g.samples] == [s.token_ids for g in again for s in g.samples]


def test_the_student_s_turns_come_first():
    """student_turns 0.5, step 5: the student plays two turns, the teacher the others."""
    groups, _, asked = play(dagger(student_turns=0.5), step=5)
    episode = parts(groups[0])[0][0]
    assert episode.text == "9+9+12-10" and len([r for r in asked if r.seed[2:4] == ("a", 0)]) == 2


def test_labels_alone_are_learnt():
    groups, *_ = play(dagger(decay=0.5), step=3)
    samples = [s for g in groups for s in g.samples]
    n = sum(s.length for s in samples if s.role == "label")
    assert global_denominators(samples, dagger().loss, max_new_tokens=4) == [n]
    assert all(s.weights == ({"label": 1.0} if s.role == "label" else {"policy": 0.0}) for s in samples)


def test_labels_of_earlier_steps_come_back():
    memory, rule = Memory(), dagger(decay=0.0, replay=0.5)
    first, *_ = play(rule, step=1, memory=memory)
    assert not any("replayed" in s.id for g in first for s in g.samples)
    memory.end_step()
    second, *_ = play(rule, step=2, memory=memory)
    old = [s for g in second for s in g.samples if "replayed" in s.id]
    fresh = [s for g in second for s in g.samples if "/label" in s.id]
    assert len(old) == len(fresh) // 2 and {s.streams["round"][0] for s in old} == {0.0} and {s.streams["round"][0] for s in fresh} == {1.0}
    known = {(tuple(s.context_ids), tuple(s.token_ids)) for g in first for s in g.samples}
    assert all((tuple(s.context_ids), tuple(s.token_ids)) in known for s in old)


def test_it_needs_an_environment_and_a_teacher(tmp_path):
    io = RolloutIO(TableEngine(CHAT, lambda r: "9"), Judge(), CHAT, Memory(), Sampling(4), 1, (0, 1))
    with pytest.raises(InputError, match=r"give the recipe a section \[environment\]"):
        asyncio.run(dagger().collect(PROMPTS, io))

    class Dumb:
        async def reset(self, prompt, seed):
            return prompt.messages

        async def step(self, action):
            return Step(done=True, score=1.0)

        async def close(self):
            pass

    groups, *_ = play(dagger(), make=Dumb)
    assert all("has no method expert()" in s.verdict.detail and s.reward is None for g in groups for s in g.samples)
    (tmp_path / "teacher.py").write_text("def make():\n    async def act(prompt, messages):\n        return str(len(messages))\n    return act\n")
    groups, *_ = play(dagger(teacher="./teacher.py:make", base=tmp_path), make=Dumb)
    assert {s.text for g in groups for s in parts(g)[1]} == {"1"}


class Sums:
    """Says the running number of turns; done at three; the expert counts along. For the trial, whose prompts name no range."""

    async def reset(self, prompt, seed):
        self.turns = 0
        return prompt.messages

    async def step(self, action):
        self.turns += 1
        done = self.turns == 3
        return Step(() if done else ({"role": "tool", "content": str(self.turns)},), done=done, score=float(sum(map(ord, action.text)) % 2) if done else None)

    async def close(self):
        pass

    async def expert(self):
        return str(self.turns)


def test_the_contract(tmp_path):
    with Trial(tmp_path) as trial:
        trial.session.environment = Episodes(Sums, max_turns=3)
        check_rule(trial, "dagger", {"decay": 0.6})


def test_an_untrained_model_learns_the_teacher():
    """Not a proof of learning (recipes/agents/dagger.toml is), but of the loop: labels of a real engine's states."""
    policy = tiny_policy()
    groups, *_ = play(dagger(decay=0.0), engine=HFEngine(policy), step=2)
    labels = [s for g in groups for s in parts(g)[1]]
    assert labels and all(s.behavior_logp is None and s.reward is None for s in labels)

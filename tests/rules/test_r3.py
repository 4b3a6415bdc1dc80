"""R^3: the specification's ranking and mixed group, the limits of each part, and replay and reflection through steps of a scripted engine."""

import asyncio
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from llmrl.batch import pack
from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.learner import Learner
from llmrl.losses import pg_clip
from llmrl.memory import Memory
from llmrl.records import Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules import grpo
from llmrl.rules.base import Needs
from llmrl.rules.r3 import beaten, peak_and_mean, poor
from llmrl.rules.r3 import r3 as factory
from llmrl.step import drop_stale
from tests.builders import ALPHABET, f64, make_view, tiny_policy

H = [[0.1, 0.2, 2.0, 0.1, 0.1], [1.6, 1.3, 1.4, 1.5, 1.2], [0.6, 0.6, 0.7, 0.6, 0.5], [1.5] * 5]
A_0 = [0.294883, -0.196589, -0.933796, -0.933796, 1.769298]


def r3(**keys):
    return factory(base=Path(), **{"length_limit": 0, "template": "tiny", **keys})


def advantages(rule, rewards, entropies=None, cut=(), replayed=(), lengths=None):
    lengths = lengths or [len(h) for h in entropies or [[0.0]] * len(rewards)]
    streams = {
        "old_entropy": entropies or [[1.0] * n for n in lengths], "replayed": [[float(k in replayed)] * n for k, n in enumerate(lengths)],
    }  # fmt: skip
    view = make_view(rewards, [0] * len(rewards), lengths, streams=streams)
    view.truncated_S[list(cut)] = True
    return [float(x[0]) for x in rule.credit.update(view, rule.credit.init())[0].split(lengths)]


def mixed(rule, h=H):
    """Four truncated wrong samples and a replayed right one."""
    return advantages(rule, [0, 0, 0, 0, 1], [*h, [9.0]], cut=range(4), replayed=[4])


def ranked(h, cut=None, rewards=None, **keys):
    """The rewards that the ranking pays."""
    rule = r3(**keys)
    rewards = rewards or [0.0] * len(h)
    streams = {"old_entropy": h, "replayed": [[0.0] * len(x) for x in h]}
    view = make_view(rewards, [0] * len(h), [len(x) for x in h], streams=streams)
    view.truncated_S[list(range(len(h)) if cut is None else cut)] = True
    return rule.credit.sample[0].update(view.reward_S, {}, view)[0].tolist()


def test_worked_ranking():
    numbers = f64([peak_and_mean(f64(h), 0.2) for h in H])
    assert numbers.T.tolist() == [pytest.approx([2.0, 1.6, 0.7, 1.5]), pytest.approx([0.5, 1.4, 0.6, 1.5])]
    assert beaten(*numbers.T, torch.ones(4, 4, dtype=torch.bool)).tolist() == [3, 1, 0, 0]
    assert ranked(H) == pytest.approx([0.5, 0.333333, 0.083333, 0.083333], abs=1e-6)
    assert peak_and_mean(f64(range(15)), 0.2)[0] == 13.0 and peak_and_mean(f64(range(14)), 0.2)[0] == 12.5  # floor(p L) of the largest


def test_worked_mixed_group():
    assert mixed(r3(ddof=0)) == pytest.approx(A_0, abs=2e-6)
    assert mixed(r3(ddof=1)) == pytest.approx([0.263751, -0.175834, -0.835213, -0.835213, 1.582509], abs=2e-6)
    assert mixed(r3(ddof=0, alpha=2.0)) == pytest.approx([0.147442, -0.098294, -0.466899, -0.466899, 0.884650], abs=2e-6)
    alone = advantages(r3(ddof=0, ranked=0.0), [0, 0, 0, 0, 1], replayed=[4])
    assert alone == pytest.approx([-0.499999] * 4 + [1.999995], abs=1e-6)
    assert sum(mixed(r3())) == pytest.approx(0.0, abs=1e-12)


def test_length_bonus():
    rule = r3(length_limit=32768, ranked=0.0)
    view = make_view([1, 0, 1, None], [0] * 4, [8192, 8192, 40000, 10])
    got = rule.credit.sample[0].update(view.reward_S, {}, view)[0].tolist()
    assert got == [1.75, 0.0, 1.0, 0.0]  # right samples only, never negative


def test_without_its_parts_it_is_grpo():
    off = r3(replay=0, tau=0.0, ranked=0.0)
    assert off.needs == Needs() and r3().needs == Needs(old_entropy=True)
    plain = grpo.grpo()
    for rewards in ([1, 0, 0, 1, None], [1, 1, 1], [0, 0.25, 1]):
        view = make_view(rewards, [0] * len(rewards))
        want = plain.credit.update(view, plain.credit.init())[0].tolist()
        assert advantages(off, rewards) == pytest.approx(want, abs=1e-12)
        assert advantages(r3(), rewards) == pytest.approx(want, abs=1e-12)  # no truncated failure, nothing replayed
    assert advantages(r3(alpha=4.0, std_eps=1e-12), [1, 0, 0]) == pytest.approx([a / 4 for a in advantages(off, [1, 0, 0])], abs=1e-5)


def test_what_replay_turns_around():
    down, up = advantages(r3(), [0, 0, 0, 1], replayed=[3]), advantages(r3(), [1, 1, 1, 0], replayed=[3])
    assert all(a < 0 for a in down[:3]) and down[3] > 0 and all(a > 0 for a in up[:3]) and up[3] < 0
    assert advantages(r3(), [0, 0, 0]) == [0.0] * 3 == advantages(r3(), [1, 1, 1])


def test_the_ranking_is_a_strict_partial_order():
    draw = torch.Generator().manual_seed(3)
    h = torch.rand(9, 12, generator=draw, dtype=torch.float64)
    first, mean = f64([peak_and_mean(x, 0.2) for x in h]).T
    wins = (first[:, None] > first) & (mean[:, None] < mean)
    assert wins.any() and not wins.diagonal().any() and not ((wins.double() @ wins.double() > 0) & ~wins).any()
    rewards = ranked(h.tolist())
    assert min(rewards) >= 0 and max(rewards) <= 0.5
    assert ranked((3 * h + 0.7).tolist()) == rewards
    order = torch.randperm(9, generator=draw).tolist()
    assert ranked(h[order].tolist()) == [rewards[k] for k in order]
    assert ranked([[1.0, 2.0]] * 4) == [0.25] * 4 and ranked([[1.0, 2.0]]) == [0.0]  # nothing comparable; alone


def test_the_ranking_fires_on_truncated_samples_of_failed_groups_only():
    assert ranked(H, cut=[0, 1]) == [0.5, 0.0, 0.0, 0.0]
    assert ranked(H, rewards=[0, 0, 0, 1.0]) == [0, 0, 0, 1]
    view_rewards = advantages(r3(), [0, 0, 0, 0, 1], [*H, [9.0]], cut=[0, 1, 2, 3, 4], replayed=[4])
    assert view_rewards == pytest.approx(mixed(r3()))  # a replayed right sample stops nothing and is not ranked itself


# ---------------------------------------------------------------- through steps


class Says:
    """Right iff the text has a 7; "(" cannot be judged."""

    def score(self, items):
        return [Verdict(None, "timeout") if "(" in t else Verdict(float("7" in t)) for _, t in items]


PROMPTS = [Prompt(n, ({"role": "user", "content": f"{n}="},), "7") for n in ("1", "2")]


class World:
    """Steps of a rule on both prompts, what the engine says depending on step and prompt."""

    def __init__(self, rule, script):
        self.chat, self.memory, self.rule, self.asked = Chat(char_tokenizer(ALPHABET)), Memory(), rule, []
        self.engine = TableEngine(self.chat, lambda r: self.reply(r, script))

    def reply(self, r, script):
        self.asked.append(self.chat.show(r.context_ids))
        return script(r.seed[1], str(r.seed[2]), int(r.seed[-1]))

    def step(self, step, version=None, prompts=PROMPTS):
        self.engine.policy_version = version if version is not None else step
        self.io = RolloutIO(self.engine, Says(), self.chat, self.memory, Sampling(8), 3, (0, step))
        groups = asyncio.run(self.rule.collect(prompts, self.io))
        self.memory.end_step()
        return groups


def told(groups):
    return [[(s.role, s.text, s.reward) for s in g.samples] for g in groups]


def test_replay_of_the_other_outcome():
    world = World(r3(tau=0.0), lambda step, p, i: {1: "71", 2: "1" + str(i), 3: "7" + str(i)}[step] if p == "1" else ["7", "1", "("][i])
    first = world.step(1)
    assert told(first)[0] == [("policy", "71", 1.0)] * 3
    second = world.step(2)
    replayed = second[0].samples[3]
    assert (replayed.role, replayed.text, replayed.reward, replayed.parent) == ("replay", "71", 1.0, "1/2")
    assert replayed.behavior_logp is None and replayed.streams["old_logp"] == first[0].samples[0].behavior_logp
    assert replayed.context_ids == second[0].samples[0].context_ids and replayed.policy_version == 1
    assert replayed.cohort == second[0].samples[0].cohort and len(second[1].samples) == 3  # mixed: as it is
    assert world.io.noted["rule/replay/right"] == [1.0, 0.0] and world.io.noted["rule/replay/age_updates"] == [1.0, 1]
    third = world.step(3)
    assert told(third)[0][3] == ("replay", "12", 0.0)  # the newest wrong one
    assert len(told(World(r3(replay=0, tau=0.0), lambda *_: "1").step(1))[0]) == 3
    assert world.memory.recall("r3/wrong", "2")[-1]["score"] == 0.0 and len(world.memory.recall("r3/wrong", "2")) == 3  # unjudged ones are not stored


def test_buffers_hold_the_newest_and_survive_json():
    world = World(r3(replay=5, buffer=2, tau=0.0), lambda step, p, i: f"7{step}{i}" if step < 4 else "1")
    for step in (1, 2, 3):
        world.step(step)
    world.memory.load_state_dict(json.loads(json.dumps(world.memory.state_dict())))
    assert told(world.step(4))[0][3:] == [("replay", "731", 1.0), ("replay", "732", 1.0)]


def test_too_old():
    world = World(r3(tau=0.0, max_age=5), lambda step, p, i: "7" if step == 1 else "1")
    world.step(1, version=10)
    assert len(world.step(2, version=16)[0].samples) == 3 and world.io.noted["rule/replay/too_old"] == [2.0, 0.0]
    assert len(world.step(3, version=15)[0].samples) == 4


def test_reflection():
    """Not on the first visit; on a poor history; not stored; stops when the history is no longer poor."""
    world = World(r3(replay=0, tau=0.5), lambda step, p, i: ("7" if step == 2 and "/" not in p else f"1{i}") if p[0] == "1" else "7")
    assert len(world.step(1)) == 2
    groups = world.step(2)
    assert [g.prompt.id for g in groups] == ["1", "1/reflect", "2"]
    shown = {world.chat.show(s.context_ids) for s in groups[1].samples}
    assert len(shown) == 1 and shown.pop() in {f"<bos>1=1{i} 1=" for i in range(3)}
    assert [s.role for s in groups[1].samples] == ["reflection"] * 3 and groups[1].samples[0].cohort == "1/reflect" != groups[0].samples[0].cohort
    assert all(s.behavior_logp is not None for s in groups[1].samples) and world.io.noted["rule/reflection/reward"] == [0.0, 3.0]
    assert world.memory.recall("r3/visits", "1") == [[0, 3], [3, 3]] and world.memory.recall("r3/wrong", "1/reflect") == []
    assert len(world.step(3)) == 2  # half of them right: not below tau
    assert not poor([], 0.25) and poor([[0, 8], [3, 8]], 0.25) and not poor([[1, 4]], 0.25) and not poor([[0, 4]], 0.0)


def test_a_replayed_sample_is_old_by_right_and_its_ratio_is_to_the_stored_numbers():
    world = World(r3(tau=0.0), lambda step, p, i: "71" if step == 1 else "1")
    world.step(1)
    (group,) = world.step(2, prompts=PROMPTS[:1])
    assert drop_stale(group.samples, 2, 0)["samples/stale"] == 0.0  # the fresh ones are of this version, the replayed one may be old
    learner = Learner(tiny_policy(hidden=16, layers=1), Accelerator(cpu=True))
    learner.add_stream("old_logp", group.samples, tokens=200)
    stored, fresh = group.samples[3], group.samples[0]
    assert stored.streams["old_logp"] == [-0.5] * 3 and fresh.streams["old_logp"] != [-0.5] * 2
    (batch,) = pack(group.samples, [torch.ones(len(s.token_ids)) for s in group.samples], tokens=200)
    out = learner.forward(batch, Needs())
    place = batch.sample_index.index(3)
    on = batch.sample_T == place
    ratio = torch.exp(out.logp_T + 0.5)[on].detach()
    assert pg_clip()(batch, out)[on].tolist() == pytest.approx((-torch.minimum(ratio, torch.full_like(ratio, 1.2))).tolist())
    assert bool(batch.behavior_logp_T[on].isnan().all()) and out.old_logp_T[~on].tolist() == pytest.approx(out.logp_T[~on].tolist(), abs=1e-5)
    assert math.isfinite(float(ratio.max()))


def test_keys_are_checked():
    for keys in ({"ranked": 1.0}, {"peak": 0.0}, {"alpha": 0.0}, {"replay": -1}, {"buffer": 0}):
        with pytest.raises(ValueError, match="r3"):
            r3(**keys)

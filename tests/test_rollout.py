"""From prompts to scored groups, on a scripted engine and a scripted verifier; random streams; the memory."""

import asyncio
import contextlib
import json
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmrl.chat import Chat, char_tokenizer
from llmrl.data import PromptStream
from llmrl.engine import TableEngine
from llmrl.hf_engine import HFEngine
from llmrl.memory import Memory
from llmrl.records import Completion, Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO, dynamic_groups, make_sample, philox, sample_groups
from tests.builders import ALPHABET, tiny_policy

torch.set_num_threads(1)
CHAT = Chat(char_tokenizer(ALPHABET))
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": f"{i}+1="},), str(i + 1)) for i in range(20)]


class Table:
    """Scores by what was said: the text is the score, "(" cannot be judged, "" is no answer."""

    def __init__(self):
        self.asked, self.threads = [], set()

    def score(self, items):
        self.asked.append([(p.id, text) for p, text in items])
        self.threads.add(threading.get_ident())
        return [Verdict(None, "timeout") if text.startswith("(") else Verdict(0.0, "no_answer") if not text else Verdict(int(text[0]) / 9) for _, text in items]


def make_io(reply, *, group=3, more=None, limit=8, step=1, seed=0):
    """reply: (prompt id with its visit, sample index) -> text."""
    engine = TableEngine(CHAT, lambda r: reply(*r.seed[2:]))
    return RolloutIO(engine, Table(), CHAT, Memory(), Sampling(limit), group, (seed, step), more_prompts=more)


def run(collect, prompts, io, **kw):
    return asyncio.run(collect(prompts, io, **kw))


def scores(groups):
    return [[None if s.reward is None else round(9 * s.reward) for s in g.samples] for g in groups]


# ---------------------------------------------------------------- sample_groups


def test_every_prompt_gets_its_group_judged_against_itself():
    io = make_io(lambda name, i: f"{i}{name[1:]}")
    groups = run(sample_groups, PROMPTS[:3], io)
    assert [g.prompt.id for g in groups] == ["p0", "p1", "p2"] and scores(groups) == [[0, 1, 2]] * 3
    assert io.verifier.asked == [[(f"p{g}", f"{i}{g}") for g in range(3) for i in range(3)]]  # one call for all
    assert io.verifier.threads != {threading.get_ident()}  # not in the event loop
    for g, group in enumerate(groups):
        for i, s in enumerate(group.samples):
            assert (s.id, s.prompt_id, s.cohort, s.role, s.finish) == (f"p{g}/{i}", f"p{g}", f"p{g}", "policy", "stop")
            assert s.context_ids == CHAT.prompt_ids(PROMPTS[g].messages) and s.token_ids == CHAT.completion_ids(f"{i}{g}")
            assert s.behavior_logp == [-0.5] * 3 and s.text == f"{i}{g}" and s.weights == {"policy": 1.0} and s.verdict.score == s.reward
    assert set(io.seconds) == {"generate", "score"} and all(t >= 0 for t in io.seconds.values())


class Streaming(TableEngine):
    """Answers request by request."""

    streams = True

    async def complete(self, requests):
        return self.generate(requests)


@pytest.mark.parametrize("kind", [TableEngine, Streaming])
def test_sizes_and_sampling_in_place_of_the_step_s(kind):
    io = make_io(lambda name, i: f"{i}{name[1:]}")
    asked = []
    io.engine = kind(CHAT, lambda r: asked.append(r.sampling) or f"{r.seed[3]}")
    groups = run(sample_groups, PROMPTS[:3], io, sizes=[1, 4, 2], sampling=Sampling(1, temperature=0.5))
    assert scores(groups) == [[0], [0, 1, 2, 3], [0, 1]] and [s.id for s in groups[2].samples] == ["p2/0", "p2/1"]
    assert asked == [Sampling(1, temperature=0.5)] * 7 and all(len(s.token_ids) == 1 for g in groups for s in g.samples)
    assert io.generated == 7
    assert scores(run(sample_groups, PROMPTS[:1], io)) == [[0, 1, 2]] and asked[-1] == io.sampling


def test_what_could_not_be_judged_has_no_reward_and_no_weight():
    (group,) = run(sample_groups, PROMPTS[:1], make_io(lambda _, i: ["(", "", "5"][i]))
    assert [s.reward for s in group.samples] == [None, 0.0, 5 / 9]
    assert [s.weights["policy"] for s in group.samples] == [0.0, 1.0, 1.0]
    assert [s.verdict.status for s in group.samples] == ["timeout", "no_answer", "ok"]


def test_mask_truncated_keeps_the_reward_and_takes_the_weight():
    def reply(_, i):
        return ["5", "123456789", "(12345678"][i]

    for mask in (False, True):
        (group,) = run(sample_groups, PROMPTS[:1], make_io(reply), mask_truncated=mask)
        assert [s.finish for s in group.samples] == ["stop", "length", "length"]
        assert [s.reward for s in group.samples] == [5 / 9, 1 / 9, None]
        assert [s.weights["policy"] for s in group.samples] == [1.0, 0.0 if mask else 1.0, 0.0]
        assert [len(s.token_ids) for s in group.samples] == [2, 8, 8]


def test_make_sample_keeps_the_numbers_of_the_completion():
    c = Completion([4, 5], [-0.1, -0.2], "stop", 7, "01")
    s = make_sample(replace(PROMPTS[0], visit=2), 3, (1, 2), c, Verdict(0.5, answer="x"))
    assert (s.id, s.prompt_id, s.cohort) == ("p0~2/3", "p0", "p0~2")
    assert (s.context_ids, s.token_ids, s.behavior_logp, s.policy_version, s.text, s.reward) == ([1, 2], [4, 5], [-0.1, -0.2], 7, "01", 0.5)


def test_the_same_prompt_twice_gets_other_random_numbers():
    """Another epoch of the stream is another visit, whichever rank draws it: its own keys, ids and cohorts."""
    seen = []
    io = make_io(lambda name, i: seen.append((name, i)) or "1", group=2)
    stream = PromptStream(PROMPTS[:2], seed=0, shuffle=False)
    first = run(sample_groups, stream.take(3), io)
    second = run(sample_groups, [p for p in stream.take(2) if p.id == "p0"], io)
    assert seen == [(n, i) for n in ("p0", "p1", "p0~1", "p0~2") for i in range(2)]
    names = [s.id for g in first + second for s in g.samples]
    assert len(set(names)) == 8 and {s.cohort for s in second[0].samples} == {"p0~2"}
    assert [g.prompt.id for g in first + second] == ["p0", "p1", "p0", "p0"]


def test_the_same_prompt_twice_with_a_model():
    policy = tiny_policy(hidden=32, layers=1, ffn=32)
    io = RolloutIO(HFEngine(policy), Constant(), policy.chat, Memory(), Sampling(20), 3, (0, 1))
    a, b = run(sample_groups, PromptStream(PROMPTS[:1], seed=0).take(2), io)
    texts = [tuple(s.token_ids) for s in a.samples + b.samples]
    assert len(set(texts)) == 6
    again = RolloutIO(HFEngine(policy), Constant(), policy.chat, Memory(), Sampling(20), 3, (0, 1))
    assert [tuple(s.token_ids) for g in run(sample_groups, PromptStream(PROMPTS[:1], seed=0).take(2), again) for s in g.samples] == texts
    other = RolloutIO(HFEngine(policy), Constant(), policy.chat, Memory(), Sampling(20), 3, (0, 2))
    assert not {tuple(s.token_ids) for g in run(sample_groups, PromptStream(PROMPTS[:1], seed=0).take(2), other) for s in g.samples} & set(texts)


class Constant:
    def score(self, items):
        return [Verdict(1.0) for _ in items]


def test_samples_of_a_prompt_do_not_depend_on_its_neighbours():
    """The stream belongs to (seed, step, prompt, i): alone, or as one of three prompts in another order."""
    policy = tiny_policy(hidden=32, layers=1, ffn=32)

    def tokens(prompts):
        io = RolloutIO(HFEngine(policy, rows=4), Constant(), policy.chat, Memory(), Sampling(12), 3, (5, 9))
        return {g.prompt.id: [s.token_ids for s in g.samples] for g in run(sample_groups, prompts, io)}

    together = tokens(PROMPTS[:3])
    assert tokens(PROMPTS[2::-1]) == together
    assert tokens([PROMPTS[1]])["p1"] == together["p1"]


# ---------------------------------------------------------------- dynamic_groups


def refills(start):
    """(take, what was asked for): hands out PROMPTS from `start` on."""
    asked, rest = [], iter(PROMPTS[start:])

    def take(n):
        asked.append(n)
        return [next(rest) for _ in range(n)]

    return take, asked


def mixed_for(*live):
    """Prompts named in `live` get scores 0 and 9, all others 0, except p5: all 9."""
    return lambda name, i: "9" if (name in live and i == 1) or name == "p5" else "0"


def test_refill_until_there_are_enough_mixed_groups():
    take, asked = refills(4)
    groups = run(dynamic_groups, PROMPTS[:4], make_io(mixed_for("p1", "p4", "p6", "p8", "p9"), more=take))
    # round 1: p1 of p0..p3; round 2: p4, p6 of p4..p6; round 3: p7 alone is dead; round 4: p8
    assert asked == [3, 1, 1] and [g.prompt.id for g in groups] == ["p1", "p4", "p6", "p8"]
    assert scores(groups) == [[0, 9, 0]] * 4


def test_exactly_as_many_groups_as_prompts():
    take, asked = refills(4)
    groups = run(dynamic_groups, PROMPTS[:4], make_io(lambda _, i: str(i), more=take))
    assert asked == [] and [g.prompt.id for g in groups] == ["p0", "p1", "p2", "p3"]


@pytest.mark.parametrize(("rounds", "ids", "asked"), [(1, ["p1"], []), (2, ["p1", "p4"], [2]), (3, ["p1", "p4"], [2, 1]), (4, ["p1", "p4", "p6"], [2, 1, 1])])
def test_refill_stops_after_its_rounds(rounds, ids, asked):
    take, got = refills(3)
    groups = run(dynamic_groups, PROMPTS[:3], make_io(mixed_for("p1", "p4", "p6"), more=take), max_rounds=rounds)
    assert [g.prompt.id for g in groups] == ids and got == asked


def test_no_mixed_group_at_all_gives_the_last_round():
    take, asked = refills(2)
    groups = run(dynamic_groups, PROMPTS[:2], make_io(mixed_for(), more=take), max_rounds=3)
    assert [g.prompt.id for g in groups] == ["p4", "p5"] and asked == [2, 2] and scores(groups) == [[0, 0, 0], [9, 9, 9]]


def test_without_more_prompts_there_is_one_round():
    groups = run(dynamic_groups, PROMPTS[:3], make_io(mixed_for("p1")))
    assert [g.prompt.id for g in groups] == ["p1"]


def test_what_could_not_be_judged_makes_no_group_mixed():
    """One score and two that are missing is not a difference; two different scores and one missing is."""
    take, _ = refills(2)
    reply = {"p0": "9((", "p1": "9(0"}
    groups = run(dynamic_groups, PROMPTS[:2], make_io(lambda n, i: reply.get(n, "000")[i], more=take), max_rounds=2)
    assert [g.prompt.id for g in groups] == ["p1"] and scores(groups) == [[9, None, 0]]


def test_with_one_sample_a_prompt_all_are_kept():
    assert len(run(dynamic_groups, PROMPTS[:3], make_io(lambda *_: "0", group=1))) == 3


def test_a_refill_that_meets_a_prompt_again_is_a_new_visit():
    io = make_io(lambda name, i: "9" if name == "p0~1" and i == 2 else "0", more=lambda n: [replace(PROMPTS[0], visit=1)] * n)
    (group,) = run(dynamic_groups, PROMPTS[:1], io)
    assert group.prompt.id == "p0" and [s.id for s in group.samples] == ["p0~1/0", "p0~1/1", "p0~1/2"]


def test_dynamic_groups_mask_truncated_too():
    (group,) = run(dynamic_groups, PROMPTS[:1], make_io(lambda _, i: ["0", "123456789", "2"][i]), mask_truncated=True)
    assert [s.weights["policy"] for s in group.samples] == [1.0, 0.0, 1.0]


# ---------------------------------------------------------------- RolloutIO


def test_sample_and_verify_keep_order_and_keys():
    asked = []
    io = make_io(lambda *key: asked.append(key) or "1", seed=4, step=6)
    done = io.sample([[1, 4], [1, 5]], [("a", 0), ("b", 1)])
    assert [c.text for c in done] == ["1", "1"] and asked == [("a", 0), ("b", 1)]
    (short,) = io.sample([[1, 4]], [("a", 0)], Sampling(1))
    assert short.finish == "length"
    with pytest.raises(ValueError, match="shorter"):
        io.sample([[1, 4], [1, 5]], [("a", 0)])
    verdicts = asyncio.run(io.verify([(PROMPTS[0], "3"), (PROMPTS[1], "(")]))
    assert [v.score for v in verdicts] == [3 / 9, None]


def test_rng_is_reproducible_and_named():
    a = make_io(lambda *_: "1").rng("pollute", "p0", 2).random(4)
    assert np.array_equal(a, make_io(lambda *_: "1").rng("pollute", "p0", 2).random(4))
    keys = [("pollute", "p0", 3), ("pollute", "p1", 2), ("other", "p0", 2), ("pollute", "p0", "2"), ("pollutep0", 2)]
    others = [make_io(lambda *_: "1").rng(*k).random(4) for k in keys]
    others += [make_io(lambda *_: "1", step=2).rng("pollute", "p0", 2).random(4), make_io(lambda *_: "1", seed=1).rng("pollute", "p0", 2).random(4)]
    assert len({tuple(x) for x in [a, *others]}) == 8


def test_rng_never_shares_a_stream_with_the_engine():
    """A rule that draws under (prompt, i) must not see the very numbers that sampled that completion."""
    io = make_io(lambda *_: "1")
    assert not np.array_equal(io.rng("p0", 0).random(4), philox((*io.seed, "p0", 0)).random(4))


def test_philox_is_pinned():
    """The numbers behind every sample: a change of them changes all runs."""
    assert philox((0, 1, "p0", 0)).random(3).tolist() == [0.9689927268958215, 0.5935269461829937, 0.6342660429173023]
    x = philox(("many",)).random(100_000)
    assert x.mean() == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(x))) and x.min() >= 0 and x.max() < 1
    firsts = np.array([philox((0, 1, "p0", i)).random() for i in range(5000)])  # neighbouring keys are independent
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 4 / math.sqrt(5000) and firsts.mean() == pytest.approx(0.5, abs=0.02)


# ---------------------------------------------------------------- memory


def test_memory_remembers_the_last_entries_by_name_and_prompt():
    m = Memory(cap=3)
    for k in range(5):
        m.remember("failed", "p0", {"k": k, "ids": (1, 2)})
    m.remember("failed", "p1", "x")
    m.remember("base", "p0", 0.5)
    assert m.recall("failed", "p0") == [{"k": k, "ids": [1, 2]} for k in (2, 3, 4)]  # as they will be after a resume: lists, no tuples
    assert m.recall("failed", "p1") == ["x"] and m.recall("base", "p0") == [0.5]
    assert m.recall("failed", "p9") == [] and m.recall("none", "p0") == []
    with pytest.raises(TypeError):
        m.remember("failed", "p0", {1, 2})
    assert len(m.recall("failed", "p0")) == 3


def test_memory_state_round_trip():
    a = Memory(cap=2)
    for k in range(3):
        a.remember("n", "p", [k, None, "é", 0.1 + 0.2])
    with pytest.raises(RuntimeError, match="has not ended"):
        a.state_dict()
    a.end_step()
    b = Memory()
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert b.recall("n", "p") == a.recall("n", "p") == [[k, None, "é", 0.1 + 0.2] for k in (1, 2)]
    for m in (a, b):
        m.remember("n", "p", 9)
        m.end_step()
    assert b.state_dict() == a.state_dict() and b.recall("n", "p")[0][0] == 2  # the cap came along


def test_memory_is_not_changed_through_what_it_gave_out():
    a, b = Memory(), Memory()
    a.remember("n", "p", {"k": [1]})
    a.recall("n", "p").append("more")
    a.recall("n", "p")[0]["k"].append(2)
    assert a.recall("n", "p") == [{"k": [1]}]
    a.end_step()
    b.load_state_dict(a.state_dict())
    b.remember("n", "p", "other")
    assert len(a.recall("n", "p")) == 1


def end_together(*ranks):
    """What Learner.gather does: everybody gets what everybody sends, as JSON."""
    sent = []

    def collect(mine):
        sent.append(json.loads(json.dumps(mine)))
        raise InterruptedError

    for m in ranks:
        with contextlib.suppress(InterruptedError):
            m.end_step(collect)
    for m in ranks:
        m.end_step(lambda mine: sent)


def test_ranks_end_a_step_with_the_same_memory():
    a, b = Memory(cap=3), Memory(cap=3)
    a.remember("n", "p", "a1")
    a.remember("n", "q", "a2")
    b.remember("n", "p", "b1")
    assert b.recall("n", "q") == []  # what another rank knows comes with the end of the step
    end_together(a, b)
    assert a.state_dict() == b.state_dict() and b.recall("n", "p") == ["a1", "b1"] and b.recall("n", "q") == ["a2"]


def test_a_name_may_keep_more_entries_than_the_store_does():
    m = Memory(cap=2)
    for k in range(5):
        m.remember("window", "", k, cap=4)
        m.remember("n", "p", k)
    assert m.recall("window", "") == [1, 2, 3, 4] and m.recall("n", "p") == [3, 4]
    m.end_step()
    again = Memory()
    again.load_state_dict(json.loads(json.dumps(m.state_dict())))
    again.remember("window", "", 5)
    again.end_step()
    assert again.recall("window", "") == [2, 3, 4, 5] and again.recall("n", "p") == [3, 4]


def test_running_averages_are_over_all_ranks_and_move_between_steps():
    """Step 1: ranks saw 1 of 4 and 3 of 4 -> 0.5; step 2: 2 of 2 on one rank -> 0.9 * 0.5 + 0.1 * 1; step 3: nothing."""
    a, b = Memory(), Memory()
    a.track("rec", 1, 4, decay=0.9)
    b.track("rec", 3, 4, decay=0.9)
    assert a.average("rec") is None
    with pytest.raises(RuntimeError, match="end_step"):
        a.state_dict()
    for step, expected in enumerate((0.5, 0.55, 0.55)):
        if step == 1:
            b.track("rec", 2, 2, decay=0.9)
        end_together(a, b)
        assert a.average("rec") == b.average("rec") == pytest.approx(expected)
    assert a.state_dict() == b.state_dict()
    again = Memory()
    again.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert again.average("rec") == pytest.approx(0.55)


def test_notes_are_means_and_sums_over_ranks():
    from llmrl.step import rule_metrics

    here, there = make_io(lambda *_: "1"), make_io(lambda *_: "1")
    here.note("share", 1, 4)
    here.note("share", 2, 4)
    here.note("count", 3, 0)
    there.note("share", 8, 8)
    there.note("lone", 0.25)
    here.generated, there.generated = 10, 5

    class Ranks:
        def gather(self, mine):
            return [mine, json.loads(json.dumps((there.noted, there.generated)))]

    assert rule_metrics(here, Ranks()) == {"rule/count": 3.0, "rule/lone": 0.25, "rule/share": 11 / 16, "tokens/generated": 15.0}

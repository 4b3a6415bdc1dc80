"""V_0: the specification's utilities and allocations, limits, brute force, and allocated groups of a scripted engine on one rank and on two."""

import asyncio
import json
from itertools import product
from math import comb

import numpy as np
import pytest

from llmrl.chat import Chat, char_tokenizer
from llmrl.data import PromptStream
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.records import InputError, Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules import grpo
from llmrl.rules.v0 import exact, greedy, predicted, utility, v0
from tests.builders import ALPHABET, make_view

GRID = [i / 20 for i in range(21)]


def worth(sizes, p):
    return float(utility(np.array(sizes), np.array(p)).sum())


def test_worked_utilities():
    table = {0.1: [0, 0.18, 0.975600, 3.756262, 11.435168], 0.5: [0, 0.5, 1.75, 3.968750, 7.999756], 0.9: [0, 0.18, 0.399600, 0.800000, 1.600000]}
    for p, want in table.items():
        assert utility(np.array([1, 2, 4, 8, 16]), p).tolist() == pytest.approx(want, abs=1e-6)
    assert float(utility(8, 0.3)) == pytest.approx(5.138816, abs=1e-6)
    marginal = {p: float(utility(3, p) - utility(2, p)) for p in (0.9, 0.5, 0.1, 0.02)}
    assert marginal == pytest.approx({0.9: 0.117, 0.5: 0.625, 0.1: 0.333, 0.02: 0.077224}, abs=1e-6)


def test_the_utility_is_the_binomial_sum_and_its_step_the_paper_s():
    for b, p in product((1, 2, 3, 7), GRID):
        q = 1 - p
        assert float(utility(b, p)) == pytest.approx(sum(comb(b, k) * p**k * q ** (b - k) * (b - k) for k in range(1, b)), abs=1e-12)
        assert float(utility(b + 1, p) - utility(b, p)) == pytest.approx(q * (1 - q**b) + b * p * q**b, abs=1e-12)
        assert float(utility(2, p)) == pytest.approx(2 * p * q)
        assert float(utility(b, p)) >= 0 and (p in (0.0, 1.0) or utility(b + 1, p) > utility(b, p))
    assert utility(9, 0.0) == 0 == utility(9, 1.0) and float(utility(400, 0.3)) == pytest.approx(280)
    steps = np.diff(utility(np.arange(1, 12), 0.1))
    assert steps[1] > steps[0]  # not concave: where greedy goes wrong


@pytest.mark.parametrize(
    ("p", "total", "b_max", "by_greedy", "best", "values"),
    [
        ([0.9, 0.5, 0.1, 0.02], 24, 16, [2, 16, 4, 2], [2, 4, 16, 2], (9.194556, 13.404368)),
        ([0.9, 0.5, 0.3, 0.2], 32, 16, [2, 6, 16, 8], [2, 2, 12, 16], (19.290900, 21.263545)),
        ([0, 0.5, 0.9, 1], 16, 8, [2, 8, 4, 2], [2, 8, 4, 2], (4.368350, 4.368350)),
    ],
)
def test_worked_allocations(p, total, b_max, by_greedy, best, values):
    assert greedy(p, total, 2, b_max) == by_greedy and exact(p, total, 2, b_max) == best
    assert (worth(by_greedy, p), worth(best, p)) == pytest.approx(values, abs=1e-6)


def test_worked_uniform_allocation():
    assert worth([6] * 4, [0.9, 0.5, 0.1, 0.02]) == pytest.approx(6.282544, abs=1e-6)


def test_exact_is_the_best_of_all():
    draw = np.random.default_rng(1)
    for _ in range(12):
        p, total = draw.random(4).tolist(), int(draw.integers(8, 22))
        got = exact(p, total, 2, 8)
        every = [s for s in product(range(2, 9), repeat=4) if sum(s) <= total]
        assert worth(got, p) == pytest.approx(max(worth(s, p) for s in every)) and sum(got) <= total and {2 <= b <= 8 for b in got} == {True}
        assert worth(got, p) >= worth(greedy(p, total, 2, 8), p) - 1e-12


def test_limits():
    for share in (exact, greedy):
        assert share([0.2, 0.9, 0.0], 6, 2, 9) == [2, 2, 2]
        assert share([0.3] * 5, 40, 2, 8) == [8] * 5 and share([0.3] * 2, 40, 2, 8) == [8, 8]  # the rest is not spent
        assert share([0.0, 1.0], 20, 2, 16) == [2, 2]
    assert exact([0.5] * 4, 16, 2, 16) == [4] * 4 and sum(exact([0.5] * 3, 16, 2, 16)) == 16
    hard, easy = exact([0.3, 0.7], 32, 2, 30)
    assert hard > easy


def test_the_advantages_are_the_paper_s():
    rule = v0(std_eps=1e-12)
    view = make_view([1, 0, 0, 0], [0] * 4)
    a = rule.credit.update(view, rule.credit.init())[0].tolist()
    assert a == pytest.approx([1.732051] + [-0.577350] * 3, abs=1e-6) and sum(map(abs, a)) == pytest.approx(3.464102, abs=1e-6)
    same, plain = v0(ddof=1), grpo.grpo()
    view = make_view([1, 0, 0, None, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1])
    assert same.credit.update(view, same.credit.init())[0].tolist() == plain.credit.update(view, plain.credit.init())[0].tolist()


def test_prediction():
    p, memory = Prompt("p", (), None, {"rate": 0.9}), Memory()
    assert predicted(p, memory, None, 0.01) == 0.5 and predicted(p, memory, "rate", 0.01) == pytest.approx(0.9)
    memory.track("v0/rate", 3, 4, decay=0.0)
    memory.end_step()
    assert predicted(p, memory, None, 0.01) == 0.75  # the step before
    for visit in ([0, 4], [3, 4]):
        memory.remember("v0/visits", "p", visit, cap=2)
    assert predicted(p, memory, None, 0.01) == 0.4 and predicted(p, memory, "rate", 0.01) == pytest.approx(4.8 / 10)
    memory.remember("v0/visits", "p", [96, 96], cap=2)  # the oldest leaves the window
    assert predicted(p, memory, None, 0.01) == pytest.approx(100 / 102) and predicted(p, memory, None, 0.05) == 0.95
    with pytest.raises(InputError, match="row p: prior = 'other'"):
        predicted(p, memory, "other", 0.01)


# ---------------------------------------------------------------- through steps


RATE = {"0": 0.0, "1": 0.25, "2": 0.5, "3": 1.0}
ROWS = [Prompt(n, ({"role": "user", "content": f"{n}="},), "1") for n in RATE]


class Right:
    def score(self, items):
        return [Verdict(None, "timeout") if t == "5" else Verdict(float(t == "1")) for _, t in items]


def steps(rule, ranks, n=3, group=6, say=None):
    """n steps over `ranks` ranks: visit -> number of samples, of each step; then the last step's metrics, the memory, the last step's groups."""
    chat = Chat(char_tokenizer(ALPHABET))
    engine = TableEngine(chat, say or (lambda r: "1" if int(r.seed[-1]) % 4 < 4 * RATE[str(r.seed[2])[0]] else "0"))
    streams = [PromptStream(ROWS, seed=3, rank=r, world=ranks) for r in range(ranks)]
    memories, sizes, io, groups = [Memory() for _ in range(ranks)], [], None, []
    for step in range(1, n + 1):
        found = {}
        for stream, memory in zip(streams, memories, strict=True):
            everyone = stream.coming(4)
            io = RolloutIO(engine, Right(), chat, memory, Sampling(4), group, (0, step), step_prompts=everyone)
            groups = asyncio.run(rule.collect(stream.take(4 // ranks), io))
            found |= {g.prompt.visit_id: len(g.samples) for g in groups}
        told = [(m._new, m._caps, m._tracked) for m in memories]
        for memory in memories:
            memory.end_step(lambda _, told=told: told)
        sizes.append(found)
    return sizes, io.noted, memories[0], groups


def test_groups_of_the_allocated_size_under_a_fixed_total():
    sizes, noted, memory, _ = steps(v0(), 1)
    assert sizes[0] == dict.fromkeys(RATE, 6)  # nothing is known yet
    assert all(sum(s.values()) == 24 for s in sizes)
    p = {"0": 1 / 8, "1": 3 / 8, "2": 5 / 8, "3": 7 / 8}  # of 6 samples 0, 2, 4, 6 are right
    order = [k.split("~")[0] for k in sizes[1]]
    assert list(sizes[1].values()) == exact([p[n] for n in order], 24, 2, 128)
    assert sizes[1]["3~1"] == 2 and sizes[1]["0~1"] > 2  # solved: the minimum; unsolved so far: explored
    assert memory.recall("v0/visits", "3")[0] == [6, 6]
    assert noted["rule/group/at_minimum_share"][1] == 4 and 0 < noted["rule/rate/error"][0] / 4 < 0.5


def test_the_allocation_does_not_depend_on_the_ranks_and_survives_json():
    one, _, memory, _ = steps(v0(), 1)
    two, _, other, _ = steps(v0(), 2)
    assert [dict(sorted(s.items())) for s in one] == [dict(sorted(s.items())) for s in two]
    assert memory.state_dict()["averages"] == other.state_dict()["averages"]
    again = Memory()
    again.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    assert [predicted(p, again, None, 0.01) for p in ROWS] == [predicted(p, memory, None, 0.01) for p in ROWS]


def test_uniform_and_greedy():
    assert all(set(s.values()) == {6} for s in steps(v0(allocate="uniform"), 1)[0])
    sizes = steps(v0(allocate="greedy"), 1)[0]
    assert sum(sizes[2].values()) == 24 and len(set(sizes[2].values())) > 1


def test_prompts_may_count_alike():
    groups = steps(v0(average="prompt"), 1, say=lambda r: "5" if int(r.seed[-1]) == 0 else "1" if str(r.seed[2])[0] == "3" else "0")[3]
    assert len({len(g.samples) for g in groups}) > 1
    for g in groups:
        assert [s.weights["policy"] for s in g.samples] == pytest.approx([0.0] + [6 / len(g.samples)] * (len(g.samples) - 1))
    assert {s.weights["policy"] for g in steps(v0(), 1)[3] for s in g.samples} == {1.0}


def test_keys_are_checked():
    for keys in ({"b_min": 0}, {"b_min": 9, "b_max": 8}, {"window": 0}, {"clamp": 0.5}):
        with pytest.raises(ValueError, match="v0"):
            v0(**keys)
    with pytest.raises(InputError, match=r"rollout\.group = 6"):
        steps(v0(b_min=7), 1)

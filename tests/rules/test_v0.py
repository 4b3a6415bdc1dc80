"""V_0: the specification's utilities and allocations, limits, brute force, and allocated groups of a scripted engine on one rank and on two."""

import asyncio
import gzip
import json
from itertools import product
from math import comb
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from llmrl.chat import Chat, char_tokenizer
from llmrl.data import PromptStream
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.records import InputError, Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules import grpo
from llmrl.rules.v0 import exact, greedy, utility, v0
from llmrl.rules.v0_value import by_column, by_looks, features, fit, predicted, rank_and_ce
from llmrl.rules.vgf_value import ranked
from tests.builders import ALPHABET, make_view

DATA = Path(__file__).parents[3] / "shared/data/traces/gsm8k_model_solutions.jsonl.gz"
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
    told = by_column(p, "rate")
    assert told == 0.9 and predicted(p, memory, None, 0.01) == 0.5 and predicted(p, memory, told, 0.01) == pytest.approx(0.9)
    memory.track("v0/rate", 3, 4, decay=0.0)
    memory.end_step()
    assert predicted(p, memory, None, 0.01) == 0.75  # the step before
    for visit in ([0, 4], [3, 4]):
        memory.remember("v0/visits", "p", visit, cap=2)
    assert predicted(p, memory, None, 0.01) == 0.4 and predicted(p, memory, told, 0.01) == pytest.approx(4.8 / 10)
    memory.remember("v0/visits", "p", [96, 96], cap=2)  # the oldest leaves the window
    assert predicted(p, memory, None, 0.01) == pytest.approx(100 / 102) and predicted(p, memory, None, 0.05) == 0.95
    with pytest.raises(InputError, match="row p: prior = 'other'"):
        by_column(p, "other")


def scores(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_worked_losses_of_the_learned_value():
    told = rank_and_ce(scores(1.0, -0.5), torch.tensor([1.0, 0.0], dtype=torch.float64), 0.25)
    assert [float(x.detach()) for x in told] == pytest.approx([0.345605, 0.201413, 0.393669], abs=1e-6)


def test_ranking_is_over_pairs_and_blind_to_a_constant():
    s, y = scores(0.3, -1.2, 2.0, 0.7, -0.1), torch.tensor([1, 0, 0, 1, 0], dtype=torch.float64)
    by_hand = np.mean([np.log1p(np.exp(float(s[j].detach() - s[i].detach()))) for i in (0, 3) for j in (1, 2, 4)])
    assert float(rank_and_ce(s, y, 1.0)[0].detach()) == pytest.approx(by_hand, abs=1e-12)
    assert float(rank_and_ce(s + 7.5, y, 1.0)[0].detach()) == pytest.approx(by_hand, abs=1e-12) != float(rank_and_ce(s + 7.5, y, 0.5)[0].detach())
    swapped = rank_and_ce(s.flip(0), y.flip(0), 0.25)[0]
    assert float(swapped.detach()) == pytest.approx(float(rank_and_ce(s, y, 0.25)[0].detach()), abs=1e-12)
    alike = rank_and_ce(s, torch.ones(5, dtype=torch.float64), 0.25)  # no pair: the cross-entropy alone
    assert float(alike[1].detach()) == 0 and float(alike[0].detach()) == pytest.approx(0.75 * float(alike[2].detach()))
    rank_and_ce(s, torch.zeros(5, dtype=torch.float64), 1.0)[0].backward()
    assert s.grad.tolist() == [0.0] * 5


def test_a_rate_counts_as_its_samples_do():
    """3 of 4 right at one score is three solved prompts and an unsolved one at that score, but for pairs among themselves, which no score can part."""
    rate = rank_and_ce(scores(0.4, -0.9), torch.tensor([0.75, 0.0], dtype=torch.float64), 0.0)[2]
    apart = rank_and_ce(scores(*[0.4] * 4, *[-0.9] * 4), torch.tensor([1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.float64), 0.0)[2]
    assert float(rate.detach()) == pytest.approx(float(apart.detach()), abs=1e-12)
    pair = rank_and_ce(scores(0.4, -0.9), torch.tensor([0.75, 0.5], dtype=torch.float64), 1.0)[1]
    weights = {1.3: 0.75 * 0.5, -1.3: 0.5 * 0.25}
    assert float(pair.detach()) == pytest.approx(sum(w * np.log1p(np.exp(-gap)) for gap, w in weights.items()) / 0.5, abs=1e-12)


def test_the_fit_is_the_minimum():
    draw = np.random.default_rng(4)
    x, y = torch.tensor(draw.normal(size=(30, 6))), torch.tensor(draw.random(30))
    theta = fit(x, y, 0.25, 0.1)

    def loss(t):
        return rank_and_ce(x @ t[:-1] + t[-1], y, 0.25)[0] + 0.05 * t[:-1].square().sum()

    at = theta.clone().requires_grad_()
    loss(at).backward()
    assert float(at.grad.abs().max()) < 1e-6
    assert all(float(loss(theta + 1e-2 * torch.tensor(draw.normal(size=7)))) > float(loss(theta)) for _ in range(20))
    assert fit(x, torch.full((30,), 0.75, dtype=torch.float64), 0.0, 1e4).tolist() == pytest.approx([0.0] * 6 + [np.log(3)], abs=1e-3)  # nothing but the mean


def test_features_of_a_text():
    assert features("12+3=").equal(features(" 12+3= ")) and float(features("12+3=").norm()) == pytest.approx(1) == float(features("A b").norm())
    assert features("A  b").equal(features("a b")) and not features("12+3=").equal(features("3+12="))
    assert float(features("").norm()) == pytest.approx(1) and features("x").shape == (512,)


def test_the_learned_value_tells_prompts_apart_that_it_never_saw():
    memory = Memory()
    assert by_looks(["1+1="], memory, 256, 0.25, 0.01) is None
    draw = np.random.default_rng(0)
    texts = [f"{a}{op}{b}=" for a, op, b in zip(draw.integers(10, 99, 80), draw.choice(["+", "*"], 80), draw.integers(10, 99, 80), strict=True)]
    for i, text in enumerate(texts):
        memory.remember("v0/context", "all", {"step": 1, "prompt": f"p{i}", "text": text, "rate": 0.9 if "+" in text else 0.2}, cap=100)
    memory.end_step()
    easy, hard = by_looks(["17+55=", "17*55="], memory, 80, 0.0, 1e-4)
    assert 0.85 < easy < 0.95 and 0.15 < hard < 0.35
    assert by_looks(["17+55="], memory, 80, 0.0, 1e-4) == by_looks(["17+55="], memory, 200, 0.0, 1e-4)
    last = max(zip((f"p{i}" for i in range(80)), texts, strict=True))  # the last by name, since all are of one step
    (alone,) = by_looks(["17+55="], memory, 1, 0.0, 1e6)
    assert alone == pytest.approx(0.9 if "+" in last[1] else 0.2, abs=1e-3)


@pytest.mark.skipif(not DATA.is_file(), reason="the shared data is not here")
def test_the_learned_value_ranks_gsm8k_questions_that_it_never_saw():
    """One model's right and wrong solutions, 256 questions as context, 354 others to rank: above chance, and far from what a real embedder finds (0.71)."""
    with gzip.open(DATA, "rt") as file:
        rows = [r for r in map(json.loads, file) if r["generator"] == "GPT-3 6b finetuning"]
    found = []
    for seed in range(5):
        Random(seed).shuffle(rows)
        x, y = torch.stack([features(r["problem"]) for r in rows]), torch.tensor([float(r["final_answer_correct"]) for r in rows], dtype=torch.float64)
        theta = fit(x[:256], y[:256], 0.25, 0.01)
        right, pairs = ranked(x[256:] @ theta[:-1], y[256:])
        found.append(right / pairs)
    assert 0.58 < sum(found) / 5 < 0.68


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


def test_the_learned_allocation_does_not_depend_on_the_ranks():
    rule = v0(value="learned", context=6, ridge=1e-3)
    one, noted, memory, _ = steps(rule, 1, n=4)
    two, _, other, _ = steps(rule, 2, n=4)
    assert [dict(sorted(s.items())) for s in one] == [dict(sorted(s.items())) for s in two]
    assert len(memory.recall("v0/context", "all")) == 10 == len(other.recall("v0/context", "all"))  # 6, and a step's 4 more
    texts = [p.text for p in ROWS]
    assert by_looks(texts, memory, 6, 0.25, 1e-3) == by_looks(texts, other, 6, 0.25, 1e-3)
    assert noted["rule/rate/ranked"] == [5.0, 5.0]
    assert noted["rule/rate/predicted"] != steps(v0(), 1, n=4)[1]["rule/rate/predicted"]


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
    for keys in ({"b_min": 0}, {"b_min": 9, "b_max": 8}, {"window": 0}, {"clamp": 0.5}, {"value": "learned", "ridge": 0.0}, {"value": "learned", "context": 0}):
        with pytest.raises(ValueError, match="v0"):
            v0(**keys)
    with pytest.raises(ValueError, match='do nothing with value = "history"'):
        v0(context=64)
    with pytest.raises(ValueError, match="leave one out"):
        v0(value="learned", prior="rate")
    with pytest.raises(InputError, match=r"rollout\.group = 6"):
        steps(v0(b_min=7), 1)

"""SPAE: the specification's two responses, corners of the potential, limits of its coefficients, ranks, and the probes of a scripted engine."""

import asyncio
import math
from dataclasses import replace

import pytest
import torch

from llmrl.chat import Chat, char_tokenizer
from llmrl.credit import Credit
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.records import Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules.spae import damping, potential, spae
from tests.builders import make_view
from tests.contracts.rule import lockstep

ACC, CONF = [[0.10, 0.50, 0.98, 0.97], [0.20, 0.10]], [[0.30, 0.60, 0.95, 0.99], [0.40, 0.90]]
TOKENS = [[3, 3, 2, 2], [4, 2]]
PHI = [[potential(a, c) for a, c in zip(x, y, strict=True)] for x, y in zip(ACC, CONF, strict=True)]


def view_of(which=(0, 1), rewards=(1, 0), phi=PHI, tail=0):
    def spread(values, tokens, rest):
        return [v for v, n in zip(values, tokens, strict=True) for _ in range(n)] + [rest] * tail

    steps = [spread([float(j) for j in range(len(phi[i]))], TOKENS[i], -1.0) for i in which]
    streams = {"step": steps, "potential": [spread(phi[i], TOKENS[i], 0.0) for i in which]}
    return make_view([rewards[i] for i in which], [0] * len(which), [sum(TOKENS[i]) + tail for i in which], streams=streams)


def shaped(rule, view):
    """Before whitening."""
    chain = Credit(rule.credit.sample, rule.credit.token[:1])
    return chain.update(view, chain.init())[0].tolist()


def by_token(rows):
    return [v for row, tokens in zip(rows, TOKENS, strict=True) for v, n in zip(row, tokens, strict=True) for _ in range(n)]


def test_worked_example():
    assert PHI[0] == pytest.approx([-0.205, 0.1, 0.9365, 0.93545]) and PHI[1] == pytest.approx([-0.18, -0.715])
    assert damping(PHI[0], 0.5, 0.9) == pytest.approx([1, 1, 1, 0.683940], abs=1e-6) and damping(PHI[1], 0.5, 0.9) == [1, 1]
    a = shaped(spae(), view_of())
    assert a == pytest.approx(by_token([[0.405765, 0.589703, 1.026354, 0.247170], [-0.594235, -0.832787]]), abs=1.1e-6)
    x = torch.tensor(a, dtype=torch.float64)
    assert (float(x.mean()), float(x.std(correction=0))) == pytest.approx((0.093184, 0.633777), abs=1e-6)
    final = spae().credit.update(view_of(), spae().credit.init())[0]
    assert final.tolist() == pytest.approx(by_token([[0.493204, 0.783429, 1.472395, 0.242966], [-1.084638, -1.461036]]), abs=2e-6)
    assert (float(final.mean()), float(final.std(correction=0))) == pytest.approx((0.0, 1.0), abs=1e-7)


def test_corners_of_the_potential():
    table = {(0, 0): 0, (1, 1): 1, (0, 1): -1, (1, 0): 0.5, (0.5, 0.5): 0.125}
    assert {k: potential(*k) for k in table} == table
    grid = [i / 10 for i in range(11)]
    assert all(-1 <= potential(a, c) <= 1 for a in grid for c in grid)
    assert all(potential(a + 0.1, c) >= potential(a, c) for a in grid[:-1] for c in grid)
    assert potential(0.7, 0.9) > potential(0.7, 0.1) and potential(0.6, 0.9) < potential(0.6, 0.1)  # in Conf it rises iff Acc > 2/3


def test_limits_of_the_coefficients():
    assert shaped(spae(alpha=0.0, xi=0.0), view_of()) == [0.5] * 10 + [-0.5] * 6
    damped = shaped(spae(xi=0.0), view_of())
    assert damped[:8] == [0.5] * 8 and damped[8:10] == pytest.approx([0.5 * 0.683940] * 2, abs=1e-6)
    assert damping([0.95] * 40, 0.5, 0.9)[-1] == pytest.approx(0.5) and damping([], 0.5, 0.9) == []
    wrong = shaped(spae(xi=0.0), view_of(rewards=(0, 1)))
    assert wrong[9] == pytest.approx(-0.5 * 0.683940, abs=1e-6)  # wrong after saturation: its punishment shrinks too


def test_the_bonus():
    """Its mean over the steps is 0; the largest jump gets the most; equal differences give 0."""
    g = [x - r for x, r in zip(shaped(spae(alpha=0.0, xi=1.0), view_of()), [0.5] * 10 + [-0.5] * 6, strict=True)]
    each = [g[0], g[3], g[6], g[8], g[10], g[14]]
    assert sum(each) == pytest.approx(0.0, abs=1e-12) and max(each) == each[2] and min(each) == each[5]
    assert all(1 - math.e < x < math.e - 1 for x in each)
    assert shaped(spae(), view_of(phi=[[0.2] * 4, [0.7] * 2])) == [0.5] * 10 + [-0.5] * 6


def test_tokens_behind_the_last_boundary_and_texts_without_steps():
    a = shaped(spae(), view_of(tail=2))
    assert a[10:12] == [0.5] * 2 and a[18:] == [-0.5] * 2
    streams = {"step": [[-1.0] * 3, [-1.0]], "potential": [[-1.0] * 3, [-1.0]]}
    assert shaped(spae(), make_view([1, 0], [0, 0], [3, 1], streams=streams)) == [0.5] * 3 + [-0.5]


def test_the_spread_of_differences_is_that_of_all_ranks():
    """Each rank has one sample; only the bonus is looked at, since a cohort lies on one rank."""
    chain = Credit((), spae(alpha=0.0).credit.token[:1])
    whole = chain.update(view_of(), chain.init())[0]
    jobs = [lambda ranks, i=i: chain.update(replace(view_of((i,)), all_sum=ranks.all_sum, gather=ranks.gather), chain.init())[0] for i in (0, 1)]
    assert torch.cat(lockstep(jobs)).tolist() == pytest.approx(whole.tolist(), abs=1e-12)


TEXTS = ["1.2.3", "1+2", "4.5.6.7.8"]


def collect(**keys):
    """Boundary "."; probes answer with two tokens, each of log-prob -0.3; the reference answer's tokens have 0.9 and 0.8."""
    chat = Chat(char_tokenizer("0123456789+-*=;#(). !}"))
    asked = []

    class First:
        def score(self, items):
            return [Verdict(float(t[0] == "1")) for _, t in items]

    def reply(r):
        if "probe" in r.seed:
            asked.append((chat.show(r.context_ids), r.seed[2:]))
            return chat.completion_ids("8}")[:-1]
        return TEXTS[int(r.seed[3])]

    engine = TableEngine(chat, reply, logp=-0.3, judge=lambda context, ids: [math.log(0.9), math.log(0.8)][: len(ids)])
    io = RolloutIO(engine, First(), chat, Memory(), Sampling(20), 3, (0, 1))
    rule = spae(probe="#", boundary=".", end="", dynamic_rounds=0, probes=2, **keys)
    (group,) = asyncio.run(rule.collect([Prompt("p", ({"role": "user", "content": "1+1="},), "12")], io))
    return group.samples, asked, io


def test_probes_and_their_streams():
    samples, asked, io = collect()
    assert samples[0].streams["step"] == [0, 0, 1, 1, -1, -1] and samples[1].streams["step"] == [-1.0] * 4
    phi = potential(0.85, math.exp(-0.3))
    assert samples[0].streams["potential"] == pytest.approx([phi] * 4 + [0.0] * 2)
    assert asked[0] == ("<bos>1+1=1.#", ("p/0", "probe", 2, 0)) and len(asked) == 2 * (2 + 4)
    assert io.noted["rule/probes"] == [6.0, 0.0] and io.noted["rule/potential"] == pytest.approx([6 * phi, 6])


def test_at_most_so_many_probes_and_the_others_take_the_next():
    samples, asked, _ = collect(max_probes=2)
    assert [c for c, _ in asked[4::2]] == ["<bos>1+1=4.5.#", "<bos>1+1=4.5.6.7.#"]
    assert samples[2].streams["step"] == [0, 0, 1, 1, 2, 2, 3, 3, -1, -1]


def test_keys_are_checked():
    for keys in ({"alpha": 1.5}, {"probes": 0}, {"boundary": ""}):
        with pytest.raises(ValueError, match="spae"):
            spae(**keys)

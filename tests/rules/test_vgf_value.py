"""The value head of the rule vgf: the fit by hand and in its limits, its gradient, its memory, and what it does for the rule."""

import json

import pytest
import torch
from torch.testing import assert_close

from llmrl import lm_transport as lm
from llmrl.frozen_reward import padded
from llmrl.memory import Memory
from llmrl.records import InputError
from llmrl.rules.vgf_value import STORE, ValueHead, fit, ranked
from tests.builders import f64
from tests.rules.test_vgf import BUDGET, collect, make_io, noted, place, rule_of  # noqa: F401 (place: a fixture)

torch.set_num_threads(1)


def made_up(m, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    h, y = torch.randn(m, d, generator=g, dtype=torch.float64), torch.randn(m, generator=g, dtype=torch.float64)
    return h - h.mean(0), y - y.mean(), torch.randn(d, generator=g, dtype=torch.float64)


# ---------------------------------------------------------------- the fit


def test_the_fit_by_hand():
    h, y = f64([[1, 0], [-1, 0]]), f64([0.5, -0.5])
    # the prior explains all of it: c = (0.5 + 0.5) / 2, nothing is left
    assert_close(fit(h, y, f64([2, 0]), 0.5), f64([0.5, 0]), rtol=1e-12, atol=0)
    # the prior sees nothing: M s = 2 / 2, so v = 1 / (2 + 0.5 * 1)
    assert_close(fit(h, y, f64([0, 1]), 0.5), f64([0.4, 0]), rtol=1e-12, atol=0)
    # half of it: Hp = (1, -1), c = 0.5, so w = 0.5 (1, 1) + v, and the data leave nothing over
    assert_close(fit(h, y, f64([1, 1]), 0.5), f64([0.5, 0.5]), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("m", "d"), [(40, 6), (5, 12)])
def test_the_fits_limits(m, d):
    h, y, p = made_up(m, d)
    c = (h @ p) @ y / (h @ p).square().sum()
    assert_close(fit(h, y, p, 1e12), c * p, rtol=1e-6, atol=1e-9)  # only the prior's scale
    loose = fit(h, y, p, 1e-9)
    assert_close(h.T @ (y - h @ loose), torch.zeros(d, dtype=torch.float64), rtol=0, atol=1e-6)  # least squares: the residual is orthogonal
    assert_close(fit(h, y, -3 * p, 0.1), fit(h, y, p, 0.1), rtol=1e-9, atol=1e-12)  # the prior's length and sign do not matter
    order = torch.randperm(m, generator=torch.Generator().manual_seed(1))
    assert_close(fit(h[order], y[order], p, 0.1), fit(h, y, p, 0.1), rtol=1e-9, atol=1e-12)
    assert_close(fit(h, 7 * y, p, 0.1), 7 * fit(h, y, p, 0.1), rtol=1e-9, atol=1e-12)
    more = torch.cat([h, h.new_zeros(d, d)])  # rows of zeros change nothing but which of the two systems is solved
    assert_close(fit(more, torch.cat([y, y.new_zeros(d)]), p, 0.1), fit(h, y, p, 0.1), rtol=1e-9, atol=1e-12)
    assert not fit(h, 0 * y, p, 0.1).any() and not fit(0 * h, y, p, 0.1).any()


def test_ranked_by_hand():
    # scores 1, 0, 0: two pairs differ; values 3, 1, 3: one right, one a tie
    assert ranked(f64([3, 1, 3]), f64([1, 0, 0])) == (1.5, 2.0)
    assert ranked(f64([1, 2]), f64([0.5, 0.5])) == (0.0, 0.0)


# ---------------------------------------------------------------- the value


def test_a_head_gives_its_own_value_and_gradient_and_leaves_the_model_alone(place):  # noqa: F811
    reward = lm.RewardModel.load(place[0] / "rm")
    items = [([1, 2, 3], [4, 5]), ([1, 2], [6, 7, 8])]
    slope = torch.randn(reward.slope.shape, generator=torch.Generator().manual_seed(2))
    mine = reward.with_head(slope)
    assert_close(torch.tensor(mine.score(items)), reward.features(items) @ slope, rtol=1e-4, atol=1e-5)
    assert_close(torch.tensor(reward.with_head(reward.slope).score(items)), torch.tensor(reward.score(items)), rtol=1e-5, atol=1e-6)
    ids, lengths = padded([t for _, t in items])
    u = reward.table.detach()[ids]
    _, g = mine.slopes([c for c, _ in items], ids, lengths, u)
    _, double = reward.with_head(2 * slope).slopes([c for c, _ in items], ids, lengths, u)
    assert_close(double, 2 * g, rtol=1e-5, atol=1e-7)
    step = torch.randn(u.shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    step[0, 2] = 0  # padding
    up, down = (mine.value([c for c, _ in items], ids, lengths, u + s * step) for s in (1, -1))
    assert_close((up - down) / 2, (g * step).sum((1, 2)), rtol=2e-2, atol=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in reward.model.parameters()) and not g[0, 2].any()


def test_the_first_step_follows_the_reward_model_bit_for_bit(place):  # noqa: F811
    a, b = (collect(rule_of(place, form="members", value=value, **BUDGET), make_io(place)) for value in ("reward", "head"))
    assert [[vars(s) for s in g.samples] for g in a] == [[vars(s) for s in g.samples] for g in b]


def test_the_second_step_follows_a_head_that_ranks_what_it_was_told(place):  # noqa: F811
    rule = rule_of(place, form="members", value="head", value_ridge=1e-3, **BUDGET)
    memory = Memory()
    for _ in range(2):  # the same samples twice, since the prompts and the step's seed are the same
        io = make_io(place)
        io.memory = memory
        groups = collect(rule, io)
        memory.end_step()
    assert noted(io, "value/ranked") > 0.6 > 0.4 > noted(io, "reward/ranked")  # 16 numbers for 44 texts, 15 of them new
    plain = collect(rule_of(place, form="members", **BUDGET), make_io(place))
    new = [[s.token_ids for g in gs for s in g.samples if s.role == "transported"] for gs in (groups, plain)]
    assert new[0] != new[1]
    assert noted(io, "score/after") > noted(io, "score/before")  # digits, which the verifier likes; the reward model is random


# ---------------------------------------------------------------- memory


class Told:
    """A reward model whose features are made up, by the first token."""

    slope = torch.tensor([1.0, -1.0, 0.5])

    def features(self, items):
        return torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(t[0])) for _, t in items])

    def with_head(self, slope):
        return slope


def remembered(place, parts, *, window, steps=(1, 2, 3)):  # noqa: F811
    """The memory after some steps of 4 prompts, dealt out to `parts` ranks."""
    memory, head = Memory(), ValueHead(window, 0.1)
    for step in steps:
        ranks = [Memory() for _ in range(parts)]
        for k in range(4):
            io = make_io(place)
            io.memory, io.seed = ranks[k % parts], (0, step)
            texts = [(([1], [100 * step + 10 * k + i]), None if i == 3 else float((i + k) % 2)) for i in range(4)]
            head.learn(Told(), io, f"q{k}", texts, Told())
        memory.end_step(lambda mine, ranks=ranks: [(r._new, r._caps, r._tracked) for r in ranks])
    return memory


@pytest.mark.parametrize("window", [6, 8, 100])
def test_one_rank_and_two_and_a_copy_through_json_fit_the_same_head(place, window):  # noqa: F811
    head, io = ValueHead(window, 0.1), make_io(place)
    found = []
    for parts in (1, 2):
        io.memory = remembered(place, parts, window=window)
        found.append(head.model(Told(), io))
    io.memory = Memory()
    io.memory.load_state_dict(json.loads(json.dumps(remembered(place, 2, window=window).state_dict())))
    found.append(head.model(Told(), io))
    assert all(torch.equal(found[0], other) for other in found[1:])
    # of 12 prompts a window of 6 holds half of step 2, which is left out, and all of step 3
    last = {6: (3,), 8: (3,), 100: (1, 2, 3)}[window]
    io.memory = remembered(place, 1, window=1000, steps=last)
    assert torch.equal(head.model(Told(), io), found[0])


def test_unjudged_texts_are_not_remembered_and_a_window_too_small_is_refused(place):  # noqa: F811
    memory = remembered(place, 1, window=1000)
    assert [len(e["scores"]) for e in memory.recall(STORE, "all")] == [3] * 12
    io = make_io(place)
    io.memory = remembered(place, 1, window=3)
    with pytest.raises(InputError, match="value_window = 3"):
        ValueHead(3, 0.1).model(Told(), io)

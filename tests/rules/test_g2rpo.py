"""G2RPO: the specification's quantiles, both stages, trapezoid and entropy band, and that a step's statistics are those of all ranks."""

import asyncio
import math
import threading
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from llmrl.batch import evaluate_terms
from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.records import Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules.g2rpo import _push, g2rpo, normal_scores, trapezoid
from tests.builders import ALPHABET, f64, make_batch, make_view


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0, 0, 0, 0, 1], [-0.320388] * 4 + [1.281552]),
        ([0, 0, 1, 1, 1], [-0.902976] * 2 + [0.601984] * 3),
        ([0.1, 0.1, 0.1, 0.2, 1], [-0.601984] * 3 + [0.524401, 1.281552]),
        ([0.81, 0.81, 0.82, 0.82, 0.83], [-0.902976] * 2 + [0.262200] * 2 + [1.281552]),
        ([0, 1], [-0.674490, 0.674490]),
        ([1, 1, 1, 1], [0.0] * 4),
        ([0.2, 0.9, 0.5, 0.5, 0.1, 0, 1, 0.3], [-0.488776, 0.887147, 0.323044, 0.323044, -0.887147, -1.534121, 1.534121, -0.157311]),
        ([0.4], [0.0]),
    ],
)
def test_worked_quantiles(rewards, expected):
    assert normal_scores(f64(rewards)).tolist() == pytest.approx(expected, abs=1e-6)
    view = make_view(rewards, [0] * len(rewards))
    assert g2rpo().credit.update(view, g2rpo().credit.init())[0].tolist() == pytest.approx(expected, abs=1e-6)


def two_stage(rewards, tasks=None, dead="rank"):
    n = len(rewards)
    view = make_view(rewards, [i // 4 for i in range(n)], streams={"task": [[float(t)] for t in tasks or [7] * n]})
    rule = g2rpo(stages=2, dead=dead)
    return rule.credit.update(view, rule.credit.init())[0].tolist()


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0, 0, 0, 1, 0, 1, 1, 1], [-0.511078] * 3 + [1.534121, -1.534121] + [0.511078] * 3),
        ([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9], [-1.210634, -0.323044, 0.323044, 1.210634] * 2),
        ([0, 0, 0, 1, 0, 0, 0, 0], [-0.970015] * 3 + [1.534121] + [0.343981] * 4),
    ],
)
def test_worked_two_stages(rewards, expected):
    assert two_stage(rewards) == pytest.approx(expected, abs=1e-6)


def test_dead_groups_stay_dead_by_default():
    """The trap: the release pushes an all-wrong group up by 0.344."""
    assert two_stage([0, 0, 0, 1, 0, 0, 0, 0], dead="zero")[4:] == [0.0] * 4
    assert two_stage([0, 0, 0, 1, 0, 0, 0, 0], dead="zero")[:4] == pytest.approx([-0.970015] * 3 + [1.534121], abs=1e-6)


def test_one_group_a_task_is_left_alone_by_the_second_stage():
    rewards = [0.3, 0.1, 0.7, 0.5, 0, 1, 1, 0]
    view = make_view(rewards, [0] * 4 + [1] * 4)
    assert two_stage(rewards, [1] * 4 + [2] * 4) == pytest.approx(g2rpo().credit.update(view, g2rpo().credit.init())[0].tolist(), abs=2e-6)


def test_identities_of_the_map():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(9, generator=g, dtype=torch.float64)
    q = normal_scores(x)
    assert abs(float(q.sum())) < 1e-12
    for f in (torch.exp, lambda v: 3 * v - 7, lambda v: v**3 * 100):
        assert_close(normal_scores(f(x)), q)
    assert_close(normal_scores(-x), -q)
    assert_close(normal_scores(q), q)
    assert_close(normal_scores(torch.cat([x[:8], f64([1e6])])).max(), q.max())
    for n, top, std in ((5, 1.281552, 0.875755), (8, 1.534121, 0.922524), (16, 1.862732, 0.961083)):
        q = normal_scores(torch.arange(n).double())
        assert (float(q.max()), float(q.std(correction=0))) == pytest.approx((top, std), abs=1e-6)
    assert float(normal_scores(f64([0, 0, 0, 0, 1])).std(correction=0)) == pytest.approx(0.640776, abs=1e-6)


def ranks(f, views):
    """f(view) of every view in threads that meet at each gather."""
    barrier, box, out = threading.Barrier(len(views), timeout=10), [None] * len(views), [None] * len(views)

    def rank(i):
        def gather(x):
            box[i] = x
            barrier.wait()
            together = list(box)
            barrier.wait()
            return together

        out[i] = f(replace(views[i], gather=gather))

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(len(views))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    return out


def test_the_second_stage_ranks_over_all_ranks():
    rewards = [0, 0, 0, 1, 0, 1, 1, 1]
    rule = g2rpo(stages=2)
    parts = [make_view(rewards[k : k + 4], [0] * 4, streams={"task": [[7.0]] * 4}) for k in (0, 4)]
    got = ranks(lambda view: rule.credit.update(view, rule.credit.init())[0], parts)
    assert torch.cat(got).tolist() == pytest.approx(two_stage(rewards), abs=1e-12)


def test_worked_trapezoid():
    span = (100.0, 300.0, 800.0, 1500.0)
    assert [trapezoid(n, span) for n in (100, 200, 300, 500, 800, 1150, 1500, 50, 2000)] == [0, 0.5, 1, 1, 1, 0.5, 0, 0, 0]


def band_view(nll, tasks, lengths):
    streams = {"behavior_logp": [[-x] * n for x, n in zip(nll, lengths, strict=True)], "task": [[t] * n for t, n in zip(tasks, lengths, strict=True)]}
    return make_view([1.0] * len(nll), [0] * len(nll), lengths, streams=streams)


@pytest.mark.parametrize(("h", "expected"), [(0.1, 0.1), (0.2, 0.0), (0.4, 0.0), (0.6, 0.0), (0.9, 0.3)])
def test_worked_entropy_penalty(h, expected):
    rule = g2rpo(entropy_band=(0.2, 0.6), entropy_coef=1.0)
    view = band_view([h], [7.0], [3])
    batch, out = make_batch([[-h] * 3], [0.0])
    batch.stream["entropy_push"] = rule.credit.extra(view, rule.credit.init())[0]["entropy_push"]
    value, shares = evaluate_terms(rule.loss, batch, out, [1.0, 3.0])
    assert float(value.detach()) == pytest.approx(expected, abs=1e-12) and shares["entropy_band"] == pytest.approx(expected, abs=1e-12)
    slope = {0.1: 1 / 3, 0.9: -1 / 3}.get(h, 0.0)  # d loss / d logp: opposite signs on the two sides
    assert torch.autograd.grad(value, out.logp_T)[0].tolist() == pytest.approx([slope] * 3)


def test_the_band_is_by_task_over_the_whole_step():
    """Tasks 1 (mean 0.9 over 4 tokens) and 2 (mean 0.1 over 2), cut over micro-batches and ranks: sum of both penalties, 0.3 + 0.1."""
    nll, tasks, lengths = [0.9, 0.5, 1.3, 0.1], [1.0, 1.0, 1.0, 2.0], [2, 1, 1, 2]
    rule = g2rpo(entropy_band=(0.2, 0.6), entropy_coef=1.0)
    whole = _push((0.2, 0.6), False).update(torch.zeros(6, dtype=torch.float64), {}, band_view(nll, tasks, lengths))[0]
    assert whole.tolist() == pytest.approx([1.5] * 4 + [-3.0] * 2)
    parts = [band_view(nll[:2], tasks[:2], lengths[:2]), band_view(nll[2:], tasks[2:], lengths[2:])]
    got = ranks(lambda view: _push((0.2, 0.6), False).update(torch.zeros(3, dtype=torch.float64), {}, view)[0], parts)
    assert_close(torch.cat(got), whole)
    total, at = 0.0, 0
    for x, n in zip(nll, lengths, strict=True):  # one micro-batch a sample
        batch, out = make_batch([[-x] * n], [0.0])
        batch.stream["entropy_push"] = whole[at : at + n]
        at += n
        total += float(evaluate_terms(rule.loss, batch, out, [1.0, 6.0])[0].detach())
    assert total == pytest.approx(0.3 + 0.1)


def test_collect_labels_tasks_and_lengths():
    chat = Chat(char_tokenizer(ALPHABET))

    class Right:
        def score(self, items):
            return [Verdict(1.0) for _ in items]

    rule = g2rpo(lengths={"short": (0.0, 2.0, 3.0, 6.0), "": (0.0, 8.0, 9.0, 10.0)}, length_weight=0.5)
    io = RolloutIO(TableEngine(chat, lambda r: "1" * (2 + int(r.seed[3]))), Right(), chat, Memory(), Sampling(9), 3, (0, 1))
    prompts = [Prompt(n, ({"role": "user", "content": "1+1="},), "2", {"task": n}) for n in ("short", "long")]
    a, b = asyncio.run(rule.collect(prompts, io))
    assert [s.streams["length_reward"][0] for s in a.samples] == pytest.approx([1.0, 2 / 3, 1 / 3])  # 3, 4, 5 tokens with the end token
    assert [s.streams["length_reward"][0] for s in b.samples] == pytest.approx([3 / 8, 4 / 8, 5 / 8])
    assert len({s.streams["task"][0] for s in a.samples + b.samples}) == 2
    view = make_view([1, 1, 1], [0, 0, 0], streams={"length_reward": [[1.0], [0.6], [0.3]]})
    assert rule.credit.update(view, rule.credit.init())[0].tolist() == pytest.approx([0.967422, 0.0, -0.967422], abs=1e-6)


def test_a_reward_gap_of_a_millionth_is_a_tie():
    assert normal_scores(f64([0.1, 0.1 + 1e-8, 0.2])).tolist()[0] == normal_scores(f64([0.1, 0.1 + 1e-8, 0.2])).tolist()[1]
    assert math.isclose(float(normal_scores(f64([0.0, 1e-5])).max()), 0.674490, abs_tol=1e-6)


def test_bad_spans_are_refused():
    with pytest.raises(ValueError, match="l_min"):
        g2rpo(lengths={"x": (5.0, 4.0, 6.0, 7.0)})

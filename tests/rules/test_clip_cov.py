"""Clip-Cov and KL-Cov: the specification's worked numbers, the choice of tokens over the whole step, and where the losses fall back to known ones."""

import asyncio
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from llmrl import losses
from llmrl.batch import evaluate_terms
from llmrl.chat import Chat, char_tokenizer
from llmrl.credit import View
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.records import Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules import clip_cov as cc
from tests.builders import ALPHABET, flat, make_batch, make_view
from tests.test_credit import lockstep

LOGP = [[-0.10, -2.0, -0.5, -0.20], [-1.0, -0.1, -3.0]]
OLD = [[-0.15, -1.9, -0.5, -0.25], [-1.1, -0.1, -2.8]]
ADV = [1.5, -0.5]
COV = [[0.759184, -0.869388, 0.416327, 0.673469], [0.016327, -1.012245, 2.302041]]


def view_of(logp=LOGP, draws=None, **more) -> View:
    streams = {"old_logp": logp, "draw": draws or [[0.5] * len(row) for row in logp]}
    return make_view([1.0, 0.0], [0, 0], [len(row) for row in logp], streams=streams, **more)


def advantages(adv=ADV):
    return flat([[a] * len(row) for a, row in zip(adv, LOGP, strict=True)])


def apply(transform, a_T, view):
    return transform.update(a_T, {}, view)[0]


def loss(rule, adv_T, mark=None):
    """The rule's loss on the worked table with these advantages and marks."""
    batch, out = make_batch(LOGP, ADV, old=OLD)
    batch = replace(batch, adv_T=adv_T, stream={} if mark is None else {"high_cov": mark})
    value, _ = evaluate_terms(rule.loss, batch, out, [7.0] * len(rule.loss))
    return value.detach(), torch.autograd.grad(value, out.logp_T)[0]


def test_worked_covariances():
    """The example takes C of the present log-probs."""
    c = cc.covariance(advantages(), view_of())
    assert_close(c, flat(COV), atol=1e-6, rtol=0)
    assert float(c.mean()) == pytest.approx(0.326531, abs=1e-6)
    x, a = flat(LOGP), advantages()
    assert float(c.mean()) == pytest.approx(float((x * a).mean() - x.mean() * a.mean()))  # the population covariance


@pytest.mark.parametrize(("fraction", "chosen", "expected"), [(0.15, [6], -0.621303), (0.30, [6, 0], -0.614160)])
def test_worked_kl_cov(fraction, chosen, expected):
    mark = apply(cc._mark_largest(fraction), advantages(), view_of())
    assert set(torch.nonzero(mark)[:, 0].tolist()) == set(chosen)
    assert float(loss(cc.kl_cov(fraction=fraction), advantages(), mark)[0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("fraction", "bounds"), [(2e-4, (1.0, 5.0)), (0.3, (0.8, 5.0))])
def test_worked_clip_cov(fraction, bounds):
    """The dropped token stays in the denominator of 7; with fewer eligible tokens than the budget all of them are dropped."""
    adv = apply(cc._drop_drawn(fraction, bounds), advantages(), view_of())
    assert torch.nonzero(adv != advantages())[:, 0].tolist() == [6]
    value, grad = loss(cc.clip_cov(fraction=fraction, bounds=bounds), adv)
    assert float(value) == pytest.approx(-0.708355, abs=1e-6) and float(grad[6]) == 0.0


def test_nothing_eligible_is_plain_clipping():
    adv = apply(cc._drop_drawn(0.5, (50.0, 60.0)), advantages(), view_of())
    plain = loss(replace(cc.clip_cov(), loss=(cc.Term(losses.pg_clip(1.0, 1.0)),)), advantages())
    assert_close(loss(cc.clip_cov(), adv), plain, atol=0, rtol=0)
    assert float(plain[0]) == pytest.approx(-0.649874, abs=1e-6)


def test_kl_cov_without_beta_is_the_unclipped_gradient():
    value, grad = loss(cc.kl_cov(beta=0.0), advantages(), torch.ones(7, dtype=torch.float64))
    r = (flat(LOGP) - flat(OLD)).exp()
    assert_close(grad, -r * advantages() / 7)
    assert float(value) == pytest.approx(-0.649874, abs=1e-6)


def test_kl_cov_does_nothing_in_the_first_update():
    batch, out = make_batch(LOGP, ADV)
    batch.stream["high_cov"] = torch.ones(7, dtype=torch.float64)
    value, _ = evaluate_terms(cc.kl_cov().loss, batch, out, [7.0, 7.0])
    assert_close(torch.autograd.grad(value, out.logp_T)[0], -advantages() / 7)


def test_kl_cov_clips_only_when_asked():
    batch, out = make_batch([[0.0]], [1.0], old=[[-1.0]])
    batch.stream["high_cov"] = torch.zeros(1, dtype=torch.float64)
    assert float(evaluate_terms(cc.kl_cov().loss, batch, out, [1.0, 1.0])[0].detach()) == pytest.approx(-2.718282, abs=1e-6)
    assert float(evaluate_terms(cc.kl_cov(clip=0.2).loss, batch, out, [1.0, 1.0])[0].detach()) == pytest.approx(-1.2)


def test_constant_advantage_selects_nothing():
    flat_a = torch.full((7,), 0.3, dtype=torch.float64)
    assert cc.covariance(flat_a, view_of()).abs().max() < 1e-15
    assert apply(cc._mark_largest(0.5), flat_a, view_of()).tolist() == [0.0] * 7
    assert_close(apply(cc._drop_drawn(0.5, (1.0, 5.0)), flat_a, view_of()), flat_a)


def test_negated_advantages_turn_the_choice_over():
    assert_close(cc.covariance(-advantages(), view_of()), -flat(COV), atol=1e-6, rtol=0)
    mark = apply(cc._mark_largest(0.15), -advantages(), view_of())
    assert torch.nonzero(mark)[:, 0].tolist() == [5]  # -1.012245 was the lowest: a negative advantage can be chosen


@pytest.mark.parametrize("seed", range(4))
def test_nth_largest_is_exact(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.randn(200, generator=g, dtype=torch.float64), torch.tensor([0.0, -0.0, 1e300, -1e300, 5e-324, torch.nan], dtype=torch.float64)])
    x = torch.cat([x, x[:40]])  # ties
    ordered = x[~x.isnan()].sort(descending=True).values
    for n in (1, 2, 17, 120, len(ordered)):
        assert cc.nth_largest(x, n, view_of()) == float(ordered[n - 1])
    assert cc.nth_largest(x, len(ordered) + 1, view_of()) == -float("inf")


@pytest.mark.parametrize("transform", [cc._mark_largest(0.2), cc._drop_drawn(0.2, (0.05, 9.0))], ids=["kl", "clip"])
def test_the_budget_is_that_of_the_step_however_it_is_cut(transform):
    """Five samples on one rank, or on two: the same tokens. By rank, max(1, .) alone would choose more."""
    g = torch.Generator().manual_seed(0)
    lengths = [4, 1, 3, 6, 2]
    rows = [(-torch.rand(n, generator=g)).tolist() for n in lengths]
    draws = [torch.rand(n, generator=g).tolist() for n in lengths]
    rewards = [1.0, 0.0, 0.4, None, 0.9]

    def part(which):
        streams = {"old_logp": [rows[i] for i in which], "draw": [draws[i] for i in which]}
        return make_view([rewards[i] for i in which], [0] * len(which), [lengths[i] for i in which], streams=streams)

    chain = cc.c.Credit((), (transform,))
    whole = chain.update(part(range(5)), chain.init())[0].split(lengths)
    two = lockstep(chain, [part([0, 1]), part([2, 3, 4])])
    got = [*two[0].split(lengths[:2]), *two[1].split(lengths[2:])]
    assert_close(torch.cat(list(whole)), torch.cat(got))
    if transform.name.startswith("mark"):
        assert int(torch.cat(list(whole)).sum()) == 2  # int(0.2 * 10 scored tokens); the 6 unscored ones do not count


def test_the_draws_hang_on_the_sample():
    """Not on the batch that it was sampled in, and other steps draw other tokens."""
    chat = Chat(char_tokenizer(ALPHABET))

    class Right:
        def score(self, items):
            return [Verdict(1.0) for _ in items]

    def draws(ids, step):
        io = RolloutIO(TableEngine(chat, lambda r: "12"), Right(), chat, Memory(), Sampling(4), 2, (0, step))
        prompts = [Prompt(i, ({"role": "user", "content": "1+1="},), "2") for i in ids]
        groups = asyncio.run(cc.clip_cov().collect(prompts, io))
        return {s.id: s.streams["draw"] for g in groups for s in g.samples}

    both = draws(["a", "b"], 1)
    assert both == draws(["b", "a"], 1) and {**draws(["a"], 1), **draws(["b"], 1)} == both
    assert draws(["a"], 2)["a/0"] != both["a/0"] and both["a/0"] != both["a/1"]


def test_rules_ask_for_old_log_probs_and_refuse_nonsense():
    assert cc.clip_cov().needs.old_logp and cc.kl_cov().needs.old_logp
    for make in (lambda: cc.clip_cov(fraction=0.0), lambda: cc.clip_cov(bounds=(5.0, 1.0)), lambda: cc.kl_cov(fraction=20.0), lambda: cc.kl_cov(beta=-1.0)):
        with pytest.raises(ValueError):
            make()

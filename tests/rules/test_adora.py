"""ADORA: the specification's two groups in every mode, the edge cases of its table, and what a weight may not change."""

from dataclasses import replace

import pytest
import torch

from llmrl.rules import grpo
from llmrl.rules.adora import adora
from tests.builders import make_view
from tests.test_credit import lockstep

R = [1, 0, 1, 0, 0]
SHORT, LONG = [300, 500, 620, 900, 4096], [300, 500, 820, 900, 4096]
BASE = [1.095443, -0.730295, 1.095443, -0.730295, -0.730295]


def view_of(rewards, lengths, cut=(), cohorts=None):
    view = make_view(rewards, cohorts or [0] * len(rewards), lengths)
    return replace(view, truncated_S=torch.tensor([i in cut for i in range(len(rewards))]))


def advantages(rule, rewards=R, lengths=SHORT, cut=(4,), cohorts=None):
    view = view_of(rewards, lengths, cut, cohorts)
    adv = rule.credit.update(view, rule.credit.init())[0]
    return [float(x[0]) for x in adv.split(lengths)]


@pytest.mark.parametrize(
    ("keys", "short", "long"),
    [
        ({"mode": "attenuate"}, 0.1, 1.0),
        ({"mode": "amplify", "criteria": "length"}, 1.0, 2.0),
        ({"mode": "amplify", "criteria": "difficulty"}, 2.0, 2.0),
        ({"mode": "amplify", "criteria": "and"}, 1.0, 2.0),
        ({"mode": "amplify", "criteria": "or"}, 2.0, 2.0),
        ({}, 1.0, 2.0),
    ],
)
def test_worked_example(keys, short, long):
    assert advantages(adora(**keys)) == pytest.approx([short * a for a in BASE], abs=2e-6)
    assert advantages(adora(**keys), lengths=LONG) == pytest.approx([long * a for a in BASE], abs=2e-6)


def test_a_truncated_wrong_sample_does_not_move_the_threshold():
    """Mean of the wrong ones: 700 without it, 1832 with it. 820 lies between."""
    rule = adora(mode="attenuate")
    assert advantages(rule, lengths=LONG, cut=(4,))[0] == pytest.approx(BASE[0], abs=2e-6)
    assert advantages(rule, lengths=LONG, cut=())[0] == pytest.approx(0.1 * BASE[0], abs=2e-6)


def test_weights_of_one_are_grpo():
    plain = advantages(grpo.grpo())
    assert advantages(adora(up=1.0)) == plain and advantages(adora(mode="attenuate", down=1.0)) == plain


def test_ratios_signs_and_sums_stay():
    got = advantages(adora(mode="attenuate"), [1, 0, 0.7, 0.2, 0])
    plain = advantages(grpo.grpo(), [1, 0, 0.7, 0.2, 0])
    assert [g / p for g, p in zip(got, plain, strict=True)] == pytest.approx([0.1] * 5, rel=1e-12)
    assert sum(got) == pytest.approx(0.0, abs=1e-12)


def test_the_scale_of_lengths_does_not_matter():
    for lengths in (SHORT, LONG):
        assert advantages(adora(), lengths=[3 * n for n in lengths]) == advantages(adora(), lengths=lengths)


def test_edges_of_the_table():
    """No right sample: weight 1. No countable wrong one: the length criterion holds. A rate of exactly tau is difficult; strict in length."""
    graded = [0.4, 0.1, 0.3]  # none above 0.5, yet the advantages differ
    assert advantages(adora(mode="attenuate"), graded, [9, 5, 7], ()) == pytest.approx(advantages(grpo.grpo(), graded, [9, 5, 7], ()))
    assert advantages(adora(criteria="or"), graded, [9, 5, 7], ()) == pytest.approx(advantages(grpo.grpo(), graded, [9, 5, 7], ()))
    assert advantages(adora(mode="attenuate"), [1, 0, 1], [9, 5, 7], (1,)) == pytest.approx(advantages(grpo.grpo(), [1, 0, 1], [9, 5, 7], (1,)))
    half = advantages(adora(criteria="difficulty"), [1, 0], [5, 5], ())
    assert half == pytest.approx([2 * a for a in advantages(grpo.grpo(), [1, 0], [5, 5], ())])
    assert advantages(adora(criteria="length"), [1, 0], [5, 5], ()) == pytest.approx(advantages(grpo.grpo(), [1, 0], [5, 5], ()))


def test_dead_groups_stay_dead():
    for rewards in ([1, 1, 1], [0, 0, 0]):
        assert advantages(adora(), rewards, [1, 2, 3], ()) == [0.0] * 3


def test_renormalised_weights_have_mean_one_over_all_ranks():
    rule = adora(renorm=True)
    easy, hard = ([1, 0, 0, 0], [9, 3, 3, 3]), ([1, 1, 1, 0], [2, 2, 2, 3])
    whole = advantages(rule, easy[0] + hard[0], easy[1] + hard[1], (), [0] * 4 + [1] * 4)
    plain = advantages(grpo.grpo(), easy[0] + hard[0], easy[1] + hard[1], (), [0] * 4 + [1] * 4)
    assert [w / p for w, p in zip(whole, plain, strict=True)] == pytest.approx([4 / 3] * 4 + [2 / 3] * 4)  # weights 2 and 1, mean 3/2
    two = lockstep(rule.credit, [view_of(*easy), view_of(*hard)])
    assert [float(x[0]) for part, (_, n) in zip(two, (easy, hard), strict=True) for x in part.split(n)] == pytest.approx(whole)


def test_factors_are_positive():
    with pytest.raises(ValueError, match="above 0"):
        adora(down=0.0)

"""CANON: the specification's group of six, its identities, the schedules of mu, and the warnings about odd groups."""

import json

import pytest
import torch

from llmrl.credit import Credit
from llmrl.rules import grpo
from llmrl.rules.canon import canon, cosine, halves
from tests.builders import make_view

R = [1, 0, 1, 1, 0, 0]
M = [120, 340, 200, 90, 410, 150]
INTER = [2 / 3, -2 / 3, 1 / 3, 2 / 3, -2 / 3, -1 / 3]
INTRA = [1 / 3, -1 / 3, 2 / 3, 1 / 3, -1 / 3, -2 / 3]


def advantages(rule, rewards=R, metric=M, cohorts=None, state=None, **more):
    """One number a sample. The metric is the length, or a mean of -behavior_logp over two tokens."""
    cohorts = cohorts or [0] * len(rewards)
    if isinstance(metric[0], int):
        lengths, streams = metric, {}
    else:
        lengths, streams = [2] * len(rewards), {"behavior_logp": [[-m + 0.1, -m - 0.1] for m in metric]}
    view = make_view(rewards, cohorts, lengths, streams=streams, **more)
    adv, _ = rule.credit.update(view, state or rule.credit.init())
    return [float(x[0]) for x in adv.split(lengths)]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"mu": 1.0}, INTER),
        ({"mu": 0.0}, INTRA),
        ({"mu": 0.5}, [0.5, -0.5, 0.5, 0.5, -0.5, -0.5]),
        ({"mu": 0.8}, [0.6, -0.6, 0.4, 0.6, -0.6, -0.4]),
        ({"mu": 1.0, "alpha": 0.9}, [0.7, -2 / 3, 0.7 / 3, 0.7, -2 / 3, -0.3]),
    ],
)
def test_worked_example(keys, expected):
    assert advantages(canon(metric="length", **keys)) == pytest.approx(expected, abs=1e-12)


def test_worked_halves():
    view = make_view(R, [0] * 6, M)
    assert halves(view.length_S.double(), view).tolist() == [False, True, True, False, True, False]


def test_half_mu_is_dr_grpo_and_sums_are_zero():
    rewards, metric = [0.2, 0.9, 0.4, 0.1, 1.0, 0.3, 0.0, 0.5], [3.1, 0.2, 1.5, 0.7, 2.2, 0.4, 9.0, 1.1]
    plain = [float(x) for x in grpo.dr_grpo().credit.update(make_view(rewards, [0] * 8), {"center": {}})[0]]
    assert advantages(canon(metric="nll", mu=0.5), rewards, metric) == pytest.approx(plain)
    for mu in (0.0, 0.3, 1.0):
        assert sum(advantages(canon(metric="nll", mu=mu), rewards, metric)) == pytest.approx(0.0, abs=1e-12)


def test_a_metric_without_signal_is_dr_grpo():
    """Both halves have mean 1/2."""
    for mu in (0.0, 0.4, 1.0):
        assert advantages(canon(metric="length", mu=mu), [1, 0, 1, 0], [1, 2, 3, 4]) == pytest.approx([0.5, -0.5, 0.5, -0.5])


def test_only_the_order_of_the_metric_matters():
    metric = [3.1, 0.2, 1.5, 0.7, 2.2, 0.4]
    for mu in (0.0, 1.0):
        rule = canon(metric="nll", mu=mu)
        assert advantages(rule, R, metric) == advantages(rule, R, [m**3 for m in metric])
        assert advantages(rule, R, metric) == pytest.approx(advantages(rule, R, [9 - m for m in metric]))  # swapped halves
    assert max(advantages(canon(metric="length"))) > 0.5  # right and on the better side: more than dr_grpo gives


def test_equal_rewards():
    """alpha 1: nothing. alpha 0.9 on a solved prompt: the plus half is pressed down, the other up."""
    assert advantages(canon(metric="length"), [1] * 6) == [0.0] * 6
    pressed = advantages(canon(metric="length", alpha=0.9), [1] * 6)
    assert pressed == pytest.approx([0.1, -0.1, -0.1, 0.1, -0.1, 0.1])
    assert advantages(canon(metric="length", alpha=0.9, plus="low"), [1] * 6) == pytest.approx([-x for x in pressed])


def test_odd_groups_follow_the_code_and_warn():
    with pytest.warns(UserWarning, match="odd number"):
        assert advantages(canon(metric="length", mu=0.5), [1, 0, 0], [1, 2, 3]) == pytest.approx([0.5, -0.5, -0.5])
    with pytest.warns(UserWarning, match="odd number"):  # (above: low half {1}, high half {0, 0}; dr_grpo gives [2/3, -1/3, -1/3])
        assert advantages(canon(metric="length"), [1], [4]) == [0.0]


def test_unscored_samples_are_in_no_half():
    assert advantages(canon(metric="length"), [*R, None], [*M, 1]) == pytest.approx([*INTER, 0.0])


def test_ties_go_by_place():
    assert advantages(canon(metric="length", mu=0.0), [1, 0, 1, 1], [5, 5, 5, 5]) == pytest.approx([0.5, -0.5, 0.0, 0.0])


@pytest.mark.parametrize(("name", "mu"), [("inter_first", 0.5), ("intra_first", 0.5)])
def test_schedules_by_the_mean_reward_of_all_ranks(name, mu):
    assert advantages(canon(metric="length", mu=name)) == pytest.approx([mu * a + (1 - mu) * b for a, b in zip(INTER, INTRA, strict=True)])
    all_sum = lambda x: x + torch.tensor([2.0, 2.0])  # noqa: E731  another rank with two right samples: mean 5/8
    got = advantages(canon(metric="length", mu=name), all_sum=all_sum)
    mu = 3 / 8 if name == "inter_first" else 5 / 8
    assert got == pytest.approx([mu * a + (1 - mu) * b for a, b in zip(INTER, INTRA, strict=True)])


def test_cosine_schedules():
    assert [cosine(s, 1.0, 0.4) for s in (0, 14, 29, 30, 50, 70, 110)] == pytest.approx([1 / 30, 0.5, 1.0, 1.0, 0.7, 1.0, 1.0])
    assert cosine(69, 1.0, 0.4) == pytest.approx(0.4, abs=1e-3) and cosine(69, 0.6, 0.0) == pytest.approx(0.0, abs=1e-3)


def test_the_step_is_state_and_survives_json():
    rule = canon(metric="length", mu="cosine_inter_first")
    state = rule.credit.init()
    for step in range(3):
        view = make_view(R, [0] * 6, M)
        adv, state = rule.credit.update(view, json.loads(json.dumps(state)))
        c = (step + 1) / 30
        assert float(adv[0]) == pytest.approx(c * INTER[0] + (1 - c) * INTRA[0])
    assert state == {"canon": {"step": 3}}


def test_the_loss_and_what_it_needs():
    assert canon().needs.old_entropy and not canon(metric="nll").needs.old_entropy
    assert (canon().loss[0].over, canon().loss[0].fn.clip_bounds[:2]) == ("fixed", (0.8, 1.28))
    assert isinstance(canon().credit, Credit)
    for keys in ({"mu": 1.5}, {"alpha": 0.0}, {"alpha": 1.1}):
        with pytest.raises(ValueError, match="canon"):
            canon(**keys)

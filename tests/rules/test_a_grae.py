"""A-GRAE: the specification's two batches, the released formula, identities of the arms, and that omega is the whole batch's."""

import math

import pytest
import torch
from torch.testing import assert_close

from llmrl.credit import Credit
from llmrl.rules import grpo
from llmrl.rules.a_grae import a_grae, asymmetric
from tests.builders import f64, make_view
from tests.test_credit import lockstep

FIRST = ([1, 0, 0, 0, 1, 1, 1, 0], [0] * 4 + [1] * 4)
SECOND = ([1, 0, 0, 0] * 2, [0] * 4 + [1] * 4)


def credit(rule, batch):
    rewards, cohorts = batch
    return rule.credit.update(make_view(rewards, cohorts), rule.credit.init())[0].tolist()


def rows(a, b):
    """One sample like a[0] and three like a[1]; then three like b[0] and one like b[1]."""
    return [a[0]] + [a[1]] * 3 + [b[0]] * 3 + [b[1]]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"ddof": 0, "alpha": 1.0}, rows((0.683013, -0.455342), (0.227671, -1.366025))),
        ({"ddof": 0, "alpha": 0.5}, rows((1.366025, -0.455342), (0.455342, -1.366025))),
        ({"ddof": 1, "alpha": 1.0}, rows((0.591506, -0.394338), (0.197169, -1.183013))),
        ({"ddof": 0, "alpha": 1.0, "easy_norm": "code"}, rows((0.866025, -0.577350), (0.622008, -3.732051))),
    ],
)
def test_worked_example(keys, expected):
    assert credit(a_grae(std_eps=0.0, **keys), FIRST) == pytest.approx(expected, abs=1.1e-6)


def test_worked_second_batch():
    assert credit(a_grae(std_eps=0.0, ddof=0), SECOND) == pytest.approx(([0.295753] + [-0.394338] * 3) * 2, abs=1e-6)
    a = asymmetric(f64([math.sqrt(3), -1 / math.sqrt(3)]), f64([0.25, 0.25]), 0.25, alpha=0.25)
    assert a.tolist() == pytest.approx([1.183013, -0.394338], abs=1e-6)  # before damping


def test_sums_of_the_arms():
    """ddof 0, G = 8: sum |z| = 2G sqrt(p(1-p)), sum |hard| = G sqrt(1-p), sum |easy| = G sqrt(p)."""
    for right in range(1, 8):
        p, batch = right / 8, ([1] * right + [0] * (8 - right), [0] * 8)
        total = {arm: sum(map(abs, credit(a_grae(std_eps=0.0, ddof=0, arm=arm), batch))) for arm in ("hard", "easy")}
        assert total == pytest.approx({"hard": 8 * math.sqrt(1 - p), "easy": 8 * math.sqrt(p)})


def test_half_solved_prompts_do_not_depend_on_omega():
    z, p = f64([1.0, -1.0]), f64([0.5, 0.5])
    for omega in (0.5, 0.7, 1.0):
        assert_close(asymmetric(z, p, omega, alpha=0.5), z / math.sqrt(2))


def test_the_ends_of_omega():
    z, p = f64([1.7, -0.6]), f64([0.25, 0.25])
    assert_close(asymmetric(z, p, 1.0), asymmetric(z, p, 1.0, arm="hard"))
    at_0 = asymmetric(z, p, 0.0)
    assert at_0.tolist() == [0.0, float(asymmetric(z, p, 0.0, arm="easy")[1])]


def test_damping_makes_groups_negative_and_alpha_takes_it_away():
    assert sum(credit(a_grae(std_eps=0.0, ddof=0), SECOND)[:4]) < -0.8  # omega 0.25 < alpha 1
    assert sum(credit(a_grae(std_eps=0.0, ddof=0, alpha=0.25), SECOND)[:4]) == pytest.approx(0.0, abs=1e-12)


def test_signs_are_those_of_grpo_and_dead_groups_are_zero():
    batch = ([1, 0, 0.3, 0.7] + [1] * 4 + [0] * 4, [0] * 4 + [1] * 4 + [2] * 4)
    a, z = credit(a_grae(), batch), credit(grpo.grpo(), batch)
    assert [math.copysign(1, x) for x in a[:4]] == [math.copysign(1, x) for x in z[:4]]
    assert a[4:] == [0.0] * 8


def test_the_batch_matters_and_the_order_does_not():
    one, other = credit(a_grae(), FIRST)[:4], credit(a_grae(), SECOND)[:4]
    assert one[0] != pytest.approx(other[0], rel=0.1)
    assert credit(a_grae(), ([0, 0, 1, 0, 1, 1, 1, 0], FIRST[1]))[:4] == [one[1], one[1], one[0], one[1]]


def test_omega_runs_over_all_ranks():
    """The trap: on its own rank, a batch of easy prompts looks like another stage of training."""
    credit_ = Credit(a_grae().credit.sample)
    got = lockstep(credit_, [make_view([1, 0, 0, 0], [0] * 4), make_view([1, 1, 1, 0], [0] * 4)])
    assert torch.cat(got).tolist() == pytest.approx(credit(a_grae(), FIRST))
    assert float(got[0][0]) != pytest.approx(credit(a_grae(), ([1, 0, 0, 0], [0] * 4))[0], rel=0.1)


def test_unscored_samples_are_in_no_rate():
    assert credit(a_grae(), ([1, 0, 0, None, 0], [0] * 5)) == pytest.approx([*credit(a_grae(), ([1, 0, 0, 0], [0] * 4))[:3], 0.0, credit(a_grae(),
        ([1, 0, 0, 0], [0] * 4))[3]])  # fmt: skip


def test_options():
    assert credit(a_grae(positive=10.0), FIRST)[0] == pytest.approx(10 * credit(a_grae(), FIRST)[0])
    plain = credit(a_grae(divide_by_std=False, alpha=0.5), FIRST)
    m = 0.5 / (2 * math.sqrt(0.25)) + 0.5 / (2 * math.sqrt(0.75))
    assert plain[0] == pytest.approx(0.75 * m)
    for keys in ({"alpha": 0.0}, {"alpha": 1.5}, {"positive": 0.0}):
        with pytest.raises(ValueError, match="a_grae"):
            a_grae(**keys)

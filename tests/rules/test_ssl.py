"""SSL: the specification's clicks and grid, and what the tiers may and may not do to the order of rewards."""

import pytest
import torch

from llmrl.rules import grpo
from llmrl.rules.ssl import click_nearness, grid_nearness, reward, ssl
from tests.builders import f64, make_view

BOX = (0.0, 10.0, 100.0, 30.0)
CLICKS = {
    (50, 20): (1.0, 1, 1.20), (70, 20): (0.923116, 1, 1.15), (90, 30): (0.440432, 1, 1.05), (100, 30): (0.367879, 1, 1.05),
    (115, 20): (0.429557, 0, 0.05), (300, 20): (0.000004, 0, 0.0),
}  # fmt: skip


@pytest.mark.parametrize(("click", "row"), CLICKS.items())
def test_worked_clicks(click, row):
    near, inside = click_nearness(*click, BOX)
    assert near == pytest.approx(row[0], abs=1e-6) and inside == bool(row[1])
    assert float(reward(f64([float(inside)]), f64([near]), 0.2, 4)) == pytest.approx(row[2], abs=1e-12)


def advantages(rule, scores, nearness=None):
    streams = {} if nearness is None else {"nearness": [[x] for x in nearness]}
    return rule.credit.update(make_view(scores, [0] * len(scores), streams=streams), rule.credit.init())[0].tolist()


def test_worked_advantages():
    got = advantages(ssl(), [1, 1, 1, 0], [1.0, 0.923116, 0.440432, 0.429557])
    assert got == pytest.approx([0.618987, 0.527285, 0.343882, -1.490154], abs=1e-6)


def test_worked_grid():
    wanted = [[1] * 9 for _ in range(9)]
    found = [list(row) for row in wanted]
    for i, j in ((0, 8), (1, 8), (2, 8), (3, 0), (4, 0), (5, 0), (6, 0), (6, 1), (7, 0), (8, 1)):
        found[i][j] = 0
    shares = grid_nearness(found, wanted)
    assert shares == pytest.approx([1, 1, 6 / 9, 6 / 9, 1, 1, 5 / 9, 1, 1])
    shares = [1, 1, 1, 7 / 9, 6 / 9, 1, 5 / 9, 1, 1]
    near = sum(shares) / 9
    assert near == pytest.approx(0.888889, abs=1e-6)
    assert float(reward(f64([0.0]), f64([near]), 0.2, 4)) == pytest.approx(0.15)


def test_limits():
    right, near = f64([1, 0, 1, 0]), f64([0.3, 0.9, 1.0, 0.0])
    assert reward(right, near, 0.0, 4).tolist() == right.tolist()
    assert reward(right, near, 0.2, 10**6).tolist() == pytest.approx((right + 0.2 * near).tolist(), abs=1e-6)
    r = reward(right, near, 0.2, 4)
    assert float(r[right == 1].min()) > float(r[right == 0].max()) and float(r.min()) >= 0 and float(r.max()) <= 1.2
    assert reward(right, near, 0.2, 4, False)[1] == 0.0
    steps = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert (reward(torch.zeros(101, dtype=torch.float64), steps, 0.2, 4).diff() >= 0).all()
    plain = grpo.grpo().credit.update(make_view([1, 0, 0, 1], [0] * 4), grpo.grpo().credit.init())[0].tolist()
    assert advantages(ssl(alpha=0.0), [1, 0, 0.6, 1]) == plain


def test_groups_of_one_outcome():
    """Equal zones: nothing. Different ones: the zones alone decide, and alpha drops out."""
    assert advantages(ssl(), [1, 1, 1], [0.8, 0.9, 0.76]) == [0.0] * 3
    for scores in ([1, 1, 1], [0, 0, 0]):
        got = [advantages(ssl(alpha=a), scores, [0.1, 0.5, 0.9]) for a in (0.1, 0.9)]
        assert got[0] == pytest.approx(got[1], rel=1e-4) and got[0][0] < got[0][1] < got[0][2]


def test_nearness_is_the_graded_score_where_there_is_no_stream():
    assert advantages(ssl(), [1.0, 0.8, 0.2, 0.0]) == pytest.approx(advantages(ssl(), [1, 0, 0, 0], [1.0, 0.8, 0.2, 0.0]))
    assert advantages(ssl(solved=0.8), [0.8, 0.7])[0] > 0


def test_keys_are_checked():
    for keys in ({"zones": 0}, {"alpha": -0.1}, {"solved": 0.0}):
        with pytest.raises(ValueError, match="ssl"):
            ssl(**keys)

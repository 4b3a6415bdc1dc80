"""Reductions over segments against exact fractions, and their gradients."""

import pytest
import torch
from torch.testing import assert_close

from llmrl import segment
from tests.builders import f64, goldens


@pytest.mark.parametrize("entry", goldens("segment"), ids=lambda e: e["name"])
@pytest.mark.parametrize("what", ["sum", "count", "mean", "std", "max", "rank"])
def test_golden(entry, what):
    i = entry["inputs"]
    index, where, n = torch.tensor(i["index"]), torch.tensor(i["where"]), i["n"]
    more = {"ddof": i["ddof"]} if what == "std" else {}
    args = (index, n, where) if what == "count" else (f64(i["x"]), index, n, where)
    got = getattr(segment, f"seg_{what}")(*args, **more)
    assert got.dtype == torch.float64
    assert_close(got, f64(entry["expected"][what]), atol=entry["tolerance"], rtol=1e-15, equal_nan=True)
    if all(i["where"]):  # leaving nothing out is the default
        args = args[:-1]
        assert_close(getattr(segment, f"seg_{what}")(*args, **more), got, atol=0, rtol=0, equal_nan=True)


def test_permuting_elements_changes_nothing():
    g = torch.Generator().manual_seed(0)
    x, index = torch.randn(40, generator=g, dtype=torch.float64), torch.randint(0, 7, (40,), generator=g)
    p = torch.randperm(40, generator=g)
    for f in (segment.seg_sum, segment.seg_mean, segment.seg_std, segment.seg_max):
        assert_close(f(x[p], index[p], 7), f(x, index, 7), equal_nan=True)
    assert_close(segment.seg_rank(x[p], index[p], 7), segment.seg_rank(x, index, 7)[p])


def test_gradients():
    index, where = torch.tensor([0, 1, 0, 1, 0, 3]), torch.tensor([True, True, True, True, False, True])
    x = torch.tensor([0.5, -1.0, 2.0, 0.25, 9.0, 1.0], dtype=torch.float64, requires_grad=True)
    segment.seg_mean(x, index, 4, where)[:2].sum().backward()
    assert_close(x.grad, f64([0.5, 0.5, 0.5, 0.5, 0.0, 0.0]))
    pair = torch.tensor([0, 1, 0, 1, 0, 1])
    assert torch.autograd.gradcheck(lambda y: segment.seg_std(y, pair, 2, where), (x.detach().requires_grad_(),))


def test_fp32_large_offset():
    """std is computed about the mean: an offset of 1e4 does not eat a spread of 1."""
    x = torch.tensor([1e4, 1e4 + 1, 1e4 + 2, 1e4 + 3])
    assert_close(segment.seg_std(x, torch.zeros(4, dtype=torch.long), 1), torch.tensor([1.2909944]), rtol=1e-5, atol=0)

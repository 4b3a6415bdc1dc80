"""The vocabulary head: log-probs, entropies and gradients against log_softmax, gradcheck in fp64, and the precision promised for bf16."""

import pytest
import torch
from torch.testing import assert_close

from llmrl.head import head_logits, head_logp

T, D, V = 7, 5, 11


def inputs(dtype=torch.float64, t=T, d=D, v=V, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((t, d), (v, d), (v,)))
    target = torch.randint(3, v, (t,), generator=g)
    return *(x.mul(scale).to(dtype).requires_grad_() for x in (hidden, weight, bias)), target


def plain(hidden, weight, bias, target, temperature=1.0, banned=()):
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) / temperature
    keep = torch.tensor([i not in banned for i in range(len(weight))])
    logp = logits[:, keep].log_softmax(-1)  # of the ids that remain
    return logp.gather(1, (keep.cumsum(0) - 1)[target][:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("banned", [(), (0, 2)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_equals_log_softmax(chunk, temperature, banned, with_bias, entropy):
    hidden, weight, bias, target = inputs()
    bias = bias if with_bias else None
    wrt = [hidden, weight, *([bias] if with_bias else [])]
    want = plain(hidden, weight, bias, target, temperature, banned)
    logp, ent = head_logp(hidden, weight, bias, target, temperature=temperature, banned_ids=banned, chunk=chunk, entropy=entropy)
    assert_close(logp, want[0])
    w = torch.linspace(-1, 2, T, dtype=torch.float64)  # uneven weights, some negative
    mine, other = (w * logp).sum(), (w * want[0]).sum()
    if entropy:
        assert_close(ent, want[1])
        mine, other = mine + (w.flip(0) * ent).sum(), other + (w.flip(0) * want[1]).sum()
    else:
        assert ent is None
    for a, b in zip(torch.autograd.grad(mine, wrt), torch.autograd.grad(other, wrt), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("chunk", [1, 3, 10**6])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck(chunk, entropy):
    hidden, weight, bias, target = inputs(t=4)

    def f(h, w, b):
        logp, ent = head_logp(h, w, b, target, temperature=0.7, banned_ids=(1,), chunk=chunk, entropy=entropy)
        return (logp, ent) if entropy else logp

    assert torch.autograd.gradcheck(f, (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h, w: f(h, w, None), (hidden, weight))


def test_entropy_alone_has_its_gradient():
    hidden, weight, _, target = inputs()
    _, ent = head_logp(hidden, weight, None, target, entropy=True)
    assert_close(torch.autograd.grad(ent.sum(), hidden)[0], torch.autograd.grad(plain(hidden, weight, None, target)[1].sum(), hidden)[0])


def test_frozen_tensors_get_no_gradient():
    hidden, weight, bias, target = inputs()
    logp, _ = head_logp(hidden, weight.detach(), bias, target)
    logp.sum().backward()
    assert hidden.grad is not None and bias.grad is not None and weight.grad is None
    with torch.no_grad():
        assert_close(head_logp(hidden, weight, bias, target)[0], logp.detach())


def test_a_banned_target_is_impossible():
    hidden, weight, _, target = inputs()
    target[2] = 0
    logp, _ = head_logp(hidden, weight, None, target, banned_ids=(0,))
    assert logp[2] == -torch.inf and logp[torch.arange(T) != 2].isfinite().all()
    logp[torch.arange(T) != 2].sum().backward()  # where its weight is 0 it does no harm
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all() and hidden.grad[2].abs().max() == 0


def test_extreme_logits():
    """Logits of +-1e4 neither overflow nor lose the target: softmax is shifted."""
    hidden, weight, _, target = inputs(torch.float32, scale=100.0)
    logp, ent = head_logp(hidden, weight, None, target, entropy=True)
    want = plain(hidden.double(), weight.double(), None, target)
    assert_close(logp.double(), want[0], rtol=1e-5, atol=1e-2)
    assert logp.isfinite().all() and ent.isfinite().all()
    (logp.sum() + ent.sum()).backward()
    assert hidden.grad.isfinite().all()


def test_nothing_of_size_t_by_v_is_kept():
    hidden, weight, bias, target = inputs(t=64, d=4, v=50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        head_logp(hidden, weight, bias, target, chunk=8, entropy=True)
    assert max(kept) <= 64 * 4 < 64 * 50


def test_fp32_is_as_exact_as_log_softmax():
    hidden, weight, _, target = inputs(torch.float32, t=40, d=64, v=300, scale=0.5)
    exact, _ = plain(hidden.detach().double(), weight.detach().double(), None, target)
    mine = (head_logp(hidden, weight, None, target)[0].double() - exact).abs().max()
    usual = (plain(hidden, weight, None, target)[0].double() - exact).abs().max()
    assert mine <= 2 * usual + 1e-6


@pytest.mark.parametrize(("n", "d", "v"), [(50, 64, 23), (64, 576, 2048), (33, 1536, 1000), (1, 128, 500)])
def test_bf16_precision(n, d, v):
    """head.py promises errors near 1e-5 of the logits' size where plain bf16 has 2e-3: here at least 20 times smaller."""
    g = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, d, generator=g).bfloat16(), (0.05 * torch.randn(v, d, generator=g)).bfloat16()
    exact = hidden.double() @ weight.double().T
    size = exact.abs().max()
    logits = head_logits(hidden, weight)
    assert logits.dtype == torch.float32
    mine = float((logits - exact).abs().max() / size)
    usual = float(((hidden @ weight.T) - exact).abs().max() / size)
    assert mine < 2e-5 and usual > 20 * mine, f"{mine:.1e} against {usual:.1e} in plain bf16"


def test_bf16_logp_and_gradients():
    """fp32 results; gradients in bf16, within bf16 rounding of the fp64 gradients of the same numbers."""
    hidden, weight, bias, target = inputs(torch.bfloat16, t=40, d=64, v=300, scale=0.3)
    logp, ent = head_logp(hidden, weight, bias, target, temperature=0.8, banned_ids=(0,), chunk=16, entropy=True)
    assert logp.dtype == ent.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    want = plain(*exact, target, 0.8, (0,))
    assert_close(logp.double(), want[0], atol=2e-4, rtol=0)
    assert_close(ent.double(), want[1], atol=2e-4, rtol=0)
    mine = torch.autograd.grad(logp.sum() + ent.sum(), (hidden, weight, bias))
    for a, b in zip(mine, torch.autograd.grad(want[0].sum() + want[1].sum(), exact), strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a - b).abs().max() / b.abs().max()) < 2e-2
        assert float((a - b).norm() / b.norm()) < 1e-2

"""Losses and their reductions against hand-worked and formula goldens: values and gradients in fp64, identities, limiting cases."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from llmrl import losses
from llmrl.batch import evaluate_terms, global_denominators, token_metrics
from llmrl.records import Sample
from llmrl.rules.base import Term
from llmrl.segment import seg_mean
from tests.builders import flat, goldens, make_batch, make_loss

REDUCTIONS = {"token": ("token", None), "sample": ("sample", None), "fixed 8": ("fixed", 8), "fixed 1": ("fixed", 1)}
RATIO = [losses.pg_clip(), losses.pg_clip(0.2, 0.28, dual=3.0), losses.cispo(), losses.gspo()]
ALL = [*RATIO, losses.reinforce(), losses.mismatch(losses.gspo())]


def samples_of(batch):
    """Records with the batch's lengths and weights: what the denominators are made from."""
    counts = torch.bincount(batch.sample_T, minlength=batch.n_samples).tolist()
    weights = [float(w[0]) for w in batch.weight["policy"].split(counts)]
    return [Sample(str(i), "p", [1], [0] * n, None, 0, weights={"policy": w}) for i, (n, w) in enumerate(zip(counts, weights, strict=True))]


def reduced(fn, batch, out, over="token", budget=None):
    term = Term(fn, over=over, budget=budget)
    denominators = global_denominators(samples_of(batch), [term], max_new_tokens=99)
    loss, shares = evaluate_terms([term], batch, out, denominators)
    assert_close(torch.tensor(shares[term.label], dtype=loss.dtype), loss.detach(), equal_nan=True)
    return loss


def grad(value, wrt):
    return torch.autograd.grad(value, wrt, retain_graph=True)[0]


def random_batch(seed, rows=6, spread=0.3, **more):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (rows,), generator=g).tolist()

    def draw(scale=1.0):
        return [(-torch.rand(n, generator=g, dtype=torch.float64) * scale).tolist() for n in lengths]

    logp = draw(2.0)
    near = {
        k: [[x + spread * float(torch.randn((), generator=g, dtype=torch.float64)) for x in row] for row in logp]
        for k in ("old", "ref", "behavior")
    }
    adv = torch.randn(rows, generator=g, dtype=torch.float64).tolist()
    return make_batch(logp, adv, **{**near, **more})


@pytest.mark.parametrize("entry", goldens("worked_losses", "losses"), ids=lambda e: e["name"])
def test_golden(entry):
    i, expected, tol = entry["inputs"], entry["expected"], entry["tolerance"]
    batch, out = make_batch(i["logp"], i["adv"], **{k: i[k] for k in ("old", "ref", "behavior", "entropy", "weight") if k in i})
    fn = make_loss(i["loss"])
    l_T = fn(batch, out)
    assert l_T.dtype == torch.float64
    if "l" in expected:
        assert_close(l_T.detach(), flat(expected["l"]), atol=tol, rtol=tol)
    if "grad" in expected:
        wrt = out.entropy_T if i["loss"][0] == "entropy_bonus" else out.logp_T
        assert_close(grad(l_T.sum(), wrt), flat(expected["grad"]), atol=tol, rtol=tol)
    for name, (over, budget) in REDUCTIONS.items():
        if name in expected:
            assert float(reduced(fn, batch, out, over, budget).detach()) == pytest.approx(expected[name], abs=tol, rel=tol)


def test_worked_ratios():
    """The ratios themselves of the hand-worked table, 6 decimals; sequence ratio 1.105171, 0.951229; geometric rho 1.033895, 1.366838."""
    i = next(e["inputs"] for e in goldens("losses") if "behavior" in e["inputs"] and "ref" in e["inputs"])
    batch, out = make_batch(i["logp"], i["adv"], old=i["old"], behavior=i["behavior"])
    r = (out.logp_T - out.old_logp_T).detach()
    assert_close(r.exp(), flat([[1.491825, 0.904837, 1], [0.904837, 1.491825, 0.904837, 0.670320]]), atol=6e-7, rtol=0)
    assert_close(seg_mean(r, batch.sample_T, 2).exp(), flat([[1.105171, 0.951229]]), atol=6e-7, rtol=0)
    geometric = seg_mean(out.old_logp_T - batch.behavior_logp_T, batch.sample_T, 2).exp()
    assert_close(geometric, flat([[1.033895, 1.366838]]), atol=6e-7, rtol=0)


@pytest.mark.parametrize("fn", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("over", ["token", "sample", "fixed"])
def test_zero_advantage_zero_gradient(fn, over):
    batch, out = random_batch(0)
    batch = replace(batch, adv_T=torch.zeros_like(batch.adv_T))
    assert fn.scales_with_advantage  # what allows the learner to leave such samples out of the forward
    value = reduced(fn, batch, out, over)
    assert float(value.detach()) == 0.0
    assert grad(value, out.logp_T).abs().max() == 0.0


@pytest.mark.parametrize("over", ["token", "sample", "fixed"])
@pytest.mark.parametrize("fn", RATIO, ids=lambda f: f.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_on_policy_first_update_is_reinforce(fn, over, seed):
    """logp = old: all ratios are 1, the value is -A (cispo: -A logp) and the gradient that of REINFORCE."""
    batch, out = random_batch(seed)
    out.old_logp_T = out.logp_T.detach()
    want = grad(reduced(losses.reinforce(), batch, out, over), out.logp_T)
    assert_close(grad(reduced(fn, batch, out, over), out.logp_T), want, atol=1e-14, rtol=1e-12)
    value = -batch.adv_T * out.logp_T.detach() if fn.__name__ == "cispo" else -batch.adv_T
    assert_close(fn(batch, out).detach(), value)


def test_equal_lengths_make_the_reductions_agree():
    g = torch.Generator().manual_seed(1)
    logp = (-torch.rand(5, 8, generator=g, dtype=torch.float64)).tolist()
    old = (-torch.rand(5, 8, generator=g, dtype=torch.float64)).tolist()
    batch, out = make_batch(logp, [1.0, -0.5, 2.0, 0.0, -1.0], old=old)
    values = [reduced(losses.pg_clip(), batch, out, over, budget) for over, budget in (("token", None), ("sample", None), ("fixed", 8))]
    for v in values[1:]:
        assert_close(v, values[0])
        assert_close(grad(v, out.logp_T), grad(values[0], out.logp_T))


def test_gspo_of_one_token_is_pg_clip():
    batch, out = make_batch([[-0.5], [-1.0], [-0.2], [-0.9]], [1.0, -1.0, 0.5, -2.0], old=[[-0.9], [-0.6], [-0.2], [-1.6]])
    a, b = losses.gspo(0.2, 0.28)(batch, out), losses.pg_clip(0.2, 0.28)(batch, out)
    assert_close(a, b)
    assert_close(grad(a.sum(), out.logp_T), grad(b.sum(), out.logp_T))


@pytest.mark.parametrize("seed", range(5))
def test_gspo_token_form_is_plain_gspo(seed):
    """Value and gradient of mean_i max(-A s, -A clip(s)), with the gradient through every token of s. arXiv:2507.18071 eq. 5-7."""
    batch, out = random_batch(seed, spread=0.1)
    s = seg_mean(out.logp_T - out.old_logp_T, batch.sample_T, batch.n_samples).exp()
    a = seg_mean(batch.adv_T, batch.sample_T, batch.n_samples)
    plain = torch.maximum(-s * a, -s.clamp(1 - 0.05, 1 + 0.05) * a).mean()
    mine = reduced(losses.gspo(0.05, 0.05), batch, out, "sample")
    assert_close(mine, plain)
    assert_close(grad(mine, out.logp_T), grad(plain, out.logp_T))


def test_gspo_token_value_with_varying_advantage():
    """In value s_it is s_i whatever the advantages do along the row."""
    batch, out = make_batch([[-0.5, -1.0]], [[1.0, -2.0]], old=[[-0.6, -1.1]])
    assert_close(losses.gspo(0.5, 0.5)(batch, out).detach(), flat([[-math.exp(0.1), 2 * math.exp(0.1)]]))


def test_cispo_without_cap_is_importance_weighted_reinforce():
    batch, out = random_batch(3)
    r = (out.logp_T - out.old_logp_T).exp()
    assert_close(grad(losses.cispo(ratio_max=math.inf)(batch, out).sum(), out.logp_T), grad((-r * batch.adv_T).sum(), out.logp_T))


def test_cispo_keeps_every_gradient():
    """Ratios far outside any bound: pg_clip silences the tokens, cispo does not."""
    batch, out = make_batch([[-0.1, -0.1]], [1.0], old=[[-3.0, -4.0]])
    assert grad(losses.pg_clip()(batch, out).sum(), out.logp_T).tolist() == [0.0, 0.0]
    assert_close(grad(losses.cispo(ratio_max=5.0)(batch, out).sum(), out.logp_T), flat([[-5.0, -5.0]]))


def test_kl_estimators():
    batch, out = random_batch(4)
    assert (losses.kl_k3()(batch, out) >= 0).all() and (losses.kl_k2()(batch, out) >= 0).all()
    out.ref_logp_T = out.logp_T.detach()
    for fn in (losses.kl_k1(), losses.kl_k2(), losses.kl_k3()):
        assert fn(batch, out).abs().max() == 0.0
    assert grad(losses.kl_k3()(batch, out).sum(), out.logp_T).abs().max() == 0.0
    out.ref_logp_T = None
    for fn in (losses.kl_k1(), losses.kl_k2(), losses.kl_k3()):
        with pytest.raises(ValueError, match=r"Needs\(ref_logp=True\)"):
            fn(batch, out)
    with pytest.raises(ValueError, match=r"Needs\(entropy=True\)"):
        losses.entropy_bonus()(batch, out)


def test_kl_estimators_have_the_exact_expectation():
    """Enumerated over a vocabulary of 3: E k1 = E k3 = KL(pi, ref); the gradient of E-weighted k2 is that of KL(pi, ref)."""
    z = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    logp, ref = z.log_softmax(0), torch.tensor([0.1, 0.5, -0.4], dtype=torch.float64).log_softmax(0)
    batch, out = make_batch([[0.0, 0.0, 0.0]], [0.0], ref=[ref.tolist()])
    out.logp_T = logp
    p = logp.detach().exp()
    kl = (logp.exp() * (logp - ref)).sum()
    assert_close((p * losses.kl_k1()(batch, out)).sum(), kl)
    assert_close((p * losses.kl_k3()(batch, out)).sum(), kl)
    assert_close(grad((p * losses.kl_k2()(batch, out)).sum(), z), grad(kl, z))
    assert_close(grad((p * losses.kl_k1()(batch, out)).sum(), z), torch.zeros(3, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("how", ["truncate", "mask"])
@pytest.mark.parametrize("over", ["token", "sample"])
def test_mismatch_without_mismatch_does_nothing(how, over):
    for behavior in (None, "old"):
        batch, out = random_batch(5)
        batch.behavior_logp_T = out.old_logp_T.clone() if behavior else torch.full_like(out.old_logp_T, torch.nan)
        fn = losses.pg_clip()
        assert_close(losses.mismatch(fn, how, over=over)(batch, out), fn(batch, out), atol=0, rtol=0)


def test_mismatch_without_cap_is_importance_sampling():
    batch, out = random_batch(6)
    rho = (out.old_logp_T - batch.behavior_logp_T).exp()
    fn = losses.reinforce()
    for how in ("truncate", "mask"):
        assert_close(losses.mismatch(fn, how, ratio_max=math.inf)(batch, out), rho * fn(batch, out))


def test_mismatch_keeps_the_marks_of_what_it_wraps():
    wrapped = losses.mismatch(losses.gspo(0.1, 0.2))
    assert wrapped.__name__ == "gspo" and wrapped.scales_with_advantage and wrapped.clip_bounds == (0.9, 1.2, "sample")
    assert not hasattr(losses.mismatch(losses.ce()), "scales_with_advantage")
    assert not any(hasattr(f, "scales_with_advantage") for f in (losses.ce(), losses.kl_k3(), losses.entropy_bonus()))


@pytest.mark.parametrize("fn", [*ALL, losses.ce(), losses.kl_k3()], ids=lambda f: f.__name__)
@pytest.mark.parametrize("over", ["token", "sample", "fixed"])
def test_weight_zero_is_as_if_absent(fn, over):
    """Value and gradient of rows of weight 0 vanish, and the other rows do not notice them, whatever numbers stand there."""
    batch, out = random_batch(7)
    keep = batch.sample_T < 4
    cut, cut_out = random_batch(7)
    cut = replace(
        cut, sample_T=cut.sample_T[keep], adv_T=cut.adv_T[keep], behavior_logp_T=cut.behavior_logp_T[keep], reward_S=cut.reward_S[:4],
        weight={"policy": cut.weight["policy"][keep]},
    )  # fmt: skip
    cut_out = replace(cut_out, **{k: getattr(cut_out, k)[keep] for k in ("old_logp_T", "ref_logp_T")})
    cut_out.logp_T = cut_out.logp_T.detach()[keep].requires_grad_()
    batch.weight["policy"] = torch.where(keep, 1.0, 0.0).double()
    want = reduced(fn, cut, cut_out, over)
    for poison in (None, torch.nan, -torch.inf):
        if poison is not None:
            with torch.no_grad():
                out.logp_T[~keep] = poison
                out.old_logp_T = torch.where(keep, out.old_logp_T, poison)
        got = reduced(fn, batch, out, over)
        assert_close(got, want)
        g = grad(got, out.logp_T)
        assert_close(g[keep], grad(want, cut_out.logp_T))
        assert g[~keep].tolist() == [0.0] * int((~keep).sum()), f"poison {poison}"


@pytest.mark.parametrize("over", ["token", "sample", "fixed"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_number_that_counts_shows_in_the_loss(over, bad):
    """NaN or inf at positive weight must never be turned into a harmless 0."""
    batch, out = random_batch(8)
    with torch.no_grad():
        out.logp_T[0] = bad
    assert not reduced(losses.ce(), batch, out, over).isfinite()
    if math.isnan(bad):
        assert math.isnan(token_metrics(batch, out, [])["gap_max"])


def test_terms_with_weights_nobody_has_are_zero():
    batch, out = random_batch(9)
    terms = [Term(losses.ce(), weight="repair"), Term(losses.pg_clip())]
    denominators = global_denominators(samples_of(batch), terms, max_new_tokens=8)
    assert denominators == [1.0, float(len(batch.adv_T))]
    loss, shares = evaluate_terms(terms, batch, out, denominators)
    assert list(shares) == ["pg_clip"]
    assert and_is(loss, shares["pg_clip"])


def and_is(loss, value):
    return float(loss.detach()) == pytest.approx(value, abs=1e-15)


def test_coefficients_and_shapes():
    batch, out = random_batch(10)
    terms = [Term(losses.pg_clip()), Term(losses.kl_k3(), coef=0.04, name="kl")]
    denominators = global_denominators(samples_of(batch), terms, max_new_tokens=8)
    loss, shares = evaluate_terms(terms, batch, out, denominators)
    assert and_is(loss, shares["pg_clip"] + 0.04 * shares["kl"])  # shares are the terms' own values, before coef
    with pytest.raises(ValueError, match=r"loss bad: returned shape \(\)"):
        evaluate_terms([Term(lambda b, o: o.logp_T.sum(), name="bad")], batch, out, [1.0])


def test_denominators_of_two_ranks():
    batch, _ = random_batch(11, weight=[1.0, 0.5, 2.0, 0.0, 1.0, 1.0])
    samples = samples_of(batch)
    fn = losses.ce()
    terms = [Term(fn), Term(fn, over="sample"), Term(fn, over="fixed"), Term(fn, over="fixed", budget=3)]
    want = global_denominators(samples, terms, max_new_tokens=7)
    tokens = sum(s.weights["policy"] * len(s.token_ids) for s in samples)
    assert want == [tokens, 5.5, 5.5 * 7, 5.5 * 3]
    other = global_denominators(samples[2:], terms, max_new_tokens=7)
    joined = global_denominators(samples[:2], terms, max_new_tokens=7, all_sum=lambda x: x + torch.tensor(other, dtype=torch.float64))
    assert joined == pytest.approx(want)


def test_clipped_share():
    """The metric counts tokens whose gradient clipping stopped: A > 0 above the upper bound, A < 0 below the lower one."""
    i = next(e["inputs"] for e in goldens("losses") if e["inputs"]["loss"] == ["pg_clip", {"low": 0.2, "high": 0.2}])
    batch, out = make_batch(i["logp"], i["adv"], old=i["old"])
    row = token_metrics(batch, out, [Term(losses.pg_clip(0.2, 0.2))])
    assert (row["n"], row["clipped"], row["n_gap"]) == (7.0, 2.0, 0.0)
    assert token_metrics(batch, out, [Term(losses.gspo())])["clipped"] == 7.0

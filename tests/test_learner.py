"""The learner: gradients against autograd on the model's own eager forward, precision, clipping, schedules, and no wasted forward."""

import copy
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from llmrl import losses
from llmrl.batch import evaluate_terms, global_denominators, pack
from llmrl.config import load_recipe
from llmrl.credit import Credit, View, center
from llmrl.hf_engine import HFEngine
from llmrl.learner import Learner, RunFailed, learning_rate
from llmrl.models import load_policy
from llmrl.recipe import Model, Optim, Tiny
from llmrl.records import Request, Sample, Sampling
from llmrl.rules.base import Needs, Rule, Term
from llmrl.rules.verl_erank import prefix_ranks
from llmrl.session import open_session
from llmrl.step import run_step
from tests.builders import ALPHABET, tiny_policy

torch.set_num_threads(1)
TEMPERATURE = 0.8
PLAIN = Optim(lr=1e-2, clip_norm=0.0)
PLAIN_NEEDS = Needs()


def make_learner(dtype="float32", *, temperature=1.0, optim=PLAIN, sharp=True, **model):
    shape = Tiny(hidden=32, layers=2, heads=4, kv_heads=2, ffn=64, alphabet=ALPHABET)
    policy = load_policy(Model(path="tiny", dtype=dtype, tiny=shape, **model))
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.dim() == 2 and sharp:
                p.mul_(4.0)
    learner = Learner(policy, Accelerator(cpu=True), head_chunk=7, temperature=temperature)
    learner.start(optim)
    return learner


def sampled(learner, prompts=3, group=4):
    """On-policy samples with rewards and centred advantages."""
    contexts = [(1, 5 + k, 14, 7, *range(4, 4 + k)) for k in range(prompts)]
    how = Sampling(12, temperature=learner.temperature)
    asked = [Request(c, ("s", c[1], i), how) for c in contexts for i in range(group)]
    samples, adv = [], []
    for k, (r, c) in enumerate(zip(asked, HFEngine(learner.policy).generate(asked), strict=True)):
        samples.append(Sample(str(k), str(r.seed[1]), list(r.context_ids), c.token_ids, c.logprobs, 0, reward=float(sum(c.token_ids) % 5) / 4))
        adv.append(torch.full((len(c.token_ids),), samples[-1].reward - 0.4))
    return samples, adv


def step_gradient(learner, samples, adv, terms, *, tokens=10**6, needs=PLAIN_NEEDS):
    denominators = global_denominators(samples, terms, max_new_tokens=12)
    for batch in pack(samples, adv, tokens=tokens):
        loss, _ = evaluate_terms(terms, batch, learner.forward(batch, needs), denominators)
        learner.backward(loss)


def eager_logp(model, policy, sample, temperature):
    """[n] with gradient: log-probs of a sample's tokens by a plain forward over this one sequence."""
    logits = model(torch.tensor([sample.context_ids + sample.token_ids])).logits[0, len(sample.context_ids) - 1 : -1].float() / temperature
    logits = logits.index_fill(1, torch.tensor(policy.banned_ids), -torch.inf)
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]


def eager_copy(learner):
    model = copy.deepcopy(learner.policy.model)
    model.set_attn_implementation("eager")
    return model


def assert_near(a, b, tolerance):
    """Every tensor within tolerance of the other's size."""
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= tolerance * float(b[name].abs().max()), name


# ---------------------------------------------------------------- gradients


def test_first_update_equals_reinforce():
    """Gradient and weights after one AdamW step, both by hand: the mean over samples of the mean over tokens of -A logp."""
    learner = make_learner(temperature=TEMPERATURE, optim=Optim(lr=1e-2, clip_norm=0.25, weight_decay=0.1, eps=1e-3, betas=(0.9, 0.95)))
    samples, adv = sampled(learner)
    model = eager_copy(learner)
    by_hand = sum(-(a * eager_logp(model, learner.policy, s, TEMPERATURE)).mean() for s, a in zip(samples, adv, strict=True)) / len(samples)
    by_hand.backward()
    step_gradient(learner, samples, adv, [Term(losses.pg_clip(), over="sample")], tokens=40)
    want = {n: p.grad for n, p in model.named_parameters()}
    assert_near({n: p.grad for n, p in learner.params}, want, 1e-4)

    norm = math.sqrt(sum(float(g.double().square().sum()) for g in want.values()))
    assert norm > 0.25  # else nothing is clipped
    assert learner.update(3e-3) == pytest.approx(norm, rel=1e-5)
    assert learner.version == 1
    for name, p in model.named_parameters():
        g = p.grad * 0.25 / norm
        new = p.detach() * (1 - 3e-3 * 0.1) - 3e-3 * g / (g.abs() + 1e-3)  # first AdamW step: m / (sqrt(v) + eps) with bias correction
        assert torch.allclose(dict(learner.params)[name], new, atol=1e-6), name


@pytest.mark.parametrize("loss", [losses.pg_clip(), losses.pg_clip(dual=3.0), losses.cispo(), losses.gspo(), losses.reinforce()], ids=lambda f: f.__name__)
def test_all_policy_losses_begin_as_reinforce(loss):
    learner = make_learner(temperature=TEMPERATURE)
    samples, adv = sampled(learner)
    model = eager_copy(learner)
    sum(-(a * eager_logp(model, learner.policy, s, TEMPERATURE)).mean() for s, a in zip(samples, adv, strict=True)).backward()
    step_gradient(learner, samples, adv, [Term(loss, over="sample", coef=len(samples))])
    assert_near({n: p.grad for n, p in learner.params}, {n: p.grad for n, p in model.named_parameters()}, 1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_temperature_enters_the_log_probs(temperature):
    learner = make_learner(temperature=temperature)
    samples, adv = sampled(learner)
    (batch,) = pack(samples, adv, tokens=10**6)
    out = learner.forward(batch, Needs(entropy=True))
    assert float((out.logp_T.detach() - batch.behavior_logp_T).abs().max()) < 1e-5  # the engine's
    model, at = eager_copy(learner), 0
    for i in batch.sample_index:
        want = eager_logp(model, learner.policy, samples[i], temperature).detach()
        assert torch.allclose(out.logp_T[at : at + len(want)].detach(), want, atol=1e-5)
        at += len(want)
    s = samples[batch.sample_index[0]]
    logits = model(torch.tensor([s.context_ids])).logits[0, -1].detach().double()[[2, *range(4, 23)]] / temperature
    assert float(out.entropy_T[0].detach()) == pytest.approx(float(-(logits.softmax(0) * logits.log_softmax(0)).sum()), abs=1e-5)


def test_gradient_checkpointing_changes_nothing():
    plain, saving = make_learner(), make_learner(gradient_checkpointing=True)
    samples, adv = sampled(plain)
    again, _ = sampled(saving)
    assert [s.token_ids for s in samples] == [s.token_ids for s in again]
    layers = []
    hook = saving.policy.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: layers.append(1))
    for learner in (plain, saving):
        step_gradient(learner, samples, adv, [Term(losses.pg_clip()), Term(losses.entropy_bonus(), coef=0.1)], tokens=40, needs=Needs(entropy=True))
    hook.remove()
    assert len(layers) == 2 * len(pack(samples, adv, tokens=40))  # forward, and once more in backward
    assert_near({n: p.grad for n, p in saving.params}, {n: p.grad for n, p in plain.params}, 1e-6)


def test_head_chunks_change_nothing():
    one, many = make_learner(), make_learner()
    one.head_chunk, many.head_chunk = 10**6, 3
    samples, adv = sampled(one)
    for learner in (one, many):
        step_gradient(learner, samples, adv, [Term(losses.pg_clip()), Term(losses.entropy_bonus(), coef=0.1)], needs=Needs(entropy=True))
    assert_near({n: p.grad for n, p in many.params}, {n: p.grad for n, p in one.params}, 1e-5)


# ---------------------------------------------------------------- bf16 with fp32 masters


def test_small_updates_move_the_masters():
    """50 updates of 1e-6: a weight of 0.05 in bf16 has steps of 2e-4 and would stand still."""
    learner = make_learner("bfloat16", optim=Optim(lr=1e-6, clip_norm=0.0, betas=(0.9, 0.99)))
    samples, adv = sampled(learner)
    start = [m.detach().clone() for m in learner.held.masters]
    plain = [p.detach().clone().requires_grad_() for _, p in learner.params]
    control = torch.optim.AdamW(plain, lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0)
    terms, unit = [Term(losses.pg_clip())], None
    for _ in range(50):
        step_gradient(learner, samples, adv, terms)
        for p, m in zip(plain, learner.held.masters, strict=True):
            p.grad = m.grad.to(torch.bfloat16)
        unit = [m.grad.sign() for m in learner.held.masters]
        learner.update(1e-6)
        control.step()
    for (name, p), old, m, c, g in zip(learner.params, start, learner.held.masters, plain, unit, strict=True):
        if name.endswith("embed_tokens.weight"):
            continue  # most rows have no gradient
        moved = (m.detach() - old) * -g
        assert float(moved.median()) == pytest.approx(50e-6, rel=0.1), name
        big = old.abs() > 0.02
        assert torch.equal(c.detach()[big].float(), old[big]), name  # the control has not moved
        assert torch.equal(p.detach(), m.detach().to(torch.bfloat16)), name


def test_micro_batches_add_up_in_fp32():
    """Each micro-batch's bf16 gradient, taken alone, summed in fp32: exactly what accumulates. In bf16 most of it would be lost."""
    learner = make_learner("bfloat16")
    samples, adv = sampled(learner, prompts=8, group=8)
    terms = [Term(losses.pg_clip())]
    batches = pack(samples, adv, tokens=1)
    assert len(batches) == 64
    want = [torch.zeros_like(m) for m in learner.held.masters]
    lossy = [torch.zeros_like(p) for _, p in learner.params]
    for batch in batches:
        learner.backward(evaluate_terms(terms, batch, learner.forward(batch, Needs()), [100.0])[0])
        for w, b, m in zip(want, lossy, learner.held.masters, strict=True):
            assert m.grad.dtype == torch.float32
            w += m.grad
            b += m.grad.bfloat16()
            m.grad = None
    for batch in batches:
        learner.backward(evaluate_terms(terms, batch, learner.forward(batch, Needs()), [100.0])[0])
    assert all(p.grad is None for _, p in learner.params)
    for w, m in zip(want, learner.held.masters, strict=True):
        assert torch.equal(w, m.grad)
    assert any(float((b.float() - w).abs().max()) > 1e-3 * float(w.abs().max()) for b, w in zip(lossy, want, strict=True))


def test_bf16_gradient_is_near_that_of_fp32():
    half = make_learner("bfloat16", temperature=TEMPERATURE)
    samples, adv = sampled(half)
    full = make_learner(temperature=TEMPERATURE)
    with torch.no_grad():
        for (_, p), m in zip(full.params, half.held.masters, strict=True):
            p.copy_(m)
    for learner in (half, full):
        step_gradient(learner, samples, adv, [Term(losses.pg_clip())], tokens=60)
    for (name, p), m in zip(full.params, half.held.masters, strict=True):
        assert float(torch.nn.functional.cosine_similarity(p.grad.flatten(), m.grad.flatten(), dim=0)) > 0.99, name
    (batch,) = pack(samples, adv, tokens=10**6)
    gap = (half.forward(batch, Needs()).logp_T.detach() - batch.behavior_logp_T).abs()
    assert float(gap.mean()) < 0.05 and float(gap.max()) < 0.5


# ---------------------------------------------------------------- the update


@pytest.mark.parametrize("limit", [0.0, 0.25, 1e6])
def test_clipping(limit):
    """Plain descent shows the clipped gradient: AdamW's first moments are (1 - beta1) times it."""
    learner = make_learner(optim=Optim(lr=1e-3, clip_norm=limit))
    samples, adv = sampled(learner)
    step_gradient(learner, samples, adv, [Term(losses.pg_clip(), coef=3.0)])
    grads = [m.grad.clone() for m in learner.held.masters]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert norm > 0.3
    assert learner.update(1e-3) == pytest.approx(norm, rel=1e-5)
    factor = limit / norm if 0 < limit < norm else 1.0
    for g, m in zip(grads, learner.held.masters, strict=True):
        assert torch.allclose(learner.held.optimizer.state[m]["exp_avg"], 0.1 * factor * g, rtol=1e-4, atol=1e-9)
        assert m.grad is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run(dtype, bad):
    learner = make_learner(dtype)
    samples, adv = sampled(learner)
    step_gradient(learner, samples, adv, [Term(losses.pg_clip())])
    before = {n: p.detach().clone() for n, p in learner.params}
    name = "model.layers.1.mlp.up_proj.weight"
    dict(zip([n for n, _ in learner.params], learner.held.masters, strict=True))[name].grad[3, 4] = bad
    with pytest.raises(RunFailed, match=rf"update 0: the gradient is not finite in 1 tensors, first {name}; no weight was changed"):
        learner.update(1e-3)
    assert learner.version == 0 and all(torch.equal(p, before[n]) for n, p in learner.params) and not learner.held.optimizer.state


def test_an_update_without_gradient_moves_by_momentum_only():
    learner = make_learner(optim=Optim(lr=1e-3, clip_norm=1.0))
    start = {n: p.detach().clone() for n, p in learner.params}
    assert learner.update(1e-3) == 0.0
    assert learner.version == 1 and all(torch.equal(p, start[n]) for n, p in learner.params)


def lr(steps, **kw):
    return [learning_rate(Optim(lr=1.0, **kw), i, steps) for i in range(steps)]


def test_learning_rates_by_hand():
    assert lr(4) == [1.0] * 4
    assert lr(4, warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert lr(5, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert lr(5, schedule="linear", lr_end=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert lr(5, schedule="linear", lr_end=0.2, warmup_steps=2) == pytest.approx([0.5, 0.8, 0.6, 0.4, 0.2])
    assert lr(5, schedule="cosine") == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0])
    assert lr(3, schedule="cosine", lr_end=0.1) == pytest.approx([1.0, 0.55, 0.1])
    assert lr(1, schedule="linear", lr_end=0.1) == [1.0]
    assert learning_rate(Optim(lr=2e-5, schedule="linear", lr_end=0.5), 9, 10) == pytest.approx(1e-5)


def test_the_rate_given_is_the_rate_used():
    learner = make_learner(optim=Optim(lr=1e-3, clip_norm=0.0, eps=1e-12))
    start = {n: p.detach().clone() for n, p in learner.params}
    samples, adv = sampled(learner)
    step_gradient(learner, samples, adv, [Term(losses.pg_clip())])
    learner.update(5e-4)
    moved = (dict(learner.params)["lm_head.weight"].detach() - start["lm_head.weight"]).abs()
    assert float(moved[4:].median()) == pytest.approx(5e-4, rel=1e-3)  # Adam's first step is lr times the sign


# ---------------------------------------------------------------- reference model and old log-probs


def test_the_reference_is_frozen():
    learner = make_learner(temperature=TEMPERATURE)
    samples, adv = sampled(learner)
    first = [torch.tensor(s.behavior_logp) for s in samples]
    learner.freeze_reference()
    for k in range(3):
        for s in samples:
            s.streams.clear()
        learner.add_stream("ref_logp", samples, tokens=40)
        learner.add_stream("old_logp", samples, tokens=55)
        for s, want in zip(samples, first, strict=True):
            assert torch.allclose(torch.tensor(s.streams["ref_logp"]), want, atol=1e-5)
            assert torch.allclose(torch.tensor(s.streams["old_logp"]), want, atol=1e-5) == (k == 0)
        step_gradient(learner, samples, adv, [Term(losses.reinforce())])
        learner.update(1e-2)
    assert learner.policy.model.training and not learner.reference.model.training
    assert all(p.grad is None and not p.requires_grad for p in learner.reference.model.parameters())


def test_streams_that_are_there_are_not_computed_again():
    learner = make_learner()
    samples, _ = sampled(learner)
    samples[0].streams["old_logp"] = [0.5] * len(samples[0].token_ids)
    learner.add_stream("old_logp", samples, tokens=10**6)
    assert samples[0].streams["old_logp"][0] == 0.5 and samples[1].streams["old_logp"] == pytest.approx(samples[1].behavior_logp, abs=1e-5)
    with pytest.raises(RunFailed, match="no reference model"):
        learner.add_stream("ref_logp", samples, tokens=100)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_streams_are_those_of_a_plain_forward(dtype):
    """Last layer, at the places that predict the tokens; however the samples are packed. Only one sample's states reach a function at a time."""
    learner, seen = make_learner(dtype), []
    samples, _ = sampled(learner)

    def one(hidden_ND):
        seen.append((tuple(hidden_ND.shape), hidden_ND.dtype, hidden_ND.requires_grad, torch.is_grad_enabled()))
        return hidden_ND.norm()

    fns = {"each": lambda hidden_ND: hidden_ND[:, 3], "one": one, "erank": prefix_ranks(2)}
    learner.add_hidden_streams(fns, samples, tokens=40)
    assert seen[-1][1:] == (torch.float32, False, False) and sorted(x[0] for x in seen) == sorted((len(s.token_ids), 32) for s in samples)
    model, near = eager_copy(learner), {"abs": 1e-4} if dtype == "float32" else {"abs": 0.05, "rel": 0.05}
    for s in samples:
        ids = torch.tensor([s.context_ids + s.token_ids])
        hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, len(s.context_ids) - 1 : -1].detach().float()
        assert s.streams["each"] == pytest.approx(hidden[:, 3].tolist(), **near)
        assert s.streams["one"] == pytest.approx([float(hidden.norm())] * len(hidden), **near)
        assert s.streams["erank"] == pytest.approx(prefix_ranks(2)(hidden).tolist(), **near)
    assert learner.policy.model.training
    with pytest.raises(ValueError, match=r"Needs.hidden\['wrong'\] gave the shape \(32,\) for \d+ tokens"):
        learner.add_hidden_streams({"wrong": lambda hidden_ND: hidden_ND[0]}, samples, tokens=40)


def test_a_rule_gets_its_hidden_streams_before_credit(tmp_path):
    session = small_session(tmp_path, "verl_erank", keys=", stride = 2")
    try:
        seen = count_passes(session.policy)
        groups, _, row = run_step(session, 1)
    finally:
        session.close()
    assert seen == {"grad": 1, "plain": 1}
    erank = [s.streams["erank"] for g in groups for s in g.samples]
    assert all(1 <= x <= len(own) for own in erank for x in own) and max(map(max, erank)) > 1.5
    ends = [own[-1] for own in erank]
    assert session.credit_state["verl_erank"]["mu"][2] == pytest.approx(0.3 * sum(ends) / len(ends)) and math.isfinite(row["loss/pg_clip"])


def test_state_comes_back_to_the_bit():
    """Through the tensors of a checkpoint: masters, moments and counts; the next update is the same in every bit."""
    for dtype in ("float32", "bfloat16"):
        a, b = make_learner(dtype), make_learner(dtype, sharp=False)
        samples, adv = sampled(a)
        for _ in range(2):
            step_gradient(a, samples, adv, [Term(losses.pg_clip())])
            a.update(1e-3)
        b.held.load({n: p.detach().clone() for n, p in a.params}, {k: v.clone() for k, v in a.held.state()})
        for learner in (a, b):
            step_gradient(learner, samples, adv, [Term(losses.pg_clip())])
            learner.update(1e-3)
        for x, y in zip(a.held.masters, b.held.masters, strict=True):
            assert torch.equal(x, y)
        assert all(torch.equal(p, q) for (_, p), (_, q) in zip(a.params, b.params, strict=True))


# ---------------------------------------------------------------- whole steps: which forwards there are

RECIPE = """
seed = 3
steps = 4
run.dir = "x"
verifier = {{ use = "./judge.py:judge" }}
rule = {{ use = "{rule}"{keys} }}
batch = {{ tokens = 100000, minibatches = {minibatches}, epochs = {epochs} }}
optim = {{ lr = 1e-3 }}
data = {{ path = "chains", holdout = 5, args = {{ rows = 50 }} }}
rollout = {{ prompts = 4, group = 4, max_new_tokens = 8, temperature = 0.9 }}
scoring = {{ workers = 1 }}
model = {{ path = "tiny", tiny = {{ hidden = 32, layers = 1, ffn = 64 }} }}
"""
JUDGE = '''from llmrl.records import Verdict
def judge():
    """Right iff the characters' codes add up to an even number."""
    return lambda prompt, response: Verdict(float(sum(map(ord, response)) % 2 == 0))
'''


def small_session(folder: Path, rule="grpo", *, minibatches=1, epochs=1, keys=""):
    (folder / "judge.py").write_text(JUDGE)
    (folder / "r.toml").write_text(RECIPE.format(rule=rule, minibatches=minibatches, epochs=epochs, keys=keys))
    session = open_session(load_recipe(folder / "r.toml"))
    session.learner.start(session.recipe.optim)
    if session.rule.needs.ref_logp:
        session.learner.freeze_reference()
    return session


def count_passes(policy):
    """Forwards of packed batches to come: {"grad": n, "plain": n}; the engine's own are not counted."""
    seen = {"grad": 0, "plain": 0}
    inner = policy.hidden

    def hidden(ids, positions, plan):
        if type(plan).__name__ == "PackPlan":
            seen["grad" if torch.is_grad_enabled() else "plain"] += 1
        return inner(ids, positions, plan)

    policy.hidden = hidden
    return seen


def test_a_rule_that_wants_whole_groups_sees_them_whole(tmp_path):
    """Also the samples without advantage, which other rules' forwards leave out."""
    session = small_session(tmp_path, "grpo")
    seen = []

    @losses.scales_with_advantage
    def fn(batch, out):
        seen.append((batch.n_samples, sorted(torch.bincount(batch.group_S).tolist())))
        return -batch.adv_T * out.logp_T

    try:
        for whole in (True, False):
            session.rule = Rule(Credit(), (Term(fn),), needs=Needs(whole_groups=whole))  # no centring: a reward of 0 is advantage 0
            groups, adv, _ = run_step(session, 1 + (not whole))
            size, idle = len(groups[0].samples), sum(not a.any() for a in adv)
            assert idle and sum(n for n, _ in seen) == len(adv) - (0 if whole else idle)
            assert not whole or all(set(counts) == {size} for _, counts in seen)
            seen.clear()
    finally:
        session.close()


@pytest.mark.parametrize(
    ("rule", "minibatches", "epochs", "keys", "grad", "plain", "ref"),
    [
        ("grpo", 1, 1, "", 1, 0, 0),  # on-policy, one update: what the engine returned is enough
        ("grpo", 2, 1, "", 2, 1, 0),
        ("grpo", 1, 2, "", 2, 1, 0),
        ("grpo", 1, 1, ", kl = 0.1", 1, 0, 1),
        ("rloo", 1, 1, "", 1, 1, 1),  # KL in the reward wants both before the update
    ],
)
def test_no_forward_that_is_not_needed(tmp_path, rule, minibatches, epochs, keys, grad, plain, ref):
    session = small_session(tmp_path, rule, minibatches=minibatches, epochs=epochs, keys=keys)
    try:
        mine = count_passes(session.policy)
        theirs = count_passes(session.learner.reference) if ref else {"plain": 0, "grad": 0}
        groups, _adv, row = run_step(session, 1)
        assert mine == {"grad": grad, "plain": plain} and theirs == {"grad": 0, "plain": ref}
        assert session.learner.version == session.engine.policy_version == row["policy_version"] == minibatches * epochs
        if plain:
            samples = [s for g in groups for s in g.samples]
            for s in samples:  # of the weights before the first update
                assert s.streams["old_logp"] == pytest.approx(s.behavior_logp, abs=1e-5)
        assert row["logp_gap/max_nats"] < 1e-5
        assert (row["kl/old_nats"] > 1e-9) == (minibatches * epochs > 1)
    finally:
        session.close()


def test_a_step_is_reinforce_on_its_samples(tmp_path):
    """run_step with dapo, from its own samples, rewards and advantages, against autograd on the eager model."""
    session = small_session(tmp_path, "dapo", keys=", dynamic_rounds = 0")
    try:
        model, learner = eager_copy(session.learner), session.learner
        grads = []
        learner.held.optimizer.register_step_pre_hook(lambda o, *_: grads.extend(p.grad.clone() for p in o.param_groups[0]["params"]))
        groups, adv, row = run_step(session, 1)
        samples = [s for g in groups for s in g.samples]
        assert {s.reward for s in samples} == {0.0, 1.0}
        for g, a in zip(groups, [adv[k : k + 4] for k in range(0, 16, 4)], strict=True):
            r = torch.tensor([s.reward for s in g.samples], dtype=torch.float64)
            want = (r - r.mean()) / (r.std() + 1e-6)
            assert torch.allclose(torch.stack([x[0] for x in a]), want)
        tokens = sum(len(s.token_ids) for s in samples)
        (sum(-(a.float() * eager_logp(model, session.policy, s, 0.9)).sum() for s, a in zip(samples, adv, strict=True)) / tokens).backward()
        want = {n: p.grad for n, p in model.named_parameters()}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in want.values()))
        assert row["grad/norm"] == pytest.approx(norm, rel=1e-4)
        scale = min(1.0, 1.0 / norm)  # recipe's clip_norm is 1
        assert_near({n: g / scale for (n, _), g in zip(learner.params, grads, strict=True)}, want, 2e-4)
    finally:
        session.close()


def test_disagreement_with_the_engine_is_an_alarm(tmp_path):
    """Other weights in the engine than in the learner, and NaN: the step stops before any update."""
    session = small_session(tmp_path)
    try:
        learner = session.learner
        for temperature, shown in ((0.5, r"disagree by \d\.\d+ nats"), (float("nan"), "disagree by nan")):
            learner.temperature = temperature
            with pytest.raises(RunFailed, match=rf"step 1: learner and engine {shown}.*checks.max_logp_gap"):
                run_step(session, 1)
            assert learner.version == 0
        learner.temperature, session.engine.policy_version = 0.9, 5
        with pytest.raises(RunFailed, match="policy version 5, the learner is at 0: stale rollouts"):
            run_step(session, 1)
    finally:
        session.close()


def test_credit_in_a_step_sees_the_samples_it_should():
    """View of a step: unscored samples are out, cohorts are numbered, lengths are tokens."""
    from llmrl.step import view_of

    learner = make_learner()
    samples = [
        Sample("a", "p", [1], [4, 5], None, 0, reward=1.0),
        Sample("b", "p", [1], [4], None, 0, reward=None, finish="length"),
        Sample("c", "p", [1], [4, 5, 6], None, 0, reward=0.0, streams={"x": [1.0, 2.0, 3.0]}),
        Sample("d", "q", [1], [4], None, 0, reward=1.0, cohort="other"),
    ]
    view: View = view_of(samples, learner, 9)
    assert view.scored_S.tolist() == [True, False, True, True] and view.cohort_S.tolist() == [0, 0, 0, 1] and view.length_S.tolist() == [2, 1, 3, 1]
    assert view.truncated_S.tolist() == [False, True, False, False] and view.max_new_tokens == 9
    assert view.streams["x"].isnan().tolist() == [True] * 3 + [False] * 3 + [True]
    adv, _ = Credit((center(),)).update(view, {"center": {}})
    assert adv.tolist() == [0.5, 0.5, 0.0, -0.5, -0.5, -0.5, 0.0]


def test_tiny_shared_policy_is_fp32():
    assert {p.dtype for p in tiny_policy().model.parameters()} == {torch.float32}

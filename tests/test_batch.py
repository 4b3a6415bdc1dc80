"""Packing, denominators, and the invariances: the gradient does not depend on how samples were cut into micro-batches."""

import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from llmrl import losses
from llmrl.batch import Contexts, Outputs, evaluate_terms, global_denominators, numbers, pack, seg_tokens, token_metrics
from llmrl.learner import Learner
from llmrl.records import Sample
from llmrl.rules.base import Needs, Term
from llmrl.step import minibatches, needs_forward
from tests.builders import make_batch, tiny_policy

torch.set_num_threads(1)
POLICY = Term(losses.pg_clip(), over="token")


def make_samples(prompts=5, group=4, *, seed=0, weights=True, masked=False):
    """Groups that share their contexts; ragged, with every kind of stream and weight. masked: every other one has tokens that do not count."""
    rng = random.Random(seed)
    out = []
    for g in range(prompts):
        context = [1, *(rng.randrange(4, 23) for _ in range(rng.randrange(1, 14)))]
        for i in range(group):
            n = rng.randrange(1, 12)
            s = Sample(f"p{g}/{i}", f"p{g}", context, [rng.choice([2, *range(4, 23)]) for _ in range(n)], [-rng.random() for _ in range(n)], 0)
            s.reward = rng.random()
            if weights:
                s.weights = {"policy": rng.choice([0.0, 0.25, 1.0, 1.0]), "sft": rng.choice([0.0, 0.5])}
            s.streams = {
                "old_logp": [-3.1 + 0.6 * rng.random() for _ in range(n)],
                "ref_logp": [-3.1 + 0.3 * rng.random() for _ in range(n)],
            }
            if masked and i % 2:
                s = replace(s, mask=[k == n // 2 or rng.random() < 0.5 for k in range(n)])
                s.behavior_logp, s.streams = (s.spread(s.counted(s.behavior_logp)), {k: s.spread(s.counted(v)) for k, v in s.streams.items()})
            out.append(s)
    return out


def make_adv(samples, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s.length, generator=g, dtype=torch.float64) for s in samples]


def zeros(samples):
    return [torch.zeros(s.length) for s in samples]


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("tokens", [1, 30, 57, 200, 10**6])
def test_every_sample_is_packed_once_within_the_budget(tokens, whole):
    samples = make_samples()
    batches = pack(samples, zeros(samples), tokens=tokens, whole_groups=whole)
    assert sorted(i for b in batches for i in b.sample_index) == list(range(len(samples)))
    for b in batches:
        chosen = [samples[i] for i in b.sample_index]
        beginnings = {tuple(s.context_ids[:k]) for s in chosen for k in range(1, len(s.context_ids) + 1)}
        assert len(b.ids_P) == len(beginnings) + sum(len(s.token_ids) - 1 for s in chosen)  # what contexts share once, no last token
        unit = {s.prompt_id for s in chosen} if whole else chosen
        assert len(b.ids_P) <= tokens or len(unit) == 1
        assert b.n_samples == len(chosen) and len(b.tokens_T) == sum(len(s.token_ids) for s in chosen)
    if whole:
        for g in range(5):
            assert sum(any(samples[i].prompt_id == f"p{g}" for i in b.sample_index) for b in batches) == 1
    if tokens == 10**6:
        assert len(batches) == 1
    if tokens == 1:
        assert len(batches) == (5 if whole else 20)


def test_whole_groups_go_by_the_numbers_given():
    samples = make_samples(prompts=3, group=2)
    batches = pack(samples, zeros(samples), tokens=1, groups=[0, 1, 0, 1, 0, 1], whole_groups=True)
    assert [sorted(b.sample_index) for b in batches] == [[0, 2, 4], [1, 3, 5]]
    assert [b.group_S.tolist() for b in batches] == [[0, 0, 0], [0, 0, 0]]


def test_samples_keep_their_order_but_for_longer_siblings_first():
    samples = make_samples()
    order = [i for b in pack(samples, zeros(samples), tokens=60) for i in b.sample_index]
    assert order == sorted(range(20), key=lambda i: (i // 4, -len(samples[i].token_ids), i))


def test_packing_is_deterministic():
    a, b = (pack(make_samples(), make_adv(make_samples()), tokens=64) for _ in range(2))
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(v, getattr(y, k)) for k, v in vars(x).items() if isinstance(v, torch.Tensor) and k != "behavior_logp_T")
        assert x.sample_index == y.sample_index


def test_nothing_packed_is_no_batch():
    assert pack([], [], tokens=100) == []


def test_one_batch_by_hand():
    """Two prompts; the second sample of the first has another cohort and lacks the stream; the third sample a behaviour."""
    samples = [
        Sample("a", "p", [1, 5], [7, 8, 2], [-1.0, -2.0, -3.0], 0, reward=1.0, streams={"x": [0.1, 0.2, 0.3]}),
        Sample("b", "p", [1, 5], [9, 2], [-4.0, -5.0], 0, cohort="c", weights={"policy": 0.5, "sft": 2.0}),
        Sample("d", "q", [1, 6, 6], [2], None, 0, reward=0.5),
    ]
    (b,) = pack(samples, [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0]), torch.tensor([6.0])], tokens=100)
    nan = float("nan")
    assert b.ids_P.tolist() == [1, 5, 6, 6, 7, 8, 9]  # the two prompts share their first token
    assert b.positions_P.tolist() == [0, 1, 1, 2, 2, 3, 2]
    assert b.tokens_T.tolist() == [7, 8, 2, 9, 2, 2]
    assert b.source_T.tolist() == [1, 4, 5, 1, 6, 3]  # the context's last token predicts the first of either completion
    assert b.sample_T.tolist() == [0, 0, 0, 1, 1, 2]
    assert b.adv_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert b.index_RL.tolist() == [[0, 1, 4, 5], [0, 1, 6, 6], [0, 2, 3, 3]]
    assert b.pick_P.tolist() == [0, 1, 9, 10, 2, 3, 6]
    assert b.weight["policy"].tolist() == [1, 1, 1, 0.5, 0.5, 1] and b.weight["sft"].tolist() == [0, 0, 0, 2, 2, 0]
    assert b.cohort_S.tolist() == [0, 1, 2] and b.group_S.tolist() == [0, 0, 1]
    assert torch.equal(b.reward_S.nan_to_num(-1), torch.tensor([1.0, -1, 0.5]))
    assert torch.equal(b.behavior_logp_T.nan_to_num(9), torch.tensor([-1.0, -2, -3, -4, -5, 9]))
    assert torch.allclose(b.stream["x"], torch.tensor([0.1, 0.2, 0.3, nan, nan, nan]), equal_nan=True)


def test_masks_come_from_positions_not_from_ids():
    """Padding, begin and end ids inside context and completion are tokens like any other."""
    (b,) = pack([Sample("a", "p", [0, 1, 2, 0], [0, 2, 1, 2], None, 0)], [torch.ones(4)], tokens=100)
    assert b.ids_P.tolist() == [0, 1, 2, 0, 0, 2, 1] and b.tokens_T.tolist() == [0, 2, 1, 2] and b.weight["policy"].tolist() == [1] * 4


def test_contexts_share_every_common_beginning():
    c = Contexts()
    assert c.add([1, 2, 3]) == [0, 1, 2] and c.add([1, 2]) == [0, 1] and c.add([1, 2, 4, 3]) == [0, 1, 3, 4] and c.add([2, 3]) == [5, 6]
    assert c.ids == [1, 2, 3, 4, 3, 2, 3] and c.positions == [0, 1, 2, 2, 3, 0, 1]
    assert c.add((1, 2, 4, 3)) == [0, 1, 3, 4] and len(c.ids) == 7


def test_an_empty_context_is_named():
    with pytest.raises(ValueError, match=r"sample x: an empty context"):
        pack([Sample("x", "p", [], [1], None, 0)], [torch.ones(1)], tokens=9)


def test_what_a_denominator_counts():
    """Two samples of two prompts, of weights 0.5 and 0.25 and lengths 2 and 4, l_t = 1; a third prompt has none that feeds the term."""
    samples = [Sample(f"s{k}", f"p{k}", [1], [5] * n, None, 0, weights={"w": w}) for k, (n, w) in enumerate([(2, 0.5), (4, 0.25), (3, 0.0)])]
    (batch,) = pack(samples, zeros(samples), tokens=99)
    out = Outputs(torch.zeros(9), torch.zeros(9))

    def one(b, o):
        return torch.ones_like(o.logp_T)

    expected = {("sample", "weights"): 1.0, ("sample", "samples"): 0.375, ("sample", "groups"): 0.25, ("fixed", "samples"): 1.0, ("fixed", "groups"): 2 / 3}
    for (over, count), value in expected.items():
        term = Term(one, weight="w", over=over, count=count, budget=1 if over == "fixed" else None)
        loss, _ = evaluate_terms([term], batch, out, global_denominators(samples, [term], max_new_tokens=8, groups=3))
        assert float(loss) == pytest.approx(value), (over, count)
    assert global_denominators(samples, [Term(one, weight="w", over="sample", count="groups")], max_new_tokens=8, groups=3, all_sum=lambda x: 2 * x) == [6.0]
    with pytest.raises(ValueError, match='count="groups" goes with "sample" and "fixed"'):
        Term(one, count="groups")


def test_per_token_values_come_back_by_sample():
    samples = make_samples()
    back = {}
    for b in pack(samples, make_adv(samples), tokens=50):
        back |= dict(zip(b.sample_index, seg_tokens(b.adv_T, b), strict=True))
    assert all(torch.equal(back[i], a.float()) for i, a in enumerate(make_adv(samples)))


def test_minibatches_are_a_partition_of_the_groups():
    groups = [None] * 10
    assert minibatches(groups, 1, ("k",)) == [list(range(10))]
    parts = minibatches(groups, 4, ("k", 1))
    assert sorted(g for part in parts for g in part) == list(range(10)) and sorted(map(len, parts)) == [2, 2, 3, 3]
    assert parts == minibatches(groups, 4, ("k", 1)) != minibatches(groups, 4, ("k", 2))


def test_numbers():
    assert numbers(["b", "a", "b", "c", "a"]) == [0, 1, 0, 2, 1]


# ---------------------------------------------------------------- denominators and reductions

WEIGHTS, LENGTHS = [0.5, 1.0, 0.0], [2, 3, 4]


@pytest.mark.parametrize(("over", "budget", "expected"), [("token", None, 4.0), ("sample", None, 1.5), ("fixed", None, 12.0), ("fixed", 10, 15.0)])
def test_denominators_by_hand(over, budget, expected):
    """Weights 0.5, 1, 0 on 2, 3, 4 tokens: 0.5 * 2 + 3 tokens, 1.5 samples, 1.5 times the budget (8: the recipe's)."""
    samples = [Sample(str(i), "p", [1], [4] * n, None, 0, weights={"policy": w}) for i, (w, n) in enumerate(zip(WEIGHTS, LENGTHS, strict=True))]
    term = Term(losses.ce(), over=over, budget=budget)
    assert global_denominators(samples, [term], max_new_tokens=8) == [expected]
    assert global_denominators(samples, [term], max_new_tokens=8, all_sum=lambda x: x * 3) == [3 * expected]
    assert global_denominators(samples, [Term(losses.ce(), weight="other", over=over)], max_new_tokens=8) == [1.0]  # nothing feeds it
    assert global_denominators([], [term], max_new_tokens=8) == [1.0]


@pytest.mark.parametrize(
    ("over", "expected"),
    [("token", (0.5 * 3 + 12) / 4), ("sample", (0.5 * 3 / 2 + 12 / 3) / 1.5), ("fixed", (0.5 * 3 + 12) / 12)],
)
def test_fractional_weights_by_hand(over, expected):
    """-logp is 1, 2 | 3, 4, 5 | NaN ...: sums 3 and 12; the third sample has weight 0."""
    nan = float("nan")
    batch, out = make_batch([[-1, -2], [-3, -4, -5], [nan, nan, -torch.inf, nan]], [1, 1, 1], weight=WEIGHTS)
    samples = [Sample(str(i), "p", [1], [4] * n, None, 0, weights={"policy": w}) for i, (w, n) in enumerate(zip(WEIGHTS, LENGTHS, strict=True))]
    terms = [Term(losses.ce(), over=over, coef=2.0, name="x")]
    loss, shares = evaluate_terms(terms, batch, out, global_denominators(samples, terms, max_new_tokens=8))
    assert float(loss.detach()) == pytest.approx(2 * expected) and shares == {"x": pytest.approx(expected)}
    g = torch.autograd.grad(loss, out.logp_T)[0]
    unit = {"token": [0.5 / 4, 1 / 4], "sample": [0.5 / 2 / 1.5, 1 / 3 / 1.5], "fixed": [0.5 / 12, 1 / 12]}[over]
    assert g.tolist() == pytest.approx([-2 * unit[0]] * 2 + [-2 * unit[1]] * 3 + [0.0] * 4)


@pytest.mark.parametrize(
    "fn",
    [
        losses.pg_clip(),
        losses.pg_clip(dual=3.0),
        losses.reinforce(),
        losses.cispo(),
        losses.gspo(),
        losses.kl_k2(),
        losses.kl_k3(),
        losses.entropy_bonus(),
        losses.mismatch(losses.pg_clip(), "truncate"),
        losses.mismatch(losses.gspo(), "mask", over="sample"),
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("over", ["token", "sample", "fixed"])
def test_nan_at_weight_zero_spreads_nowhere(fn, over):
    nan, bad = float("nan"), [float("nan"), -torch.inf, torch.inf]
    rows = [[-1.0, -2.0, -0.5], bad]
    batch, out = make_batch(rows, [1.0, nan], old=rows, ref=rows, behavior=rows, entropy=[[1.0, 1.0, 1.0], bad], weight=[1.0, 0.0])
    loss, _ = evaluate_terms([Term(fn, over=over, budget=8 if over == "fixed" else None)], batch, out, [3.0])
    assert loss.isfinite()
    loss.backward()
    for x in (out.logp_T, out.entropy_T):
        assert x is not None and (x.grad is None or (x.grad.isfinite().all() and x.grad[3:].tolist() == [0.0] * 3))


def test_a_loss_of_the_wrong_shape_is_named():
    batch, out = make_batch([[-1.0, -2.0]], [1.0])
    with pytest.raises(ValueError, match=r"loss bad: returned shape \(\); it must be one entry a token, \(2,\)"):
        evaluate_terms([Term(lambda b, o: o.logp_T.sum(), name="bad")], batch, out, [1.0])


def test_token_metrics_by_hand():
    """Ratios e^0.3 (clipped for A > 0), e^-0.3 (clipped for A < 0) and 1; the fourth token has weight 0."""
    batch, out = make_batch(
        [[-1.0, -2.0, -3.0], [-9.0]],
        [[1.0, -1.0, 1.0], 1.0],
        old=[[-1.3, -1.7, -3.0], [0.0]],
        ref=[[-1.1, -2.0, -3.0], [0.0]],
        behavior=[[-1.0, -2.5, None], [5.0]],
        entropy=[[0.5, 1.0, 1.5], [100.0]],
        weight=[1.0, 0.0],
    )
    m = token_metrics(batch, out, [POLICY])
    k3 = (torch.tensor(-0.3).exp() + 0.3 - 1) + (torch.tensor(0.3).exp() - 0.3 - 1)
    assert m == pytest.approx(
        {"n": 3, "n_gap": 2, "gap": 0.5, "gap_max": 0.5, "over_max": 0.5, "kl_old": float(k3), "entropy": 3.0, "kl_ref": 0.0048374, "clipped": 2}, abs=1e-6
    )


def test_a_nan_log_prob_is_seen_by_the_metrics():
    batch, out = make_batch([[float("nan"), -2.0]], [1.0], old=[[-1.0, -2.0]], behavior=[[-1.0, -2.0]])
    assert token_metrics(batch, out, [POLICY])["gap_max"] != token_metrics(batch, out, [POLICY])["gap_max"]  # NaN, not 0


# ---------------------------------------------------------------- tokens that do not count


def test_a_mask_by_hand():
    """An episode a b <eos> | o o | c <eos>: the environment's two tokens are inputs, and in no other tensor."""
    nan = float("nan")
    s = Sample("e", "p", [1, 5], [7, 8, 2, 9, 9, 6, 2], [-1.0, -2.0, -3.0, nan, nan, -4.0, -5.0], 0, mask=[True] * 3 + [False] * 2 + [True] * 2)
    s.streams = {"turn": [0.0] * 5 + [1.0] * 2}
    assert s.length == 5 and s.counted(s.token_ids) == [7, 8, 2, 6, 2] and s.spread([1, 2, 3, 4, 5], None) == [1, 2, 3, None, None, 4, 5]
    (b,) = pack([s], [torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])], tokens=100)
    assert b.ids_P.tolist() == [1, 5, 7, 8, 2, 9, 9, 6] and b.positions_P.tolist() == list(range(8))
    assert b.tokens_T.tolist() == [7, 8, 2, 6, 2] and b.source_T.tolist() == [1, 2, 3, 6, 7]
    assert b.adv_T.tolist() == [1, 2, 3, 4, 5] and b.behavior_logp_T.tolist() == [-1, -2, -3, -4, -5]
    assert b.weight["policy"].tolist() == [1] * 5 and b.stream["turn"].tolist() == [0, 0, 0, 1, 1] and b.sample_T.tolist() == [0] * 5
    assert [x.tolist() for x in seg_tokens(b.adv_T, b)] == [[1, 2, 3, 4, 5]]


@pytest.mark.parametrize(("mask", "says"), [([False] * 2, "a mask of 2 of which 0 count"), ([True], "2 tokens, a mask of 1")])
def test_a_mask_that_cannot_be(mask, says):
    with pytest.raises(ValueError, match=says):
        Sample("x", "p", [1], [5, 6], None, 0, mask=mask)


def test_denominators_count_what_counts():
    """Two samples of 4 tokens, one with a mask that leaves 1: 5 tokens, 2 samples."""
    samples = [Sample("a", "p", [1], [5] * 4, None, 0), Sample("b", "p", [1], [5] * 4, None, 0, mask=[False, True, False, False])]
    terms = [Term(losses.ce(), weight="policy", over=over) for over in ("token", "sample", "fixed")]
    assert global_denominators(samples, terms, max_new_tokens=8) == [5.0, 2.0, 16.0]
    (batch,) = pack(samples, zeros(samples), tokens=99)
    out = Outputs(torch.tensor([-1.0, -1.0, -1.0, -1.0, -3.0]), torch.zeros(5))
    values = [float(evaluate_terms([t], batch, out, [d])[0]) for t, d in zip(terms, [5.0, 2.0, 16.0], strict=True)]
    assert values == pytest.approx([7 / 5, (1 + 3) / 2, 7 / 16])


# ---------------------------------------------------------------- invariances of the gradient


@pytest.fixture(scope="module")
def learner():
    """fp64, but for the layer norms, which transformers computes in fp32."""
    policy = tiny_policy()
    policy.model.double()
    return Learner(policy, Accelerator(cpu=True), head_chunk=16, temperature=0.8)


TERMS = [
    Term(losses.pg_clip(0.2, 0.28), over="token"),
    Term(losses.gspo(), over="sample", coef=0.5),
    Term(losses.kl_k3(), over="sample", coef=0.3),
    Term(losses.entropy_bonus(), over="fixed", coef=0.1),
    Term(losses.ce(), weight="sft", over="token", coef=0.7),
    Term(losses.mismatch(losses.cispo(), "truncate"), over="fixed", budget=7),
]


def gradient(learner, batches, denominators, terms=TERMS):
    for p in learner.policy.model.parameters():
        p.grad = None
    total = 0.0
    for b in batches:
        loss, _ = evaluate_terms(terms, b, learner.forward(b, Needs(entropy=True)), denominators)
        learner.backward(loss)
        total += float(loss.detach())
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in learner.params}, total


def assert_same(a, b, tolerance=1e-6):
    (ga, la), (gb, lb) = a, b
    assert la == pytest.approx(lb, abs=tolerance)
    for name in ga:
        scale = float(ga[name].abs().max())
        assert scale > 1e-6, name  # every parameter takes part
        assert float((ga[name] - gb[name]).abs().max()) < tolerance * scale, name


def reference(learner):
    samples = make_samples(masked=True)
    assert sum(s.length for s in samples) < sum(len(s.token_ids) for s in samples) - 20
    adv = make_adv(samples)
    denominators = global_denominators(samples, TERMS, max_new_tokens=12)
    return samples, adv, denominators, gradient(learner, pack(samples, adv, tokens=10**6), denominators)


@pytest.mark.parametrize("tokens", [1, 23, 40, 90])
def test_gradient_does_not_depend_on_the_budget(learner, tokens):
    samples, adv, denominators, whole = reference(learner)
    batches = pack(samples, adv, tokens=tokens)
    assert len(batches) > 1
    assert_same(whole, gradient(learner, batches, denominators))


def test_gradient_of_seven_uneven_micro_batches(learner):
    samples, adv, denominators, whole = reference(learner)
    cuts = [0, 1, 2, 5, 6, 12, 19, 20]
    parts = [pack(samples[a:b], adv[a:b], tokens=10**6) for a, b in itertools.pairwise(cuts)]
    batches = [b for part in parts for b in part]
    assert len(batches) == 7
    assert_same(whole, gradient(learner, batches, denominators))
    assert_same(whole, gradient(learner, batches[::-1], denominators))


@pytest.mark.parametrize("tokens", [33, 10**6])
def test_gradient_does_not_depend_on_the_order_of_samples(learner, tokens):
    samples, adv, denominators, whole = reference(learner)
    order = random.Random(3).sample(range(20), 20)
    shuffled = pack([samples[i] for i in order], [adv[i] for i in order], tokens=tokens, groups=list(range(20)))  # siblings apart
    assert_same(whole, gradient(learner, shuffled, denominators))


def test_gradient_does_not_depend_on_sharing_contexts(learner):
    """Samples laid out with a context each: one by one, against sharing it in a group."""
    samples, adv, denominators, whole = reference(learner)
    alone = [b for s, a in zip(samples, adv, strict=True) for b in pack([s], [a], tokens=10**6)]
    shared = pack(samples, adv, tokens=10**6)
    assert sum(len(b.ids_P) for b in alone) > sum(len(b.ids_P) for b in shared) + 60
    assert_same(whole, gradient(learner, alone, denominators))


def test_two_ranks_add_up(learner):
    """Denominators over all samples: the two halves' gradients add up to the whole one."""
    samples, adv, denominators, whole = reference(learner)
    halves = [gradient(learner, pack(samples[k::2], adv[k::2], tokens=50), denominators) for k in (0, 1)]
    assert_same(whole, ({n: halves[0][0][n] + halves[1][0][n] for n in whole[0]}, halves[0][1] + halves[1][1]))


@pytest.mark.parametrize("kl", [False, True])
def test_samples_that_need_no_forward_change_nothing(learner, kl):
    """Advantage 0 under losses that scale with it, weight 0: skipped, yet counted in the denominators."""
    samples, adv = make_samples(), make_adv(make_samples())
    for i in range(0, 20, 3):
        adv[i] = torch.zeros_like(adv[i])
    terms = [Term(losses.pg_clip()), Term(losses.gspo(), over="sample")] + ([Term(losses.kl_k3(), coef=0.1)] if kl else [])
    rule = SimpleNamespace(loss=terms)
    live = [i for i in range(20) if needs_forward(rule, samples[i], adv[i])]
    weightless = [i for i in range(20) if samples[i].weights["policy"] == 0]
    assert live == [i for i in range(20) if i not in weightless and (kl or i % 3)] and len(live) < 20
    denominators = global_denominators(samples, terms, max_new_tokens=12)
    whole = gradient(learner, pack(samples, adv, tokens=10**6), denominators, terms)
    skipped = gradient(learner, pack([samples[i] for i in live], [adv[i] for i in live], tokens=60), denominators, terms)
    assert_same(whole, skipped)


def test_zero_advantage_gives_zero_gradient(learner):
    samples = make_samples(weights=False)
    for s in samples:
        s.streams = {}
    grads, loss = gradient(learner, pack(samples, zeros(samples), tokens=50), [1.0], [Term(losses.pg_clip())])
    assert loss == 0.0 and all(float(g.abs().max()) == 0.0 for g in grads.values())


def test_old_log_prob_of_some_samples_only(learner):
    """Samples without the stream old_logp are on-policy: their ratio is 1 and their gradient that of REINFORCE."""
    samples = make_samples(prompts=2, weights=False)
    for s in samples[::2]:
        del s.streams["old_logp"]
    (b,) = pack(samples, make_adv(samples), tokens=10**6)
    out: Outputs = learner.forward(b, Needs())
    on = torch.tensor(["old_logp" not in samples[i].streams for i in b.sample_index])[b.sample_T]
    assert torch.equal(out.old_logp_T[on], out.logp_T.detach()[on])
    assert torch.equal(out.old_logp_T[~on].float(), b.stream["old_logp"][~on])


def test_an_episode_is_its_turns(learner):
    """One masked sample has the log-probs and, over tokens, the gradient of its turns as samples of their own."""
    ids, mask = [7, 8, 2, 9, 9, 10, 6, 2, 11, 5], [True] * 3 + [False] * 3 + [True] * 2 + [False, True]
    episode = Sample("e", "p", [1, 5, 4], ids, None, 0, mask=mask)
    turns = [Sample(f"t{a}", "p", [1, 5, 4, *ids[:a]], ids[a:b], None, 0) for a, b in ((0, 3), (6, 8), (9, 10))]
    whole, parts = pack([episode], [torch.arange(6.0)], tokens=99), pack(turns, [torch.arange(6.0)[a:b] for a, b in ((0, 3), (3, 5), (5, 6))], tokens=99)
    logp = {i: x for s, b in ((turns, parts[0]),) for i, x in zip(b.sample_index, seg_tokens(learner.forward(b, Needs()).logp_T, b), strict=True)}
    assert torch.allclose(learner.forward(whole[0], Needs()).logp_T, torch.cat([logp[0], logp[1], logp[2]]), atol=1e-6)
    assert_same(gradient(learner, whole, [6.0], [POLICY]), gradient(learner, parts, [6.0], [POLICY]))


def test_streams_of_the_learner_lie_at_the_tokens_that_count(learner):
    samples = make_samples(prompts=1, masked=True)
    for s in samples:
        s.streams = {}
    learner.add_stream("old_logp", samples, tokens=30)
    for s in samples:
        assert [math.isnan(x) for x in s.streams["old_logp"]] == [not on for on in s.mask or [True] * len(s.token_ids)]

"""Transport of a language model's responses: the identities of VGF's specification (section 9) on a tiny policy and a tiny reward model."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close
from transformers import GPTNeoXConfig, GPTNeoXForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from llmrl import lm_transport as lm
from llmrl import transport as core
from llmrl.chat import char_tokenizer
from llmrl.frozen_reward import RewardModel, padded
from llmrl.hf_engine import HFEngine
from llmrl.records import InputError, Request, Sampling
from tests.builders import tiny_policy

torch.set_num_threads(1)
FORMS = ["independent", "svgd", "pooled"]


def tiny_reward(tokenizer, *, seed=0, hidden=16, dtype=torch.float32, **keys):
    """A random reward model, its embeddings close together, so that little moves them to other tokens."""
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=hidden, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
        pad_token_id=tokenizer.pad_token_id, **keys,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 2:
                    p.copy_(0.4 * torch.randn(p.shape))
    return RewardModel(model.to(dtype), tokenizer)


@pytest.fixture(scope="module")
def made():
    """(policy, reward model, sampled items of two prompts)."""
    policy = tiny_policy(hidden=32, ffn=64)
    contexts = [policy.chat.prompt_ids([{"role": "user", "content": q}]) for q in ("1+1=", "12+13=")]
    requests = [Request(tuple(c), (0, k, i), Sampling(10)) for k, c in enumerate(contexts) for i in range(5)]
    items = [(list(r.context_ids), d.token_ids) for r, d in zip(requests, HFEngine(policy).generate(requests), strict=True)]
    return policy, tiny_reward(policy.chat.tokenizer), items


# ---------------------------------------------------------------- the reward model


def test_reward_is_the_models_own(made):
    _, reward, items = made
    mine = reward.score(items)
    for (c, t), r in zip(items, mine, strict=True):
        assert_close(float(reward.model(input_ids=torch.tensor([[*c, *t]])).logits), r, rtol=1e-5, atol=1e-5)
    few = RewardModel(reward.model, reward.tokenizer, tokens=20)  # other batches, other padding
    assert_close(few.score(items), mine, rtol=1e-5, atol=1e-5)


def test_a_response_that_ends_in_padding_is_read_where_transformers_reads_it(made):
    _, reward, items = made
    pad = reward.model.config.pad_token_id
    longer = [(c, [*t, pad]) for c, t in items]
    assert_close(reward.score(longer), reward.score(items), rtol=1e-5, atol=1e-5)


def test_rho_is_the_median_distance_to_the_nearest_row(made):
    _, reward, _ = made
    distances = torch.cdist(reward.table, reward.table, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf).amin(1)
    assert_close(reward.rho(), float(distances.median()), rtol=1e-5, atol=0)
    part = tiny_reward(reward.tokenizer)
    assert abs(part.rho(1, rows=12) / part.rho() - 1) < 0.5


def test_another_tokenizer_is_refused(made):
    policy, reward, items = made
    other = tiny_reward(char_tokenizer("abc"))
    with pytest.raises(InputError, match="tokenizer"):
        lm.transport(policy, other, items, steps=1, eps=1.0)
    with pytest.raises(InputError, match="labels"):
        RewardModel(LlamaForSequenceClassification(replace_labels(reward.model.config, 2)), reward.tokenizer)
    with pytest.raises(InputError, match="no folder"):
        RewardModel.load("/nowhere/at/all")


def replace_labels(config, n):
    new = LlamaConfig(**{k: v for k, v in config.to_dict().items() if k not in ("num_labels", "id2label", "label2id")})
    new.num_labels = n
    return new


def test_a_saved_model_comes_back(made, tmp_path):
    _, reward, items = made
    reward.model.save_pretrained(tmp_path)
    reward.tokenizer.save_pretrained(tmp_path)
    assert_close(RewardModel.load(tmp_path).score(items), reward.score(items), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- 1. zero budget


@pytest.mark.parametrize("velocity", FORMS)
@pytest.mark.parametrize(("steps", "eps", "candidates"), [(0, 0.5, 0), (4, 0.0, 0), (0, 0.5, 3)])
def test_zero_budget_is_the_sampled_text(made, velocity, steps, eps, candidates):
    policy, reward, items = made
    moved = lm.transport(policy, reward, items, steps=steps, eps=eps, velocity=velocity, candidates=candidates)
    assert [m.token_ids for m in moved] == [t for _, t in items]
    assert all(m.reward_before == m.reward_after == m.reward_flowed and m.kept and m.changed_share == m.ref_drop == m.displacement == 0 for m in moved)
    scores = reward.score(items)
    assert lm.best(moved[:5]) == max(range(5), key=lambda i: scores[i])  # best-of-N on the same samples


def test_steps_too_small_to_leave_a_tokens_cell_change_nothing(made):
    policy, reward, items = made
    moved = lm.transport(policy, reward, items, steps=3, eps=0.1)  # three tenths of the way to the nearest neighbour: less than half
    assert [m.token_ids for m in moved] == [t for _, t in items]
    assert all(m.reward_before == m.reward_after and 0 <= m.displacement <= 0.3 + 1e-6 for m in moved)
    assert sum(m.reward_flowed for m in moved) > sum(m.reward_before for m in moved)


# ---------------------------------------------------------------- 10. selection, 14. ascent


def test_the_best_of_more_texts_is_never_worse(made):
    policy, reward, items = made
    moved = [m for own in lm.sweep(policy, reward, items[:5], [lm.Readout(s, None) for s in (0, 3, 6, 9)], eps=1.0) for m in own]
    tops = [moved[lm.best(moved[:n])].reward_after for n in range(1, len(moved) + 1)]
    assert tops == [max(m.reward_after for m in moved[:n]) for n in range(1, len(moved) + 1)] and len(set(tops)) > 1
    again = [*moved[:5], *moved[:5]]  # of equal ones the first
    assert lm.best(again) == lm.best(moved[:5]) < 5


def test_small_steps_raise_the_reward_of_the_embeddings_every_time(made):
    policy, reward, items = made
    own = lm.sweep(policy, reward, items, [lm.Readout(s) for s in range(7)], eps=0.02)
    means = [sum(m.reward_flowed for m in moved) / len(moved) for moved in own]
    assert all(b > a + 1e-4 for a, b in pairwise(means))


# ---------------------------------------------------------------- what a large budget does


@pytest.mark.parametrize("velocity", FORMS)
@pytest.mark.parametrize("optimizer", ["plain", "adam"])
def test_a_large_budget_changes_tokens_and_says_so(made, velocity, optimizer):
    policy, reward, items = made
    moved = lm.transport(policy, reward, items, steps=8, eps=1.0, velocity=velocity, optimizer=optimizer, guard=None)
    row = lm.diagnostics(items, moved, second=tiny_reward(reward.tokenizer, seed=5), space=reward)
    assert row["changed_share"] > 0.02 and row["moved_share"] > 0.1 and row["mmd"] > 0
    assert row["reward_flowed"] > row["reward_before"] and {"second_before", "second_after"} <= row.keys()
    special = set(reward.tokenizer.all_special_ids)
    scores = reward.score([(c, m.token_ids) for (c, _), m in zip(items, moved, strict=True)])
    logp = HFEngine(policy).score([pair for (c, t), m in zip(items, moved, strict=True) for pair in ((c, t), (c, m.token_ids))])
    for (_, t), m, r, was, now in zip(items, moved, scores, logp[::2], logp[1::2], strict=True):
        assert len(m.token_ids) == len(t) and m.changed_share == sum(x != y for x, y in zip(t, m.token_ids, strict=True)) / len(t)
        assert [(x, y) for x, y in zip(t, m.token_ids, strict=True) if x != y and special & {x, y}] == []
        assert max(m.token_ids) < len(reward.tokenizer)  # rows beyond the vocabulary are no tokens
        assert_close(r, m.reward_after, rtol=1e-5, atol=1e-5)
        assert_close((sum(was) - sum(now)) / len(t), m.ref_drop, rtol=1e-4, atol=1e-5)


def test_the_guard_puts_back_what_the_reference_finds_too_unlikely(made):
    policy, reward, items = made
    free = lm.transport(policy, reward, items, steps=8, eps=1.0, guard=None)
    drops = sorted(m.ref_drop for m in free if m.changed_share)
    guard = (drops[0] + drops[-1]) / 2  # between them
    held = lm.transport(policy, reward, items, steps=8, eps=1.0, guard=guard)
    back = [i for i, m in enumerate(free) if m.changed_share and m.ref_drop > guard]
    assert 0 < len(back) < len(drops)
    for i, (m, was) in enumerate(zip(held, free, strict=True)):
        if i in back:
            assert m == replace(was, token_ids=list(items[i][1]), reward_after=was.reward_before, changed_share=0.0, kept=False)
        else:
            assert_close(m.reward_after, was.reward_after, rtol=1e-5, atol=1e-5)
            assert m.token_ids == was.token_ids and m.kept
    assert lm.diagnostics(items, held)["guarded_share"] == len(back) / len(drops)


def test_candidates_are_the_policys_likeliest_given_the_decoded_prefix(made):
    policy, reward, items = made
    k = 4
    moved = lm.transport(policy, reward, items, steps=8, eps=2.0, candidates=k, guard=None)
    whole = lm.transport(policy, reward, items, steps=8, eps=2.0, guard=None)
    assert 0 < sum(m.changed_share for m in moved) < sum(m.changed_share for m in whole)
    for (c, t), m in zip(items, moved, strict=True):  # one by one, each behind what was decoded before it
        for place, (x, y) in enumerate(zip(t, m.token_ids, strict=True)):
            if x != y:
                (tops,) = lm._top(policy, [(c, [*m.token_ids[:place], x])], k)
                assert y in tops[-1].tolist()


def test_candidates_equal_decoding_one_by_one(made):
    policy, reward, items = made
    c, t = max(items, key=lambda item: len(item[1]))
    table, free = reward.table.detach(), reward.free(fixed=[*policy.stop_ids, *policy.banned_ids])
    u = table[torch.tensor(t)] + 1.5 * torch.randn(len(t), table.shape[1], generator=torch.Generator().manual_seed(3))
    moves = free[torch.tensor(t)]
    (mine,), (passes,) = lm.restricted_rows(policy, [(c, t)], u[None], moves[None], table, free, 6)
    prefix = []
    for place, x in enumerate(t):
        (tops,) = lm._top(policy, [(c, [*prefix, x])], 6)
        among = [x, *(v for v in tops[-1].tolist() if free[v])]
        prefix.append(min(among, key=lambda v: float((u[place] - table[v]).square().sum())) if moves[place] else x)
    assert mine == prefix and mine != t and 2 <= passes <= len(t) + 1


@pytest.mark.parametrize("optimizer", ["plain", "adam"])
def test_a_sweep_is_so_many_transports_bit_for_bit(made, optimizer):
    policy, reward, items = made
    readouts = [lm.Readout(s, guard, k) for s in (0, 2, 5) for guard, k in ((None, 0), (0.01, 0), (0.5, 6))]
    how = {"eps": 1.5, "velocity": "pooled", "optimizer": optimizer}
    found = lm.sweep(policy, reward, items, readouts, **how)
    assert found == [lm.transport(policy, reward, items, steps=r.steps, guard=r.guard, candidates=r.candidates, **how) for r in readouts]
    assert len({tuple(tuple(m.token_ids) for m in own) for own in found}) > 4
    assert lm.sweep(policy, reward, items, readouts, eps=0.0) == [lm.transport(policy, reward, items, steps=0, eps=1.0)] * len(readouts)


def test_results_do_not_depend_on_what_else_is_moved(made, monkeypatch):
    policy, reward, items = made
    how = {"steps": 8, "eps": 1.0, "velocity": "pooled"}
    whole = lm.transport(policy, reward, items, **how)
    monkeypatch.setattr(lm, "CHUNK", 1)
    apart = lm.transport(policy, reward, items, **how)
    order = [7, 2, 9, 0, 4, 1, 8, 3, 6, 5]
    mixed = lm.transport(policy, reward, [items[i] for i in order], **how)
    for one, other in ((whole, apart), ([whole[i] for i in order], mixed)):
        assert [m.token_ids for m in one] == [m.token_ids for m in other]
        assert_close([m.reward_after for m in one], [m.reward_after for m in other], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- 8. invariances, 11. isolation, 12. gradient


def lifted(reward, items):
    ids, lengths = padded([t for _, t in items])
    u = reward.table.detach()[ids]
    present = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    contexts = [c for c, _ in items]
    return u * present[..., None], present & reward.free()[ids], lambda at: reward.slopes(contexts, ids, lengths, at)


@pytest.mark.parametrize("velocity", FORMS)
@pytest.mark.parametrize("rho", [None, 0.5])
def test_invariances(made, velocity, rho):
    _, _, items = made
    reward = tiny_reward(made[1].tokenizer, dtype=torch.float64)
    u, moves, slopes = lifted(reward, items)
    groups, how = [range(5), range(5, 10)], {"steps": 3, "eps": 0.2, "rho": rho, "velocity": velocity}
    plain, _ = lm.flow_embeddings(slopes, u, moves, groups, alpha=0.7, **how)

    def times(c, b=0.0):
        return lambda at: tuple(x * c + (b if n == 0 else 0.0) for n, x in enumerate(slopes(at)))

    assert_close(lm.flow_embeddings(times(1.0, 9.0), u, moves, groups, alpha=0.7, **how)[0], plain, rtol=0, atol=0)
    assert_close(lm.flow_embeddings(times(4.0), u, moves, groups, alpha=2.8, **how)[0], plain, rtol=1e-9, atol=1e-9)
    assert torch.equal(plain[~moves], u[~moves]) and not torch.equal(plain[moves], u[moves])
    order = [4, 2, 0, 1, 3, 9, 8, 7, 6, 5]
    at = torch.tensor([order.index(i) for i in range(10)])
    swapped, _ = lm.flow_embeddings(lambda x: tuple(y[order] for y in slopes(x[at])), u[order], moves[order], groups, alpha=0.7, **how)
    assert_close(swapped, plain[order], rtol=1e-9, atol=1e-9)
    if velocity == "independent":
        assert torch.equal(lm.flow_embeddings(times(0.0), u, moves, groups, **how)[0], u)


def test_gradients_reach_the_responses_embeddings_alone(made):
    policy, _, items = made
    reward = tiny_reward(policy.chat.tokenizer)
    before = {n: p.clone() for n, p in reward.model.named_parameters()}
    lm.transport(policy, reward, items, steps=3, eps=2.0)
    for n, p in reward.model.named_parameters():
        assert p.grad is None and not p.requires_grad and torch.equal(p, before[n])
    assert all(p.grad is None for p in policy.model.parameters())
    reward.model.requires_grad_(True)  # even where someone else trains it
    u, _, slopes = lifted(reward, items)
    r, g = slopes(u)
    assert not r.requires_grad and not g.requires_grad and all(p.grad is None for p in reward.model.parameters())
    ids, lengths = padded([t for _, t in items])
    assert float(g[torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None]].abs().max()) == 0.0  # padding is nothing to the reward


def test_the_gradient_is_that_of_finite_differences(made):
    tokenizer = made[1].tokenizer
    config = GPTNeoXConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPTNeoXForSequenceClassification(config).double()  # Pythia's kind; a Llama's norms run in fp32 whatever its weights are
    for p in model.parameters():
        p.data.mul_(8.0 if p.dim() == 2 else 1.0)
    reward = RewardModel(model, tokenizer)
    u, _, slopes = lifted(reward, made[2])
    _, g = slopes(u)
    delta = torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * (u != 0)
    up, down = slopes(u + 1e-5 * delta)[0], slopes(u - 1e-5 * delta)[0]
    assert_close((up - down) / 2e-5, (g * delta).sum((1, 2)), rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------- 13. the dead zone in closed form


def test_the_dead_zone():
    """R = sum_t <w, u_t>: v flips to v' iff b <w, E_v' - E_v> > |E_v' - E_v|^2 / 2, v' minimising over all rows."""
    g = torch.Generator().manual_seed(0)
    table, w = torch.randn(40, 6, generator=g, dtype=torch.float64), torch.randn(6, generator=g, dtype=torch.float64)
    own = torch.arange(40)
    start, moves = table[own][None], torch.ones(1, 40, dtype=torch.bool)

    def slopes(u):
        return (u @ w).sum(1), w.expand_as(u)

    gain = (table[None] - table[:, None]) @ w
    half = 0.5 * core.squared_distances(table[None])[0]
    width = torch.where(gain > 0, half / gain, torch.inf).amin(1)  # the budget at which each token flips first
    for steps, eps, alpha, rho in [(4, 0.2, 1.0, None), (3, 0.3, 0.5, None), (10, 0.3, 2.0, None), (5, 1.0, 1.0, 0.7)]:
        b = steps * eps / alpha if rho is None else steps * eps * rho / float(w.norm())
        u, _ = lm.flow_embeddings(slopes, start, moves, [[0]], steps=steps, eps=eps, rho=rho, alpha=alpha)
        new = lm.nearest_rows(u[0], table, torch.ones(40, dtype=torch.bool), own)
        assert torch.equal(new != own, width < b)
        assert torch.equal(new, (b * gain - half).argmax(1))
        assert 0 < int((new != own).sum()) < 40
    only = torch.zeros(40, dtype=torch.bool)
    only[:3] = True
    assert set(lm.nearest_rows(u[0], table, only, own).tolist()) - set(range(3)) <= set(own.tolist())


# ---------------------------------------------------------------- cost


def test_equal_compute_by_hand():
    # 8 responses, 2 steps: 8 * (10 + 8 * 1 + 2 * 2) / (10 + 1)
    assert_close(lm.equal_compute(8, 2, generate=10.0, score=1.0, reference=2.0), 8 * 22 / 11, rtol=1e-12, atol=0)
    assert lm.equal_compute(8, 0, generate=10.0, score=1.0, reference=2.0) == 8.0
    # without the guard; with it and 5 forwards of decoding among candidates
    assert_close(lm.equal_compute(8, 2, generate=10.0, score=1.0, reference=2.0, passes=0), 8 * 18 / 11, rtol=1e-12, atol=0)
    assert_close(lm.equal_compute(8, 2, generate=10.0, score=1.0, reference=2.0, passes=7), 8 * 32 / 11, rtol=1e-12, atol=0)


def test_the_reward_is_asked_as_often_as_equal_compute_says(made, monkeypatch):
    policy, reward, items = made
    seen = {"forward": 0, "slopes": 0}
    forward, slopes = RewardModel._forward, RewardModel.slopes
    monkeypatch.setattr(RewardModel, "_forward", lambda self, c, *rest: (seen.__setitem__("forward", seen["forward"] + len(c)), forward(self, c, *rest))[1])
    monkeypatch.setattr(RewardModel, "slopes", lambda self, c, *rest: (seen.__setitem__("slopes", seen["slopes"] + len(c)), slopes(self, c, *rest))[1])
    moved = lm.transport(policy, reward, items, steps=3, eps=3.0, guard=None)
    changed = sum(bool(m.changed_share) for m in moved)
    assert seen == {"forward": (3 + 1) * len(items) + changed, "slopes": 3 * len(items)} and changed


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"eps": -0.1}, {"alpha": 0.0}, {"candidates": -1}])
def test_refusals(made, wrong):
    policy, reward, items = made
    with pytest.raises(ValueError, match="must not be negative"):
        lm.transport(policy, reward, items, **{"steps": 1, "eps": 1.0, **wrong})
    with pytest.raises(ValueError, match="candidates"):
        lm.transport(HFEngine(policy).score, reward, items, steps=1, eps=1.0, candidates=4)
    assert lm.transport(policy, reward, [], steps=1, eps=1.0) == []
    assert math.isfinite(reward.rho())

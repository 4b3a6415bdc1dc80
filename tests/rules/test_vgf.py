"""The VGF rule (our extension): budget 0 is best-of-N, rejection fine-tuning or grpo bit for bit; what is moved, judged, kept and trained."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.testing import assert_close

from llmrl import lm_transport as lm
from llmrl import losses
from llmrl.batch import Outputs, evaluate_terms, global_denominators, pack
from llmrl.credit import Credit
from llmrl.hf_engine import HFEngine
from llmrl.learner import Learner
from llmrl.memory import Memory
from llmrl.plugins import use
from llmrl.recipe import Optim
from llmrl.records import InputError, Prompt, Sample, Sampling, Verdict
from llmrl.rollout import RolloutIO, sample_groups
from llmrl.rules import grpo as family
from llmrl.rules import vgf as file
from llmrl.rules.base import Rule, Term
from llmrl.step import needs_forward, view_of
from tests.builders import tiny_policy
from tests.test_lm_transport import tiny_reward

torch.set_num_threads(1)
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": f"{i}+1="},), str(i + 1)) for i in range(3)]
BUDGET = {"steps": 8, "eps": 1.0, "guard": None}


class Digits:
    """The share of digits in the text; a text that begins with ";" cannot be judged."""

    def score(self, items):
        self.asked = [*getattr(self, "asked", []), *(text for _, text in items)]
        return [Verdict(None, "timeout") if t[:1] == ";" else Verdict(sum(c.isdigit() for c in t) / max(1, len(t)), "ok") for _, t in items]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(recipe's folder with a reward model in it, policy, learner)."""
    policy, folder = tiny_policy(hidden=32, ffn=64), tmp_path_factory.mktemp("recipe")
    reward = tiny_reward(policy.chat.tokenizer)
    reward.model.save_pretrained(folder / "rm")
    reward.tokenizer.save_pretrained(folder / "rm")
    learner = Learner(policy, Accelerator(cpu=True), head_chunk=7)
    learner.start(Optim(lr=1e-2, clip_norm=0.0))
    learner.freeze_reference()
    with torch.no_grad():  # away from the reference, so that the KL is not 0
        for p in policy.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return folder, policy, learner


def rule_of(place, **keys):
    return use("vgf", {"reward_model": "./rm", **keys}, home="llmrl.rules", base=place[0], where="[rule]")


def make_io(place, verifier=None, group=5):
    return RolloutIO(HFEngine(place[1]), verifier or Digits(), place[1].chat, Memory(), Sampling(10), group, (0, 1), steps=10)


def collect(rule, io):
    return asyncio.run(rule.collect(PROMPTS, io))


def gradient(place, rule, groups, *, tokens=10**6):
    """(shares of the loss, gradient by name) of one update on these groups, streams filled as in a step."""
    learner, samples = place[2], [replace(s, streams={}) for g in groups for s in g.samples]
    if rule.needs.ref_logp:
        learner.add_stream("ref_logp", samples, tokens=tokens)
    adv_T, _ = rule.credit.update(view_of(samples, learner, 10), rule.credit.init())
    adv = list(adv_T.split([len(s.token_ids) for s in samples]))
    denominators = global_denominators(samples, rule.loss, max_new_tokens=10, groups=len(groups))
    total = {}
    live = [k for k, s in enumerate(samples) if needs_forward(rule, s, adv[k])]
    for batch in pack([samples[k] for k in live], [adv[k] for k in live], tokens=tokens):
        loss, shares = evaluate_terms(rule.loss, batch, learner.forward(batch, rule.needs), denominators)
        learner.backward(loss)
        total = {k: total.get(k, 0.0) + v for k, v in shares.items()}
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in learner.params}
    for _, p in learner.params:
        p.grad = None
    return total, grads


def same(one, other, **how):
    assert one.keys() == other.keys()
    for name in one:
        assert_close(one[name], other[name], **(how or {"rtol": 0, "atol": 0}))


def noted(io, name):
    total, n = io.noted[f"rule/{name}"]
    return total / n


# ---------------------------------------------------------------- budget 0


def by_hand(place, how):
    """Best-of-N and rejection fine-tuning written out: the default collect, then a weight on the winner."""
    reward = lm.RewardModel.load(place[0] / "rm")

    async def run(prompts, io):
        groups = await sample_groups(prompts, io)
        for g in groups:
            values = reward.score([(s.context_ids, s.token_ids) for s in g.samples])
            judged = [k for k, s in enumerate(g.samples) if s.reward is not None and s.reward >= (0.5 if how == "accepted" else 0.0)]
            key = {"reward": lambda k, v=values: v[k], "verifier": lambda k, g=g, v=values: (g.samples[k].reward, v[k])}
            won = judged if how == "accepted" else [max(judged, key=key[how])]
            for k in won:
                g.samples[k].weights["win"] = 1.0 / len(won)
        return groups

    return Rule(Credit(), (Term(losses.ce(), weight="win", over="fixed", count="groups"),), run)


@pytest.mark.parametrize("zero", [{"steps": 0, "eps": 0.7}, {"steps": 4, "eps": 0.0}])
@pytest.mark.parametrize("select", ["reward", "verifier", "accepted"])
@pytest.mark.parametrize("pool", ["both", "moved"])
def test_winners_at_budget_zero_are_best_of_n_bit_for_bit(place, zero, select, pool):
    accept = {"accept": 0.5} if select == "accepted" else {}
    mine, theirs = rule_of(place, select=select, pool=pool, measure_kl=False, **zero, **accept), by_hand(place, select)
    a, b = (collect(rule, make_io(place)) for rule in (mine, theirs))
    assert [[(s.id, s.token_ids, s.behavior_logp, s.reward) for s in g.samples] for g in a] == [
        [(s.id, s.token_ids, s.behavior_logp, s.reward) for s in g.samples] for g in b
    ]
    assert any(s.weights.get("transported") for g in a for s in g.samples)
    (shares, one), (want, other) = gradient(place, mine, a), gradient(place, theirs, b)
    assert list(shares.values()) == list(want.values()) and max(float(x.abs().max()) for x in one.values()) > 0
    same(one, other)


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_members_at_budget_zero_are_grpo_bit_for_bit(place, kl):
    rules = [rule_of(place, form="members", steps=0, kl=kl), family.grpo(kl=kl)]
    (a, b) = (collect(rule, make_io(place)) for rule in rules)
    assert [[vars(s) for s in g.samples] for g in a] == [[vars(s) for s in g.samples] for g in b]
    (one, other) = (gradient(place, rule, groups) for rule, groups in zip(rules, (a, b), strict=True))
    assert one[0] == other[0]
    same(one[1], other[1])


# ---------------------------------------------------------------- a budget


def moved_by_hand(place):
    policy, io = place[1], make_io(place)
    groups = asyncio.run(sample_groups(PROMPTS, io))
    items = [(s.context_ids, s.token_ids) for g in groups for s in g.samples]
    reward = lm.RewardModel.load(place[0] / "rm")
    return groups, items, lm.transport(HFEngine(policy).score, reward, items, **BUDGET), reward


def test_members_are_the_moved_texts_judged_anew(place):
    _, _, moved, _ = moved_by_hand(place)
    verifier = Digits()
    io = make_io(place, verifier)
    groups = collect(rule_of(place, form="members", **BUDGET), io)
    own = [s for g in groups for s in g.samples if s.role == "policy"]
    new = {s.id: s for g in groups for s in g.samples if s.role == "transported"}
    assert len(new) == sum(bool(m.changed_share) for m in moved) > 3
    for s, m in zip(own, moved, strict=True):
        assert (f"{s.id}/moved" in new) == bool(m.changed_share)
        if not m.changed_share:
            continue
        n = new[f"{s.id}/moved"]
        assert (n.token_ids, n.context_ids, n.cohort, n.parent) == (m.token_ids, s.context_ids, s.cohort, s.id)
        assert n.text == io.chat.text(m.token_ids) and n.behavior_logp is None and n.streams == {}
        (verdict,) = Digits().score([(PROMPTS[0], n.text)])
        assert n.reward == verdict.score and n.weights == {"policy": float(verdict.score is not None)}
    assert sorted(verifier.asked) == sorted([s.text for s in own] + [n.text for n in new.values()])
    assert noted(io, "moved_share") == len(new) / len(own) and noted(io, "reward/after") == pytest.approx(sum(m.reward_after for m in moved) / len(own))
    assert noted(io, "mmd") > 0 and noted(io, "reward/flowed") > noted(io, "reward/before")


def test_a_moved_member_trains_as_grpo_trains_its_tokens(place):
    """Its ratio begins at 1: the gradient of the group is that of REINFORCE with the group's advantages, moved members among them."""
    rule = rule_of(place, form="members", measure_kl=False, **BUDGET)
    groups = collect(rule, make_io(place))
    plain = replace(rule, loss=(Term(losses.reinforce(), over="sample"),))
    one, other = gradient(place, rule, groups)[1], gradient(place, plain, groups)[1]
    same(one, other, rtol=1e-4, atol=1e-7)
    assert max(float(x.abs().max()) for x in one.values()) > 0
    same(one, gradient(place, rule, groups, tokens=1)[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("keys", [{"candidates": 4, "guard": None}, {"guard": 0.05}, {"candidates": 4, "guard": 0.0, "velocity": "pooled"}])
def test_candidates_and_guard_do_what_they_do_at_test_time(place, keys):
    folder, policy, _ = place
    keys, io = {**BUDGET, "steps": 4, "eps": 2.0, **keys}, make_io(place)
    groups = collect(rule_of(place, form="members", **keys), io)
    own = [s for g in groups for s in g.samples if s.role == "policy"]
    moved = lm.transport(policy, lm.RewardModel.load(folder / "rm"), [(s.context_ids, s.token_ids) for s in own], **keys)
    new = {s.parent: s.token_ids for g in groups for s in g.samples if s.role == "transported"}
    assert new == {s.id: m.token_ids for s, m in zip(own, moved, strict=True) if m.changed_share} and new
    if keys["guard"] is not None:
        assert noted(io, "guarded_share") == sum(not m.kept for m in moved) / sum(bool(m.changed_share) or not m.kept for m in moved) > 0


def test_candidates_need_the_policy_in_this_process(place):
    io = make_io(place)
    io.engine = SimpleNamespace(generate=io.engine.generate, score=io.engine.score)  # as a server is: tokens and their log-probs
    assert collect(rule_of(place, **BUDGET), io)
    with pytest.raises(InputError, match=r"candidates needs an engine.*engine.use = hf"):
        collect(rule_of(place, candidates=4, **BUDGET), io)


@pytest.mark.parametrize("pool", ["both", "moved"])
def test_the_winner_is_never_worse_than_best_of_n_where_both_compete(place, pool):
    groups, _, moved, _ = moved_by_hand(place)
    io = make_io(place)
    out = collect(rule_of(place, pool=pool, **BUDGET), io)
    at, transported = 0, 0
    for g, before in zip(out, groups, strict=True):
        own, at = moved[at : at + len(before.samples)], at + len(before.samples)
        (won,) = [s for s in g.samples if s.weights.get("transported")]
        assert [s.id for s in g.samples if s.role == "policy"] == [s.id for s in before.samples]
        origin = before.samples[[s.id for s in before.samples].index(won.parent or won.id)]
        m = own[before.samples.index(origin)]
        value = m.reward_after if won.role == "transported" else m.reward_before
        judged = [x.reward_before for x, s in zip(own, before.samples, strict=True) if s.reward is not None]
        transported += won.role == "transported"
        if pool == "both":
            assert value >= max(judged)
        assert won.weights["transported"] == 1.0 and won.reward is not None
        if won.role == "transported":
            assert won.weights == {"policy": 0.0, "transported": 1.0} and won.behavior_logp is None and won.cohort != origin.cohort
    assert noted(io, "winner_share") == 1.0 and noted(io, "winner_moved_share") == transported / 3 > 0


def test_the_likelihood_term_is_that_of_the_winners_tokens(place):
    rule = rule_of(place, measure_kl=False, **BUDGET)
    groups = collect(rule, make_io(place))
    won = [s for g in groups for s in g.samples if s.weights.get("transported")]
    logp = HFEngine(place[1]).score([(s.context_ids, s.token_ids) for s in won])
    shares, grads = gradient(place, rule, groups)
    assert shares["transported"] == pytest.approx(-sum(sum(x) for x in logp) / (3 * 10), rel=1e-5)
    alone, _ = gradient(place, rule, [replace(g, samples=[s for s in g.samples if s.weights.get("transported")]) for g in groups])
    assert alone["transported"] == pytest.approx(shares["transported"], rel=1e-6)
    same(grads, gradient(place, rule, groups, tokens=1)[1], rtol=1e-4, atol=1e-7)


def test_the_end_of_a_short_winner_counts_as_much_as_that_of_a_long_one(place):
    """Of winners of 2 and of 8 tokens, the gradient of the one term on each token's log-prob is the same: maximum likelihood, which keeps lengths."""
    (term, *_), samples = rule_of(place, measure_kl=False, **BUDGET).loss, []
    for k, n in enumerate((2, 8)):
        samples.append(Sample(f"s{k}", f"p{k}", [1], [4] * n, None, 0, weights={"transported": 1.0}, streams={"old_logp": [0.0] * n}))
    denominators = global_denominators(samples, (term,), max_new_tokens=10, groups=2)
    (batch,) = pack(samples, [torch.zeros(len(s.token_ids)) for s in samples], tokens=100)
    logp_T = torch.full((10,), -1.0, dtype=torch.float64, requires_grad=True)
    loss, _ = evaluate_terms((term,), batch, Outputs(logp_T, logp_T.detach(), None, None), denominators)
    (grad,) = torch.autograd.grad(loss, logp_T)
    assert_close(grad, torch.full((10,), -1 / (2 * 10), dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_kl_is_measured_without_a_gradient_or_weighed_with_one(place):
    groups = collect(rule_of(place, **BUDGET), make_io(place))
    off, on, weighed = (rule_of(place, **BUDGET, **keys) for keys in ({"measure_kl": False}, {}, {"kl": 0.5}))
    (_, none), (shares, looked), (again, pulled) = (gradient(place, rule, groups) for rule in (off, on, weighed))
    same(looked, none, rtol=1e-4, atol=1e-7)  # not bit for bit: more samples in a micro-batch
    assert shares["kl_k3"] == again["kl_k3"] > 1e-4
    assert max(float((pulled[n] - none[n]).abs().max()) for n in none) > 1e-4
    assert on.needs.ref_logp and not off.needs.ref_logp


# ---------------------------------------------------------------- choosing


def candidate(name, value, score, role="policy"):
    return file.Candidate(Sample(name, "p", [1], [2], None, 0, role=role, reward=score), value)


def test_choosing_winners():
    rivals = [candidate("a", 3.0, None), candidate("b", 2.0, 0.2), candidate("c", 1.0, 0.9), candidate("d", 1.5, 0.9), candidate("e", 2.0, 0.2)]

    def won(select, accept):
        return [c.sample.id for c in file.winners(rivals, select, accept)]

    assert won("reward", 0.0) == ["b"]  # a could not be judged; of equals the first
    assert won("reward", 0.5) == ["d"] and won("verifier", 0.0) == ["d"]
    assert won("accepted", 0.5) == ["c", "d"] and won("accepted", 1.0) == won("reward", 1.0) == []


def test_a_prompt_without_a_winner_trains_nothing_and_lowers_the_term(place):
    io = make_io(place)
    rule = rule_of(place, select="accepted", measure_kl=False, **BUDGET)  # only texts of digits alone are accepted
    groups = collect(rule, io)
    assert noted(io, "winner_share") < 1
    assert all(s.reward == 1.0 for g in groups for s in g.samples if s.weights.get("transported"))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"form": "members", "select": "reward"}, "select, accept and pool"),
        ({"form": "members", "accept": 0.0}, "select, accept and pool"),
        ({"low": 0.1}, "low, high and std_eps"),
        ({"accept": 1.5}, "accept = 1.5"),
        ({"steps": -1}, "steps"),
        ({"alpha": 0.0}, "alpha"),
        ({"value": "critic"}, "value"),
        ({"value_ridge": 0.0}, "value_ridge"),
    ],
)
def test_refused_keys(place, keys, told):
    with pytest.raises(InputError, match=told):
        rule_of(place, **keys)


def test_a_missing_reward_model_is_named_at_the_first_step(place):
    with pytest.raises(InputError, match="llmrl reward"):
        collect(rule_of(place, reward_model="./nothing"), make_io(place))
    with pytest.raises(InputError, match="reward_model"):
        use("vgf", {}, home="llmrl.rules", base=place[0], where="[rule]")

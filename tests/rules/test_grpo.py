"""The GRPO family as rules: each composition end to end on the hand-worked table, what it asks for, and what its collect does."""

import asyncio

import pytest
import torch
from torch.testing import assert_close

from llmrl.batch import Outputs, evaluate_terms, global_denominators
from llmrl.chat import Chat, char_tokenizer
from llmrl.compose import with_mismatch
from llmrl.credit import View
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.records import Prompt, Sample, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules import grpo as family
from tests.builders import ALPHABET, flat, make_batch, make_view

FAMILY = [family.grpo, family.dr_grpo, family.dapo, family.gspo, family.cispo, family.rloo, family.reinforce_pp]
LOGP = [[-0.5, -1.0, -0.2], [-0.7, -0.3, -1.5, -0.9]]
OLD = [[-0.9, -0.9, -0.2], [-0.6, -0.7, -1.4, -0.5]]
REF = [[-0.6, -1.1, -0.2], [-0.7, -0.5, -1.5, -1.0]]
ROLL = [[-0.4, -1.5, -0.2], [-0.65, -0.7, -2.6, -0.5]]
K3 = 0.004749 * 7  # sum over the table's tokens
K3_ROWS = (0.003225 + 0.005892) / 2  # mean of row means: e^-0.1 + 0.1 - 1 = 0.004837, e^-0.2 + 0.2 - 1 = 0.018731


def credit(rule, rewards, cohorts=None, lengths=None, **more):
    view = make_view(rewards, cohorts or [0] * len(rewards), lengths, **more)
    return rule.credit.update(view, rule.credit.init())[0].tolist()


def loss(rule, adv=(1.0, -1.0), width=8, logp=LOGP, old=OLD):
    """The rule's loss on the hand-worked table."""
    batch, out = make_batch(logp, list(adv), old=old, ref=REF, behavior=ROLL, entropy=[[0.5] * 3, [1.0] * 4])
    samples = [Sample(str(i), "p", [1], [0] * len(row), None, 0) for i, row in enumerate(logp)]
    value, _ = evaluate_terms(rule.loss, batch, out, global_denominators(samples, rule.loss, max_new_tokens=width))
    return value, out


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (family.grpo(), -0.004785),
        (family.grpo(high=0.28), -0.018119),
        (family.grpo(kl=0.5), -0.004785 + 0.5 * K3_ROWS),
        (family.dr_grpo(budget=8), 0.062291),
        (family.dr_grpo(), 0.062291),
        (family.dapo(), 0.130952),
        (family.dapo(high=0.2), 0.142380),
        (with_mismatch(family.dapo(), "token_truncate"), 0.232521),
        (family.gspo(), -0.000350),
        (family.cispo(ratio_max=1.28), -0.176156),
        (family.dapo(kl=0.5), 0.130952 + 0.5 * 0.004749),
        (family.dapo(kl=0.5, kl_form="k2"), 0.130952 + 0.5 * 0.005),
        (family.dapo(entropy=0.1), 0.130952 - 0.1 * (1.5 + 4.0) / 7),
        (family.dr_grpo(kl=0.5), 0.062291 + 0.5 * K3 / 16),
        (family.rloo(), (1.7 * 1.0 - 3.4) / 2),
        (family.reinforce_pp(), -0.004785),
    ],
    ids=lambda x: "" if isinstance(x, float) else x.loss[0].label,
)
def test_worked_example(rule, expected):
    assert float(loss(rule)[0].detach()) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("make", FAMILY, ids=lambda f: f.__name__)
def test_zero_advantage_and_first_update(make):
    """Advantage 0: no gradient. On-policy: the gradient of REINFORCE under the rule's reduction, token by token."""
    rule = make()
    value, out = loss(rule, adv=(0.0, 0.0))
    assert torch.autograd.grad(value, out.logp_T)[0].abs().max() == 0.0
    value, out = loss(rule, adv=(1.0, -2.0), old=LOGP)
    g = torch.autograd.grad(value, out.logp_T)[0]
    over, budget = rule.loss[0].over, rule.loss[0].budget
    each = {"token": [1 / 7, 1 / 7], "sample": [1 / 6, 1 / 8], "fixed": [1 / (2 * (budget or 8))] * 2}[over]
    assert_close(g, flat([[-1.0 * each[0]] * 3, [2.0 * each[1]] * 4]))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (family.grpo(), [0.866024, -0.866024, -0.866024, 0.866024, -0.499999, -0.499999, -0.499999, 1.499997]),
        (family.dr_grpo(), [0.5, -0.5, -0.5, 0.5, -0.25, -0.25, -0.25, 0.75]),
        (family.dapo(), [0.866024, -0.866024, -0.866024, 0.866024, -0.499999, -0.499999, -0.499999, 1.499997]),
        (family.gspo(), [0.866024, -0.866024, -0.866024, 0.866024, -0.499999, -0.499999, -0.499999, 1.499997]),
        (family.cispo(), [0.866024, -0.866024, -0.866024, 0.866024, -0.499999, -0.499999, -0.499999, 1.499997]),
        (family.rloo(kl=0.0), [0.666667, -0.666667, -0.666667, 0.666667, -0.333333, -0.333333, -0.333333, 1.0]),
        (family.reinforce_pp(kl=0.0), [1.207615, -0.724569, -0.724569, 1.207615, -0.724569, -0.724569, -0.724569, 1.207615]),
        (family.reinforce_pp(kl=0.0, baseline=True), [1.0, -1.0, -1.0, 1.0, -0.5, -0.5, -0.5, 1.5]),
    ],
    ids=lambda x: "" if isinstance(x, list) else x.loss[0].label,
)
def test_worked_advantages(rule, expected):
    assert credit(rule, [1, 0, 0, 1, 0, 0, 0, 1], [0] * 4 + [1] * 4) == pytest.approx(expected, abs=6e-7)


def test_kl_in_the_reward():
    """rloo takes sum k1 off the reward: k1 of the table is 0.5 + 0.1 - 0.2 ... by row; reinforce_pp takes it off token by token."""
    streams = {"old_logp": [[-0.5, -1.0], [-0.2]], "ref_logp": [[-0.6, -0.8], [-0.4]]}  # k1: [0.1, -0.2], [0.2]
    rewards = [1 - 0.5 * (0.1 - 0.2), 0 - 0.5 * 0.2]
    gap = rewards[0] - rewards[1]
    assert credit(family.rloo(kl=0.5), [1, 0], lengths=[2, 1], streams=streams) == pytest.approx([gap, gap, -gap])
    returns = [1 - 0.5 * (0.1 - 0.2), 1 - 0.5 * -0.2, 0 - 0.5 * 0.2]
    x = torch.tensor(returns, dtype=torch.float64)
    adv = credit(family.reinforce_pp(kl=0.5), [1, 0], lengths=[2, 1], streams=streams)
    assert adv == pytest.approx(((x - x.mean()) / x.std()).tolist())


def test_dapo_overlong():
    """limit 10, cache 4: a right answer of 8 tokens earns 0.5, as much as nothing; one of 10 earns 0."""
    adv = credit(family.dapo(overlong_cache=4), [1, 1, 1, 0], lengths=[6, 8, 10, 6], max_new_tokens=10)
    shaped = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    want = (shaped - shaped.mean()) / (shaped.std() + 1e-6)
    assert adv == pytest.approx(want.repeat_interleave(torch.tensor([6, 8, 10, 6])).tolist())


def test_needs_are_only_what_is_used():
    for make in FAMILY:
        plain = make(kl=0.0).needs
        assert (plain.ref_logp, plain.old_logp, plain.entropy, plain.whole_groups) == (False, False, False, False)
        assert make(kl=0.1).needs.ref_logp
        assert make(kl=0.0, entropy=0.01).needs.entropy
    for make in (family.rloo, family.reinforce_pp):
        assert make().needs.old_logp  # KL in the reward is known before the forward
        assert len(make().loss) == 1  # and is not in the loss


def test_an_unscored_row_in_gspo_is_harmless():
    batch, _ = make_batch(LOGP, [1.0, 0.0], weight=[1.0, 0.0])
    logp = flat(LOGP).requires_grad_()
    rule = family.gspo()
    value, _ = evaluate_terms(rule.loss, batch, Outputs(logp, flat(OLD)), [1.0])
    g = torch.autograd.grad(value, logp)[0]
    assert g.isfinite().all() and g[3:].tolist() == [0.0] * 4


# ---------------------------------------------------------------- collect

PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": f"{i}+1="},), str(i + 1)) for i in range(12)]


class Exact:
    """Right iff the text begins with the answer; "?" cannot be judged."""

    def score(self, items):
        return [Verdict(None, "timeout") if t == "?" else Verdict(float(t.startswith(p.answer)), answer=t) for p, t in items]


def collect(rule, reply, n=2, more=None, limit=4):
    chat = Chat(char_tokenizer(ALPHABET + "?"))
    stream = iter(PROMPTS[n:])
    used = []

    def take(k):
        used.append(k)
        return [next(stream) for _ in range(k)]

    io = RolloutIO(TableEngine(chat, reply), Exact(), chat, Memory(), Sampling(limit), 3, (0, 1), more_prompts=take if more else None)
    return asyncio.run(rule.collect(PROMPTS[:n], io)), used


def by_seed(table):
    """Replies by (prompt id, sample index); the default is wrong."""
    return lambda r: table.get((str(r.seed[2]).split("~")[0], r.seed[3]), "0")


def test_collect_masks_truncated_and_unscored():
    reply = by_seed({("p0", 0): "1", ("p0", 1): "1;;;;;;;;", ("p0", 2): "?"})
    (group, _), _ = collect(family.grpo(mask_truncated=True), reply)
    seen = [(s.reward, s.finish, s.weights["policy"]) for s in group.samples]
    assert seen == [(1.0, "stop", 1.0), (1.0, "length", 0.0), (None, "stop", 0.0)]
    (group, _), _ = collect(family.grpo(), reply)
    assert [s.weights["policy"] for s in group.samples] == [1.0, 1.0, 0.0]
    assert [s.cohort for s in group.samples] == ["p0"] * 3 and all(s.behavior_logp == [-0.5] * len(s.token_ids) for s in group.samples)


def test_dapo_refills_until_enough_groups_differ():
    live = {(f"p{i}", 1): str(i + 1) for i in (1, 4, 7)}
    groups, used = collect(family.dapo(), by_seed(live), n=2, more=True)
    assert [g.prompt.id for g in groups] == ["p1", "p4"]
    assert used == [1, 1, 1]  # p2, p3, p4: one group was missing each time
    groups, used = collect(family.dapo(dynamic_rounds=0), by_seed(live), n=2, more=True)
    assert [g.prompt.id for g in groups] == ["p0", "p1"] and used == []


def test_dapo_stops_after_its_rounds():
    groups, used = collect(family.dapo(dynamic_rounds=3), by_seed({}), n=2, more=True)
    assert used == [2, 2] and len(groups) == 2  # nothing live: the last round's groups, with advantage 0
    assert credit(family.dapo(), [0.0] * 6, [0, 0, 0, 1, 1, 1]) == [0.0] * 6


def test_kl_forms_go_where_they_work():
    """k2 and k3 are terms of the loss; k1 is taken off the reward before the group's mean: the difference of two KL sums shows."""
    assert [t.label for t in family.grpo(kl=0.1, kl_form="k2").loss] == ["pg_clip", "kl_k2"]
    rule = family.dr_grpo(kl=0.5, kl_form="k1")
    assert [t.label for t in rule.loss] == ["pg_clip"] and rule.needs.ref_logp and rule.needs.old_logp
    view = View(
        reward_S=torch.tensor([1.0, 1.0], dtype=torch.float64), scored_S=torch.tensor([True, True]), cohort_S=torch.tensor([0, 0]),
        length_S=torch.tensor([2, 1]), truncated_S=torch.tensor([False, False]), sample_T=torch.tensor([0, 0, 1]),
        streams={"old_logp": torch.tensor([-1.0, -1.0, -2.0], dtype=torch.float64), "ref_logp": torch.tensor([-1.5, -1.3, -2.0], dtype=torch.float64)},
    )  # fmt: skip
    adv, _ = rule.credit.update(view, rule.credit.init())
    assert adv.tolist() == pytest.approx([-0.2, -0.2, 0.2])  # rewards 1 - 0.5 * 0.8 and 1

"""ExPO beside its main rule: the theory on a table, preference pairs and their loss, the report before training, the estimator of pass@k."""

import asyncio
import json
import math

import pytest
import torch

from llmrl import losses
from llmrl.evaluation.passk import pass_at_k
from llmrl.hf_engine import HFEngine
from llmrl.plugins import use
from llmrl.records import InputError, Prompt
from llmrl.rules import explanations as x
from llmrl.rules.expo_report import before_training, states_early
from llmrl.templates import Template
from tests.builders import make_batch
from tests.rules.test_expo import PROMPTS, TINY, collect, gradient, make_io, policy_and_learner, replies, right, rule_of

torch.set_num_threads(1)

# ---------------------------------------------------------------- theory (identity 9)


def test_lemma_and_properties_on_a_table():
    """5 CoTs, 2 answers, exact gradients: posterior samples are better on average, moved mass changes J as stated, the self term fades with pi(c')."""
    g = torch.Generator().manual_seed(0)
    logits_C = torch.randn(5, generator=g, dtype=torch.float64)
    answer_C = torch.rand(5, generator=g, dtype=torch.float64)  # X = pi(a*|q, c)

    def J(pi_C):
        return float((pi_C * answer_C).sum())

    pi = logits_C.softmax(0)
    posterior = pi * answer_C / (pi * answer_C).sum()
    assert float((posterior * answer_C).sum()) == pytest.approx(float((pi * answer_C**2).sum() / (pi * answer_C).sum()))
    assert float((posterior * answer_C).sum()) > J(pi)
    flat = torch.full((5,), 0.3, dtype=torch.float64)
    assert float(((pi * flat) / (pi * flat).sum() * flat).sum()) == pytest.approx(float((pi * flat).sum()))  # equality iff X is constant
    delta, moved = 0.01, pi.clone()
    moved[1] += delta
    moved[3] -= delta
    assert J(moved) - J(pi) == pytest.approx(delta * float(answer_C[1] - answer_C[3]))

    def self_term(shift, eta=1e-6):
        """dJ from the coordinate pi(c', a*) alone of a step eta grad log pi(c', a*), against eta pi(c', a*) |grad log pi|^2. Two-level softmax."""
        theta = torch.cat([logits_C + torch.tensor([shift, 0, 0, 0, 0.0]), torch.logit(answer_C)]).requires_grad_()

        def log_joint(t):
            return t[:5].log_softmax(0)[0] + torch.nn.functional.logsigmoid(t[5])

        (grad,) = torch.autograd.grad(log_joint(theta), theta)
        with torch.no_grad():
            after, before = log_joint(theta + eta * grad).exp(), log_joint(theta).exp()
            return float((after - before) / eta), float(before * grad.square().sum())

    terms = []
    for shift in (0.0, -5.0, -20.0):
        measured, stated = self_term(shift)
        assert measured == pytest.approx(stated, rel=1e-4, abs=1e-8)
        terms.append(stated)
    assert terms[0] > terms[1] > terms[2] and terms[2] < 1e-7


# ---------------------------------------------------------------- DPO


def dpo_value(logp, ref, rewards, beta=0.1, weight=(1.0, 1.0)):
    batch, out = make_batch(logp, [0.0] * len(logp), ref=ref, weight=list(weight), cohorts=[i // 2 for i in range(len(logp))])
    batch.weight = {"pair": batch.weight["policy"]}
    batch.reward_S = torch.tensor(rewards, dtype=torch.float64)
    return losses.dpo(beta)(batch, out), out


def test_dpo_by_hand():
    """Identity 10. Winner gains -1.2 - (-1.5) = 0.3, loser -2.0 - (-1.4) = -0.6: margin 0.9, l = ln(1 + e^-0.09) = 0.649160."""
    w, lose, ref_w, ref_l = [-0.5, -0.7], [-1.0, -0.6, -0.4], [-0.5, -1.0], [-0.9, -0.3, -0.2]
    value, out = dpo_value([w, lose], [ref_w, ref_l], [1.0, 0.0])
    assert value.tolist() == pytest.approx([0.649160] * 5, abs=1e-6)
    swapped, _ = dpo_value([w, lose], [ref_w, ref_l], [0.0, 1.0])
    assert swapped[0].item() == pytest.approx(math.log(1 + math.exp(0.09)))  # the margin is negated
    (grad,) = torch.autograd.grad(value[0], out.logp_T)
    slope = 0.1 / (1 + math.exp(0.09))  # beta * sigmoid(-beta * margin), on every token alike
    assert grad.tolist() == pytest.approx([-slope] * 2 + [slope] * 3)
    same_, _ = dpo_value([w, lose], [w, lose], [1.0, 0.0])
    assert same_.tolist() == pytest.approx([math.log(2)] * 5)
    for rewards, weights in (([1.0, 1.0], (1.0, 1.0)), ([1.0, 0.0], (1.0, 0.0))):
        with pytest.raises(ValueError, match="no pair"):
            dpo_value([w, lose], [ref_w, ref_l], rewards, weight=weights)


def test_exp_dpo_pairs(tmp_path):
    """Preferred: the explanation; dispreferred: the first wrong sample; both behind the question alone. Without a wrong sample there is no pair."""
    rule = use("exp_dpo", TINY, home="llmrl.rules", base=tmp_path, where="[rule]")
    assert rule.needs.ref_every == 50 and rule.needs.whole_groups and rule.needs.ref_logp
    reply = replies({f"p{i}": right(i) for i in range(3)})
    io = make_io(reply)
    io.engine.reply = lambda r: reply(r) if "explain" in r.seed else f"{r.seed[-1]}#2"  # right for p1 alone
    groups = collect(rule, io)
    chosen, rejected = groups[0].samples
    assert (chosen.text, rejected.text) == ("0+1=1;#1", "0#2") and (chosen.reward, rejected.reward) == (1.0, 0.0)
    assert chosen.context_ids == rejected.context_ids == io.chat.prompt_ids(PROMPTS[0].messages)
    assert [s.role for s in groups[1].samples] == ["none"] and groups[1].samples[0].weights == {"pair": 0.0}
    assert io.noted["rule/pairs_share"] == [2.0, 3.0] and io.noted["rule/reward"] == [2.0, 6.0]
    policy, learner = policy_and_learner()
    for g in groups:
        for s in g.samples:
            s.streams["ref_logp"] = [v - 0.1 for v in HFEngine(policy).score([(s.context_ids, s.token_ids)])[0]]
    shares, grads = gradient(learner, rule, groups)
    gap = 0.1 * (len(chosen.token_ids) - len(rejected.token_ids))
    assert shares["dpo"] == pytest.approx(math.log(1 + math.exp(-0.1 * gap)), abs=1e-5)
    assert max(float(v.abs().max()) for v in grads.values()) > 0


def test_offline_pairs_are_read_and_checked(tmp_path):
    io = make_io(replies({}))
    context = io.chat.prompt_ids(PROMPTS[0].messages)
    row = {"id": "p0", "context_ids": context, "chosen": [5, 6, 2], "rejected": [7, 2], "version": 0}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    rule = use("exp_dpo", {**TINY, "mode": "offline", "pairs": "pairs.jsonl"}, home="llmrl.rules", base=tmp_path, where="[rule]")
    groups = collect(rule, io)
    assert [s.token_ids for s in groups[0].samples] == [[5, 6, 2], [7, 2]] and io.generated == 0 and rule.needs.ref_every == 0
    assert [len(g.samples) for g in groups] == [2, 1, 1]
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**row, "context_ids": [1]}) + "\n")
    rule = use("exp_dpo", {**TINY, "mode": "offline", "pairs": "pairs.jsonl"}, home="llmrl.rules", base=tmp_path, where="[rule]")
    with pytest.raises(InputError, match="row p0: its pair was made behind another prompt"):
        collect(rule, io)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"cannot be read \(KeyError"):
        use("exp_dpo", {**TINY, "mode": "offline", "pairs": "pairs.jsonl"}, home="llmrl.rules", base=tmp_path, where="[rule]")


# ---------------------------------------------------------------- report, estimator


def test_the_report_on_a_scripted_model():
    """Log-prob of a token: -0.1 own text, -0.3 explained, -0.9 the expert's; the answer -0.2 behind an explanation, -2 behind the others."""
    reply = replies({f"p{i}": f"{i}+1=y;{i + 1}#{i + 1}" for i in range(3)}, own="5-5-5#9")
    io = make_io(reply)

    def judge(context, ids):
        text = io.chat.text(ids)
        each = -0.3 if "y" in text or ("+1=" in text and "x" not in text) else -0.9 if "x" in text else -0.1
        answer = -0.2 if each == -0.3 else -2.0
        at = text.find("#")
        return [each if k < at else answer for k in range(len(ids))]

    io.engine.judge = judge
    how = x.Explainer(Template("{question}@{answer}@"), "#{answer}", marks=("#",), cut="mark", min_tokens=3, hints=("xyz",))
    report = asyncio.run(before_training(how, PROMPTS, io))
    kinds = report["kinds"]
    assert [kinds[k]["nll_nats"] for k in ("own", "explanation", "expert")] == pytest.approx([0.1, 0.3, 0.9])
    assert report["lift_nats"]["100%"] == pytest.approx(3 * (2.0 - 0.2)) and report["lift_nats"]["50%"] == pytest.approx(5.4)
    assert report["explained_share"] == 1.0 and report["accuracy"] == 0.0 and report["tries"]["accepted"] == 3
    assert report["states_answer_early_share"] == pytest.approx(1 / 3)  # 0+1=y: the 1 of p0 stands there before the last step


def test_states_early():
    assert states_early("It is 12. Then we add.", "12") and not states_early("It is 112. Then 12.", "12") and not states_early("12", "12")
    assert not states_early("x=1.5;y=2", "1") and states_early("a=-4;b=3", "-4")


def test_pass_at_k():
    """Identity 11."""
    assert pass_at_k(8, 0, 4) == 0.0 and pass_at_k(8, 5, 4) == 1.0
    assert [pass_at_k(4, c, 4) for c in range(5)] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert pass_at_k(16, 2, 4) == pytest.approx(1 - math.comb(14, 4) / math.comb(16, 4))


def test_sample_without_gold_is_refused(tmp_path):
    with pytest.raises(InputError, match="row q: it has no answer"):
        collect(rule_of(tmp_path), make_io(replies({})), [Prompt("q", PROMPTS[0].messages)])

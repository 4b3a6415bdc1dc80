"""INPO: worked losses, the identities of h, the mirror step that the population loss is minimised by, and the pairs of a scripted engine."""

import asyncio
from dataclasses import replace

import pytest
import torch

from llmrl import losses
from llmrl.batch import evaluate_terms
from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.records import Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules.inpo import inpo
from tests.builders import ALPHABET, f64, make_batch


def pair(d, d_ref, d_t, *, swap=False, shift=0.0, parts=2, **keys):
    """(loss, gradient of the preferred sample's log-prob) of one pair with these margins, spread over `parts` tokens a sample."""
    rows = [[[x / parts] * parts, [0.0] * parts] for x in (d + shift, d_ref + shift, d_t + shift)]
    rule = inpo(**keys)
    batch, out = make_batch(rows[0], [0.0, 0.0], ref=rows[1], old=rows[2], cohorts=[0, 0])
    batch = replace(batch, weight={"pair": batch.weight["policy"]}, reward_S=f64([0.0, 1.0] if swap else [1.0, 0.0]))
    value, _ = evaluate_terms(rule.loss, batch, out, [2.0])
    return float(value.detach()), torch.autograd.grad(value, out.logp_T)[0].tolist()


def h_of(*margins, eta, tau, **keys):
    """h, from the gradient 2 (h - c)."""
    _, grad = pair(*margins, eta=eta, tau=tau, **keys)
    return grad[0] / 2 + 0.5 / eta


def test_worked_losses():
    value, grad = pair(6, 2, 4)
    assert value == pytest.approx(4096) and grad == pytest.approx([-128, -128, 128, 128])  # every token of a sum alike
    assert inpo().loss[0].over == "sample"
    value, grad = pair(6, 2, 4, eta=0.5, tau=0.1, parts=1)
    assert value == pytest.approx(1.96) and grad == pytest.approx([2.8, -2.8])
    assert h_of(6, 2, 4, eta=7.5e-3, tau=2.5e-3) == pytest.approx(2.666667, abs=1e-6) and h_of(6, 2, 4, eta=0.5, tau=0.1) == pytest.approx(2.4)


def test_limits_of_tau():
    assert h_of(6, 2, 4, eta=0.5, tau=0.5) == pytest.approx(4)  # D - D_ref: the loss of IPO
    assert h_of(6, 2, 4, eta=0.5, tau=1e-9) == pytest.approx(2)  # D - D_t: no pull to the reference


def test_identities_of_h():
    how = {"eta": 0.3, "tau": 0.12}
    assert pair(3, 3, 3, **how)[0] == pytest.approx((0.5 / 0.3) ** 2)  # one policy in three roles: whatever the pair
    assert pair(-7, -7, -7, **how)[0] == pytest.approx((0.5 / 0.3) ** 2)
    assert h_of(6, 2, 4, shift=11.0, **how) == pytest.approx(h_of(6, 2, 4, **how))
    value, grad = pair(6, 2, 4, swap=True, **how)  # the other one is preferred: h turns its sign
    assert value == pytest.approx((-h_of(6, 2, 4, **how) - 0.5 / 0.3) ** 2) and grad[0] > 0
    assert pair(0.5 / 0.3, 0, 0, **how)[1] == pytest.approx([0.0] * 4)  # a finite target
    assert pair(9.0, 0, 0, **how)[1][0] > 0


P = f64([[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]])
PI_T, PI_REF, ETA, TAU = f64([0.5, 0.3, 0.2]), f64([0.4, 0.4, 0.2]), 0.5, 0.1


def population(logits):
    """L_pop through the rule's own loss: all ordered pairs of answers, each with either label, weighted by how often they come up."""
    logp, total = logits.log_softmax(0), torch.zeros((), dtype=torch.float64)
    ordered = [(y, z, w, lose) for y in range(3) for z in range(3) for w, lose in ((y, z), (z, y))]
    share = [PI_T[y] * PI_T[z] * (P[w, lose]) for y, z, w, lose in ordered]
    answers = torch.tensor([a for *_, w, lose in ordered for a in (w, lose)])
    rows = [[0.0] for _ in answers]
    batch, out = make_batch(rows, [0.0] * len(rows), ref=rows, old=rows, cohorts=[i // 2 for i in range(len(rows))])
    batch = replace(batch, weight={"pair": batch.weight["policy"]}, reward_S=f64([1.0, 0.0] * len(ordered)))
    out = replace(out, logp_T=logp[answers], ref_logp_T=PI_REF.log()[answers], old_logp_T=PI_T.log()[answers])
    each = losses.inpo(ETA, TAU)(batch, out)[::2]
    for s, x in zip(share, each, strict=True):
        total = total + s * x
    return total


def test_the_population_loss_is_minimised_by_the_mirror_step():
    wins = P @ PI_T
    assert wins.tolist() == pytest.approx([0.55, 0.43, 0.48])
    step = PI_REF ** (TAU / ETA) * PI_T ** (1 - TAU / ETA) * (wins / ETA).exp()
    step = step / step.sum()
    assert step.tolist() == pytest.approx([0.530122, 0.277119, 0.192760], abs=1e-6)
    at = step.log()
    assert float(population(at)) == pytest.approx(0.977600, abs=1e-6)
    moved = [float(population(at + d * torch.eye(3, dtype=torch.float64)[k])) for k in range(3) for d in (-0.05, 0.05)]
    assert min(moved) == pytest.approx(0.978400, abs=1e-6)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure():
        optimizer.zero_grad()
        value = population(logits)
        value.backward()
        return value

    optimizer.step(closure)
    assert logits.softmax(0).tolist() == pytest.approx(step.tolist(), abs=1e-6)


@pytest.mark.parametrize("p", [0.5, 0.8, 1.0])
def test_one_pair_alone(p):
    """Its minimum is h = (2p - 1) / (2 eta)."""
    c = 0.5 / 0.5
    h = (2 * p - 1) * c
    grad = p * pair(h, 0, 0, eta=0.5, tau=0.1)[1][0] + (1 - p) * pair(h, 0, 0, swap=True, eta=0.5, tau=0.1)[1][0]
    assert grad == pytest.approx(0.0, abs=1e-12)


def collect(texts, verify, **keys):
    chat = Chat(char_tokenizer(ALPHABET))

    class Scores:
        def score(self, items):
            return [verify(p, text) for p, text in items]

    io = RolloutIO(TableEngine(chat, lambda r: texts[r.seed[2]][int(r.seed[3])]), Scores(), chat, Memory(), Sampling(8), 4, (0, 1))
    groups = asyncio.run(inpo(**keys).collect([Prompt(i, ({"role": "user", "content": "1+1="},), "2") for i in texts], io))
    return groups, io


def graded(_, text):
    return Verdict(None, "timeout") if text == "-" else Verdict(int(text[0]) / 9)


def test_pairs_are_best_against_worst():
    texts = {"a": ["3", "51", "12", "52"], "b": ["4", "4", "4", "-"], "c": ["-", "-", "-", "7"]}
    groups, io = collect(texts, graded)
    assert [[s.text for s in g.samples] for g in groups] == [["51", "12"], ["4"], ["-"]]
    chosen, rejected = groups[0].samples
    assert (chosen.reward, rejected.reward, chosen.role, chosen.weights) == (1.0, 0.0, "chosen", {"pair": 1.0}) and chosen.cohort == rejected.cohort
    assert chosen.context_ids == rejected.context_ids and chosen.behavior_logp is not None
    assert [s.weights for g in groups[1:] for s in g.samples] == [{"pair": 0.0}] * 2
    assert io.noted["rule/pairs_share"] == [1.0, 3.0] and io.noted["rule/reward"] == pytest.approx([(3 + 5 + 1 + 5 + 12 + 7) / 9, 8.0])


def test_pairs_by_comparisons():
    """The sample that beats most siblings against the one that beats the fewest; here smaller is better."""
    groups, _ = collect({"a": ["3", "51", "12", "52"]}, lambda p, text: Verdict(float(int(text) < int(p.answer))), opponent="answer")
    assert [s.text for s in groups[0].samples] == ["3", "52"]


def test_needs_and_keys():
    needs = inpo().needs
    assert needs.ref_logp and needs.whole_groups and not needs.old_logp and needs.ref_every == 0
    for keys in ({"eta": 0.0}, {"eta": 0.1, "tau": 0.2}, {"tau": 0.0}, {"both_ways": False}):
        with pytest.raises(ValueError, match="inpo"):
            inpo(**keys)

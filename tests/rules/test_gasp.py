"""GASP: the identities of its specification on a scripted engine, token by token; gates, chunks and repairs; kill and resume in mid-step."""

import asyncio
import json
import multiprocessing as mp
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.testing import assert_close

from llmrl.batch import evaluate_terms, global_denominators, pack
from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.hf_engine import HFEngine
from llmrl.learner import Learner
from llmrl.memory import Memory
from llmrl.records import Completion, InputError, Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO, sample_groups
from llmrl.rules.base import Needs
from llmrl.rules.gasp import gasp
from llmrl.rules.gasp_game import WINDOW, gate
from llmrl.rules.gasp_parts import chunk_spans, edit_by_rule, edits, fault, inside, leaks, places_to_corrupt, token_texts
from llmrl.rules.gasp_repair import guidance_weight
from llmrl.rules.grpo import grpo
from llmrl.step import view_of
from llmrl.tasks import chain_roles
from tests.builders import ALPHABET, tiny_policy

torch.set_num_threads(1)
LETTERS = ALPHABET + "!@~"
CHAT = Chat(char_tokenizer(LETTERS))
TINY = {
    "chunk_min": 1, "chunk_target": 1, "chunk_max": 16, "cut": ";", "answer_marks": ("#",), "position": (0.0, 0.7), "delimiters": ("", "!"), "min_edits": 1,
    "giveaways": ("~",), "polluter_template": "tiny", "repair_template": "tiny", "base": Path(), "corruptions": 2, "control": 0.0,
}  # fmt: skip
make = partial(gasp, **TINY)


def tiny(**keys):
    return gasp(**{**TINY, **keys})


QUESTION, TRACE, ANSWER = "3-6-1=", "3-6=-3;-3-1=-4#-4", "-4"
PROMPT = Prompt("p", ({"role": "user", "content": QUESTION},), ANSWER)
OTHER = Prompt("q", ({"role": "user", "content": "9+1-2="},), "8")
SAYS = {
    ("p", 0): TRACE, ("q", 0): "9+1=10;10-2=8#8",
    ("p", "polluter", 0): "3-6=-5;!", ("p", "polluter", 1): "3-6=9;!", ("q", "polluter", 0): "9+1=11;!", ("q", "polluter", 1): "9;",
    ("p", "agent", 0, 0): "~3-6=-3;-3-1=-4#-4", ("p", "agent", 1, 1): "-3-1=-4#-4",
    ("p", "repair", 0, 0): "~3-6=-3;-3-1=-4#-4",
}  # fmt: skip
"""Everything else that is asked gets "#0", which is wrong."""


class Exact:
    """1 where the text after the last "#" is the answer; "?" would be needed for an unjudged one: "(" stands for it."""

    def score(self, items):
        return [Verdict(None, "timeout") if "(" in t else Verdict(float(t.rpartition("#")[2] == p.answer), answer=t) for p, t in items]


def play(rule, prompts=(PROMPT,), says=SAYS, *, group=3, step=1, memory=None, judge=None, sampling=None):
    """-> (groups, io) of one step; `says` maps a key to a text or ids."""

    def reply(request):
        text = says.get(request.seed[2:], "#0")
        return text if isinstance(text, str) else list(text)

    engine = TableEngine(CHAT, reply, judge=judge)
    io = RolloutIO(engine, Exact(), CHAT, memory or Memory(), sampling or Sampling(40), group, (0, step))
    return asyncio.run(rule.collect(prompts, io)), io


def of(groups, role):
    return [s for g in groups for s in g.samples if s.role == role]


def ids(text):
    return CHAT.prompt_ids([{"role": "user", "content": text}])


def advantages(rule, groups):
    """name of the sample -> advantage, through the rule's own credit."""
    samples = [s for g in groups for s in g.samples]

    class One:
        all_sum, gather = staticmethod(lambda x: x), staticmethod(lambda x: [x])

    adv, _ = rule.credit.update(view_of(samples, One(), 40), rule.credit.init())  # type: ignore[arg-type]
    return {s.id: a for s, a in zip(samples, adv.split([len(s.token_ids) for s in samples]), strict=True)}


@pytest.fixture(scope="module")
def learner():
    policy = tiny_policy(alphabet=LETTERS, hidden=32, layers=1, heads=2, kv_heads=2, ffn=32)
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.dim() == 2:
                p.mul_(4.0)
    return Learner(policy, Accelerator(cpu=True))


def loss_of(learner, rule, groups, adv=None):
    """-> (value, gradient as one vector, shares) of the rule's loss on these groups."""
    samples = [s for g in groups for s in g.samples]
    by_name = advantages(rule, groups) if adv is None else adv
    denominators = global_denominators(samples, rule.loss, max_new_tokens=40, groups=len(groups))
    learner.policy.model.zero_grad()
    (batch,) = pack(samples, [by_name[s.id] for s in samples], tokens=10**6)
    value, shares = evaluate_terms(rule.loss, batch, learner.forward(batch, Needs()), denominators)
    value.backward()
    gradient = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for _, p in learner.params])
    return float(value.detach()), gradient.clone(), shares


# ---------------------------------------------------------------- identities of section 9


def test_1_zero_sum():
    """p: recovery 1/3 and 1/3; q: its second reply has no delimiter."""
    groups, io = play(tiny(), (PROMPT, OTHER))
    polluters = {s.id: s.reward for s in of(groups, "polluter")}
    assert polluters == {"p/polluter/0": pytest.approx(2 / 3), "p/polluter/1": pytest.approx(2 / 3), "q/polluter/0": 1.0, "q/polluter/1": 0.0}
    for name, won in polluters.items():
        agents = [s.reward for s in of(groups, "agent") if s.parent == name]
        assert (won + sum(agents) / 3 == pytest.approx(1.0)) if agents else (won == 0.0 and name == "q/polluter/1")
    noted = {k.removeprefix("rule/"): v for k, v in io.noted.items()}
    assert noted["valid"] == [3, 4] and noted["invalid_delimiter"] == [1, 4] and noted["recovery"] == [2, 9]
    assert noted["polluter_reward"] == [pytest.approx(2 - 2 / 3 + 1), 4]
    assert noted["groups_scarce"] == [1, 3] and noted["groups_all_zero"] == [1, 3] and noted["groups_all_one"] == [0, 3] and noted["skipped"] == [0, 2]


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_2_without_corruptions_it_is_grpo(learner, kl):
    """Samples, advantages, loss and gradient, bit for bit; and with corruptions played but every other term off."""
    off = tiny(corruptions=0, kl=kl)
    groups, _ = play(off, (PROMPT, OTHER))
    plain, _ = play(grpo(kl=kl), (PROMPT, OTHER))
    assert groups == plain
    if kl:
        assert [(t.weight, t.over, t.coef) for t in off.loss] == [(t.weight, t.over, t.coef) for t in grpo(kl=kl).loss]
        return
    value, gradient, _ = loss_of(learner, off, groups)
    want, want_gradient, _ = loss_of(learner, grpo(), plain)
    assert value == want and torch.equal(gradient, want_gradient) and gradient.abs().max() > 0
    silent = tiny(polluter_coef=0.0, guidance=0.0, guidance_only=True)
    played, _ = play(silent, (PROMPT, OTHER))
    assert [s for g in played for s in g.samples if s.role == "policy"] == [s for g in plain for s in g.samples]
    same, gradient, _ = loss_of(learner, silent, played)
    assert same == pytest.approx(want, abs=1e-7)
    assert_close(gradient, want_gradient, atol=1e-6, rtol=1e-4)  # packed beside other samples: other matrix shapes


def test_3_guidance_adds_its_term_and_nothing_else(learner):
    groups, _ = play(tiny(), (PROMPT, OTHER))
    adv = advantages(tiny(), groups)
    (none, g0, _), (some, g1, shares), (more, g2, _) = (loss_of(learner, tiny(guidance=k), groups, adv) for k in (0.0, 0.3, 0.6))
    assert shares["repair"] > 0 and some - none == pytest.approx(0.3 * shares["repair"], abs=1e-6)
    assert_close(g2 - g0, 2 * (g1 - g0), atol=1e-5, rtol=1e-3)
    assert more - none == pytest.approx(0.6 * shares["repair"], abs=1e-6)
    for g in groups:
        g.samples = [s for s in g.samples if s.role != "repair"]
    (a, ga, _), (b, gb, _) = (loss_of(learner, tiny(guidance=k), groups, adv) for k in (0.0, 0.3))
    assert a == b and torch.equal(ga, gb)
    unguided, _ = play(tiny(guidance=0.0), (PROMPT, OTHER))  # not even sampled, and the rest is what it was
    assert [s for g in unguided for s in g.samples] == [s for g in groups for s in g.samples]


def test_4_a_group_of_equal_rewards_is_silent(learner):
    """All agents fail: the gradient of the agent's term is exactly 0; the total's is guidance's alone."""
    says = {k: v for k, v in SAYS.items() if k[1] != "agent"}
    rule = tiny(clean_coef=0.0, polluter_coef=0.0, guidance=0.3)
    groups, _ = play(rule, says=says)
    adv = advantages(rule, groups)
    assert all(not adv[s.id].any() for s in of(groups, "agent")) and len(of(groups, "repair")) == 1
    _, total, _ = loss_of(learner, rule, groups, adv)
    _, guided, _ = loss_of(learner, tiny(clean_coef=0.0, polluter_coef=0.0, guidance=0.3, guidance_only=True), groups, adv)
    _, silent, _ = loss_of(learner, tiny(clean_coef=0.0, polluter_coef=0.0, guidance=0.0), groups, adv)
    assert torch.equal(total, guided) and total.abs().max() > 0 and silent.abs().max() == 0.0


def test_5_masks_at_token_level(learner):
    """What is trained is u alone: labels, and the places whose outputs get a gradient; what is read is all of h."""
    groups, _ = play(tiny(guidance=0.3))
    rule = tiny(clean_coef=0.0, polluter_coef=0.0, guidance=0.3)
    chosen = of(groups, "agent") + of(groups, "repair")
    adv = advantages(rule, groups)
    (batch,) = pack(chosen, [adv[s.id] for s in chosen], tokens=10**6)
    labels = [t for i in batch.sample_index for t in chosen[i].token_ids]
    assert batch.tokens_T.tolist() == labels  # no label of the problem, of p or of s~ exists
    texts = {CHAT.text(s.context_ids) for s in chosen}
    assert texts == {QUESTION + "3-6=-5;", QUESTION + "3-6=9;"}
    hidden = learner.policy.hidden(batch.ids_P, batch.positions_P, batch.plan("sdpa")).detach().requires_grad_()
    logp = torch.log_softmax(learner.policy.logits(hidden.index_select(0, batch.source_T)), -1).gather(1, batch.tokens_T[:, None])[:, 0]
    from llmrl.batch import Outputs

    value, _ = evaluate_terms(rule.loss, batch, Outputs(logp, logp.detach()), global_denominators(chosen, rule.loss, max_new_tokens=40))
    value.backward()
    lit = {int(i) for i in hidden.grad.abs().sum(-1).nonzero()[:, 0]}  # type: ignore[union-attr]
    last = [len(s.context_ids) - 1 for s in chosen]
    contexts = {CHAT.text(c) for c in {tuple(s.context_ids) for s in chosen}}
    n_context = int(min(set(batch.source_T.tolist()) - {int(s) for s in batch.source_T if batch.positions_P[s] in last}))
    silent = [p for p in range(n_context) if int(batch.positions_P[p]) not in last]  # they predict q, p or s~
    assert len(contexts) == 2 and silent and not lit & set(silent) and lit <= set(batch.source_T.tolist())

    def value_of(samples):
        for s in samples:
            (b,) = pack([s], [adv.get(s.id, torch.ones(len(s.token_ids)))], tokens=10**6)
            yield learner.forward(b, Needs()).logp_T.sum().item()

    for s in chosen:
        a, b = value_of([s, replace(s, context_ids=[*s.context_ids[:-2], CHAT.prompt_ids([{"role": "user", "content": "7"}])[1], s.context_ids[-1]])])
        assert a != b  # another s~ in the inputs is another loss


def test_6_the_polluter_sees_the_continuations_as_numbers_only(learner):
    rule = tiny(clean_coef=0.0, guidance=0.0, guidance_only=True, polluter_coef=1.0)
    says = {**SAYS, ("p", "polluter", 1): "3-6=8;!"}
    groups, _ = play(rule, says=says)
    swapped = {**says, ("p", "agent", 0, 0): says.get(("p", "agent", 0, 2), "#0"), ("p", "agent", 0, 2): says[("p", "agent", 0, 0)]}
    flipped = {**says, ("p", "agent", 0, 1): "#-4"}
    plain, _, _ = (loss_of(learner, rule, play(rule, says=s)[0])[1] for s in (says, swapped, flipped))
    base = loss_of(learner, rule, groups)[1]
    moved = loss_of(learner, rule, play(rule, says=flipped)[0])[1]
    assert torch.equal(plain, base) and not torch.equal(base, moved)
    assert base.abs().max() == 0.0 and moved.abs().max() > 0  # 2/3 and 2/3 are equal rewards; 1/3 and 2/3 are not
    text = {CHAT.text(s.context_ids) + "|" + s.text for s in of(groups, "polluter")}
    assert text == {f"{QUESTION}!3-6=-3;!|3-6=-5;!", f"{QUESTION}!3-6=-3;!|3-6=8;!"}  # s~ and its closing delimiter, behind x_pol


def test_7_advantages_are_of_one_cohort():
    """Mean 0 and deviation 1 within it, and the same whatever else is in the batch."""
    rule = tiny(control=1.0)
    says = {**SAYS, ("p", "control", 1): "#-4", ("p", "agent", 0, 1): "#-4"}
    both, _ = play(rule, (PROMPT, OTHER), says)
    alone, _ = play(rule, (PROMPT,), says)
    of_both, of_one = advantages(rule, both), advantages(rule, alone)
    assert {k: v.tolist() for k, v in of_both.items() if k.startswith("p/")} == {k: v.tolist() for k, v in of_one.items()}
    cohorts: dict[str, list[float]] = {}
    for s in [s for g in both for s in g.samples]:
        cohorts.setdefault(s.cohort, []).append(float(of_both[s.id][0]))
    sizes = {k: len(v) for k, v in cohorts.items()}
    assert sizes == {"p": 3, "q": 3, "p/polluter": 2, "q/polluter": 2, "p/agent/0": 3, "p/agent/1": 3, "q/agent/0": 3, "p/control": 3, "q/control": 3} | {
        k: 1 for k in sizes if "/repair/" in k
    }
    for values in cohorts.values():
        assert sum(values) == pytest.approx(0.0, abs=1e-9)
        assert not any(values) or np.std(values, ddof=1) == pytest.approx(1.0, abs=1e-5)
    assert any(cohorts["p/agent/0"]) and any(cohorts["p/control"]) and not any(cohorts["q/agent/0"]) and any(cohorts["p/polluter"])
    assert [CHAT.text(s.context_ids) for s in of(both, "control")] == [QUESTION + "3-6=-3;"] * 3 + ["9+1-2=9+1=10;"] * 3


def test_8_the_verifier_reads_the_continuation_only():
    """The right answer stands in s~, a wrong one in u: reward 0. As it is set, the gate lets no answer into s~ at all."""
    says = {**SAYS, ("p", "polluter", 0): "3-6=-3#-4;!", ("p", "agent", 0, 0): "#9"}
    groups, _ = play(tiny(answer_marks=("@",)), says=says)
    (agent,) = [s for s in of(groups, "agent") if s.id == "p/agent/0/0"]
    assert CHAT.text(agent.context_ids).endswith("#-4;") and agent.reward == 0.0
    groups, io = play(tiny(), says=says)
    assert io.noted["rule/invalid_answer"] == [1, 2] and not [s for s in of(groups, "agent") if "/0/" in s.id]


def test_9_token_exact():
    """An untrained model plays all roles: the engine's log-probs are those of the concatenated ids, in every role that is trained."""

    class Odd:
        def score(self, items):
            return [Verdict(float(sum(map(ord, t)) % 2)) for _, t in items]

    keys = {"cut": " ", "answer_marks": (), "giveaways": (), "position": (0.0, 1.0), "replace_length": (0.0, 50.0), "coherence_slack": 50.0, "control": 1.0}
    policy = tiny_policy(alphabet=LETTERS, hidden=32, layers=1, heads=2, kv_heads=2, ffn=32)
    io = RolloutIO(HFEngine(policy), Odd(), policy.chat, Memory(), Sampling(40), 8, (0, 1))
    rule = tiny(**{**keys, "delimiters": ("", "2"), "chunk_max": 40, "corruptions": 8, "nll_quantile": 1.0})
    prompts = [Prompt(f"p{i}", ({"role": "user", "content": f"{i}+1="},), "4") for i in range(4)]
    groups = asyncio.run(rule.collect(prompts, io))  # type: ignore[arg-type]
    roles = {s.role for g in groups for s in g.samples}
    assert roles >= {"policy", "polluter", "agent", "control", "repair"}
    samples = [s for g in groups for s in g.samples]
    again = io.score([s.context_ids for s in samples], [s.token_ids for s in samples])
    for s, logps in zip(samples, again, strict=True):
        assert (s.behavior_logp is None) == (s.role == "repair")
        if s.behavior_logp is not None:
            assert logps == pytest.approx(s.behavior_logp, abs=1e-4)
    by_id = {s.id: s for s in samples}
    for s in (s for s in samples if s.role == "agent"):
        trace = by_id[by_id[s.parent].parent]  # h = the trace's prompt, the beginning of its own ids, and a piece of the polluter's ids
        said, n = by_id[s.parent].token_ids, len(trace.context_ids)
        behind = s.context_ids[n:]
        k = max(k for k in range(len(behind)) if behind[:k] == trace.token_ids[:k] and behind[k:] == said[-len(behind) + k - 1 : -1][: len(behind) - k])
        assert s.context_ids[:n] == trace.context_ids and behind[k:]


LEAKY = "{question}@{prefix}{corrupted}@{step}@{answer}@"


def test_10_repairs_hold_no_hint(tmp_path):
    """Neither a string nor a token of the hint is in what is trained; all kept are right and likely enough; the template is never in a loss."""
    (tmp_path / "hint.txt").write_text(LEAKY)
    says = {k: v for k, v in SAYS.items() if k[1] != "agent"} | {("p", "repair", 0, 1): "#-4", ("p", "repair", 1, 0): "#7"}

    def judge(context, tokens):  # the longer repair is the likelier one a token
        return [-0.1 if len(tokens) > 4 else -0.4] * len(tokens)

    rule = tiny(repair_template="./hint.txt", base=tmp_path, nll_quantile=1.0)
    groups, io = play(rule, says=says, judge=judge)
    (kept,) = of(groups, "repair")
    assert kept.text == SAYS["p", "repair", 0, 0] and kept.verdict.score == 1.0 and kept.reward is None and kept.behavior_logp is None
    assert CHAT.text(kept.context_ids) == QUESTION + "3-6=-5;" and kept.weights == {"repair": 1.0}
    at = CHAT.tokenizer("@", add_special_tokens=False)["input_ids"][0]
    for s in [s for g in groups for s in g.samples]:
        assert at not in s.context_ids and at not in s.token_ids and "@" not in CHAT.text(s.context_ids)
    assert io.noted["rule/repair_nll"] == [pytest.approx(0.1), 1] and io.noted["rule/repair_gate"] == [0.5, 1]
    assert io.noted["rule/repairs_hinted"] == [1, 0] and io.noted["rule/repairs_harvest"] == [0, 0] and io.noted["rule/repairs_asked"] == [8, 0]
    (tmp_path / "bare.txt").write_text("{question}{prefix}{corrupted}")
    bare, _ = play(tiny(repair_template="./bare.txt", base=tmp_path, nll_quantile=1.0), says=says, judge=judge)
    assert bare == groups  # the engine said the same, so everything that is trained is the same
    groups, io = play(rule, says=says, judge=lambda context, tokens: [-9.0] * len(tokens) if CHAT.text(tokens)[0] in "~#" else [-0.1] * len(tokens))
    assert not of(groups, "repair") and io.noted["rule/hinted_nll"] == [18.0, 2]  # 9 nats > 0.5: not in distribution
    leaky, _ = play(tiny(leaks=("~3",), nll_quantile=1.0), says=says, judge=judge)
    assert [s.text for s in of(leaky, "repair")] == ["#-4"]


def test_10_harvested_repairs_need_no_hint():
    """Context 0: one of three continuations is right, above `scarce`, so it is taken; nothing is asked."""
    groups, io = play(tiny(nll_quantile=1.0))
    assert [(s.id, s.parent, s.text) for s in of(groups, "repair")] == [
        ("p/repair/0", "p/agent/0/0", "~3-6=-3;-3-1=-4#-4"), ("p/repair/1", "p/agent/1/1", "-3-1=-4#-4")
    ]  # fmt: skip
    assert "rule/hinted_right" not in io.noted and io.noted["rule/repairs_harvest"] == [2, 0]
    assert len(of(groups, "agent")) == 6  # the harvested ones are in their group all the same


def test_11_first_order_gain():
    """Softmax over 3 continuations: dP(h) = eta * sum_u pi(u) V(u) <grad log pi(u), grad log pi(u_r)>; gone where pi(u_r) is."""
    theta, value = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)

    def gain(theta, r, eta):
        pi = theta.softmax(0)
        scores = torch.eye(3, dtype=torch.float64) - pi  # row u: grad log pi(u)
        return float(eta * (pi * value) @ (scores @ scores[r])), float((theta + eta * scores[r]).softmax(0) @ value - pi @ value)

    for r in (0, 1, 2):
        first, finite = gain(theta, r, 1e-6)
        assert first == pytest.approx(finite, rel=1e-4)
        assert (first > 0) == (value[r] == 1)
    own = [float(t.softmax(0)[0] * ((torch.eye(3)[0] - t.softmax(0)) ** 2).sum()) for t in (torch.tensor([x, 0.0, 0.0]) for x in (0.0, -5.0, -20.0))]
    assert own[0] > own[1] > own[2] and own[2] < 1e-8


# ---------------------------------------------------------------- chunks and gates


def test_chunks_of_text():
    """Cuts behind newline tokens; short pieces merge, long ones fall back to sentence ends."""
    texts = ["A", " b", ".\n", "\n", "C", ".\n", "D", " e", ".", " F", " g", ".", " H", "\n", "end", ""]
    def how(least, target, most):
        return chunk_spans(texts, cut="\n", least=least, target=target, most=most)

    assert how(1, 1, 16) == [(0, 4), (4, 6), (6, 14), (14, 16)]
    assert how(3, 3, 16) == [(0, 4), (4, 14), (14, 16)]
    assert how(1, 6, 16) == [(0, 6), (6, 14), (14, 16)]
    assert how(1, 1, 4) == [(0, 4), (4, 6), (6, 9), (9, 12), (12, 14), (14, 16)]
    spans = how(1, 1, 16)
    assert places_to_corrupt(texts, spans, marks=("END",), position=(0.0, 1.0), most=16) == [0, 1, 2]
    assert places_to_corrupt(texts, spans, marks=(" e.",), position=(0.0, 1.0), most=16) == [0, 1]  # the mark spans two tokens
    assert places_to_corrupt(texts, spans, marks=(), position=(0.1, 0.3), most=16) == [1]
    assert places_to_corrupt(texts, spans, marks=(), position=(0.0, 1.0), most=4) == [0, 1]
    assert places_to_corrupt([], [], marks=(), position=(0.0, 1.0), most=4) == []


def test_the_delimiter_must_fall_on_a_token():
    assert inside(["3", "-6", ";", "!"], "!") == ((0, 3), "")
    assert inside(["\n", " ", "a", "b", "\n", "</", "step", ">\n"], "</step>") == ((2, 5), "")
    assert inside(["a", "b.</", "step", ">"], "</step>")[1] == "boundary"
    assert inside(["a", "b"], "!")[1] == "delimiter" and inside(["!", "a"], "!")[1] == "delimiter" and inside(["\n", "!"], "!")[1] == "delimiter"
    assert inside(["a", "", "!"], "!") == ((0, 2), "")  # a special token inside: for the gate to refuse


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("3-6=-5;", ""), ("3-6=-3;", "same"), ("3-6=-3 ;", "same"), ("3;", "length"), ("3-6=-3;3-6=-3;", ""), ("3-6=-3;3-6=-3;3;", "length"),
        ("3#6=-5;", "answer"), ("3-6=~;", "giveaway"), ("3-6=-55", "ending"),
    ],
)  # fmt: skip
def test_gate(said, why):
    assert fault(said, "3-6=-3;", length=(0.5, 2.0), most=160, min_edits=1, marks=("#",), giveaways=("~",), cut=";") == why


def test_gate_on_words():
    keys = {"length": (0.5, 2.0), "most": 8, "min_edits": 3, "marks": ("final answer",), "giveaways": ("mistake",), "cut": "\n"}
    words = ["So", " x", " is", " 3", ".\n"]
    assert fault(["So", " x", " is", " 4", ".\n"], words, **keys) == "same"  # one edit of three
    assert fault(["Now", " y", " is", " 4", "."], words, **keys) == ""  # a blank cut need not be there
    assert fault(["The", " Final", " answer", " is", " 4"], words, **keys) == "answer"
    assert fault(["a", "b", "", "c", "d"], words, **keys) == "special"
    assert fault(["a "] * 9, words, **keys) == "length"


def test_edit_distance_against_the_plain_one():
    rng = np.random.default_rng(0)

    def plain(a, b):
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            row, old = [i], row
            for j, y in enumerate(b, 1):
                row.append(min(old[j] + 1, row[-1] + 1, old[j - 1] + (x != y)))
        return row[-1]

    for _ in range(200):
        a, b = (rng.integers(0, 3, rng.integers(0, 9)).astype(str).tolist() for _ in range(2))
        for limit in (1, 3, 5):
            assert edits(a, b, limit) == min(plain(a, b), limit)


def test_edits_by_rule():
    made = [edit_by_rule("3-6=-3;", np.random.default_rng(k)) for k in range(200)]
    assert {"3+6=-3;", "6-3=-3;", "3-8=-3;", "3-6=-13;", "3-6=+3;"} <= set(made) and "3-6=-3;" not in made
    assert all(m and m.endswith(";") for m in made)
    assert edit_by_rule("so it holds.", np.random.default_rng(0)) is None
    groups, io = play(tiny(polluter="rules", corruptions=3))
    assert not of(groups, "polluter") and io.noted["rule/valid"][1] == 3
    contexts = {CHAT.text(s.context_ids) for s in of(groups, "agent")}
    assert len(of(groups, "agent")) == 3 * io.noted["rule/valid"][0] and all(c.startswith(QUESTION) and c != QUESTION + "3-6=-3;" for c in contexts)


def test_incoherent_corruptions_are_not_shown():
    """Original chunks cost 0.5 nats a token (the engine's own), so the gate stands at 1.5."""
    says = {**SAYS}
    groups, io = play(tiny(), says=says, judge=lambda c, t: [-1.6 if "9" in CHAT.text(t) else -1.4] * len(t))
    assert io.noted["rule/invalid_coherence"] == [1, 2] and io.noted["rule/coherence_gate"] == [1.5, 1]
    assert [s.reward for s in of(groups, "polluter")] == [pytest.approx(2 / 3), 0.0] and {s.cohort for s in of(groups, "agent")} == {"p/agent/0"}


def test_the_windows_hold_earlier_steps():
    memory = Memory()
    _, io = play(tiny(), memory=memory)
    assert gate(io, "w", [1.0, 3.0], 0.5) == 2.0  # the first step: its own
    memory.end_step()
    assert gate(io, "w", [9.0], 0.5) == 2.0
    memory.end_step()
    assert gate(io, "w", [], 0.5) == 3.0
    gate(io, "w", [5.0] * (WINDOW + 7), 0.5)
    memory.end_step()
    assert gate(io, "w", [], 0.0) == 5.0 and len(memory.recall("w", "")) == WINDOW
    assert gate(io, "none", [], 0.5) is None


def test_leaks():
    assert leaks("As the  Original\nstep says", ("original step",)) and not leaks("the first step", ("original step",))


# ---------------------------------------------------------------- schedule and odd cases


def test_guidance_fades(learner):
    assert [guidance_weight(r, off=0.8) for r in (None, 0.0, 0.25, 0.8, 0.81)] == [1.0, 1.0, 0.75, pytest.approx(0.2), 0.0]
    memory = Memory()
    play(tiny(), memory=memory)  # recovery 2/6
    memory.end_step()
    assert memory.average("gasp/recovery") == pytest.approx(1 / 3)
    groups, io = play(tiny(guidance=0.3), memory=memory, step=2)
    assert [s.weights["repair"] for s in of(groups, "repair")] == [pytest.approx(2 / 3)] * 2 and io.noted["rule/guidance"] == [pytest.approx(0.2), 1]
    (half, *_, a), (full, *_, b) = (loss_of(learner, tiny(guidance=0.3), g) for g in (groups, play(tiny(guidance=0.3))[0]))
    assert a["repair"] == pytest.approx(b["repair"] * 2 / 3, rel=1e-5) and half < full
    memory.end_step()
    memory.track("gasp/recovery", 1.0, 1.0, decay=0.0)
    memory.end_step()
    groups, io = play(tiny(), memory=memory, step=3)
    assert not of(groups, "repair") and io.noted["rule/guidance"] == [0.0, 1]


def test_warm_up_trains_the_polluter_alone():
    groups, _ = play(tiny(warmup_steps=2, control=1.0), step=2)
    assert {s.role: set(s.weights.values()) for g in groups for s in g.samples} == {"policy": {0.0}, "polluter": {1.0}, "agent": {0.0}, "control": {0.0}}
    groups, _ = play(tiny(warmup_steps=2, control=1.0, kl=0.1), step=3)
    assert {s.role: dict(s.weights) for g in groups for s in g.samples} == {
        "policy": {"policy": 1.0, "kl": 1.0}, "polluter": {"polluter": 1.0, "kl": 1.0}, "agent": {"agent": 1.0, "kl": 1.0},
        "control": {"control": 1.0, "kl": 1.0}, "repair": {"repair": 1.0},
    }  # fmt: skip


def test_problems_without_a_trace_stay_clean():
    """q's only right trace has no step that may be spoilt; the third prompt has no right one."""
    says = {**SAYS, ("q", 0): "9+1-2=8#8"}
    third = Prompt("r", ({"role": "user", "content": "1+1="},), "2")
    groups, io = play(tiny(), (OTHER, third, PROMPT), says)
    assert [len(of([g], "policy")) for g in groups] == [3, 3, 3] and [len(g.samples) > 3 for g in groups] == [False, False, True]
    assert io.noted["rule/skipped"] == [2, 3]
    assert play(tiny(), (OTHER,), {})[0] == asyncio.run(sample_groups([OTHER], play(tiny(), (OTHER,), {})[1]))


def test_the_unjudged_count_nowhere():
    """One continuation of context 0 times out: 1/2 recover; all of context 1: its polluter has no reward and no weight."""
    says = {**SAYS, ("p", "agent", 0, 1): "(", **{("p", "agent", 1, j): "(" for j in range(3)}}
    groups, io = play(tiny(), says=says)
    assert [(s.reward, s.weights["polluter"]) for s in of(groups, "polluter")] == [(0.5, 1.0), (None, 0.0)]
    assert [s.weights["agent"] for s in of(groups, "agent")] == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0] and io.noted["rule/recovery"] == [1, 2]


def test_positions_of_the_model_bound_every_role():
    """7 + 7 + 7 tokens of h; with 40 positions 19 are left, of which a continuation may need 22; with 60 it gets what is there."""
    short = Sampling(40)

    def run(limit):
        seen = []

        def reply(request):
            seen.append((request.seed[3], len(request.context_ids) + request.sampling.max_new_tokens))
            return SAYS.get(request.seed[2:], "#0")

        engine = TableEngine(CHAT, reply)
        engine.max_length = limit  # type: ignore[attr-defined]
        io = RolloutIO(engine, Exact(), CHAT, Memory(), short, 3, (0, 1))
        return asyncio.run(tiny().collect([PROMPT], io)), seen  # type: ignore[arg-type]

    groups, _ = run(40)
    assert len(groups[0].samples) == 3
    groups, seen = run(60)
    assert len(of(groups, "agent")) == 6 and max(n for role, n in seen if isinstance(role, str)) <= 60


def test_other_sampling_scores_its_own_text():
    """At temperature 0.7 the engine's log-probs are not the policy's: NLLs come from a forward at temperature 1."""
    _, io = play(tiny(), judge=lambda c, t: [-2.0] * len(t), sampling=Sampling(40, temperature=0.7))
    assert io.noted["rule/coherence_gate"] == [3.0, 1] and io.noted["rule/repair_gate"] == [2.0, 1]


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"corruptions": 1}, "corruptions = 1"), ({"chunk_min": 9}, "chunk_min"), ({"cut": ""}, "cut"), ({"position": (0.8, 0.1)}, "position"),
        ({"continuations": 0}, "continuations"), ({"nll_quantile": 95.0}, "nll_quantile"),
    ],
)  # fmt: skip
def test_refused_keys(keys, match):
    with pytest.raises(ValueError, match=match):
        tiny(**keys)


def test_the_shipped_templates():
    """Each role has a system message of its own for chat models; nothing of the answer reaches the polluter."""
    rule = gasp(base=Path())
    game = rule.collect.keywords["game"]  # type: ignore[attr-defined]
    system, user = game.polluter_prompt.messages(PROMPT, prefix="P", step="S")
    assert system["role"] == "system" and "<step>" in user["content"] and QUESTION in user["content"] and "-4" not in user["content"]
    system, user = game.repair_prompt.messages(PROMPT, prefix="P", corrupted="C", step="S", answer="-4")
    assert "PC" in user["content"] and "-4" in user["content"] and system["role"] == "system"
    assert game.cut == "\n" and game.delimiters == ("<step>\n", "</step>") and "\\boxed" in game.answer_marks


def test_a_tokenizer_that_joins_characters():
    """Delimiters and cuts are found in the texts of tokens; what enters h are the sampled ids, here with a token that no text gives back."""
    pad = [CHAT.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "3-6=-5;!"]
    odd = [pad[0], *pad[1:]]
    groups, _ = play(tiny(), says={**SAYS, ("p", "polluter", 0): odd})
    assert of(groups, "agent")[0].context_ids == ids(QUESTION) + odd[:-1] and token_texts(CHAT, odd) == list("3-6=-5;!")
    assert isinstance(Completion(odd, [0.0] * len(odd), "stop", 0, ""), Completion)


def test_demonstrations_of_the_roles():
    """Every row against the templates and an independent reading: what is asked, and what is said."""
    rows = list(chain_roles(rows=4000, unasked=0.1, noise=0.0))
    kinds: dict[str, int] = {}
    for row in rows:
        question, _, shown = row["prompt"].partition("=")
        terms = [int(t) for t in re.findall(r"[+-]?\d+", question)]
        assert int(row["answer"]) == sum(terms)
        if not shown:
            kind, end = "solve", row["solution"].rpartition("#")[2]
            assert end == row["answer"] and row["solution"].count(";") == 2
        elif shown.endswith("!"):
            kind, (prefix, step, _) = "spoil", shown.split("!")
            bad = row["solution"].removesuffix("!")
            (span,), texts = [inside(row["solution"], "!")[0]], list(row["solution"])
            assert span == (0, len(bad)) and bad != step and not fault(
                texts[:-1], step, length=(0.5, 2.0), most=16, min_edits=1, marks=("#",), giveaways=("~",), cut=";"
            )
            kinds["weak"] = kinds.get("weak", 0) + (bad.partition("=")[2] == step.partition("=")[2])
            assert eval_chain(terms, prefix + step)
        elif shown.endswith("~"):
            kind, (before, step, _) = "mend", shown.split("~")
            assert row["solution"].startswith(f"~{step}") and row["solution"].endswith(f"#{row['answer']}") and not eval_chain(terms, before)
            assert eval_chain(terms, before[: before.rstrip(";").rfind(";") + 1] + step)
        else:
            kind = "unasked" if row["solution"].startswith("~") else "follow"
            assert not eval_chain(terms, shown) and (row["solution"].endswith(f"#{row['answer']}") == (kind == "unasked"))
        kinds[kind] = kinds.get(kind, 0) + 1
    shares = {k: v / 4000 for k, v in kinds.items()}
    assert shares == pytest.approx({"solve": 0.3, "spoil": 0.2, "mend": 0.2, "follow": 0.2, "unasked": 0.1, "weak": 0.06}, abs=0.02)
    assert [r["prompt"] for r in chain_roles(rows=3)] == [r["prompt"] for r in chain_roles(rows=3)]
    with pytest.raises(InputError, match="terms = 2"):
        next(iter(chain_roles(terms=2)))


def eval_chain(terms, steps):
    """Whether the steps are the right first ones."""
    total = terms[0]
    for term, step in zip(terms[1:], steps.rstrip(";").split(";"), strict=False):
        left, total = f"{total}{term:+d}", total + term
        if step != f"{left}={total}":
            return False
    return True


# ---------------------------------------------------------------- kill and resume

RECIPE = """
seed = 3
steps = 3
[model]
path = "tiny"
[model.tiny]
hidden = 32
layers = 1
heads = 2
ffn = 48
alphabet = "{letters}"
[data]
path = "chains"
holdout = 8
[data.args]
rows = 60
terms = 2
[rollout]
prompts = 4
group = 4
max_new_tokens = 24
[rule]
use = "gasp"
{rule}
[verifier]
use = "./odd.py:odd"
[scoring]
workers = 1
[optim]
lr = 3e-3
schedule = "cosine"
[batch]
tokens = 400
minibatches = 2
[eval]
every = 0
rows = 4
[checkpoint]
every = 1
keep = 9
"""
ODD = """
from llmrl.records import Verdict

def odd():
    return lambda prompt, response: Verdict(float(sum(map(ord, response)) % 2))
"""
LOOSE = """
corruptions = 3
control = 0.5
nll_quantile = 1.0
chunk_min = 1
chunk_target = 1
chunk_max = 24
cut = " "
answer_marks = []
giveaways = []
position = [0.0, 1.0]
delimiters = ["", "2"]
replace_length = [0.0, 50.0]
min_edits = 1
coherence_slack = 50.0
guidance = 0.3
polluter_template = "tiny"
repair_template = "tiny"
"""


def _run(recipe: str, resume: bool, die_at: int) -> None:
    """In a process of its own, which dies before its `die_at`-th look at the verifier (three a step: clean, recovery, repairs)."""
    torch.set_num_threads(1)
    from llmrl.config import load_recipe
    from llmrl.console import Console
    from llmrl.train import train

    if die_at:
        verify, calls = RolloutIO.verify, []

        async def dying(self, items):
            calls.append(1)
            if len(calls) == die_at:
                os._exit(9)
            return await verify(self, items)

        RolloutIO.verify = dying
    train(load_recipe(recipe), resume=resume, console=Console(quiet=True))


def test_killed_between_its_phases_and_resumed_it_is_the_same_run(tmp_path):
    from llmrl.metrics import MetricLog, without_times

    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["llmrl.train", "transformers.models.llama.modeling_llama", "tests.rules.test_gasp"])
    (tmp_path / "odd.py").write_text(ODD)

    def run(name, resume=False, die_at=0):
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(RECIPE.format(letters=LETTERS, rule=LOOSE) + f'[run]\ndir = "{tmp_path / name}"\n')
        process = context.Process(target=_run, args=(str(recipe), resume, die_at))
        process.start()
        process.join(120)
        return process.exitcode

    assert run("whole") == 0
    assert run("broken", die_at=5) == 9  # step 2, corruptions made and continued, not judged
    assert run("broken", resume=True, die_at=3) == 9  # step 2 again, repairs made, not judged
    assert run("broken", resume=True) == 0

    def contents(name):
        folder = tmp_path / name
        found = {str(p.relative_to(folder)): p.read_bytes() for kind in ("checkpoints/**/*", "samples/*") for p in folder.glob(kind) if p.is_file()}
        return found, [json.dumps(without_times(row), sort_keys=True) for row in MetricLog.read(folder)]

    (one, rows), (other, others) = contents("whole"), contents("broken")
    assert rows == others and sorted(one) == sorted(other) and [k for k in one if one[k] != other[k]] == []
    log = MetricLog.read(tmp_path / "whole")[1:]
    total = {k: sum(row.get(f"rule/{k}") or 0.0 for row in log) for k in ("valid", "recovery", "control", "repairs_asked", "repairs_harvest", "repairs_hinted")}
    assert len(log) == 3 and all(total[k] > 0 for k in ("valid", "recovery", "control", "repairs_asked"))
    assert total["repairs_harvest"] + total["repairs_hinted"] > 0

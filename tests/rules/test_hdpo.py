"""HDPO: the specification's group of four, its loss with the tool term's own denominator, and what wrong samples may not change."""

import asyncio
import math

import pytest
import torch

from llmrl.batch import evaluate_terms, global_denominators
from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.records import Prompt, Sample, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules import grpo
from llmrl.rules.hdpo import hdpo
from tests.builders import flat, make_batch, make_view

R_ACC, CALLS = [1.0, 1.0, 0.1, 1.0], [0, 2, 1, 1]
A_ACC = [0.499999, 0.499999, -1.499997, 0.499999]
A_TOOL = [1.120894, -0.800638, 0.0, -0.320255]


def advantages(rule, rewards=R_ACC, calls=CALLS, channel="tool"):
    view = make_view(rewards, [0] * len(rewards), streams={"tool_calls": [[float(n)] for n in calls]})
    state = rule.credit.init()
    adv, state = rule.credit.update(view, state)
    extra = rule.credit.extra(view, state)[0]
    return adv.tolist(), extra[channel].tolist() if channel in extra else []


def test_worked_advantages():
    acc, tool = advantages(hdpo())
    assert acc == pytest.approx(A_ACC, abs=1e-6) and tool == pytest.approx(A_TOOL, abs=1e-6)


def test_worked_coupled_baseline():
    acc, tool = advantages(hdpo(coupled=True))
    assert acc == pytest.approx([0.615390, 0.414446, -1.494519, 0.464682], abs=1e-6) and tool == []


def worked_loss(tool_on):
    lengths, rho = [2, 4, 3, 1], [1.0, 1.3, 0.7, 1.1]
    batch, out = make_batch([[math.log(r)] * n for r, n in zip(rho, lengths, strict=True)], A_ACC, old=[[0.0] * n for n in lengths])
    batch.weight["tool"] = flat([[w] * n for w, n in zip(tool_on, lengths, strict=True)])
    batch.stream["tool"] = flat([[a] * n for a, n in zip(A_TOOL, lengths, strict=True)])
    samples = [Sample(str(i), "p", [1], [0] * n, None, 0, weights={"policy": 1.0, "tool": w}) for i, (n, w) in enumerate(zip(lengths, tool_on, strict=True))]
    rule = hdpo()
    value, shares = evaluate_terms(rule.loss, batch, out, global_denominators(samples, rule.loss, max_new_tokens=8))
    return float(value.detach()), shares


def test_worked_loss():
    value, shares = worked_loss([1.0, 1.0, 0.0, 1.0])
    assert shares["pg_clip"] == pytest.approx(-0.034999930, abs=2e-6) and shares["tool"] == pytest.approx(0.324830, abs=1e-6)
    assert value == pytest.approx(0.013725, abs=2e-6)


def test_the_trap_of_the_denominator():
    """Over all ten tokens the tool term would be 0.227381."""
    assert worked_loss([1.0, 1.0, 1.0, 1.0])[1]["tool"] == pytest.approx(0.227381, abs=1e-6)


def test_silent_channels():
    assert advantages(hdpo(), [1, 0, 0, 0])[1] == [0.0] * 4  # one right sample has nobody to be compared with
    assert advantages(hdpo(), [0, 0, 0, 0])[1] == [0.0] * 4
    assert advantages(hdpo(), [1, 1, 1, 1], [3, 3, 3, 3]) == ([0.0] * 4, [0.0] * 4)
    acc, tool = advantages(hdpo(), [1, 1, 1, 1], [3, 0, 3, 3])
    assert acc == [0.0] * 4 and tool[1] > 0 > tool[0] and sum(tool) == pytest.approx(0.0, abs=1e-12)


def test_wrong_samples_change_nothing_for_right_ones():
    right = advantages(hdpo(), [1, 1, 1], [0, 2, 1])[1]
    more = advantages(hdpo(), [1, 1, 1, 0, 0.1, 0.5], [0, 2, 1, 0, 9, 4])[1]
    assert more == pytest.approx([*right, 0.0, 0.0, 0.0])
    coupled = [advantages(hdpo(coupled=True), *a)[0][0] for a in (([1, 1, 1], [0, 2, 1]), ([1, 1, 1, 0], [0, 2, 1, 9]))]
    assert coupled[0] != pytest.approx(coupled[1], rel=0.05)  # false for the coupled form


def test_weight_zero_is_grpo():
    batch, out = make_batch([[-0.5], [-0.7]], [1.0, -1.0], old=[[-0.9], [-0.6]])
    batch.weight["tool"], batch.stream["tool"] = torch.ones(2, dtype=torch.float64), flat([[3.0], [-3.0]])
    rule = hdpo(tool_weight=0.0, over="sample")
    value, _ = evaluate_terms(rule.loss, batch, out, [2.0, 2.0])
    assert float(value.detach()) == float(evaluate_terms(grpo.grpo().loss, batch, out, [2.0])[0].detach())


def collect(rule, texts):
    chat = Chat(char_tokenizer("0123456789+-*=;#() !T"))

    class Ends:
        def score(self, items):
            return [Verdict(None, "error") if t == "?" else Verdict(float(t.endswith("2"))) for _, t in items]

    replies = iter(texts)
    io = RolloutIO(TableEngine(chat, lambda r: next(replies)), Ends(), chat, Memory(), Sampling(8), len(texts), (0, 1))
    (group,) = asyncio.run(rule.collect([Prompt("p", ({"role": "user", "content": "1+1="},), "2")], io))
    return group.samples, io


@pytest.mark.parametrize(("eligible", "weights"), [("nonzero", [1.0, 1.0, 0.0, 0.0]), ("correct", [1.0, 1.0, 0.0, 1.0])])
def test_collect_counts_calls_and_marks_who_is_compared(eligible, weights):
    """A wrong sample is never compared, whatever its calls."""
    samples, io = collect(hdpo(mark="T", eligible=eligible), ["2", "T2", "TT3", "2"] if eligible == "correct" else ["2", "T2", "TT3", "TT3"])
    assert [s.weights["tool"] for s in samples] == weights
    assert samples[1].streams["tool_calls"] == [1.0] * len(samples[1].token_ids) and samples[2].streams["tool_calls"][0] == 2.0
    assert io.noted["rule/tool_calls"][1] == 4


def test_equal_calls_are_left_out_unless_asked():
    for eligible, weight in (("nonzero", 0.0), ("correct", 1.0)):
        samples, _ = collect(hdpo(mark="T", eligible=eligible), ["2", "2", "3"])
        assert [s.weights["tool"] for s in samples] == [weight, weight, 0.0]


def test_keys_are_checked():
    for keys in ({"tool_weight": -1.0}, {"mark": ""}):
        with pytest.raises(ValueError, match="hdpo"):
            hdpo(**keys)

"""HBPO: the specification's reward tables and two subgroups, properties of the reward, and the budgets in the contexts."""

import asyncio

import pytest
import torch

from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.records import InputError, Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules import grpo
from llmrl.rules.hbpo import hbpo, reward, tokens_of, within
from tests.builders import ALPHABET, f64, make_view

BUDGETS = f64([512, 1024, 2048, 2560])
L, BETA, ALPHA = 4096, 4.0, 1 / 4096


def rewards(n, right=True, budgets=BUDGETS):
    lengths = torch.full_like(budgets, n)
    return reward(lengths, budgets, torch.full(budgets.shape, right), L, BETA, ALPHA).tolist()


def advantages(rule, scores, lengths, budgets, cohorts=None, cut=None):
    streams = {"budget": [[b] * n for b, n in zip(budgets, lengths, strict=True)]}
    view = make_view(scores, cohorts or [0] * len(scores), lengths, max_new_tokens=L, streams=streams)
    if cut:
        view.truncated_S[cut] = True
    return [float(x[0]) for x in rule.credit.update(view, rule.credit.init())[0].split(lengths)]


def test_worked_rewards():
    assert within(BUDGETS, L, BETA).tolist() == pytest.approx([3.923141, 3.695518, 2.828427, 2.222281], abs=1e-6)
    assert rewards(400) == pytest.approx([3.923141, 3.695518, 2.828427, 2.222281], abs=1e-6)
    assert rewards(1500) == pytest.approx([3.115030, 3.240030, 2.828427, 2.222281], abs=1e-6)
    assert rewards(3000) == pytest.approx([1.024755, 1.149755, 1.399755, 1.524755], abs=1e-6)
    assert rewards(400, right=False) == [0.0] * 4


def test_worked_subgroups():
    a = advantages(hbpo(), [1, 1, 1, 0], [400, 1500, 1500, 2400], [512, 512, 2048, 2048])
    assert a == pytest.approx([0.448437, -0.024555, -1.202463, -2.857957], abs=2e-6)


def test_the_reward_at_the_budget_beyond_it_and_near_the_limit():
    for b in BUDGETS.tolist():
        one = f64([b])
        at, just = (reward(n, one, torch.tensor([True]), L, BETA, ALPHA) for n in (one, one + 1e-6))
        assert float(at) == pytest.approx(float(just), abs=1e-6)  # continuous
    for n in range(100, 4096, 333):
        assert all(r <= f + 1e-12 for r, f in zip(rewards(n), within(BUDGETS, L, BETA).tolist(), strict=True))
    assert rewards(3000) == sorted(rewards(3000))  # beyond every budget, larger budgets pay more
    assert rewards(3601)[0] > 0 > rewards(3602)[0] and rewards(L)[0] == pytest.approx(-0.875)
    clamped = advantages(hbpo(clamp=True), [1, 0], [4000, 4000], [512, 512])
    assert clamped[0] == clamped[1]  # both rewards are 0: no longer below a wrong answer
    kept = advantages(hbpo(), [1, 0], [4000, 4000], [512, 512])
    assert kept[0] < kept[1]


def test_the_intra_term_is_never_positive_and_zero_when_all_keep_the_budget():
    a = advantages(hbpo(), [1, 1, 1, 1], [300, 400, 1000, 2000], [512, 512, 2048, 2048])
    r = f64([rewards(300)[0]] * 2 + [rewards(1000)[2]] * 2)
    assert a == pytest.approx(((r - r.mean()) / (r.std() + 1e-6)).tolist())  # the inter term alone
    assert advantages(hbpo(), [0] * 4, [9] * 4, [512, 512, 2048, 2048]) == pytest.approx([-3.923141] * 2 + [-2.828427] * 2, abs=1e-6)


def test_one_budget_is_grpo_plus_a_constant():
    a = advantages(hbpo(), [1, 0, 1, 1], [300, 300, 200, 100], [512] * 4)
    view = make_view([rewards(300)[0], 0, rewards(300)[0], rewards(300)[0]], [0] * 4)
    plain = grpo.grpo().credit.update(view, grpo.grpo().credit.init())[0].tolist()
    off = [x - y for x, y in zip(a, plain, strict=True)]
    assert off == pytest.approx([-0.25 * 3.923141] * 4, abs=1e-6)


def test_a_cut_sample_is_wrong_and_an_unscored_one_absent():
    scores, lengths, budgets = [1, 1, 1, 0], [400, 1500, 1500, 2400], [512, 512, 2048, 2048]
    assert advantages(hbpo(), [1, 1, 1, 1], lengths, budgets, cut=[3]) == advantages(hbpo(), scores, lengths, budgets)
    more = advantages(hbpo(), [*scores, None], [*lengths, 7], [*budgets, 512])
    assert more == pytest.approx([*advantages(hbpo(), scores, lengths, budgets), 0.0])


def test_budgets_are_fractions_of_the_limit_or_tokens():
    assert tokens_of((0.125, 0.25, 0.5, 0.625), 4096) == [512, 1024, 2048, 2560]
    assert tokens_of((100.0, 0.001), 400) == [100, 1]
    for keys in ({"budgets": ()}, {"budgets": (0.0,)}, {"prefix": "be short"}):
        with pytest.raises(ValueError, match="hbpo"):
            hbpo(**keys)


def test_collect_puts_the_budget_into_the_context():
    chat = Chat(char_tokenizer(ALPHABET))

    class Right:
        def score(self, items):
            return [Verdict(1.0) for _ in items]

    io = RolloutIO(TableEngine(chat, lambda r: "12"), Right(), chat, Memory(), Sampling(8), 5, (0, 1))
    prompts = [Prompt(n, ({"role": "user", "content": f"{n}="},), "2") for n in ("1", "2")]
    groups = asyncio.run(hbpo(budgets=(0.25, 0.5), prefix="({budget})").collect(prompts, io))
    texts = [chat.show(s.context_ids) for s in groups[1].samples]
    assert texts == [f"<bos>2=({b})" for b in (2, 4, 2, 4, 2)]  # round-robin
    assert [s.streams["budget"] for s in groups[1].samples] == [[float(b)] * 3 for b in (2, 4, 2, 4, 2)]
    assert all(s.behavior_logp is not None and s.text == "12" for s in groups[0].samples)
    assert io.noted["rule/budget_2/tokens"] == [18.0, 6.0]
    with pytest.raises(InputError, match="no token for '<'"):
        asyncio.run(hbpo().collect(prompts, io))

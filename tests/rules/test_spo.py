"""SPO: the specification's cycle, win rates by scores and by comparisons in both orders, what a judge leaves open, and where it is plain GRPO."""

import asyncio

import pytest
import torch

from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.records import Prompt, Sampling, Verdict
from llmrl.rewards.judge import judge
from llmrl.rollout import RolloutIO
from llmrl.rules.grpo import grpo
from llmrl.rules.spo import score_win_rates, spo, win_matrix, win_rates
from tests.builders import ALPHABET, make_view
from tests.endpoint_server import EndpointServer

CYCLE = [[0.5, 1, 0, 1], [0, 0.5, 1, 1], [1, 0, 0.5, 1], [0, 0, 0, 0.5]]
CHAT = Chat(char_tokenizer(ALPHABET))
TEXTS = ["12", "123", "1", "1234"]


def advantages(rule, view):
    return rule.credit.update(view, rule.credit.init())[0].tolist()


def by_score(rewards, cohorts=None):
    view = make_view(rewards, cohorts or [0] * len(rewards))
    return score_win_rates(view.reward_S, view).tolist()


def test_worked_cycle():
    r = win_rates(CYCLE)
    assert r == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0.0]) and sum(r) / 4 == pytest.approx(0.5)
    assert [2 * x - 1 for x in r] == pytest.approx([0.333333, 0.333333, 0.333333, -1], abs=1e-6)
    a = advantages(spo(opponent="answer"), make_view(r, [0] * 4))
    assert a == pytest.approx([0.499999, 0.499999, 0.499999, -1.499996], abs=1e-6)
    assert advantages(spo(opponent="answer", scale=False), make_view(r, [0] * 4)) == pytest.approx([x - 0.5 for x in r])
    assert win_rates([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]) == [0.5] * 3  # a cycle alone: nothing to learn
    assert advantages(spo(opponent="answer"), make_view([0.5] * 3, [0] * 3)) == [0.0] * 3


def test_a_winner_of_all_and_two_samples():
    assert win_rates([[0.5, 1, 1], [0, 0.5, 0.3], [0, 0.7, 0.5]]) == pytest.approx([1.0, 0.15, 0.35])
    assert win_rates([[0.5, 0.8], [0.2, 0.5]]) == [0.8, 0.2]


def test_both_orders_are_averaged():
    """Whoever always prefers the first place says nothing; W_ij + W_ji = 1, and the mean of a group is 1/2, for any judge."""
    first = [[None, 1.0, 1.0], [1.0, None, 1.0], [1.0, 1.0, None]]
    assert win_rates(win_matrix(first)) == [0.5] * 3
    g = torch.Generator().manual_seed(0)
    p = torch.rand((5, 5), generator=g).tolist()
    w = win_matrix(p)
    assert all(w[i][j] + w[j][i] == pytest.approx(1) for i in range(5) for j in range(5) if i != j)
    assert w[0][3] == pytest.approx((p[0][3] + 1 - p[3][0]) / 2) and sum(win_rates(w)) / 5 == pytest.approx(0.5)


def test_what_was_not_judged_is_missing():
    p = [[None, 0.8, None], [None, None, None], [None, None, None]]
    assert win_matrix(p)[0][1] == 0.8 and win_matrix(p)[1][0] == pytest.approx(0.2)
    assert win_rates(win_matrix(p)) == [0.8, pytest.approx(0.2), None]


def test_scores_give_a_grid_of_ranks():
    assert by_score([0.9, 0.1, 0.5, 0.7]) == pytest.approx([1, 0, 1 / 3, 2 / 3])
    assert by_score([1.0, 0.0, 0.0, None]) == [1.0, 0.25, 0.25, 0.5]  # the unjudged one counts nowhere; credit gives it 0
    assert by_score([0.3, 0.7, 0.7], [0, 1, 1]) == [0.5, 0.5, 0.5]
    explicit = [[0.5 if x == y else float(x > y) for y in (0.2, 0.9, 0.2, 0.4)] for x in (0.2, 0.9, 0.2, 0.4)]
    assert by_score([0.2, 0.9, 0.2, 0.4]) == pytest.approx(win_rates(explicit))
    assert by_score([0.2, 0.9, 0.2, 0.4]) == by_score([0.01, 1.0, 0.01, 0.02])  # the order alone


def test_with_two_scores_it_is_grpo():
    view = make_view([1, 0, 0, 1, None, 0, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1])
    assert advantages(spo(), view) == pytest.approx(advantages(grpo(), view), abs=1e-5)
    graded = make_view([1.0, 0.9, 0.0], [0, 0, 0])
    assert advantages(spo(), graded) == pytest.approx([1, 0, -1], abs=1e-5) and advantages(grpo(), graded)[1] > 0.4


def collect(verify, **keys):
    asked = []

    class Scores:
        def score(self, items):
            asked.extend((p.answer, p.meta, text) for p, text in items)
            return [verify(p, text) for p, text in items]

    io = RolloutIO(TableEngine(CHAT, lambda r: TEXTS[int(r.seed[3])]), Scores(), CHAT, Memory(), Sampling(8), 4, (0, 1))
    rule = spo(**keys)
    prompts = [Prompt("p", ({"role": "user", "content": "1+1="},), "gold", {"solution": "s"})]
    (group,) = asyncio.run(rule.collect(prompts, io))
    return group.samples, asked, io


def longer(prompt, text):
    """Prefers the longer text, and the one it is shown first where they differ by one character only."""
    gap = len(text) - len(prompt.answer)
    return Verdict(1.0 if gap > -2 else 0.0)


def test_siblings_are_compared_in_both_orders():
    samples, asked, io = collect(longer, opponent="answer")
    assert len(asked) == 12 and ("123", {"solution": "s"}, "12") in asked and ("12", {"solution": "s"}, "123") in asked
    assert [s.reward for s in samples] == pytest.approx([(0.5 + 0.5 + 0) / 3, (0.5 + 1 + 0.5) / 3, (0.5 + 0 + 0) / 3, (1 + 0.5 + 1) / 3])
    assert io.noted["rule/ties_share"] == [3.0, 6.0] and all(s.weights == {"policy": 1.0} and s.role == "policy" for s in samples)
    samples, asked, _ = collect(lambda p, t: longer(p, t), opponent="answer", both_ways=False)
    assert len(asked) == 6 and sum(s.reward for s in samples) == pytest.approx(2.0)


def test_the_opponent_may_stand_in_a_column():
    samples, asked, _ = collect(lambda p, t: Verdict(float(len(t) > len(p.meta["sibling"]))), opponent="sibling")
    assert [s.reward for s in samples] == pytest.approx([1 / 3, 2 / 3, 0, 1])
    assert all(answer == "gold" and meta["solution"] == "s" for answer, meta, _ in asked)


def test_nothing_judged_is_no_reward():
    samples, _, io = collect(lambda p, t: Verdict(None, "timeout"), opponent="answer")
    assert all(s.reward is None and s.weights == {"policy": 0.0} and s.verdict.status == "error" for s in samples) and not io.noted


def test_the_pairwise_judge_is_such_a_verifier():
    """A model behind an endpoint that names the longer one: in both orders, so once a pair is enough."""

    def script(call, n):
        shown = call.body["messages"][-1]["content"]
        a, b = (shown.partition(f" {name}>\n")[2].partition("\n</")[0] for name in ("A", "B"))
        return {"reason": "", "winner": "A" if len(a) > len(b) else "B"}

    with EndpointServer(script) as server:
        verify = judge(model="m", base_url=server.base_url, cache="", form="pairwise", reference="sibling")
        samples, asked, _ = collect(lambda p, t: asyncio.run(verify(p, t)), opponent="sibling", both_ways=False)
        assert len(server.calls) == 2 * len(asked) == 12
    assert [s.reward for s in samples] == pytest.approx([1 / 3, 2 / 3, 0, 1])


def test_keys_are_checked():
    with pytest.raises(ValueError, match="both_ways does nothing"):
        spo(both_ways=False)

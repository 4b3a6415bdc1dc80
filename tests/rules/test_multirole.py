"""MultiRole-R1: the specification's text and rewards, the edges of each measure, and what diversity does to solved groups."""

import asyncio

import pytest

from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.records import Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules import grpo
from llmrl.rules.multirole import PARTS, measures, multirole
from tests.builders import f64, make_view

TEXT = "as a nurse i agree . as a lawyer i do not agree . why not ?"
WORDS = frozenset({"a", "as", "i", "do", "not", "why", "the", "of"})


def advantages(rule, scores, diversity):
    view = make_view(scores, [0] * len(scores), streams={"diversity": [[d] for d in diversity]})
    return rule.credit.update(view, rule.credit.init())[0].tolist()


def test_worked_text():
    got = measures(TEXT, WORDS)
    want = {
        "lexical": 0.642857, "entropy": 0.975755, "sentence_length": 0.440315, "sentence_type": 0.579380, "adjacency": 0.687500, "yule": 0.001956,
        "bigram": 0.923077, "function_words": 0.840643,
    }  # fmt: skip
    assert got == pytest.approx(want, abs=1e-6)
    assert sum(got.values()) / 8 == pytest.approx(0.636435, abs=1e-6)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([1, 1, 1, 1], [0.387268, -0.387268, -1.161805, 1.161805]), ([1, 0, 1, 0], [0.885261, -0.885261, 0.846349, -0.846349])],
)
def test_worked_rewards(scores, expected):
    assert advantages(multirole(), scores, [0.8, 0.7, 0.6, 0.9]) == pytest.approx(expected, abs=1.1e-6)


def test_worked_variance():
    """Var[R] = delta^2 Var[acc] + (1-delta)^2 Var[div] + 2 delta (1-delta) Cov."""
    acc, div = f64([1, 0, 1, 0]), f64([0.8, 0.7, 0.6, 0.9])
    r = 0.9 * acc + 0.1 * div
    assert float(r.var(correction=0)) == pytest.approx(0.198125)
    cov = ((acc - acc.mean()) * (div - div.mean())).mean()
    assert float(0.81 * acc.var(correction=0) + 0.01 * div.var(correction=0) + 0.18 * cov) == pytest.approx(0.198125)


def test_limits():
    scores, div = [1, 0, 1, 0], [0.8, 0.7, 0.6, 0.9]
    plain = grpo.grpo().credit.update(make_view(scores, [0] * 4), grpo.grpo().credit.init())[0].tolist()
    assert advantages(multirole(diversity=0.0), scores, div) == plain
    alone = advantages(multirole(diversity=1.0), scores, div)
    assert alone == pytest.approx(advantages(multirole(diversity=1.0), [1] * 4, div))
    for d in (0.05, 0.3):  # a solved group: diversity alone, whatever its weight
        assert advantages(multirole(diversity=d), [1] * 4, div) == pytest.approx(alone, rel=1e-3)
        assert min(advantages(multirole(diversity=d), [1, 0], [0.0, 1.0])[:1]) > 0  # any right beats any wrong


def test_edges_of_the_measures():
    one = measures("no no no no")
    assert (one["lexical"], one["entropy"], one["bigram"]) == (0.25, 0.0, pytest.approx(1 / 3))
    distinct = measures("one two three four")
    assert [distinct[k] for k in ("lexical", "entropy", "yule", "bigram")] == pytest.approx([1.0] * 4)
    assert [distinct[k] for k in ("sentence_length", "sentence_type", "adjacency")] == [0.0] * 3  # a single sentence
    uneven = "a. " * 20 + " ".join(f"w{i}" for i in range(100)) + "."
    assert measures(uneven)["sentence_length"] == 1.0  # the coefficient of variation is above 1 here
    for text in ("", "...", " ?! "):
        assert set(measures(text).values()) == {0.0}
    assert all(0 <= x <= 1 for t in (TEXT, uneven, "x", "1+2=3. Why? No!", "ja " * 3000) for x in measures(t).values())


def test_collect_measures_texts_and_notes_the_parts():
    chat = Chat(char_tokenizer("abcdefghijklmnopqrstuvwxyz .?"))

    class Right:
        def score(self, items):
            return [Verdict(1.0) for _ in items]

    replies = iter([TEXT, "as as as as"])
    io = RolloutIO(TableEngine(chat, lambda r: next(replies)), Right(), chat, Memory(), Sampling(80), 2, (0, 1))
    (group,) = asyncio.run(multirole(parts=("lexical", "bigram")).collect([Prompt("p", ({"role": "user", "content": "ab"},))], io))
    got = [s.streams["diversity"][0] for s in group.samples]
    assert got == pytest.approx([(0.642857 + 0.923077) / 2, (1 / 4 + 1 / 3) / 2], abs=1e-6)
    assert io.noted["rule/diversity_lexical"] == pytest.approx([0.892857, 2.0], abs=1e-6) and "rule/diversity_yule" not in io.noted
    assert len(PARTS) == 8
    for keys in ({"diversity": 1.2}, {"parts": ()}):
        with pytest.raises(ValueError, match="multirole"):
            multirole(**keys)

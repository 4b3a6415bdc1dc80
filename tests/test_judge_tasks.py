"""Rows of three kinds and demonstrations of two roles: what they say is true as often as stated, and the rule reads and writes the same prompts."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.judge_tasks import role_demonstrations, three_kinds
from llmrl.memory import Memory
from llmrl.plugins import use
from llmrl.records import InputError, Prompt, Sampling
from llmrl.rollout import RolloutIO
from llmrl.rules.urpo import read_scores

ROWS = list(three_kinds(rows=600))
DEMOS = list(role_demonstrations(rows=600))


def value(expr):
    total, sign, number = 0, 1, ""
    for c in f"{expr}+":
        if c in "+-":
            total, sign, number = total + sign * int(number), 1 if c == "+" else -1, ""
        else:
            number += c
    return str(total)


def test_the_three_kinds():
    assert three_kinds(rows=9).__next__() == ROWS[0] and all(150 < n < 250 for n in Counter(r["kind"] for r in ROWS).values())
    for r in ROWS:
        assert r["answer"] == value(r["prompt"][:-1])
        if r["kind"] == "pref":
            assert r["ranking"] == [float(t.rpartition("#")[2] == r["answer"]) for t in r["candidates"]] and set(r["ranking"]) == {0.0, 1.0}
            assert len(r["candidates"]) == 4
    first = Counter(r["ranking"][0] for r in ROWS if r["kind"] == "pref")
    assert min(first.values()) > 50  # no place tells the answer


def test_no_problem_is_both_demonstrated_and_trained_on():
    own, shown = ({r["prompt"].split("\n")[0] for r in rows} for rows in (three_kinds(rows=5000), role_demonstrations(rows=5000)))
    assert not own & shown and len(own | shown) == 2916 and abs(len(own) - 1458) < 150


def test_demonstrations_are_right_as_often_as_they_say():
    hits, judged, careful, solved = 0, 0, 0, 0
    for d in DEMOS:
        if not d["prompt"].endswith("?"):
            solved, careful = solved + 1, careful + (";" in d["solution"])
            continue
        texts = [line.partition(": ")[2] for line in d["prompt"].split("\n")[1:-1]]
        scores = read_scores(d["solution"], len(texts))
        assert scores is not None and set(scores) <= {9.0, 2.0}
        hits += sum((s == 9.0) == (t.rpartition("#")[2] == d["answer"]) for s, t in zip(scores, texts, strict=True))
        judged += len(texts)
    assert hits / judged == pytest.approx(0.4 + 0.6 / 2, abs=0.04) and careful / solved == pytest.approx(0.4, abs=0.06) and judged > 1000


def test_the_rule_asks_in_the_form_that_was_demonstrated():
    chat = Chat(char_tokenizer("0123456789+-*=;#() :?\n"))
    io = RolloutIO(TableEngine(chat, lambda r: "1:9;2:2;3:9;4:2"), None, chat, Memory(), Sampling(24), 2, (0, 1))
    row = next(r for r in ROWS if r["kind"] == "pref")
    prompt = Prompt(row["id"], ({"role": "user", "content": row["prompt"]},), row["answer"], {k: row[k] for k in ("kind", "candidates", "ranking")})
    rule = use("urpo", {"template": "tiny"}, home="llmrl.rules", base=Path(), where="[rule]")
    (group,) = asyncio.run(rule.collect([prompt], io))
    asked = chat.text(group.samples[0].context_ids)
    assert sorted(line[3:] for line in asked.split("\n")[1:-1]) == sorted(row["candidates"])
    assert asked == row["prompt"] + "".join(f"\n{k + 1}: {line[3:]}" for k, line in enumerate(asked.split("\n")[1:-1])) + "\n?"
    assert all(chat.unknown(d["prompt"] + d["solution"]) is None for d in DEMOS) and all(-1 <= s.reward <= 1 for s in group.samples)


def test_arguments_are_checked():
    for make in (lambda: three_kinds(candidates=1), lambda: three_kinds(verif=0.8, pref=0.4), lambda: role_demonstrations(judge=2.0)):
        with pytest.raises(InputError, match=r"data.args"):
            next(make())

"""Golden tables: (gold, response, score); None = status "error", "-" = status "no_answer". Responses are as models write them."""

import asyncio
import gzip
import inspect
import json
import re
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmrl import plugins
from llmrl.records import InputError, Prompt, Verdict, Verifier
from llmrl.rewards.choice import choice
from llmrl.rewards.combine import combine
from llmrl.rewards.environment import environment
from llmrl.rewards.exact import exact
from llmrl.rewards.extract import boxed, phrased
from llmrl.rewards.format import format as form
from llmrl.rewards.math_answer import math_answer
from llmrl.rewards.numeric import numeric
from llmrl.rewards.process import process, step_ends
from llmrl.rewards.selfcheck import check_verifier, gold_forms
from llmrl.rewards.trl import trl
from llmrl.scoring import Scorer

HERE = Path(".")
DATA = Path(__file__).parents[1].parent / "shared" / "data"


def judge(verifier: Verifier, gold: str | None, response: str, question: str = "", **meta: Any) -> Verdict:
    verdict = verifier(Prompt("p", ({"role": "user", "content": question},), gold, meta), response)
    assert isinstance(verdict, Verdict)
    return verdict


def outcome(verdict: Verdict) -> float | str | None:
    return "-" if verdict.status == "no_answer" else verdict.score


def wrong_rows(verifier: Verifier, rows: Iterable[tuple[str | None, str, float | str | None]]) -> list[tuple[Any, ...]]:
    judged = [(gold, response, expected, judge(verifier, gold, response)) for gold, response, expected in rows]
    return [row for row in judged if outcome(row[3]) != row[2]]


MATH = [
    (r"\frac{14}{3}", r"$f(-2)+f(-1)+f(0)=2+\frac{5}{3}+1=\boxed{\frac{14}{3}}$", 1.0),
    (r"\frac{14}{3}", r"\boxed{\dfrac{28}{6}}", 1.0),
    (r"\frac{14}{3}", r"\boxed{4.67}", 0.0),
    (r"\frac 59", "The probability is 5/9.", 1.0),
    (r"\left( 3, \frac{\pi}{2} \right)", r"Therefore, the polar coordinates are $\boxed{(3, \pi/2)}$.", 1.0),
    (r"\left( 3, \frac{\pi}{2} \right)", r"$\boxed{\left(\frac{\pi}{2}, 3\right)}$", 0.0),
    ("p - q", r"The sum is \boxed{-q + p}.", 1.0),
    (r"11\sqrt2", r"\[\boxed{11\sqrt{2}}\]", 1.0),
    (r"2\sqrt{13}", r"AB = \sqrt{52} = \boxed{\sqrt{52}}", 1.0),
    (r"\text{Evelyn}", r"Hence \boxed{\text{Evelyn}} has the greatest average speed.", 1.0),
    (r"\text{Evelyn}", "The answer is Evelyn.", 1.0),
    (r"\text{Evelyn}", "The answer is Briana.", 0.0),
    (r"\text{(C)}", r"so the answer is $\boxed{C}$", 1.0),
    (r"\text{even}", r"\boxed{\text{odd}}", 0.0),
    ("listen", r"\boxed{silent}", 0.0),
    (r"x^2+2x+1", r"\boxed{(x+1)^2}", 1.0),
    ("6 - 5i", r"w = \boxed{6-5i}", 1.0),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\boxed{\begin{pmatrix} \frac15 \\ -\frac{18}{5} \end{pmatrix}}", 1.0),
    (r"(-\infty, 2) \cup (3, \infty)", r"\boxed{(-\infty,2)\cup(3,\infty)}", 1.0),
    (r"(-\infty, 2) \cup (3, \infty)", r"\boxed{(-\infty,2]\cup(3,\infty)}", 0.0),
    (r"x \in [-2,7]", r"\boxed{[-2,7]}", 1.0),
    ("1,-2", r"The roots are $x = \boxed{-2, 1}$.", 1.0),
    ("1,-2", r"\boxed{1}", 0.0),
    (r"\pm 2", r"\boxed{2, -2}", 1.0),
    (r"90^\circ", r"\angle ABC = \boxed{90}", 1.0),
    (r"10\%", r"\boxed{10}", 1.0),
    (r"\$18.90", r"The total is \boxed{18.90}.", 1.0),
    (r"11,\! 111,\! 111,\! 100", r"The answer is $11111111100$.", 1.0),
    (r"5 \text{ cm}", r"\boxed{5\ \mathrm{cm}}", 1.0),
    (r"\frac{7}{2}", r"It takes \boxed{3 1/2} hours", 1.0),
    (r"3\frac{1}{2}", r"\boxed{3.5}", 1.0),
    ("5", r"Thus $\boxed{x = 5}$.", 1.0),
    (r"2516_8", r"\boxed{2516_8}", 1.0),
    ("18", "She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer's market.\n#### 18", 1.0),
    ("18", "Step 1: 16 - 3 - 4 = 9.\nStep 2: 9 * 2 = 18.\n\n**Final Answer:** $18 per day", 1.0),
    ("18", "She has 9 eggs left. She sells them for 18 dollars.", 1.0),
    ("18", "A: 26", 0.0),
    ("1250", "The final answer is 1,250. I hope it is correct.", 1.0),
    ("18", r"First I get \boxed{18}. Wait, that is wrong: \boxed{26}.", 0.0),
    ("18", "I cannot solve this.", "-"),
    ("18", "", "-"),
    ("18", r"\boxed{}", "-"),
    ("18", r"\boxed{" + "18 or " * 200 + "}", "-"),
    ("18", r"which makes $\boxed{18", "-"),  # cut at the length limit: an unclosed box is no box
    (None, r"\boxed{18}", None),
    ("", r"\boxed{18}", None),
    (r"\frac{}{", r"\boxed{18}", None),
]


def test_math_answer_on_real_notation() -> None:
    assert not wrong_rows(math_answer(), MATH)


def test_math_answer_strict_wants_one_boxed_answer() -> None:
    rows = [
        ("18", r"\boxed{18}", 1.0),
        ("18", r"so \boxed{18}. Therefore the answer is \boxed{18.0}", 1.0),
        (r"\frac12", r"\boxed{0.5} = \boxed{\frac{1}{2}}", 1.0),
        ("18", r"\boxed{17} or \boxed{18}", "-"),
        ("18", " ".join(rf"\boxed{{{i}}}" for i in range(5000)), "-"),
        ("18", "The answer is 18", "-"),
        ("18", r"\boxed{19}", 0.0),
    ]
    assert not wrong_rows(math_answer(strict=True), rows)


NUMBERS = [
    ("72", "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72", 1.0),
    ("72", "#### 71", 0.0),
    ("842", "The teacher has 900 bottles - 58 bottles = <<900-58=842>>842 bottles of apple juice for herself.\nA: 842", 1.0),
    ("5", "That is 150 / 25.0 = 6.0\nA: 6", 0.0),
    ("1250", "It costs $1,250.00 in total.", 1.0),
    ("1250000", r"\boxed{1{,}250{,}000}", 1.0),
    ("1250000", r"\boxed{1,\!250,\!000}", 1.0),
    ("-5", "so the temperature is \u22125 degrees", 1.0),
    ("-5", "he owes -$5", 1.0),
    ("4", "8, i.e. 12-8=4", 1.0),
    ("8", "it is 12-8", 1.0),
    ("0.75", "Answer: 3/4", 1.0),
    ("3/4", r"\boxed{\dfrac{3}{4}}", 1.0),
    ("2.5", r"\boxed{2\frac{1}{2}}", 1.0),
    ("1.75", "It takes 1 3/4 hours", 1.0),
    ("-3/4", r"\boxed{-\frac{3}{4}}", 1.0),
    ("0.25", "That is 25%.", 1.0),
    ("25", "That is 25%.", 1.0),
    ("25%", r"\boxed{0.25}", 1.0),
    ("25%", r"\boxed{2.5\%}", 0.0),
    ("6000", r"about 6 \times 10^{3} people", 1.0),
    ("0.0015", "1.5e-3", 1.0),
    (".5", "0.50", 1.0),
    ("18", "18.", 1.0),
    ("18", "The answer is 18 dollars for 3 days of work.", 1.0),
    ("7", "The answer is 3 + 4 = 7", 1.0),
    ("18", r"I first thought 17, \boxed{18}. (See step 3.)", 1.0),
    ("10", "ten", "-"),
    ("10", "", "-"),
    ("10", "1e999999999999", 0.0),
    ("10", "9" * 100_000, "-"),
    ("1", "1/0", "-"),
    ("ten", "10", None),
    (None, "10", None),
]


def test_numeric_on_real_outputs() -> None:
    assert not wrong_rows(numeric(), NUMBERS)


def test_numeric_tolerances_and_places() -> None:
    assert not wrong_rows(numeric(rel_tol=0.02), [("100", "102", 1.0), ("100", "102.01", 0.0), ("-100", "-98", 1.0)])
    assert not wrong_rows(numeric(abs_tol=0.01), [("3.14159", "3.14", 1.0), ("3.14159", "3.13", 0.0)])
    assert not wrong_rows(numeric(abs_tol=0.0), [("0.3", "0.3", 1.0), ("0.1", "1/10", 1.0), ("0.333333", "1/3", 0.0)])
    assert not wrong_rows(numeric(extract="last"), [("3", r"\boxed{18} see step 3", 1.0), ("18", r"\boxed{18} see step 3", 0.0)])
    assert not wrong_rows(numeric(extract="boxed"), [("18", "18", "-"), ("18", r"\boxed{18} 3", 1.0)])
    assert not wrong_rows(numeric(extract="hash"), [("18", r"\boxed{18}", "-"), ("18", "#### 18 (3 steps)\n4", 1.0)])
    assert not wrong_rows(numeric(percent=False), [("25", "25%", 0.0), ("0.25", "25%", 1.0), ("25%", "0.25", 1.0), ("25%", "25", 0.0)])
    with pytest.raises(ValueError, match="abs_tol"):
        numeric(abs_tol=-1)


def test_exact() -> None:
    assert not wrong_rows(exact(after="#"), [("30", "3*10=30#30", 1.0), ("30", "#29#30\nand more", 1.0), ("30", "30", "-"), ("30", "30#", "-")])
    assert not wrong_rows(exact(), [("Paris", "On the Seine:\n  paris. \n\n", 1.0), ("Paris", "Paris\nLyon", 0.0), (None, "Paris", None)])
    assert not wrong_rows(exact(full=True), [("a b", " a\n\tb.", 1.0), ("a b", "so a b", 0.0), ("a", " ", "-")])
    assert not wrong_rows(exact(ignore_case=False), [("Na", "NA", 0.0), ("Na", "Na", 1.0)])
    with pytest.raises(ValueError, match="not both"):
        exact(after="#", full=True)


QUESTION = "Which?\nA) 5(√3 + 1)\nB) 6(√3 + √2)\nC) None of these\nD) None\nE) new york"


@pytest.mark.parametrize(
    ("gold", "response", "expected"),
    [
        ("A", "A", 1.0),
        ("A", " a. ", 1.0),
        ("A", "(A)", 1.0),
        ("A", "A) 5(√3 + 1)", 1.0),
        ("A", "The correct answer is: (A) 5(√3 + 1).", 1.0),
        ("A", "The answer is **A**.", 1.0),
        ("A", r"so we choose $\boxed{\text{(A)}}$", 1.0),
        ("B", "Option A is too small. Therefore the answer is option B.", 1.0),
        ("B", "(A) is too small, (C) is silly.\nAnswer: B", 1.0),
        ("E", "I would go to New York.", 1.0),
        ("New York", "E", 1.0),
        ("C", "the answer is none of these", 1.0),
        ("D", "none", 1.0),
        ("A", "The answer is A or B", "-"),
        ("A", "The answer is (A) and (B).", "-"),
        ("A", "A, B, C, D and E are possible", "-"),
        ("A", "A revolving door", "-"),
        ("A", "I do not know", "-"),
        ("A", "", "-"),
        ("A", "The answer is (B). Though (A) is close.", 0.0),
        ("A", "Final answer: E", 0.0),
        ("Z", "A", None),
        (None, "A", None),
    ],
)
def test_choice(gold: str | None, response: str, expected: float | str | None) -> None:
    assert outcome(judge(choice(), gold, response, QUESTION)) == expected


def test_choice_takes_options_from_the_row_and_lives_without() -> None:
    assert judge(choice(), "B", "It is a department store.", choices=["bank", "department store", "mall"]).score == 1.0
    assert judge(choice(), "B", "It is a department store or a mall.", choices=["bank", "department store", "mall"]).status == "no_answer"
    assert judge(choice(), "D", "The answer is (D)").score == 1.0
    assert judge(choice(), "D", "The answer is (D)", choices=["x", "y", "z"]).status == "error"


def test_format() -> None:
    tags = form(tags=["think", "answer"])
    assert judge(tags, None, "<think>a</think>\n<answer>4</answer>").score == 1.0
    for bad in (
        "<think>a</think>",
        "<answer>4</answer><think>a</think>",
        "<think>a<answer>4</answer></think>",
        "<think> </think><answer>4</answer>",
    ):
        verdict = judge(tags, None, bad)
        assert (verdict.score, verdict.status) == (0.0, "ok") and verdict.detail
    assert [judge(form(regex=r".*#\d+"), "x", r).score for r in ("a\n#12", "#12 b")] == [1.0, 0.0]
    assert [judge(form(boxed=True), "x", r).score for r in (r"\boxed{4}", r"\boxed{}", r"\boxed{4}\boxed{4}", "4")] == [1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="nothing to check"):
        form()
    with pytest.raises(ValueError, match="no regular expression"):
        form(regex="(")


def test_boxed_and_phrased_are_exact_and_linear() -> None:
    assert boxed(r"\boxed{\frac{1}{2}} x \fbox{\{1, 2\}} y \boxed {3 \boxed{4}} \boxed{5") == [r"\frac{1}{2}", r"\{1, 2\}", r"3 \boxed{4}"]
    assert boxed(r"} { \boxed{7}") == ["7"]
    assert phrased("The answer is 3.5 apples. The final answer is **4.5** km. Bye.") == "4.5** km"
    assert phrased("no such thing") is None
    started = time.monotonic()
    for hostile in (r"\boxed{" * 20_000, "{" * 100_000, "answer " * 20_000, "#### " * 20_000):
        boxed(hostile)
        phrased(hostile)
    assert time.monotonic() - started < 2


PARTS: list[dict[str, Any]] = [{"use": "numeric", "weight": 0.75, "extract": "last"}, {"use": "format", "boxed": True, "weight": 0.25}]


def test_combine_arithmetic() -> None:
    total = combine(parts=PARTS)
    responses = [r"\boxed{4}", "4", r"\boxed{5}", "5", "five"]
    assert [judge(total, "4", r).score for r in responses] == [1.0, 0.75, 0.25, 0.0, 0.0]
    verdict = judge(total, "4", "4")
    assert verdict.answer == "4" and "numeric 1 x 0.75" in verdict.detail and "format 0 x 0.25" in verdict.detail
    assert judge(total, "4", "five").status == "no_answer"
    product = combine(parts=[{"use": "numeric", "weight": 2}, {"use": "combine", "parts": PARTS}], how="product")
    assert [judge(product, "4", r).score for r in ("4", r"\boxed{4}", "5")] == [0.75, 1.0, 0.0]
    gate = combine(parts=[{"use": "format", "boxed": True}, {"use": "numeric"}], how="gate")
    assert [judge(gate, "4", r).score for r in responses] == [1.0, 0.0, 0.0, 0.0, 0.0]
    tenth = combine(parts=[{"use": "numeric", "weight": 0.1}] * 3)  # 0.1 + 0.1 + 0.1 is above 0.3 in floats
    assert judge(tenth, "4", "4").score == 1.0


def test_combine_leaves_unjudged_what_a_part_could_not_judge(tmp_path: Path) -> None:
    (tmp_path / "v.py").write_text(
        "from llmrl.records import Verdict\n"
        "def late():\n    async def verify(p, r):\n        return Verdict(0.5)\n    return verify\n"
        "def lost():\n    return lambda p, r: Verdict(None, 'timeout', detail='the judge is silent')\n"
    )
    lost = combine(parts=[{"use": "numeric"}, {"use": "./v.py:lost"}], base=tmp_path)
    verdict = judge(lost, "4", "4")
    assert (verdict.score, verdict.status) == (None, "timeout") and "the judge is silent" in verdict.detail
    assert judge(combine(parts=PARTS), None, "4").status == "error"
    waits = combine(parts=[{"use": "numeric"}, {"use": "./v.py:late"}], base=tmp_path)(Prompt("p", (), "4"), "4")
    assert inspect.iscoroutine(waits) and asyncio.run(waits).score == 0.75


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"parts": []}, "parts is empty"),
        ({"parts": [{"weight": 1}]}, r"parts\[0\]"),
        ({"parts": [{"use": "numeric", "weight": 0}]}, "above 0"),
        ({"parts": [{"use": "numeric"}], "how": "gate"}, "second part"),
        ({"parts": [{"use": "numeric", "weight": 1.0}, {"use": "exact"}], "how": "gate"}, "would do nothing"),
        ({"parts": [{"use": "numeric"}, {"use": "numeric", "tol": 1}]}, r"\[verifier\] parts\[1\].*tol"),
    ],
)
def test_combine_refuses(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plugins.use("combine", keys, home="llmrl.rewards", base=HERE, where="[verifier]")


JUDGE = """
from llmrl.records import Verdict
def told():
    def verify(prompt, response):  # the last step's number
        step = response.replace(";", "").split()[-1]
        return Verdict(None, "timeout", detail="silent") if step == "?" else Verdict(float(step))
    return verify
def late():
    async def verify(prompt, response):
        return told()(prompt, response)
    return verify
"""


@pytest.mark.parametrize("name", ["told", "late"])
def test_a_process_reward_joins_the_scores_of_the_steps(tmp_path: Path, name: str) -> None:
    (tmp_path / "v.py").write_text(JUDGE)

    def score(response: str, **keys: Any) -> Verdict:
        found = process(of={"use": f"./v.py:{name}"}, base=tmp_path, **keys)(Prompt("p", (), "4"), response)
        return asyncio.run(found) if inspect.iscoroutine(found) else found

    steps = "0.9\n0.4\n\n0.7"
    by_hand = {"min": 0.4, "mean": 2.0 / 3, "product": 0.252, "last": 0.7}
    assert {how: score(steps, reduce=how).score for how in by_hand} == pytest.approx(by_hand, abs=1e-12)
    assert score(steps, most=2).score == 0.7 and score(steps, most=1, reduce="mean").score == 0.7  # the rest is one step
    assert score("0.9; 0.4; 0.7", split=";").score == 0.4 and "steps 0.9, 0.4, 0.7" in score("0.9; 0.4; 0.7", split=";").detail
    assert (score(" \n\n").score, score("").status) == (0.0, "no_answer")
    lost = score("0.9\n?\n0.7")
    assert (lost.score, lost.status) == (None, "timeout") and "steps 0.9, unjudged, 0.7: silent" in lost.detail


def test_the_score_filter_of_b_star(tmp_path: Path) -> None:
    """ORM + min(PRM) / 5: 1.08 and 0.16 in the paper's units, 1.2 of which are a score of 1."""
    (tmp_path / "v.py").write_text(JUDGE)
    both = combine(parts=[{"use": "numeric"}, {"use": "process", "of": {"use": "./v.py:told"}, "weight": 0.2}], base=tmp_path)
    assert judge(both, "0.7", "0.9\n0.4\n0.7").score == pytest.approx(1.08 / 1.2, abs=1e-12)
    assert judge(both, "0.7", "0.9\n0.8").score == pytest.approx(0.16 / 1.2, abs=1e-12)


def test_where_steps_end() -> None:
    ends = [step_ends(text, re.compile(r"\n+"), most) for text, most in (("ab\n\nc\n", 9), ("\n a\n", 9), ("a\nb\nc", 2), ("a\n \n", 9), ("", 9))]
    assert ends == [[4, 6], [4], [2, 5], [4], []]


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"of": {}}, "verifier of a step"), ({"of": {"use": "numeric"}, "most": 0}, "most = 0"), ({"of": {"use": "numeric"}, "split": "("}, "no pattern"),
     ({"of": {"use": "numeric", "tol": 1}}, r"\[verifier\] of.*tol")],
)  # fmt: skip
def test_process_refuses(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plugins.use("process", keys, home="llmrl.rewards", base=HERE, where="[verifier]")


TRL = """
def accuracy(completions, answer, **kwargs):
    return [1.0 if c.strip() == a else None if not c else -1.0 for c, a in zip(completions, answer)]
def chat(prompts, completions, level, **kwargs):
    assert prompts[0][0]["role"] == "user"
    return [float(level[0]) if c[0]["content"] else 0.0 for c in completions]
async def later(completions, **kwargs):
    return [0.25 for _ in completions]
def total(completions):
    return 0.5
"""


def test_trl_functions_plug_in_unchanged(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(TRL)

    def use(ref: str, **keys: Any) -> Verifier:
        return plugins.use(f"trl:./r.py:{ref}", keys, home="llmrl.rewards", base=tmp_path, where="[verifier]")

    signed = use("accuracy", low=-1.0)
    assert [judge(signed, "4", r).score for r in ("4 ", "5", "")] == [1.0, 0.0, None]
    out = judge(use("accuracy"), "4", "5")
    assert out.status == "error" and "-1.0" in out.detail and "low and high" in out.detail
    assert judge(use("chat", conversational=True), "4", "yes", level=0.5).score == 0.5
    hint = judge(use("chat", conversational=True), "4", "yes")
    assert hint.status == "error" and "level" in hint.detail
    texts = judge(use("total"), "4", "4")
    assert texts.status == "error" and "list of one number" in texts.detail
    with Scorer("trl:./r.py:later", {}, tmp_path, workers=1) as scorer:
        assert scorer.score([(Prompt("p", ()), "x")])[0].score == 0.25
    with pytest.raises(ValueError, match="below high"):
        trl(ref="./r.py:total", low=1.0, base=tmp_path)


NEED_A_MODEL = {"judge", "reward_model"}  # `llmrl check judge model=... base_url=...` is in test_judge.py
NO_RIGHT_ANSWER = {"environment"}  # judges what an environment left without a score, gold or none: 0, no_answer
MODULES = sorted(set(plugins.available("llmrl.rewards")) - NEED_A_MODEL - NO_RIGHT_ANSWER - {"trl"})


def test_no_module_is_left_out() -> None:
    assert {"math_answer", "numeric", "exact", "choice", "format", "regex", "length", "ifeval", "code_exec", "combine", "process"} == set(MODULES)


def test_an_episode_without_a_score_has_no_answer() -> None:
    verdict = environment()(Prompt("p", (), "7"), "7")
    assert isinstance(verdict, Verdict) and (verdict.score, verdict.status) == (0.0, "no_answer")


@pytest.mark.parametrize("name", MODULES)
def test_every_module_passes_its_own_contract(name: str) -> None:
    rows = check_verifier(name, {}, HERE, timeout_s=10.0 if name == "code_exec" else 2.0)
    assert [row for row in rows if not row.ok] == []
    assert [row.name for row in rows] == [
        "builds in a fresh process",
        "deterministic",
        "empty and 100 kB responses are judged",
        "the deadline holds",
        "a missing gold is no silent 0",
        "gold answers score 1",
        "self-check rows pass",
    ]


BROKEN = """
import os, random
from llmrl.records import Verdict
def bad():
    def verify(prompt, response):
        if len(response) > 50_000:
            raise MemoryError("too long")
        return Verdict(random.random() if response == "five" else float(response == str(prompt.answer)))
    return verify
bad.selfcheck = [("2+2", "4", "4", 1.0), ("2+2", "4", "four", 1.0)]
"""


def test_the_contract_names_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "v.py").write_text(BROKEN)
    rows = check_verifier("./v.py:bad", {}, tmp_path, timeout_s=1.0)
    failed = {row.name: row.detail for row in rows if not row.ok}
    assert failed["deterministic"] == "the verdict changes for 'five'"
    assert "100 kB of words: error MemoryError: too long" in failed["empty and 100 kB responses are judged"]
    assert "1 rows without a gold are graded" in failed["a missing gold is no silent 0"]
    assert failed["self-check rows pass"] == "1 of 2"
    assert any("'four'" in name and "expected 1.0, got 0.0" in detail for name, detail in failed.items())
    (row,) = check_verifier("./v.py:worse", {}, tmp_path)
    assert not row.ok and "worse" in row.detail
    assert gold_forms("4", {"after": "#"})["after #"] == "#4"


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_agreement_with_the_authors_labels_on_300_gsm8k_solutions() -> None:
    with gzip.open(DATA / "traces" / "gsm8k_model_solutions.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file][::8][:300]
    assert 60 < sum(r["final_answer_correct"] for r in rows) < 210
    items = [(Prompt(r["id"], (), r["gold_answer"]), "\n".join(r["steps"])) for r in rows]
    for name in ("numeric", "math_answer"):
        with Scorer(name, {}, HERE) as scorer:
            verdicts = scorer.score(items)
        assert [v.score for v in verdicts] == [float(r["final_answer_correct"]) for r in rows], name


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_math_answer_on_golds_and_solutions_of_math500() -> None:
    with gzip.open(DATA / "math" / "math500.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    golds = [Prompt(r["id"], (), r["answer"]) for r in rows]
    with Scorer("math_answer", {}, HERE) as scorer:
        assert {v.score for v in scorer.score([(p, r["solution"]) for p, r in zip(golds, rows, strict=True)])} == {1.0}
        other = [(p, rf"\boxed{{{q.answer}}}") for p, q in pairwise(golds) if p.answer != q.answer]
        passed = [(p.answer, r) for (p, r), v in zip(other, scorer.score(other), strict=True) if v.score != 0.0]
    assert passed == [("5", r"\boxed{x=5}")]

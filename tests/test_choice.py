"""Multiple choice: what responses of chat models choose, and the rates on real rows."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest

from llmrl.records import Prompt, Verdict, Verifier
from llmrl.rewards.choice import choice

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "choice"


def judge(verifier: Verifier, response: str, gold: str | None = None, question: str = "", **meta: Any) -> Verdict:
    verdict = verifier(Prompt("p", ({"role": "user", "content": question},), gold, meta), response)
    assert isinstance(verdict, Verdict)
    return verdict

QUESTION = "Where is a revolving door used for security?\nA) bank\nB) library\nC) department store\nD) mall"

CHOOSES_B = [
    "The correct answer is **B) library**.",
    "Answer: B",
    "B",
    "(b)",
    "b",
    "B.",
    "b)",
    "[B]",
    "**B**",
    "Option B is correct.",
    "\\boxed{\\text{(B)}}",
    "$\\boxed{B}$",
    "\\boxed{\\textbf{(B)}\\ library}",
    "\\[ \\boxed{\\text{B. library}} \\]",
    "\\boxed{library}",
    "The answer is not A but B",
    "The answer is B, not A.",
    "The answer is B rather than A.",
    "The answer is **B**.\n\nExplanation: A bank uses guards, so A is wrong. The answer choice C is wrong because it is open.",
    "**Correct Answer: B) library**\n\n**Explanation:**\n- A) bank: no.\n- C) department store: no.\n- D) mall: no.",
    "The correct option is B.",
    "The correct choice is (B).",
    "The best choice would be B.",
    "The right answer is: B",
    "Therefore, B.",
    "Thus, the answer is option (B): library.",
    "I would choose B because it is quiet.",
    "I'd go with B.",
    "I pick library.",
    "My answer is B",
    "My final answer: library",
    "So it must be (B), since (A) and (C) are loud.",
    "B is correct.",
    "B is the correct answer.",
    "(B) is the best answer here.",
    "**B) library** is the correct answer.",
    "Library is the correct answer.",
    "Option (B), library, is the most likely answer.",
    "Let's see. A is wrong. C is wrong. D is wrong. So B.",
    "B) library",
    "B: library",
    "B - library",
    "B. Library.",
    "Answer: (B) library, because it is quiet.",
    "Answer:\n\nB",
    "The answer is:\n\n**B) library**",
    "### Answer\nB",
    "#### B",
    "Answer: B\n\nA library is quiet. A bank is not.",
    "The answer is library (B).",
    "The answer is a library.",
    "The answer is 'library'.",
    "The answer is \"B\".",
    "Answer = B",
    "ANSWER: B",
    "answer: b",
    "The answer is: B.\nI hope it is correct.",
    "First I thought the answer is A. But on reflection, the answer is B.",
    "The answer cannot be A. The answer must be B.",
    "A library.",
    "Q: where?\nA: B",
    "A: library",
    "<think>The answer is A? No.</think>\nB",
    "<answer>B</answer>",
    "The correct answer is\\( B \\).",
    "Final Answer: The final answer is $\\boxed{B}$. I hope it is correct.",
    "The answer is $B$.",
    "Among these, the library uses it. Hence option B.",
    "The option that fits best is B.",
    "The answer is B; A and C are distractors.",
    "The answer is (B) library and (A) is wrong.",
    "So the answer is clearly B!",
    "The answer is B?",
    "I select option B: library.",
    "B, and not A.",
    "The answer is B. library",
    "The answer is (b).",
    "I would eliminate A and C. The answer is B",
    "Answer: B (library)",
    "Answer: **B** \u2013 library",
    "The answer is B\u2014the library.",
    "> B",
    "- B",
    "Answer\n------\nB",
    "B\n",
    "B\n\nB",
    "The answer should be B.",
    "The answer would be library.",
    "I believe the answer to this question is (B).",
    "So the correct answer is option B, library.",
    "Choice B is the right answer",
    "Therefore the best answer is\n\nB) library",
    "Therefore, the right choice: B.",
    "In conclusion, B is right.",
    "I think B is the correct answer.",
    "we get answer B",
    "Answer is B",
    "Ans: B",
    "Ans. (B)",
    "(B) library\n",
    "Final answer - (B)",
    "It's B.",
    "The library is the right place, so B.",
    "**B. library**\n\nThis fits since a mall is open.",
    "B) library\n\nIt has guards.",
    "The correct response is B.",
    "B\n\nExplanation: the other choices do not match.",
    "It is the library, because the others do not match.",
    "Conclusion: library",
    "A) bank is crowded.\nSo:\nB) library",
]
CHOOSES_ANOTHER = [
    "The answer is A.",
    "Option A is correct; B is not.",
    "B is incorrect. C is the correct answer.",
    "The answer is B... no wait, the answer is D.",
    "The answer is not B but A.",
    "The correct answer is C) department store, not B) library.",
    "D) mall is wrong. The answer is A.",
    "I'd go with the mall.",
    "Answer: C",
    "The correct answer is A) bank. B) library is wrong because it is quiet.",
    "mall",
    "Therefore, (D).",
]
CHOOSES_NONE = [
    "I choose the second option",
    "Option B is not correct.",
    "B is wrong.",
    "The answer is A or B.",
    "Both A and B are correct.",
    "It could be (A), (B) or (C).",
    "None of the above",
    "I am not sure.",
    "Neither A nor B is correct.",
    "The answer is unclear.",
    "I got an A in the exam",
    "A good question. I do not know.",
    "Vitamin C is the best.",
    "The answer is either B or C.",
    "What is the answer? Is it B?",
    "The answer is not A.",
    "The wrong answer is B.",
    "Which option is correct?",
    "\u7b54\u6848\uff1aB",
    "Of all options, B fits best.",
    "B, C",
    "(B) and (C)",
    "A/B",
    "Correct answer - B",
    "Option B is wrong.",
    "Option (B) is wrong.",
    "I can't choose B.",
    "A bank is wrong. (B) is not it either.",
    "The answer is B and C are wrong",
    "The answer is all of the above",
    "A) bank: no\nB) library: yes\nC) no\nD) no",
]


@pytest.mark.parametrize("response", CHOOSES_B)
def test_choice_reads_the_chosen_option(response: str) -> None:
    for meta in ({}, {"choices": ["bank", "library", "department store", "mall"]}):
        verdict = judge(choice(), response, "B", QUESTION, **meta)
        assert (verdict.score, verdict.status, verdict.answer) == (1.0, "ok", "B"), verdict
    assert judge(choice(), response, "C", QUESTION).score == 0.0
    assert judge(choice(), response, "library", QUESTION).score == 1.0


@pytest.mark.parametrize("response", CHOOSES_ANOTHER)
def test_choice_gives_0_for_another_option(response: str) -> None:
    verdict = judge(choice(), response, "B", QUESTION)
    assert (verdict.score, verdict.status) == (0.0, "ok") and verdict.answer in ("A", "C", "D"), verdict


@pytest.mark.parametrize("response", CHOOSES_NONE)
def test_choice_finds_no_answer_where_none_is_chosen(response: str) -> None:
    for gold in "ABCD":
        verdict = judge(choice(), response, gold, QUESTION)
        assert (verdict.score, verdict.status) == (0.0, "no_answer"), verdict


def test_choice_with_texts_that_hide_letters_or_are_alike() -> None:
    rows: list[tuple[list[str], str, str, float | None]] = [
        (["ejecta", "rims", "peaks", "A and B only"], "D", "The correct answer is **D) A and B only**.", 1.0),
        (["ejecta", "rims", "peaks", "A and B only"], "D", 'The answer is "A and B only".', 1.0),
        (["P(A|B) falls", "P(B|A) falls", "P(B) falls", "all"], "C", "I would choose P(B) falls.", 1.0),
        (["2c", "c", "0.8c", "0.5c"], "C", "The answer is c.", 0.0),  # the text of B
        (["2c", "c", "0.8c", "0.5c"], "C", "The answer is C.", 1.0),
        (["bb x bb", "Bb x Bb", "Bb x bb"], "B", "The answer is Bb x Bb", 1.0),
        (["bb x bb", "Bb x Bb", "Bb x bb"], "C", "The answer is Bb x Bb", 0.0),
        (["8.75", "8.79", "8.75"], "C", "The answer is 8.75.", 1.0),  # two options with one text
        (["8.75", "8.79", "8.75"], "C", "The answer is A.", 0.0),
        (["4", "4.5", "5"], "C", "So I would choose 5.", 1.0),
        (["4", "4.5", "5"], "A", "So I would choose 4.5.", 0.0),
        (["0.5*m*v", "m*v", "m"], "A", "The answer is **0.5*m*v**", 1.0),
        (["$61", "$65"], "A", "The final answer is \\$61.", 1.0),
        (["not enough data", "enough data"], "A", "The answer is not enough data.", 1.0),
        (["True", "False"], "B", "The statement is wrong.\nFalse", 1.0),
        (["yes", "no"], "B", "Answer: No", 1.0),
        (["x", "x"], "x", "B", 1.0),
        (["x", "y"], "z", "B", None),
    ]
    wrong = [(row, verdict) for row in rows if (verdict := judge(choice(), row[2], row[1], choices=row[0])).score != row[3]]
    assert not wrong


def test_choice_is_linear_in_the_response() -> None:
    started = time.monotonic()
    for text in ("The answer is A or B. ", "A: ", "A:\n", "(A) ", "B, ", "so ", "is the best ", "isn't ", "<answer>", "answer ", " ", "the "):
        for response in (text * (100_000 // len(text)), "The answer is " + text * 5000, rf"\boxed{{{text * 5000}}}"):
            judge(choice(), response, "A", QUESTION)
    assert time.monotonic() - started < 10


LETTER_FORMS = ["{L}", "({L})", "The answer is ({L}).", "**Answer: {L}**", "The correct answer is **{L}) {t}**.", "We compare.\n\n$\\boxed{{{L}}}$",
                "We look at each in turn. Therefore, the correct option is {L}.", "Option {L} is correct because it fits the question best."]  # fmt: skip
TEXT_FORMS = ["{t}", "The answer is {t}.", "So the final answer is: **{t}**", "Answer: {t}", "\\boxed{{\\text{{{t}}}}}",
              'We think.\nThe correct answer is "{t}".', "I would choose {t}.", "The others do not fit.\n{t}"]  # fmt: skip


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize(("name", "step"), [("aqua_test", 1), ("commonsenseqa_dev", 4), ("mmlu_stem_test", 8)])
def test_choice_on_real_rows(name: str, step: int) -> None:
    """Gold letter and gold text in 8 phrasings each score 1 on 99 % of the rows, another option 0 on 99 %."""
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][::step]
    verify, right, wrong = choice(), [], []
    for row in rows:
        gold = "ABCDEFGHIJ".index(row["answer"])
        other = (gold + 1) % len(row["choices"])
        for forms in (LETTER_FORMS, TEXT_FORMS):
            for text in forms:
                said = [text.format(L="ABCDEFGHIJ"[i], t=row["choices"][i]) for i in (gold, other)]
                right.append(judge(verify, said[0], row["answer"], row["prompt"], choices=row["choices"]).score == 1.0)
                wrong.append(judge(verify, said[1], row["answer"], row["prompt"], choices=row["choices"]).score == 0.0)
    assert sum(right) / len(right) >= 0.99 and sum(wrong) / len(wrong) >= 0.99

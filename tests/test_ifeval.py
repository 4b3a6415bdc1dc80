"""IFEval: every instruction against the authors' checker (golden verdicts), the counters, rows that are broken, the pool."""

import gzip
import importlib.util
import inspect
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from llmrl import plugins
from llmrl.records import InputError, Prompt, Verdict
from llmrl.rewards.ifeval import ifeval
from llmrl.rewards.instructions import INSTRUCTIONS, count_capital_words, count_sentences, language_of
from llmrl.scoring import Scorer

HERE = Path(".")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "ifeval.json").read_text(encoding="utf-8"))["rows"]
DATA = Path(__file__).parents[1].parent / "shared" / "data" / "format" / "ifeval_prompts.jsonl.gz"


def prompt(*pairs: tuple[str, dict[str, Any] | None]) -> Prompt:
    return Prompt("p", (), None, {"instruction_id_list": [name for name, _ in pairs], "kwargs": [kwargs for _, kwargs in pairs]})


def judge(row: Prompt, response: str, **keys: Any) -> Verdict:
    verdict = ifeval(**keys)(row, response)
    assert isinstance(verdict, Verdict)
    return verdict


@pytest.mark.parametrize("name", list(INSTRUCTIONS))
def test_every_instruction_agrees_with_the_authors_checker(name: str) -> None:
    rows = [row for row in GOLDEN if row["instruction"] == name]
    assert len(rows) >= 3 and {row["strict"] for row in rows} == {True, False}
    for row in rows:
        one = prompt((name, row["kwargs"]))
        assert judge(one, row["response"]).score == float(row["strict"]), row
        assert judge(one, row["response"], loose=True).score == float(row["loose"]), row


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", 0),
        ("No end", 1),
        ("One. Two! Three?", 3),
        ("Mr. Smith met Dr. Bo. They spoke.", 2),
        ("J. K. Rowling wrote it.", 1),
        ("It is 3.5 cm, v1.2.3 of example.com.", 1),
        ('He said "Stop!" and left.', 2),  # punkt ends a sentence at every ! and ?
        ('She asked: "Why?"\nNobody knew.', 2),
        ('(Really.) "Yes."', 2),
        ("1. Mix.\n2. Bake.", 4),  # and after the number of a list item
        ("Step 2. mix it", 1),
        ("Wait... what", 1),
        ("Wait... The end.", 2),
        ("**Bold.** More.", 2),
        ("P.S. I left. e.g. this", 4),
        ("It is 5 p.m. now. Go!", 2),
        ("I can't. i won't.", 2),
    ],
)
def test_sentences_are_counted_as_punkt_does(text: str, sentences: int) -> None:
    """Expected counts: nltk 3.10 with its English punkt model."""
    assert count_sentences(text) == sentences


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("NASA, ESA and JAXA!", 3),
        ("I'm HERE, DON'T go", 4),  # I, HERE, DO, N'T
        ("CANNOT A.M. MID-AGE (OK)", 5),
        ("**BOLD** 10AM 42 \u00c9T\u00c9", 3),
        ("none at all", 0),
    ],
)
def test_capital_words_are_cut_as_the_treebank_does(text: str, words: int) -> None:
    assert count_capital_words(text) == words


def test_language_is_guessed_the_same_way_every_time() -> None:
    assert {language_of("nur ein Wort") for _ in range(20)} == {language_of("nur ein Wort")}
    assert language_of("123 !?") is None
    assert language_of("\u042d\u0442\u043e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442") == "ru"


def test_all_or_nothing_partial_and_loose() -> None:
    row = prompt(("punctuation:no_comma", {}), ("startend:quotation", None), ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}))
    assert [judge(row, r).score for r in ('"one two three"', "one two three", "one, two")] == [1.0, 0.0, 0.0]
    assert [judge(row, r, partial=True).score for r in ('"one two three"', "one two three", "one, two")] == [1.0, 2 / 3, 0.0]
    assert judge(row, "one, two").detail == "not followed: punctuation:no_comma, startend:quotation, length_constraints:number_words"
    assert judge(row, "one two three").answer is None
    preface = 'Sure, gladly:\n"*one* two three"\nBye, then.'
    assert [judge(row, preface).score, judge(row, preface, loose=True).score] == [0.0, 1.0]
    # loose asks each instruction by itself: one may pass with the last line cut, another with the first
    split = prompt(("startend:end_checker", {"end_phrase": "END"}), ("combination:repeat_prompt", {"prompt_to_repeat": "GO"}))
    assert [judge(split, "Hi\nGO\nEND\nBye").score, judge(split, "Hi\nGO\nEND\nBye", loose=True).score] == [0.0, 1.0]
    assert [judge(row, r, partial=True, loose=True).score for r in ("", " \n ")] == [0.0, 0.0]


WORDS = "length_constraints:number_words"


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        ({}, "instruction_id_list is None"),
        ({"instruction_id_list": []}, r"instruction_id_list is \[\]"),
        ({"instruction_id_list": [WORDS], "kwargs": []}, "expected a list of 1 tables"),
        ({"instruction_id_list": [WORDS]}, "column kwargs is None"),
        ({"instruction_id_list": ["no:such"], "kwargs": [{}]}, "unknown instruction 'no:such'"),
        ({"instruction_id_list": [["no"]], "kwargs": [{}]}, "unknown instruction"),
        ({"instruction_id_list": [WORDS], "kwargs": [{"num_words": 3}]}, r"got \['num_words'\], expected \['num_words', 'relation'\]"),
        ({"instruction_id_list": [WORDS], "kwargs": [{"num_words": 3, "relation": None}]}, "kwargs of length_constraints:number_words"),
        ({"instruction_id_list": [WORDS], "kwargs": [{"num_words": 3, "relation": "around"}]}, '"less than" or "at least"'),
        ({"instruction_id_list": [WORDS], "kwargs": [{"num_words": "3", "relation": "at least"}]}, "a whole number from 0 on"),
        ({"instruction_id_list": [WORDS], "kwargs": [{"num_words": 2.5, "relation": "at least"}]}, "a whole number from 0 on"),
        ({"instruction_id_list": [WORDS], "kwargs": [{"num_words": float("nan"), "relation": "at least"}]}, "a whole number from 0 on"),
        ({"instruction_id_list": [WORDS], "kwargs": ["3"]}, "is no table"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": 3}]}, r"expected \[\]"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": []}]}, "a list of texts"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "word"}]}, "a list of texts"),
        (
            {
                "instruction_id_list": ["length_constraints:nth_paragraph_first_word"],
                "kwargs": [{"num_paragraphs": 2, "nth_paragraph": 0, "first_word": "a"}],
            },
            "counted from 1",
        ),
    ],
)
def test_a_broken_row_is_an_error_that_names_what_is_broken(meta: dict[str, Any], told: str) -> None:
    verdict = ifeval()(Prompt("p", (), None, meta), "Some response.")
    assert isinstance(verdict, Verdict) and verdict.status == "error" and verdict.score is None
    assert re.search(told, verdict.detail), verdict.detail


def test_nulls_are_ignored_and_counts_may_be_floats() -> None:
    row = prompt((WORDS, {"num_words": 3.0, "relation": "at least", "keywords": None, "num_highlights": None}))
    assert [judge(row, r).score for r in ("a b c", "a b")] == [1.0, 0.0]


def test_without_langdetect_it_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "langdetect" else found(name, *rest))
    with pytest.raises(InputError, match=r'pip install "llmrl\[ifeval\]"'):
        plugins.use("ifeval", {}, home="llmrl.rewards", base=HERE, where="[verifier]")


def test_self_check_rows_hold() -> None:
    for question, gold, response, expected, keys, meta in ifeval.selfcheck:  # type: ignore[attr-defined]
        verdict = ifeval(**keys)(Prompt("p", ({"role": "user", "content": question},), gold, meta), response)
        assert isinstance(verdict, Verdict) and verdict.score == expected, (response, keys, verdict)


HOSTILE = ["[" * 100_000, "<<" * 50_000, "*" * 100_000, "* " * 50_000, "\n" * 100_000, " " * 100_000, ". " * 50_000, "a." * 50_000, "{" * 100_000]


def test_hostile_responses_are_judged_in_time_by_every_instruction() -> None:
    kwargs = {row["instruction"]: row["kwargs"] for row in GOLDEN}
    verify = ifeval(loose=True)
    started = time.monotonic()
    for text in [*HOSTILE, '"' * 50_000, "SECTION 1 " * 10_000, "\ud83d \0 " * 1000, "DON'T " * 10_000]:
        verdict = verify(prompt(*kwargs.items()), text)
        assert isinstance(verdict, Verdict) and verdict.score == 0.0
    assert time.monotonic() - started < 15  # 13 texts x 25 instructions x up to 8 variants


def test_it_runs_in_the_pool() -> None:
    row = prompt(("punctuation:no_comma", {}), ("language:response_language", {"language": "en"}))
    with Scorer("ifeval", {"partial": True}, HERE, workers=1) as scorer:
        verdicts = scorer.score([(row, "This is an English sentence without any."), (row, "Dies ist, wie man sieht, Deutsch."), (Prompt("q", ()), "x")])
    assert [v.score for v in verdicts] == [1.0, 0.0, None]


@pytest.mark.skipif(not DATA.is_file(), reason="the shared data is not here")
def test_the_541_rows_of_the_paper_can_be_judged() -> None:
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    strict, partial = ifeval(), ifeval(partial=True)
    seen: set[str] = set()
    every_key = {p: None for f in INSTRUCTIONS.values() for p in inspect.signature(f).parameters if p != "text"}
    for row in rows:
        hub = [every_key | kwargs for kwargs in row["kwargs"]]  # google/IFEval fills what is not given with nulls
        one = Prompt(row["id"], (), None, {"instruction_id_list": row["instruction_id_list"], "kwargs": hub})
        for verify in (strict, partial):
            verdict = verify(one, "A short reply, with a comma.")
            assert isinstance(verdict, Verdict) and verdict.status == "ok", (row["id"], verdict)
        seen |= set(row["instruction_id_list"])
    assert len(rows) == 541 and seen == set(INSTRUCTIONS)

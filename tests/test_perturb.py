"""Perturbed problems: what must stay the same does, and a kind that does not apply says so."""

from __future__ import annotations

import random
import re

import pytest

from llmrl.evaluation.perturb import KINDS, NUMBER_WORDS, SENTENCES, Material, Perturbed, numbers, perturb, sum_of
from llmrl.tasks import chains, word_chains

DUCKS = (
    "Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins with 4,500.25 grams. "  # noqa: RUF001
    "She sells the remainder for $2 per fresh duck egg. How much in dollars does she make every day at the farmers' market?"
)
ALGEBRA = r"Suppose that $x^2 + abcdefgh = 12$ and \(lengthy\_name = 3\). Evaluate \frac{numerator}{2} carefully."
MATERIAL = Material(wrong="-3", step="3-6=-2;", sep=";", answer_mark="#")


def made(kind: str, text: str, seed: int = 0, material: Material = MATERIAL) -> Perturbed:
    new = perturb(kind, text, random.Random(seed), material)
    assert isinstance(new, Perturbed), new
    return new


@pytest.mark.parametrize("text", [DUCKS, *(row["prompt"] for row in word_chains(rows=5))])
@pytest.mark.parametrize("seed", range(8))
def test_english_edits_keep_the_numbers(text, seed):
    for kind in ("typos", "irrelevant", "reordered"):
        new = made(kind, text, seed).text
        assert new != text and numbers(new) == numbers(text)
    assert [w for w in re.findall(r"[a-z]+", made("typos", text, seed).text.lower()) if w in NUMBER_WORDS] == [
        w for w in re.findall(r"[a-z]+", text.lower()) if w in NUMBER_WORDS
    ]


@pytest.mark.parametrize("seed", range(8))
def test_typos_are_few_and_stay_out_of_mathematics(seed):
    new = made("typos", DUCKS, seed).text
    assert abs(len(new) - len(DUCKS)) <= round(0.02 * len(DUCKS))
    words = list(zip(DUCKS.split(), new.split(), strict=True))
    assert 1 <= sum(a != b for a, b in words) <= round(0.02 * len(DUCKS)) and all(a == b for a, b in words if re.search(r"\d", a))
    changed = made("typos", ALGEBRA, seed).text
    for kept in ("$x^2 + abcdefgh = 12$", r"\(lengthy\_name = 3\)", r"\frac{numerator}{2}"):
        assert kept in changed


def test_english_by_hand():
    text = "Tom has 3 pens. He buys 4 more. How many pens has he now?"
    assert made("reordered", text) == Perturbed("How many pens has he now? Tom has 3 pens. He buys 4 more.", "question first")
    new = made("irrelevant", text).text
    inside = next(s for s in SENTENCES if s in new)
    assert new.replace(inside + " ", "") == text and not re.search(r"\d", inside) and new.endswith("How many pens has he now?")
    assert made("misleading", text).text == text + "\nI think the answer is -3, but I am not sure."
    assert made("partial", text, material=Material(step="He has 3 - 4 pens.")).text == text + "\n\nThis is how far I have come:\nHe has 3 - 4 pens."


@pytest.mark.parametrize("row", list(chains(rows=60, terms=4)), ids=lambda row: row["id"])
def test_arithmetic_edits_keep_the_value(row):
    text, value = row["prompt"], int(row["answer"])
    assert sum_of(text) == value
    zero = made("irrelevant", text)
    assert zero.variant == "zero term" and sum_of(zero.text) == value and zero.text.count("+0") == text.count("+0") + 1
    reordered = perturb("reordered", text, random.Random(1), MATERIAL)
    if isinstance(reordered, Perturbed):
        assert sum_of(reordered.text) == value and numbers(reordered.text) == numbers(text) and reordered.text != text
    blanks = made("typos", text)
    assert blanks.variant == "blanks" and blanks.text.replace(" ", "") == text and len(blanks.text) == len(text) + 1
    assert made("misleading", text).text == f"#-3;{text}" and made("partial", text).text == f"3-6=-2;{text}"


@pytest.mark.parametrize(
    ("kind", "text", "material", "reason"),
    [
        ("typos", "A is 12 cm.", MATERIAL, "no word of 4 letters"),
        ("irrelevant", "3*4=", MATERIAL, "no plain sum"),
        ("reordered", "3-6-6=", MATERIAL, "every order"),
        ("reordered", "How many are 3 and 4?", MATERIAL, "a single sentence"),
        ("reordered", "Why? Tom has 3 pens. How many has he?", MATERIAL, "only question"),
        ("misleading", "3-6-1=", Material(wrong="2"), "signs are not known"),
        ("misleading", DUCKS, Material(), "no wrong answer"),
        ("partial", DUCKS, Material(), "no wrong step"),
        ("partial", "3-6-1=", Material(step="3-6=2"), "signs are not known"),
    ],
)
def test_what_does_not_apply_says_why(kind, text, material, reason):
    said = perturb(kind, text, random.Random(0), material)
    assert isinstance(said, str) and reason in said


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="typos"):
        perturb("typo", DUCKS, random.Random(0))
    assert len(KINDS) == 5

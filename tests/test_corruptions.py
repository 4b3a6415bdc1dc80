"""Cutting traces, rule-based edits and the gate: by hand, and on every sampled id boundary."""

from __future__ import annotations

import random

import pytest

from llmrl.chat import Chat, char_tokenizer
from llmrl.evaluation import corruptions
from llmrl.evaluation.corruptions import RULES, Cut, Gate, cut_back, equations_hold, split_dress, step_ends

CHAIN = "3-6=-3;-3-1=-4;-4+2=-2#-2"
CHAINS = Cut(";", "#")
PROSE = "He has 3 apples. He buys 2.5 kg more, i.e. two bags. Mr. Smith takes 1. So the answer is 4. Done."


def ids_of(text: str) -> tuple[list[int], Chat]:
    chat = Chat(char_tokenizer("".join(sorted(set(text)))))
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"], chat


@pytest.mark.parametrize(
    ("text", "cut", "steps"),
    [
        (CHAIN, CHAINS, ["3-6=-3;", "-3-1=-4;"]),  # the piece with the answer is no step
        ("#-2", CHAINS, []),
        ("3-6=-3", CHAINS, []),
        (PROSE, Cut(), ["He has 3 apples.", " He buys 2.5 kg more, i.e. two bags.", " Mr. Smith takes 1."]),
        ("a\n\nb\n\nc\n\n\\boxed{3}", Cut(), ["a\n\n", "b\n\n", "c\n\n"]),
        ("one line\ntwo\nthree\nfour", Cut(), ["one line\n", "two\n", "three\n"]),
        ("ab;c;defg;#1", Cut(";", "#", min_tokens=3), ["ab;", "c;defg;"]),
        ("abc;d;#1", Cut(";", "#", min_tokens=3), ["abc;d;"]),  # a short last step goes to the one before
    ],
)
def test_steps_end_where_they_should(text, cut, steps):
    ids, chat = ids_of(text)
    ends = step_ends(ids, chat.text, cut)
    assert [chat.text(ids[a:b]) for a, b in zip([0, *ends], ends, strict=False)] == steps
    assert "".join(steps) == chat.text(ids[: ends[-1]] if ends else [])


def test_a_step_never_ends_inside_a_token():
    """Tokens of several characters: the end moves to the token's end."""
    pieces = ["3-6", "=-3;-", "3-1=", "-4;", "#-4"]
    ends = step_ends(range(len(pieces)), lambda ids: "".join(pieces[i] for i in ids), CHAINS)
    assert ends == [2, 4]


def test_a_step_never_ends_inside_a_character():
    """Three tokens make one character: decoded alone, or one by one, they are replacement marks."""
    raw = ["ab", "\u00e9".encode()[:1], "\u00e9".encode()[1:], ";c;", "#1"]
    data = [p if isinstance(p, bytes) else p.encode() for p in raw]
    cut = Cut("\u00e9", "#")
    assert step_ends(range(5), lambda ids: b"".join(data[i] for i in ids).decode(errors="replace"), cut) == [3]


def test_cut_back():
    ids, chat = ids_of(CHAIN)
    assert [cut_back(ids, n, chat.text, CHAINS) for n in (0, 6, 7, 14, 15, 25)] == [0, 0, 7, 7, 15, 15]


def test_dress():
    assert split_dress(" 3-6=-3;", CHAINS) == (" ", "3-6=-3", ";")
    assert split_dress("\nHe has 3.\n\n", Cut()) == ("\n", "He has 3.", "\n\n")


@pytest.mark.parametrize(
    ("text", "holds"),
    [("3-6=-3", True), ("3-6=-2", False), ("2 + 3 * 4 = 14", True), ("2*3/4=1.5", True), ("16 - 3 - 4 = 9 eggs, 9 * 2 = $18", True), ("1,200 / 3 = 400", True),
     (r"5 \times 4 = 20", True), ("1/0=3", False), ("no sums", None), ("x = 5", None), ("3+4=7 and 3+4=8", False), ("-3-1=-4", True), ("2--3=5", True)],
)  # fmt: skip
def test_equations(text, holds):
    assert equations_hold(text) is holds


@pytest.mark.parametrize("seed", range(40))
def test_rules_make_the_step_wrong_in_one_place(seed):
    step = "3-6=-3"
    number, sign, swap = (RULES[name](step, random.Random(seed)) for name in ("number", "sign", "swap"))
    assert number is not None and number.startswith("3-6=-") and number != step and equations_hold(number) is False
    assert sign is not None and len(step) - 1 <= len(sign) <= len(step) and sorted(sign.translate({43: None, 45: None})) == sorted("36=3")
    assert equations_hold(sign) is False
    assert swap is not None and sorted(swap) == sorted(step) and equations_hold(swap) is False


def test_rules_by_hand():
    assert corruptions.swap_quantities("3+6=9", random.Random(0)) in {"9+6=3", "3+9=6"}  # 6+3=9 would still hold
    assert corruptions.swap_quantities("5+5=5", random.Random(0)) is None
    assert corruptions.change_number("no digits", random.Random(0)) is None
    assert corruptions.flip_sign("well-known words", random.Random(0)) is None  # a hyphen is no minus
    assert corruptions.flip_sign("x < 3", random.Random(0)) == "x > 3"
    assert corruptions.flip_sign(r"a \leq b", random.Random(0)) == r"a \geq b"
    assert corruptions.flip_sign("2 more than", random.Random(0)) == "2 less than"
    changed = {corruptions.change_number("costs 1,200.50 now", random.Random(s)) for s in range(30)}
    assert changed == {f"costs {v} now" for v in ("1,200.49", "1,200.51", "1,200.48", "1,200.52", "1,200.40", "1,200.60")}


def test_numbers_that_count_the_steps_are_no_quantities():
    for step in ("1. First, find the total.\n", "Step 2: find it", "**Step 2:** go", "(3) go on", "- 4) so"):
        assert RULES["number"](step, random.Random(0)) is None, step
    assert {m[0] for m in corruptions.quantities("4. So, 60 meters * 3 weeks = 180.\n2.5 of 7. Then 8")} == {"60", "3", "180", "2.5", "7", "8"}


def test_gate_by_hand():
    gate = Gate(marks=("~",))
    long = list(range(10))

    def why(new: str, ids: list[int] | None = None, **how: bool) -> str | None:
        return gate.refuses(long, ids if ids is not None else list(range(20, 30)), "3-6=-3;", new, **how)

    assert why("4-6=-2;") is None
    assert why("  ") == "empty"
    assert why("3-6=-3; ") == "unchanged"
    assert why("so the answer is 4") == "answer" and why(r"\boxed{4}") == "answer"
    assert why("this is incorrect: 4") == "give-away" and why("~4") == "give-away"
    assert why("4", [1]) == "length" and why("4", list(range(21))) == "length"
    assert why("4", [*range(8), 98, 99]) == "too close" and why("4", [*range(8), 98, 99], edits=False) is None
    assert why("4", [*range(7), 97, 98, 99]) is None


def test_edit_distance():
    assert [corruptions.edit_distance(a, b) for a, b in ((("k", "i", "t"), ("s", "i", "t", "s")), ((), (1, 2)), ((1, 2), (1, 2)))] == [2, 2, 0]

"""The parts of GASP that need no engine: where a trace may be cut, what a corruption must satisfy, edits by rule, leaks of a hint.

All of it works on token ids and on the text of each token by itself, so nothing that was sampled is decoded and tokenised again. Every
constant is OUR CHOICE: see gasp.py on what is known of the paper.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llmrl.chat import Chat

Span = tuple[int, int]
"""Token places [a, b)."""

REASONS = ("delimiter", "boundary", "special", "length", "same", "answer", "giveaway", "ending", "coherence")
"""Why a corruption is invalid; the first that applies is counted.

delimiter: no closing delimiter, or nothing before it. boundary: the delimiter begins inside a token. special: an end-of-turn or other
special token in it. length: outside the bounds. same: too close to the original. answer: a final answer in it. giveaway: a phrase that
warns the reader. ending: the original ends with the (visible) cut, this does not. coherence: too unlikely after the prefix.
"""


def token_texts(chat: Chat, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself; special tokens are empty."""
    known = {i: chat.text([i]) for i in dict.fromkeys(ids)}
    return [known[i] for i in ids]


def chunk_spans(texts: Sequence[str], *, cut: str, least: int, target: int, most: int) -> list[Span]:
    """A trace's chunks: token ranges that follow each other and cover it.

    Cuts lie behind tokens with which `cut` ends; what would be longer than `most` tokens is cut behind sentence ends too. Pieces are
    merged until a chunk has at least `least` tokens, and further while it stays within `target`. A piece without any such place may
    still exceed `most`: no token is split and no other place is used.
    """
    pieces: list[Span] = []
    for a, b in _cut_behind(texts, (0, len(texts)), lambda tail: tail.endswith(cut) or tail.rstrip(" ").endswith(cut)):
        pieces += [(a, b)] if b - a <= most else _cut_behind(texts, (a, b), lambda tail: tail.rstrip(" ").endswith((".", "!", "?")))
    spans: list[Span] = []
    for a, b in pieces:
        if spans and (spans[-1][1] - spans[-1][0] < least or b - spans[-1][0] <= target):
            spans[-1] = (spans[-1][0], b)
        else:
            spans.append((a, b))
    return spans


def _cut_behind(texts: Sequence[str], span: Span, ends: Callable[[str], bool]) -> list[Span]:
    """`span` cut behind every token with which the text meets `ends`, blank or special tokens staying with what they follow."""
    cuts, tail, met = [span[0]], "", False
    for i in range(*span):
        if met and texts[i].strip():
            cuts.append(i)
            met = False
        tail = (tail + texts[i])[-32:]
        met = met or ends(tail)
    return list(zip(cuts, [*cuts[1:], span[1]], strict=True))


def places_to_corrupt(texts: Sequence[str], spans: Sequence[Span], *, marks: Sequence[str], position: tuple[float, float], most: int) -> list[int]:
    """Numbers of the chunks that may be corrupted: start within `position` of the trace, at most `most` tokens, all of it before the
    first answer mark, and not the last chunk."""
    lower = "".join(texts).casefold()
    found = [at for mark in marks if (at := lower.find(mark.casefold())) >= 0]
    offsets = [0, *accumulate(len(t.casefold()) for t in texts)]
    first, low, high = min(found, default=len(lower) + 1), position[0] * len(texts), position[1] * len(texts)
    return [k for k, (a, b) in enumerate(spans[:-1]) if low <= a <= high and b - a <= most and offsets[b] <= first]


def inside(texts: Sequence[str], close: str) -> tuple[Span, str]:
    """(places of the tokens before the closing delimiter, blank ones at the start left out; "" or the reason why there are none)."""
    at = "".join(texts).find(close)
    if at < 0:
        return (0, 0), "delimiter"
    offsets = [0, *accumulate(map(len, texts))]
    end = next((i for i, t in enumerate(texts) if offsets[i] == at and t), None)
    if end is None:
        return (0, 0), "boundary"
    start = next((i for i in range(end) if texts[i].strip() or not texts[i]), end)
    return ((start, end), "") if start < end else ((0, 0), "delimiter")


def fault(
    texts: Sequence[str], original: Sequence[str], *, length: tuple[float, float], most: int, min_edits: int, marks: Sequence[str],
    giveaways: Sequence[str], cut: str,
) -> str:  # fmt: skip
    """"" where a replacement passes every item of the gate but coherence, else the reason. texts, original: token by token."""
    joined, before = "".join(texts), "".join(original)
    lower = joined.casefold()
    if not all(texts):
        return "special"
    if not length[0] * len(original) <= len(texts) <= min(length[1] * len(original), most):
        return "length"
    if " ".join(joined.split()) == " ".join(before.split()) or edits(_words(texts), _words(original), min_edits) < min_edits:
        return "same"
    if any(mark.casefold() in lower for mark in marks):
        return "answer"
    if any(phrase.casefold() in lower for phrase in giveaways):
        return "giveaway"
    if cut.strip() and before.endswith(cut) and not joined.endswith(cut):
        return "ending"
    return ""


def _words(texts: Sequence[str]) -> list[str]:
    return [t.strip() for t in texts if t.strip()]


def edits(a: Sequence[str], b: Sequence[str], limit: int) -> int:
    """Edit distance (insert, delete, substitute), or `limit` where it is that or more."""
    if abs(len(a) - len(b)) >= limit:
        return limit
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i] + [limit] * len(b)
        for j in range(max(1, i - limit), min(len(b), i + limit) + 1):  # outside this band the distance is at least limit
            new[j] = min(row[j] + 1, new[j - 1] + 1, row[j - 1] + (x != b[j - 1]))
        row = new
    return min(row[-1], limit)


_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_FLIP = {"+": "-", "-": "+", "<": ">", ">": "<", "≤": "≥", "≥": "≤", "*": "+"}


def edit_by_rule(step: str, rng: np.random.Generator) -> str | None:
    """`step` with one number changed by 1, 2 or 10, one sign or inequality flipped, or two different numbers swapped; None without any."""
    numbers = list(_NUMBER.finditer(step))
    signs = [i for i, c in enumerate(step) if c in _FLIP]
    swaps = [(m, n) for k, m in enumerate(numbers) for n in numbers[k + 1 :] if m[0] != n[0]]
    kinds = [name for name, there in (("number", numbers), ("sign", signs), ("swap", swaps)) if there]
    if not kinds:
        return None
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "number":
        m = numbers[int(rng.integers(len(numbers)))]
        whole, _, fraction = m[0].partition(".")
        value = int(whole) + (1, 2, 10)[int(rng.integers(3))] * (1 if int(rng.integers(2)) else -1)
        changed = str(value if value >= 0 else int(whole) + 1) + (f".{fraction}" if fraction else "")
        return step[: m.start()] + changed + step[m.end() :]
    if kind == "sign":
        i = signs[int(rng.integers(len(signs)))]
        return step[:i] + _FLIP[step[i]] + step[i + 1 :]
    m, n = swaps[int(rng.integers(len(swaps)))]
    return step[: m.start()] + n[0] + step[m.end() : n.start()] + m[0] + step[n.end() :]


def leaks(text: str, phrases: Sequence[str]) -> bool:
    """Whether a repair mentions its hint."""
    lower = " ".join(text.casefold().split())
    return any(phrase.casefold() in lower for phrase in phrases)

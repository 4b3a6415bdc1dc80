"""A budget on the length of a response."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from llmrl.records import Prompt, Verdict, Verifier

Unit = Literal["words", "chars", "lines", "tokens"]


def length(
    *, at_most: int | None = None, at_least: int = 0, margin: int = 0, unit: Unit = "words", tokenizer: str | None = None, base: Path = Path(".")
) -> Verifier:
    """1.0 where at_least <= length <= at_most; beyond at_most down to 0 along a line; 0.0 below at_least. Needs no gold.

    score = clamp(1 - (length - at_most) / margin, 0, 1) for length > at_most; margin 0 is a hard limit.
    This is DAPO's soft overlong punishment (arXiv:2503.14476 eq. 13) moved from [-1, 0] to [0, 1]: with at_most = L_max - L_cache and
    margin = L_cache, score = 1 + R_length. The credit transform `overlong` adds R_length itself to any reward, in tokens of the
    completion; use that to shape training, and this to judge a length that the prompt asks for, or as a part of `combine`.
    at_most, at_least, margin: counts in `unit`; at_most None is no upper limit.
    unit: "words" runs between blanks (as wc -w), "chars" Unicode code points, "lines" lines that are not blank, "tokens" without
    special tokens.
    tokenizer: for tokens only: the tokenizer.json of a model, or the folder that holds it, from the recipe's folder (`base`).
    Status: always ok; an empty response has length 0. The detail says the length.
    Raises ValueError where there is nothing to check, limits contradict each other, or the tokenizer cannot be read.
    Failure modes: text without blanks (Chinese, Japanese, Thai) is one word; tokens are those of the decoded text, which can be a few
    more or fewer than the model wrote.
    """
    if at_most is None and at_least <= 0:
        raise ValueError("nothing to check; give at_most, at_least or both, e.g. at_most = 300")
    if at_least < 0 or margin < 0 or (at_most is not None and at_most < at_least):
        raise ValueError(f"at_least = {at_least}, at_most = {at_most}, margin = {margin}: expected 0 <= at_least <= at_most and margin >= 0")
    if margin and at_most is None:
        raise ValueError(f"margin = {margin} does nothing without at_most; give at_most too")
    count = _counter(unit, tokenizer, base)

    def judge(prompt: Prompt, response: str) -> Verdict:
        found = count(response)
        score = 0.0 if found < at_least else 1.0 if at_most is None else ramp(found, at_most, margin)
        return Verdict(score, "ok", detail=f"{found} {unit}")

    return judge


def ramp(count: int, at_most: int, margin: int) -> float:
    """1.0 up to at_most, then 1 - (count - at_most) / margin, and 0.0 from at_most + margin on."""
    over = count - at_most
    return 1.0 if over <= 0 else max(0.0, 1.0 - over / margin) if margin else 0.0


def _counter(unit: Unit, tokenizer: str | None, base: Path) -> Callable[[str], int]:
    if (unit == "tokens") != (tokenizer is not None):
        raise ValueError(f'unit = "{unit}" and tokenizer = {tokenizer!r}: a tokenizer goes with unit = "tokens" and only with that')
    if tokenizer is None:
        return {"words": lambda text: len(text.split()), "chars": len, "lines": lambda text: sum(bool(x.strip()) for x in text.splitlines())}[unit]
    from tokenizers import Tokenizer  # not transformers: this needs no model code and loads in milliseconds

    file = (base / Path(tokenizer).expanduser()).resolve()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"tokenizer = {tokenizer!r}: there is no file {file}; expected a model's tokenizer.json or the folder that holds it")
    try:
        model = Tokenizer.from_file(str(file))
    except Exception as error:  # its errors are plain Exception
        raise ValueError(f"tokenizer = {tokenizer!r}: {file} cannot be read: {error}") from error
    model.no_truncation()  # some files cut at the model's context
    model.no_padding()
    return lambda text: len(model.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids)  # it refuses half surrogates


length.selfcheck = [  # type: ignore[attr-defined]
    ("", None, "one two three", 1.0, {"at_most": 3}),
    ("", None, "one two three four", 0.0, {"at_most": 3}),
    ("", None, "one two three four", 0.75, {"at_most": 3, "margin": 4}),
    ("", None, "one two three four five six seven", 0.0, {"at_most": 3, "margin": 4}),
    ("", None, "one", 0.0, {"at_least": 2}),
    ("", None, "", 1.0, {"at_most": 3}),
    ("", None, "first\n\n  second\n", 1.0, {"at_most": 2, "at_least": 2, "unit": "lines"}),
    ("", None, "h\u00e9", 1.0, {"at_most": 2, "at_least": 2, "unit": "chars"}),
]

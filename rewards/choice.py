"""Multiple choice: the letter, or the text of an option."""

from __future__ import annotations

import re

from llmrl.records import Prompt, Verdict, Verifier
from llmrl.rewards.extract import boxed, phrased, plain

_OPTION_LINE = re.compile(r"^\s*\(?([A-Z])[).:]\s*(.+?)\s*$", re.MULTILINE)


def choice(*, letters: str = "ABCDEFGHIJ") -> Verifier:
    r"""1.0 where the response chooses the gold option, else 0.0. The gold is a letter or an option's text.

    Options come from the row's column `choices` (a list of texts), else from lines "A) ..." of the prompt. Looked at in this order:
    the last \boxed{}; what follows the last final-answer phrase ("the answer is (B)"); the last line; the last "(B)" or "**B**"
    in the response. In each a letter alone, "(B)", "B.", "B) text", "option B", or the text of exactly one option counts.
    letters: what may be an answer; where options are known only theirs count.
    Status: no_answer (score 0) where none is chosen, and where several different letters stand in the place of the answer;
    error without a gold, or with one that is no letter and no option's text.
    Failure modes: the article "A" is taken for a letter only where nothing but punctuation follows it; an option's text that is
    part of another option's text counts only when the longer one does not match.
    """
    if not re.fullmatch(r"[A-Z]{2,26}", letters):
        raise ValueError(f'letters = {letters!r}; expected capital letters, e.g. "ABCD"')

    def judge(prompt: Prompt, response: str) -> Verdict:
        if prompt.answer is None:
            return Verdict(None, "error", detail="the row has no gold answer")
        options = _options(prompt, letters)
        allowed = "".join(options) or letters
        gold = _chosen(prompt.answer, options, allowed)
        if len(gold) != 1:
            return Verdict(None, "error", detail=f"the gold {prompt.answer[:200]!r} is none of the options {', '.join(allowed)}")
        for where, text in _places(response, allowed):
            found = _chosen(text, options, allowed)
            if len(found) > 1:
                return Verdict(0.0, "no_answer", detail=f"{where}: several options, {', '.join(sorted(found))}")
            if found:
                answer = found.pop()
                return Verdict(float({answer} == gold), "ok", answer, where)
        return Verdict(0.0, "no_answer", detail="no option is chosen")

    return judge


def _options(prompt: Prompt, letters: str) -> dict[str, str]:
    """letter -> plain text of the option; empty where the row tells none."""
    given = prompt.meta.get("choices")
    if isinstance(given, list | tuple) and 2 <= len(given) <= len(letters):
        return {letter: plain(str(text)) for letter, text in zip(letters, given, strict=False)}
    lines = {letter: plain(text) for letter, text in _OPTION_LINE.findall(prompt.text) if letter in letters}
    return lines if len(lines) >= 2 else {}


def _places(response: str, allowed: str) -> list[tuple[str, str]]:
    """(name, text) of where an answer may stand, the strongest first."""
    boxes = boxed(response)
    phrase = phrased(response)
    last_line = next((line for line in reversed(response.splitlines()) if line.strip()), "")
    marked = re.findall(rf"\(([{allowed}])\)|\*\*\(?([{allowed}])\)?\.?\*\*", response[-20000:])
    places = [("boxed", boxes[-1] if boxes else ""), ("final-answer phrase", phrase or ""), ("last line", last_line[:2000])]
    return [*places, ("last marked letter", "".join(marked[-1]) if marked else "")]


def _chosen(text: str, options: dict[str, str], allowed: str) -> set[str]:
    """The letters that `text`, a place where an answer stands, chooses."""
    bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}|[*$`]", r"\1", text).strip()
    alone = re.fullmatch(rf"(?:option|choice|letter)?\s*\(?\s*([{allowed}])\s*[).:,]*", bare, re.IGNORECASE)
    if alone:
        return {alone[1].upper()}
    content = plain(bare)
    same = {letter for letter, option in options.items() if option and option == content}
    if same:
        return same
    start = re.match(rf"\(?([{allowed}])[).:](?:\s|$)", bare)
    in_list = rf"(?<![\w'(])([{allowed}])(?=\s*(?:[,/]|or\b|and\b))"  # "A or", "B,"
    listed = re.findall(rf"\(([{allowed}])\)|\b(?:option|choice)\s+\(?([{allowed}])\b|{in_list}", bare)
    found = {"".join(row) for row in listed} | ({start[1]} if start else set())
    tail = re.search(rf"(?:\bor|\band|[,/])\s*\(?([{allowed}])\)?\s*\.?$", bare)
    if found and tail:
        found.add(tail[1])
    if found:
        return found
    inside = {letter for letter, option in options.items() if len(option) > 1 and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", content)}
    return {x for x in inside if not any(x != y and options[x] in options[y] for y in inside)}


_QUESTION = "Where is a revolving door used for security?\nA) bank\nB) library\nC) department store\nD) mall"
choice.selfcheck = [  # type: ignore[attr-defined]
    (_QUESTION, "A", "A", 1.0),
    (_QUESTION, "A", "The answer is (A).", 1.0),
    (_QUESTION, "A", "**Answer:** A) bank", 1.0),
    (_QUESTION, "A", "A bank needs two-way doors. So I choose\nbank.", 1.0),
    (_QUESTION, "C", r"Hence \boxed{\text{C}}", 1.0),
    (_QUESTION, "department store", "the final answer is department store", 1.0),
    (_QUESTION, "A", "Not (A), because of the crowd. The answer is B.", 0.0),
    (_QUESTION, "A", "The answer is A or B.", 0.0),
    (_QUESTION, "A", "A door is a door", 0.0),
]

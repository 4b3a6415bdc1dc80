"""Multiple choice: the letter, or the text of an option."""

from __future__ import annotations

import re
from typing import NamedTuple

from llmrl.records import Prompt, Verdict, Verifier
from llmrl.rewards.extract import boxed, plain

_OPTION_LINE = re.compile(r"^\s*\(?([A-Z])[).:]\s*(.+?)\s*$", re.MULTILINE)
_MAX_CLAIMS = 64  # looked at from the end; a response that claims more often than that is read no further back
_REACH = 2000  # characters after a phrase, and of the last line, in which an answer may stand

_GOOD = r"(?:correct|right|best|final|appropriate|suitable|likely|accurate|logical|chosen|my)"
_NOUN = r"(?:answer|option|choice|letter|selection|statement|response|solution|one)"
# "the answer is", "Answer:", "correct option is", "I choose", "<answer>", "####", and a last line "A: ..." (question and answer)
_FORWARD = re.compile(
    rf"(?:\b(?:answer|ans|conclusion)|\b{_GOOD}\s+{_NOUN}|\b(?:option|choice|one)\s+(?:that|which))\b"
    r"(?P<gap>[^\n.:=]{0,60}?)(?:\b(?:is|be|was)\b|:|=)[ \t*_]*:?"
    r"|(?P<verb>\b(?:choose|chose|pick|select|go with|going with|opt for))\b[ \t*_]*:?"
    r"|<answer>|^[ \t]*####|^[ \t*]*A[ \t]*:(?=[^\n]*\s*\Z)",
    re.IGNORECASE | re.MULTILINE,
)
# "... is correct", "... is the most likely answer": what stands before it in the sentence is the answer
_BACKWARD = re.compile(
    r"\b(?:is|was|would be|must be|should be)\s+(?:(?:the|a|our|my|clearly|indeed|therefore|thus|most|likely|probably|only|single|"
    rf"{_GOOD})\s+)*(?:correct|right|best|answer|{_GOOD}\s+{_NOUN})\b",
    re.IGNORECASE,
)
_WEAK = re.compile(r"\b(?:so|thus|hence|therefore|must be|has to be|should be|this is|it is|it's)\b[ ,:*_]*", re.IGNORECASE)
_NO = re.compile(r"\b(?:not|cannot|neither|nor|never|wrong|incorrect|if|whether|which|why|none of)\b|n['\u2019]t\b", re.IGNORECASE)
_CONTRAST = re.compile(r"[\s,(]*\b(?:and not|but not|not|rather than|instead of|as opposed to|unlike|n['\u2019]t)\b\s*", re.IGNORECASE)
_BECAUSE = re.compile(r"[\s,;(\u2014]*\b(?:because|since)\b", re.IGNORECASE)
_WRONG = re.compile(r"\b(?:wrong|incorrect|eliminat\w+|ruled? out|exclud\w+)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<![\s(][A-Z])(?<!^[A-Z])[.!?](?=[\s*\"]|$)|\n|</\w")
_FILLER = "the|option|choice|letter|answer|statement|number|only|both|either|definitely|clearly|likely|probably|indeed|is"
_LEAD = re.compile(rf"(?:(?:{_FILLER})\b|[:=,>\u2192-])\s*", re.IGNORECASE)
_LAST_LETTER = re.compile(r"(?:[,;:]|\b(?:think|believe|say|that|so|thus|hence|therefore|sure|know))\s*[*(\[]*([A-Z])[*)\].]*\s*$", re.IGNORECASE)
_END = r"\s*(?:$|[,;/:]|(?:and|or)\b|[.!?]$)"
_AFTER = r"\s*(?:$|[,;:\u2013\u2014(\[]|-\s|(?:because|since|as|for|due|and|or|but|is|which|given|with)\b)"


def choice(*, letters: str = "ABCDEFGHIJ") -> Verifier:
    r"""1.0 where the response chooses the gold option, else 0.0. The gold is a letter or an option's text.

    Options come from the row's column `choices` (a list of texts), else from lines "A) ..." of the prompt. Looked at in this order:
    the last \boxed{}; a last line that is a letter alone; the last final-answer phrase that names an option ("the answer is (B)", "the
    correct option is B", "I choose B", "B is correct"); a line "B) text" where no other option has one; the last line; the last "(B)" or
    "**B**". In each a letter alone, "(B)", "B.", "B) text", "option B", or the text of exactly one option counts; what is denied ("not A
    but B", "B rather than A") does not.
    letters: what may be an answer; where options are known only theirs count.
    Status: no_answer (score 0) where none is chosen, and where several different ones stand in the place of the answer;
    error without a gold, or with one that is no letter and no option's text.
    Failure modes: the article "A" is taken for a letter only where punctuation or a word such as "because" follows it; an option's text
    that is part of another option's text counts only when the longer one does not match; where an option's text is itself a letter,
    that letter in lower case is read as the text; options with the same text are told apart by letter only; only the usual English
    phrases are known ("only B remains" is not); ordinals ("the second option"), paraphrases and a text in another notation (0.5 for
    1/2) choose nothing.
    """
    if not re.fullmatch(r"[A-Z]{2,26}", letters):
        raise ValueError(f'letters = {letters!r}; expected capital letters, e.g. "ABCD"')

    def judge(prompt: Prompt, response: str) -> Verdict:
        if prompt.answer is None:
            return Verdict(None, "error", detail="the row has no gold answer")
        options = _options(prompt, letters)
        allowed = "".join(options) or letters
        gold = _chosen(prompt.answer, options, allowed)
        if not gold or not _same_text(gold, options):
            return Verdict(None, "error", detail=f"the gold {prompt.answer[:200]!r} is none of the options {', '.join(allowed)}")
        for where, text, firm in _places(response, allowed):
            found = _chosen(text, options, allowed, firm)
            if found and not _same_text(found, options):
                return Verdict(0.0, "no_answer", detail=f"{where}: several options, {', '.join(sorted(found))}")
            if found:
                return Verdict(float(bool(found & gold)), "ok", min(found), where)
        return Verdict(0.0, "no_answer", detail="no option is chosen")

    return judge


class _Option(NamedTuple):
    raw: str
    text: str
    """As `plain` gives it: without dressing, case-folded."""


def _options(prompt: Prompt, letters: str) -> dict[str, _Option]:
    """letter -> option; empty where the row tells none."""
    given = prompt.meta.get("choices")
    if isinstance(given, list | tuple) and 2 <= len(given) <= len(letters):
        return {letter: _Option(str(text).strip(), plain(str(text))) for letter, text in zip(letters, given, strict=False)}
    lines = {letter: _Option(text.strip(), plain(text)) for letter, text in _OPTION_LINE.findall(prompt.text) if letter in letters}
    return lines if len(lines) >= 2 else {}


def _same_text(found: set[str], options: dict[str, _Option]) -> bool:
    return len(found) == 1 or len({options[letter].raw if letter in options else letter for letter in found}) == 1


# ---------------------------------------------------------------- where an answer stands


def _places(response: str, allowed: str) -> list[tuple[str, str, bool]]:
    """(name, text, whether it is an answer for certain) of where an answer may stand, the strongest first."""
    boxes = boxed(response)
    last_lines = [line for line in response.rstrip()[-2 * _REACH :].split("\n") if line.strip()][-2:]
    last_line = last_lines[-1][:_REACH] if last_lines else ""
    places = [("boxed", boxes[-1], True)] if boxes else []
    if re.fullmatch(rf"[\s*_(\[$]*[{allowed}][\s*_)\].$]*", last_line):
        places.append(("last line", last_line, True))
    places += [("final-answer phrase", text, True) for text in _claims(response)]
    option_line = re.compile(rf"^([ \t*_#>-]*\(?([{allowed}])(?:[).:](?:[^\w\n][^\n]*)?|[ \t*_]*))$", re.MULTILINE)
    lines = option_line.findall(response)
    if len({letter for _, letter in lines}) == 1:  # one option written out, and no list of them
        places.append(("the only line with an option", lines[-1][0][:_REACH], False))
    if not all(option_line.search(line) for line in last_lines) or len(last_lines) == 1:  # the end of a list of options chooses none
        weak = [*_WEAK.finditer(last_line)][-1:]
        places += [("last line", _sentence(last_line[m.end() :]), False) for m in weak]
        places.append(("last line", last_line, False))
    mark = rf"(?<!not )(?<!than )(?:(?<!\w)\(([{allowed}])\)|\*\*\(?([{allowed}])\)?\.?\*\*)(?!\**\s+(?:is|was)\s+(?:not|wrong|incorrect)\b)"
    marked = re.findall(mark, response[-20000:])
    return [*places, ("last marked letter", "".join(marked[-1]), True)] if marked else places


def _claims(response: str) -> list[str]:
    """The texts that final-answer phrases point at, the last one first."""
    found: list[tuple[int, str]] = []
    for m in [*_FORWARD.finditer(response)][-_MAX_CLAIMS:]:
        before = response[max(0, m.start() - 30) : m.start()]
        if _NO.search(m["gap"] or "") or re.search(r"(?:wrong|incorrect|not|n['\u2019]t|never)\s+(?:an?\s+|the\s+)?$", before, re.IGNORECASE):
            continue
        found.append((m.end(), _sentence(response[m.end() : m.end() + _REACH].lstrip(" \t\r\n*_:"))))
    for m in [*_BACKWARD.finditer(response)][-_MAX_CLAIMS:]:
        before = response[max(0, m.start() - 400) : m.start()]
        start = max((end.end() for end in _SENTENCE_END.finditer(before)), default=0)
        letter = _LAST_LETTER.search(before, start)
        if not _NO.search(before[start:]):
            found.append((m.start(), letter[1] if letter and letter[1].isupper() else before[start:].strip()))
    return [text for _, text in sorted(found, key=lambda claim: claim[0], reverse=True) if text]


def _sentence(text: str) -> str:
    end = _SENTENCE_END.search(text)
    return (text[: end.start()] if end else text).strip(" \t*_")


# ---------------------------------------------------------------- what it chooses


def _chosen(text: str, options: dict[str, _Option], allowed: str, firm: bool = True) -> set[str]:
    """The letters that `text` chooses. firm: the text is known to be an answer, so "B because ..." counts."""
    bare = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|textrm|boxed)\s*\{([^{}]*)\}|\\[()\[\],;:! ]|[*$`\"\u201c\u201d]", r"\1", text)
    bare = bare.strip(" \t\r\n'\u2018\u2019")
    alone = re.fullmatch(rf"(?:option|choice|letter|answer)?\s*[(\[{{]?\s*([{allowed}])\s*[)\]}}.:,!]*", bare, re.IGNORECASE)
    if alone and not (alone[1].islower() and any(option.raw == alone[1] for option in options.values())):
        return {alone[1].upper()}
    same = {letter for letter, option in options.items() if _key(option.raw) == _key(text) != ""}
    if same:
        return {letter for letter in same if options[letter].raw in text} or same
    found = _led(bare, options, allowed, firm)
    if found:
        return found
    reasoned = _BECAUSE.split(bare, maxsplit=1)
    if len(reasoned) > 1 and reasoned[0]:
        found = _chosen(reasoned[0], options, allowed, firm)
        if found:
            return found
    with_not = {letter for letter in _inside(plain(bare), options, firm) if _CONTRAST.search(options[letter].raw)}
    if len(with_not) == 1:  # "spines instead of leaves" denies nothing where it is an option
        return with_not
    before, after = _cut(bare)
    if after:
        rest = re.split(r"\bbut(?: rather)?\b", after, maxsplit=1, flags=re.IGNORECASE)
        denied = not before or re.search(r"\b(?:is|are|was|be|can|could|does|do|did|would|should|must|ca|wo)$", before, re.IGNORECASE)
        return (set() if denied else _chosen(before, options, allowed, firm)) or (_chosen(rest[1], options, allowed, firm) if rest[1:] else set())
    if not firm and _WRONG.search(bare):
        return set()
    return _listed(bare, allowed) or _inside(plain(bare), options, firm)


def _cut(text: str) -> tuple[str, str]:
    """The text before and after the first word that denies what follows."""
    m = _CONTRAST.search(text)
    return (text[: m.start()].strip(), text[m.end() :].strip()) if m else (text, "")


def _key(text: str) -> str:
    """The text without blanks, marks and quotes: "0.5*m" in Markdown loses its stars."""
    return re.sub(r"[\s*`$]", "", plain(re.sub(r"['\"\u201c\u201d\u2018\u2019]", "", text)))


def _led(bare: str, options: dict[str, _Option], allowed: str, firm: bool) -> set[str]:
    """The letter that the text starts with, and those joined to it by "and", "or", a comma or a slash."""
    at = 0
    while lead := _LEAD.match(bare, at):
        at = lead.end()
    letter = rf"[(\[{{]([{allowed}{allowed.lower()}])[)\]}}]|([{allowed}{allowed.lower()}])[).:](?!\w)|([{allowed}])(?![\w'\u2019])"
    found: set[str] = set()
    joined = ""
    while m := re.compile(letter).match(bare, at):
        this = (m[1] or m[2] or m[3]).upper()
        rest = bare[m.end() :]
        own = options[this].raw if this in options else ""
        named = bool(own) and rest.lstrip(" -\u2013\u2014:(,").startswith(own)
        at = m.end() + (rest.index(own) + len(own) if named else 0)
        stands = named or not m[3] or re.match(rf"{_AFTER if firm else _END}|\s*[/&.!?]", rest)
        if joined.strip(" ,") and not (this == "A" and re.match(r"\s+[a-z]", rest.removeprefix(" are"))):
            stands = True
        if not stands or re.match(r"[\s*]+is\b" if joined else r"[\s*]+(?:is|was)\s+(?:not|wrong|incorrect)\b", bare[at:]):
            break  # also at "(B), and (A) is wrong"
        found.add(this)
        joint = re.compile(r"[\s)]*(?:,?\s*\b(?:and|or|and/or)\b|[,/&])\s*(?:option\s+|choice\s+)?", re.IGNORECASE).match(bare, at)
        if not joint:
            break
        at, joined = joint.end(), joint[0]
    return found


def _listed(bare: str, allowed: str) -> set[str]:
    """Letters in brackets or after "option", anywhere."""
    return {"".join(row) for row in re.findall(rf"(?<!\w)\(([{allowed}])\)|\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer|letter)\s+\(?([{allowed}])\b", bare)}


def _inside(content: str, options: dict[str, _Option], firm: bool) -> set[str]:
    """Options whose text stands in the content, less those whose text is part of another's that does."""
    inside = set()
    for letter, (_, option) in options.items():
        sign = r"(?<![-\u2212])" if option[:1].isdigit() else ""
        if (len(option) > 1 or (firm and option.isdigit())) and re.search(
            rf"(?<!\w)(?<!\d[.,]){sign}{re.escape(option)}(?!\w)(?![.,]\d)", content
        ):
            inside.add(letter)
    return {x for x in inside if not any(options[x].text != options[y].text and options[x].text in options[y].text for y in inside)}


_QUESTION = "Where is a revolving door used for security?\nA) bank\nB) library\nC) department store\nD) mall"
choice.selfcheck = [  # type: ignore[attr-defined]
    (_QUESTION, "A", "A", 1.0),
    (_QUESTION, "A", "The answer is (A).", 1.0),
    (_QUESTION, "A", "**Answer:** A) bank", 1.0),
    (_QUESTION, "A", "A bank needs two-way doors. So I choose\nbank.", 1.0),
    (_QUESTION, "C", r"Hence \boxed{\text{C}}", 1.0),
    (_QUESTION, "department store", "the final answer is department store", 1.0),
    (_QUESTION, "A", "Option A is correct. A library has no guards.", 1.0),
    (_QUESTION, "B", "The answer is not A but B.", 1.0),
    (_QUESTION, "A", "Not (A), because of the crowd. The answer is B.", 0.0),
    (_QUESTION, "A", "The answer is A or B.", 0.0),
    (_QUESTION, "A", "A door is a door", 0.0),
]

r"""The 25 verifiable instructions of IFEval as pure functions: text in, True where it follows. Linear in the length of the text.

Source: Zhou et al., arXiv:2311.07911, table 1; what counts where the table is silent is taken from the authors' checker
(google-research, instruction_following_eval). A function's keywords are the instruction's kwargs, with their types.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Literal

Relation = Literal["less than", "at least"]


def _holds(count: int, relation: Relation, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


# ---------------------------------------------------------------- keywords, letters, case


def _existence(text: str, *, keywords: list[str]) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in keywords)


def _frequency(text: str, *, keyword: str, frequency: int, relation: Relation) -> bool:
    return _holds(len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE)), relation, frequency)


def _forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    """Whole words only: "cooking" is no "cook"."""
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


def _capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: Relation) -> bool:
    return _holds(count_capital_words(text), capital_relation, capital_frequency)


def _english_capital(text: str) -> bool:
    return text.isupper() and language_of(text) in ("en", None)


def _english_lowercase(text: str) -> bool:
    return text.islower() and language_of(text) in ("en", None)


def _response_language(text: str, *, language: str) -> bool:
    """A text that shows no language (digits, punctuation) follows, as in the authors' checker."""
    return language_of(text) in (language, None)


def _no_comma(text: str) -> bool:
    return "," not in text


# ---------------------------------------------------------------- length


def _number_words(text: str, *, num_words: int, relation: Relation) -> bool:
    return _holds(len(re.findall(r"\w+", text)), relation, num_words)


def _number_sentences(text: str, *, num_sentences: int, relation: Relation) -> bool:
    return _holds(count_sentences(text), relation, num_sentences)


def _number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Exactly so many, divided by ***; a divider may stand before the first and after the last, but not twice in between."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    inner = parts[1:-1]
    return all(inner) and len(inner) + bool(parts[0]) + (len(parts) > 1 and bool(parts[-1])) == num_paragraphs


def _nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly num_paragraphs that are not blank, divided by one blank line; the n-th piece, blank ones counted, starts with the word."""
    pieces = [piece.strip() for piece in text.split("\n\n")]
    filled = sum(map(bool, pieces))
    if filled != num_paragraphs or nth_paragraph > filled or not pieces[nth_paragraph - 1]:
        return False
    word = pieces[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


# ---------------------------------------------------------------- content and format


def _number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """[...] on one line, at least so many."""
    count = 0
    for line in text.split("\n"):
        end = 0
        while (start := line.find("[", end)) >= 0 and (end := line.find("]", start) + 1):
            count += 1
    return count >= num_placeholders


def _postscript(text: str, *, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, re.escape(marker.lower()))
    return re.search(pattern, text.lower()) is not None


def _number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """Exactly so many lines that start with - or with a * that no second * follows."""
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def _constrained_response(text: str) -> bool:
    return any(answer in text for answer in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


def _number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """*...* and **...** on one line with something in them, at least so many."""
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(inside.strip()) for inside in single + double) >= num_highlights


def _multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many marks like "SECTION 3". The keyword's spelling is the dataset's."""
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", text)) >= num_sections


def _json_format(text: str) -> bool:
    """The whole is JSON as Python's json module reads it, with or without a code fence around it."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    """<<...>> on one line with something in it."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and end > start + 2 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


# ---------------------------------------------------------------- the whole response


def _two_responses(text: str) -> bool:
    """Two different ones with ****** between them; a divider may also stand before the first and after the second."""
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end_checker(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


INSTRUCTIONS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}


# ---------------------------------------------------------------- counting


def language_of(text: str) -> str | None:
    """ISO 639-1 code as langdetect guesses it, seed 0; None where it finds nothing to go by. Chinese is zh-cn or zh-tw."""
    import langdetect

    langdetect.DetectorFactory.seed = 0  # without it the guess for a short text changes from call to call
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None


_SEPARATE = re.compile(r"[;@#$%&?!*()\[\]{}<>\"`\u00ab\u00bb\u201c\u201d\u2018\u2019\u201e\u2012-\u2015]|--|\.{2,}|[:,](?!\d)|\.(?=\s|$)")
_CLITIC = re.compile(r"(?<=[^' ])(?=(?:'[sSmMdD]|'ll|'LL|'re|'RE|'ve|'VE|n't|N'T)(?:\s|$))")
_TWO_WORDS = re.compile(r"\b(CAN(?=NOT\b)|GIM(?=ME\b)|LEM(?=ME\b)|GON(?=NA\b)|GOT(?=TA\b)|WAN(?=NA\s)|D(?='YE\b)|MORE(?='N\b))")


def count_capital_words(text: str) -> int:
    """Words without a lower-case letter, cut as the Penn Treebank does: MID-AGE is one word, DON'T is two (DO, N'T), and so is CANNOT."""
    text = _CLITIC.sub(" ", _SEPARATE.sub(" ", text))
    return sum(word.isupper() for word in _TWO_WORDS.sub(r"\1 ", text).split())


_AFTER_END = frozenset(")\";}]*:@'({[?!\u2018\u2019\u201c\u201d\u00ab\u00bb")  # a sentence may end before one of these without a blank
_CLOSERS = "\"')]}\u2018\u2019\u201c\u201d\u00ab\u00bb"  # these stay with the sentence that they close
_TOKEN_START = re.compile(r"[)\";}\]*:@({\[`&#,]|(?=['?!\u2018\u2019\u201c\u201d\u00ab\u00bb])")
_INITIALS = frozenset("cdefghklmnrstvw")  # as punkt learnt them; the others are list letters as often as initials
_ABBREVIATION_WORDS = (
    "mr mrs ms dr prof st sr jr gen col lt sgt adm sen rep reps messrs inc ltd corp co cos bros vs ave ph.d "
    "jan feb aug sept sep oct nov dec wed fri ala ariz calif colo conn fla ga ill kan ky la mich minn okla ore pa tenn va vt wash wis"
)
_ABBREVIATIONS = frozenset(_ABBREVIATION_WORDS.split())
_NO_INITIALS = frozenset(("p.s", "p.p.s", "e.g", "i.e"))  # punkt knows none of them: a sentence ends there
# capitalised after an abbreviation, an initial or an ellipsis, these begin a sentence
_STARTER_WORDS = (
    "the a an this that these those it he she they we you i there here his her its their our your my if when while as at in on by for from "
    "with but and or so then however what who where why how which since because although though after before during once under most "
    "many some each both all such no not is are was were can could will would should let please also meanwhile instead"
)
_STARTERS = frozenset(_STARTER_WORDS.split())


def count_sentences(text: str) -> int:
    """Sentences, with the rules of nltk's punkt tokenizer that the authors use: "1. Mix." are two, "3.5", "Mr. Bo" and "J. Bo" end none."""
    words = text.split()
    count, open_sentence, closed = 0, False, False
    for i, word in enumerate(words):
        following = words[i + 1] if i + 1 < len(words) else ""
        at = _last_end(word, bool(following))
        if at is not None and _ends(word[: at + 1], word[at + 1 :] or following):
            count += 1
            open_sentence = bool(word[at + 1 :].strip(_CLOSERS))
            closed = at + 1 == len(word)
        elif not closed or word.strip(_CLOSERS):  # brackets and quotes right after an end belong to what they close
            open_sentence, closed = True, False
    return count + open_sentence


def _last_end(word: str, more: bool) -> int | None:
    """Where in the word the last . ? or ! stands that may end a sentence: before a blank, a bracket, a quote or a star."""
    for at in range(len(word) - 1, -1, -1):
        if word[at] in ".?!" and (word[at + 1] in _AFTER_END if at + 1 < len(word) else more):
            return at
    return None


def _ends(head: str, following: str) -> bool:
    """Whether a sentence ends after `head`, which ends in . ? or !, before the text `following`."""
    if head[-1] != ".":
        return True
    base = _TOKEN_START.split(head)[-1][:-1].lower()
    starter = following[0].isupper() and re.split(r"\W", following, maxsplit=1)[0].lower() in _STARTERS
    joined = following[0].islower() or following[0] in ";:,.!?"
    if len(base) == 1 and base.isalpha():
        return base not in _INITIALS and not joined and (starter or base in "abix" or not following[0].isupper())
    dotted = re.fullmatch(r"(?:[a-z]\.)+[a-z]", base) and base not in _NO_INITIALS
    if base.endswith(".") or dotted or base in _ABBREVIATIONS or base.rpartition("-")[2] in _ABBREVIATIONS:
        return starter
    return not (joined and re.fullmatch(r"[.,]?\d[\d,.-]*", base))

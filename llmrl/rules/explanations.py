"""Self-explanations for ExPO: sampled with the answer in sight, post-processed, verified, filtered. arXiv:2507.02834, section 4.1 of our notes.

The answer is visible when a text is sampled and hidden when it is trained: what comes out of here are token ids, and whoever trains on
them puts them behind the context of the plain question. Texts are cut between the tokens that were sampled; nothing is tokenised anew but
the answer that is put behind the cut.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmrl.records import Completion, InputError, Prompt, Verdict
from llmrl.rollout import RolloutIO
from llmrl.templates import Template

MARKS = ("\\boxed", "final answer", "the answer is", "####")
"""With what a final-answer statement begins in a chat model's text. OUR CHOICE."""
HINTS = (
    "given that the answer is", "as provided", "the correct answer is stated", "correct answer is given", "the given answer", "the provided answer",
    "the answer is given", "the answer is provided", "answer provided", "the stated answer", "the known answer", "we are told that the answer",
    "we know that the answer", "we know the answer", "since the answer is", "matches the answer", "the correct answer",
)  # fmt: skip
"""How a text gives away that it was shown the answer. The first three are the specification's, the others OUR CHOICE."""
RIGHT = 0.5
"""A response is right if its score is above this."""
_SENTENCE = re.compile(r"\n|[.!?] +")
_OPEN = re.compile(r"(\\\[|\\\()\s*$")


@dataclass(frozen=True)
class Explanation:
    """A training target y~: the reasoning as it was sampled, then the answer in the canonical form and the end token."""

    reasoning: list[int]
    suffix: list[int]
    version: int
    """of the weights that wrote the reasoning"""
    text: str
    """of both, decoded"""

    @property
    def token_ids(self) -> list[int]:
        return [*self.reasoning, *self.suffix]


@dataclass(frozen=True)
class Explainer:
    """How explanations are made. OUR CHOICE throughout (the paper's prompt and filters are not public), after the intent of section 4.1."""

    template: Template
    answer_format: str
    """ans(a*): the final-answer statement with {answer} in it"""
    source: Literal["self", "solution"] = "self"
    """"solution": the row's own solution in place of what the policy writes, cut and ended alike, nothing filtered"""
    marks: tuple[str, ...] = MARKS
    cut: Literal["sentence", "mark"] = "sentence"
    """where the final-answer statement begins: at the start of the sentence or line that holds a mark, or at the first mark itself"""
    hints: tuple[str, ...] = HINTS
    min_tokens: int = 20
    resample: int = 3
    """further tries where a text is not accepted"""
    shuffle: bool = False
    """the answer of another prompt in place of the right one (a control: it must not help)"""

    def __post_init__(self) -> None:
        if "{answer}" not in self.answer_format or not self.answer_format.replace("{answer}", "").strip():
            raise ValueError(f"answer_format = {self.answer_format!r}: it is the statement that ends a target, with {{answer}} in it, e.g. \"#{{answer}}\"")
        if not self.marks or not all(self.marks):
            raise ValueError('marks: name at least one text with which a final-answer statement begins, e.g. ["#"]')
        if self.min_tokens < 1 or self.resample < 0:
            raise ValueError(f"min_tokens = {self.min_tokens} must be at least 1 and resample = {self.resample} at least 0")

    def hinted(self, prompt: Prompt, io: RolloutIO) -> list[int]:
        """The context in which an explanation is sampled: the answer is in it."""
        return io.chat.prompt_ids(self.template.messages(prompt, answer=answer_of(prompt)))

    def mentions(self, text: str) -> bool:
        """Whether the text gives away that it was shown the answer."""
        low = " ".join(text.lower().split())
        return any(h.lower() in low for h in self.hints)

    def reasoning_ends(self, text: str) -> int:
        """The place at which the final-answer statement begins; the text's length where it states none."""
        low, marks = text.lower(), [m.lower() for m in self.marks]
        if self.cut == "mark":
            return min((at for m in marks if (at := low.find(m)) >= 0), default=len(text))
        end, first = len(text), True
        while (at := max(low.rfind(m, 0, end) for m in marks)) >= 0:
            if not first and any(text[b.end() : end].strip() for b in _SENTENCE.finditer(text, at, end)):
                break  # an earlier mention, with reasoning behind it
            end, first = max((b.end() for b in _SENTENCE.finditer(text, 0, at)), default=0), False
            while opened := _OPEN.search(text, 0, end):  # the statement's own "\["
                end = opened.start()
            if text[:end].rstrip().endswith("$$") and text.count("$$", 0, end) % 2:
                end = text.rfind("$$", 0, end)
        return end

    def target(self, ids: Sequence[int], answer: str, version: int, io: RolloutIO) -> Explanation:
        """ids (a sampled text, with or without its end token) cut before the final-answer statement, and the answer put behind."""
        chat = io.chat
        ids = list(ids[:-1] if ids and ids[-1] == chat.tokenizer.eos_token_id else ids)
        text = chat.text(ids)
        kept, before = len(ids), text[: self.reasoning_ends(text)]
        while kept and not before.startswith(chat.text(ids[:kept])):  # a token on both sides of the cut goes
            kept -= 1
        statement = self.answer_format.replace("{answer}", answer)
        head = chat.text(ids[:kept])
        if not head or head[-1].isspace():
            statement = statement.lstrip()
        suffix = chat.completion_ids(statement)
        return Explanation(ids[:kept], suffix, version, chat.text([*ids[:kept], *suffix]))

    def judge(self, done: Completion, verdict: Verdict, answer: str, io: RolloutIO) -> Explanation | str:
        """The target, or the reason why there is none."""
        if done.finish == "length":
            return "length"
        if verdict.score is None:
            return "unjudged"
        if verdict.status == "ok" and verdict.score <= RIGHT:
            return "contradicts"
        made = self.target(done.token_ids, answer, done.policy_version, io)
        if len(made.reasoning) < self.min_tokens:
            return "short"
        return "hint" if self.mentions(io.chat.text(made.reasoning)) else made


def answer_of(prompt: Prompt) -> str:
    """The gold answer. InputError where the row has none."""
    if prompt.answer is None:
        raise InputError(f"row {prompt.id}: it has no answer, and ExPO shows the answer; give every row one (data.columns.answer)")
    return prompt.answer


def shown(prompts: Sequence[Prompt], *, shuffle: bool) -> list[Prompt | None]:
    """The prompts with the answers that are shown as right; shuffled: that of the next prompt of the step (on this rank) that has another one."""
    if not shuffle:
        return list(prompts)
    found: list[Prompt | None] = []
    for i, p in enumerate(prompts):
        others = (q.answer for q in (*prompts[i + 1 :], *prompts[:i]) if q.answer is not None and q.answer != p.answer)
        other = next(others, None)
        found.append(None if other is None else replace(p, answer=other))
    return found


async def explain(how: Explainer, prompts: Sequence[Prompt], io: RolloutIO, n: int = 1) -> tuple[list[list[Explanation]], Counter[str]]:
    """(accepted explanations of each prompt, at most n; how many texts met which end, "tries" being all of them).

    All prompts are sampled side by side; those of them that are not accepted are sampled again, up to how.resample times.
    """
    asked = shown(prompts, shuffle=how.shuffle)
    if how.source == "solution":
        return [[expert(how, p, io)] if p is not None else [] for p in asked], Counter(accepted=len(prompts), tries=len(prompts))
    ends: Counter[str] = Counter()
    found: dict[tuple[int, int], Explanation] = {}
    open_ = [(k, m, p) for k, p in enumerate(asked) if p is not None for m in range(n)]
    ends["no_other_answer"] = n * sum(p is None for p in asked)
    for attempt in range(how.resample + 1):
        if not open_:
            break
        done = io.sample([how.hinted(p, io) for _, _, p in open_], [(p.visit_id, "explain", m, attempt) for _, m, p in open_])
        verdicts = await io.verify([(p, c.text) for (_, _, p), c in zip(open_, done, strict=True)])
        left = []
        for (k, m, p), c, v in zip(open_, done, verdicts, strict=True):
            made = how.judge(c, v, answer_of(p), io)
            ends["accepted" if isinstance(made, Explanation) else made] += 1
            if isinstance(made, Explanation):
                found[k, m] = made
            else:
                left.append((k, m, p))
        ends["tries"] += len(done)
        open_ = left
    return [[found[k, m] for m in range(n) if (k, m) in found] for k in range(len(prompts))], ends


def expert(how: Explainer, prompt: Prompt, io: RolloutIO) -> Explanation:
    """The dataset's solution, cut and ended like an explanation. InputError where the row has none."""
    text = prompt.meta.get("solution")
    if not isinstance(text, str):
        raise InputError(f'row {prompt.id}: source = "solution" needs the dataset\'s solutions, and this row has none (data.columns.solution)')
    return how.target(io.chat.completion_ids(text), answer_of(prompt), io.version, io)


def to_memory(found: Sequence[Explanation], step: int) -> dict[str, Any]:
    """What io.memory keeps of a prompt's explanations."""
    return {"step": step, "explanations": [{**vars(e)} for e in found]}


def from_memory(entry: dict[str, Any]) -> list[Explanation]:
    return [Explanation(**e) for e in entry["explanations"]]

"""The records that flow through a step, and the protocols of a plug-in. Plain Python: importing this loads no torch.

Shape legend, used as a suffix everywhere: S samples, G groups, T completion tokens that count (flat, never padded; Sample.mask),
P packed input tokens of a forward (contexts stored once, then completions), V vocabulary, D hidden, R attention rows, L row length.
Log-probabilities are natural logs (nats). Scores are in [0, 1]. A positive advantage is good; a `*_loss` is minimised.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Status = Literal["ok", "no_answer", "timeout", "error"]
Finish = Literal["stop", "length"]
Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


class InputError(Exception):
    """Input that is refused: a recipe key, a data row, a plug-in reference. Commands print it and exit with code 2."""


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset."""

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    """The gold answer; None where the row has none (a verifier that needs it then returns status "error")."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The other columns of the row, and `solution` where there is one."""
    visit: int = 0
    """How often the training stream has been through the dataset before: the same prompt again is another visit, on whatever rank."""

    @property
    def visit_id(self) -> str:
        """Names this visit: the id, with ~1, ~2, ... from the second time on. The random streams of its samples hang on it."""
        return f"{self.id}~{self.visit}" if self.visit else self.id

    @property
    def text(self) -> str:
        """The content of the last user message."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one response.

    score is in [0, 1], or None when the response could not be judged (status "timeout" or "error"): never a silent 0.
    status "no_answer" is a judged response in which no answer was found; its score is a real number, normally 0.
    """

    score: float | None
    status: Status = "ok"
    answer: str | None = None
    """The answer as extracted from the response."""
    detail: str = ""
    """Why: the error's text, the rule that matched, a part-by-part breakdown. For people, never parsed."""

    def __post_init__(self) -> None:
        if self.status not in ("ok", "no_answer", "timeout", "error"):
            raise ValueError(f"Verdict.status is {self.status!r}; it must be ok, no_answer, timeout or error")
        judged = self.status in ("ok", "no_answer")
        if judged != (self.score is not None):
            raise ValueError(f"Verdict(score={self.score}, status={self.status!r}): a score goes with ok and no_answer only")
        if self.score is not None and not 0.0 <= float(self.score) <= 1.0:  # NaN fails this comparison too
            raise ValueError(f"Verdict.score is {self.score}; it must lie in [0, 1] or be None")


class Verifier(Protocol):
    """Judges one response against its own prompt. May be a coroutine function. Must not look at other responses."""

    def __call__(self, prompt: Prompt, response: str) -> Verdict | Awaitable[Verdict]: ...


@dataclass(frozen=True)
class Sampling:
    """How to sample. The defaults are the pure softmax at temperature 1; temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 = off"""
    min_p: float = 0.0
    """Tokens below min_p times the largest probability are cut; 0 = off."""
    stop: tuple[str, ...] = ()
    """A completion ends when its text contains one of these; the stop text stays part of it (it is trained on)."""


@dataclass(frozen=True)
class Completion:
    """What an engine returns for one request."""

    token_ids: list[int]
    """Includes the end token where there was one: it is trained on."""
    logprobs: list[float]
    """Per token, under the distribution that was sampled from (after temperature, top-p, top-k, min-p), fp32. 0.0 for greedy."""
    finish: Finish
    policy_version: int
    text: str
    """Decoded, special tokens left out."""


@dataclass(frozen=True)
class Request:
    """One completion to make. The random stream belongs to `seed`: the same tokens come out in any batch."""

    context_ids: tuple[int, ...]
    seed: tuple[int | str, ...]
    sampling: Sampling


@runtime_checkable
class Engine(Protocol):
    """Generates with a version of the policy."""

    policy_version: int

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in order."""
        ...

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Log-probs (nats, temperature 1) of the second ids of each pair behind the first, one a token; nothing is sampled."""
        ...

    def load_weights(self, version: int, weights: Callable[[], Any] | None) -> None:
        """Make `version` the policy that is sampled from. `weights` is not called by engines that share the learner's memory."""
        ...


@dataclass
class Sample:
    """One completion on its way through a step."""

    id: str
    prompt_id: str
    context_ids: list[int]
    """What the *training* forward is conditioned on."""
    token_ids: list[int]
    behavior_logp: list[float] | None
    """Engine's log-probs of token_ids under context_ids; None when the text was sampled under another context."""
    policy_version: int
    text: str = ""
    finish: Finish = "stop"
    role: str = "policy"
    cohort: str = ""
    """The samples it is compared with; default: its prompt."""
    verdict: Verdict | None = None
    reward: float | None = None
    """Verdict.score plus any shaping; None = could not be judged: weight 0, outside its cohort's statistics, counted."""
    weights: dict[str, float] = field(default_factory=lambda: {"policy": 1.0})
    """Which loss terms the tokens feed, and how strongly."""
    streams: dict[str, list[float]] = field(default_factory=dict)
    """Extra numbers, one a token."""
    parent: str | None = None
    mask: list[bool] | None = None
    """One a token: True = it counts (the policy wrote it), False = it is only read, as what an environment says between two turns is: no
    loss, denominator, credit, length or metric sees it. None = all count. behavior_logp is NaN at tokens that do not count, streams are
    whatever there."""

    def __post_init__(self) -> None:
        if not self.cohort:
            self.cohort = self.prompt_id
        if not self.token_ids:
            raise ValueError(f"sample {self.id}: no tokens")
        if self.behavior_logp is not None and len(self.behavior_logp) != len(self.token_ids):
            raise ValueError(f"sample {self.id}: {len(self.token_ids)} tokens but {len(self.behavior_logp)} log-probs")
        if self.mask is not None and (len(self.mask) != len(self.token_ids) or not any(self.mask)):
            raise ValueError(f"sample {self.id}: {len(self.token_ids)} tokens, a mask of {len(self.mask)} of which {sum(self.mask)} count; one must")

    @property
    def length(self) -> int:
        """Tokens that count."""
        return len(self.token_ids) if self.mask is None else sum(self.mask)

    def counted(self, values: Sequence[Any]) -> list[Any]:
        """One value a token -> one a token that counts."""
        return list(values) if self.mask is None else [x for x, on in zip(values, self.mask, strict=True) if on]

    def spread(self, values: Sequence[float], blank: Any = float("nan")) -> list[Any]:
        """The way back: one value a token that counts -> one a token, `blank` at the others."""
        if len(values) != self.length:
            raise ValueError(f"sample {self.id}: {self.length} tokens count, {len(values)} values were given")
        own = iter(values)
        return list(values) if self.mask is None else [next(own) if on else blank for on in self.mask]

    def recontext(self, context_ids: Sequence[int]) -> Sample:
        """The same tokens, to be trained under another context: behavior_logp becomes None, the learner fills in old_logp."""
        from dataclasses import replace

        return replace(self, context_ids=list(context_ids), behavior_logp=None, weights=dict(self.weights), streams=dict(self.streams))


@dataclass
class Group:
    """A prompt and its samples: the unit of credit, kept whole on one rank."""

    prompt: Prompt
    samples: list[Sample]

"""MultiRole-R1 (Wang et al., arXiv:2507.20187), its second stage: grpo on a reward that mixes accuracy with the diversity of the text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.records import Group, Prompt
from llmrl.rollout import RolloutIO, sample_groups
from llmrl.rules.base import Over, Rule, Term

Part = Literal["lexical", "entropy", "sentence_length", "sentence_type", "adjacency", "yule", "bigram", "function_words"]
PARTS: tuple[Part, ...] = ("lexical", "entropy", "sentence_length", "sentence_type", "adjacency", "yule", "bigram", "function_words")
_FUNCTION_WORDS = (
    "a about after all also an and any are as at be because been before but by can could did do does for from had has have he her his how i if in into "
    "is it its may me might more most my no not of on or our she should so some such than that the their them then there these they this those to us "
    "was we were what when where which while who why will with would you your"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
_END = {".": "declarative", "?": "interrogative", "!": "exclamatory"}


def multirole(
    *, diversity: float = 0.1, parts: tuple[Part, ...] = PARTS, low: float = 0.2, high: float = 0.2, over: Over = "sample", std_eps: float = 1e-6,
    mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo on R = (1 - diversity) * score + diversity * D, D the mean of eight measures of the text's variety. arXiv:2507.20187.

    D = mean of: distinct words / words; entropy of words / log distinct; std / mean of sentence lengths; entropy of sentence types / log 3; mean 1 -
    Jaccard of neighbouring sentences; 1 / (1 + Yule's K); distinct bigrams / bigrams; entropy of function words / log |list|
    Differs from grpo: (1) that reward, so groups of equal scores still learn (from D alone: its size after division by the std does not shrink with
    `diversity`). diversity (gamma) 0.1 is the paper's. Below 0.5 a right sample always beats a wrong one. Its accuracy over the roles' answers is the
    verifier's affair; its first stage, fine-tuning on several roles' texts, is not here. OUR CHOICE: words by a regular expression, English function
    words, sentence types by end mark, measures cut at 1, an empty text gets 0, all eight by default (the abstract says seven). Yule's is tiny on
    short texts by construction; each part is a metric rule/diversity_<part>.
    """
    if not 0 <= diversity <= 1 or not parts:
        raise ValueError(f"multirole: diversity = {diversity} must lie in [0, 1], and parts name at least one measure")

    def mixed(a_S: Tensor, view: c.View) -> Tensor:
        return (1 - diversity) * a_S + diversity * view.of_sample("diversity").nan_to_num(0.0)

    return Rule(
        credit=c.Credit((c.stateless("diversity", mixed), c.center(), c.scale(eps=std_eps))), loss=(Term(losses.pg_clip(low, high), over=over),),
        collect=partial(_measured_groups, parts=parts, mask_truncated=mask_truncated),
    )  # fmt: skip


multirole.cost = ""  # type: ignore[attr-defined]  # its collect only puts numbers beside the samples


def measures(text: str, function_words: frozenset[str] = FUNCTION_WORDS) -> dict[str, float]:
    """Each of the eight in [0, 1]; all 0 for a text without words. A sentence ends at . ? or !, what is left over is a declarative one."""
    found = re.findall(r"([^.?!]*)([.?!]|$)", text.lower())
    sentences = [(w, _END.get(end, "declarative")) for body, end in found if (w := re.findall(r"\w+(?:'\w+)*", body))]
    words = [w for own, _ in sentences for w in own]
    n, counts = len(words), Counter(words)
    if not n:
        return dict.fromkeys(PARTS, 0.0)
    lengths = [len(own) for own, _ in sentences]
    mean = sum(lengths) / len(lengths)
    sets = [set(own) for own, _ in sentences]
    pairs = list(pairwise(words))
    yule = 1e4 * (sum(k * k for k in counts.values()) - n) / n**2
    made: dict[str, Callable[[], float]] = {
        "lexical": lambda: len(counts) / n,
        "entropy": lambda: _entropy(counts) / math.log(len(counts)) if len(counts) > 1 else 0.0,
        "sentence_length": lambda: math.sqrt(sum((k - mean) ** 2 for k in lengths) / len(lengths)) / mean,
        "sentence_type": lambda: _entropy(Counter(kind for _, kind in sentences)) / math.log(len(_END)),
        "adjacency": lambda: _mean([1 - len(a & b) / len(a | b) for a, b in pairwise(sets)]),
        "yule": lambda: 1 / (1 + yule),
        "bigram": lambda: len(set(pairs)) / len(pairs) if pairs else 0.0,
        "function_words": lambda: _entropy(Counter({w: k for w, k in counts.items() if w in function_words})) / math.log(max(2, len(function_words))),
    }
    return {name: min(1.0, f()) for name, f in made.items()}


def _entropy(counts: Counter[str]) -> float:
    """Nats; 0 of nothing."""
    total = counts.total()
    return -sum(k / total * math.log(k / total) for k in counts.values()) + 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


async def _measured_groups(prompts: Sequence[Prompt], io: RolloutIO, *, parts: Sequence[Part], mask_truncated: bool) -> list[Group]:
    groups = await sample_groups(prompts, io, mask_truncated=mask_truncated)
    for s in (s for g in groups for s in g.samples):
        own = measures(s.text)
        s.streams["diversity"] = [_mean([own[p] for p in parts])] * len(s.token_ids)
        for p in parts:
            io.note(f"diversity_{p}", own[p])
    return groups

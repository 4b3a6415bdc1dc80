"""ExPO's checks before training: are self-explanations likely under the policy, and do they lead to the answer? arXiv:2507.02834, properties 1 and 2.

Everything is measured given the question alone, at temperature 1, without gradient. `llmrl explain RECIPE` prints it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmrl.records import Prompt, Sample
from llmrl.rollout import RolloutIO
from llmrl.rules import explanations as x
from llmrl.rules.expo import make_pairs

_STEP = re.compile(r"\n|;|[.!?] ")


@dataclass(frozen=True)
class Measured:
    """Texts of one kind: nats."""

    texts: int
    tokens: int
    nll_nats: float | None
    """mean per token of the reasoning, cut before the final-answer statement"""
    answer_logp: dict[str, float]
    """share of the reasoning that is shown -> mean over texts of log pi(ans(a*) | q, that much of it)"""


def _measure(contexts: Sequence[Sequence[int]], made: Sequence[x.Explanation], io: RolloutIO) -> Measured:
    nll, tokens, answers = 0.0, 0, {}
    for share in (1.0, 0.75, 0.5):
        parts = [e.reasoning[: math.ceil(share * len(e.reasoning))] for e in made]
        logp = io.score(contexts, [[*p, *e.suffix] for p, e in zip(parts, made, strict=True)])
        if made:
            answers[f"{share:.0%}"] = sum(sum(row[len(p) :]) for p, row in zip(parts, logp, strict=True)) / len(made)
        if share == 1.0:
            nll, tokens = -sum(sum(row[: len(p)]) for p, row in zip(parts, logp, strict=True)), sum(map(len, parts))
    return Measured(len(made), tokens, nll / tokens if tokens else None, answers)


def states_early(text: str, answer: str) -> bool:
    """Whether the answer stands in the reasoning before its last step (steps end at line breaks, semicolons and sentences). Alone, not within a number."""
    ends = [m.start() for m in _STEP.finditer(text.rstrip())]
    before = text[: ends[-1]] if ends else ""
    return re.search(rf"(?<![\w.]){re.escape(answer)}(?![\w]|\.\d)", before) is not None


async def before_training(how: x.Explainer, prompts: Sequence[Prompt], io: RolloutIO) -> dict[str, Any]:
    """The report: `own` samples, `explanation`s and `expert` solutions measured; lift of log pi(a*) over own samples, the same questions; shares."""
    how = replace(how, source="self")
    contexts = [io.chat.prompt_ids(p.messages) for p in prompts]
    done = io.sample(contexts, [(p.visit_id, "report") for p in prompts])
    verdicts = await io.verify([(p, c.text) for p, c in zip(prompts, done, strict=True)])
    own = [how.target(c.token_ids, x.answer_of(p), c.policy_version, io) for p, c in zip(prompts, done, strict=True)]
    found, ends = await x.explain(how, prompts, io)
    kept = [k for k, e in enumerate(found) if e]
    made = [found[k][0] for k in kept]
    expert = [k for k, p in enumerate(prompts) if isinstance(p.meta.get("solution"), str)]
    kinds = {
        "own": _measure(contexts, own, io), "own, where explained": _measure([contexts[k] for k in kept], [own[k] for k in kept], io),
        "explanation": _measure([contexts[k] for k in kept], made, io),
        "expert": _measure([contexts[k] for k in expert], [x.expert(how, prompts[k], io) for k in expert], io),
    }  # fmt: skip
    base, shown = kinds["own, where explained"], kinds["explanation"]
    early = [states_early(io.chat.text(e.reasoning), x.answer_of(prompts[k])) for k, e in zip(kept, made, strict=True)]
    judged = [v.score for v in verdicts if v.score is not None]
    return {
        "questions": len(prompts), "accuracy": sum(judged) / len(judged) if judged else None, "kinds": {k: vars(m) for k, m in kinds.items()},
        "lift_nats": {share: shown.answer_logp[share] - base.answer_logp[share] for share in shown.answer_logp},
        "explained_share": len(made) / len(prompts), "states_answer_early_share": sum(early) / len(early) if early else None,
        "tries": {name: ends[name] for name in ("tries", "accepted", "contradicts", "hint", "short", "length", "unjudged")},
    }  # fmt: skip


async def pair_rows(how: x.Explainer, prompts: Sequence[Prompt], io: RolloutIO) -> list[dict[str, Any]]:
    """Rows of a pairs file for exp_dpo(mode="offline"), of the prompts that have a pair."""
    pairs: list[tuple[x.Explanation, Sample] | None] = await make_pairs(how, prompts, io)
    return [
        {
            "id": p.id, "context_ids": s.context_ids, "chosen": e.token_ids, "rejected": s.token_ids, "version": io.version,
            "chosen_text": e.text, "rejected_text": s.text,
        }
        for p, (e, s) in ((p, pair) for p, pair in zip(prompts, pairs, strict=True) if pair is not None)
    ]  # fmt: skip

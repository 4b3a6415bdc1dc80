"""Greedy accuracy on held-out prompts, with the same engine and verifier as training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from llmrl.metrics import wilson
from llmrl.records import Prompt, Request
from llmrl.session import Session


@dataclass
class EvalResult:
    """Accuracy is the mean score of the judged answers, all ranks; None when none could be judged."""

    accuracy: float | None
    low: float | None
    high: float | None
    judged: int
    unjudged: int
    mean_tokens: float
    answers: list[dict[str, Any]]
    """This rank's rows: id, prompt, gold, response, score, status, tokens."""

    def row(self) -> dict[str, float | None]:
        return {
            "eval/accuracy": self.accuracy, "eval/accuracy_low": self.low, "eval/accuracy_high": self.high, "eval/judged": self.judged,
            "eval/unjudged": self.unjudged, "eval/mean_tokens": self.mean_tokens,
        }  # fmt: skip


def evaluate(session: Session) -> EvalResult:
    """One greedy answer to every held-out prompt; ranks share the prompts."""
    mine: list[Prompt] = session.tables.held_out[session.rank :: session.world]
    greedy = replace(session.sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    chat = session.policy.chat
    done = session.engine.generate([Request(tuple(chat.prompt_ids(p.messages)), ("eval", p.id), greedy) for p in mine])
    verdicts = session.scorer.score([(p, c.text) for p, c in zip(mine, done, strict=True)])
    answers = [
        {"id": p.id, "prompt": p.text, "gold": p.answer, "response": c.text, "score": v.score, "status": v.status, "tokens": len(c.token_ids)}
        for p, c, v in zip(mine, done, verdicts, strict=True)
    ]
    scores = [v.score for v in verdicts if v.score is not None]
    local = torch.tensor([sum(scores), len(scores), len(mine), sum(len(c.token_ids) for c in done)], dtype=torch.float64)
    right, judged, asked, tokens = session.learner.all_sum(local).tolist()
    low, high = wilson(right, judged) if judged else (None, None)
    return EvalResult(right / judged if judged else None, low, high, int(judged), int(asked - judged), tokens / max(asked, 1), answers)

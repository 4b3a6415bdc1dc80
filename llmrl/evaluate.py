"""Greedy accuracy on held-out prompts, with the same engine and verifier as training."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmrl.memory import Memory
from llmrl.metrics import wilson
from llmrl.records import Prompt, Request, Sampling, Verdict
from llmrl.rollout import RolloutIO
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
    """One greedy answer, or one greedy episode, to every held-out prompt; ranks share the prompts."""
    mine: list[Prompt] = session.tables.held_out[session.rank :: session.world]
    greedy = replace(session.sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    said = _answers(session, mine, greedy) if session.environment is None else _episodes(session, mine, greedy)
    answers = [
        {"id": p.id, "prompt": p.text, "gold": p.answer, "response": text, "score": v.score, "status": v.status, "tokens": n}
        for p, (text, n, v) in zip(mine, said, strict=True)
    ]
    verdicts = [v for *_, v in said]
    scores = [v.score for v in verdicts if v.score is not None]
    local = torch.tensor([sum(scores), len(scores), len(mine), sum(n for _, n, _ in said)], dtype=torch.float64)
    right, judged, asked, tokens = session.learner.all_sum(local).tolist()
    low, high = wilson(right, judged) if judged else (None, None)
    return EvalResult(right / judged if judged else None, low, high, int(judged), int(asked - judged), tokens / max(asked, 1), answers)


def _answers(session: Session, prompts: Sequence[Prompt], how: Sampling) -> list[tuple[str, int, Verdict]]:
    """(text, tokens, verdict) of one completion a prompt."""
    chat = session.policy.chat
    done = session.engine.generate([Request(tuple(chat.prompt_ids(p.messages)), ("eval", p.id), how) for p in prompts])
    verdicts = session.scorer.score([(p, c.text) for p, c in zip(prompts, done, strict=True)])
    return [(c.text, len(c.token_ids), v) for c, v in zip(done, verdicts, strict=True)]


def _episodes(session: Session, prompts: Sequence[Prompt], how: Sampling) -> list[tuple[str, int, Verdict]]:
    """The same of one episode a prompt, whose environment has the same seed every time: that of step 0."""
    assert session.environment is not None
    io = RolloutIO(session.engine, session.scorer, session.policy.chat, Memory(), how, 1, (session.recipe.seed, 0))
    samples = [g.samples[0] for g in asyncio.run(session.environment.play(prompts, io))]
    return [(s.text, s.length, s.verdict or Verdict(None, "error")) for s in samples]

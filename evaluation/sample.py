"""Sampling traces from a model: n responses to every prompt, written as they come, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmrl.evaluation.traces import Trace, TraceWriter
from llmrl.records import Engine, Prompt, Request, Sampling, Verdict


def sample_traces(
    engine: Engine, prompt_ids: Callable[[Prompt], Sequence[int]], prompts: Sequence[Prompt], out: Path, *, n: int, sampling: Sampling, seed: int,
    model: str, score: Callable[[list[tuple[Prompt, str]]], list[Verdict]] | None = None, batch: int = 256, resume: bool = True,
    each: Callable[[int], None] = lambda done: None,
) -> int:  # fmt: skip
    """Writes n traces a prompt to `out` and returns how many were new. Ids are "<prompt id>/<i>".

    The random stream belongs to (seed, prompt id, i): a resumed file is the file of an unbroken run. `score` grades each batch;
    without it traces carry status None. `each` is called with the number of traces written so far.
    """
    with TraceWriter(out, resume=resume) as writer:
        todo = [(p, i) for p in prompts for i in range(n) if f"{p.id}/{i}" not in writer.ids]
        each(len(writer.ids))
        for a in range(0, len(todo), batch):
            part = todo[a : a + batch]
            done = engine.generate([Request(tuple(prompt_ids(p)), (seed, p.id, i), sampling) for p, i in part])
            verdicts: list[Verdict | None] = [None] * len(part)
            if score is not None:
                verdicts = list(score([(p, c.text) for (p, _), c in zip(part, done, strict=True)]))
            for (p, i), c, v in zip(part, done, verdicts, strict=True):
                judged: dict[str, Any] = {} if v is None else {"score": v.score, "status": v.status, "answer": v.answer}
                writer.write(
                    Trace(
                        id=f"{p.id}/{i}", prompt_id=p.id, prompt=p.text, messages=list(p.messages), gold=p.answer, response=c.text,
                        token_ids=c.token_ids, logprobs=c.logprobs, finish=c.finish, model=model, sample=i, **judged,
                    )
                )
            each(len(writer.ids))
    return len(todo)

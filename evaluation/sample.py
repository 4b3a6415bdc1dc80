"""Sampling traces from a model: n responses to every prompt, written as they come, resumable."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmrl.evaluation.traces import Trace, TraceWriter
from llmrl.records import Completion, Engine, InputError, Prompt, Request, Sampling, Verdict

Item = tuple[Prompt, int]


def sample_traces(
    engine: Engine, prompt_ids: Callable[[Prompt], Sequence[int]], prompts: Sequence[Prompt], out: Path, *, n: int, sampling: Sampling, seed: int,
    model: str, score: Callable[[list[tuple[Prompt, str]]], list[Verdict]] | None = None, text: Callable[[Sequence[int]], str] | None = None,
    raw: bool = True, certainty: bool = False, batch: int | None = None, resume: bool = True, each: Callable[[int], None] = lambda done: None,
) -> int:  # fmt: skip
    """Writes n traces a prompt to `out` and returns how many were new. Ids are "<prompt id>/<i>".

    The random stream belongs to (seed, prompt id, i), and the traces of a batch are always made together, also where some of them are there
    already: a resumed file is, byte for byte, the file of an unbroken run, as far as the engine repeats itself (ours does; a vLLM server's
    log-probs hang on what else it is doing).

    raw: fills raw_logprobs (nats, temperature 1, nothing cut): the engine's own where it sampled from just that, else from a second pass over
    the finished texts (`engine.score`). certainty: adds the column self_certainty, a number a token (nats), by a pass of its own
    (`engine.certainty`, which our engine has). text: decodes ids; then traces hold the text of each token, which reports show. score: grades
    each batch; without it traces carry status None. batch: traces made together; default 256, less where there are few, so that `each`, which
    is called with the number of traces made so far, tells something. An engine that answers request by request (`streams`: servers share the
    requests) makes two batches at a time and calls `each` for every trace.

    Raises InputError where `out` was begun with another model or other sampling.
    """
    with TraceWriter(out, resume=resume) as writer:
        how = {"sampling": asdict(sampling) | {"stop": list(sampling.stop), "seed": seed}}
        _same_run(writer, model, how)
        items = [(p, i) for p in prompts for i in range(n)]
        size = batch or max(32, min(256, len(items) // 20))
        parts = [items[a : a + size] for a in range(0, len(items), size)]
        parts = [part for part in parts if any(trace_id(item) not in writer.ids for item in part)]
        begun = len(writer.ids)
        requests = [[Request(tuple(prompt_ids(p)), (seed, p.id, i), sampling) for p, i in part] for part in parts]
        each(begun)
        for part, asked, done in zip(parts, requests, _answers(engine, requests, each, len(items) - sum(map(len, parts))), strict=True):
            raws = raw_logprobs(engine, asked, done) if raw else [None] * len(part)
            new = [k for k, item in enumerate(part) if trace_id(item) not in writer.ids]
            verdicts: list[Verdict | None] = [None] * len(part)
            if score is not None:
                for k, v in zip(new, score([(part[k][0], done[k].text) for k in new]), strict=True):
                    verdicts[k] = v
            sure = engine.certainty([(r.context_ids, c.token_ids) for r, c in zip(asked, done, strict=True)]) if certainty else None  # type: ignore[attr-defined]
            for k in new:
                more = how if sure is None else how | {"self_certainty": [float(f"{x:.7g}") for x in sure[k]]}
                writer.write(_trace(part[k], done[k], raws[k], verdicts[k], text, model, more))
        each(len(items))
    return len(writer.ids) - begun


def trace_id(item: Item) -> str:
    return f"{item[0].id}/{item[1]}"


def _trace(
    item: Item, c: Completion, raw: list[float] | None, v: Verdict | None, text: Callable[[Sequence[int]], str] | None, model: str, extra: dict[str, Any]
) -> Trace:
    p, i = item
    judged: dict[str, Any] = {} if v is None else {"score": v.score, "status": v.status, "answer": v.answer}
    return Trace(
        id=trace_id(item), prompt_id=p.id, prompt=p.text, messages=list(p.messages), gold=p.answer, response=c.text, token_ids=c.token_ids,
        logprobs=c.logprobs, raw_logprobs=raw, tokens=token_texts(c.token_ids, text) if text else None, finish=c.finish, model=model, sample=i,
        extra=extra, **judged,
    )  # fmt: skip


def _same_run(writer: TraceWriter, model: str, how: dict[str, Any]) -> None:
    """A file that is continued holds one model under one sampling, or its scores mean nothing."""
    first = writer.first
    if first is None:
        return
    before, now = {"model": first.model, **first.extra.get("sampling", {})}, {"model": model, **how["sampling"]}
    wrong = [f"{key} was {before[key]!r} and is now {value!r}" for key, value in now.items() if key in before and before[key] != value]
    if wrong:
        raise InputError(f"{writer.path} was begun otherwise: {'; '.join(wrong)}. Name another --out, or begin anew with --restart")


def _answers(engine: Engine, requests: list[list[Request]], each: Callable[[int], None], done: int) -> Iterator[list[Completion]]:
    """The completions of each batch, in order. An engine that streams always has a second batch under way."""
    if not getattr(engine, "streams", False):
        for part in requests:
            yield engine.generate(part)
            done += len(part)
            each(done)
        return
    made = [done]

    async def one(request: Request) -> Completion:
        (completion,) = await engine.complete([request])  # type: ignore[attr-defined]
        made[0] += 1
        each(made[0])
        return completion

    async def every(part: list[Request]) -> list[Completion]:
        async with asyncio.TaskGroup() as group:  # the first failure ends the others
            tasks = [group.create_task(one(r)) for r in part]
        return [t.result() for t in tasks]

    def batch(part: list[Request]) -> list[Completion]:
        try:
            return asyncio.run(every(part))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    with ThreadPoolExecutor(2, "llmrl-sample") as pool:
        ahead: deque[Future[list[Completion]]] = deque()
        waiting = iter(requests)
        try:
            for part in waiting:
                ahead.append(pool.submit(batch, part))
                if len(ahead) == 2:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def raw_logprobs(engine: Engine, requests: Sequence[Request], done: Sequence[Completion]) -> list[list[float]]:
    """For each completion its tokens' log-probs (nats, one a token) at temperature 1 with nothing cut, to 7 digits.

    The engine's own where that is what it sampled from; else a teacher-forced second pass. Tokens that our engine never samples (padding,
    begin of text) are outside its softmax.
    """
    whole = [r.sampling.temperature == 1.0 and r.sampling.top_p == 1.0 and not r.sampling.top_k and not r.sampling.min_p for r in requests]
    again = [k for k, own in enumerate(whole) if not own]
    scored = engine.score([(requests[k].context_ids, done[k].token_ids) for k in again]) if again else []
    values = [list(c.logprobs) for c in done]
    for k, told in zip(again, scored, strict=True):
        values[k] = list(told)
    return [[float(f"{min(x, 0.0):.7g}") for x in row] for row in values]


def token_texts(ids: Sequence[int], text: Callable[[Sequence[int]], str]) -> list[str] | None:
    """The text that each token adds to `text(ids)`, so that they join to it; "" for special tokens, and for all but the last token of a character.

    Decodes only the last few ids each time: tokenizers write a token otherwise at the beginning of a text. None where it does not come out.
    """
    texts: list[str] = []
    start = read = 0
    said = ""
    for k in range(len(ids)):
        now = text(ids[start : k + 1])
        if now.endswith("\ufffd") and k + 1 < len(ids):  # part of a character
            texts.append("")
            continue
        texts.append(now[len(said) :])
        start, read = read, k + 1
        said = text(ids[start:read])
    return texts if "".join(texts) == text(ids) else None


def rescore(
    engine: Engine, prompt_ids: Callable[[Trace], Sequence[int]], completion_ids: Callable[[str], Sequence[int]], traces: Iterator[Trace], *,
    text: Callable[[Sequence[int]], str] | None = None, batch: int = 64,
) -> Iterator[Trace]:  # fmt: skip
    """Fills raw_logprobs of traces that have none from a model, teacher-forced. Needs `engine.score` of the model that wrote the texts.

    Where a trace has no token_ids, its text is tokenised anew (then logprobs, which belong to the tokens as sampled, are dropped): mostly
    the tokens that were sampled, and never the end token. A trace without text stays as it is.
    """

    def fill(waiting: list[Trace]) -> Iterator[Trace]:
        ids = [list(t.token_ids) if t.token_ids else list(completion_ids(t.response)) for t in waiting]
        todo = [k for k, t in enumerate(waiting) if t.raw_logprobs is None and ids[k]]
        whole = [t.extra.get("all_token_ids") or own for t, own in zip(waiting, ids, strict=True)]  # several turns: see formats.run
        told = dict(zip(todo, engine.score([(prompt_ids(waiting[k]), whole[k]) for k in todo]), strict=True)) if todo else {}
        told |= {k: [x for x, on in zip(told[k], mask, strict=True) if on] for k in todo if (mask := waiting[k].extra.get("mask"))}
        for k, t in enumerate(waiting):
            if k not in told:
                yield t
                continue
            fresh = {} if t.token_ids else {"token_ids": ids[k], "logprobs": None}
            tokens = t.tokens if t.token_ids and t.tokens else token_texts(ids[k], text) if text else None
            yield replace(t, raw_logprobs=[float(f"{min(x, 0.0):.7g}") for x in told[k]], tokens=tokens, **fresh)  # type: ignore[arg-type]

    waiting: list[Trace] = []
    for trace in traces:
        waiting.append(trace)
        if len(waiting) == batch:
            yield from fill(waiting)
            waiting = []
    yield from fill(waiting)

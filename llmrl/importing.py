"""What `llmrl import-traces` does: files of other programs to one trace file, on request with the probabilities that a model gives the texts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmrl import plugins
from llmrl.records import InputError
from llmrl.sampling import EVALUATORS, model_folder


def import_files(files: Sequence[Path], out: Path, *, score_with: str | None, dtype: str, quiet: bool, **how: Any) -> dict[str, Any]:
    """Reads each of `files` by `read_any(file, **how)` and writes the traces of all to `out`. Returns a JSON report, with "text" for people."""
    refs = ("importers:read_any", "importers:ImportReport", "traces:TraceWriter")
    read_any, report_of, writer_of = (plugins.resolve(f"{EVALUATORS}.{ref}", home=EVALUATORS, base=Path()) for ref in refs)
    if any(out.resolve() == f.resolve() for f in files):
        raise InputError(f"--out {out} is one of the files that are read; name another")
    reports: list[Any] = []

    def traces() -> Iterator[Any]:
        for file in files:
            reports.append(report_of(str(file)))
            yield from read_any(file, report=reports[-1], **how)

    source = traces() if score_with is None else _scored(traces(), score_with, dtype)
    done = 0
    with writer_of(out, resume=False) as writer:
        for trace in source:
            if trace.id in writer.ids:
                raise InputError(f"{reports[-1].path}: the id {trace.id!r} came before, in another of the files; import them one by one")
            writer.write(trace)
            done += 1
            if not quiet and done % 1000 == 0 and sys.stderr.isatty():
                print(f"\r{done} traces", end="", file=sys.stderr, flush=True)
        if not done:
            raise InputError("no trace in " + ", ".join(map(str, files)) + "\n" + "\n".join(r.text() for r in reports))
    if not quiet and done >= 1000 and sys.stderr.isatty():
        print(file=sys.stderr)
    texts = [r.text() for r in reports] + ([f"raw_logprobs that were missing are those of {score_with}, teacher-forced"] if score_with else [])
    return {"out": str(out), "traces": done, "scored_with": score_with, "files": [r.to_json() for r in reports], "text": "\n".join(texts)}


def choices(
    format: str | None = None, column: Sequence[str] | None = None, logprobs: str | None = None, join: Path | None = None, answer_after: str | None = None,
    score_key: str | None = None, filter: str | None = None, steps: str | None = None, on_bad: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What the command line said about files of others, as keywords of read_any; None = not said. Raises InputError."""
    for name, value, known in (("logprobs", logprobs, ("auto", "raw", "sampled")), ("on-bad", on_bad, ("refuse", "drop"))):
        if value not in (None, *known):
            raise InputError(f"--{name} {value}: expected {', '.join(known)}")
    pairs = [c.partition("=") for c in column or ()]
    if wrong := [c for c, (field, equals, _) in zip(column or (), pairs, strict=True) if not (field and equals)]:
        raise InputError(f"--column {wrong[0]}: expected FIELD=COLUMN, e.g. response=output")
    return {
        "format": format or "auto", "columns": {field: column for field, _, column in pairs}, "logprobs": logprobs or "auto", "join": join,
        "answer_after": answer_after, "score_key": score_key, "filter": filter, "steps": step_range(steps), "on_bad": on_bad or "refuse",
    }  # fmt: skip


def step_range(steps: str | None) -> tuple[int, int] | None:
    """"10-20" -> (10, 20), "10" -> (10, 10)."""
    if steps is None:
        return None
    first, _, last = steps.partition("-")
    if not (first.isdigit() and (last or first).isdigit()):
        raise InputError(f"--steps {steps}: expected two numbers, e.g. 10-20")
    return int(first), int(last or first)


def _scored(traces: Iterator[Any], model: str, dtype: str) -> Iterator[Any]:
    """The traces, those without raw_logprobs scored by `model`: the one that wrote them, or the numbers are of another."""
    import torch

    from llmrl.hf_engine import HFEngine
    from llmrl.models import load_policy
    from llmrl.recipe import Model

    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: expected float32 or bfloat16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(Model(path=model_folder(model), dtype=dtype), base=Path.cwd(), device=device)  # type: ignore[arg-type]
    tokenizer, chat = policy.chat.tokenizer, policy.chat

    def context(trace: Any) -> list[int]:
        text = trace.extra.get("context")
        if isinstance(text, str):  # as the model was given it, a template's tokens included
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            first = tokenizer.bos_token_id
            return ids if first is None or ids[:1] == [first] else [first, *ids]
        messages = trace.messages or ([{"role": "user", "content": trace.prompt}] if trace.prompt is not None else None)
        if not messages:
            raise InputError(f"trace {trace.id}: neither a prompt nor messages, so the model cannot score its text; join them (--join)")
        return list(chat.prompt_ids(messages))

    rescore = plugins.resolve("rescore", home=EVALUATORS, base=Path())
    yield from rescore(
        HFEngine(policy), context, lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]), traces, text=chat.text,
    )  # fmt: skip

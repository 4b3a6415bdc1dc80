"""What `llmrl sample` and `llmrl score` do: traces from a model, scores from traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmrl import plugins
from llmrl.records import InputError, Prompt, Sampling

EVALUATORS = "llmrl.evaluation"


def model_folder(model: str) -> str:
    """A run directory stands for its last checkpoint's model; everything else for itself."""
    from llmrl.checkpoint import checkpoints

    folder = Path(model)
    if (folder / "manifest.json").is_file():
        found = checkpoints(folder / "checkpoints")
        if found:
            return str(found[-1] / "model")
        if (folder / "model").is_dir():
            return str(folder / "model")
        raise InputError(f"{folder} is a run directory without a checkpoint")
    return model


def export_model(model: str, out: Path, dtype: str) -> dict[str, Any]:
    """Loads whatever `model` names, adapters merged in fp32, and saves it whole."""
    import torch

    from llmrl.models import load_policy
    from llmrl.recipe import Model

    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: expected float32 or bfloat16")
    if out.exists():
        raise InputError(f"{out} exists; name a folder that does not")
    policy = load_policy(Model(path=model_folder(model), dtype="float32"), base=Path.cwd())
    policy.model.to(getattr(torch, dtype))
    policy.model.config._attn_implementation = "sdpa"
    policy.model.save_pretrained(out)
    policy.chat.tokenizer.save_pretrained(out)
    return {"model": str(out), "dtype": dtype, "parameters": sum(p.numel() for p in policy.model.parameters())}


def sample_file(
    model: str, data: str, out: Path, *, n: int, temperature: float, top_p: float, max_new_tokens: int, stop: tuple[str, ...], limit: int | None,
    template: str | None, system: str | None, answer_after: str | None, args: dict[str, Any], split: str | None, verifier: str | None,
    verifier_args: dict[str, Any], dtype: str, seed: int, resume: bool, quiet: bool, servers: tuple[str, ...] = (),
    certainty: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Reads prompts, checks them, builds the verifier, only then loads the model; shows a progress bar with the time left.

    servers: addresses of vLLM servers that share the work instead; what they serve is sampled from, and `model` gives the tokenizer.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from llmrl.data import read_prompts
    from llmrl.scoring import Scorer

    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: expected float32 or bfloat16")
    if certainty and servers:
        raise InputError("--self-certainty needs whole distributions, which servers do not give: leave --server out, or the column")
    where = model_folder(model)
    prompts = read_prompts(
        data, base=Path.cwd(), split=split, args=args, template=template, system=system, answer_after=answer_after, limit=limit,
        need_answer=verifier is not None,
    ).prompts  # fmt: skip
    run = plugins.resolve("sample_traces", home=EVALUATORS, base=Path())
    scorer = Scorer(verifier, verifier_args, Path.cwd()) if verifier is not None else None
    engine: Any = None
    console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    try:
        policy, engine = _on_servers(where, servers, console) if servers else _on_this_machine(where, dtype)
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop)
        columns = (TextColumn("sampling"), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("traces"), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=quiet) as bar:
            task = bar.add_task("", total=len(prompts) * n)
            new = run(
                engine, lambda p: policy.chat.prompt_ids(p.messages), prompts, out, n=n, sampling=sampling, seed=seed, model=model,
                score=scorer.score if scorer else None, text=policy.chat.text, certainty=certainty, resume=resume,
                each=lambda done: bar.update(task, completed=done),
            )  # fmt: skip
    finally:
        if scorer:
            scorer.close()
        if servers and engine is not None:
            engine.close()
    return {"out": str(out), "new": new, "traces": len(prompts) * n, "prompts": len(prompts), "model": where}


def _on_this_machine(where: str, dtype: str) -> tuple[Any, Any]:
    """(policy, engine)"""
    import torch

    from llmrl.hf_engine import HFEngine
    from llmrl.models import load_policy
    from llmrl.recipe import Model

    policy = load_policy(Model(path=where, dtype=dtype), base=Path.cwd(), device="cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    return policy, HFEngine(policy)


def _on_servers(where: str, servers: Sequence[str], console: Any) -> tuple[Any, Any]:
    """(policy without weights, engine); says where a server serves something else by its own account."""
    from llmrl.vllm_sampling import connect, is_same

    policy, engine, served = connect(where, servers)
    for url, what in served.items():
        if not is_same(where, what):
            console.print(f"note: {url} serves {what}, which is sampled from; {where} gives only the tokenizer, and the traces its name", markup=False)
    return policy, engine


def score_files(
    files: Sequence[Path], use: str, *, ks: list[int] | None, resamples: int, seed: int, verifier: str | None, verifier_args: dict[str, Any]
) -> dict[Path, Any]:
    """One result a file, by the evaluator `use`. Traces without a score are graded by `verifier`; without one they are refused."""
    evaluator = plugins.resolve(use, home=EVALUATORS, base=Path.cwd())
    read = plugins.resolve("read_any", home=EVALUATORS, base=Path())
    results: dict[Path, Any] = {}
    for file in files:
        traces = graded(read(file), file, verifier, verifier_args)
        results[file] = evaluator(traces, ks=ks, resamples=resamples, seed=seed)
    return results


def graded(traces: Iterator[Any], file: Path, verifier: str | None, verifier_args: dict[str, Any]) -> Iterator[Any]:
    """The traces, those without a verdict judged by `verifier`; without one they are refused."""
    if verifier is None:
        for t in traces:
            if t.status is None and t.score is None:
                raise InputError(f"{file}: trace {t.id} carries no verdict; name a verifier to grade it with, e.g. --verifier math_answer")
            yield t
        return
    from llmrl.scoring import Scorer

    with Scorer(verifier, verifier_args, Path.cwd()) as scorer:
        waiting: list[Any] = []

        def grade() -> Iterator[Any]:
            todo = [t for t in waiting if t.status is None and t.score is None]
            items = [(Prompt(t.prompt_id, tuple(t.messages or ({"role": "user", "content": t.prompt or ""},)), t.gold), t.response) for t in todo]
            verdicts = {t.id: v for t, v in zip(todo, scorer.score(items), strict=True)}
            for t in waiting:
                v = verdicts.get(t.id)
                yield t if v is None else replace(t, score=v.score, status=v.status, answer=v.answer)
            waiting.clear()

        for t in traces:
            waiting.append(t)
            if len(waiting) == 1000:
                yield from grade()
        yield from grade()

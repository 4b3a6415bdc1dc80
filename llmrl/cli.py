"""The command line. Exit codes: 0 done, 2 input refused, 1 run failed (or a check that found something)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="RL post-training of language models that cannot be silently wrong.",
)  # fmt: skip

RecipePath = Annotated[Path, typer.Argument(help="A recipe: a .toml file, e.g. recipes/quickstart.toml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. optim.lr=1e-5 model.path=./my-model; KEY= drops a key or section of the file"),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout, nothing else.")]
Keys = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keywords of the plug-in, e.g. tolerance=1e-3")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run directory's last checkpoint: the same run, byte for byte.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the same directory.")]


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False, json_: Json = False) -> None:
    """Train a model by a recipe: warm start where it has one, then RL."""
    from llmrl.config import check_plugins, load_recipe

    loaded = load_recipe(recipe, overrides or [])
    check_plugins(loaded)
    from llmrl.console import Console, out
    from llmrl.train import train as run

    summary = run(loaded, resume=resume, overwrite=overwrite, console=Console(quiet=json_))
    if json_:
        out(json.dumps(summary))


@app.command()
def sft(recipe: RecipePath, overrides: Overrides = None, overwrite: Overwrite = False, json_: Json = False) -> None:
    """Run only a recipe's [warm_start]; writes RUN_DIR/model, a plain transformers folder."""
    from llmrl.config import check_plugins, load_recipe

    loaded = load_recipe(recipe, overrides or [])
    check_plugins(loaded)
    from llmrl.console import Console, out
    from llmrl.train import warm_start_only

    summary = warm_start_only(loaded, overwrite=overwrite, console=Console(quiet=json_))
    if json_:
        out(json.dumps(summary))


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="A transformers folder, a Hub id, smollm2, or a run directory (its last checkpoint)")],
    data: Annotated[str, typer.Option("--data", help="A .jsonl/.jsonl.gz/.parquet/.csv file, hub:NAME, gym:TASK, or a generator such as chains")],
    out: Annotated[Path, typer.Option("--out", help="traces.jsonl.gz; an interrupted file is continued")],
    n: Annotated[int, typer.Option("-n", min=1, help="Samples a prompt")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a response; may be given several times")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first rows only")] = None,
    template: Annotated[str | None, typer.Option(help='User message made from the row, e.g. "{prompt}\\nThink step by step."')] = None,
    system: Annotated[str | None, typer.Option(help="System message")] = None,
    answer_after: Annotated[str | None, typer.Option(help='The gold answer is what follows this mark, e.g. "####"')] = None,
    args: Annotated[str, typer.Option(help="JSON object: keywords of a generator, Hub dataset or reasoning-gym task")] = "{}",
    split: Annotated[str | None, typer.Option(help="Split of a Hub dataset")] = None,
    verifier: Annotated[str | None, typer.Option(help="Grade the responses: math_answer, numeric, ./mine.py:f, ...")] = None,
    verifier_args: Annotated[str, typer.Option(help="JSON object: keywords of the verifier")] = "{}",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where --out exists")] = False,
    json_: Json = False,
) -> None:  # fmt: skip
    """Sample n responses to every prompt, with token log-probs, to a trace file that `llmrl score` reads."""
    from llmrl.sampling import sample_file

    result = sample_file(
        model, data, out, n=n, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, stop=tuple(stop or ()), limit=limit,
        template=template, system=system, answer_after=answer_after, args=_json("--args", args), split=split, verifier=verifier,
        verifier_args=_json("--verifier-args", verifier_args), dtype=dtype, seed=seed, resume=not restart, quiet=json_,
    )  # fmt: skip
    _print(result, json_, f"{result['new']} new traces, {result['traces']} in all -> {out}")


@app.command()
def score(
    traces: Annotated[list[Path], typer.Argument(help="Trace files of `llmrl sample`")],
    use: Annotated[str, typer.Option("--use", help="The evaluator: passk, or a reference to one")] = "passk",
    k: Annotated[list[int] | None, typer.Option("-k", min=1, help="The k of pass@k; may be given several times")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples")] = 2000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    verifier: Annotated[str | None, typer.Option(help="Grade traces that carry no score: math_answer, numeric, ...")] = None,
    verifier_args: Annotated[str, typer.Option(help="JSON object: keywords of the verifier")] = "{}",
    json_: Json = False,
) -> None:  # fmt: skip
    """Score trace files: unbiased pass@k, mean@k, majority vote, truncation and no-answer rates, with bootstrap intervals."""
    from llmrl.sampling import score_files

    results = score_files(traces, use, ks=k or None, resamples=resamples, seed=seed, verifier=verifier, verifier_args=_json("--verifier-args", verifier_args))
    if json_:
        _print({str(path): r.to_json() for path, r in results.items()}, True, "")
        return
    from rich.console import Console

    for path, result in results.items():
        Console().print(str(path), result.table(), sep="\n")


@app.command()
def verify(
    cases: Annotated[Path, typer.Argument(help='Rows {"gold", "response", "label"?, "prompt"?, "id"?} as .jsonl or .jsonl.gz')],
    keys: Keys = None,
    use: Annotated[str, typer.Option("--use", help="The verifier: math_answer, numeric, exact, ./mine.py:f, trl:./mine.py:f, ...")] = "math_answer",
    out: Annotated[Path | None, typer.Option("--out", help="Write {id, score, status, answer} rows here")] = None,
    disagreements: Annotated[Path | None, typer.Option(help="Rows whose label the verifier contradicts; default CASES.disagreements.jsonl")] = None,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds a verdict may take")] = 10.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Calls in flight in one worker, for judges and reward models")] = 16,
    json_: Json = False,
) -> None:  # fmt: skip
    """Grade a file of responses with a verifier; where rows have labels, measure the agreement."""
    from llmrl.verify import verify_file

    where = disagreements or cases.with_name(cases.name.split(".jsonl")[0] + ".disagreements.jsonl")
    summary = verify_file(
        cases, use, _keywords(keys), Path.cwd(), out=out, disagreements=where, workers=workers, timeout_s=timeout_s,
        concurrency=concurrency, progress=not json_,
    )  # fmt: skip
    if not summary.labelled and disagreements is None and where.is_file() and where.stat().st_size == 0:
        where.unlink()  # without labels there is nothing to disagree with
    if json_:
        _print(summary.to_json(), True, "")
        return
    from rich.console import Console

    Console().print(summary.table())
    for path in (out, where if summary.labelled else None):
        if path is not None:
            Console().print(f"wrote {path}", markup=False)


@app.command()
def check(
    what: Annotated[str, typer.Argument(help="A recipe (.toml), or a verifier: math_answer, ./mine.py:f, pkg.mod:f")],
    overrides: Overrides = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Deadline of a verdict when a verifier is checked, seconds")] = 10.0,
    json_: Json = False,
) -> None:
    """Everything short of a training step for a recipe; the whole contract for a verifier. Exit code 1 if a check fails."""
    rows: Any
    if what.endswith(".toml"):
        from llmrl.check import check_recipe
        from llmrl.config import load_recipe

        rows = check_recipe(load_recipe(Path(what), overrides or []))
    else:
        from llmrl.plugins import resolve

        contract = resolve("llmrl.rewards.selfcheck:check_verifier", home="llmrl.rewards", base=Path())
        rows = contract(what, _keywords(overrides), Path.cwd(), timeout_s=timeout_s)
    from rich.console import Console
    from rich.markup import escape

    console, seen = Console(highlight=False, soft_wrap=True), []
    for row in rows:
        seen.append({"name": row.name, "ok": row.ok, "detail": row.detail})
        if not json_:
            body = escape(row.detail).replace("\n", "\n      ")
            console.print(f"{'[green]ok  [/]' if row.ok else '[bold red]FAIL[/]'}  [bold]{escape(row.name)}[/]: {body}")
    if json_:
        _print({"ok": all(r["ok"] for r in seen), "checks": seen}, True, "")
    if not all(r["ok"] for r in seen):
        raise typer.Exit(1)


@app.command()
def launch(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs of a node, the servers' among them; default all that there are; 0 = train on CPU")] = None,
    procs: Annotated[int | None, typer.Option(min=1, help="Trainer processes a node; default one a GPU that no server takes, on CPU one")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes, all alike")] = 1,
    node_rank: Annotated[int | None, typer.Option(help="This node's number, from 0")] = None,
    master: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="An address of node 0 that the other nodes reach")] = None,
    hosts: Annotated[str, typer.Option(metavar="A,B,...", help="Addresses of all nodes; needed for --vllm with --nodes")] = "",
    run_id: Annotated[str | None, typer.Option(metavar="ID", help="Name of the launch, the same on all nodes; may stand for --node-rank")] = None,
    vllm: Annotated[int, typer.Option(min=0, help="vLLM servers to start on a node")] = 0,
    vllm_gpus: Annotated[int, typer.Option(min=1, help="GPUs of a server (tensor parallel)")] = 1,
    vllm_python: Annotated[str | None, typer.Option(metavar="PATH", help="Interpreter of vLLM's own environment; default this one")] = None,
    vllm_args: Annotated[str, typer.Option(metavar="TEXT", help='More options for the servers, e.g. "--gpu-memory-utilization 0.8"')] = "",
    vllm_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the first server; the others follow")] = 8000,
    vllm_wait: Annotated[float, typer.Option(min=1, help="Seconds that the servers have to come up")] = 600.0,
    slurm: Annotated[bool, typer.Option("--slurm", help="Write an sbatch script; start nothing")] = False,
    k8s: Annotated[bool, typer.Option("--k8s", help="Write a Kubernetes manifest (Job and Service); start nothing")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Where --slurm and --k8s write; default stdout")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print commands, environment and rank layout; start nothing")] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:  # fmt: skip
    """Train over several processes, GPUs or nodes, with vLLM servers if asked; starts, watches and ends all of them."""
    from llmrl.launch_plan import Asked, make_plan

    asked = Asked(
        recipe, tuple(overrides or ()), gpus=gpus, procs=procs, nodes=nodes, node_rank=node_rank, master=master, run_id=run_id,
        hosts=tuple(h for h in hosts.split(",") if h), vllm=vllm, vllm_gpus=vllm_gpus, vllm_python=vllm_python, vllm_args=vllm_args,
        vllm_port=vllm_port, vllm_wait=vllm_wait, resume=resume, overwrite=overwrite, json=json_,
    )  # fmt: skip
    plan = make_plan(asked, "cluster" if slurm or k8s else "show" if dry_run else "run")
    if slurm or k8s:
        from llmrl.launch_cluster import write_script

        write_script(plan, "slurm" if slurm else "k8s", out)
        return
    from llmrl import launch as launcher

    if dry_run:
        _print({}, False, launcher.dry_run(plan))
        return
    raise typer.Exit(launcher.launch(plan))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run directory (its last checkpoint), a checkpoint's model folder, or any transformers model")],
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: of the folder. Adapters are merged in float32")] = "bfloat16",
    json_: Json = False,
) -> None:  # fmt: skip
    """Write a plain transformers folder that `vllm serve` and from_pretrained read; LoRA adapters are merged into their base model."""
    from llmrl.sampling import export_model

    _print(export_model(model, out, dtype), json_, f"wrote {out}")


@app.command()
def show(recipe: RecipePath, overrides: Overrides = None, json_: Json = False) -> None:
    """Print the resolved recipe: every value and where it is from (file, default, override)."""
    from llmrl.config import load_recipe
    from llmrl.config import show as render

    render(load_recipe(recipe, overrides or []), as_json=json_)


def _print(result: dict[str, Any], as_json: bool, line: str) -> None:
    from llmrl.console import out

    out(json.dumps(result) if as_json else line)


def _json(option: str, text: str) -> dict[str, Any]:
    from llmrl.records import InputError

    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise InputError(f"{option}: not JSON: {e}") from e
    if not isinstance(value, dict):
        raise InputError(f'{option}: {text!r} is no JSON object; write e.g. {{"rows": 100}}')
    return value


def _keywords(pairs: list[str] | None) -> dict[str, Any]:
    """key=value texts, values as TOML where they parse, else as text."""
    import tomllib

    from llmrl.records import InputError

    result: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InputError(f"{pair!r}: expected KEY=VALUE, e.g. tolerance=1e-3")
        try:
            result[key] = tomllib.loads(f"it = {text}")["it"]
        except tomllib.TOMLDecodeError:
            result[key] = text
    return result


def main() -> None:
    """Entry point: maps refusals to exit code 2 and failed runs to 1, each with one message."""
    from rich.console import Console
    from rich.markup import escape

    from llmrl.records import InputError

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        app()
    except InputError as e:
        console.print(f"[bold red]refused:[/] {escape(str(e))}")
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("[bold]interrupted;[/] a training run goes on from its last checkpoint with --resume")
        sys.exit(130)
    except Exception as e:
        if type(e).__name__ not in ("RunFailed", "FailureRateError"):
            raise
        console.print(f"[bold red]failed:[/] {escape(str(e))}")
        sys.exit(1)


if __name__ == "__main__":
    main()

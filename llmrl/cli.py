"""The command line. Exit codes: 0 done, 2 input refused, 1 run failed (or a check that found something)."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmrl import cli_traces
from llmrl.cli_traces import Json, tell
from llmrl.reward_command import reward
from llmrl.rule_list import rules

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="RL post-training of language models that cannot be silently wrong.",
)  # fmt: skip

RecipePath = Annotated[Path, typer.Argument(help="A recipe: a .toml file, e.g. recipes/quickstart.toml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. optim.lr=1e-5 model.path=./my-model; KEY= drops a key or section of the file"),
]
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


app.command("reward")(reward)
app.command()(cli_traces.sample)
app.command("import-traces")(cli_traces.import_traces)
app.command()(cli_traces.score)


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
        tell(summary.to_json(), True, "")
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
        tell({"ok": all(r["ok"] for r in seen), "checks": seen}, True, "")
    if not all(r["ok"] for r in seen):
        raise typer.Exit(1)


@app.command()
def explain(
    recipe: RecipePath,
    overrides: Overrides = None,
    questions: Annotated[int, typer.Option(min=1, help="Training questions to measure")] = 256,
    pairs: Annotated[Path | None, typer.Option(help='Write preference pairs of all training questions here, for exp_dpo with mode = "offline"')] = None,
    json_: Json = False,
) -> None:
    """Before training with expo or exp_dpo: are the model's explanations likely under it, and do they lead to the answer?"""
    from llmrl.config import check_plugins, load_recipe

    loaded = load_recipe(recipe, overrides or [])
    check_plugins(loaded)
    from llmrl.explain import explain as run
    from llmrl.explain import text

    result = run(loaded, questions=questions, pairs=pairs)
    tell(result, json_, text(result))


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
        tell({}, False, launcher.dry_run(plan))
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

    tell(export_model(model, out, dtype), json_, f"wrote {out}")


@app.command()
def view(
    run_dir: Annotated[Path, typer.Argument(help="A run directory")],
    out: Annotated[Path | None, typer.Option("--out", help="The page to write; default RUN_DIR/report.html")] = None,
    steps: Annotated[str | None, typer.Option(help="First and last step, e.g. 10-20; default all")] = None,
    cap: Annotated[int, typer.Option(min=1, help="Samples that the page holds, at most: whole groups, spread over the steps")] = 600,
    role: Annotated[str, typer.Option(help="The samples of this role")] = "policy",
    json_: Json = False,
) -> None:
    """Write the samples of a run as one page that works from a file: curves, and every sample with its tokens shaded by probability."""
    from llmrl.importing import step_range
    from llmrl.viewing import view_run

    result = view_run(run_dir, out, steps=step_range(steps), cap=cap, role=role)
    tell(result, json_, f"{result['shown']} of {result['samples']} samples -> {result['out']}")


@app.command()
def show(recipe: RecipePath, overrides: Overrides = None, json_: Json = False) -> None:
    """Print the resolved recipe: every value and where it is from (file, default, override)."""
    from llmrl.config import load_recipe
    from llmrl.show import show as render

    render(load_recipe(recipe, overrides or []), as_json=json_)


app.command("rules")(rules)
app.add_typer(cli_traces.robustness, name="robustness")


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


def _to_stderr(record: logging.LogRecord) -> bool:
    """A filter for loggers that write to stdout, where --json promises JSON and nothing else."""
    print(record.getMessage(), file=sys.stderr)
    return False


def main() -> None:
    """Entry point: maps refusals to exit code 2 and failed runs to 1, each with one message."""
    from rich.console import Console
    from rich.markup import escape

    from llmrl.records import InputError

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("DeepSpeed").addFilter(_to_stderr)  # transformers imports it where it is installed
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

"""`llmrl reward`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def reward(
    recipe: Annotated[Path, typer.Argument(help="A reward recipe: a .toml file with [model], [pairs], [optim], [batch], [eval]")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. optim.lr=1e-5 pairs.path=./pairs.jsonl")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the same directory.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only read the recipe and the pairs, without their tokens; no model is loaded.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout, nothing else.")] = False,
) -> None:
    """Train a reward model (Bradley-Terry) on preference pairs or judged samples; writes RUN_DIR/reward_model, a sequence-classification folder."""
    from llmrl.console import out
    from llmrl.reward_training import check_pairs, load_reward_recipe, train_reward

    loaded = load_reward_recipe(recipe, overrides or [])
    if check:
        told = check_pairs(loaded)
        out(json.dumps(told) if json_ else f"{recipe}: {told['train']} pairs to train on, {told['held_out']} held out, {told['dropped']} dropped")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("updates"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=json_) as bar:
        task = bar.add_task("reward model", total=None)

        def each(row: dict[str, Any], steps: int) -> None:
            bar.update(task, total=steps, completed=row["step"], description=f"loss {row['loss_nats']:.3f}" if "loss_nats" in row else "reward model")

        summary = train_reward(loaded, overwrite=overwrite, each=each)
    if json_:
        out(json.dumps(summary))
    else:
        Console().print(table(summary))
        out(f"wrote {summary['model']}")


def table(summary: dict[str, Any]) -> Any:
    """For `rich.print`: the reliability of the held-out pairs."""
    from rich.table import Table

    c = summary["held_out"]
    shown = Table(
        title=f"{c['pairs']} held-out pairs: accuracy {c['accuracy']:.3f} [{c['low']:.3f}, {c['high']:.3f}], "
        f"ECE {c['ece']:.3f}, loss {c['loss_nats']:.3f} nats",
        caption=f"before training: accuracy {summary['before']['accuracy']:.3f}; {summary['dropped']} pairs dropped",
    )  # fmt: skip
    for name in ("confidence", "pairs", "mean confidence", "accuracy"):
        shown.add_column(name, justify="right")
    for b in c["table"]:
        shown.add_row(f"{b['low']:.2f} to {b['high']:.2f}", str(b["n"]), f"{b['confidence']:.3f}", f"{b['accuracy']:.3f}")
    return shown

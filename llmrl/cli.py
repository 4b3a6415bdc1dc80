"""The command line. Exit codes: 0 done, 2 input refused, 1 run failed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="RL post-training of language models that cannot be silently wrong.", pretty_exceptions_enable=False)

RecipePath = Annotated[Path, typer.Argument(help="A recipe: a .toml file, e.g. recipes/quickstart.toml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. optim.lr=1e-5 model.path=./my-model")]


@app.command()
def train(
    recipe: RecipePath, overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run directory's last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the same directory.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print summary.json to stdout, and nothing else.")] = False,
) -> None:  # fmt: skip
    """Train a model by a recipe."""
    from llmrl.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    import json

    from llmrl.console import Console, out
    from llmrl.train import train as run

    summary = run(loaded, resume=resume, overwrite=overwrite, console=Console(quiet=json_))
    if json_:
        out(json.dumps(summary))


@app.command()
def show(
    recipe: RecipePath, overrides: Overrides = None, json_: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:  # fmt: skip
    """Print the resolved recipe: every value and where it is from (file, default, override)."""
    from llmrl.config import load_recipe
    from llmrl.config import show as render

    render(load_recipe(recipe, overrides or []), as_json=json_)


def main() -> None:
    """Entry point: maps refusals to exit code 2 and failed runs to 1, each with one message."""
    from rich.console import Console
    from rich.markup import escape

    from llmrl.records import InputError

    try:
        app()
    except InputError as e:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]refused:[/] {escape(str(e))}")
        sys.exit(2)
    except Exception as e:
        if type(e).__name__ not in ("RunFailed", "FailureRateError"):
            raise
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]failed:[/] {escape(str(e))}")
        sys.exit(1)


if __name__ == "__main__":
    main()

"""What a run shows: a progress line, evaluations as they come, and a before/after table in the model's own words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as Rich
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from llmrl.evaluate import EvalResult
    from llmrl.session import Session


def _number(x: float | None, spec: str = ".2f") -> str:
    return "-" if x is None else format(x, spec)


class Console:
    """Prints to stderr, so that stdout stays free for --json. quiet=True prints nothing."""

    def __init__(self, *, quiet: bool = False, every: int = 10):
        self.rich = Rich(stderr=True, quiet=quiet, highlight=False)
        self.every = every
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._accuracy: float | None = None
        self._steps = 0

    def _say(self, text: str) -> None:
        self.rich.print(text, soft_wrap=True)

    def begin(self, session: Session, folder: Path, resumed_at: int | None) -> None:
        """Names what will run, where, and on how much."""
        if session.rank:
            self.rich.quiet = True
        r, model = session.recipe, session.policy.model
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        self._steps = r.steps
        self._say(
            f"[bold]{escape(session.loaded.path.stem)}[/]: {escape(r.rule.use)} on {escape(r.model.path)} ({millions:.1f}M parameters, {r.model.dtype}, "
            f"{session.policy.device}, {session.world} process{'es' if session.world > 1 else ''}); {len(session.tables.train)} training prompts, "
            f"{len(session.tables.held_out)} held out" + (f", {session.tables.dropped} rows dropped" if session.tables.dropped else "")
        )
        if session.tables.overlap:
            self._say(f"[bold yellow]warning:[/] {session.tables.overlap} of the held-out questions are training prompts too: accuracy will flatter")
        self._say(f"{r.steps} steps of {r.rollout.prompts} prompts x {r.rollout.group} samples -> {escape(str(folder))}")
        if resumed_at is not None:
            self._say(f"resuming after step {resumed_at}")

    @contextmanager
    def warm(self, steps: int) -> Iterator[Callable[[dict[str, float]], None]]:
        """Progress of the supervised warm start."""
        with self._progress() as bar:
            task = bar.add_task("warm start", total=steps, info="")
            yield lambda row: bar.update(task, completed=row["step"], info=f"loss {row['loss_nats']:.3f}")

    def evaluated(self, step: int, result: EvalResult, seconds: float) -> None:
        self._accuracy = result.accuracy
        lost = f", {result.unjudged} could not be judged" if result.unjudged else ""
        where = "before RL" if step == 0 else f"step {step}"
        self._say(
            f"  {where:>9}: held-out greedy accuracy {_number(result.accuracy, '.3f')} "
            f"[{_number(result.low)}, {_number(result.high)}] on {result.judged}{lost} ({seconds:.1f} s)"
        )

    def step(self, step: int, row: dict[str, Any]) -> None:
        """One step's figures on the progress line; where the output is no terminal, a plain line every `every` steps."""
        if step == 0:
            return
        tokens = row["tokens/generated"] / row["time/step_s"] if row.get("time/step_s") else None
        info = (
            f"reward {_number(row.get('reward/mean'))}  acc {_number(self._accuracy)}  len {_number(row.get('length/mean_tokens'), '.1f')}  "
            f"clip {_number(row.get('clip/share'), '.3f')}  kl {_number(row.get('kl/ref_nats', row.get('kl/old_nats')), '.4f')}  "
            f"{_number(tokens, ',.0f')} tok/s"
        )
        if not self.rich.is_terminal:
            if step % self.every == 0 or step in (1, self._steps):
                self._say(f"step {step}/{self._steps}  {info}")
            return
        if self._bar is None:
            self._bar = self._progress()
            self._bar.start()
            self._task = self._bar.add_task("training", total=self._steps, completed=step - 1, info="")
        assert self._task is not None
        self._bar.update(self._task, completed=step, info=info)
        if step == self._steps:
            self.stop()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def end(self, summary: dict[str, Any], before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> None:
        """Three problems before and after, and where everything is."""
        self.stop()
        table = Table(title="the model's own words, greedy, on held-out problems", show_lines=True, title_justify="left")
        for name in ("problem", "gold", "before RL", "after RL"):
            table.add_column(name, overflow="fold", max_width=46)
        for b, a in _telling(before, after):
            table.add_row(escape(b["prompt"]), escape(str(b["gold"])), _said(b), _said(a))
        self.rich.print(table)
        first, last = summary["accuracy_before"], summary["accuracy_after"]
        self._say(
            f"held-out accuracy [bold]{_number(first, '.3f')} -> {_number(last, '.3f')}[/] in {summary['steps']} steps, "
            f"{summary['tokens']:,} generated tokens, {summary['seconds']:.0f} s"
        )
        folder = Path(summary["run_dir"])
        self._say(f"curve    {escape(str(folder / 'curve.png'))}\nsummary  {escape(str(folder / 'summary.json'))}\nmodel    {escape(summary['model'])}")

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        return Progress(*columns, TextColumn("{task.fields[info]}"), console=self.rich, disable=not self.rich.is_terminal, transient=False)


def _telling(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Three pairs: the first that was mended, the first that was right before, the first that is wrong after; else the first ones."""
    now = {a["id"]: a for a in after}
    pairs = [(b, now[b["id"]]) for b in before if b["id"] in now]
    kinds = [
        lambda b, a: (b["score"] or 0) < 1 <= (a["score"] or 0),
        lambda b, a: (b["score"] or 0) >= 1,
        lambda b, a: (a["score"] or 0) < 1,
    ]
    chosen = [next((p for p in pairs if kind(*p)), None) for kind in kinds]
    picked = list({p[0]["id"]: p for p in chosen if p is not None}.values())
    return (picked + [p for p in pairs if p not in picked])[:3]


def _said(row: dict[str, Any]) -> str:
    mark = "[green]right[/]" if row["score"] == 1 else "[yellow]not judged[/]" if row["score"] is None else f"[red]wrong[/] ({row['score']:g})"
    text = row["response"].strip()
    return f"{escape(text[:240])}{'...' if len(text) > 240 else ''}\n{mark}"


def out(text: str) -> None:
    """A line for stdout, flushed."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()

"""The training loop: warm start, steps, evaluations, checkpoints, and the files a run leaves behind (DESIGN section 6)."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrl import checkpoint
from llmrl.config import LoadedRecipe
from llmrl.console import Console
from llmrl.curves import draw_curve
from llmrl.evaluate import EvalResult, evaluate
from llmrl.manifest import check_resume, write_manifest
from llmrl.metrics import MetricLog
from llmrl.records import InputError
from llmrl.samples import read_rows, sample_rows, step_path, write_rows
from llmrl.session import Session, check_run_folder, make_run_folder, open_session, without_adapters
from llmrl.sft import supervise
from llmrl.step import publish, run_step


@dataclass
class Progress:
    """What a run has behind it; part of every checkpoint."""

    step: int = 0
    tokens: float = 0.0
    accuracies: dict[str, float | None] = field(default_factory=dict)
    """step -> held-out accuracy"""
    eval_rows: dict[str, dict[str, Any]] = field(default_factory=dict)


def train(loaded: LoadedRecipe, *, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Runs a recipe to its end and returns what summary.json holds. Raises InputError (refused) or RunFailed (stopped)."""
    console = console or Console()
    began = time.perf_counter()
    check_run_folder(loaded, resume=resume, overwrite=overwrite)
    if resume:
        check_resume(loaded)
    session = open_session(loaded)
    try:
        folder = Path(loaded.recipe.run.dir)
        if session.rank == 0 and not resume:
            make_run_folder(loaded, overwrite=overwrite)
            write_manifest(folder, session)  # before any other file: a run killed at any moment from here on can be resumed
        session.accelerator.wait_for_everyone()
        checkpoint.save_base(folder / "base", session.learner, lambda: without_adapters(loaded))
        run = Run(session, folder, console)
        run.prepare(resume)
        while not run.ended:
            run.advance()
        return run.close(time.perf_counter() - began)
    finally:
        session.close()


def warm_start_only(loaded: LoadedRecipe, *, overwrite: bool = False, console: Console | None = None) -> dict[str, Any]:
    """`llmrl sft`: the recipe's [warm_start] and nothing else; the model goes to RUN_DIR/model."""
    if loaded.recipe.warm_start is None:
        raise InputError(f"{loaded.path}: no [warm_start] section; llmrl sft runs that section")
    began = time.perf_counter()
    check_run_folder(loaded, resume=False, overwrite=overwrite)
    session = open_session(loaded)
    try:
        folder = Path(loaded.recipe.run.dir)
        if session.rank == 0:
            make_run_folder(loaded, overwrite=overwrite)
            write_manifest(folder, session)
        session.accelerator.wait_for_everyone()
        run = Run(session, folder, console or Console())
        run.console.begin(session, folder, resumed_at=None)
        before = run.evaluate(0)
        run.warm_start()
        after = run.evaluate(loaded.recipe.warm_start.steps)
        summary = {
            "accuracy_before": before.accuracy, "accuracy_after": after.accuracy, "steps": loaded.recipe.warm_start.steps,
            "seconds": round(time.perf_counter() - began, 2), "tokens": 0, "run_dir": str(folder), "model": str(folder / "model"),
        }  # fmt: skip
        checkpoint.save_model(folder / "model", session.learner)
        if run.main:
            checkpoint.write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
            run.console.end(summary, before.answers, after.answers)
        return summary
    finally:
        session.close()


class Run:
    """A session with a folder."""

    def __init__(self, session: Session, folder: Path, console: Console):
        self.s, self.folder, self.console = session, folder, console
        self.main = session.rank == 0
        self.progress = Progress()
        self.log = MetricLog(folder) if self.main else None

    # ------------------------------------------------------------ begin

    def prepare(self, resume: bool) -> None:
        """From the last checkpoint, or from the start: warm start, first evaluation, first checkpoint."""
        r = self.s.recipe
        found = checkpoint.checkpoints(self.folder / "checkpoints") if resume else []
        if r.run.trackers:
            self.s.accelerator.init_trackers("llmrl", config={k: str(v) for k, v in self.s.loaded.recipe.model_dump().items()})
        self.console.begin(self.s, self.folder, resumed_at=int(found[-1].name[5:]) if found else None)
        if found:
            self.restore(found[-1])
            return
        if self.log:
            self.log.truncate_after(-1)
        self.warm_start()
        self.s.learner.start(r.optim)
        self.refresh_reference(0)
        self.write(0, {**self.evaluate(0).row(), "policy_version": self.s.learner.version})
        self.save()

    def warm_start(self) -> None:
        """The supervised steps, where the recipe has them; their figures go to warm_start.jsonl."""
        r = self.s.recipe
        if r.warm_start is not None:
            rows = []
            with self.console.warm(r.warm_start.steps) as show:
                for row in supervise(
                    self.s.learner, self.s.tables.warm, r.warm_start.optim, steps=r.warm_start.steps, examples=r.warm_start.examples,
                    tokens=r.batch.tokens, seed=r.seed, tools=self.s.tools,
                ):  # fmt: skip
                    rows.append(row)
                    show(row)
            if self.main:
                checkpoint.write_atomic(self.folder / "warm_start.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        publish(self.s)

    def restore(self, latest: Path) -> None:
        """Back to exactly where `latest` was written; later rows and samples of a broken run are dropped."""
        learner = self.s.learner
        learner.start(self.s.recipe.optim)
        if self.s.rule.needs.ref_logp:
            learner.freeze_reference()
            checkpoint.load_reference(self.reference_file(int(latest.name[5:])), learner)
        state = checkpoint.load(latest, learner, rank=self.s.rank)
        learner.version = state["version"]
        publish(self.s)
        self.s.stream.load_state_dict(state["data"])
        self.s.memory.load_state_dict(state["memory"])
        self.s.credit_state = state["credit"]
        self.progress = Progress(**state["progress"])
        if self.log:
            self.log.truncate_after(self.progress.step)
            for file in (self.folder / "samples").glob("*.jsonl.gz"):
                if int(file.name.split("-")[1].split(".")[0]) > self.progress.step:
                    file.unlink()

    def reference_file(self, step: int) -> Path:
        """Weights of the reference model that `step` trained with (0: the first step's). A file a round: a resumed run may need an older one."""
        every = self.s.rule.needs.ref_every
        start = (step - 1) // every * every if every and step else 0
        return self.folder / (f"reference-{start:06d}.safetensors" if start else "reference.safetensors")

    def refresh_reference(self, done: int) -> None:
        """The weights after `done` steps become the reference model, where the rule has one and a round of it begins here."""
        needs = self.s.rule.needs
        if needs.ref_logp and (done % needs.ref_every == 0 if needs.ref_every else done == 0):
            self.s.learner.freeze_reference()
            checkpoint.save_reference(self.reference_file(done + 1), self.s.learner)

    # ------------------------------------------------------------ one step

    @property
    def ended(self) -> bool:
        r, p = self.s.recipe, self.progress
        return p.step >= r.steps or (r.max_generated_tokens is not None and p.tokens >= r.max_generated_tokens)

    def stops(self, step: int) -> tuple[bool, bool]:
        """Whether an evaluation follows on a step, and a checkpoint."""
        r = self.s.recipe
        evaluates, saves = (bool(every and step % every == 0) for every in (r.eval.every, r.checkpoint.every))
        return step == r.steps or evaluates, step == r.steps or saves

    def advance(self) -> None:
        r, step = self.s.recipe, self.progress.step + 1
        if step > 1:
            self.refresh_reference(step - 1)
        evaluates, saves = self.stops(step)
        # nothing is under way when a checkpoint is written: a run that is resumed there draws what the unbroken one draws
        k = r.engine.max_staleness
        groups, adv, row = run_step(self.s, step, ahead=next((n for n in range(k) if any(self.stops(step + n))), k))
        write_rows(step_path(self.folder, step, self.s.rank), sample_rows(step, groups, adv))
        self.progress.step = step
        self.progress.tokens += row["tokens/generated"] or 0.0
        row["tokens/total"] = self.progress.tokens
        if self.ended:
            evaluates = saves = True
        if evaluates:
            row |= self.evaluate(step).row()
        self.write(step, row)
        if saves:
            self.save()

    def evaluate(self, step: int) -> EvalResult:
        """Held-out greedy accuracy of the weights after `step`; the answers go to samples/eval-*."""
        began = time.perf_counter()
        result = evaluate(self.s)
        write_rows(step_path(self.folder, step, self.s.rank, "eval"), result.answers)
        self.progress.accuracies[str(step)] = result.accuracy
        self.progress.eval_rows[str(step)] = result.row()
        self.console.evaluated(step, result, time.perf_counter() - began)
        return result

    def write(self, step: int, row: dict[str, Any]) -> None:
        if self.log:
            self.log.append({"step": step, **row})
        if self.s.recipe.run.trackers:
            self.s.accelerator.log({k: v for k, v in row.items() if v is not None}, step=step)
        self.console.step(step, row)

    def save(self) -> None:
        r, p = self.s.recipe, self.progress
        state = {
            "version": self.s.learner.version, "data": self.s.stream.state_dict(), "memory": self.s.memory.state_dict(),
            "credit": self.s.credit_state, "progress": vars(p),
        }  # fmt: skip
        checkpoint.save(self.folder / "checkpoints", p.step, self.s.learner, state, rank=self.s.rank, world=self.s.world)
        if self.main:
            ranked = sorted((a, int(k)) for k, a in p.accuracies.items() if a is not None)
            checkpoint.prune(self.folder / "checkpoints", keep=r.checkpoint.keep, best=[k for _, k in ranked[::-1]][: r.checkpoint.best])
            for old in self.folder.glob("reference-*.safetensors"):  # of rounds that ended before this checkpoint
                if old.name < self.reference_file(p.step).name:
                    old.unlink()

    # ------------------------------------------------------------ end

    def close(self, seconds: float) -> dict[str, Any]:
        """Curve, summary, and the before/after table."""
        p = self.progress
        last = str(p.step)
        summary = {
            "accuracy_before": p.accuracies.get("0"), "accuracy_after": p.accuracies.get(last), "before": p.eval_rows.get("0"),
            "after": p.eval_rows.get(last), "steps": p.step, "seconds": round(seconds, 2), "tokens": int(p.tokens), "run_dir": str(self.folder),
            "model": str(self.folder / "checkpoints" / f"step-{p.step:06d}" / "model"),
        }  # fmt: skip
        if self.main:
            draw_curve(self.folder)
            checkpoint.write_atomic(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
            before, after = (step_path(self.folder, k, 0, "eval") for k in (0, p.step))
            if not before.is_file() or not after.is_file():
                raise InputError(f"{self.folder}: samples/eval-*.jsonl.gz of this run are gone")
            self.console.end(summary, read_rows(before), read_rows(after))
        if self.s.recipe.run.trackers:
            self.s.accelerator.end_training()
        return summary

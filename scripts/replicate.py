"""Runs a study: arms x seeds of a recipe, evaluations of every model that comes out, one table and one figure in REPLICATION.md.

    python scripts/replicate.py recipes/replication/gasp/study.toml [--jobs 2] [--seeds 0,1,2] [--only ARM ...] [--report]

The study file says all: see `Study`. What is done is kept below runs/replication/NAME/ and not done again, so a killed study is continued by
the same command. Every number in the table is read from a file that a command wrote; a run that failed is named, never left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

REPO = Path(__file__).resolve().parents[1]
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantiles of Student's t by degrees of freedom."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Command(_Strict):
    """`llmrl` with arguments. In them {base} is the seed's warm-started model, {model} the run, {out} its folder of results, {work} the
    study's folder, {here} the folder of the study file, {seed} the seed."""

    command: list[str]
    stdout: str | None = None
    """File in {out} (prepare: {work}) that keeps what it prints."""


class Column(_Strict):
    title: str
    metric: str | None = None
    """The last value of metrics.jsonl under this name, none where the last is null; or"""
    file: str | None = None
    """a JSON file in {out}, and"""
    path: str = ""
    """the place in it: keys and numbers joined by dots; * is the first entry there, *1 the second."""
    over: Literal["last", "median"] = "last"
    """Of `metric`: its last value, or the median over all steps."""
    reach: tuple[str, float] | None = None
    """(metric, level): `metric` at the first step at which that one is at least the level; nothing where it never is."""
    not_for: list[str] = []
    """Arms of which it would say something else."""
    relative: bool = False
    """As a multiple of the first arm's, seed by seed."""
    scale: float = 1.0
    digits: int = 1


class Curve(_Strict):
    title: str
    metric: str
    arms: list[str] | None = None
    not_for: list[str] = []


class Study(_Strict):
    name: str
    title: str
    recipe: str
    """In it {arm} is the arm's name, where every arm has a recipe of its own; the warm start is then the first arm's."""
    arms: dict[str, list[str]]
    """Name -> overrides of the recipe. The first one is what the others are compared with."""
    overrides: list[str] = []
    """Of every arm, before its own."""
    seeds: list[int] = [0, 1, 2]
    shared_warm_start: bool = True
    """The recipe's [warm_start] runs once a seed (`llmrl sft`), and every arm begins with that model."""
    prepare: list[Command] = []
    """Once a seed, after the warm start."""
    evaluate: list[Command] = []
    """After every run, and once a seed on the warm-started model (the row "start")."""
    columns: list[Column]
    curves: list[Curve] = []


def read_study(path: Path) -> Study:
    try:
        return Study.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
        sys.exit(f"{path}: {error}")


class Runner:
    """Where things lie, and how they are run."""

    def __init__(self, study: Study, here: Path, work: Path, threads: int):
        self.study, self.here, self.work = study, here, work
        self.env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}

    def base(self, seed: int) -> Path:
        return self.work / f"start-{seed}"

    def run_dir(self, arm: str, seed: int) -> Path:
        return self.work / f"{arm}-{seed}"

    def recipe(self, arm: str) -> str:
        return str(self.here / self.study.recipe.replace("{arm}", arm))

    def results(self, arm: str, seed: int) -> Path:
        return self.work / "results" / f"{arm}-{seed}"

    def llmrl(self, args: list[str], log: Path, stdout: Path | None = None) -> None:
        """Raises RuntimeError naming the log. What it prints goes to `stdout` under a temporary name first."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            errors.write(f"$ llmrl {' '.join(args)}\n".encode())
            errors.flush()
            done = subprocess.run([sys.executable, "-m", "llmrl", *args], cwd=REPO, env=self.env, stdout=subprocess.PIPE, stderr=errors, check=False)
            errors.write(done.stdout[-20000:])
        if done.returncode:
            raise RuntimeError(f"`llmrl {args[0]}` ended with {done.returncode}; see {log}")
        if stdout is not None:
            stdout.parent.mkdir(parents=True, exist_ok=True)
            part = stdout.with_suffix(".part")
            part.write_bytes(done.stdout)
            part.rename(stdout)

    def commands(self, commands: list[Command], arm: str, seed: int, model: Path, out: Path, log: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        names = {"base": str(self.base(seed)), "model": str(model), "out": str(out), "work": str(self.work), "here": str(self.here), "seed": str(seed)}
        for number, c in enumerate(commands):
            done = out / f".done-{number}"
            if done.exists():
                continue
            args = c.command
            for name, value in names.items():
                args = [a.replace("{" + name + "}", value) for a in args]
            self.llmrl(args, log, out / c.stdout if c.stdout else None)
            done.touch()

    def start(self, seed: int) -> None:
        """The warm-started model of a seed, what is prepared with it, and its own evaluation."""
        log = self.work / "logs" / f"start-{seed}.log"
        if self.study.shared_warm_start and not (self.base(seed) / "summary.json").exists():
            self.llmrl(["sft", self.recipe(next(iter(self.study.arms))), f"seed={seed}", f"run.dir={self.base(seed)}", "--overwrite", "--json"], log)
        self.commands(self.study.prepare, "start", seed, self.base(seed), self.work / f"prepared-{seed}", log)
        if self.study.shared_warm_start:
            self.commands(self.study.evaluate, "start", seed, self.base(seed), self.results("start", seed), log)

    def arm(self, arm: str, seed: int) -> None:
        folder, log = self.run_dir(arm, seed), self.work / "logs" / f"{arm}-{seed}.log"
        own = [*self.study.overrides, *self.study.arms[arm]]
        asked, kept = json.dumps(own), self.work / "logs" / f"{arm}-{seed}.args"
        if kept.is_file() and kept.read_text(encoding="utf-8") != asked:  # another arm under the same name
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(self.results(arm, seed), ignore_errors=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(asked, encoding="utf-8")
        if not (folder / "summary.json").exists():
            args = ["train", self.recipe(arm), f"seed={seed}", f"run.dir={folder}", *own]
            if self.study.shared_warm_start:
                args += [f"model.path={self.base(seed) / 'model'}", "model.tiny=", "warm_start="]
            args = [a.replace("{work}", str(self.work)).replace("{seed}", str(seed)) for a in args]
            self.llmrl([*args, "--resume" if (folder / "manifest.json").exists() else "--overwrite", "--json"], log)
        self.commands(self.study.evaluate, arm, seed, folder, self.results(arm, seed), log)


def value_of(column: Column, run: Path, results: Path) -> float | None:
    """The number, or None where the file or the entry is not there."""
    if column.metric is not None:
        told = [row for row in metrics(run) if column.metric in row]
        rows = [row for row in told if row[column.metric] is not None]
        if column.reach is None and column.over == "last" and rows and rows[-1] is not told[-1]:
            return None  # what was measured stopped being measurable: an old value is not the last one
        if column.reach is not None:
            name, level = column.reach
            rows = [row for row in rows if row.get(name) is not None and row[name] >= level][:1]
        values = [row[column.metric] for row in rows]
        return None if not values else statistics.median(values) if column.over == "median" else values[-1]
    file = results / (column.file or "")
    if not file.is_file():
        return None
    found: Any = json.loads(file.read_text(encoding="utf-8"))
    for part in column.path.split("."):
        if part.startswith("*"):
            found = next(islice(found.values() if isinstance(found, dict) else found, int(part[1:] or 0), None), None)
        elif isinstance(found, list):
            found = found[int(part)] if int(part) < len(found) else None
        else:
            found = found.get(part) if isinstance(found, dict) else None
        if found is None:
            return None
    return float(found)


def metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def shown(values: list[float | None], column: Column, *, sign: bool = False) -> str:
    """Mean over seeds with half its 95 % t interval; "-" where nothing is there."""
    there = [column.scale * v for v in values if v is not None]
    if not there:
        return "-"
    text = f"{statistics.mean(there):{'+' if sign else ''}.{column.digits}f}"
    if len(there) > 1:
        text += f" ± {T975.get(len(there) - 1, 1.96) * statistics.stdev(there) / len(there) ** 0.5:.{column.digits}f}"
    return text + (f" ({len(there)} of {len(values)})" if len(there) < len(values) else "")


def report(runner: Runner, seeds: list[int], failed: list[str], command: str) -> str:
    study, arms = runner.study, list(runner.study.arms)
    head = ["| arm | " + " | ".join(c.title for c in study.columns) + " |", "|---|" + "---:|" * len(study.columns)]
    rows = (["start"] if study.shared_warm_start else []) + arms

    def of(arm: str, column: Column) -> list[float | None]:
        return [None if arm in column.not_for else value_of(column, runner.run_dir(arm, s), runner.results(arm, s)) for s in seeds]

    values = {a: [of(a, c) for c in study.columns] for a in rows}
    first = values[arms[0]]
    for own in values.values():
        for k, column in enumerate(study.columns):
            if column.relative:
                own[k] = [x and y and x / y for x, y in zip(own[k], first[k], strict=True)] if own is not first else own[k]
    for k, column in enumerate(study.columns):
        if column.relative:
            first[k] = [x and 1.0 for x in first[k]]
    lines = [f"`{command}`, seeds {', '.join(map(str, seeds))}. Mean over seeds ± half the 95 % t interval.", "", *head]
    lines += [f"| {a} | " + " | ".join(map(shown, values[a], study.columns)) + " |" for a in rows]
    lines += ["", f"Difference to {arms[0]}, seed by seed:", "", *head]
    for a in arms[1:]:
        apart = [[None if x is None or y is None else x - y for x, y in zip(*pair, strict=True)] for pair in zip(values[a], values[arms[0]], strict=True)]
        lines.append(f"| {a} | " + " | ".join(shown(d, c, sign=True) for d, c in zip(apart, study.columns, strict=True)) + " |")
    if study.curves:
        lines += ["", f"![{study.title}](docs/replication-{study.name}.png)"]
    lines += ["", *(f"Failed: {f}" for f in failed)]
    return "\n".join(lines).rstrip() + "\n"


def draw(runner: Runner, seeds: list[int], out: Path) -> None:
    """One panel a curve: each arm's mean over seeds against the tokens generated, with the range of the seeds where arms are few."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    curves = runner.study.curves
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.2 * rows + 0.03 * len(runner.study.arms)), squeeze=False, layout="constrained")
    for ax, curve in zip(axes.flat, curves, strict=False):
        for number, arm in enumerate(runner.study.arms):
            if arm in curve.not_for or (curve.arms is not None and arm not in curve.arms):
                continue
            lines = []
            for s in seeds:
                points = [(r.get("tokens/total") or 0.0, r[curve.metric]) for r in metrics(runner.run_dir(arm, s)) if r.get(curve.metric) is not None]
                if points:
                    lines.append(np.array(points))
            if not lines:
                continue
            grid = np.linspace(max(x[0, 0] for x in lines), min(x[-1, 0] for x in lines), 60)
            values = np.stack([np.interp(grid, x[:, 0], x[:, 1]) for x in lines])
            ax.plot(grid / 1e6, values.mean(0), label=arm, color=f"C{number % 10}", ls=("-", "--", ":")[number // 10 % 3], lw=1.6)
            if len(runner.study.arms) <= 10:  # of more, ranges would hide the lines
                ax.fill_between(grid / 1e6, values.min(0), values.max(0), color=f"C{number}", alpha=0.12, lw=0)
        ax.set_title(curve.title, fontsize=10)
        ax.set_xlabel("tokens generated (millions)")
        ax.grid(alpha=0.3)
    for ax in list(axes.flat)[len(curves) :]:
        ax.axis("off")
    entries = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    labels = [arm for arm in runner.study.arms if arm in entries]
    figure.legend([entries[arm] for arm in labels], labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def write_section(file: Path, name: str, text: str) -> None:
    """Replaces what stands between the marks of `name`; a file without them gets them at its end."""
    begin, end = f"<!-- {name}: begin, written by scripts/replicate.py -->", f"<!-- {name}: end -->"
    old = file.read_text(encoding="utf-8") if file.is_file() else "# Replications in small\n"
    if begin not in old:
        old = old.rstrip("\n") + f"\n\n{begin}\n{end}\n"
    head, _, rest = old.partition(begin)
    _, _, tail = rest.partition(end)
    file.write_text(f"{head}{begin}\n{text}{end}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 1), help="runs at a time, each on its share of the cores")
    parser.add_argument("--seeds", help="e.g. 0,1,2; default: the study's")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="run these arms only; the table shows all that is there")
    parser.add_argument("--work", type=Path, help="default runs/replication/NAME")
    parser.add_argument("--fresh", action="store_true", help="throw away what was done before")
    parser.add_argument("--report", action="store_true", help="run nothing, write the table")
    parser.add_argument("--to", type=Path, default=REPO / "REPLICATION.md")
    args = parser.parse_args()
    study = read_study(args.study)
    seeds = [int(s) for s in args.seeds.split(",")] if args.seeds else study.seeds
    work = (args.work or REPO / "runs" / "replication" / study.name).resolve()
    if unknown := set(args.only or []) - set(study.arms):
        sys.exit(f"--only: {args.study} has no arm {', '.join(sorted(unknown))}; it has {', '.join(study.arms)}")
    if args.fresh:
        shutil.rmtree(work, ignore_errors=True)
    runner = Runner(study, args.study.resolve().parent, work, threads=max(1, (os.cpu_count() or 1) // args.jobs))
    failed: list[str] = []
    began = time.perf_counter()

    def each(name: str, do: Any, *what: Any) -> None:
        start = time.perf_counter()
        try:
            do(*what)
            print(f"{time.perf_counter() - began:7.0f} s  {name}: done in {time.perf_counter() - start:.0f} s", flush=True)
        except (RuntimeError, OSError) as error:
            failed.append(f"{name}: {error}")
            print(f"{time.perf_counter() - began:7.0f} s  {name}: FAILED, {error}", flush=True)

    if not args.report:
        arms = [a for a in study.arms if not args.only or a in args.only]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda s: each(f"start, seed {s}", runner.start, s), seeds))
            list(pool.map(lambda job: each(f"{job[0]}, seed {job[1]}", runner.arm, *job), [(a, s) for s in seeds for a in arms]))
    study_path = args.study.resolve()
    named = study_path.relative_to(REPO) if study_path.is_relative_to(REPO) else study_path
    text = report(runner, seeds, failed, f"python scripts/replicate.py {named}")
    write_section(args.to, study.name, text)
    if study.curves:
        draw(runner, seeds, args.to.resolve().parent / "docs" / f"replication-{study.name}.png")
    print(text)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

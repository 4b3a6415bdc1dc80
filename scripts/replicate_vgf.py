"""VGF in small: everything by one command, one table and one figure in REPLICATION.md.

    python scripts/replicate_vgf.py [--seeds 0,1,2] [--jobs 2] [--report] [--fresh]

A seed: the reference (a warm start), its samples, pairs labelled by noisy gold, two reward models of other halves of the samples (the second only
looks on), then on the same held-out prompts: best-of-N, transport at every L, and policies trained on the same pairs or the same reward model.
Gold is a formula (recipes/replication/vgf/ring.py) that no arm sees. All of it for every variant of the task that the study names, beside each
other. What is done is kept below runs/replication/vgf/ and not done again.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import time
import tomllib
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from replicate import REPO, T975, write_section

from llmrl.lm_transport import Readout, equal_compute
from llmrl.records import Prompt

HERE = REPO / "recipes" / "replication" / "vgf"
TASK, GOLD = f"{HERE / 'ring.py'}:prompts", f"{HERE / 'ring.py'}:gold"
STUDY: dict[str, Any] = {}
"""The study file's keys; see recipes/replication/vgf/study.toml."""


class Seed:
    """One seed of one variant of the task: its folder and steps; each step leaves a file by which it is known to be done."""

    def __init__(self, seed: int, work: Path, variant: str):
        self.seed, self.variant, self.name = seed, variant, f"{slug(variant)}-{seed}"
        self.args = STUDY["variants"][variant]
        self.work, self.log = work / self.name, work / f"{self.name}.log"
        self.work.mkdir(parents=True, exist_ok=True)
        self.start = self.work / "start"

    def llmrl(self, *args: str) -> dict[str, Any]:
        """Runs a command in this process, for starting another would cost more than some of them do, and returns its JSON.

        Raises RuntimeError naming the log.
        """
        from llmrl.cli import app

        told = io.StringIO()
        with self.log.open("a", encoding="utf-8") as errors, redirect_stdout(told), redirect_stderr(errors):
            errors.write(f"$ llmrl {' '.join(args)}\n")
            try:
                app([*args, "--json"], standalone_mode=False)
            except Exception as error:
                traceback.print_exc(file=errors)
                raise RuntimeError(f"`llmrl {args[0]}`: {error}; see {self.log}") from error
        return json.loads(told.getvalue().splitlines()[-1])

    def sample(self, model: Path, out: str, rows: int, seed: int, n: int) -> Path:
        file = self.work / out
        if not file.exists():
            self.llmrl("sample", str(model), "--data", TASK, "--args", json.dumps({"rows": rows, "seed": seed, **self.args}), "--out", str(file), "-n", str(n),
                       "--max-new-tokens", "16", "--verifier", GOLD, "--seed", str(self.seed))  # fmt: skip
        return file

    def task_overrides(self) -> list[str]:
        return [f"{place}.args.{k}={json.dumps(v)}" for k, v in self.args.items() for place in ("data", "warm_start.data")]

    # ------------------------------------------------------------ what all arms share

    def prepare(self) -> None:
        """Reference, samples, pairs, both reward models."""
        if not (self.start / "summary.json").exists():
            self.llmrl("sft", str(HERE / "small.toml"), f"seed={self.seed}", f"run.dir={self.start}", *self.task_overrides(), "--overwrite")
        train = self.sample(self.start, "train.jsonl.gz", STUDY["train_prompts"], 2, 8)
        if not (self.work / "pairs-0.jsonl").exists():
            self.write_pairs(train)
        for k in (0, 1):
            run = self.work / f"reward-{k}"
            if not (run / "summary.json").exists():
                self.llmrl("reward", str(HERE / "reward.toml"), f"seed={self.seed + 100 * k}", f"model.path={self.start / 'model'}", "model.tiny=",
                           f"pairs.path={self.work / f'pairs-{k}.jsonl'}", f"run.dir={run}", "--overwrite")  # fmt: skip
        self.sample(self.start, "eval.jsonl.gz", STUDY["eval_prompts"], 3, STUDY["pool"] + STUDY["against"])

    def write_pairs(self, train: Path) -> None:
        """Samples 0 to 3 of a prompt make two pairs for the reward model (DPO: the first), 4 to 7 for the second. P(first preferred) = sigmoid(gap / tau)."""
        rng = random.Random(f"labels/{self.seed}")
        for k in (1, 0):
            rows, dpo = [], []
            own = [list(group)[4 * k : 4 * k + 4] for _, group in groupby(traces(train), key=lambda t: t.prompt_id)]
            for a, b in [pair for ts in own for pair in (ts[:2], ts[2:])]:
                if rng.random() > 1 / (1 + math.exp((b.score - a.score) / STUDY["tau"])):
                    a, b = b, a
                if a.response != b.response and a.response and b.response:
                    rows.append({"prompt": a.prompt, "chosen": a.response, "rejected": b.response, "right": a.score > b.score})
                    if a.sample in (4 * k, 4 * k + 1):
                        dpo.append({"id": a.prompt_id, "context_ids": context_of(self.start, a), "chosen": a.token_ids, "rejected": b.token_ids, "version": 0})
            (self.work / f"dpo-{k}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in dpo), encoding="utf-8")
            (self.work / f"pairs-{k}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")

    # ------------------------------------------------------------ arms

    def test_time(self) -> None:
        """Best-of-N and transport on the same samples; one row of numbers an arm and a prompt."""
        from llmrl.lm_transport import RewardModel, sweep
        from llmrl.models import load_policy
        from llmrl.recipe import Model
        from llmrl.scoring import Scorer

        out = self.work / "test-time.json"
        if out.exists():
            return
        policy = load_policy(Model(path=str(self.start / "model")))
        reward, second = (RewardModel.load(self.work / f"reward-{k}" / "reward_model") for k in (0, 1))
        groups = [list(g) for _, g in groupby(traces(self.work / "eval.jsonl.gz"), key=lambda t: t.prompt_id)]
        n, pool = STUDY["n"], STUDY["pool"]
        arms = {"reference": [{**own_row(g[0], [t.score for t in g[pool:]]), "ceiling": max(t.score for t in g[:pool])} for g in groups]}
        items = [(policy.chat.prompt_ids(t.messages), t.token_ids) for g in groups for t in g[:pool]]
        scores, others = reward.score(items), second.score(items)
        arms[f"best of {n}"] = best_of(groups, scores, others, pool, n)
        own = [t for g in groups for t in g[:n]]
        items = [(policy.chat.prompt_ids(t.messages), t.token_ids) for t in own]
        moved_arms, sizes, ways = {}, {pool}, transports()
        with Scorer(GOLD, {}, REPO) as scorer:
            for (name, how), moved in zip(ways, sweep(policy, reward, items, [how for _, how in ways], eps=STUDY["eps"]), strict=True):
                verdicts = scorer.score([(Prompt(t.prompt_id, tuple(t.messages)), policy.chat.text(m.token_ids)) for t, m in zip(own, moved, strict=True)])
                seconds = second.score([(c, m.token_ids) for (c, _), m in zip(items, moved, strict=True)])
                told = [{**asdict(m), "gold": v.score, "second": x} for m, v, x in zip(moved, verdicts, seconds, strict=True)]
                moved_arms[name] = [moved_row(told[k * n : (k + 1) * n], [t.score for t in g[pool:]]) for k, g in enumerate(groups)]
                sizes.add(fair_size(moved_arms[name], how))
        arms |= {f"best of {size}": best_of(groups, scores, others, pool, size) for size in sorted(sizes)}
        out.write_text(json.dumps(arms | moved_arms), encoding="utf-8")

    def trained(self, arm: str) -> None:
        """A policy trained by the study's overrides, and one sample of it a prompt."""
        run, out = self.work / slug(arm), self.work / f"{slug(arm)}.json"
        if out.exists():
            return
        if not (run / "summary.json").exists():
            names = {"{work}": str(self.work), "{reward}": str(self.work / "reward-0" / "reward_model"), "{task}": TASK}
            args = [f"seed={self.seed}", f"run.dir={run}", f"model.path={self.start / 'model'}", "model.tiny=", "warm_start="]
            args += [*(x for x in self.task_overrides() if x.startswith("data.")), *STUDY["arms"][arm]]
            for mark, value in names.items():
                args = [a.replace(mark, value) for a in args]
            self.llmrl("train", str(HERE / "small.toml"), *args, "--overwrite")
        file = self.sample(run, f"{slug(arm)}.jsonl.gz", STUDY["eval_prompts"], 3, STUDY["n"])
        from llmrl.lm_transport import RewardModel

        reward, second = (RewardModel.load(self.work / f"reward-{k}" / "reward_model") for k in (0, 1))
        groups = [list(g) for _, g in groupby(traces(file), key=lambda t: t.prompt_id)]
        against = [r["against"] for r in json.loads((self.work / "test-time.json").read_text(encoding="utf-8"))["reference"]]
        items = [(context_of(self.start, t), t.token_ids) for g in groups for t in g]
        scores, others, rows = reward.score(items), second.score(items), []
        for k, (g, ref) in enumerate(zip(groups, against, strict=True)):
            at = k * len(g)
            rows.append({**own_row(g[0], ref), "all_gold": statistics.mean(t.score for t in g), "reward": scores[at], "second": others[at]})
        out.write_text(json.dumps(rows), encoding="utf-8")

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Everything that is there, by arm."""
        file = self.work / "test-time.json"
        arms = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for arm in STUDY["arms"]:
            if (file := self.work / f"{slug(arm)}.json").is_file():
                arms[arm] = json.loads(file.read_text(encoding="utf-8"))
        return arms


def slug(arm: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in arm.lower())


def traces(file: Path) -> list[Any]:
    from llmrl.evaluation.traces import read_traces

    return list(read_traces(file))


_CHAT: dict[Path, Any] = {}


def context_of(start: Path, trace: Any) -> list[int]:
    from llmrl.models import load_tokenizer
    from llmrl.recipe import Model

    if start not in _CHAT:
        _CHAT[start] = load_tokenizer(Model(path=str(start / "model")))
    return _CHAT[start].prompt_ids(trace.messages)


def transports() -> list[tuple[str, Readout]]:
    """(arm, what is read out) of all test-time arms. TOML has no None: guard = "none" stands for it."""
    return [
        (f"VGF, L = {steps}{label}", Readout(steps, **{k: None if v == "none" else v for k, v in how.items()}))
        for label, how in STUDY["transports"].items() for steps in STUDY["steps"]
    ]  # fmt: skip


def fair_size(rows: list[dict[str, Any]], how: Readout) -> int:
    """N' of the best-of-N' that costs as much (`equal_compute`), at most the pool.

    In forwards of a token, all three models being of one size: sampling a response, scoring it, and a teacher-forced look at it cost 1 each, for
    the key-value cache makes sampling no dearer in operations. On a GPU sampling is slower by the clock, and N' smaller.
    """
    passes = (2.0 if how.guard is not None else 0.0) + statistics.mean(r["all_passes"] for r in rows)
    return min(STUDY["pool"], round(equal_compute(STUDY["n"], how.steps, generate=1, score=1, reference=1, passes=passes)))


def own_row(trace: Any, against: list[float]) -> dict[str, Any]:
    return {"gold": trace.score, "all_gold": trace.score, "against": against}


def best_of(groups: list[list[Any]], scores: list[float], others: list[float], pool: int, size: int) -> list[dict[str, Any]]:
    rows = []
    for k, g in enumerate(groups):
        i = max(range(size), key=lambda i: (scores[k * pool + i], -i))
        rows.append({"gold": g[i].score, "all_gold": statistics.mean(t.score for t in g[:size]), "against": [t.score for t in g[pool:]],
                     "reward": scores[k * pool + i], "second": others[k * pool + i]})  # fmt: skip
    return rows


def moved_row(own: list[dict[str, Any]], against: list[float]) -> dict[str, Any]:
    """The winner's numbers, by the reward of the decoded tokens; all_* are means over the prompt's particles."""
    win = max(range(len(own)), key=lambda k: (own[k]["reward_after"], -k))
    row: dict[str, Any] = {"gold": own[win]["gold"], "all_gold": statistics.mean(d["gold"] for d in own), "against": against}
    row |= {"reward": own[win]["reward_after"], "second": own[win]["second"]}
    return row | {f"all_{k}": statistics.mean(float(d[k]) for d in own) for k in
                  ("reward_before", "reward_flowed", "reward_after", "changed_share", "kept", "ref_drop", "second", "passes")}  # fmt: skip


# ---------------------------------------------------------------- report


def win(row: dict[str, Any]) -> float:
    """Share (%) of the prompt's independent samples of the reference that the arm's response beats by gold; a tie counts half."""
    gaps = [row["gold"] - x for x in row["against"]]
    return 100.0 * statistics.mean((d > 1e-9) + 0.5 * (abs(d) <= 1e-9) for d in gaps)


def shown(by_seed: list[list[float]], digits: int = 2) -> str:
    """Mean over seeds ± half the 95 % t interval; of one seed, ± 1.96 standard errors over prompts."""
    means = [statistics.mean(v) for v in by_seed if v]
    if not means:
        return "-"
    if len(means) > 1:
        half = T975.get(len(means) - 1, 1.96) * statistics.stdev(means) / len(means) ** 0.5
    else:
        half = 1.96 * statistics.stdev(by_seed[0]) / len(by_seed[0]) ** 0.5 if len(by_seed[0]) > 1 else 0.0
    return f"{statistics.mean(means):.{digits}f} ± {half:.{digits}f}"


COLUMNS = {"gold of the one returned": "gold", "gold, all particles": "all_gold", "reward followed": "reward", "second reward": "second",
           "tokens changed": "all_changed_share", "drop of log pi_ref": "all_ref_drop", "not put back": "all_kept"}  # fmt: skip


def report(runs: list[Seed], failed: list[str], command: str) -> str:
    lines = [f"`{command}`. {STUDY['eval_prompts']} prompts a seed; mean over seeds ± half the 95 % t interval (one seed: over prompts).", ""]
    for variant in STUDY["variants"]:
        lines += variant_report([r for r in runs if r.variant == variant], variant)
    lines += ["![VGF in small](docs/replication-vgf.png)", "", *(f"Failed: {f}" for f in failed)]
    return "\n".join(lines).rstrip() + "\n"


def variant_report(runs: list[Seed], variant: str) -> list[str]:
    rows = [r.rows() for r in runs]
    arms = list(dict.fromkeys(a for r in rows for a in r))
    rm = [json.loads(f.read_text(encoding="utf-8"))["held_out"] for r in runs if (f := r.work / "reward-0" / "summary.json").is_file()]
    labels = [json.loads(line) for r in runs if (f := r.work / "pairs-0.jsonl").is_file() for line in f.read_text(encoding="utf-8").splitlines()]
    lines = [f"**Task: {variant}**", ""]
    if not arms:
        return [*lines, "Not run.", ""]
    if rm:
        right, ece, agree = statistics.mean(x["accuracy"] for x in rm), statistics.mean(x["ece"] for x in rm), statistics.mean(x["right"] for x in labels)
        top = shown([[x["ceiling"] for x in r["reference"]] for r in rows if "reference" in r])
        lines += [f"Reward model on held-out pairs: accuracy {right:.3f}, ECE {ece:.3f}; labels agree with gold on {agree:.3f}. Highest gold among a "
                  f"prompt's {STUDY['pool']} samples of the reference: {top}.", ""]  # fmt: skip
    lines += ["| arm | win rate vs. reference (%) | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) + 1)]
    ends = (f"best of {STUDY['n']}", f"best of {STUDY['pool']}")
    for a in (a for a in arms if not a.startswith("best of") or a in ends):  # those between are in the second table
        there = [r[a] for r in rows if a in r]
        cells = [shown([[win(x) for x in own] for own in there], 1)]
        cells += [shown([v for own in there if (v := [x[key] for x in own if key in x])]) for key in COLUMNS.values()]
        name = a if len(there) == len(rows) else f"{a} ({len(there)} of {len(rows)} seeds)"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, "", *equal_compute_table(rows), ""]


def equal_compute_table(rows: list[dict[str, list[dict[str, Any]]]]) -> list[str]:
    """Each transport against the best-of-N' of its cost, on the same prompts and opponents."""
    lines = ["| transport | N' of equal compute | win rate (%) | best of N' (%) | difference (points) | difference of gold |", "|---|" + "---:|" * 5]
    for name, how in transports():
        there = [(r[name], r[f"best of {size}"], size) for r in rows if name in r for size in [fair_size(r[name], how)]]
        if there:
            wins = [[[win(x) for x in own] for own in pair] for *pair, _ in there]
            apart = [[a - b for a, b in zip(*pair, strict=True)] for pair in wins]
            gold = [[a["gold"] - b["gold"] for a, b in zip(mine, theirs, strict=True)] for mine, theirs, _ in there]
            cells = [f"{statistics.mean(size for *_, size in there):.0f}", shown([w[0] for w in wins], 1), shown([w[1] for w in wins], 1)]
            lines.append(f"| {name} | " + " | ".join([*cells, shown(apart, 1), shown(gold)]) + " |")
    return lines


def draw(runs: list[Seed], out: Path) -> None:
    """Gold beside the reward that is followed, over L: of the response returned, mean over seeds. A row a variant, a column a transport."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = [v for v in STUDY["variants"] if any(r.rows() for r in runs if r.variant == v)]
    shape = len(variants), len(STUDY["transports"])
    figure, axes = plt.subplots(*shape, figsize=(4.2 * shape[1], 3.2 * shape[0]), squeeze=False, layout="constrained")
    for row, variant in zip(axes, variants, strict=True):
        rows = [r.rows() for r in runs if r.variant == variant]
        for ax, label in zip(row, STUDY["transports"], strict=True):
            right = ax.twinx()
            panel(ax, right, rows, label)
            ax.set_title(f"{variant}: VGF{label}", fontsize=10)
            ax.set_xlabel("flow steps L (0 = best of N)")
            ax.set_ylabel("gold", color="C0")
            right.set_ylabel("reward", color="C3")
            ax.grid(alpha=0.3)
    handles = [h for axis in (ax, right) for h in axis.get_legend_handles_labels()[0]]
    figure.legend(handles, [h.get_label() for h in handles], loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def panel(ax: Any, right: Any, rows: list[dict[str, list[dict[str, Any]]]], label: str) -> None:
    names = [(0, f"best of {STUDY['n']}")] + [(s, f"VGF, L = {s}{label}") for s in STUDY["steps"]]
    curves = (ax, "gold", "C0", "gold"), (right, "reward", "C3", "reward followed (decoded)"), (right, "second", "C2", "second reward model"), (
        right, "all_reward_flowed", "C1", "embeddings before decoding, all particles",
    )  # fmt: skip
    for axis, key, color, title in curves:
        by_step = [(step, [v for r in rows if (v := [x[key] for x in r.get(name, []) if key in x])]) for step, name in names]
        points = [(step, [statistics.mean(v) for v in values]) for step, values in by_step if values]
        axis.plot([k for k, _ in points], [statistics.mean(v) for _, v in points], color=color, marker="o", ms=3, label=title)
        if key == "gold":
            axis.fill_between([k for k, _ in points], [min(v) for _, v in points], [max(v) for _, v in points], color=color, alpha=0.15)


def take_over(study: dict[str, Any]) -> None:
    """A new process knows the study as this one does."""
    STUDY.update(study)


def everything(run: Seed) -> list[str]:
    """All of a seed, in a process of its own; what failed."""
    import torch

    from llmrl.models import quiet_transformers

    quiet_transformers()
    torch.set_num_threads(1)
    failed: list[str] = []
    for name, step in [("shared", run.prepare), ("test time", run.test_time), *((a, partial(run.trained, a)) for a in STUDY["arms"])]:
        began = time.perf_counter()
        try:
            step()
            print(f"{run.name}: {name} done in {time.perf_counter() - began:.0f} s", flush=True)
        except (RuntimeError, OSError) as error:
            failed.append(f"{run.name}, {name}: {error}")
            print(f"{run.name}: {name} FAILED, {error}", flush=True)
            if name in ("shared", "test time"):
                break
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=HERE / "study.toml")
    parser.add_argument("--seeds", help="e.g. 0,1,2; default: the study's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="seeds at a time, one core each")
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "replication" / "vgf")
    parser.add_argument("--fresh", action="store_true", help="throw away what was done before")
    parser.add_argument("--report", action="store_true", help="run nothing, write the table")
    parser.add_argument("--to", type=Path, default=REPO / "REPLICATION.md")
    args = parser.parse_args()
    STUDY.update(tomllib.loads(args.study.read_text(encoding="utf-8")))
    if args.fresh:
        shutil.rmtree(args.work, ignore_errors=True)
    seeds, failed = [int(s) for s in (args.seeds.split(",") if args.seeds else STUDY["seeds"])], list[str]()
    runs = [Seed(s, args.work.resolve(), variant) for variant in STUDY["variants"] for s in seeds]
    if not args.report:
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=take_over, initargs=(STUDY,)) as pool:
            failed = [f for found in pool.map(everything, runs) for f in found]
    text = report(runs, failed, f"python scripts/replicate_vgf.py`, seeds `{','.join(map(str, seeds))}")
    write_section(args.to, "vgf", text)
    if any(r.rows() for r in runs):
        draw(runs, args.to.resolve().parent / "docs" / "replication-vgf.png")
    print(text)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

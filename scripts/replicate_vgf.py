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
from functools import lru_cache, partial
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
        items = [(policy.chat.prompt_ids(t.messages), t.token_ids) for g in groups for t in g[:pool]]
        scores, others = reward.score(items), second.score(items)
        samples = [
            {"gold": [t.score for t in g[:pool]], "reward": scores[k * pool : (k + 1) * pool], "second": others[k * pool : (k + 1) * pool],
             "against": [t.score for t in g[pool:]]}
            for k, g in enumerate(groups)
        ]  # fmt: skip
        own = [t for g in groups for t in g[:n]]
        items = [(policy.chat.prompt_ids(t.messages), t.token_ids) for t in own]
        moved_arms, ways = {}, transports()
        with Scorer(GOLD, {}, REPO) as scorer:
            for (name, _), moved in zip(ways, sweep(policy, reward, items, [how for _, how in ways], eps=STUDY["eps"]), strict=True):
                verdicts = scorer.score([(Prompt(t.prompt_id, tuple(t.messages)), policy.chat.text(m.token_ids)) for t, m in zip(own, moved, strict=True)])
                seconds = second.score([(c, m.token_ids) for (c, _), m in zip(items, moved, strict=True)])
                told = [{**asdict(m), "gold": v.score, "second": x} for m, v, x in zip(moved, verdicts, seconds, strict=True)]
                moved_arms[name] = [moved_row(told[k * n : (k + 1) * n], [t.score for t in g[pool:]]) for k, g in enumerate(groups)]
        out.write_text(json.dumps({"samples": samples, "arms": moved_arms}), encoding="utf-8")

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
        against = [s["against"] for s in self.samples()]
        items = [(context_of(self.start, t), t.token_ids) for g in groups for t in g]
        scores, others, rows = reward.score(items), second.score(items), []
        for k, (g, ref) in enumerate(zip(groups, against, strict=True)):
            at = k * len(g)
            rows.append({**own_row(g[0], ref), "all_gold": statistics.mean(t.score for t in g), "reward": scores[at], "second": others[at]})
        out.write_text(json.dumps(rows), encoding="utf-8")

    def samples(self) -> list[dict[str, list[float]]]:
        """The reference's samples of each held-out prompt: gold, reward and second of the pool, and the gold of those to win against."""
        return json.loads((self.work / "test-time.json").read_text(encoding="utf-8"))["samples"]

    def recipe(self, arm: str) -> dict[str, Any]:
        """What a trained arm's run was told, with defaults."""
        return json.loads((self.work / slug(arm) / "manifest.json").read_text(encoding="utf-8"))["recipe"]

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Everything that is there, by arm."""
        if not (file := self.work / "test-time.json").is_file():
            return {}
        arms: dict[str, list[dict[str, Any]]] = {"reference": [best_of(s, 1, first=1) for s in self.samples()]}
        arms |= {f"best of {size}": [best_of(s, size, first=size) for s in self.samples()] for size in (STUDY["n"], STUDY["pool"])}
        arms |= json.loads(file.read_text(encoding="utf-8"))["arms"]
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


def cost_at_test_time(rows: list[dict[str, Any]], how: Readout) -> float:
    """What an answer of a test-time arm costs, in forwards of a response, all three models being of one size.

    Sampling a response, scoring it, and a teacher-forced look at it cost 1 each (the key-value cache makes sampling no dearer in operations; on a GPU
    it is slower by the clock), a backward 2. So best-of-N costs 2 N.
    """
    passes = (2.0 if how.guard is not None else 0.0) + statistics.mean(r["all_passes"] for r in rows)
    return 2 * equal_compute(STUDY["n"], how.steps, generate=1, score=1, reference=1, passes=passes)


def cost_of_training(recipe: dict[str, Any]) -> float:
    """What a trained arm spent before its first answer, in the same forwards: an update is 3, a look of the starting model for the KL or DPO's ratio 1.

    Not counted: the reward model, which all but DPO were given; labels; what is only measured.
    """
    rule, prompts, n = recipe["rule"], recipe["steps"] * recipe["rollout"]["prompts"], recipe["rollout"]["group"]
    if rule["use"] == "exp_dpo":
        return prompts * 2 * (1 + 3 + 1.0)
    if rule["use"] == "grpo":
        return prompts * n * (1 + 1 + 3 + 1.0)
    head = 2 * n if rule.get("value") == "head" else 0  # features of sampled and moved texts
    return prompts * (2 * equal_compute(n, rule["steps"], generate=1, score=1, reference=1) + head + 3.0)


def own_row(trace: Any, against: list[float]) -> dict[str, Any]:
    return {"gold": trace.score, "all_gold": trace.score, "against": against}


def ranked(rewards: list[float]) -> list[int]:
    """Indices from the highest reward to the lowest; of equals the first comes first."""
    return sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))


@lru_cache
def shares(m: int, size: int) -> list[float]:
    """Of all choices of `size` of m samples the share whose best is the k-th (from 0) by reward: C(m-1-k, size-1) / C(m, size)."""
    found = [size / m]
    for k in range(m - 1):
        found.append(found[-1] * (m - k - size) / (m - 1 - k) if k < m - size else 0.0)
    return found


def best_of(samples: dict[str, list[float]], size: int, first: int | None = None) -> dict[str, Any]:
    """Best-of-`size` by the reward: the mean over all choices of `size` of a prompt's first `first` samples (None: of the pool). first = size: just these."""
    own = {key: samples[key][:first] for key in ("gold", "reward", "second")}
    order = ranked(own["reward"])
    share = shares(len(order), size)
    row: dict[str, Any] = {key: sum(p * own[key][i] for p, i in zip(share, order, strict=True)) for key in own}
    row["win"] = sum(p * win({"gold": own["gold"][i], "against": samples["against"]}) for p, i in zip(share, order, strict=True) if p)
    return row | {"all_gold": statistics.mean(own["gold"]), "ceiling": max(own["gold"]), "against": samples["against"]}


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
    if "win" in row:  # of more than one response
        return row["win"]
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
        top = shown([[x["ceiling"] for x in r[f"best of {STUDY['pool']}"]] for r in rows if r])
        lines += [f"Reward model on held-out pairs: accuracy {right:.3f}, ECE {ece:.3f}; labels agree with gold on {agree:.3f}. Highest gold among a "
                  f"prompt's {STUDY['pool']} samples of the reference: {top}.", ""]  # fmt: skip
    lines += ["| arm | win rate vs. reference (%) | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) + 1)]
    for a in arms:
        there = [r[a] for r in rows if a in r]
        cells = [shown([[win(x) for x in own] for own in there], 1)]
        cells += [shown([v for own in there if (v := [x[key] for x in own if key in x])]) for key in COLUMNS.values()]
        name = a if len(there) == len(rows) else f"{a} ({len(there)} of {len(rows)} seeds)"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, "", *equal_compute_table([r for r in runs if r.rows()], arms), ""]


def equal_compute_table(runs: list[Seed], arms: list[str]) -> list[str]:
    """Each arm against the best-of-N' of its cost, on the same prompts and opponents; what training cost is laid upon the prompts of the study."""
    rows, samples = [r.rows() for r in runs], [r.samples() for r in runs]
    pool = STUDY["pool"]
    by_rank = [[win({"gold": s["gold"][i], "against": s["against"]}) for i in ranked(s["reward"])] for own in samples for s in own]
    means = [statistics.mean(column) for column in zip(*by_rank, strict=True)]
    curve = [sum(p * w for p, w in zip(shares(pool, size), means, strict=True)) for size in range(1, pool + 1)]  # win rate of best-of-1, -2, ...
    lines = ["| arm | forwards a prompt | N' of equal compute | win rate (%) | best of N' (%) | difference (points) | difference of gold | "
             "best of N that wins as much | prompts until training is cheaper |", "|---|" + "---:|" * 8]  # fmt: skip
    ways = dict(transports())
    for name in (a for a in arms if a in ways or a in STUDY["arms"]):
        there = [(run, own[name], theirs) for run, own, theirs in zip(runs, rows, samples, strict=True) if name in own]
        spent = [0.0 if name in ways else cost_of_training(run.recipe(name)) for run, *_ in there]
        costs = [cost_at_test_time(own, ways[name]) if name in ways else 1 + c / len(own) for c, (_, own, _) in zip(spent, there, strict=True)]
        sizes = [max(1, min(pool, round(c / 2))) for c in costs]
        fair = [[best_of(s, size) for s in theirs] for size, (*_, theirs) in zip(sizes, there, strict=True)]
        wins = [[[win(x) for x in own] for own in pair] for pair in zip((own for _, own, _ in there), fair, strict=True)]
        gold = [[a["gold"] - b["gold"] for a, b in zip(own, theirs, strict=True)] for (_, own, _), theirs in zip(there, fair, strict=True)]
        level = statistics.mean(statistics.mean(w[0]) for w in wins)
        as_good = next((size for size, w in enumerate(curve, 1) if w >= level), None)
        until = "-" if name in ways or as_good is None or as_good < 2 else f"{statistics.mean(spent) / (2 * as_good - 1):.0f}"
        cells = [f"{statistics.mean(costs):.0f}", f"{statistics.mean(sizes):.0f}", shown([w[0] for w in wins], 1), shown([w[1] for w in wins], 1)]
        cells += [shown([[a - b for a, b in zip(*w, strict=True)] for w in wins], 1), shown(gold), str(as_good or "none"), until]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
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

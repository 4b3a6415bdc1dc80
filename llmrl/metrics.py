"""Names, units and reductions of metrics; `metrics.jsonl`; the Wilson interval.

A metric that is not declared in METRICS cannot be logged, so each has a unit and a sentence that says what it is. Names that start with
`time/` or `verifier/` measure the machine and the services it calls: they differ from run to run, everything else must not. A declared
name that ends in `/*` is a family (`loss/*` allows `loss/policy`), for names that only a rule or a verifier knows.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmrl.records import InputError

Reduction = Literal["mean", "sum", "max", "min", "last"]
"""How values of ranks or micro-batches become one: a mean weighs by count; "last" = the same on all of them."""


@dataclass(frozen=True)
class Metric:
    unit: str
    """"1" for a plain number or a share."""
    reduction: Reduction
    help: str
    """One sentence: what it is, over what it is taken."""


METRICS: dict[str, Metric] = {
    "step": Metric("1", "last", "Number of the training step, from 1; 0 is the model before the first one."),
    "reward/mean": Metric("1", "mean", "Mean reward of the step's samples that could be judged."),
    "reward/std": Metric("1", "mean", "Standard deviation of the rewards over the whole batch."),
    "samples": Metric("samples", "sum", "Samples of the step."),
    "samples/unjudged": Metric("samples", "sum", "Samples whose verifier timed out, failed or had no gold: weight 0, outside all statistics."),
    "samples/timeout": Metric("samples", "sum", "Samples whose verifier did not end within scoring.timeout_s; part of samples/unjudged."),
    "samples/error": Metric("samples", "sum", "Samples whose verifier failed, or whose row it cannot judge; part of samples/unjudged."),
    "samples/staleness_updates": Metric("updates", "mean", "Updates between the weights that sampled and the weights that learn; 0 = on-policy."),
    "samples/stale": Metric("samples", "sum", "Samples dropped because they were older than engine.max_staleness allows."),
    "samples/no_answer_share": Metric("1", "mean", "Share of samples in which the verifier found no answer."),
    "groups/live_share": Metric("1", "mean", "Share of cohorts with an advantage that is not 0."),
    "length/max_tokens": Metric("tokens", "max", "Longest completion of the step."),
    "length/truncated_share": Metric("1", "mean", "Share of completions cut by the length limit."),
    "entropy/policy_nats": Metric("nats", "mean", "Exact entropy of the next-token distribution, over trained tokens; where the rule needs it."),
    "logp_gap/max_nats": Metric("nats", "max", "Largest |learner - engine| log-prob of a sampled token in the step's first micro-batch; the alarm."),
    "logp_gap/fingerprint_nats": Metric("nats", "max", "Largest |learner - server| log-prob of a fixed text after the weights were sent to the servers."),
    "logp_gap/mean_nats": Metric("nats", "mean", "Mean of the same over all trained tokens of the step."),
    "kl/old_nats": Metric("nats", "mean", "KL (k3) from the policy to itself at the start of the step."),
    "kl/ref_nats": Metric("nats", "mean", "KL (k3) to the reference model; where the rule has one."),
    "clip/share": Metric("1", "mean", "Share of trained tokens whose gradient the clip removes."),
    "loss/*": Metric("nats", "sum", "Value of a loss term before its coefficient, mean over the step's updates."),
    "grad/norm": Metric("1", "mean", "Gradient norm before clipping, mean over the step's updates."),
    "lr": Metric("1", "last", "Learning rate."),
    "rule/*": Metric("1", "mean", "What the rule notes itself; its docstring says what."),
    "tokens/generated": Metric("tokens", "sum", "Tokens that the engine sampled in the step, those of discarded texts and other roles too."),
    "tokens/total": Metric("tokens", "last", "tokens/generated summed from the first step on."),
    "tokens/trained": Metric("tokens", "sum", "Input tokens through forward and backward in the step, contexts once."),
    "policy_version": Metric("updates", "last", "Updates since the first weights, warm start included."),
    "eval/judged": Metric("prompts", "sum", "Held-out prompts whose answer could be judged."),
    "eval/unjudged": Metric("prompts", "sum", "Held-out prompts whose answer could not be judged."),
    "eval/mean_tokens": Metric("tokens", "mean", "Mean length of the greedy held-out answers."),
    "eval/accuracy": Metric("1", "last", "Share of the held-out prompts answered rightly, greedy; in [0, 1]."),
    "eval/accuracy_low": Metric("1", "last", "Lower end of the 95 % Wilson interval of eval/accuracy."),
    "eval/accuracy_high": Metric("1", "last", "Upper end of the 95 % Wilson interval of eval/accuracy."),
    "length/mean_tokens": Metric("tokens", "mean", "Mean length of the step's completions, end token included."),
    "entropy/rollout_nats": Metric("nats", "mean", "Mean of -log p over the sampled tokens: an estimate of the policy's entropy a token."),
    "time/cpu_s": Metric("s", "max", "CPU seconds of this process in the step, all its threads."),
    "time/*": Metric("s", "max", "Wall-clock seconds of a part of the step; verdict_queue_s and verdict_run_s are means over the step's verdicts."),
    "verifier/respawns": Metric("processes", "sum", "Verifier processes of this rank that had to be replaced in the step."),
    "verifier/*": Metric("1", "sum", "What the verifier counts itself in the step, on this rank: calls, tokens, dollars."),
}


def metric(name: str) -> Metric:
    """The declaration of `name`, its own or its family's. Raises ValueError for a name that has none."""
    if name in METRICS:
        return METRICS[name]
    parts = name.split("/")
    for n in range(len(parts) - 1, 0, -1):
        family = "/".join(parts[:n]) + "/*"
        if family in METRICS:
            return METRICS[family]
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f" (nearest: {near[0]!r})" if near else ""
    raise ValueError(f"metric {name!r} is not declared in llmrl.metrics.METRICS{hint}; declare it with a unit, a reduction and a help")


def is_wall_clock(name: str) -> bool:
    """Whether the metric measures the machine and not the training: it is left out when runs are compared."""
    return name.startswith(("time/", "verifier/"))


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a row that two runs of the same recipe must share."""
    return {name: value for name, value in row.items() if not is_wall_clock(name)}


class MetricLog:
    """`metrics.jsonl` of a run: one JSON line a step, steps rising."""

    def __init__(self, directory: str | Path, *, fsync: bool = False) -> None:
        """Goes on after the rows that are there; an unfinished last line is cut off.

        fsync: wait until each row is on the disk. Without it a row survives a killed process, but not a power cut.
        """
        self.path = Path(directory) / "metrics.jsonl"
        self.fsync = fsync
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = _rows(self.path)
        self._last_step: int | None = lines[-1][1]["step"] if lines else None
        if self.path.exists() and self.path.stat().st_size > sum(len(line) for line, _ in lines):  # the next row must not be glued to it
            os.truncate(self.path, sum(len(line) for line, _ in lines))

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row. Values are numbers (anything with `.item()` too); None, NaN and infinities are written as null.

        Raises ValueError for a name that is not declared, a value that is no number, and a step that does not come after the last one.
        """
        clean = {name: _number(name, value) for name, value in row.items()}
        step = clean.get("step")
        if not isinstance(step, int):
            raise ValueError(f"a row of metrics needs a whole number 'step', got {step!r}")
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"metrics of step {step} after those of step {self._last_step}; a resume calls truncate_after first")
        line = json.dumps(clean, sort_keys=True, allow_nan=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            if self.fsync:
                os.fsync(file.fileno())
        self._last_step = step

    def truncate_after(self, step: int) -> int:
        """Drops the rows after `step`, and a last line that a killed process left unfinished; returns the number of rows kept."""
        kept, last = [], None
        for line, row in _rows(self.path):
            if row["step"] <= step:
                kept.append(line)
                last = row["step"]
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._last_step = last
        return len(kept)

    @staticmethod
    def read(directory: str | Path) -> list[dict[str, Any]]:
        """The rows of a run; [] when it has none yet. An unfinished last line is passed over; InputError for any other broken line."""
        return [row for _, row in _rows(Path(directory) / "metrics.jsonl")]


def _rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """(line, row) of every finished line."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}); remove the line, or start the run afresh") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise InputError(f"{path}, line {number}: no object with a whole number 'step'; remove the line, or start the run afresh")
        rows.append((line, row))
    return rows


def _number(name: str, value: Any) -> float | int | None:
    metric(name)
    if hasattr(value, "item"):
        value = value.item()
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"metric {name!r} is {value!r}; it must be a number or None")
    return None if value is None or not math.isfinite(value) else value


_Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


def wilson(successes: float, n: float) -> tuple[float, float]:
    """95 % Wilson score interval (low, high) of a share, in [0, 1]; n = 0 says nothing: (0, 1).

    centre = (p + z^2 / 2n) / (1 + z^2 / n),  half width = z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / 4n^2),  p = successes / n
    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209-212. Unlike p +- z sqrt(p (1 - p) / n) it holds near 0 and 1.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"wilson({successes}, {n}): successes must lie in [0, n]")
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At 0 and n one end is exact in theory; rounding must not push it out of [0, 1].
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half

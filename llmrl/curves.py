"""`curve.png` of a run: reward, held-out accuracy, length and entropy over the steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from llmrl.metrics import MetricLog
from llmrl.records import InputError

_INK, _GRID, _LINE = "#22272e", "#d9dee5", "#1f6feb"


def draw_curve(run_dir: str | Path) -> Path:
    """Draws `<run_dir>/curve.png` from `metrics.jsonl` and returns its path. Raises InputError when there are no metrics.

    Rows may lack any of the metrics (accuracy is measured only now and then). Noisy panels show every step thinly, and a centred mean over
    about a twentieth of the run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy, and pyplot would start a window system
    from matplotlib.figure import Figure

    rows = MetricLog.read(run_dir)
    if not rows:
        raise InputError(f"{Path(run_dir) / 'metrics.jsonl'}: no metrics to draw; has the run taken a step?")
    figure = Figure(figsize=(9.6, 6.4), dpi=130, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)  # inches
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True)
    _draw_noisy(panels[0, 0], rows, "reward/mean", "Training reward", "mean reward of a step's samples")
    _draw_accuracy(panels[0, 1], rows)
    _draw_noisy(panels[1, 0], rows, "length/mean_tokens", "Completion length", "mean length (tokens)")
    _draw_noisy(panels[1, 1], rows, "entropy/rollout_nats", "Policy entropy", "entropy of a token (nats)")
    for panel in panels.flat:
        _finish(panel)
    for panel in panels[1]:
        panel.set_xlabel("training step")
    steps = [row["step"] for row in rows]
    margin = 0.02 * (max(steps) - min(steps)) or 1.0
    panels[0, 0].set_xlim(min(steps) - margin, max(steps) + margin)
    path = Path(run_dir) / "curve.png"
    temporary = path.with_name("curve.tmp.png")  # a viewer never meets half a picture
    figure.savefig(temporary, metadata={"Software": None})
    temporary.replace(path)
    return path


def _points(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows that have the metric."""
    found = [(row["step"], float(row[name])) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _draw_noisy(panel: Any, rows: list[dict[str, Any]], name: str, title: str, unit: str) -> None:
    panel.set_title(title)
    panel.set_ylabel(unit)
    steps, values = _points(rows, name)
    if not values:
        _say_missing(panel, name)
        return
    half = len(values) // 40
    if half == 0:
        panel.plot(steps, values, color=_LINE, linewidth=1.8, marker="o", markersize=3 if len(values) > 20 else 4.5)
        return
    smooth = [math.fsum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - half) : i + half + 1])]
    panel.plot(steps, values, color=_LINE, linewidth=0.8, alpha=0.35, label="each step")
    panel.plot(steps, smooth, color=_LINE, linewidth=2.0, label=f"mean of {2 * half + 1} steps")
    panel.margins(y=0.12)
    panel.legend(loc="best", frameon=False, fontsize=8)


def _draw_accuracy(panel: Any, rows: list[dict[str, Any]]) -> None:
    panel.set_title("Held-out accuracy (greedy)")
    panel.set_ylabel("share answered rightly")
    panel.set_ylim(-0.02, 1.02)
    steps, values = _points(rows, "eval/accuracy")
    if not values:
        _say_missing(panel, "eval/accuracy")
        return
    banded = [row for row in rows if None not in [row.get(f"eval/accuracy{end}") for end in ("", "_low", "_high")]]
    ends = [_points(banded, f"eval/accuracy{end}") for end in ("_low", "_high")]
    if len(banded) == 1:
        panel.vlines(ends[0][0], ends[0][1], ends[1][1], color=_LINE, alpha=0.4, linewidth=4, label="95 % interval (Wilson)")
    elif banded:
        panel.fill_between(ends[0][0], ends[0][1], ends[1][1], color=_LINE, alpha=0.18, linewidth=0, label="95 % interval (Wilson)")
    panel.plot(steps, values, color=_LINE, linewidth=1.8, marker="o", markersize=4.5)
    falls = len(values) > 1 and values[1] < values[0]
    _label(panel, steps[0], values[0], right=True, above=falls)  # on the side that the line does not take
    if len(values) > 1:
        _label(panel, steps[-1], values[-1], right=False, above=values[-1] < 0.85)
    if banded:
        panel.legend(loc="lower right", frameon=False, fontsize=8)


def _label(panel: Any, x: float, y: float, *, right: bool, above: bool) -> None:
    """The value beside its point."""
    panel.annotate(
        f"{y:.3f}",
        (x, y),
        xytext=(7 if right else 0, 9 if above else -9),
        textcoords="offset points",
        ha="left" if right else "right",
        va="bottom" if above else "top",
        fontsize=9,
        fontweight="bold",
        color=_INK,
    )


def _say_missing(panel: Any, name: str) -> None:
    panel.set_yticks([])
    panel.text(0.5, 0.5, f"no {name} in metrics.jsonl", transform=panel.transAxes, ha="center", va="center", color="#7a828c", fontsize=9)


def _finish(panel: Any) -> None:
    """One style for all panels."""
    panel.title.set(fontsize=11, fontweight="bold", color=_INK)
    panel.grid(True, color=_GRID, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(colors=_INK, labelsize=8.5, length=3)
    panel.xaxis.get_major_locator().set_params(integer=True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color("#8b949e")

"""One table, one figure and one JSON file from the figures of one or more models on one set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from llmrl.evaluation.passk import Estimate
from llmrl.evaluation.robustness import Sheet, empty_kinds
from llmrl.evaluation.robustness_set import Suite
from llmrl.evaluation.robustness_stats import Measured
from llmrl.records import InputError

CAVEAT = "GASP-style protocols, reconstructed from the abstract of arXiv:2602.00173; no number here compares with a number of that paper."
_INK, _GRID = "#22272e", "#d9dee5"
_COLOURS = ("#1f6feb", "#d1632a", "#2da44e", "#8250df", "#bf3989", "#6e7781")
_STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Report:
    """Figures of every model; differences are against the first one, from the same resampled problems."""

    suite: Suite
    sheets: Sequence[Sheet]
    figures: Sequence[dict[str, Measured]]
    drift: dict[str, dict[str, Any] | str]
    """By model: the numbers of drift.drift, or why there are none."""
    settings: dict[str, Any]

    @property
    def names(self) -> list[str]:
        return short_names([s.model for s in self.sheets])

    def differences(self) -> list[dict[str, Measured]]:
        """For the second model on: its figure minus the first model's, where both have it."""
        first = self.figures[0]
        return [{name: m - first[name] for name, m in figures.items() if name in first} for figures in self.figures[1:]]

    def notes(self) -> list[str]:
        """What a reader must know beside the numbers."""
        lines = [CAVEAT]
        for subset in ("individual", "shared"):
            none = [n for n, f in zip(self.names, self.figures, strict=True) if not any(k.startswith(f"distract/{subset}/") for k in f)]
            if none and any(i.phase == "distract" for i in self.suite.items):
                lines.append(f"distract/{subset} is empty for {', '.join(none)}: no problem is solved in every clean sample" + " by all" * (subset == "shared"))
        if missing := empty_kinds(self.suite):
            lines.append(f"the set has no item of: {', '.join(missing)} (reasons: left_out in its header)")
        for name, sheet in zip(self.names, self.sheets, strict=True):
            if not sheet.same_tokenizer:
                lines.append(f"{name}: another tokenizer or chat template than the set's; the set's text was tokenised anew, so cuts need not be its tokens'")
            for phase, reasons in sheet.left_out.items():
                lines += [f"{name}: {n} {phase} items left out: {why}" for why, n in reasons.items()]
            unjudged = sum(a.score is None for rows in sheet.answers.values() for a in rows)
            if unjudged:
                lines.append(f"{name}: {unjudged} answers could not be judged and are in no figure")
        lines += [f"{n}: no drift: {d}" for n, d in zip(self.names, (self.drift.get(s.model) for s in self.sheets), strict=True) if isinstance(d, str)]
        return lines

    def to_json(self) -> dict[str, Any]:
        header = {k: v for k, v in self.suite.header.items() if k not in ("kind", "schema")}
        models = [
            {"model": sheet.model, "name": name, "same_tokenizer": sheet.same_tokenizer, "left_out": sheet.left_out,
             "figures": {k: m.to_json() for k, m in figures.items()}, "drift": self.drift.get(sheet.model)}
            for name, sheet, figures in zip(self.names, self.sheets, self.figures, strict=True)
        ]  # fmt: skip
        minus = [
            {"model": sheet.model, "minus": self.sheets[0].model, "figures": {k: m.to_json() for k, m in found.items()}}
            for sheet, found in zip(self.sheets[1:], self.differences(), strict=True)
        ]
        return {"schema": 1, "set": header, "settings": self.settings, "models": models, "differences": minus, "notes": self.notes()}

    def table(self) -> Table:
        """Percentages with their intervals, tokens and nats as they are; a column a model, and one a difference to the first."""
        title = f"robustness on set {self.suite.sha256[:12]} (%, [95 % interval over problems])"
        table = Table(title=title)
        table.add_column("figure")
        table.add_column("problems", justify="right")
        for name in self.names:
            table.add_column(name, justify="right")
        differences = self.differences()
        for name in self.names[1:]:
            table.add_column(f"{name} - {self.names[0]}", justify="right")
        section = ""
        for key in sorted({k for f in self.figures for k in f if _shown(k, len(self.sheets))}, key=_order):
            if section and key.split("/")[0] != section:
                table.add_section()
            section = key.split("/")[0]
            cells = [f.get(key) for f in (*self.figures, *differences)]
            problems = max(m.problems for m in cells if m is not None)
            table.add_row(key, str(problems), *(_cell(key, m) for m in cells))
        self._drift_rows(table, len(differences))
        return table

    def _drift_rows(self, table: Table, n_differences: int) -> None:
        found = [d if isinstance(d := self.drift.get(s.model), dict) else None for s in self.sheets]
        if not any(found):
            return
        table.add_section()

        def row(name: str, of: Any) -> None:
            texts = ["-" if d is None or (value := of(d)) is None else f"{value:.4g}" for d in found]
            table.add_row(name, "", *texts, *[""] * n_differences)

        row("drift/kl_nats", lambda d: d["kl_nats"])
        row("drift/weight_distance", lambda d: d["weight_distance"])
        row("drift/cka/lowest layer", lambda d: min(values) if d["cka"] and (values := [c for c in d["cka"] if c is not None]) else None)

    def draw(self, path: Path) -> Path:
        """The figure: recoverability, distraction, diagnosis, perturbed prompts, and CKA a layer."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy, and pyplot would start a window system
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13.5, 7.6), dpi=130, facecolor="white")
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)  # inches
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 3)
        self._curves(panels[0, 0], "recover", "r", "Recoverability A: corrupted step at r", "rec")
        self._curves(panels[0, 1], "distract", "m", "Recoverability B: foreign text after m", "accuracy")
        self._bars(panels[0, 2], "diagnose", ("acc_err", "acc_ok", "f1"), "Diagnosability")
        self._bars(panels[1, 0], "perturb", ("accuracy", "clean"), "Perturbed prompts (outline: the same, unperturbed)")
        self._pooled(panels[1, 1])
        self._layers(panels[1, 2])
        for panel in panels.flat:
            panel.title.set(fontsize=10.5, fontweight="bold", color=_INK)
            panel.grid(True, color=_GRID, linewidth=0.7)
            panel.set_axisbelow(True)
            panel.tick_params(colors=_INK, labelsize=8, length=3)
            for side in ("top", "right"):
                panel.spines[side].set_visible(False)
        figure.suptitle(f"set {self.suite.sha256[:12]}, base {short_names([self.suite.header['base']])[0]}; bars: 95 % over problems", fontsize=9, color=_INK)
        temporary = path.with_name(path.stem + ".tmp.png")  # a viewer never meets half a picture
        figure.savefig(temporary, metadata={"Software": None})
        temporary.replace(path)
        return path

    def _curves(self, panel: Any, phase: str, letter: str, title: str, metric: str) -> None:
        """A line a model and source; dotted the control."""
        panel.set_title(title)
        panel.set_ylim(-0.03, 1.03)
        panel.set_xlabel({"r": "relative position r of the step", "m": "share m of the own trace kept"}[letter])
        groups = sorted({k.split("/")[1] for f in self.figures for k in f if k.startswith(f"{phase}/") and f"/{letter}=" in k})
        groups = [g for g in groups if g not in ("number", "sign", "swap") and (g != "shared" or len(self.figures) > 1)]
        drawn = 0
        for n, (name, figures) in enumerate(zip(self.names, self.figures, strict=True)):
            colour = _COLOURS[n % len(_COLOURS)]
            for g, group in enumerate(groups):
                keys = (k for k in figures if k.startswith(f"{phase}/{group}/{letter}=") and k.endswith(f"/{metric}"))
                points = sorted((float(k.split("=")[1].split("/")[0]), k) for k in keys)
                if not points:
                    continue
                drawn += 1
                shift = 0.006 * (n * len(groups) + g)
                _errorbars(panel, [x + shift for x, _ in points], [figures[k].estimate() for _, k in points], colour, _STYLES[g % 4], f"{name}, {group}")
                if metric == "rec" and g == 0:
                    x = [x + shift for x, _ in points]
                    control = [figures[f"{k}0"].value for _, k in points]
                    panel.plot(x, control, color=colour, linestyle=":", marker=".", label=f"{name}, control")
        _legend(panel) if drawn else _nothing(panel, f"no {phase} items")

    def _bars(self, panel: Any, phase: str, metrics: tuple[str, ...], title: str) -> None:
        """Groups of bars: a source (and metric) by model; `clean` is an outline on its bar."""
        panel.set_title(title)
        panel.set_ylim(0, 1.03)
        sources = sorted({k.split("/", 1)[1].rsplit("/", 1)[0] for f in self.figures for k in f if k.startswith(f"{phase}/")})
        outline = metrics[-1] == "clean"
        metrics = metrics[:1] if outline else metrics if len(sources) < 3 else metrics[-1:]  # many sources: f1 alone
        groups = [(s, m) for s in sources for m in metrics]
        if not groups:
            _nothing(panel, f"no {phase} items")
            return
        width = 0.8 / len(self.figures)
        for n, (name, figures) in enumerate(zip(self.names, self.figures, strict=True)):
            colour = _COLOURS[n % len(_COLOURS)]
            for at, (source, metric) in enumerate(groups):
                x = at - 0.4 + (n + 0.5) * width
                if (m := figures.get(f"{phase}/{source}/{metric}")) is None or (e := m.estimate()).value is None:
                    continue
                panel.bar(x, e.value, width * 0.92, color=colour, alpha=0.8, label=name if at == 0 else None)
                if e.low is not None and e.high is not None:
                    panel.vlines(x, e.low, e.high, color=_INK, linewidth=1)
                if outline:
                    panel.bar(x, figures[f"{phase}/{source}/clean"].value, width * 0.92, fill=False, edgecolor=_INK, linewidth=0.9)
        labels = [s if outline else f"{s.removeprefix('processbench/')} {m}" for s, m in groups]
        panel.set_xticks(range(len(groups)), labels, rotation=40, ha="right")
        _legend(panel)

    def _pooled(self, panel: Any) -> None:
        """Clean accuracy, control, and recovery over all r, the figures to be read together."""
        panel.set_title("Clean, control and recovery (all r)")
        panel.set_ylim(0, 1.03)
        keys = ["clean/accuracy"]
        sources = sorted({k.split("/")[1] for f in self.figures for k in f if k.endswith("/any/rec")})
        for source in (s for s in sources if s not in ("number", "sign", "swap")):
            keys += [f"recover/{source}/any/rec0", f"recover/{source}/any/rec"]
        for n, (name, figures) in enumerate(zip(self.names, self.figures, strict=True)):
            rows = [(i, figures[k].estimate()) for i, k in enumerate(keys) if k in figures]
            _errorbars(panel, [i + 0.08 * n for i, _ in rows], [e for _, e in rows], _COLOURS[n % len(_COLOURS)], "none", name)
        panel.set_xticks(range(len(keys)), [k.removeprefix("recover/").replace("/any/", "\n") for k in keys])
        panel.margins(x=0.12)
        _legend(panel)

    def _layers(self, panel: Any) -> None:
        panel.set_title("Drift: linear CKA with the base")
        panel.set_xlabel("layer")
        drawn = 0
        for n, (name, sheet) in enumerate(zip(self.names, self.sheets, strict=True)):
            found = self.drift.get(sheet.model)
            if isinstance(found, dict) and found["cka"]:
                values = [(i + 1, c) for i, c in enumerate(found["cka"]) if c is not None]
                kl = "" if found["kl_nats"] is None else f", KL {found['kl_nats']:.3g} nats"
                panel.plot([i for i, _ in values], [c for _, c in values], color=_COLOURS[n % len(_COLOURS)], marker="o", markersize=3.5, label=f"{name}{kl}")
                drawn += 1
        if not drawn:
            _nothing(panel, "drift was not measured")
            return
        panel.set_ylim(top=1.01)
        panel.xaxis.get_major_locator().set_params(integer=True)
        _legend(panel)


def short_names(models: Sequence[str]) -> list[str]:
    """The last parts of the paths that tell them apart. Raises InputError for two that are the same."""
    if len(set(models)) < len(models):
        raise InputError(f"a model is named twice: {', '.join(models)}")
    parts = [[p for p in m.split("/") if p] or [m] for m in models]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names) and not (n < 2 and any(name == "model" for name in names)):
            return names
    return list(models)


def _errorbars(panel: Any, x: Sequence[float], estimates: Sequence[Estimate], colour: str, style: str, label: str) -> None:
    points = [(a, e) for a, e in zip(x, estimates, strict=True) if e.value is not None]
    panel.plot([a for a, _ in points], [e.value for _, e in points], color=colour, linestyle=style, marker="o", markersize=4, label=label)
    for a, e in points:
        if e.low is not None and e.high is not None:
            panel.vlines(a, e.low, e.high, color=colour, linewidth=1.4, alpha=0.6)


def _legend(panel: Any) -> None:
    panel.legend(loc="best", frameon=False, fontsize=7, handlelength=3)


def _nothing(panel: Any, why: str) -> None:
    panel.text(0.5, 0.5, why, transform=panel.transAxes, ha="center", va="center", color="#7a828c", fontsize=9)


def _shown(key: str, models: int) -> bool:
    """What the table leaves to the JSON: single rules, drop and normalised recovery at one r, subsets of distraction at one m, ..."""
    parts = key.split("/")
    if parts[0] == "recover" and len(parts) == 4:
        return parts[1] not in ("number", "sign", "swap") and (parts[2] == "any" or parts[3] in ("rec", "rec0"))
    if parts[0] == "distract":
        return (parts[1] == "all" or parts[2] == "any") and (parts[1] != "shared" or models > 1)
    return not (parts[0] == "perturb" and parts[2] == "clean")


def _order(key: str) -> tuple[int, list[str]]:
    return ("clean", "control", "recover", "distract", "diagnose", "perturb").index(key.split("/")[0]), key.split("/")


def _cell(key: str, m: Measured | None) -> str:
    e = m.estimate() if m is not None else Estimate(None, None, None)
    if e.value is None:
        return "-"
    scale, digits = (1, 2) if key.endswith("normalised") else (1, 1) if key.endswith("tokens") else (100, 1)
    interval = "" if e.low is None or e.high is None else f" [{scale * e.low:.{digits}f}, {scale * e.high:.{digits}f}]"
    return f"{scale * e.value:.{digits}f}{interval}"

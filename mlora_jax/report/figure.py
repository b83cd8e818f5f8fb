"""Figures: accuracy over the rank of the read-out, and AURAC over the learning rate."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mlora_jax.core import METHODS, READOUTS
from mlora_jax.report.choice import Choice
from mlora_jax.report.rows import CurveRow, MergedRuns, Setting, Spread

# A colour per method in every figure: Okabe and Ito's palette, readable for the colour-blind, then some darker ones.
PALETTE = (
    *("#000000", "#0072B2", "#56B4E9", "#CC79A7", "#D55E00", "#E69F00", "#009E73"),
    *("#7F3C8D", "#8C564B", "#999999", "#B8A900", "#17406D"),
)
# A line and a marker per read-out, in the order of the table of read-outs.
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*")  # one more than lines, so that pairs repeat late

MOST_LINES = 10  # A setting with more lines than this gets one panel per read-out.
# The axis is labelled with the learning rates if any two are at least this share of it apart, else with powers of ten.
LEAST_GAP = 1 / 14
COLUMNS = 2  # The number of panels side by side.
PANEL = (7.2, 4.0)  # The size of a panel in inches, its legend included.


@dataclasses.dataclass(frozen=True)
class _Panel:
    title: str
    lines: dict[Any, list[CurveRow]]  # the key of a line, such as its label -> its rows


def draw_curves(merged: MergedRuns, choice: Choice) -> Figure:
    """Draws accuracy on the test split over log2 rank: a line per row, a band of one standard deviation, and the base.

    There is a panel per setting, or per setting and read-out if a setting has more than `MOST_LINES` rows. Where no
    learning rate is chosen, there is a panel per method and read-out, with a line per learning rate.

    Args:
      merged: the runs whose base is drawn.
      choice: the choice whose `shown` rows are drawn.
    """
    panels = _panels(choice.shown, lambda row: (row.label, row.learning_rate), by_row=bool(choice.undecided))
    figure, axes = _grid(merged.title, len(panels))
    for panel, area in zip(panels, axes, strict=True):
        rates = sorted({row.learning_rate for (row,) in panel.lines.values()})
        for (row,) in panel.lines.values():
            style = _style(row)
            label = f"{row.label}  {row.test.log2.mean:.3f}"
            if choice.undecided:
                style["color"] = colormaps["viridis"](rates.index(row.learning_rate) / len(rates))
                label = f"{row.learning_rate:g}  {row.test.log2.mean:.3f}"
            _draw_line(area, list(row.test.accuracies), row.test.accuracies.values(), style, label)
        base = merged.base["test"]
        area.axhline(base, color="0.5", linewidth=1, label=f"base  {base:.3f}")
        ranks = sorted({rank for (row,) in panel.lines.values() for rank in row.test.accuracies})
        area.set_xscale("log", base=2)
        area.set_xticks(ranks, [str(rank) for rank in ranks])
        _finish(area, panel.title, "rank of the read-out", "accuracy, test split")
        _legend(area, "learning rate, AURAC (log2)" if choice.undecided else "AURAC (log2)")
    return figure


def draw_learning_rates(merged: MergedRuns, choice: Choice) -> Figure:
    """Draws AURAC (log2) over the learning rate: a line and a band per method and read-out.

    The figure shows the split on which learning rates are chosen, or the test split where that one was not measured.
    The chosen learning rate is ringed. A learning rate that could not be chosen, because it lacks seeds, is hollow.

    Args:
      merged: the runs whose rows are drawn.
      choice: the learning rates chosen among those rows.
    """
    split = "test" if any(choice.split not in row.measured for row in merged.rows) else choice.split
    panels = _panels(merged.rows, lambda row: row.label)
    figure, axes = _grid(merged.title, len(panels))
    for panel, area in zip(panels, axes, strict=True):
        for label, rows in panel.lines.items():
            style, rates = _style(rows[0]), [row.learning_rate for row in rows]
            values = [row.measured[split].log2 for row in rows]
            _draw_line(area, rates, values, style, label)
            for row, value in zip(rows, values, strict=True):
                if row in choice.chosen:
                    _mark(area, row.learning_rate, value.mean, s=130, facecolors="none", edgecolors=style["color"])
                if row in choice.left_out:
                    _mark(area, row.learning_rate, value.mean, s=22, facecolors="white", edgecolors=style["color"])
        rates = sorted({row.learning_rate for rows in panel.lines.values() for row in rows})
        area.set_xscale("log")
        named = are_apart(rates)
        if named:
            area.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=30, ha="right", rotation_mode="anchor")
        _finish(area, panel.title, "learning rate", f"AURAC (log2), {split} split", few_ticks=named)
        present = {row.group for rows in panel.lines.values() for row in rows}
        marks = {
            "chosen": ({"markersize": 11, "markerfacecolor": "none"}, choice.chosen),
            "seeds missing": ({"markersize": 5, "markerfacecolor": "white"}, choice.left_out),
        }
        _legend(
            area,
            "",
            [
                Line2D([], [], linestyle="", marker="o", markeredgecolor="0.3", label=name, **look)
                for name, (look, rows) in marks.items()
                if any(row.group in present for row in rows)
            ],
        )
    return figure


def _panels(rows: Iterable[CurveRow], line: Callable[[CurveRow], Any], by_row: bool = False) -> list[_Panel]:
    """Distributes rows over panels, and the rows of a panel over lines."""
    settings: dict[Setting, list[CurveRow]] = collections.defaultdict(list)
    for row in rows:
        settings[row.setting].append(row)
    crowded = any(len({line(row) for row in members}) > MOST_LINES for members in settings.values())
    part = (lambda row: row.label) if by_row else (lambda row: row.readout if crowded else "")
    found = []
    for setting, members in settings.items():
        for name in dict.fromkeys(map(part, members)):
            lines = collections.defaultdict(list)
            for row in members:
                if part(row) == name:
                    lines[line(row)].append(row)
            what = name if by_row else f"read-out {name}"
            found.append(_Panel(f"{what}, {setting}" if name else str(setting), dict(lines)))
    return found


def _grid(title: str, count: int) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, count)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * lines + 0.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for area in axes[count:]:
        area.remove()
    figure.suptitle(title)
    return figure, axes[:count]


def _style(row: CurveRow) -> dict[str, Any]:
    methods = [*METHODS, row.method]
    order = [*READOUTS, row.readout].index(row.readout)
    linestyle, marker = LINES[order % len(LINES)], MARKERS[order % len(MARKERS)]
    return {
        "color": PALETTE[methods.index(row.method) % len(PALETTE)],
        "linestyle": linestyle,
        "marker": marker,
        "markersize": 4,
    }


def are_apart(rates: list[float]) -> bool:
    gaps = np.diff(np.log(rates))
    return bool(np.all(gaps >= LEAST_GAP * gaps.sum()))


def _draw_line(area: Axes, x: list, spreads: Iterable[Spread], style: dict[str, Any], label: str) -> None:
    spreads = list(spreads)
    mean = np.array([spread.mean for spread in spreads])
    deviation = np.array([spread.deviation or 0.0 for spread in spreads])
    area.plot(x, mean, label=label, **style)
    if len(x) > 1:
        area.fill_between(x, mean - deviation, mean + deviation, color=style["color"], alpha=0.13, linewidth=0)
    else:
        area.errorbar(x, mean, deviation, color=style["color"], capsize=2, linewidth=1)


def _mark(area: Axes, x: float, y: float, **look: Any) -> None:
    area.scatter([x], [y], zorder=3, linewidths=1.4, **look)


def _finish(area: Axes, title: str, x: str, y: str, *, few_ticks: bool = True) -> None:
    area.set_title(title, fontsize=10)
    if few_ticks:
        area.minorticks_off()
    area.set_xlabel(x)
    place = area.get_subplotspec()
    if place is None or place.is_first_col():
        area.set_ylabel(y)
    area.grid(alpha=0.25)


def _legend(area: Axes, title: str, more: Iterable[Line2D] = ()) -> None:
    handles, _ = area.get_legend_handles_labels()
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False}
    area.legend(handles=[*handles, *more], title=title, fontsize=8, title_fontsize=9, handlelength=3.2, **place)

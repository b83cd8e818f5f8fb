"""The figure of a run: accuracy over log2 rank, a line per row and a band over its seeds."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlora_jax.core import POLICIES
from mlora_jax.report.rows import CurveRow

# One colour per method in every figure (Okabe and Ito's palette, readable for the colour-blind), a line per read-out.
COLORS = dict(zip(POLICIES, ("#000000", "#0072B2", "#56B4E9", "#CC79A7", "#D55E00", "#E69F00", "#009E73"), strict=True))
LINES = {"prefix": "-", "squeeze": "--", "nested": "-.", "masked": ":"}
MARKERS = {"prefix": "o", "squeeze": "s", "nested": "^", "masked": "v"}


def draw_curves(path, title: str, base: float, rows: list[CurveRow]) -> None:
    """Draws one panel per setting.

    Args:
      path: of the PNG.
      title: above the panels.
      base: accuracy of the base model, a horizontal line.
      rows: the rows to draw.
    """
    settings = list(dict.fromkeys(row.setting for row in rows))
    figure = Figure(figsize=(6.4 * len(settings) + 2.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(1, len(settings), sharey=True))
    for panel, setting in zip(axes, settings, strict=True):
        _draw_panel(panel, setting, base, [row for row in rows if row.setting == setting])
    axes[0].set_ylabel("accuracy")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _draw_panel(panel, setting, base: float, rows: list[CurveRow]) -> None:
    for row in rows:
        ranks = list(row.accuracies)
        mean = np.array([row.accuracies[rank].mean for rank in ranks])
        spread = np.array([row.accuracies[rank].deviation or 0.0 for rank in ranks])
        color, label = COLORS[row.method], f"{row.label}  {row.log2.mean:.3f}"
        panel.plot(ranks, mean, LINES[row.readout], marker=MARKERS[row.readout], ms=4, color=color, label=label)
        panel.fill_between(ranks, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
    panel.axhline(base, color="0.5", linewidth=1, label=f"base  {base:.3f}")
    scaling, rank, weights = setting
    panel.set_title(f"R = {rank}, scaling {scaling}" + (f", weights {weights}" if weights else ""), fontsize=10)
    panel.set_xscale("log", base=2)
    ranks = sorted({rank for row in rows for rank in row.accuracies})
    panel.set_xticks(ranks, [str(rank) for rank in ranks])
    panel.minorticks_off()
    panel.set_xlabel("rank of the read-out")
    panel.grid(alpha=0.25)
    panel.legend(title="AURAC (log2)", fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)

"""The map of regimes: how far the methods are from LoRA trained at a rank by itself, over the base's own accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from mlora_jax.evaluate import Interval
from mlora_jax.report.figure import PALETTE
from mlora_jax.report.formats import Table, to_markdown
from mlora_jax.study.results import Cell, MeasuredRival, regret
from mlora_jax.study.rivals import Rival

# A squeeze that is free, the nested methods of LoRA's cost, and the paper's method with its own read-out.
MAPPED = (
    Rival("lora", "squeeze"),
    Rival("renest"),
    Rival("renest_30_rotated"),
    Rival("matryoshka"),
    Rival("matryoshka", "squeeze"),
)
PANEL = (5.2, 4.0)  # The size of a panel in inches.


class Regret(NamedTuple):
    """How far a rival is below LoRA trained at a rank by itself, in one cell.

    Attributes:
      cell: the cell.
      rival: the rival.
      rank: the rank.
      ceiling: the accuracy of LoRA trained at this rank by itself, the mean over its seeds.
      loss: the ceiling minus the rival's accuracy, with its paired 95 % interval over items and seeds.
      finished: whether all trials of both are finished.
    """

    cell: Cell
    rival: Rival
    rank: int
    ceiling: float
    loss: Interval
    finished: bool


def regrets(cells: Sequence[Cell]) -> list[Regret]:
    """Returns the regrets of the rivals of `MAPPED` at rank 1 and at rank R, where there are measurements of both.

    Args:
      cells: the cells of the study.
    """
    found = []
    for cell in cells:
        for rank in (1, cell.rank):
            ceiling = _ceiling(cell, rank)
            if ceiling is None:
                continue
            accuracy = float(ceiling.accuracies()[:, ceiling.ranks.index(rank)].mean())
            alone = _at(ceiling, rank)
            for rival in MAPPED:
                measured = cell.measured.get(rival)
                if measured is not None and set(measured.verdicts) & set(alone.verdicts):
                    finished = measured.complete and ceiling.complete
                    found.append(Regret(cell, rival, rank, accuracy, regret(measured, alone), finished))
    return found


def _ceiling(cell: Cell, rank: int) -> MeasuredRival | None:
    """Returns LoRA trained at a rank by itself; at rank R this is plain LoRA."""
    return cell.measured.get(Rival("lora") if rank == cell.rank else Rival("lora", rank=rank))


def _at(measured: MeasuredRival, rank: int) -> MeasuredRival:
    """Returns the measurements at one rank only, as those of a rival that is trained at this rank by itself."""
    at = measured.ranks.index(rank)
    verdicts = {seed: values[at : at + 1] for seed, values in measured.verdicts.items()}
    return MeasuredRival(
        measured.rival, measured.learning_rate, measured.at_edge, (rank,), verdicts, measured.cost, measured.complete
    )


def regime_table(found: Sequence[Regret]) -> str:
    """Returns the map as a table in Markdown: a row for each cell and rank, a column for each rival; "" if empty."""
    if not found:
        return ""
    rivals = [rival for rival in MAPPED if any(each.rival == rival for each in found)]
    rows = []
    for cell, rank in dict.fromkeys((each.cell.name, each.rank) for each in found):
        here = {each.rival: each for each in found if (each.cell.name, each.rank) == (cell, rank)}
        first = next(iter(here.values()))
        shown = [_shown(here[rival]) if rival in here else "" for rival in rivals]
        rows.append([cell, f"{first.cell.base:.3f}", str(rank), f"{first.ceiling:.3f}", *shown])
    header = ["cell", "base", "rank", "LoRA of this rank alone", *(rival.name for rival in rivals)]
    return (
        "### The map of regimes: accuracy below LoRA trained at the rank by itself, 95 % paired interval\n\n"
        f"{to_markdown(Table(header, rows))}\nIn brackets: not finished.\n"
    )


def _shown(found: Regret) -> str:
    loss = found.loss
    text = f"{loss.value:+.3f} ({loss.low:+.3f} to {loss.high:+.3f})"
    return text if found.finished else f"[{text}]"


def draw_regimes(found: Sequence[Regret]) -> Figure:
    """Draws the map: the loss of each rival over the base's accuracy, a panel for rank 1 and one for rank R.

    Hollow marks are not finished.

    Args:
      found: what `regrets` returns, at least one.
    """
    figure = Figure(figsize=(2 * PANEL[0], PANEL[1] + 0.6), layout="constrained")
    areas = figure.subplots(1, 2, sharey=True)
    titles = ("rank 1", "the largest rank R")
    for area, title, smallest in zip(areas, titles, (True, False), strict=True):
        here = [each for each in found if (each.rank == 1) == smallest]
        for number, (color, rival) in enumerate(zip(PALETTE[1:], MAPPED, strict=False)):
            label = rival.name
            for each in (each for each in here if each.rival == rival):
                x, y = each.cell.base + 0.004 * (number - len(MAPPED) // 2), each.loss.value
                spread = [[y - each.loss.low], [each.loss.high - y]]
                fill = color if each.finished else "white"
                area.errorbar(x, y, spread, color=color, marker="o", markerfacecolor=fill, markersize=5, linewidth=1)
            area.plot([], [], color=color, marker="o", linestyle="", label=label)
        for cell in {each.cell.name: each.cell for each in here}.values():
            area.annotate(
                cell.name, (cell.base, 0.0), (0, 4), textcoords="offset points", rotation=90, fontsize=7, color="0.4"
            )
        area.axhline(0.0, color="0.6", linewidth=1)
        area.set_title(title)
        area.set_xlim(0.0, 1.0)
        area.set_xlabel("accuracy of the base before training")
        area.grid(alpha=0.25)
    areas[0].set_ylabel("accuracy below LoRA of that rank alone")
    handles, labels = areas[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(MAPPED), frameon=False)
    return figure

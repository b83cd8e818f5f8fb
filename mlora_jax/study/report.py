"""The tables and the figure of the study."""

from __future__ import annotations

import csv
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TextIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlora_jax.config_type import ConfigDict
from mlora_jax.disk import write_aside
from mlora_jax.evaluate import Interval
from mlora_jax.report.figure import PALETTE
from mlora_jax.report.formats import Table, to_markdown
from mlora_jax.study.records import records_file
from mlora_jax.study.regimes import draw_regimes, regime_table, regrets
from mlora_jax.study.results import Cell, MeasuredRival, area_interval, difference, read_cell, regret
from mlora_jax.study.rivals import GROUPS, Rival

MARKDOWN, CSV, FIGURE, MAP = "study.md", "study.csv", "study.png", "regimes.png"
CHAMPIONS = Rival("renest"), Rival("renest_30_rotated")
PANEL = (4.4, 3.3)  # The size of a panel in inches.
_DRAWN = (*GROUPS["leading"], *GROUPS["dearer"])
_COMPARED = (*_DRAWN, *GROUPS["variants"])


def write_study(
    workdir: str | os.PathLike[str],
    configs: Mapping[str, ConfigDict],
    records: str | os.PathLike[str] | None = None,
) -> str:
    """Writes study.md, study.csv, study.png and regimes.png into the folder of the study.

    Args:
      workdir: the folder of the study, which holds a folder for each cell.
      configs: name of a cell -> its config.
      records: the folder of the cells' files of records; None: there is none.

    Returns:
      The text of study.md.
    """
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: None if records is None else records_file(records, name) for name in configs}
    cells = [read_cell(name, config, folder / name, files[name]) for name, config in configs.items()]
    begun = [cell for cell in cells if cell.measured]
    mapped = regrets(begun)
    parts = [regime_table(mapped), *(_cell_text(cell) for cell in begun)]
    parts += [
        *(_differences(begun, champion) for champion in CHAMPIONS),
        _pairs(begun),
        _regrets(begun),
        _rates(begun),
        _unfinished(cells),
    ]
    text = "\n".join(part for part in parts if part)
    with write_aside(folder / MARKDOWN) as aside:
        aside.write_text(text, encoding="utf-8")
    with write_aside(folder / CSV) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        _write_csv(file, begun)
    figures = {FIGURE: draw_study(begun)} if begun else {}
    figures |= {MAP: draw_regimes(mapped)} if mapped else {}
    for name, figure in figures.items():
        with write_aside(folder / name) as aside:
            FigureCanvasAgg(figure)
            figure.savefig(aside, format="png", dpi=150)
    return text


def _cell_text(cell: Cell) -> str:
    whole = [found for found in cell.measured.values() if found.rival.rank is None]
    ranks = whole[0].ranks if whole else ()
    header = ["", "cost", "rate", "seeds", *map(str, ranks), "AURAC log2", "95 %", "± seeds"]
    rows = []
    for found in whole:
        areas, area = found.areas(), area_interval(found)
        rows.append(
            [
                found.rival.name + ("" if found.complete else " (unfinished)"),
                f"{found.cost:.2f}",
                f"{found.learning_rate:g}{_edge(found)}",
                str(len(found.verdicts)),
                *(f"{accuracy:.3f}" for accuracy in found.accuracies().mean(axis=0)),
                f"{area.value:.3f}",
                f"{area.low:.3f} to {area.high:.3f}",
                f"{np.std(areas, ddof=1):.3f}" if len(areas) > 1 else "",
            ]
        )
    separate = cell.separate()
    if len(separate) > 1:
        accuracies = [
            f"{separate[r].accuracies().mean():.3f}{_edge(separate[r])}" if r in separate else "" for r in ranks
        ]
        seeds = min(len(found.verdicts) for found in separate.values())
        rows.append(["lora at each rank by itself", str(len(separate)), "", str(seeds), *accuracies, "", "", ""])
    text = f"### {cell.name}\n\nBase {cell.base:.3f}; {cell.items} test items.\n\n{to_markdown(Table(header, rows))}"
    return f"{text}\n{_EDGE}" if any("*" in value for row in rows for value in row) else text


_EDGE = "* at the edge of the learning rates that there are.\n"


def _edge(found: MeasuredRival) -> str:
    return "*" if found.at_edge else ""


def _differences(cells: Sequence[Cell], champion: Rival) -> str:
    """Returns the differences of one rival and every other rival in each cell."""
    rivals = [rival for rival in dict.fromkeys(r for cell in cells for r in cell.measured) if rival.rank is None]
    rows = []
    for rival in rivals:
        cells_of = [_against(cell, champion, rival) for cell in cells]
        if rival != champion and any(cells_of):
            rows.append([rival.name, *cells_of])
    if not rows:
        return ""
    header = [f"{champion.name} less ...", *(cell.name for cell in cells)]
    return (
        f"### {champion.name} less the others: AURAC (log2), 95 % paired interval\n\n{to_markdown(Table(header, rows))}"
    )


def _against(cell: Cell, first: Rival, second: Rival) -> str:
    found = _outcome(cell, first, second)
    return "" if found is None else _signed(found)


def _signed(found: Interval) -> str:
    text = f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def _outcome(cell: Cell, first: Rival, second: Rival) -> Interval | None:
    """Returns the difference of two rivals in a cell, or None if one of them is not finished."""
    one, other = cell.measured.get(first), cell.measured.get(second)
    if one is None or other is None or not (one.complete and other.complete):
        return None
    return difference(one, other)


def _pairs(cells: Sequence[Cell]) -> str:
    """Returns the wins, ties and losses over the cells for every pair of the compared rivals."""
    leading = [rival for rival in _COMPARED if any(rival in cell.measured for cell in cells)]
    counts = {}
    for first, second in itertools.permutations(leading, 2):
        found = [outcome for cell in cells if (outcome := _outcome(cell, first, second))]
        wins, losses = sum(x.low > 0 for x in found), sum(x.high < 0 for x in found)
        counts[first, second] = f"{wins}/{len(found) - wins - losses}/{losses}"
    if not counts:
        return ""
    rows = [[first.name, *(counts.get((first, second), "") for second in leading)] for first in leading]
    header = ["wins/ties/losses against", *(rival.name for rival in leading)]
    return f"### Pairs over the cells\n\n{to_markdown(Table(header, rows))}"


def _regrets(cells: Sequence[Cell]) -> str:
    """Returns by how much LoRA trained at each rank by itself exceeds the nested adapters."""
    rows, ranks = [], sorted({rank for cell in cells for rank in cell.separate()})
    for cell in cells:
        separate = cell.separate()
        for rival in _COMPARED:
            if rival in cell.measured:
                shown = [_regret(cell.measured[rival], separate.get(rank)) for rank in ranks]
                rows += [[cell.name, rival.name, *shown]] if any(shown) else []
    if not rows:
        return ""
    header = ["cell", "", *map(str, ranks)]
    return (
        "### Regret: LoRA trained at each rank by itself less the nested adapter, accuracy, 95 % paired interval\n\n"
        f"{to_markdown(Table(header, rows))}"
    )


def _regret(found: MeasuredRival, ceiling: MeasuredRival | None) -> str:
    if ceiling is None or not found.complete:
        return ""
    return _signed(regret(found, ceiling)) if ceiling.ranks[-1] in found.ranks else ""


def _rates(cells: Sequence[Cell]) -> str:
    rivals = [rival for rival in dict.fromkeys(r for cell in cells for r in cell.measured)]
    rows = [[rival.name, *(_rate(cell.measured.get(rival)) for cell in cells)] for rival in rivals]
    if not rows:
        return ""
    table = to_markdown(Table(["", *(cell.name for cell in cells)], rows))
    return f"### The best learning rate\n\n{table}\nIn brackets: not finished. {_EDGE}"


def _rate(found: MeasuredRival | None) -> str:
    if found is None:
        return ""
    rate = f"{found.learning_rate:g}{_edge(found)}"
    return rate if found.complete else f"({rate})"


def _unfinished(cells: Sequence[Cell]) -> str:
    lines = [
        f"- {cell.name}: {', '.join(rival.name for rival in cell.unfinished)}" for cell in cells if cell.unfinished
    ]
    return "### Unfinished\n\n" + "\n".join(lines) + "\n" if lines else ""


def _write_csv(file: TextIO, cells: Sequence[Cell]) -> None:
    writer = csv.writer(file)
    writer.writerow(("cell", "rival", "cost", "learning_rate", "seed", "rank", "accuracy", "items", "complete"))
    for cell in cells:
        for found in cell.measured.values():
            for seed, row in zip(found.verdicts, found.accuracies(), strict=True):
                for rank, accuracy in zip(found.ranks, row, strict=True):
                    values = (
                        found.cost,
                        found.learning_rate,
                        seed,
                        rank,
                        f"{accuracy:.6f}",
                        cell.items,
                        found.complete,
                    )
                    writer.writerow((cell.name, found.rival.name, *values))


def draw_study(cells: Sequence[Cell]) -> Figure:
    """Draws accuracy over rank for the finished leading and dearer rivals: a panel per cell, a band over seeds."""
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * lines + 0.9), layout="constrained")
    areas = figure.subplots(lines, columns, squeeze=False).ravel()
    for area in areas[len(cells) :]:
        area.set_axis_off()
    shown = {}
    for cell, area in zip(cells, areas, strict=False):
        for color, rival in zip(PALETTE, _DRAWN, strict=False):
            found = cell.measured.get(rival)
            if found is not None and found.complete:
                values = found.accuracies()
                (line,) = area.plot(found.ranks, values.mean(axis=0), color=color, marker="o", markersize=3.5)
                shown.setdefault(rival.name, line)
                if len(values) > 1:
                    spread = values.std(axis=0, ddof=1)
                    mean = values.mean(axis=0)
                    area.fill_between(found.ranks, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
        separate = cell.separate()
        if len(separate) > 1:
            ranks = sorted(separate)
            means = [separate[rank].accuracies().mean() for rank in ranks]
            (line,) = area.plot(ranks, means, color="0.35", linestyle=":", marker="x", markersize=5)
            shown.setdefault("lora at each rank by itself", line)
        shown.setdefault("base", area.axhline(cell.base, color="0.6", linewidth=1))
        area.set_xscale("log", base=2)
        ticks = sorted({rank for found in cell.measured.values() for rank in found.ranks})
        area.set_xticks(ticks, [str(rank) for rank in ticks])
        area.set_title(cell.name)
        area.set_xlabel("rank of the read-out")
        area.set_ylabel("accuracy, test split")
        area.grid(alpha=0.25)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(5, len(shown)), frameon=False)
    return figure

"""The report on choosing ranks: ranks.md, ranks.csv, and two figures, ranks.png and spectra.png."""

from __future__ import annotations

import csv
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from mlora_jax.disk import write_aside
from mlora_jax.report.figure import PALETTE, PANEL
from mlora_jax.report.formats import Table, to_markdown
from mlora_jax.report.spectrum import draw_spectra, spectrum_text


class IntervalEstimate(Protocol):
    """A value and the bounds of its confidence interval, low..high, such as `mlora_jax.evaluate.Interval`."""

    @property
    def low(self) -> float:
        """The lower bound."""
        ...

    @property
    def high(self) -> float:
        """The upper bound."""
        ...

    @property
    def value(self) -> float:
        """The value of the sample itself."""
        ...


class RankRow(NamedTuple):
    """A point of the rank-accuracy curve.

    Attributes:
      rank: the rank of every layer.
      parameters: the number of adapter parameters at this rank.
      chosen_on: accuracy in 0..1 on the items on which ranks are chosen.
      test: accuracy in 0..1 on the items on which results are reported.
    """

    rank: int
    parameters: int
    chosen_on: IntervalEstimate
    test: IntervalEstimate


class BudgetRow(NamedTuple):
    """The comparison of a uniform rank with ranks per layer that need no more parameters.

    Accuracies are in 0..1, on the items on which results are reported.

    Attributes:
      rank: the uniform rank.
      parameters: the number of adapter parameters at the uniform rank.
      uniform: the accuracy at the uniform rank.
      allocated_parameters: the number of adapter parameters at the ranks per layer.
      allocated: the accuracy at the ranks per layer.
      difference: the accuracy at the ranks per layer minus that at the uniform rank, paired over items.
      p_value: the p-value of McNemar's exact test.
      uniform_score: the search's score of the uniform rank.
      score: the search's score of the ranks per layer.
      evaluations: how many allocations the search evaluated.
      ranks: path of a module -> its rank in each layer.
    """

    rank: int
    parameters: int
    uniform: IntervalEstimate
    allocated_parameters: int
    allocated: IntervalEstimate
    difference: IntervalEstimate
    p_value: float
    uniform_score: float
    score: float
    evaluations: int
    ranks: dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class RankReport:
    """The contents of the report on the ranks of one adapter.

    Attributes:
      title: the task, the base model and the trial.
      readout: a key of `mlora_jax.core.READOUTS`.
      chosen_on: a description of the items on which ranks are chosen.
      reported_on: a description of the items on which results are reported.
      measure: the score that the search maximises, "likelihood" or "accuracy".
      base: the accuracy without an adapter, on the items on which results are reported.
      within: how far the accuracy of the smallest rank may be below the best one.
      smallest: the smallest rank whose accuracy is within that distance.
      aurac: the AURAC over log2 rank, on the items on which results are reported.
      rows: one row per rank of S.
      budgets: one row per budget of parameters.
      spectra: path of a module -> the singular values of its layers at the largest rank, [L, R].
    """

    title: str
    readout: str
    chosen_on: str
    reported_on: str
    measure: str
    base: float
    within: float
    smallest: int
    aurac: IntervalEstimate
    rows: list[RankRow]
    budgets: list[BudgetRow]
    spectra: dict[str, np.ndarray]


def write_ranks(report: RankReport, out: str | os.PathLike[str]) -> pathlib.Path:
    """Writes ranks.md, ranks.csv (full precision), ranks.png and spectra.png into a folder.

    Args:
      report: the report to write.
      out: the folder; it is made if it does not exist.

    Returns:
      The path of the Markdown file.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with write_aside(out / "ranks.csv") as aside, aside.open("w", newline="", encoding="utf-8") as file:
        records = _csv_rows(report)
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    with write_aside(out / "ranks.png") as aside:
        draw_ranks(report).savefig(aside, format="png")
    with write_aside(out / "spectra.png") as aside:
        draw_spectra(report.spectra, report.title).savefig(aside, format="png")
    with write_aside(out / "ranks.md") as aside:
        aside.write_text(_markdown(report), encoding="utf-8")
    return out / "ranks.md"


def draw_ranks(report: RankReport) -> Figure:
    """Draws the reported accuracy over adapter parameters: uniform ranks, ranks per layer, and the base."""
    figure = Figure(figsize=(PANEL[0], PANEL[1] + 0.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    area = figure.subplots()
    uniform = {row.parameters: (row.test, row.rank) for row in report.rows}
    uniform |= {row.parameters: (row.uniform, row.rank) for row in report.budgets}
    x = sorted(uniform)
    _draw(area, x, [uniform[at][0] for at in x], "uniform rank", color=PALETTE[0], marker="o", linestyle="-")
    found = sorted(report.budgets, key=lambda row: row.allocated_parameters)
    if found:
        at = [row.allocated_parameters for row in found]
        _draw(
            area, at, [row.allocated for row in found], "rank per layer", color=PALETTE[4], marker="s", linestyle="--"
        )
    area.axhline(report.base, color="0.5", linewidth=1, label="base")
    area.set_xscale("log", base=2)
    short = EngFormatter(sep="")
    area.set_xticks(x, [f"{short.format_eng(at)}\nr = {uniform[at][1]}" for at in x], fontsize=8)
    area.minorticks_off()
    area.set_xlabel("adapter parameters, and the uniform rank that has them")
    area.set_ylabel("accuracy, 95 % interval over items")
    area.set_title(f"read-out {report.readout}", fontsize=10)
    area.grid(alpha=0.25)
    area.legend(fontsize=8, loc="best")
    figure.suptitle(report.title, fontsize=11)
    return figure


def _draw(area: Axes, x: Sequence[int], estimates: Sequence[IntervalEstimate], label: str, **style: Any) -> None:
    values = np.array([estimate.value for estimate in estimates])
    ends = np.array([(estimate.low, estimate.high) for estimate in estimates]).T
    spread = np.maximum([values - ends[0], ends[1] - values], 0)
    area.errorbar(x, values, spread, label=label, markersize=4, capsize=2, elinewidth=1, **style)


def _markdown(report: RankReport) -> str:
    best = max(report.rows, key=lambda row: row.chosen_on.value)
    small = next(row for row in report.rows if row.rank == report.smallest)
    parts = [
        f"# {report.title}\n",
        f"Read-out {report.readout}. Ranks are chosen on {report.chosen_on}; accuracy is reported on "
        f"{report.reported_on}, where the base has {report.base:.3f}. In brackets: 95 % bootstrap intervals over "
        "items.\n",
        to_markdown(_curve_table(report)),
        f"AURAC (log2): {_cell(report.aurac)}.\n",
        f"**Smallest rank within {report.within:g} of the best: {small.rank}**. On the items chosen on it has "
        f"{small.chosen_on.value:.3f}, the best rank, {best.rank}, {best.chosen_on.value:.3f}; reported: "
        f"{small.test.value:.3f} and {best.test.value:.3f}.\n",
    ]
    if report.budgets:
        seen = {"likelihood": "mean log-likelihood of an answer token", "accuracy": "accuracy"}[report.measure]
        parts += [
            f"Ranks per layer, searched by the {seen} on the items chosen on, for no more adapter parameters than the "
            "uniform rank has. Difference: allocated less uniform on the same items; p: McNemar's exact test.\n",
            to_markdown(_budget_table(report)),
            *(f"{to_markdown(_ranks_table(row))}" for row in report.budgets),
        ]
    parts.append(spectrum_text(report.spectra, [row.rank for row in report.rows]))
    return "\n".join(parts)


def _curve_table(report: RankReport) -> Table:
    lines = [[str(row.rank), f"{row.parameters:,}", _cell(row.chosen_on), _cell(row.test)] for row in report.rows]
    return Table(["rank", "adapter parameters", "chosen on", "accuracy"], lines)


def _budget_table(report: RankReport) -> Table:
    header = ["uniform rank", "its parameters", "its accuracy", "allocated", "its accuracy", "difference", "p"]
    lines = [
        [
            str(row.rank),
            f"{row.parameters:,}",
            _cell(row.uniform),
            f"{row.allocated_parameters:,}",
            _cell(row.allocated),
            f"{row.difference.value:+.3f} [{row.difference.low:+.3f}, {row.difference.high:+.3f}]",
            f"{row.p_value:.2g}",
            f"{row.uniform_score:.4f}",
            f"{row.score:.4f}",
            str(row.evaluations),
        ]
        for row in report.budgets
    ]
    return Table([*header, f"uniform {report.measure}", f"allocated {report.measure}", "evaluations"], lines)


def _ranks_table(row: BudgetRow) -> Table:
    layers = max(map(len, row.ranks.values()))
    lines = [[path, *map(str, ranks), *[""] * (layers - len(ranks))] for path, ranks in row.ranks.items()]
    return Table([f"for uniform rank {row.rank}", *(f"layer {layer}" for layer in range(layers))], lines)


def _cell(estimate: IntervalEstimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _csv_rows(report: RankReport) -> list[dict[str, Any]]:
    """Returns a record per rank of S and two per budget; columns that do not apply to a record are empty."""
    shared = {"trial": report.title, "readout": report.readout}
    found = []
    for row in report.rows:
        numbers = {"kind": "curve", "rank": row.rank, "parameters": row.parameters, **_numbers(row.test)}
        chosen = {f"chosen_on_{name}": value for name, value in _numbers(row.chosen_on).items()}
        found.append({**shared, **numbers, **chosen, "smallest": int(row.rank == report.smallest)})
    for row in report.budgets:
        uniform = {"kind": "uniform", "parameters": row.parameters, "score": row.uniform_score, **_numbers(row.uniform)}
        allocated = {
            "kind": "allocated",
            "parameters": row.allocated_parameters,
            **_numbers(row.allocated),
            **{f"difference_{name}": value for name, value in _numbers(row.difference).items()},
            "p_value": row.p_value,
            "score": row.score,
            "evaluations": row.evaluations,
            "ranks": "; ".join(f"{path}: {' '.join(map(str, ranks))}" for path, ranks in row.ranks.items()),
        }
        found += [{**shared, "rank": row.rank, **each} for each in (uniform, allocated)]
    names = dict.fromkeys(name for record in found for name in record)
    return [{name: record.get(name, "") for name in names} for record in found]


def _numbers(estimate: IntervalEstimate) -> dict[str, float]:
    return {"accuracy": estimate.value, "low": estimate.low, "high": estimate.high}

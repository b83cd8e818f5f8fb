"""The table of a run, as Markdown and CSV."""

from __future__ import annotations

import csv
import json
import pathlib

from mlora_jax.report.figure import draw_curves
from mlora_jax.report.rows import CurveRow, RunRecords, Spread, best_rows, read_rows


def write_report(workdir) -> None:
    """Writes table.md, table.csv and curves.png from the records in a run's folder.

    table.md shows every method at its best learning rate, and below it, if there are several, all of them; table.csv
    has all rows with full precision.
    """
    workdir = pathlib.Path(workdir)
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    records = read_rows(workdir)
    base, rows, best = records.base, records.rows, best_rows(records.rows)
    title = f"{config['data']['task']} on {pathlib.PurePath(config['model']['path']).name}"
    (workdir / "table.md").write_text(_markdown(title, records, best), encoding="utf-8")
    with (workdir / "table.csv").open("w", newline="", encoding="utf-8") as file:
        _write_csv(csv.writer(file), base, rows, best)
    if best:
        draw_curves(workdir / "curves.png", title, base, best)


def _markdown(title: str, records: RunRecords, best: list[CurveRow]) -> str:
    base, rows = records.base, records.rows
    parts = [f"# {title}\n"]
    if records.failed:
        parts.append(f"Failed, the loss is not finite: {', '.join(records.failed)}.\n")
    if not rows:
        parts.append(f"No trial finished. Accuracy of the base: {base:.3f}.\n")
    for setting in dict.fromkeys(row.setting for row in rows):
        ours = [row for row in rows if row.setting == setting]
        chosen = [row for row in best if row.setting == setting]
        several = len({row.learning_rate for row in ours}) > 1
        parts.append(_caption(setting, ours, several))
        parts.append(_table(base, chosen))
        if several:
            parts.append("Every learning rate:\n")
            parts.append(_table(base, ours))
    return "\n".join(parts)


def _caption(setting, rows: list[CurveRow], several: bool) -> str:
    scaling, rank, weights = setting
    seeds = sorted({seed for row in rows for seed in row.seeds})
    text = f"R = {rank}, scaling {scaling}" + (f", weights {weights}" if weights else "")
    text += f". Accuracy on the test split; seeds {', '.join(map(str, seeds))}"
    text += "; mean ± standard deviation over seeds." if len(seeds) > 1 else "."
    if several:
        text += " Each row is at the learning rate with its highest AURAC (log2) on this same test split."
    return text + "\n"


def _table(base: float, rows: list[CurveRow]) -> str:
    ranks = list(rows[0].accuracies)
    header = ["method", "learning rate", "base", *map(str, ranks), "AURAC linear", "AURAC log2", "mean"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in rows:
        values = [*(row.accuracies[rank] for rank in ranks), row.linear, row.log2, row.mean]
        lines.append([row.label, f"{row.learning_rate:g}", f"{base:.3f}", *map(_cell, values)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(spread: Spread) -> str:
    return f"{spread.mean:.3f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.3f}")


def _write_csv(writer, base: float, rows: list[CurveRow], best: list[CurveRow]) -> None:
    ranks = sorted({rank for row in rows for rank in row.accuracies})
    measures = [*(f"rank_{rank}" for rank in ranks), "aurac_linear", "aurac_log2", "mean"]
    names = [f"{measure}{part}" for measure in measures for part in ("", "_std")]
    head = ["method", "readout", "scaling", "rank", "weights", "learning_rate", "best", "seeds", "base"]
    writer.writerow([*head, *names])
    for row in rows:
        spreads = [*(row.accuracies.get(rank) for rank in ranks), row.linear, row.log2, row.mean]
        cells = [
            x
            for s in spreads
            for x in (("", "") if s is None else (s.mean, "" if s.deviation is None else s.deviation))
        ]
        scaling, rank, weights = row.setting
        weights, seeds = (" ".join(map(str, values)) for values in (weights, row.seeds))
        writer.writerow(
            [row.method, row.readout, scaling, rank, weights, row.learning_rate, int(row in best), seeds, base, *cells]
        )

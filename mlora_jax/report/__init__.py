"""Tables and figures from the records of one run or many."""

from mlora_jax.report.choice import Choice, Difference, choose_rows, compare
from mlora_jax.report.figure import draw_curves, draw_learning_rates
from mlora_jax.report.folders import SPLITS, RunRecords
from mlora_jax.report.rows import CurveRow, MergedRuns, Setting, Spread, read_runs
from mlora_jax.report.table import write_report, write_tables

__all__ = [
    "SPLITS",
    "Choice",
    "CurveRow",
    "Difference",
    "MergedRuns",
    "RunRecords",
    "Setting",
    "Spread",
    "choose_rows",
    "compare",
    "draw_curves",
    "draw_learning_rates",
    "read_runs",
    "write_report",
    "write_tables",
]

"""Tables and figures from a run's records."""

from mlora_jax.report.figure import draw_curves
from mlora_jax.report.rows import CurveRow, RunRecords, best_rows, read_rows
from mlora_jax.report.table import write_report

__all__ = ["CurveRow", "RunRecords", "best_rows", "draw_curves", "read_rows", "write_report"]

"""Tables with a line per method and a column per scaling, the layout of the paper."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mlora_jax.report.formats import Cell, Table
from mlora_jax.report.rows import CurveRow, Setting


class Summary(NamedTuple):
    """A table with a line per method and a column per scaling, and its caption."""

    caption: str
    table: Table


def summarize_scalings(rows: Iterable[CurveRow], base: float) -> list[Summary]:
    """Returns tables of AURAC (log2) on the test split, a line per method and read-out, a column per scaling.

    Args:
      rows: one row per setting, method and read-out, in the order of the table.
      base: the accuracy of the model without an adapter.

    Returns:
      One table for each setting that has several scalings.
    """
    kinds: dict[Setting, dict[str, dict[str, CurveRow]]] = {}
    for row in rows:
        lines = kinds.setdefault(row.setting.without("scaling"), {})
        lines.setdefault(row.label, {})[row.setting.values["scaling"]] = row
    found = []
    for kind, lines in kinds.items():
        scalings = list(dict.fromkeys(scaling for by_scaling in lines.values() for scaling in by_scaling))
        if len(scalings) < 2:
            continue
        caption = (
            f"{kind}, ranks {', '.join(map(str, kind.ranks))}. AURAC (log2) on the test split by scaling, each "
            f"at the learning rate that stands for it in the tables of the scalings; the base has {base:.3f}."
        )
        found.append(Summary(caption, Table(["method", *scalings], _lines(lines, scalings))))
    return found


def _lines(lines: dict[str, dict[str, CurveRow]], scalings: list[str]) -> list[list[Cell]]:
    return [
        [label, *(by_scaling[scaling].test.log2 if scaling in by_scaling else "" for scaling in scalings)]
        for label, by_scaling in lines.items()
    ]

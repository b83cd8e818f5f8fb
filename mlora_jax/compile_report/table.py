"""The compile report as text: one row in full, or many rows as Markdown tables."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from mlora_jax.compile_report.records import Record, too_large
from mlora_jax.compile_report.report import LARGEST, Result
from mlora_jax.parallel.chips import GIB

TRAIN_COLUMNS = (
    *("slice", "model", "R", "batch", "mesh", "micro-batches x rows a chip", "trials"),
    *("base", "adapter, optimizer", "activations", "peak of limit, GiB", "TFLOP a step", "HBM GB a step"),
    *("moved GB a step", "step, s", "bound"),
)
GENERATE_COLUMNS = (
    *("slice", "model", "R", "mesh", "prompts at once"),
    *("prefill: peak GiB", "TFLOP", "s", "bound"),
    *("decode: peak GiB", "GFLOP a token", "ms a token", "bound", "tokens/s of all chips"),
)


def describe(result: Result) -> str:
    """Returns everything about one row as text for a terminal, with numbers per chip.

    Args:
      result: the result of the row.
    """
    row, layout = result.row, result.layout
    axes = " x ".join(f"{axis} {size}" for axis, size in layout.sizes.items())
    chosen = " (chosen: the config leaves the axes open)" if layout.chosen else ""
    lines = [
        f"{row.model}, R = {row.rank}, on {row.topology}: {result.chips} chips, mesh {axes}{chosen}",
        f"train: batch {layout.batch}{' (the largest that fits at one time)' if row.batch == LARGEST else ''} in "
        f"{layout.accumulation} micro-batches of {layout.rows} rows a chip; trials side by side: {layout.trials}",
    ]
    if set(result.records) - {"train"}:
        lines.append(f"prefill and decode: {result.requests} prompts at once; decode is per token of each")
    for name, record in result.records.items():
        lines += ["", f"{name}, per chip", *_details(result, record)]
    return "\n".join(lines)


def _details(result: Result, record: Record) -> list[str]:
    layout = result.layout
    lines = [f"  parameters {_gib(record.parameters)} GiB, adapter and optimizer {_gib(record.optimizer)} GiB, "
             f"activations {_gib(record.activations)} GiB",
             f"  peak {_gib(record.needed)} of {_gib(record.limit)} GiB"]  # fmt: skip
    if not record.fits:
        sizes = dict(row_shards=layout.row_shards, rows=layout.rows, micro_batches=layout.accumulation)
        return [*lines, f"  {too_large(record, **sizes)}"]
    lines.append(f"  {_scaled(record.flops, 1e12, 4)} TFLOP, HBM {_scaled(record.main_bytes, 1e9, 4)} GB")
    for kind, group, count, moved in record.collectives:
        lines.append(f"  {kind} over {group} chips: {count:g} times, {moved / 1e6:.4g} MB moved")
    times = ", ".join(f"{name} {seconds * 1e3:.4g} ms" for name, seconds in record.seconds.items())
    lines.append(f"  at least {record.step_seconds * 1e3:.4g} ms, bound by {record.bound} ({times})")
    return [*lines, *(f"  {note}" for note in record.notes)]


def markdown(results: Iterable[Result]) -> str:
    """Returns two Markdown tables, one for training and one for prefill and decode.

    Args:
      results: the results of the rows.
    """
    results = list(results)
    training = [_train_cells(result) for result in results if "train" in result.records]
    seen, generation = set(), []
    for result in results:
        key = result.row.model, result.row.topology, result.row.rank, tuple(result.layout.sizes.items())
        if "prefill" in result.records and "decode" in result.records and key not in seen:
            seen.add(key)
            generation.append(_generation_cells(result))
    parts = [("Training", TRAIN_COLUMNS, training), ("Prefill and decode", GENERATE_COLUMNS, generation)]
    return "\n\n".join(f"## {title}\n\n{_table(columns, rows)}" for title, columns, rows in parts if rows)


def write_tables(path: str | pathlib.Path, tables: str) -> None:
    """Writes tables into a file, where they replace everything from the first second-level heading on.

    Args:
      path: the file; it is made if it does not exist.
      tables: the text of the tables.
    """
    path = pathlib.Path(path)
    text = path.read_text(encoding="utf-8") if path.is_file() else "# Compile report\n\n"
    kept = text.partition("\n## ")[0].rstrip()
    path.write_text(f"{kept}\n\n{tables}\n", encoding="utf-8")


def _table(columns: Iterable[str], rows: Iterable[list[str]]) -> str:
    lines = [list(columns), ["---"] * len(list(columns)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _train_cells(result: Result) -> list[str]:
    row, layout, record = result.row, result.layout, result.records["train"]
    shown = f"{layout.batch} (largest)" if row.batch == LARGEST else str(layout.batch)
    cells = [row.topology, _short(row.model), str(row.rank), shown, _mesh(layout.sizes)]
    cells += [f"{layout.accumulation} x {layout.rows}", str(layout.trials)]
    cells += [_gib(part) for part in (record.parameters, record.optimizer, record.activations)]
    cells.append(f"{_gib(record.needed)} of {_gib(record.limit)}")
    if not record.fits:
        sizes = dict(row_shards=layout.row_shards, rows=layout.rows, micro_batches=layout.accumulation)
        return [*cells, too_large(record, **sizes), *[""] * 4]
    cells += [_scaled(record.flops, 1e12, 3), _scaled(record.main_bytes, 1e9, 3), _moved(record)]
    return [*cells, f"{record.step_seconds:.3g}", record.bound]


def _generation_cells(result: Result) -> list[str]:
    row, prefill, decode = result.row, result.records["prefill"], result.records["decode"]
    cells = [row.topology, _short(row.model), str(row.rank), _mesh(result.layout.sizes), str(result.requests)]
    for record, scale, unit in ((prefill, 1e12, 1.0), (decode, 1e9, 1e3)):
        cells.append(_gib(record.needed) if record.fits else f"{_gib(record.needed)}: too much")
        cells += (
            [_scaled(record.flops, scale, 3), f"{record.step_seconds * unit:.3g}", record.bound]
            if record.fits
            else [""] * 3
        )
    speed = f"{result.requests / decode.step_seconds:,.0f}" if decode.fits else ""
    return [*cells, speed]


def _moved(record: Record) -> str:
    by_kind: dict[str, float] = {}
    for kind, _, _, moved in record.collectives:
        by_kind[kind] = by_kind.get(kind, 0.0) + moved
    return ", ".join(f"{kind} {moved / 1e9:.3g}" for kind, moved in by_kind.items() if moved >= 5e5) or "0"


def _mesh(sizes) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"


def _short(model: str) -> str:
    return model.rpartition("/")[2]


def _scaled(count: float | None, unit: float, digits: int) -> str:
    """Returns a count in multiples of a unit, or nothing where nothing was counted."""
    return "" if count is None else f"{count / unit:.{digits}g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"

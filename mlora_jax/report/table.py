"""The report of one run or many: table.md, table.csv, table.tex, the differences between rows, and the figures."""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlora_jax.disk import write_aside
from mlora_jax.report.captions import (
    describe_choice,
    describe_differences,
    describe_runs,
    describe_setting,
    name_runs,
)
from mlora_jax.report.choice import Choice, choose_rows, compare
from mlora_jax.report.figure import draw_curves, draw_learning_rates
from mlora_jax.report.folders import SPLITS
from mlora_jax.report.formats import Table, to_latex, to_markdown
from mlora_jax.report.rows import CurveRow, MergedRuns, Setting, Spread, read_runs
from mlora_jax.report.summary import Summary, summarize_scalings


def write_report(workdir: str | os.PathLike[str]) -> None:
    """Writes the report of one run into its folder, as the run's config says.

    The files are table.md, table.csv (all learning rates, both splits, full precision) and table.tex; curves.png if a
    trial has finished; differences.csv and differences.tex if there are rows to compare; and learning_rates.png if a
    row has several learning rates. The names of the files for a further task end in "-TASK-SHOTS".

    `config.report.choose_on` names the split on which learning rates are chosen. Where that split was not measured,
    every learning rate is listed and the caption says that none is chosen, so that a finished run always gets a report.

    Args:
      workdir: the folder of a run.

    Raises:
      FileNotFoundError: there are no records.
      ValueError: records are unreadable.
    """
    for number, merged in enumerate(read_runs([workdir])):
        choice = choose_rows(merged.rows, _configured_split(merged))
        _write(merged, choice, pathlib.Path(workdir), f"-{_file_name(merged.task)}" if number else "")


def write_tables(
    folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], choose_on: str | None = None
) -> list[pathlib.Path]:
    """Writes one report for many runs, or one for each pair of task and base model if there are several pairs.

    Args:
      folders: the folders of the runs.
      out: the folder for the files that `write_report` describes. With several pairs their names end in "-TASK-MODEL",
        and in "-TASK-MODEL-NUMBER" where different models or data have the same name.
      choose_on: the split on which learning rates are chosen, "validation" or "test". None takes the split that the
        runs' configs name, and "validation" where they do not agree.

    Returns:
      The paths of the Markdown files.

    Raises:
      FileNotFoundError: a folder does not hold a run.
      ValueError: records are unreadable; two folders hold the same trial; or a row has several learning rates that were
        not measured on the split to choose on.
    """
    if choose_on is not None and choose_on not in SPLITS:
        raise ValueError(f"choose_on must be one of {', '.join(SPLITS)}, got {choose_on!r}")
    everything = read_runs(folders)
    choices = [choose_rows(each.rows, choose_on or _configured_split(each)) for each in everything]
    for merged, choice in zip(everything, choices, strict=True):
        if choice.undecided:
            labels = ", ".join(dict.fromkeys(row.label for row in choice.undecided))
            raise ValueError(
                f"{merged.title}: no learning rate can be chosen on the {choice.split} split for {labels}: it was "
                "not measured; hold validation rows out when training, or choose on the test split as the reference "
                "does, by --choose_on test"
            )
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for merged, choice in zip(everything, choices, strict=True):
        number = f"-{merged.number}" if merged.number else ""
        suffix = f"-{_file_name(merged.task)}-{merged.base_model}{number}" if len(everything) > 1 else ""
        written.append(_write(merged, choice, out, suffix))
    return written


def _file_name(task: str) -> str:
    """Returns a task's part of a file name: "arc_challenge, 25 shots" becomes "arc_challenge-25"."""
    name, _, shots = task.partition(", ")
    return f"{name}-{shots.split()[0]}" if shots else name


def _configured_split(merged: MergedRuns) -> str:
    found = {folder.config.get("report", {}).get("choose_on", "validation") for folder in merged.folders}
    return found.pop() if len(found) == 1 else "validation"


def _write(merged: MergedRuns, choice: Choice, out: pathlib.Path, suffix: str) -> pathlib.Path:
    captions = {setting: describe_setting(setting, merged, choice) for setting in _settings(merged.rows)}
    notes = describe_runs(merged)
    comparable = _comparable(choice)
    texts = {
        "table.md": _markdown(merged, choice, notes, captions, comparable),
        "table.tex": _latex(merged, choice, notes, captions),
    }
    if comparable:
        texts["differences.tex"] = _latex_differences(merged, choice, comparable)
    records = {"table.csv": _csv_rows(merged, choice), "differences.csv": _csv_differences(comparable)}
    figures = {"curves.png": bool(choice.shown), "learning_rates.png": bool(choice.chosen or choice.undecided)}
    # An earlier report may have left a file that this one does not write.
    for name in ("differences.tex", *records, *figures):
        _path(out, name, suffix).unlink(missing_ok=True)
    for name, text in texts.items():
        with write_aside(_path(out, name, suffix)) as aside:
            aside.write_text(text, encoding="utf-8")
    for name, rows in records.items():
        if rows:
            path = _path(out, name, suffix)
            with write_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="")
                writer.writeheader()
                writer.writerows(rows)
    if figures["curves.png"]:
        with write_aside(_path(out, "curves.png", suffix)) as aside:
            draw_curves(merged, choice).savefig(aside, format="png")
    if figures["learning_rates.png"]:
        with write_aside(_path(out, "learning_rates.png", suffix)) as aside:
            draw_learning_rates(merged, choice).savefig(aside, format="png")
    return _path(out, "table.md", suffix)


def _path(out: pathlib.Path, name: str, suffix: str) -> pathlib.Path:
    path = out / name
    return path.with_name(f"{path.stem}{suffix}{path.suffix}")


def _settings(rows: Iterable[CurveRow]) -> list[Setting]:
    return list(dict.fromkeys(row.setting for row in rows))


def _comparable(choice: Choice) -> dict[Setting, list[CurveRow]]:
    """Returns setting -> its rows but the undecided ones, for settings in which two or more rows have a spread."""
    rows = [row for row in choice.shown if row not in choice.undecided]
    found = {setting: [row for row in rows if row.setting == setting] for setting in _settings(rows)}
    spread = {setting: [row for row in rows if row.test.log2.deviation is not None] for setting, rows in found.items()}
    return {setting: members for setting, members in found.items() if len(spread[setting]) > 1}


def _markdown(
    merged: MergedRuns,
    choice: Choice,
    notes: Sequence[str],
    captions: Mapping[Setting, str],
    comparable: Mapping[Setting, list[CurveRow]],
) -> str:
    runs = [name_runs(merged)] if len(merged.folders) > 1 or merged.number else []
    parts = [f"# {merged.title}\n", *(f"{note}\n" for note in (*runs, *notes))]
    base = merged.base["test"]
    for summary in scaling_summaries(merged, choice):
        parts += [f"{summary.caption}\n", to_markdown(summary.table)]
    for setting, caption in captions.items():
        shown = [row for row in choice.shown if row.setting == setting]
        parts += [f"{caption}\n", to_markdown(_curve_table(base, shown, setting.ranks))]
        if setting in comparable:
            rows = comparable[setting]
            parts += [f"{describe_differences(rows)}\n", to_markdown(_difference_table(rows))]
        every = [row for row in merged.rows if row.setting == setting]
        if len(every) > len(shown):
            extra = choice.split if choice.split != "test" else ""
            parts += ["Every learning rate:\n", to_markdown(_curve_table(base, every, setting.ranks, extra))]
    return "\n".join(parts)


def scaling_summaries(merged: MergedRuns, choice: Choice) -> list[Summary]:
    """Returns the tables by scaling of the shown rows without the undecided ones."""
    return summarize_scalings([row for row in choice.shown if row not in choice.undecided], merged.base["test"])


def _curve_table(base: float, rows: list[CurveRow], ranks: Sequence[int], extra: str = "") -> Table:
    """Returns a table of rows of one setting; `extra` names a split whose AURAC fills one more column."""
    header = ["method", "learning rate", "base", *map(str, ranks), "AURAC linear", "AURAC log2", "mean"]
    lines = []
    for row in rows:
        values = [*(row.test.accuracies.get(rank, "") for rank in ranks), row.test.linear, row.test.log2, row.test.mean]
        if extra:
            values.append(row.measured[extra].log2 if extra in row.measured else "")
        lines.append([row.label, f"{row.learning_rate:g}", f"{base:.3f}", *values])
    return Table([*header, f"AURAC log2, {extra}"] if extra else header, lines)


def _difference_table(rows: list[CurveRow]) -> Table:
    header = ["", *(str(number) for number in range(1, len(rows) + 1))]
    lines = []
    for number, first in enumerate(rows, start=1):
        cells = ["" if first is second else compare(first, second) for second in rows]
        lines.append([f"{number} {first.label}", *cells])
    return Table(header, lines)


def _latex(merged: MergedRuns, choice: Choice, notes: Sequence[str], captions: Mapping[Setting, str]) -> str:
    if not choice.shown:
        return _latex_file(merged, [f"% {note}\n" for note in notes])
    tables = [
        to_latex(summary.table, f"{merged.title}, {summary.caption}") for summary in scaling_summaries(merged, choice)
    ]
    for setting, caption in captions.items():
        shown = [row for row in choice.shown if row.setting == setting]
        table = _curve_table(merged.base["test"], shown, setting.ranks)
        tables.append(to_latex(table, " ".join([f"{merged.title}, {caption}", *notes])))
    return _latex_file(merged, tables)


def _latex_differences(merged: MergedRuns, choice: Choice, comparable: dict[Setting, list[CurveRow]]) -> str:
    tables = []
    for setting, rows in comparable.items():
        sentences = [f"{merged.title}, {setting}.", describe_differences(rows)]
        if any(row in choice.chosen for row in rows):
            sentences.append(describe_choice(choice))
        tables.append(to_latex(_difference_table(rows), " ".join(sentences)))
    return _latex_file(merged, tables)


def _latex_file(merged: MergedRuns, tables: Sequence[str]) -> str:
    several = len(merged.folders) > 1
    comments = merged.title, *([name_runs(merged)] if several else []), r"Needs \usepackage{booktabs,graphicx}."
    return "\n".join(["".join(f"% {comment}\n" for comment in comments), *tables])


def _csv_rows(merged: MergedRuns, choice: Choice) -> list[dict[str, Any]]:
    """Returns a record per row; `best` is empty where no learning rate could be chosen."""
    several = {row.group for row in choice.chosen}
    ranks = sorted({rank for row in merged.rows for rank in row.setting.ranks})
    splits = [split for split in ("test", "validation") if any(split in row.measured for row in merged.rows)]
    found = []
    for row in merged.rows:
        record = {
            **_names(row),
            "best": "" if row in choice.undecided else int(row in choice.shown),
            "chosen_on": choice.split if row.group in several else "",
            "failed_seeds": " ".join(map(str, row.failed)),
        }
        for split in splits:
            prefix, measured = "" if split == "test" else f"{split}_", row.measured.get(split)
            record[f"{prefix}base"] = merged.base.get(split, "")
            for rank in ranks:
                record |= _numbers(f"{prefix}rank_{rank}", measured.accuracies.get(rank) if measured else None)
            for name, area in (("aurac_linear", "linear"), ("aurac_log2", "log2"), ("mean", "mean")):
                record |= _numbers(f"{prefix}{name}", getattr(measured, area) if measured else None)
        found.append(record)
    return found


def _csv_differences(comparable: dict[Setting, list[CurveRow]]) -> list[dict[str, Any]]:
    """Returns a record per pair of rows of the same setting; `clear` is empty where a row has no spread."""
    found = []
    for rows in comparable.values():
        for index, first in enumerate(rows):
            for second in rows[index + 1 :]:
                difference = compare(first, second)
                sides = {"first": first, "second": second}
                found.append(
                    {
                        **{f"{side}_{key}": value for side, row in sides.items() for key, value in _names(row).items()},
                        **_numbers("first_aurac_log2", first.test.log2),
                        **_numbers("second_aurac_log2", second.test.log2),
                        "difference": difference.value,
                        "clear": "" if difference.clear is None else int(difference.clear),
                    }
                )
    return found


def _names(row: CurveRow) -> dict[str, Any]:
    return {
        "method": row.method,
        "readout": row.readout,
        **{axis: _cell(value) for axis, value in row.setting.axes},
        "learning_rate": row.learning_rate,
        "seeds": " ".join(map(str, row.seeds)),
    }


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _numbers(name: str, spread: Spread | None) -> dict[str, Any]:
    if spread is None:
        return {name: "", f"{name}_std": ""}
    return {name: spread.mean, f"{name}_std": "" if spread.deviation is None else spread.deviation}

"""Studies nested methods: `python -m experiments.study --workdir DIR --models MODELS --data DATA [--hours H]`.

A cell is the study on one task and model, with a config of its own (configs/study_*.py). MODELS holds the models'
folders and DATA those of the raw data, under the names that the configs give them. A signal or the end of its hours
stops the study, and the same command continues it. With `--records FOLDER` it also continues on another machine, which
has the records but not DIR. The group `study` of a cell's config says what is trained;
docs/config.md lists its keys. Every cell has a folder of its name in DIR. Whenever the command ends, it writes tables
and figures of all results so far.
"""

import math
import os
import pathlib
import signal
import sys
import threading
import time

from absl import app, flags, logging

from mlora_jax.cli.config_flags import SHIPPED, WORKDIR, read_cell
from mlora_jax.cli.number_flags import define_float

CELLS = flags.DEFINE_list("cells", [], "Cells, such as trec_656k of configs/study_trec_656k.py; by default all.")
MODELS = flags.DEFINE_string("models", "", "Folder that holds the models' folders.")
DATA = flags.DEFINE_string("data", "", "Folder that holds the raw data's folders; by default they are downloaded.")
HOURS = define_float("hours", 0.0, "Saves everything and stops after this many hours; 0 sets no limit.")
RECORDS = flags.DEFINE_string(
    "records",
    "",
    "Folder with a file of records for each cell. What it holds is not trained again, and every finished trial is "
    "appended to it.",
)
TRAIN = flags.DEFINE_bool("train", True, "Trains what is missing; --notrain only writes the tables and figures.")


def main() -> None:
    """Parses the command line, trains what is missing and writes the report.

    Bad input ends the command with a message of one line.
    """
    flags.mark_flag_as_required("workdir")
    try:
        app.run(lambda arguments: _study(arguments[1:]))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def _study(left: list[str]) -> None:
    if left:
        raise ValueError(f"what is {' '.join(left)!r}? Options begin with --")
    logging.set_verbosity(logging.WARNING)
    from mlora_jax.study.records import records_file
    from mlora_jax.study.report import write_study

    workdir, known = pathlib.Path(str(WORKDIR.value)), _known_cells()
    for name in CELLS.value:
        if name not in known:
            raise ValueError(f"there is no cell {name!r}; cells: {', '.join(known)}")
    asked = {name: known[name] for name in CELLS.value or known}
    # Training handles signals itself. Between two trainings, this handler makes a signal end the command with a report.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        if TRAIN.value:
            _train(asked, workdir)
    finally:
        there = {
            name: config
            for name, config in known.items()
            if name in asked
            or (workdir / name).is_dir()
            or (RECORDS.value and records_file(RECORDS.value, name).is_file())
        }
        print(write_study(workdir, there, RECORDS.value or None))


def _train(cells: dict, workdir: pathlib.Path) -> None:
    """Trains the first group of all cells, then the second one, until nothing is missing or the time is over."""
    from mlora_jax.run.program import code_origin
    from mlora_jax.study.queue import run_cell
    from mlora_jax.study.records import records_file

    origin: dict[str, str] = dict(zip(("version", "revision"), code_origin(), strict=True))
    end = time.monotonic() + HOURS.value * 3600 if HOURS.value else math.inf

    def leave_if_late():
        if time.monotonic() >= end:
            raise SystemExit(128 + signal.SIGTERM)

    timer = threading.Timer(HOURS.value * 3600, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    if HOURS.value:
        timer.start()
    try:
        for stage in range(max(len(config.study.groups) for config in cells.values())):
            for name, config in cells.items():
                run_cell(
                    config,
                    workdir / name,
                    groups=config.study.groups[: stage + 1],
                    before_each=leave_if_late,
                    records=records_file(RECORDS.value, name) if RECORDS.value else None,
                    origin=origin,
                )
    finally:
        timer.cancel()  # its signal would also interrupt the report


def _known_cells() -> dict:
    """Returns a dictionary: the name of every cell -> its config, with the paths of its model and data."""
    cells = {}
    for file in sorted(SHIPPED.glob("study_*.py")):
        config = read_cell(file.stem)
        with config.unlocked():
            if config.model.path != "quickstart":
                config.model.path = str(pathlib.Path(MODELS.value) / config.model.path)
            if config.data.raw_dir:
                config.data.raw_dir = str(pathlib.Path(DATA.value) / config.data.raw_dir) if DATA.value else ""
        cells[file.stem.removeprefix("study_")] = config
    return cells


if __name__ == "__main__":
    main()

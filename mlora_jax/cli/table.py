"""Writes tables and figures of finished runs: `python -m experiments.table RUN... [--out DIR] [--choose_on SPLIT]`.

RUN is the workdir of a run. There is one table for each pair of task and base model, with the results of all its runs.
"""

from collections.abc import Sequence

from absl import app, flags, logging

from mlora_jax.report import SPLITS, write_tables

OUT = flags.DEFINE_string("out", None, "Folder for the files; by default the folder of the run, if there is only one.")
CHOOSE_ON = flags.DEFINE_enum(
    "choose_on",
    None,
    list(SPLITS),
    "Split on which the learning rate of a method is chosen; by default the runs' configs say it.",
)


def main() -> None:
    """Parses the command line and writes the report. Bad input ends the command with a message of one line."""
    try:
        app.run(_write)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def _write(arguments: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    folders = arguments[1:]
    if not folders:
        raise ValueError("name at least one run's folder: python -m experiments.table RUN... [--out DIR]")
    if len(folders) > 1 and OUT.value is None:
        raise ValueError("of several runs, --out DIR must say where the table belongs")
    out = folders[0] if OUT.value is None else OUT.value
    for path in write_tables(folders, out, CHOOSE_ON.value):
        print(path.read_text(encoding="utf-8"))
    print(f"report in {out}")


if __name__ == "__main__":
    main()

"""Finds ranks to deploy: `python -m experiments.ranks RUN --trial NAME [--readout prefix] [--budget 4,8,16] ...`.

RUN is the workdir of a finished run. The command prints the rank-accuracy curve with intervals, the smallest rank that
is nearly the best, and ranks per layer in comparison with uniform ranks. It writes ranks.md, ranks.csv,
ranks.png and spectra.png, which shows the singular values of the adapter by layer and module.
"""

import os
from collections.abc import Sequence

from absl import app, flags, logging

from mlora_jax.cli import adapter_flags
from mlora_jax.cli.adapter_flags import READOUT, TRIAL
from mlora_jax.cli.deploy_flags import find_adapter
from mlora_jax.cli.number_flags import define_float, define_integer, integers
from mlora_jax.report import SPLITS

flags.adopt_module_key_flags(adapter_flags)
WITHIN = define_float("within", 0.01, "Accuracy, in 0..1, by which the smallest rank may fall short of the best.")
BUDGET = flags.DEFINE_list("budget", [], "Average ranks per layer to allocate; by default all of S but R.")
CHOOSE_ON = flags.DEFINE_enum(
    "choose_on",
    "validation",
    list(SPLITS),
    "Items to choose ranks on. With test, every other test item is chosen on and the rest is reported on.",
)
MEASURE = flags.DEFINE_enum("measure", "likelihood", ["likelihood", "accuracy"], "Measure that is maximised.")
BY = flags.DEFINE_enum(
    "by", "both", ["both", "layer", "module"], "Each layer, module, or module of a layer gets a rank."
)
START = flags.DEFINE_enum("start", "both", ["uniform", "full", "both"], "Allocation from which the search starts.")
LEVELS = flags.DEFINE_list("levels", [], "Ranks that a layer may have; by default 0, S and R.")
LIMIT = define_integer("limit", 500, "Largest number of allocations that are tried for one budget.")
OUT = flags.DEFINE_string("out", None, "Folder for the files; by default RUN.")


def main() -> None:
    """Parses the command line and reports. Bad input ends the command with a message of one line."""
    try:
        app.run(report)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def report(arguments: Sequence[str]) -> None:
    """Measures an adapter at its ranks, and writes and prints the report.

    Args:
      arguments: the name of the program, and the arguments that are not flags: the run's folder.

    Raises:
      ValueError: there is not exactly one folder, or an option cannot be used; the message names it.
      FileNotFoundError: the folder is not the folder of a run, or the trial has no adapter yet.
    """
    # absl shows the messages of every library as soon as an app runs.
    logging.set_verbosity(logging.WARNING)
    if len(arguments) != 2:
        raise ValueError(f"name one run's folder: python -m experiments.ranks RUN --trial NAME; got {arguments[1:]}")
    from mlora_jax.compilation_cache import use_compilation_cache
    from mlora_jax.report.ranks import write_ranks
    from mlora_jax.run.folder import stored_threads
    from mlora_jax.run.rank_choice import choose_ranks

    run = arguments[1]
    if threads := stored_threads(run):
        # The last bits of results depend on how XLA divides its work. XLA reads this variable when it starts.
        os.environ.setdefault("NPROC", str(threads))
    with use_compilation_cache():
        found = choose_ranks(
            run,
            find_adapter(run, TRIAL.value).name,
            readout=READOUT.value,
            within=WITHIN.value,
            budgets=[*map(int, integers("budget", BUDGET.value))] or None,
            choose_on=CHOOSE_ON.value,
            measure=MEASURE.value,
            levels=[*map(int, integers("levels", LEVELS.value))] or None,
            by=BY.value,
            start=START.value,
            limit=LIMIT.value,
            say=lambda text: print(text, flush=True),
        )
    out = OUT.value or run
    print(f"\n{write_ranks(found, out).read_text(encoding='utf-8')}\nreport in {out}")


if __name__ == "__main__":
    main()

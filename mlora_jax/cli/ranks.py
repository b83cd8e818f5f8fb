"""Which ranks to deploy: `python -m experiments.ranks RUN --trial NAME [--readout prefix] [--budget 4,8,16] ...`.

RUN is the workdir of a finished run. Prints the rank-accuracy curve with intervals, the smallest rank that is nearly
the best, and ranks per layer beside uniform ones; writes ranks.md, ranks.csv and ranks.png.
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
WITHIN = define_float("within", 0.01, "Accuracy, in 0..1, that the smallest rank may lack of the best.")
BUDGET = flags.DEFINE_list("budget", [], "Average ranks per layer to allocate; all of S but R if not given.")
CHOOSE_ON = flags.DEFINE_enum(
    "choose_on",
    "validation",
    list(SPLITS),
    "Items to choose ranks on; of test every other one, and the rest is reported on.",
)
MEASURE = flags.DEFINE_enum("measure", "likelihood", ["likelihood", "accuracy"], "What the allocation is to raise.")
BY = flags.DEFINE_enum("by", "both", ["both", "layer", "module"], "What gets a rank of its own.")
START = flags.DEFINE_enum("start", "both", ["uniform", "full", "both"], "Allocation that the search begins with.")
LEVELS = flags.DEFINE_list("levels", [], "Ranks that a layer may have; 0, S and R if not given.")
LIMIT = define_integer("limit", 500, "The most allocations that are tried for one budget.")
OUT = flags.DEFINE_string("out", None, "Folder for the files; RUN if not given.")


def main() -> None:
    """Parses the command line, measures and writes the report."""
    try:
        app.run(report)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def report(arguments: Sequence[str]) -> None:
    """Measures, writes and prints, for the arguments that flags have left."""
    # absl prints every library's chatter as soon as an app runs.
    logging.set_verbosity(logging.WARNING)
    if len(arguments) != 2:
        raise ValueError(f"name one run's folder: python -m experiments.ranks RUN --trial NAME; got {arguments[1:]}")
    from mlora_jax.report.ranks import write_ranks
    from mlora_jax.run.folder import stored_threads
    from mlora_jax.run.rank_choice import choose_ranks

    run = arguments[1]
    if threads := stored_threads(run):
        # The last bits depend on how XLA divides its work; it reads this when it starts.
        os.environ.setdefault("NPROC", str(threads))
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

"""What training and generation take on TPUs, from the TPU's compiler; needs no TPU, no weights and no network.

    python -m experiments.compile_report --config configs/NAME.py --topology v5e:16x16 [--config.KEY=VALUE ...]

Compiles the training step, prefill and decode for every slice, model, rank and batch that is named, and prints per
chip: memory, FLOPs, bytes that every collective moves, and the least time by the chip's published numbers. With --out a
table is written instead. The extra `tpu` installs the compiler.
"""

import os

# Before jax is imported: the programs are for other machines.
os.environ["JAX_PLATFORMS"] = "cpu"

from absl import flags

from mlora_jax.cli.config_flags import run_with_config
from mlora_jax.cli.number_flags import define_float, define_integer, integers

TOPOLOGY = flags.DEFINE_list("topology", None, "Slices, like v5e:16x16,v5p:2x2x2.", required=True)
MODEL = flags.DEFINE_list("model", [], "Folders, hub ids or known names; config.model.path if not given.")
RANK = flags.DEFINE_list("rank", [], "Ranks R; those of config.trials if not given.")
BATCH = flags.DEFINE_list("batch", [], "Sequences a step, or `largest`; config.train.batch_size if not given.")
PROGRAM = flags.DEFINE_list("program", ["train", "prefill", "decode"], "What is compiled.")
FLASH_FROM = define_integer(
    "flash_from", None, "Tokens of a row from which attention is a kernel, 0 for never; the model's own if not given."
)
EFFORT = define_float(
    "effort",
    0.0,
    "Effort of the compiler, -1 to 1. At -1 it takes a quarter of the time, and programs move more bytes through HBM.",
)
RECORDS = flags.DEFINE_string("records", None, "File of JSON lines: what is in it is not compiled again.")
OUT = flags.DEFINE_string("out", None, "Markdown file whose tables are written anew, from its first `## ` on.")


def main() -> None:
    """Parses the command line and reports."""
    run_with_config(_report)


def _report(config) -> None:
    import itertools
    import sys

    import jax

    from mlora_jax.compile_report.records import Records
    from mlora_jax.compile_report.report import LARGEST, PROGRAMS, Reporter, Row
    from mlora_jax.compile_report.table import describe, markdown, write_tables
    from mlora_jax.models.flash import LEAST

    jax.config.update("jax_exec_time_optimization_effort", EFFORT.value)
    unknown = sorted(set(PROGRAM.value) - set(PROGRAMS))
    if unknown or not PROGRAM.value:
        raise ValueError(f"--program must be some of {', '.join(PROGRAMS)}, got {','.join(PROGRAM.value)}")
    reporter = Reporter(
        config,
        Records(RECORDS.value),
        flash_from=LEAST if FLASH_FROM.value is None else FLASH_FROM.value or None,
        programs=[name for name in PROGRAMS if name in PROGRAM.value],
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    rows = itertools.starmap(
        Row,
        itertools.product(
            MODEL.value or [config.model.path],
            TOPOLOGY.value,
            integers("rank", RANK.value, low=1) or config.trials.rank,
            integers("batch", BATCH.value, words=(LARGEST,)) or [config.train.batch_size],
        ),
    )
    results = []
    for row in rows:
        results.append(reporter.result(row))
        if OUT.value:
            write_tables(OUT.value, markdown(results))
        else:
            print(f"{describe(results[-1])}\n", flush=True)


if __name__ == "__main__":
    main()

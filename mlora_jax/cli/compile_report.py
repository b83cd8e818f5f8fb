"""Reports what training and generation need on TPUs, by the TPU's compiler. It needs no TPU, weights or network.

    python -m experiments.compile_report --config configs/NAME.py --topology v5e:16x16 [--config.KEY=VALUE ...]

It compiles the training step, prefill and decode for every given slice, model, rank and batch size. It prints the
memory, the FLOPs, the bytes that every collective moves and the least time by the chip's published numbers, all per
chip. With --out it writes a table instead. The extra `tpu` installs the compiler.
"""

import os

# This must be set before jax is imported: the programs are compiled for other machines.
os.environ["JAX_PLATFORMS"] = "cpu"

from absl import flags

from mlora_jax.cli.config_flags import run_with_config
from mlora_jax.cli.number_flags import define_float, define_integer, integers

TOPOLOGY = flags.DEFINE_list("topology", None, "TPU slices, such as v5e:16x16,v5p:2x2x2.", required=True)
MODEL = flags.DEFINE_list("model", [], "Folders, hub ids or known names of models; by default config.model.path.")
RANK = flags.DEFINE_list("rank", [], "Ranks R; by default those of config.trials.")
BATCH = flags.DEFINE_list("batch", [], "Sequences per step, or `largest`; by default config.train.batch_size.")
PROGRAM = flags.DEFINE_list("program", ["train", "prefill", "decode"], "Programs to compile.")
FLASH_FROM = define_integer(
    "flash_from",
    None,
    "Rows of at least this many tokens use an attention kernel, with 0 none; by default the model's own number.",
)
EFFORT = define_float(
    "effort",
    0.0,
    "Effort of the compiler, -1 to 1. At -1 it takes a quarter of the time, but programs move more bytes through HBM.",
)
RECORDS = flags.DEFINE_string("records", None, "File of JSON lines for results; what it holds is not compiled again.")
OUT = flags.DEFINE_string("out", None, "Markdown file; the tables replace everything from its first `## ` on.")


def main() -> None:
    """Parses the command line and reports. Bad input ends the command with a message of one line."""
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

"""Runs the command line of lm-evaluation-harness with the model `mlora_jax` registered in it.

    python -m experiments.lm_eval --model_args checkpoint=FOLDER,adapter=FOLDER,rank=8,readout=prefix --tasks trec,gsm8k

`--help` lists the options, which are those of the harness. Two of them have other defaults here: `--model mlora_jax`
and `--batch_size auto`. Two options are added: `--raw_dir FOLDER` runs the tasks on local data, without a network, and
`--cache_dir FOLDER` keeps the data sets that are built from that data.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

SUBCOMMANDS = ("run", "ls", "validate")


def main(arguments: Sequence[str] | None = None) -> None:
    """Registers the model, writes the files of local tasks if they are asked for, and calls the harness.

    Bad input ends the command with a message of one line.

    Args:
      arguments: the arguments of the command line; None: those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments.pop(0) if arguments[:1] and arguments[0] in SUBCOMMANDS else "run"
    try:
        if command == "run" and arguments:
            arguments = _prepare(arguments)
        # The harness prints its help when it is told to run nothing.
        _call_harness([command, *(arguments or (["--help"] if command == "run" else []))])
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def _prepare(arguments: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--raw_dir", default="")
    parser.add_argument("--cache_dir", default="")
    parser.add_argument("--tasks", "-t", nargs="+", default=[])
    parser.add_argument("--include_path", default="")
    ours, left = parser.parse_known_args(arguments)
    if ours.raw_dir:
        os.environ["HF_DATASETS_OFFLINE"] = "1"  # `datasets` reads it when it is imported
    names = [name for group in ours.tasks for name in group.split(",") if name]
    folder = _local_tasks(names, ours.raw_dir, ours.cache_dir)
    if folder and ours.include_path:
        raise ValueError(f"--include_path is taken by the files of local tasks: give {ours.include_path} without them")
    if names:
        left += ["--tasks", ",".join(names)]
    if folder or ours.include_path:
        left += ["--include_path", folder or ours.include_path]
    given = {argument.partition("=")[0] for argument in left}
    if not given & {"--model", "-M"}:
        left += ["--model", "mlora_jax"]
    if not given & {"--batch_size", "-b", "--config", "-C"}:
        left += ["--batch_size", "auto"]
    return left


def _local_tasks(names: Sequence[str], raw_dir: str, cache_dir: str) -> str:
    """Writes the task files of the names that run on local data, and returns their folder; "" if there are none."""
    from mlora_jax.evaluate.task_files import gather_local, task_folder, write_local_tasks

    local, reasons = gather_local(names, raw_dir=raw_dir, cache_dir=cache_dir)
    if reasons:
        raise ValueError("; ".join(reasons.values()))
    return str(write_local_tasks(task_folder(local, cache_dir), local)) if local else ""


def _call_harness(arguments: Sequence[str]) -> None:
    """Does what `lm_eval.__main__.cli_evaluate` does, with these arguments instead of those of the process."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from mlora_jax.compilation_cache import use_compilation_cache
    from mlora_jax.evaluate import language_model  # noqa: F401  registers the model

    class CommandLine(HarnessCLI):
        """Parses given arguments. The harness's own `parse_args` reads and changes `sys.argv`."""

        def parse_given(self, given: Sequence[str]) -> argparse.Namespace:
            return self._parser.parse_args(given)

    setup_logging()
    command_line = CommandLine()
    with use_compilation_cache():
        command_line.execute(command_line.parse_given(arguments))


if __name__ == "__main__":
    main()

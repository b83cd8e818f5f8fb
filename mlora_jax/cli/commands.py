"""Starts the commands: `python -m experiments.run` and the installed `mlora-run` run `mlora_jax.cli.run`."""

from __future__ import annotations

import runpy
from collections.abc import Callable

COMMANDS = (
    "run",
    "table",
    "generate",
    "export",
    "lm_eval",
    "plan",
    "ranks",
    "study",
    "compile_report",
    "pretrain",
    "kv_cache",
    "keys",
)


def start(name: str) -> None:
    """Runs a module of `mlora_jax.cli` as the main module, whose docstring and flags `--help` shows.

    Args:
      name: the name of the module, one of `COMMANDS`.
    """
    runpy.run_module(f"mlora_jax.cli.{name}", run_name="__main__", alter_sys=True)


def __getattr__(name: str) -> Callable[[], None]:
    # The entry points of setup.py are functions without arguments: commands:run, commands:table and so on.
    if name not in COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lambda: start(name)

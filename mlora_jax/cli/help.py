"""Prints the help of the commands that take an experiment config: their flags, and the keys that a config may set."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import cast

from absl import flags

from mlora_jax.config import KEYS, Group, help_text
from mlora_jax.config_type import ConfigDict

HELP_FLAGS = {"-h", "-help", "--help", "--helpshort", "--helpfull"}


def print_help(config: ConfigDict | None = None) -> None:
    """Prints the command's docstring, its flags, and all keys of a config.

    Args:
      config: a resolved config, whose values are shown if they are not the defaults; None: only defaults are shown.
    """
    values = None if config is None else config.to_dict()
    print(f"{sys.modules['__main__'].__doc__}\nflags:\n{flags.FLAGS.main_module_help()}\n")
    if config is None:
        print("With --config NAME as well, --help also shows the values of that config.")
    print('The keys of a config, each a flag like --config.train.epochs=5 or --config.trials.seed="(1, 2)":\n')
    print(help_text(cast(Mapping[str, Group], KEYS.keys), values))

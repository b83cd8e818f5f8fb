"""Reads the flags of the commands that take an experiment config: `--config`, its overrides, and `--workdir`."""

from __future__ import annotations

import importlib.util
import inspect
import pathlib
import sys
import types
import zlib
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from mlora_jax.cli.help import HELP_FLAGS, print_help
from mlora_jax.config import NAMED, check_key, resolve
from mlora_jax.config_type import ConfigDict
from mlora_jax.study.keys import resolve_cell, without_study

WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the results.")
# The configs are inside the package where it is installed, and beside it in a checkout.
_PACKAGE = pathlib.Path(__file__).parents[1]
SHIPPED = next(folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir())


def find_config(name: str) -> pathlib.Path:
    """Returns the file of a config.

    Args:
      name: the path of the file, or the name of a config that the package ships.

    Raises:
      FileNotFoundError: there is no such file and no shipped config of that name; the message lists the shipped ones.
    """
    if pathlib.Path(name).is_file():
        return pathlib.Path(name)
    names = sorted(path.stem for path in SHIPPED.glob("[!_]*.py") if not path.stem.startswith(("pretrain", "kv_cache")))
    if name in names:
        return SHIPPED / f"{name}.py"
    raise FileNotFoundError(f"there is no config file {name}; configs that can be given by name: {', '.join(names)}")


def read_config(path: str) -> ConfigDict:
    """Returns the config that `get_config()` of a Python file returns, with every default filled in.

    A cell of the study is an experiment whose config also has a group "study", which only `experiments.study` reads.
    This function checks that group and leaves it out.

    Args:
      path: the path of the file, or the name of a shipped config. With `:VARIANT` behind it, `get_config` is called
        with that text.

    Raises:
      FileNotFoundError: there is no such config.
      ValueError: the config has no such variant, or it has a value that is not allowed.
    """
    return without_study(read_cell(path))


def read_cell(path: str) -> ConfigDict:
    """Returns the config of a cell of the study, with every default filled in, also in its group "study".

    Args:
      path: the file and the variant, as for `read_config`.

    Raises:
      FileNotFoundError: there is no such config.
      ValueError: the config has no such variant, or it has a value that is not allowed.
    """
    name, colon, variant = (path, "", "") if pathlib.Path(path).is_file() else path.partition(":")
    file = find_config(name)
    module = _load(file)
    if colon and not inspect.signature(module.get_config).parameters:
        raise ValueError(f"the config {name} has no variants, got {path}")
    return resolve_cell(module.get_config(variant) if colon else module.get_config())


def _load(file: pathlib.Path) -> types.ModuleType:
    """Imports a config file as a member of a package of its folder, so that it may import its neighbours relatively."""
    package = types.ModuleType(f"config_folder_{zlib.crc32(str(file.resolve().parent).encode())}")
    package.__path__ = [str(file.parent)]
    sys.modules[package.__name__] = package
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def take_config_path(arguments: list[str]) -> tuple[str, list[str]]:
    """Takes `--config PATH_OR_NAME` or `--config=PATH_OR_NAME` out of the arguments.

    Args:
      arguments: the command line, with the name of the program first.

    Returns:
      The path or name, and the other arguments. Overrides such as `--config.KEY=VALUE` are among them.

    Raises:
      SystemExit: there is no `--config`. If the arguments ask for help, it is printed before.
    """
    for index, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            following = index + (1 if equals else 2)
            if not equals and following > len(arguments):
                break
            return (value if equals else arguments[index + 1]), [*arguments[:index], *arguments[following:]]
    if HELP_FLAGS & set(arguments[1:]):
        print_help()
        raise SystemExit(0)
    raise SystemExit("--config PATH is required, for example --config configs/quickstart.py")


class LastTupleParser(flags.ArgumentParser):
    """Parses a tuple as ml_collections does. If a key is given several times, the last value counts.

    ml_collections adds up the values of a flag that is given several times if the parser is its own `TupleParser`.
    Therefore this class does not inherit from that one.
    """

    def parse(self, argument: str | tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the tuple that a text or a tuple stands for.

        Raises:
          ValueError: the text cannot be read as a tuple.
        """
        return argument if isinstance(argument, tuple) else tuple_parser.TupleParser().parse(argument)

    def flag_type(self) -> str:
        """Returns the name of the type for --help."""
        return "tuple"


def run_with_config(action: Callable[[ConfigDict], None]) -> None:
    """Reads `--config PATH` and its overrides, and calls a function with the config.

    Args:
      action: the function; its argument is the config with every key present and checked.

    Raises:
      SystemExit: the function has returned, or help was asked for, or the input is bad. The message on bad input has
        one line.
    """
    try:
        path, arguments = take_config_path(sys.argv)
        names = [argument.lstrip("-").partition("=")[0] for argument in arguments[1:] if argument.startswith("-")]
        for name in names:
            check_key(name)
        default = read_config(path)
        if HELP_FLAGS & set(arguments[1:]):
            print_help(default)
            raise SystemExit(0)
        _make_room(default, names)
        config_flags.register_flag_parser_for_type(tuple, LastTupleParser())
        config = config_flags.DEFINE_config_dict("config", default, sys_argv=arguments)
        app.run(lambda left: _quietly(action, config.value, left[1:]), argv=arguments)
    except (ValueError, OSError, ModuleNotFoundError, MemoryError) as error:
        raise SystemExit(f"error: {error}") from error


def _make_room(config: ConfigDict, names: list[str]) -> None:
    """Adds the names that the command line gives to groups whose keys are names, such as a method of the user's own."""
    for name in names:
        group, _, key = name.rpartition(".")
        if group in NAMED:
            at: Any = config
            for part in group.split(".")[1:]:
                at = at[part]
            if key not in at:
                with at.unlocked():
                    at[key] = ()


def _quietly(action, config: ConfigDict, left: list[str]) -> None:
    if left:
        raise ValueError(f"what is {' '.join(left)!r}? Options begin with --, and values with spaces need quotes")
    # absl shows the messages of every library as soon as an app runs.
    logging.set_verbosity(logging.WARNING)
    action(resolve(config))

"""Runs an experiment: `python -m experiments.run --config configs/NAME.py --workdir DIR [--config.KEY=VALUE ...]`.

`--config NAME` alone stands for a config that the package ships, wherever it is installed. A config with variants takes
one behind a colon: `--config paper_gsm8k_llama32_1b:r256`, `--config configs/paper_gsm8k_llama32_1b.py:smoke`.

Every key of `mlora_jax.config.DEFAULTS` can be set on the command line, whether the config file names it or not.
"""

import functools
import importlib.util
import inspect
import os
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from mlora_jax.config import NAMED, check_key, resolve

WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the results.")
SHIPPED = pathlib.Path(__file__).parents[1] / "configs"  # beside this package, in a checkout and where it is installed


def find_config(name: str) -> pathlib.Path:
    """The file of a config: a path, or the name of a shipped one.

    Raises:
      FileNotFoundError: neither is there; the message lists the shipped ones.
    """
    if pathlib.Path(name).is_file():
        return pathlib.Path(name)
    names = sorted(path.stem for path in SHIPPED.glob("[!_]*.py") if not path.stem.startswith("pretrain"))
    if name in names:
        return SHIPPED / f"{name}.py"
    raise FileNotFoundError(f"there is no config file {name}; configs that can be given by name: {', '.join(names)}")


def read_config(path: str) -> ConfigDict:
    """The config that `get_config()` of a Python file returns, with every default filled in.

    Args:
      path: of the file, or the name of a shipped config; `:VARIANT` behind it is what `get_config` is called with.

    Raises:
      FileNotFoundError: there is no such config.
      ValueError: it has no such variant, or a value that cannot be.
    """
    name, colon, variant = (path, "", "") if pathlib.Path(path).is_file() else path.partition(":")
    file = find_config(name)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if colon and not inspect.signature(module.get_config).parameters:
        raise ValueError(f"the config {name} has no variants, got {path}")
    return resolve(module.get_config(variant) if colon else module.get_config())


def take_config_path(arguments: list[str]) -> tuple[str, list[str]]:
    """Takes `--config PATH_OR_NAME` or `--config=PATH` out of the arguments; overrides `--config.KEY=VALUE` stay."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            following = index + (1 if equals else 2)
            if not equals and following > len(arguments):
                break
            return (value if equals else arguments[index + 1]), [*arguments[:index], *arguments[following:]]
    if {"-h", "--help", "-help", "--helpfull"} & set(arguments[1:]):
        print(f"{sys.modules['__main__'].__doc__}\n`--config quickstart --help` lists every key and flag.")
        raise SystemExit(0)
    raise SystemExit("--config PATH is required, for example --config configs/quickstart.py")


class LastTupleParser(flags.ArgumentParser):
    """Parses a tuple as ml_collections does; of a key that is given several times the last value counts.

    ml_collections' own parser is the sign by which it makes a flag whose values add up, unlike those of other types.
    """

    def parse(self, argument):
        return tuple_parser.TupleParser().parse(argument)

    def flag_type(self) -> str:
        return "tuple"


def run_with_config(action: Callable[[ConfigDict], None]) -> None:
    """Reads `--config PATH` and its overrides and calls `action` with the config; bad input ends in one line."""
    try:
        path, arguments = take_config_path(sys.argv)
        names = [argument.lstrip("-").partition("=")[0] for argument in arguments[1:] if argument.startswith("-")]
        for name in names:
            check_key(name)
        default = read_config(path)
        _make_room(default, names)
        config_flags.register_flag_parser_for_type(tuple, LastTupleParser())
        config = config_flags.DEFINE_config_dict("config", default, sys_argv=arguments)
        app.run(lambda left: _quietly(action, config.value, left[1:]), argv=arguments)
    except (ValueError, OSError, ModuleNotFoundError, MemoryError) as error:
        raise SystemExit(f"error: {error}") from error


def _make_room(config: ConfigDict, names: list[str]) -> None:
    """Lets the command line give values to names that are new to a group of them, such as a method of one's own."""
    for name in names:
        group, _, key = name.rpartition(".")
        if group in NAMED:
            at = functools.reduce(lambda found, part: found[part], group.split(".")[1:], config)
            if key not in at:
                with at.unlocked():
                    at[key] = ()


def _quietly(action, config: ConfigDict, left: list[str]) -> None:
    if left:
        raise ValueError(f"what is {' '.join(left)!r}? Options begin with --, and values with spaces need quotes")
    # absl prints every library's chatter as soon as an app runs.
    logging.set_verbosity(logging.WARNING)
    action(resolve(config))


def main() -> None:
    """Parses the command line and trains."""
    flags.mark_flag_as_required("workdir")
    run_with_config(_run)


def _run(config: ConfigDict) -> None:
    from mlora_jax.parallel import hosts
    from mlora_jax.run import train
    from mlora_jax.run_folder import stored_threads

    if threads := stored_threads(WORKDIR.value):
        # The last bits depend on how XLA divides its work; it reads this when it starts.
        os.environ.setdefault("NPROC", str(threads))
    results = train(config, WORKDIR.value)
    if not hosts.is_first():
        return
    compiled = ", ".join(f"{count} for {use}" for use, count in results.compilations.items())
    print(f"\n{(results.workdir / 'table.md').read_text(encoding='utf-8')}")
    print(f"executables compiled: {compiled}\nresults in {results.workdir}")


if __name__ == "__main__":
    main()

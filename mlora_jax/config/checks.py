"""Checks values that are each allowed but may not fit together, and numbers that arrays cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlora_jax.core.ranges import check_number

# The keys with these endings hold seeds, which have a larger range than other numbers.
SEED_KEYS = ("trials.seed", "study.seeds", ".list.seed")


def check_numbers(value: Any, name: str = "config") -> None:
    """Raises a ValueError if a config has, at any depth, a number that an int32 or float32 cannot hold.

    Args:
      value: the config, a group of it, or a value.
      name: the dotted name of the value, for the message.
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            check_numbers(each, f"{name}.{key}")
    elif isinstance(value, tuple):
        for each in value:
            check_numbers(each, name if name.startswith("an entry of ") else f"an entry of {name}")
    elif not name.endswith(SEED_KEYS):
        check_number(name, value)


def check_train(train: Mapping[str, Any]) -> None:
    """Raises a ValueError if the values of `config.train` do not fit together."""
    if train["batch_size"] % train["accumulation"]:
        raise ValueError(
            f"config.train.batch_size {train['batch_size']} is no multiple of "
            f"config.train.accumulation {train['accumulation']}"
        )


def check_validation(validation: Mapping[str, Any]) -> None:
    """Raises a ValueError if the values of `config.validation` do not fit together."""
    for key, unset in (("keep", "last"), ("patience", 0)):
        if validation[key] != unset and not validation["every"]:
            raise ValueError(f"config.validation.{key} needs validations while training: set config.validation.every")


def check_parallel(parallel: Mapping[str, Any]) -> None:
    """Raises a ValueError if the values of `config.parallel` do not fit together."""
    if parallel["engine"] == "pmap" and any(parallel[axis] != 1 for axis in ("trial", "fsdp", "tensor")):
        raise ValueError("config.parallel.engine='pmap' cuts the rows only: leave trial, fsdp and tensor at 1")

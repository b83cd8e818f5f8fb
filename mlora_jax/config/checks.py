"""Checks of values that are allowed each by itself and do not go together, group by group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_train(train: Mapping[str, Any]) -> None:
    """Raises ValueError if the values of `config.train` do not go together."""
    if train["batch_size"] % train["accumulation"]:
        raise ValueError(
            f"config.train.batch_size {train['batch_size']} is no multiple of "
            f"config.train.accumulation {train['accumulation']}"
        )


def check_validation(validation: Mapping[str, Any]) -> None:
    """Raises ValueError if the values of `config.validation` do not go together."""
    for key, unset in (("keep", "last"), ("patience", 0)):
        if validation[key] != unset and not validation["every"]:
            raise ValueError(f"config.validation.{key} needs validations while training: set config.validation.every")


def check_parallel(parallel: Mapping[str, Any]) -> None:
    """Raises ValueError if the values of `config.parallel` do not go together."""
    if parallel["engine"] == "pmap" and any(parallel[axis] != 1 for axis in ("trial", "fsdp", "tensor")):
        raise ValueError("config.parallel.engine='pmap' cuts the rows only: leave trial, fsdp and tensor at 1")

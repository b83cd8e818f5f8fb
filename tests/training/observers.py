"""A stand-in for the run that a training loop reports to."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def ignore(*arguments: Any) -> None:
    """Takes any report."""


def observer(
    *,
    log: Callable = ignore,
    validate: Callable = ignore,
    save: Callable = ignore,
    interrupted: Callable[[], int] = lambda: 0,
) -> SimpleNamespace:
    """An observer of a training loop made of these functions."""
    return SimpleNamespace(log=log, validate=validate, save=save, interrupted=interrupted)

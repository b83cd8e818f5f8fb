"""What the processes of a run have to agree on. With one process all of this does nothing."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def join(options: Mapping[str, Any]) -> None:
    """Joins the other processes of a run, before anything else is asked of jax.

    Args:
      options: `config.parallel`. Without an address, jax finds the others by the cluster's environment: SLURM, GKE,
        Cloud TPU, Open MPI.

    Raises:
      ValueError: some of address, number of processes and own number are given and others are not; or none, and jax
        finds no cluster.
      RuntimeError: jax has been used already.
    """
    if not options["distributed"] or jax.distributed.is_initialized():
        return
    keys = {"coordinator_address": "", "num_processes": 0, "process_id": -1}
    given = {key: options[key] for key, unset in keys.items() if options[key] != unset}
    if given and len(given) != len(keys):
        missing = ", ".join(f"config.parallel.{key}" for key in keys if key not in given)
        raise ValueError(f"config.parallel.distributed with {', '.join(given)} needs {missing} too")
    try:
        jax.distributed.initialize(**given)
    except ValueError as error:
        raise ValueError(
            f"config.parallel.distributed found no cluster ({error}): set config.parallel.coordinator_address "
            "(HOST:PORT of the first process), config.parallel.num_processes and config.parallel.process_id"
        ) from error


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def agree(value: T) -> T:
    """The first process's value, in every process; all of them call this together."""
    if count() == 1:
        return value
    data = np.frombuffer(pickle.dumps(value), np.uint8) if is_first() else np.zeros(0, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data), np.int32)))
    padded = np.zeros(length, np.uint8)
    padded[: len(data)] = data
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes())


def together(act: Callable[[], Any]) -> None:
    """Lets the first process do something; if that fails, it fails in all of them, with the same message.

    Raises:
      ValueError, OSError: what `act` raised.
    """
    error = None
    if is_first():
        try:
            act()
        except (ValueError, OSError) as caught:
            error = caught
    if (message := agree(error and (type(error), str(error)))) is not None:
        kind, text = message
        raise error or (ValueError if issubclass(kind, ValueError) else OSError)(text)


def largest(value: int) -> int:
    """The largest value of all processes; all of them call this together."""
    if count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.asarray(value, np.int32))))


def wait(name: str) -> None:
    """Returns when all processes have come here.

    Args:
      name: of the place.
    """
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def first_then_others(name: str, make: Callable[[], T]) -> T:
    """What `make` gives, in the first process before the others: they find the files that it leaves."""
    if not is_first():
        wait(name)
        return make()
    made = make()
    wait(name)
    return made

"""What the processes of a run have to agree on. With one process all of this does nothing."""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import pickle
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlora_jax.disk import lack_of_room

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


def broadcast(value: T) -> T:
    """The first process's value, in every process; all of them call this together."""
    if count() == 1:
        return value
    data = np.frombuffer(pickle.dumps(value), np.uint8) if is_first() else np.zeros(0, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data), np.int32)))
    padded = np.zeros(1 << max(length - 1, 0).bit_length(), np.uint8)  # few lengths, since each is compiled
    padded[: len(data)] = data
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)[:length].tobytes())


class SharedError(Exception):
    """Marks an error that every process raises: none of them has to be stopped by force."""


def on_first_process(act: Callable[[], Any]) -> None:
    """Lets the first process do something; if that fails, it fails in all of them, with the same message.

    Raises:
      Exception: what `act` raised; in the other processes an error of the nearest type of ValueError,
        FileNotFoundError, ModuleNotFoundError, OSError, RuntimeError.
    """
    if count() == 1:
        act()
        return
    error = None
    if is_first():
        try:
            act()
        except Exception as caught:
            error = caught
    failed = broadcast(error and (_kind(error), str(error)))
    if failed is not None:
        raise (error or failed[0](failed[1])) from SharedError()


def _kind(error: Exception) -> type[Exception]:
    kinds = (ValueError, FileNotFoundError, ModuleNotFoundError, OSError)
    return next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """Ends this process at once if something fails in it alone: the others would wait for it, for minutes."""
    try:
        yield
    except Exception as error:
        if count() == 1 or isinstance(error.__cause__, SharedError):
            raise
        if lack_of_room(error) is None:
            traceback.print_exc()
        print(f"error in process {jax.process_index()} of {count()}, which stops all of them: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def check_shared(folder) -> None:
    """Raises ValueError in all processes unless each of them sees what the first one writes to a folder."""
    if count() == 1:
        return
    path = pathlib.Path(folder)
    token, file = broadcast(uuid.uuid4().hex), path / ".processes"

    def write():
        path.mkdir(parents=True, exist_ok=True)
        file.write_text(token, encoding="utf-8")

    on_first_process(write)
    seen = file.is_file() and file.read_text(encoding="utf-8") == token
    blind = -largest(-int(seen)) == 0
    on_first_process(lambda: file.unlink(missing_ok=True))
    if blind:
        raise ValueError(
            f"{folder} is not the same folder for all {count()} processes: give a --workdir on storage that every host "
            "sees at the same path"
        ) from SharedError()


def largest(value: int) -> int:
    """The largest value of all processes; all of them call this together."""
    if count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.asarray(value, np.int32))))


def polled(value: Callable[[], int]) -> Callable[[], int]:
    """`largest` for the steps of training: asked of the devices behind the step, and never waited for.

    Args:
      value: this process's at the time of a call.

    Returns:
      A function that all processes call together, and that gives all of them the largest value at the call before; 0
      at its first call. With one process, `value` itself.
    """
    if count() == 1:
        return value
    one_each = [next(d for d in jax.devices() if d.process_index == process) for process in range(count())]
    mesh = Mesh(np.array(one_each), ("process",))
    apart, alike = NamedSharding(mesh, PartitionSpec("process")), NamedSharding(mesh, PartitionSpec())
    highest = jax.jit(jnp.max, out_shardings=alike)
    asked = collections.deque()

    def poll() -> int:
        own = np.asarray([value()], np.int32)
        asked.append(highest(jax.make_array_from_process_local_data(apart, own)))
        return int(asked.popleft().addressable_data(0)) if len(asked) > 1 else 0

    return poll


def wait(name: str) -> None:
    """Returns when all processes have come here.

    Args:
      name: of the place.
    """
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def first_then_others(make: Callable[[], T]) -> T:
    """What `make` gives, in the first process before the others: they find the files that it leaves."""
    if count() == 1:
        return make()
    made = []
    on_first_process(lambda: made.append(make()))
    return made[0] if made else make()

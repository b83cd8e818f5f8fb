"""Communication between the processes of a run. With one process, none of these functions communicates."""

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
    """Joins the other processes of a run. No other function of jax may be called before.

    Args:
      options: `config.parallel`. Without an address, jax finds the other processes by the environment of the cluster:
        SLURM, GKE, Cloud TPU, Open MPI.

    Raises:
      ValueError: only some of the address, the number of processes and the process's own number are given; or none of
        them is given and jax finds no cluster.
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
    """Returns the number of processes."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is the process that writes the files of the run."""
    return jax.process_index() == 0


def broadcast(value: T) -> T:
    """Returns the first process's value in every process. All processes must call this together."""
    if count() == 1:
        return value
    data = np.frombuffer(pickle.dumps(value), np.uint8) if is_first() else np.zeros(0, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data), np.int32)))
    padded = np.zeros(1 << max(length - 1, 0).bit_length(), np.uint8)  # few lengths, since each is compiled
    padded[: len(data)] = data
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)[:length].tobytes())


class SharedError(Exception):
    """Marks an error that every process raises, so that no process has to be stopped by force."""


def on_first_process(act: Callable[[], Any]) -> None:
    """Calls a function in the first process. If it raises, all processes raise an error with the same message.

    Args:
      act: the function; its result is ignored.

    Raises:
      Exception: the error that `act` raised. The other processes raise the nearest of ValueError, FileNotFoundError,
        ModuleNotFoundError, OSError and RuntimeError.
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
    """Ends this process at once if it alone fails: the others would wait minutes for it."""
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


def check_shared(folder: str | os.PathLike[str]) -> None:
    """Checks that all processes see the same files in a folder.

    Args:
      folder: the path of the folder; the first process makes it if it is missing.

    Raises:
      ValueError: some process does not see a file that the first process has written; all processes raise it.
    """
    if count() == 1:
        return
    path = pathlib.Path(folder)
    token, file = broadcast(uuid.uuid4().hex), path / ".processes"

    def write() -> None:
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
    """Returns the largest value of all processes. All processes must call this together."""
    if count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.asarray(value, np.int32))))


def polled(value: Callable[[], int]) -> Callable[[], int]:
    """Returns a form of `largest` for the steps of training that does not wait for the devices.

    The devices compute the maximum after the step that they work on, and a call returns the maximum of the call before.

    Args:
      value: a function that returns this process's value.

    Returns:
      A function that all processes must call together. It returns the largest value at the previous call, and 0 at the
      first call. With one process it is `value` itself.
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
    """Waits until all processes have called this.

    Args:
      name: a name for this place in the code, the same in all processes.
    """
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def first_then_others(make: Callable[[], T]) -> T:
    """Calls a function in the first process and then in the others, which find the files that it has written.

    Args:
      make: the function.

    Returns:
      The result of `make` in this process.
    """
    if count() == 1:
        return make()
    made = []
    on_first_process(lambda: made.append(make()))
    return made[0] if made else make()

"""Exact resume: orbax writes the state of a batch of trials to disk while the next steps run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mlora_jax.disk import DiskFullError, disk_full, lack_of_room, naming, size_on_disk
from mlora_jax.parallel import hosts
from mlora_jax.parallel.arrays import fetch

logger = logging.getLogger(__name__)

# How tensorstore's errors begin when a file is cut, altered or missing. Other errors, such as a device that does not
# answer or a file without read permission, say nothing about the checkpoint.
_DAMAGE = ("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND")


_PARTIAL = ".orbax-checkpoint-tmp"  # the suffix that orbax gives to the folder of a step that is not whole


class _OtherArraysError(ValueError):
    """The arrays that were read differ from those that were saved."""


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
      step: the number of finished steps.
      state: the arrays, in the structure of the template.
      values: the JSON values that were saved with the arrays.
    """

    step: int
    state: Any
    values: dict[str, Any]


class Checkpoints:
    """The checkpoints of one batch of trials.

    A save returns as soon as the arrays are copied. The files are written in the background, and a step's folder gets
    its name when it is complete. Arrays that are read back are compared with checksums, so that a damaged checkpoint
    is never taken for a sound one.

    Args:
      folder: the folder of the batch; it is made if it does not exist.
      keep: the number of newest checkpoints that are kept.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2) -> None:
        self._folder = pathlib.Path(folder).absolute()
        self._begun: tuple[int, int] | None = None  # the step and the bytes of the newest save
        self._partial: pathlib.Path | None = None  # the incomplete checkpoint of a save that found no room
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            # With this check orbax declines a save during another save; without it the second save waits.
            enable_should_save_is_saving_in_progress_check=False,
        )
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_no_echoes())
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        with naming(self._folder):
            return ocp.CheckpointManager(self._folder, options=self._options, item_names=("state", "values"))

    def save(self, step: int, state: Any, values: dict[str, Any]) -> None:
        """Begins to write a checkpoint.

        Args:
          step: the number of finished steps; it is above that of every earlier checkpoint.
          state: the tree of arrays.
          values: the JSON values to save with the arrays.

        Raises:
          OSError: orbax declined to write it.
          DiskFullError: there is no room for it, or for the previous checkpoint, which was still being written.
        """
        # These are copies, because the next step reuses the buffers while the checkpoint is still being written.
        arrays = {name: jnp.copy(leaf) for name, leaf in _named_arrays(state).items()}
        record = {"values": values, "arrays": _shapes(arrays), "checksums": _checksums(arrays)}
        self.wait()  # orbax waits too, but an error of the previous save would seem to be an error of this one
        self._begun = step, sum(leaf.nbytes for leaf in arrays.values()) + len(json.dumps(record))
        try:
            with self._naming_the_newest():
                saved = self._manager.save(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), values=ocp.args.JsonSave(record)),
                    force=True,
                )
        except ValueError as error:
            raise OSError(f"the checkpoint of step {step} in {self._folder} was not written: {error}") from error
        if not saved:
            raise OSError(f"the checkpoint of step {step} in {self._folder} was not written: orbax declined to")

    def restore(self, template: Any) -> Restored | None:
        """Reads the newest sound checkpoint. Newer ones that are damaged are removed with a warning.

        Args:
          template: the tree of arrays with the shapes, dtypes and shardings to restore.

        Returns:
          The checkpoint, or None if there is no sound one.

        Raises:
          ValueError: the checkpoint has other arrays than the template. It is kept.
          OSError: the checkpoint is damaged, and there are several processes.
          Exception: any other error that prevented reading. The checkpoint is kept.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._read(step, template)
            except Exception as error:  # orbax has no type of its own for errors of tensorstore in reading
                cause = _damage(error)
                if cause is None:
                    raise
                reason = str(cause).strip().splitlines()[0][:300] if str(cause).strip() else type(cause).__name__
                if hosts.count() > 1:  # the other processes may have read the checkpoint and wait for this one
                    raise OSError(
                        f"the checkpoint of step {step} in {self._folder} is damaged ({reason}): go on once with one "
                        "process, which removes it for the one before"
                    ) from error
                logger.warning("the checkpoint of step %d in %s is damaged and removed: %s", step, self._folder, reason)
                # It is removed now, because its step will be saved again and orbax does not overwrite a step.
                self._manager.close()
                shutil.rmtree(self._folder / str(step))
                self._manager = self._open()
        return None

    def _read(self, step: int, template) -> Restored:
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in _named_arrays(template).items()
        }
        record = self._restore(step, values=ocp.args.JsonRestore())
        if record["arrays"] != (wanted := _shapes(abstract)) or "checksums" not in record:
            raise ValueError(
                f"the checkpoint of step {step} in {self._folder} is of other arrays than this run's: "
                f"{_difference(record['arrays'], wanted)}. It was made with another version of the program or of its "
                "libraries: go on with that one, or delete the folder to train from the beginning"
            )
        arrays = self._restore(step, state=ocp.args.StandardRestore(abstract))
        if record["checksums"] != _checksums(arrays):
            raise _OtherArraysError("its arrays are not those that were saved")
        leaves, structure = jax.tree_util.tree_flatten_with_path(template)
        return Restored(step, structure.unflatten([arrays[_name(path)] for path, _ in leaves]), record["values"])

    def _restore(self, step: int, **item):
        return self._manager.restore(step, args=ocp.args.Composite(**item))[next(iter(item))]

    def wait(self) -> None:
        """Waits until everything saved is on disk, and raises any error that came up while it was written."""
        with self._naming_the_newest():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _naming_the_newest(self) -> Iterator[None]:
        """Raises a `DiskFullError` that names the newest checkpoint if there was no room for it."""
        try:
            yield
        except Exception as error:  # orbax has no type of its own for errors of tensorstore in writing
            if self._begun is None or lack_of_room(error) is None:
                raise
            step, needed = self._begun
            needed = max([needed, *(size_on_disk(self._folder / str(whole)) for whole in self._manager.all_steps())])
            what, self._partial = f"the checkpoint of step {step} in {self._folder}", self._folder / f"{step}{_PARTIAL}"
            full = disk_full(error, what, self._folder, partial=self._partial, needed=needed)
            if full is None:
                raise
            raise full from None

    def close(self) -> None:
        """Waits, frees the threads, and removes an incomplete checkpoint that found no room."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception) if self._partial else contextlib.nullcontext():
                self._manager.close()
            if self._partial:
                # asyncio reports a failed task whenever that is collected, so the quiet stays to the process's end. It
                # is kept here, since a collected context ends too.
                _QUIET_TO_THE_END.append(self._quiet.pop_all())
                if hosts.is_first():
                    shutil.rmtree(self._partial, ignore_errors=True)
            else:
                self._quiet.close()

    def remove(self) -> None:
        """Closes the checkpoints and deletes their folder."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except DiskFullError:
            if lack_of_room(error) is None:  # otherwise `error` already names the first file that found no room
                raise


_QUIET_TO_THE_END: list[contextlib.ExitStack] = []


@contextlib.contextmanager
def _no_echoes() -> Iterator[None]:
    """Silences what libraries print in their threads about a full disk, because it is raised as one line."""

    def is_news(record: logging.LogRecord) -> bool:
        return lack_of_room(record.exc_info[1] if record.exc_info else OSError(record.getMessage())) is None

    def hook(unraisable) -> None:
        # When one write of a checkpoint fails, the other writes report to an event loop that orbax has closed.
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    loggers, before = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    for each in loggers:
        each.addFilter(is_news)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(is_news)
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


def what_stands(workdir: str | os.PathLike) -> str:
    """Returns a sentence that names the newest whole checkpoint of every batch, which a full disk does not affect.

    Args:
      workdir: the run's folder.
    """
    newest: dict[str, int] = {}
    for folder in sorted(pathlib.Path(workdir).glob("checkpoints/*/*")):
        if folder.name.isdigit():
            newest[folder.parent.name] = max(int(folder.name), newest.get(folder.parent.name, 0))
    if not newest:
        return "What the run had finished before stands"
    return "The last good checkpoint stands: " + ", ".join(f"step {step} of {batch}" for batch, step in newest.items())


@contextlib.contextmanager
def saying_what_stands(workdir: str | os.PathLike) -> Iterator[None]:
    """Ends a run for which there is no room with a one-line error, which also names the checkpoints that are safe.

    Args:
      workdir: the run's folder.

    Raises:
      DiskFullError: it replaces any error whose cause is a lack of room.
    """
    try:
        yield
    except Exception as error:
        full = disk_full(error, getattr(error, "filename", None) or f"a file of {workdir}", workdir)
        if full is None:
            raise
        raise DiskFullError(full.fact, what_stands(workdir)) from None


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named_arrays(tree) -> dict[str, jax.Array]:
    return {_name(path): jnp.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _shapes(arrays) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays.items()}


def _difference(before: dict[str, str], now: dict[str, str]) -> str:
    """Returns how the first array that differs was described before and is described now."""
    name = next((name for name in (*now, *before) if before.get(name) != now.get(name)), None)
    if name is None:
        return "it has no sums of them"
    return f"{name} was {before.get(name, 'not there')} and is {now.get(name, 'not there')}"


def _damage(error: BaseException | None) -> BaseException | None:
    """Returns the error in a chain of errors that shows a damaged file, or None."""
    kinds = (FileNotFoundError, KeyError, json.JSONDecodeError, UnicodeDecodeError, _OtherArraysError)
    while error is not None and not isinstance(error, kinds) and not str(error).startswith(_DAMAGE):
        error = error.__cause__ or error.__context__
    return error


@jax.jit
def _sum_of(array: jax.Array) -> jax.Array:
    """Returns a checksum, uint32, that changes with any bit of an array and with the order of its elements.

    It is computed where the array lies and does not depend on the sharding, because sums of integers do not depend on
    their order.
    """
    bits = array.astype(jnp.uint8) if array.dtype == bool else array
    width = bits.dtype.itemsize
    if width < 8:
        words = jax.lax.bitcast_convert_type(bits, f"uint{8 * width}").astype(jnp.uint32)[None]
    else:
        words = jnp.moveaxis(jax.lax.bitcast_convert_type(bits, jnp.uint32), -1, 0)
    # Every position gets a factor, mixed along each axis by Knuth's constant and made odd, so that it is a unit modulo
    # 2 ** 32.
    position = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, tuple(size if i == axis else 1 for i in range(words.ndim)), axis)
        position = (position ^ (place + np.uint32(0x9E3779B9))) * np.uint32(2654435761)
    return jnp.sum((words ^ (position >> 7)) * (position | 1), dtype=jnp.uint32)


def _checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    return {name: int(fetch(_sum_of(array))) for name, array in arrays.items()}

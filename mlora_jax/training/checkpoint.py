"""Exact resume: what a batch of trials is at a step, on disk by orbax while the next steps run."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import shutil
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mlora_jax.disk import DiskFullError, disk_full, lack_of_room, naming, size_on_disk
from mlora_jax.parallel import hosts
from mlora_jax.parallel.arrays import fetch

logger = logging.getLogger(__name__)

# How tensorstore's errors begin when a file is cut, altered or missing. Others, such as those of a device that does not
# answer or of a file that may not be read, say nothing about the checkpoint.
_DAMAGE = ("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND")


_PARTIAL = ".orbax-checkpoint-tmp"  # what orbax puts behind the name of a step that is not whole


class _OtherArraysError(ValueError):
    """What is read is not what was saved."""


class Restored(NamedTuple):
    """A checkpoint that was read: its step, the arrays in the template's structure, and the JSON values beside them."""

    step: int
    state: Any
    values: dict[str, Any]


class Checkpoints:
    """The checkpoints of one batch of trials.

    A save returns as soon as the arrays are copied; the files are written behind it, and a step's folder gets its name
    when all of it is there. What is read back is compared with a checksum, so that a damaged checkpoint is never taken
    for a sound one.

    Args:
      folder: of the batch; made if it is not there.
      keep: how many of the newest checkpoints are kept.
    """

    def __init__(self, folder, *, keep: int = 2):
        self._folder = pathlib.Path(folder).absolute()
        self._begun: tuple[int, int] | None = None  # step and bytes of the newest save
        self._partial: pathlib.Path | None = None  # what there is of a checkpoint that found no room
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            # Otherwise a save during another save is declined; with it off the second one waits.
            enable_should_save_is_saving_in_progress_check=False,
        )
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_no_echoes())
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        with naming(self._folder):
            return ocp.CheckpointManager(self._folder, options=self._options, item_names=("state", "values"))

    def save(self, step: int, state, values: dict[str, Any]) -> None:
        """Begins to write a checkpoint.

        Args:
          step: finished steps; above that of every earlier checkpoint.
          state: tree of arrays.
          values: whatever JSON holds.

        Raises:
          OSError: orbax declined to write it.
          DiskFullError: there is no room for it, or for the one before, which was still being written.
        """
        # Copies: the next step reuses the buffers of these while they are still being written.
        arrays = {name: jnp.copy(leaf) for name, leaf in _named_arrays(state).items()}
        record = {"values": values, "arrays": _shapes(arrays), "checksums": _checksums(arrays)}
        self.wait()  # orbax would, but what went wrong with the one before would seem to be of this one
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

    def restore(self, template) -> Restored | None:
        """The newest sound checkpoint; damaged ones above it are removed with a warning. None if there is none.

        Args:
          template: tree of arrays of the shapes, dtypes and shardings to restore to.

        Raises:
          ValueError: the checkpoint is of other arrays than the template; it stays.
          OSError: it is damaged, and there are several processes.
          Exception: whatever else kept it from being read; it stays.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._read(step, template)
            except Exception as error:  # orbax has no type of its own for what tensorstore cannot read
                cause = _damage(error)
                if cause is None:
                    raise
                reason = str(cause).strip().splitlines()[0][:300] if str(cause).strip() else type(cause).__name__
                if hosts.count() > 1:  # the others may have read theirs, and wait for this process
                    raise OSError(
                        f"the checkpoint of step {step} in {self._folder} is damaged ({reason}): go on once with one "
                        "process, which removes it for the one before"
                    ) from error
                logger.warning("the checkpoint of step %d in %s is damaged and removed: %s", step, self._folder, reason)
                # Removed before training goes on: its step comes again, and orbax does not overwrite a step.
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
        """Returns when everything saved is on disk; raises what went wrong while it was written."""
        with self._naming_the_newest():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _naming_the_newest(self):
        """Says by a `DiskFullError` that there was no room for the newest checkpoint."""
        try:
            yield
        except Exception as error:  # orbax has no type of its own for what tensorstore cannot write
            if self._begun is None or lack_of_room(error) is None:
                raise
            step, needed = self._begun
            needed = max([needed, *(size_on_disk(self._folder / str(whole)) for whole in self._manager.all_steps())])
            what, self._partial = f"the checkpoint of step {step} in {self._folder}", self._folder / f"{step}{_PARTIAL}"
            raise disk_full(error, what, self._folder, partial=self._partial, needed=needed) from None

    def close(self) -> None:
        """Waits, and frees the threads; what there is of a checkpoint that found no room is removed."""
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
        """Closes, and deletes the folder."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            self.close()
        except DiskFullError:
            if lack_of_room(error) is None:  # otherwise the first file for which there was no room is the one to name
                raise


_QUIET_TO_THE_END: list[contextlib.ExitStack] = []


@contextlib.contextmanager
def _no_echoes():
    """Keeps quiet about a full disk what libraries print in their threads: it is raised, as one line."""

    def is_news(record: logging.LogRecord) -> bool:
        return lack_of_room(record.exc_info[1] if record.exc_info else OSError(record.getMessage())) is None

    def hook(unraisable) -> None:
        # When one write of a checkpoint fails, the others report to an event loop that orbax has closed.
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


def what_stands(workdir) -> str:
    """A sentence about the newest whole checkpoint of every batch in a run's folder: a full disk does not touch it."""
    newest: dict[str, int] = {}
    for folder in sorted(pathlib.Path(workdir).glob("checkpoints/*/*")):
        if folder.name.isdigit():
            newest[folder.parent.name] = max(int(folder.name), newest.get(folder.parent.name, 0))
    if not newest:
        return "What the run had finished before stands"
    return "The last good checkpoint stands: " + ", ".join(f"step {step} of {batch}" for batch, step in newest.items())


@contextlib.contextmanager
def saying_what_stands(workdir):
    """Ends a run for which there is no room by one line, which says also what of it is safe.

    Args:
      workdir: the run's folder.

    Raises:
      DiskFullError: in place of any error that came for want of room.
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
    """The first array that is not the same in both."""
    name = next((name for name in (*now, *before) if before.get(name) != now.get(name)), None)
    if name is None:
        return "it has no sums of them"
    return f"{name} was {before.get(name, 'not there')} and is {now.get(name, 'not there')}"


def _damage(error: BaseException | None) -> BaseException | None:
    """The error, or one that led to it, that shows a damaged file."""
    kinds = (FileNotFoundError, KeyError, json.JSONDecodeError, UnicodeDecodeError, _OtherArraysError)
    while error is not None and not isinstance(error, kinds) and not str(error).startswith(_DAMAGE):
        error = error.__cause__ or error.__context__
    return error


@jax.jit
def _sum_of(array: jax.Array) -> jax.Array:
    """A number, uint32, that changes with any bit of an array and with the order of its elements.

    Computed where the array lies, and the same however that is: sums of integers do not depend on their order.
    """
    bits = array.astype(jnp.uint8) if array.dtype == bool else array
    width = bits.dtype.itemsize
    if width < 8:
        words = jax.lax.bitcast_convert_type(bits, f"uint{8 * width}").astype(jnp.uint32)[None]
    else:
        words = jnp.moveaxis(jax.lax.bitcast_convert_type(bits, jnp.uint32), -1, 0)
    # A number for every position that has no common factor with 2 ** 32, mixed along each axis (Knuth's constant).
    position = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, tuple(size if i == axis else 1 for i in range(words.ndim)), axis)
        position = (position ^ (place + np.uint32(0x9E3779B9))) * np.uint32(2654435761)
    return jnp.sum((words ^ (position >> 7)) * (position | 1), dtype=jnp.uint32)


def _checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    return {name: int(fetch(_sum_of(array))) for name, array in arrays.items()}

"""Decides which trials train together: groups that share an executable, cut into batches that fit in memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from mlora_jax.trials import Trial

GIB = 2**30
# The limit where neither the device (a CPU) nor the config says how much memory there is.
DEFAULT_LIMIT = 8 * GIB
# The share of a device's memory that a plan may use, because no allocator can hand out all of it.
USABLE = 0.95


@dataclasses.dataclass(frozen=True)
class TrialBatch:
    """Trials that train together in one executable.

    Attributes:
      name: the name of its folder of checkpoints.
      trials: the trials, in the config's order.
      slots: K, the number of trials that the executable holds. The batches of one group share K and thus one
        executable. A batch with fewer trials fills its last slots with copies of its last trial, whose results are
        not used.
    """

    name: str
    trials: tuple[Trial, ...]
    slots: int

    @property
    def slotted(self) -> tuple[Trial, ...]:
        """The trial in each of the K slots."""
        return self.trials + self.trials[-1:] * (self.slots - len(self.trials))


def group_trials(trials: Sequence[Trial], key: Callable[[Trial], Hashable]) -> list[list[Trial]]:
    """Groups the trials that have the same key, in the order of each group's first trial."""
    groups: dict[Hashable, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(key(trial), []).append(trial)
    return list(groups.values())


def cut_evenly(trials: Sequence[Trial], at_once: int) -> list[tuple[tuple[Trial, ...], int]]:
    """Cuts trials into batches of at most `at_once`, whose sizes differ by at most one.

    Args:
      trials: the trials.
      at_once: the largest number of trials in a batch.

    Returns:
      The batches, each with the number of slots, which is the size of the largest batch.

    >>> [(len(batch), slots) for batch, slots in cut_evenly(range(7), 3)]
    [(3, 3), (2, 3), (2, 3)]
    """
    count = math.ceil(len(trials) / at_once)
    short, more = divmod(len(trials), count)
    batches, start = [], 0
    for number in range(count):
        end = start + short + (number < more)
        batches.append((tuple(trials[start:end]), short + (more > 0)))
        start = end
    return batches


def memory_limit(gib: float) -> int:
    """Returns the bytes that a batch of trials may take.

    Args:
      gib: the limit in GiB. 0 stands for 95 % of what the first device reports, or 8 GiB if it reports nothing.
    """
    if gib:
        return int(gib * GIB)
    reported = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return int(USABLE * reported) if reported else DEFAULT_LIMIT


def bytes_on_device(tree: Any, placed: Any = None) -> int:
    """Counts the bytes of a tree's arrays on one device.

    Two 4-bit codes share one byte. Random keys are not counted.

    Args:
      tree: a tree of arrays or `jax.ShapeDtypeStruct`s.
      placed: a tree of shardings; None stands for the shardings of the arrays.
    """
    leaves = jax.tree.leaves(tree)
    placed = [leaf.sharding for leaf in leaves] if placed is None else jax.tree.leaves(placed)
    total = 0
    for leaf, sharding in zip(leaves, placed, strict=True):
        if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
            total += -(-math.prod(shape) * jax.dtypes.itemsize_bits(leaf.dtype) // 8)
    return total


def memory_of(compiled: Any) -> int:
    """Returns the bytes that a compiled program needs for its arguments, results and intermediate values.

    Args:
      compiled: a `jax.stages.Compiled`.
    """
    found = compiled.memory_analysis()
    arguments, results = found.argument_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
    return arguments + results + found.temp_size_in_bytes


def largest_batch(needed: Callable[[int], int], shared: int, count: int, limit: int) -> int:
    """Returns the largest number of trials whose program fits in memory.

    Args:
      needed: K -> bytes of the program for K trials; each call compiles a program.
      shared: the bytes that do not grow with K, which are those of the frozen base.
      count: the largest K to consider.
      limit: the bytes that a program may take.

    Raises:
      ValueError: one trial does not fit.
    """
    at_once = count
    while (size := needed(at_once)) > limit:
        if at_once == 1:
            raise ValueError(
                f"one trial needs {size / GIB:.2f} GiB and the limit is {limit / GIB:.2f} GiB: raise "
                "config.train.memory_gib, or lower config.train.batch_size, raise config.train.accumulation, or set "
                "config.train.remat='full'"
            )
        each = max(size - shared, 1) / at_once
        at_once = max(1, min(at_once - 1, int((limit - shared) / each)))
    return at_once

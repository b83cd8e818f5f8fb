"""Which trials train together: groups of one executable, cut into batches that fit in memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence

import jax

from mlora_jax.trials import Trial

GIB = 2**30
# Where a device does not say how much memory it has (a CPU), and the config does not either.
DEFAULT_LIMIT = 8 * GIB
# The share of a device's memory that is planned with: no allocator can hand out the last of it.
USABLE = 0.95


@dataclasses.dataclass(frozen=True)
class TrialBatch:
    """Trials that train together in one executable.

    Attributes:
      name: of its folder of checkpoints.
      trials: in the config's order.
      slots: K, the trials that the executable holds. Batches of one group share K, hence one executable; a batch with
        fewer trials fills its last slots with copies of its last trial, which nobody looks at.
    """

    name: str
    trials: tuple[Trial, ...]
    slots: int

    @property
    def slotted(self) -> tuple[Trial, ...]:
        """One trial per slot, [K]."""
        return self.trials + self.trials[-1:] * (self.slots - len(self.trials))


def group_trials(trials: Sequence[Trial], key: Callable[[Trial], Hashable]) -> list[list[Trial]]:
    """Trials of the same key together, in the order of their first member."""
    groups: dict[Hashable, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(key(trial), []).append(trial)
    return list(groups.values())


def cut_evenly(trials: Sequence[Trial], at_once: int) -> list[tuple[tuple[Trial, ...], int]]:
    """Batches of at most `at_once` trials whose sizes differ by one at most, each with the slots of the largest.

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
    """Bytes that a batch of trials may take: `gib`, or 95 % of what the first device reports, or 8 GiB."""
    if gib:
        return int(gib * GIB)
    reported = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return int(USABLE * reported) if reported else DEFAULT_LIMIT


def bytes_on_device(tree, placed=None) -> int:
    """Bytes of a tree's arrays on one device; two 4-bit codes share one, and keys do not count.

    Args:
      tree: of arrays or `jax.ShapeDtypeStruct`s.
      placed: tree of shardings; None for those of the arrays.
    """
    leaves = jax.tree.leaves(tree)
    placed = [leaf.sharding for leaf in leaves] if placed is None else jax.tree.leaves(placed)
    total = 0
    for leaf, sharding in zip(leaves, placed, strict=True):
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
            total += -(-math.prod(shape) * jax.dtypes.itemsize_bits(leaf.dtype) // 8)
    return total


def memory_of(compiled) -> int:
    """Bytes that a compiled program needs for its arguments, results and intermediate values.

    Args:
      compiled: a `jax.stages.Compiled`.
    """
    found = compiled.memory_analysis()
    arguments, results = found.argument_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
    return arguments + results + found.temp_size_in_bytes


def largest_batch(needed: Callable[[int], int], shared: int, count: int, limit: int) -> int:
    """The largest number of trials whose program fits.

    Args:
      needed: K -> bytes of the program for K trials; each call compiles one.
      shared: bytes that do not grow with K: the frozen base.
      count: the most that is asked for.
      limit: bytes.

    Raises:
      ValueError: one trial does not fit.
    """
    at_once = count
    while (size := needed(at_once)) > limit:
        if at_once == 1:
            raise ValueError(
                f"one trial needs {size / GIB:.2f} GiB and the limit is {limit / GIB:.2f} GiB: raise "
                "config.train.memory_gib, or lower config.train.batch_size, raise config.train.accumulation, or set "
                "config.train.remat=True"
            )
        each = max(size - shared, 1) / at_once
        at_once = max(1, min(at_once - 1, int((limit - shared) / each)))
    return at_once

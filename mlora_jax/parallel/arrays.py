"""Arrays from the host to the mesh and back, for one process or many."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlora_jax.parallel.mesh import ROWS
from mlora_jax.parallel.rules import replicated, rows_sharding, shardings

Tree = Any


class ResumableBatches(Protocol):
    """An iterator over batches whose position can be stored and restored."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> Any:
        """Returns the position of the iterator."""

    def set_state(self, state: Any) -> None:
        """Moves the iterator to a position that `get_state` returned."""


def put(tree: Tree, placed: Tree) -> Tree:
    """Puts the arrays of a tree on devices. With several processes, each of them must hold the same whole arrays.

    Args:
      tree: a tree of arrays.
      placed: a tree of shardings, or one sharding for all arrays.

    Returns:
      The tree with these shardings.
    """
    if isinstance(placed, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: _put(leaf, placed), tree)
    return jax.tree.map(_put, tree, placed)


def _put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return _identity(sharding)(leaf)
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


@functools.lru_cache(maxsize=256)
def _identity(sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def put_replicated(tree: Tree, mesh: Mesh | None) -> Tree:
    """Puts a copy of a tree on every device of the mesh. Without a mesh, the tree is returned unchanged."""
    return tree if mesh is None else put(tree, replicated(mesh))


def put_weights(tree: Tree, mesh: Mesh | None, *, trials: bool = False) -> Tree:
    """Shards a tree of weights by `rules.RULES`. Without a mesh, the tree is returned unchanged.

    Args:
      tree: a tree of arrays.
      mesh: a mesh with all of `mesh.AXES`, or None.
      trials: whether the first axis of every array counts trials.
    """
    return tree if mesh is None else put(tree, shardings(tree, mesh, trials=trials))


def put_rows(
    tree: Tree, mesh: Mesh | None, axis: int, *, trials: bool = False, over: tuple[str, ...] = ("data", "fsdp")
) -> Tree:
    """Shards a tree over the rows of its arrays. Without a mesh, the tree is returned unchanged.

    Args:
      tree: a tree of arrays.
      mesh: a mesh with all of `mesh.AXES`, or None.
      axis: the axis that counts rows in every array.
      trials: whether the first axis of every array counts trials.
      over: the axes of the mesh that the rows are sharded over.
    """
    if mesh is None:
        return tree
    return jax.tree.map(lambda leaf: _put(leaf, rows_sharding(mesh, leaf.ndim, axis, trials=trials, over=over)), tree)


def fetch(tree: Tree) -> Tree:
    """Returns a tree whose arrays this process can read. Arrays of several processes are gathered to each of them."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if not leaf.is_fully_replicated:
            # Arrays on several hosts are all made with a NamedSharding.
            leaf = _identity(replicated(cast(NamedSharding, leaf.sharding).mesh))(leaf)
        return leaf.addressable_data(0)

    return jax.tree.map(one, tree)


def on_one_device(tree: Tree) -> Tree:
    """Returns a tree whose arrays lie unsharded on this process's first device."""
    device = jax.local_devices()[0]

    def one(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(fetch(leaf), device)
        return jax.device_put(np.asarray(fetch(leaf)), device)

    return jax.tree.map(one, tree)


def split_rows(x: Any, axis: int, shards: int) -> Any:
    """Splits the rows of an array into one part per shard, in order. A NumPy array stays a NumPy array.

    Args:
      x: [..., B, ...], an array of NumPy or jax.
      axis: the position of B.
      shards: S, which divides B.

    Returns:
      [S, ..., B / S, ...].
    """
    parts = x.reshape(*x.shape[:axis], shards, x.shape[axis] // shards, *x.shape[axis + 1 :])
    return parts.transpose(axis, *range(axis), *range(axis + 1, parts.ndim))


def local_rows(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Returns the range of a batch's rows that the devices of this process hold.

    Args:
      mesh: the mesh of all processes.
      rows: B, the number of rows over all processes.

    Returns:
      (first, end), two indices into B.
    """
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    bounds = [index[0].indices(rows)[:2] for index in indices if index is not None]
    firsts, ends = zip(*bounds, strict=True)
    return min(firsts), max(ends)


class GlobalBatches:
    """Iterates over the batches of all processes; each process reads only its own shards of them.

    Args:
      batches: an iterator over the batches of a `TrialsPipeline`: arrays [K, shards of this process, ...], and arrays
        with fewer than four axes, which are the same in all processes. It has `get_state` and `set_state`.
      mesh: the mesh of the devices of all processes.
      shards: S, the number of shards over all processes.
      columns: (first, end), the range of the shards of this process.
    """

    def __init__(self, batches: ResumableBatches, mesh: Mesh, shards: int, columns: tuple[int, int]) -> None:
        self._batches, self._mesh, self._shards, self._first = batches, mesh, shards, columns[0]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        return {name: self._placed(array) if array.ndim >= 4 else array for name, array in batch.items()}

    def _placed(self, array: np.ndarray) -> jax.Array:
        shape = (array.shape[0], self._shards, *array.shape[2:])
        sharding = rows_sharding(self._mesh, array.ndim, 1, trials=True)

        def part(index: Any) -> np.ndarray:
            first, end, _ = index[1].indices(self._shards)
            return array[(index[0], slice(first - self._first, end - self._first), *index[2:])]

        return jax.make_array_from_callback(shape, sharding, part)

    def get_state(self) -> Any:
        """Returns the position of the iterator, for `set_state`."""
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        """Moves the iterator to a position that `get_state` returned."""
        self._batches.set_state(state)

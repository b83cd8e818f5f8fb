"""Arrays from the host to the mesh and back, for one process or many."""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlora_jax.parallel.mesh import ROWS
from mlora_jax.parallel.rules import replicated, rows_sharding, shardings


def put(tree, placed):
    """A tree laid out as given; what several processes put there, each of them has the whole of.

    Args:
      tree: of arrays.
      placed: tree of shardings, or one for all.
    """
    if isinstance(placed, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: _put(leaf, placed), tree)
    return jax.tree.map(_put, tree, placed)


def _put(leaf, sharding: jax.sharding.Sharding):
    if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return _identity(sharding)(leaf)
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


@functools.lru_cache(maxsize=256)
def _identity(sharding: jax.sharding.Sharding):
    return jax.jit(lambda x: x, out_shardings=sharding)


def put_replicated(tree, mesh: Mesh | None):
    """A tree on every device; without a mesh as it is."""
    return tree if mesh is None else put(tree, replicated(mesh))


def put_weights(tree, mesh: Mesh | None, *, trials: bool = False):
    """A tree laid out by the rules for paths; without a mesh as it is."""
    return tree if mesh is None else put(tree, shardings(tree, mesh, trials=trials))


def put_rows(tree, mesh: Mesh | None, axis: int, *, trials: bool = False, over=("data", "fsdp")):
    """A tree whose arrays count rows along one axis; without a mesh as it is."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda leaf: _put(leaf, rows_sharding(mesh, leaf.ndim, axis, trials=trials, over=over)), tree)


def fetch(tree):
    """A tree with arrays that this process can read: those that lie on several hosts are gathered to all of them."""

    def one(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if not leaf.is_fully_replicated:
            mesh = leaf.sharding.mesh
            leaf = _identity(replicated(mesh))(leaf)
        return leaf.addressable_data(0)

    return jax.tree.map(one, tree)


def on_one_device(tree):
    """A tree whose arrays lie whole on this process's first device."""
    device = jax.local_devices()[0]

    def one(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(fetch(leaf), device)
        return jax.device_put(np.asarray(fetch(leaf)), device)

    return jax.tree.map(one, tree)


def split_rows(x, axis: int, shards: int):
    """[..., B, ...] as [S, ..., B / S, ...]: one part for each shard, in order. An array of the host stays there."""
    parts = x.reshape(*x.shape[:axis], shards, x.shape[axis] // shards, *x.shape[axis + 1 :])
    return parts.transpose(axis, *range(axis), *range(axis + 1, parts.ndim))


def local_rows(mesh: Mesh, rows: int) -> tuple[int, int]:
    """(first, end) of the rows of a batch that the devices of this process hold, of all B."""
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    bounds = [index[0].indices(rows)[:2] for index in sharding.addressable_devices_indices_map((rows,)).values()]
    firsts, ends = zip(*bounds, strict=True)
    return min(firsts), max(ends)


class GlobalBatches:
    """Batches of all processes, made of the rows that each of them reads.

    Args:
      batches: iterator over arrays [K, M, rows of this process, ...], with `get_state` and `set_state`.
      mesh: of the devices of all processes.
      rows: B, of all processes.
      columns: (first, end) of the rows of this process.
    """

    def __init__(self, batches, mesh: Mesh, rows: int, columns: tuple[int, int]):
        self._batches, self._mesh, self._rows, self._first = batches, mesh, rows, columns[0]

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, jax.Array]:
        return {name: self._placed(array) for name, array in next(self._batches).items()}

    def _placed(self, array: np.ndarray) -> jax.Array:
        shape = (*array.shape[:2], self._rows, *array.shape[3:])
        sharding = rows_sharding(self._mesh, array.ndim, 2, trials=True)

        def part(index):
            first, end, _ = index[2].indices(self._rows)
            return array[(*index[:2], slice(first - self._first, end - self._first), *index[3:])]

        return jax.make_array_from_callback(shape, sharding, part)

    def get_state(self):
        """Where the iterator is."""
        return self._batches.get_state()

    def set_state(self, state) -> None:
        """Goes there."""
        self._batches.set_state(state)

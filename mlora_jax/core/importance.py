"""The importance of every rank-one component of an adapter, and orders of components by it.

A component of a layer is a column of A with its row of B; its part of the layer's function is ``p_i g_i a_i b_i``.
The trees are those of `mlora_jax.core.product`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.core.product import factors_and_scales, wide_dtype
from mlora_jax.core.rank_axes import FACTORS, GATE, A, B, by_parent, path_names

Tree = Any


def component_norms(adapter: Tree, profile: Tree) -> dict[str, jax.Array]:
    """Returns the Frobenius norm of every component, ``|p_i g_i| |a_i| |b_i|``.

    Args:
      adapter: a tree of an adapter's leaves.
      profile: a tree of profiles [..., R] of the function that the components make up.

    Returns:
      A dictionary: the dotted path of a layer -> [..., R], in float32 or wider.
    """
    return {".".join(parent): _norms(*parts) for parent, parts in _parts(adapter, profile).items()}


def order_components(adapter: Tree, profile: Tree) -> tuple[Tree, dict[str, jax.Array]]:
    """Sorts the components of every layer by their norms, the largest first; it is traceable.

    The scale and the gate are multiplied into B, and the new gate is ones. The function at full rank stays, and so does
    every component. A prefix of rank r holds the r components that are largest, which is no best approximation of its
    rank unless the components are orthogonal; `mlora_jax.core.squeeze` makes one.

    Args:
      adapter, profile: as in `component_norms`; one more axis in front holds several adapters.

    Returns:
      The new adapter, with dtypes and shapes as before, and the sorted norms as from `component_norms`.
    """
    made, sorted_norms = {}, {}
    for parent, (a, b, scales) in _parts(adapter, profile).items():
        norms = _norms(a, b, scales)
        order = jnp.argsort(-norms, axis=-1, stable=True)
        scaled = b.astype(norms.dtype) * scales.astype(norms.dtype)[..., None]
        made[parent] = {
            A: jnp.take_along_axis(a, order[..., None, :], axis=-1),
            B: jnp.take_along_axis(scaled, order[..., :, None], axis=-2),
        }
        sorted_norms[".".join(parent)] = jnp.take_along_axis(norms, order, axis=-1)

    def pick(path, leaf):
        *parent, name = path_names(path)
        found = made[tuple(parent)].get(name)
        return jnp.ones_like(leaf) if found is None else found.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(pick, adapter), sorted_norms


def spread_ranks(norms: Mapping[str, Any], rank: int) -> dict[str, np.ndarray]:
    """Spreads a budget of ``rank`` components per layer over all layers: the largest components of all stay.

    Args:
      norms: a dictionary: the path of a layer -> [..., R], sorted from large to small.
      rank: the mean rank of a layer, 0..R.

    Returns:
      A dictionary: path -> ranks [...], integers whose sum is `rank` times the number of layers. Of components with
      equal norms, those that stand further to the front of their layer stay.

    >>> spread_ranks({"up": np.array([3.0, 2.0, 1.0]), "down": np.array([0.5, 0.2, 0.1])}, 2)["up"].tolist()
    3
    """
    rows = {path: np.asarray(each).reshape(-1, np.shape(each)[-1]) for path, each in norms.items()}
    every = np.concatenate(list(rows.values()))  # [layers, R]
    layers, width = every.shape
    columns = np.broadcast_to(np.arange(width), every.shape)
    chosen = np.zeros(every.size, bool)
    chosen[np.lexsort((columns.ravel(), -every.ravel()))[: rank * layers]] = True
    counts, start, found = chosen.reshape(every.shape).sum(axis=1), 0, {}
    for path, each in rows.items():
        found[path] = counts[start : start + len(each)].reshape(np.shape(norms[path])[:-1])
        start += len(each)
    return found


def used_ranks(adapter: Tree) -> dict[str, tuple[int, ...]]:
    """Returns the number of components of every layer that are not zero, in the form of ranks per layer for an export.

    A component is zero if its gate, its column of A or its row of B is. Components of fixed zeros, such as those of a
    start with ranks per layer, may stand anywhere; `order_components` puts them last.

    Args:
      adapter: a tree of an adapter's leaves.

    Returns:
      A dictionary: the dotted path of a layer -> one rank for every layer of its stack.

    >>> used_ranks({"up": {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 4)), "gate": jnp.array([1.0, 0.0])}})
    {'up': (1,)}
    """
    found = {}
    for parent, leaves in by_parent(adapter).items():
        a, b = (np.asarray(leaves[name]) for name in FACTORS)
        alive = np.any(a != 0, axis=-2) & np.any(b != 0, axis=-1)
        if GATE in leaves:
            alive &= np.asarray(leaves[GATE]) != 0
        counts = np.atleast_1d(alive.sum(axis=-1)).ravel()
        found[".".join(parent)] = tuple(counts.tolist())
    return found


def _parts(adapter: Tree, profile: Tree) -> dict[tuple[str, ...], tuple[jax.Array, jax.Array, jax.Array]]:
    factors, profiles = by_parent(adapter), by_parent(profile)
    return {parent: factors_and_scales(parent, factors, profiles) for parent in factors}


def _norms(a: jax.Array, b: jax.Array, scales: jax.Array) -> jax.Array:
    wide = wide_dtype(a.dtype)
    lengths = jnp.linalg.norm(a.astype(wide), axis=-2) * jnp.linalg.norm(b.astype(wide), axis=-1)
    return jnp.abs(scales.astype(wide)) * lengths


def layer_masks(ranks: Mapping[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
    """Returns a dictionary: path -> profiles [..., R] that are 1 in as many entries as the ranks [...] say."""
    return {path: (np.arange(width) < np.asarray(each)[..., None]).astype(np.float32) for path, each in ranks.items()}

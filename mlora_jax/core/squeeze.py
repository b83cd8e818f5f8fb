"""Squeezing, which orders the ranks of an adapter by their importance and does not change its function.

The trees are those of `mlora_jax.core.product`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlora_jax.core.hierarchy import RankHierarchy, powers_of_two
from mlora_jax.core.product import factors_and_scales, initialize_factors, path_hash, wide_dtype
from mlora_jax.core.rank_axes import (
    FACTORS,
    PROFILE,
    adapter_rank,
    by_parent,
    layer_name,
    leading_axes,
    leaf_name,
    path_names,
)

Tree = Any


def squeeze(
    adapter: Tree,
    profile: Tree,
    *,
    ranks: tuple[int, ...] | None = None,
    key: jax.Array | None = None,
    grams: Tree | None = None,
) -> tuple[Tree, RankHierarchy]:
    """Replaces the factors by those of the truncated SVD of ``A B``, which orders the ranks by singular value.

    For every pair with ``A diag(p) B = U diag(s) V^T`` the new factors are ``A' = U sqrt(s)`` and ``B' = sqrt(s) V^T``.
    The function stays the same, and each prefix is its best approximation of that rank (Eckart-Young). A D x F product
    is never formed: the function takes the QR of ``A`` and of ``B^T``, then the SVD of an R x R matrix. If the product
    has a lower rank than R, the remaining columns of A are drawn anew and the remaining rows of B are zero; rounding
    noise is never kept as a direction. A gate is part of the function, ``A diag(p * gate) B``; the new gate is ones.

    With `grams` every prefix is the best approximation of each layer's output on the inputs X of the grams: the SVD is
    taken of ``X A diag(p) B``. The columns of A' are then as long as the rows of B', but no longer orthogonal.

    Args:
      adapter: a tree of an adapter's leaves.
      profile: a tree of profiles [..., R] of the function to preserve. The new factors contain the scale.
      ranks: S of the new hierarchy; None means the powers of two up to R.
      key: a `jax.random.key` for the fresh columns; None means `jax.random.key(0)`.
      grams: a tree with ``H^T H`` under the key ``gram`` [..., R, R] beside every pair. ``H = X A diag(p)``, or
        ``X A diag(p * gate)``, is the input of B. The scale of a gram does not matter. With None, or a gram of zeros,
        all directions of the input have the same importance.

    Returns:
      The new adapter (dtypes and shapes as before) and its hierarchy, whose scaling is "none".

    Raises:
      ValueError: a profile is per example, `ranks` is not a valid S, or a pair has no gram in `grams`.

    Source: Eckart and Young (1936); DRONE (NeurIPS 2021) for the products with inputs.
    """
    squeezed = squeeze_factors(adapter, profile, key=jax.random.key(0) if key is None else key, grams=grams)
    rank = adapter_rank(adapter)
    return squeezed.adapter, RankHierarchy(ranks or powers_of_two(rank), max_rank=rank)


class Squeezed(NamedTuple):
    """New leaves of an adapter, and the matrices by which gradients of the old ones become gradients of the new ones.

    Attributes:
      adapter: tree of the new leaves.
      gradient_maps: tree like it, of matrices M [..., R, R]: ``g_A' = g_A M_A`` and ``g_B' = M_B g_B``. The M of a gate
        is zero: the gradient of the old gate holds the diagonal of an R x R matrix, ``A^T G B^T`` with G the gradient
        of the product, and that of the new gate depends on the other entries too.
    """

    adapter: Tree
    gradient_maps: Tree


def squeeze_factors(
    adapter: Tree, profile: Tree, *, key: jax.Array, grams: Tree | None = None, init: str = "fan_rank"
) -> Squeezed:
    """Does what `squeeze` does, and also returns the matrices that map an optimizer's moments. It is traceable.

    Args:
      adapter, profile, grams: as in `squeeze`; one more axis in front holds several adapters.
      key: a `jax.random.key`, or [K] of them, one for each entry of the first axis of every leaf.
      init: the start of the fresh columns, as in `initialize_factors`.

    Returns:
      The new leaves and the matrices; see `Squeezed`.

    Raises:
      ValueError: a profile is per example, or a pair has no gram in `grams`.
    """
    factors, profiles = by_parent(adapter), by_parent(profile)
    weights = None if grams is None else by_parent(grams)
    new, maps = {}, {}
    for parent, leaves in factors.items():
        a, b, scales = factors_and_scales(parent, factors, profiles)
        if weights is not None and "gram" not in weights.get(parent, {}):
            raise ValueError(f"{layer_name(parent)} lacks its gram")
        gram = None if weights is None else weights[parent]["gram"]
        fold_in = functools.partial(jax.random.fold_in, data=path_hash(".".join(parent)))
        layer_key = jax.vmap(fold_in)(key) if key.ndim else fold_in(key)
        *pair, map_a, map_b = _squeeze_pair(a, b, scales, gram, layer_key, init)
        new[parent] = {name: jnp.ones_like(leaf) for name, leaf in leaves.items()} | dict(
            zip(FACTORS, pair, strict=True)
        )
        maps[parent] = {name: jnp.zeros_like(map_a) for name in leaves} | dict(
            zip(FACTORS, (map_a, map_b), strict=True)
        )

    def pick(found):
        def one(path, leaf):
            *parent, name = path_names(path)
            return found[tuple(parent)][name].astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(one, adapter)

    return Squeezed(pick(new), pick(maps))


def profile_like(adapter: Tree, p: jax.Array) -> Tree:
    """Returns a tree that has the same profile for all layers of an adapter.

    Args:
      adapter: tree of an adapter's leaves.
      p: [R], or [K, R] for an adapter with K trials in front.

    Returns:
      Nested dicts with a profile [..., R] where the adapter has a layer, in the dtype of its A.
    """
    tree: dict = {}
    for parent, leaves in by_parent(adapter).items():
        node = functools.reduce(lambda found, name: found.setdefault(name, {}), parent, tree)
        leading = leading_axes(leaves)
        own = p.reshape(*p.shape[:-1], *(1,) * (len(leading) + 1 - p.ndim), p.shape[-1])
        node[PROFILE] = jnp.broadcast_to(own, (*leading, p.shape[-1])).astype(leaves[FACTORS[0]].dtype)
    return tree


# The name of a leaf -> a function that applies a matrix to its gradient. Both may have leading axes.
_MAPPED = {
    "a": lambda gradient, matrix: jnp.matmul(gradient, matrix, precision="highest"),
    "b": lambda gradient, matrix: jnp.matmul(matrix, gradient, precision="highest"),
    "gate": lambda gradient, matrix: jnp.matmul(gradient[..., None, :], matrix, precision="highest")[..., 0, :],
}


def map_gradients(tree: Tree, gradient_maps: Tree, *, squared: bool = False) -> Tree:
    """Turns gradients of the old leaves, or averages of them, into those of the new leaves. A gate's become zero.

    Args:
      tree: a tree like the adapter, with the gradients or their averages.
      gradient_maps: the tree `Squeezed.gradient_maps`.
      squared: if true, `tree` has averages of squares. The result is then exact only if the gradients of different
        columns are uncorrelated.

    Returns:
      A tree like `tree`, with the same shapes and dtypes.
    """

    def one(path, leaf, gradient_map):
        matrix = jnp.square(gradient_map) if squared else gradient_map
        return _MAPPED[leaf_name(path)](leaf, matrix).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree, gradient_maps)


def _squeeze_pair(a, b, p, gram, key, init: str) -> tuple[jax.Array, ...]:
    leading, rank = a.shape[:-2], a.shape[-1]
    count = math.prod(leading)
    keys = (
        jax.vmap(lambda one: jax.random.split(one, count // len(key)))(key)
        if key.ndim
        else jax.random.split(key, count)
    )
    rows = a.reshape(count, *a.shape[-2:]), b.reshape(count, *b.shape[-2:]), p.reshape(count, rank), keys.reshape(count)
    if gram is not None:
        rows = (*rows, gram.reshape(count, rank, rank))
    one = lambda row: _squeeze_one(init, *row)  # noqa: E731
    one_by_one = functools.partial(jax.lax.map, one)
    # One matrix at a time: on a CPU of few cores, batched factorisations that run side by side wait for each other's
    # threads for ever (each splits its batch over the pool whose threads they all occupy).
    found = jax.lax.platform_dependent(rows, cpu=one_by_one, default=jax.vmap(one))
    return tuple(x.reshape(*leading, *x.shape[1:]) for x in found)


def _squeeze_one(init: str, a, b, p, key, gram=None) -> tuple[jax.Array, ...]:
    """Returns A' [D, R], B' [R, F], and the two gradient maps [R, R]."""
    features_in, rank = a.shape
    wide = wide_dtype(a.dtype)
    a, b, p = a.astype(wide), b.astype(wide), p.astype(wide)
    with jax.default_matmul_precision("highest"):
        q_left, r_left = jnp.linalg.qr(a)  # [D, min(D, R)], [min(D, R), R]
        q_right, r_right = jnp.linalg.qr(b.T)  # [F, min(F, R)], [min(F, R), R]
        scaled = r_left * p[None]
        u, s, vt = jnp.linalg.svd(scaled @ r_right.T, full_matrices=False)
        # The QRs round every column relative to its own length, so the noise in their product is of the size of eps
        # times these products and not eps times the largest singular value. Measured up to R = 256 it stays below 3 of
        # them; a wider margin would throw real directions away.
        lengths = jnp.linalg.norm(scaled, axis=0) * jnp.linalg.norm(r_right, axis=0)  # [R]
        real = s > 8 * jnp.finfo(wide).eps * jnp.linalg.norm(lengths)  # [K]
        root = jnp.sqrt(jnp.where(real, s, 0.0))
        over = jnp.where(real, 1 / jnp.where(real, root, 1.0), 0.0)
        left, right = (q_left @ u) * root[None], (vt @ q_right.T) * root[:, None]
        # With A diag(p) M = A' and B' = N B it is g_A' = g_A diag(1 / p) N^T and g_B' = M^T g_B; these are M and N
        # without an inverse.
        map_a, map_b = r_left.T @ u * over[None], over[:, None] * (vt @ r_right)
        if gram is not None:
            gram = map_b @ gram.astype(wide) @ map_b.T  # of X A' = X A diag(p) M
            left, right, map_a, map_b = _reorder(left, right, map_a, map_b, root, real, gram)
    missing = rank - len(s)  # R above D or F: the product cannot have rank R
    left, map_a = (jnp.pad(x, [(0, 0), (0, missing)]) for x in (left, map_a))
    right, map_b = (jnp.pad(x, [(0, missing), (0, 0)]) for x in (right, map_b))
    fresh, _ = initialize_factors(key, features_in, 1, rank, init=init, dtype=wide)
    return jnp.where(jnp.pad(real, (0, missing))[None], left, fresh), right, map_a, map_b


def _reorder(left, right, map_a, map_b, root, real, gram):
    """Orders squeezed factors by the singular values of X A' B'; `gram` [K, K] is (X A')^T (X A').

    A' = U diag(root) and B' = diag(root) V^T. Directions that are not real stay last.
    """
    gram = jnp.where(jnp.outer(real, real), gram, 0.0)
    # Every real direction gets a value above zero; otherwise one that the inputs never took would mix with unreal ones.
    floor = jnp.finfo(gram.dtype).eps * jnp.trace(gram)
    values, vectors = jnp.linalg.eigh(gram + jnp.diag(jnp.where(real, jnp.where(floor > 0, floor, 1.0), 0.0)))
    half = jnp.sqrt(jnp.maximum(values, 0.0))[:, None] * vectors.T  # half^T half = gram
    _, s, vt = jnp.linalg.svd(half * root[None], full_matrices=False)
    order = jnp.arange(len(s)) < jnp.sum(real)
    s = jnp.where(order, jnp.maximum(s, jnp.finfo(s.dtype).tiny), 1.0)
    over = jnp.where(real, 1 / jnp.where(real, root, 1.0), 0.0)
    mix = (root[:, None] * vt.T) / jnp.sqrt(s)[None]  # A'' = A' mix
    back = jnp.sqrt(s)[:, None] * vt * over[None]  # B'' = back B'
    left, right = left @ mix, back @ right
    longer = jnp.sqrt(
        jnp.linalg.norm(right, axis=1) / jnp.maximum(jnp.linalg.norm(left, axis=0), jnp.finfo(s.dtype).tiny)
    )
    gauge = jnp.where(order & (longer > 0), longer, 1.0)
    right = jnp.where(order[:, None], right / gauge[:, None], 0.0)
    return left * gauge[None], right, map_a @ back.T / gauge[None], gauge[:, None] * (mix.T @ map_b)

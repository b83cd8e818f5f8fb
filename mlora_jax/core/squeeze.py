"""Factors ordered by what each is worth, the function unchanged.

The trees are those of `mlora_jax.core.product`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlora_jax.core.hierarchy import RankHierarchy, powers_of_two
from mlora_jax.core.product import by_parent, initialize_factors, pair_with_profile, path_hash, path_names

Tree = Any


def squeeze(
    adapter: Tree,
    profile: Tree,
    *,
    ranks: tuple[int, ...] | None = None,
    key: jax.Array | None = None,
    grams: Tree | None = None,
) -> tuple[Tree, RankHierarchy]:
    """The same function with its factors ordered by singular value.

    For every pair ``A diag(p) B = U diag(s) V^T`` becomes ``A' = U sqrt(s)``, ``B' = sqrt(s) V^T``, so each prefix of
    the new adapter is the best approximation of its rank (Eckart-Young). A D x F product is never formed: QR of ``A``
    and of ``B^T``, then the SVD of an R x R matrix. Where the product has a lower rank than R, the left-over columns of
    A are drawn afresh and the rows of B are zero; rounding noise is never kept as a direction.

    With `grams` it is each layer's output on the inputs X behind them that every prefix approximates best: the SVD is
    that of ``X A diag(p) B``. Columns of A' are then as long as the rows of B', but no longer orthogonal.

    Args:
      adapter: tree of factors.
      profile: tree of profiles [..., R]; the function to keep. The scale ends up inside the factors.
      ranks: S of the new hierarchy; None means the powers of two up to R.
      key: `jax.random.key` for the fresh columns; None means `jax.random.key(0)`.
      grams: tree with ``H^T H`` under the key ``gram`` [..., R, R] beside every pair, ``H = X A diag(p)`` being what B
        is given; in any scale. None weights all directions of the input alike, and so does a gram of zeros.

    Returns:
      The new adapter (dtypes and shapes as before) and its hierarchy, whose scaling is "none".

    Raises:
      ValueError: a profile is per example; `ranks` is no valid S; a pair without its gram.

    Source: Eckart and Young (1936); DRONE (NeurIPS 2021) for the products with inputs.
    """
    squeezed = squeeze_factors(adapter, profile, key=jax.random.key(0) if key is None else key, grams=grams)
    max_rank = {pair["a"].shape[-1] for pair in by_parent(adapter).values()}
    if len(max_rank) != 1:
        raise ValueError(f"squeeze needs one R for the whole adapter, got {sorted(max_rank)}")
    (rank,) = max_rank
    return squeezed.adapter, RankHierarchy(ranks or powers_of_two(rank), max_rank=rank)


class Squeezed(NamedTuple):
    """New factors, and how gradients with respect to the old ones become gradients with respect to them.

    Attributes:
      adapter: tree of factors.
      turns: tree like it, of [..., R, R] matrices: ``g_A' = g_A turn_a`` and ``g_B' = turn_b g_B``.
    """

    adapter: Tree
    turns: Tree


def squeeze_factors(
    adapter: Tree, profile: Tree, *, key: jax.Array, grams: Tree | None = None, init: str = "fan_rank"
) -> Squeezed:
    """What `squeeze` does, with what an optimizer's state needs to follow; traceable.

    Args:
      adapter, profile, grams: as `squeeze`; one axis more in front holds several adapters.
      key: a `jax.random.key`, or [K] of them, one for each entry of the first axis of every factor.
      init: of the fresh columns, as `initialize_factors`.
    """
    factors, profiles = by_parent(adapter), by_parent(profile)
    weights = None if grams is None else by_parent(grams)
    done = {}
    for parent in factors:
        a, b, p = pair_with_profile(parent, factors, profiles)
        if weights is not None and "gram" not in weights.get(parent, {}):
            raise ValueError(f"{'.'.join(parent) or 'the adapter'} lacks its gram")
        gram = None if weights is None else weights[parent]["gram"]
        fold_in = functools.partial(jax.random.fold_in, data=path_hash(".".join(parent)))
        done[parent] = _squeeze_pair(a, b, p, gram, jax.vmap(fold_in)(key) if key.ndim else fold_in(key), init)

    def pick(offset):
        def one(path, leaf):
            *parent, name = path_names(path)
            return done[tuple(parent)][offset + "ab".index(name)].astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(one, adapter)

    return Squeezed(pick(0), pick(2))


def profile_like(adapter: Tree, p: jax.Array) -> Tree:
    """One profile for all layers, as a tree of profiles beside the pairs of an adapter.

    Args:
      adapter: tree of factors.
      p: [R], or [K, R] for an adapter with K trials in front.

    Returns:
      Nested dicts with ``p`` [..., R] where the adapter has a pair, in the dtype of its A.
    """
    tree: dict = {}
    for parent, pair in by_parent(adapter).items():
        node = tree
        for name in parent:
            node = node.setdefault(name, {})
        *leading, _, rank = pair["a"].shape
        own = p.reshape(*p.shape[:-1], *(1,) * (len(leading) + 1 - p.ndim), rank)
        node["p"] = jnp.broadcast_to(own, (*leading, rank)).astype(pair["a"].dtype)
    return tree


def map_gradients(tree: Tree, turns: Tree, *, squared: bool = False) -> Tree:
    """Gradients of the old factors, or averages of them, as gradients of the new ones.

    Args:
      tree: like the adapter.
      turns: of `Squeezed`.
      squared: whether `tree` holds averages of squares. Those follow exactly only if the gradients of different columns
        are uncorrelated.
    """

    def one(path, leaf, turn):
        turn = jnp.square(turn) if squared else turn
        both = (leaf, turn) if path_names(path)[-1] == "a" else (turn, leaf)
        return jnp.matmul(*both, precision="highest").astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree, turns)


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
    """A' [D, R], B' [R, F], and the turns [R, R] of their gradients."""
    features_in, rank = a.shape
    wide = jnp.promote_types(a.dtype, jnp.float32)
    a, b, p = a.astype(wide), b.astype(wide), p.astype(wide)
    with jax.default_matmul_precision("highest"):
        q_left, r_left = jnp.linalg.qr(a)  # [D, min(D, R)], [min(D, R), R]
        q_right, r_right = jnp.linalg.qr(b.T)  # [F, min(F, R)], [min(F, R), R]
        scaled = r_left * p
        u, s, vt = jnp.linalg.svd(scaled @ r_right.T, full_matrices=False)
        # The QRs round every column relative to its own length, so the noise in their product is of the size of eps
        # times these products and not eps times the largest singular value. Measured up to R = 256 it stays below 3 of
        # them; a wider margin would throw real directions away.
        lengths = jnp.linalg.norm(scaled, axis=0) * jnp.linalg.norm(r_right, axis=0)  # [R]
        real = s > 8 * jnp.finfo(wide).eps * jnp.linalg.norm(lengths)  # [K]
        root = jnp.sqrt(jnp.where(real, s, 0.0))
        over = jnp.where(real, 1 / jnp.where(real, root, 1.0), 0.0)
        left, right = (q_left @ u) * root, (vt @ q_right.T) * root[:, None]
        # With A diag(p) M = A' and B' = N B it is g_A' = g_A diag(1 / p) N^T and g_B' = M^T g_B; these are M and N
        # without an inverse.
        turn_a, turn_b = r_left.T @ u * over, over[:, None] * (vt @ r_right)
        if gram is not None:
            gram = turn_b @ gram.astype(wide) @ turn_b.T  # of X A' = X A diag(p) M
            left, right, turn_a, turn_b = _reorder(left, right, turn_a, turn_b, root, real, gram)
    missing = rank - len(s)  # R above D or F: the product cannot have rank R
    left, turn_a = (jnp.pad(x, [(0, 0), (0, missing)]) for x in (left, turn_a))
    right, turn_b = (jnp.pad(x, [(0, missing), (0, 0)]) for x in (right, turn_b))
    fresh, _ = initialize_factors(key, features_in, 1, rank, init=init, dtype=wide)
    return jnp.where(jnp.pad(real, (0, missing)), left, fresh), right, turn_a, turn_b


def _reorder(left, right, turn_a, turn_b, root, real, gram):
    """Orders squeezed factors by the singular values of X A' B'; `gram` [K, K] is (X A')^T (X A').

    A' = U diag(root) and B' = diag(root) V^T. Directions that are not real stay last.
    """
    gram = jnp.where(jnp.outer(real, real), gram, 0.0)
    # No real direction is without worth: one that the inputs never took would mix with those that do not exist.
    floor = jnp.finfo(gram.dtype).eps * jnp.trace(gram)
    values, vectors = jnp.linalg.eigh(gram + jnp.diag(jnp.where(real, jnp.where(floor > 0, floor, 1.0), 0.0)))
    half = jnp.sqrt(jnp.maximum(values, 0.0))[:, None] * vectors.T  # half^T half = gram
    _, s, vt = jnp.linalg.svd(half * root, full_matrices=False)
    order = jnp.arange(len(s)) < jnp.sum(real)
    s = jnp.where(order, jnp.maximum(s, jnp.finfo(s.dtype).tiny), 1.0)
    over = jnp.where(real, 1 / jnp.where(real, root, 1.0), 0.0)
    mix = (root[:, None] * vt.T) / jnp.sqrt(s)  # A'' = A' mix
    back = jnp.sqrt(s)[:, None] * vt * over  # B'' = back B'
    left, right = left @ mix, back @ right
    longer = jnp.sqrt(
        jnp.linalg.norm(right, axis=1) / jnp.maximum(jnp.linalg.norm(left, axis=0), jnp.finfo(s.dtype).tiny)
    )
    gauge = jnp.where(order & (longer > 0), longer, 1.0)
    right = jnp.where(order[:, None], right / gauge[:, None], 0.0)
    return left * gauge, right, turn_a @ back.T / gauge, gauge[:, None] * (mix.T @ turn_b)

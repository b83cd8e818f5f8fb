"""The start of EVA: A holds the principal directions of a layer's inputs, and layers share a budget of ranks."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mlora_jax.core.product import wide_dtype

Parent = tuple[str, ...]
RHO = 2  # the largest rank of a layer, relative to the mean rank; the default of the authors and of PEFT


def eva_columns(statistics: Mapping[Parent, jax.Array], rank: int) -> dict[Parent, jax.Array]:
    """Returns A of every layer: the largest principal directions of its inputs, as many as the layer's rank.

    The covariance of the inputs X of a layer is ``V diag(v) V^T``, and a direction explains ``v_i / sum(v)`` of it. The
    rank / RHO directions per layer that explain the most of all layers' directions are kept, at most `rank` in one
    layer. The columns of A beyond a layer's rank are zero, and so are the rows of B at the start; no gradient moves
    such a column, so the layer keeps its rank.

    Args:
      statistics: a dictionary: layer -> ``(X, 1)^T (X, 1)`` [..., D + 1, D + 1], over at least two inputs.
      rank: R, the largest rank of a layer.

    Returns:
      A dictionary: layer -> A [..., D, R] in float32 or wider, whose columns have length 1 or 0.

    Source: EVA, arXiv 2410.07170, sections 3.2 and 3.3, with rho = 2; PEFT's incremental PCA for the mean, which is
    taken away, and for the share that is explained. The order of the layers decides between equal shares; PEFT's order
    of equal shares is not defined, and it swaps ranks among layers that have the same inputs.
    """
    directions, shares = {}, {}
    for parent, gram in statistics.items():
        values, vectors = _principal(gram.astype(wide_dtype(gram.dtype)))
        total = jnp.maximum(jnp.sum(values, axis=-1, keepdims=True), jnp.finfo(values.dtype).tiny)
        # A direction that does not exist, where R is above D, explains less than any that does.
        shares[parent] = _first(values / total, rank, -1.0)
        directions[parent] = _first(vectors, rank, 0.0)
    every = jnp.concatenate([share.reshape(-1) for share in shares.values()])
    budget = (every.size // rank) * (rank // RHO)
    kept = jnp.zeros(every.size, bool).at[jnp.argsort(-every, stable=True)[:budget]].set(True)
    made, start = {}, 0
    for parent, share in shares.items():
        own = kept[start : start + share.size].reshape(share.shape)
        made[parent] = jnp.where(own[..., None, :], directions[parent], 0.0)
        start += share.size
    return made


def _first(x: jax.Array, rank: int, fill: float) -> jax.Array:
    """Returns the first R entries along the last axis, with a fill for those that are missing."""
    missing = max(rank - x.shape[-1], 0)
    return jnp.pad(x[..., :rank], [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=fill)


def _principal(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the variances [..., D], falling, and the principal directions [..., D, D] as columns."""
    rows = gram.reshape(-1, *gram.shape[-2:])
    # One matrix at a time on a CPU, for the reason that `mlora_jax.core.squeeze` gives.
    mapped = functools.partial(jax.lax.map, _principal_of_one)
    values, vectors = jax.lax.platform_dependent(rows, cpu=mapped, default=jax.vmap(_principal_of_one))
    features = values.shape[-1]
    return values.reshape(*gram.shape[:-2], features), vectors.reshape(*gram.shape[:-2], features, features)


def _principal_of_one(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = jnp.maximum(gram[-1, -1], 1.0)
    mean = gram[:-1, -1] / count
    values, vectors = jnp.linalg.eigh(gram[:-1, :-1] / count - jnp.outer(mean, mean))
    return jnp.maximum(values[::-1], 0.0), vectors[:, ::-1]

"""The randomised SVD of an adapter's function, at its rank or cut to a smaller one.

The trees are those of `mlora_jax.core.product`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from mlora_jax.core.product import factors_and_scales, initialize_factors, path_hash, wide_dtype
from mlora_jax.core.rank_axes import FACTORS, by_parent, path_names

Tree = Any


def squeeze_randomized(
    adapter: Tree, profile: Tree, *, share: float, key: jax.Array, oversampling: int = 10, iterations: int = 2
) -> Tree:
    """Replaces the factors by those of a randomised SVD of ``M = A diag(p) B``, cut to a share of the rank.

        Y = M Omega,  Omega [F, r + oversampling] normal;  `iterations` times: Y = M M^T Q(Y), Q the factor of a QR
        Q(Y)^T M = U diag(s) V^T;   A' = Q U sqrt(s),  B' = sqrt(s) V^T

    M is never formed. The first r = share R columns hold the r largest directions that were found, in the order of s,
    and the others are zero in both factors, so that no gradient ever moves them. With share 1 the function stays, and
    directions that M does not have get fresh columns of A with rows of zeros in B, as in `mlora_jax.core.squeeze`. A
    gate is part of M, and the new gate is ones.

    Args:
      adapter: a tree of an adapter's leaves; one more axis in front holds several adapters.
      profile: a tree of profiles [..., R] of the function; the new factors contain the scale.
      share: the share of R that stays, in (0, 1]; at least one column stays.
      key: a `jax.random.key` for Omega and the fresh columns, or [K] of them.
      oversampling: the number of directions that are drawn beyond r.
      iterations: the number of power iterations.

    Returns:
      The new adapter, with dtypes and shapes as before.

    Source: LoRA-Squeeze, arXiv 2602.10993; Halko, Martinsson and Tropp (2011), algorithms 4.4 and 5.1. The numbers of
    the LoRA-Squeeze authors for oversampling and iterations are not public in what we could read; 10 and 2 are those
    that Halko et al. recommend.
    """
    factors, profiles, made = by_parent(adapter), by_parent(profile), {}
    for parent, leaves in factors.items():
        a, b, scales = factors_and_scales(parent, factors, profiles)
        rank, leading = a.shape[-1], a.shape[:-2]
        count, target = math.prod(leading), max(1, round(share * rank))
        size = min(target + oversampling, rank, *a.shape[-2:-1], *b.shape[-1:])
        fold_in = functools.partial(jax.random.fold_in, data=path_hash(".".join(parent)))
        layer_key = jax.vmap(fold_in)(key) if key.ndim else fold_in(key)[None]
        split = functools.partial(jax.random.split, num=count // len(layer_key))
        keys = jax.vmap(split)(layer_key).reshape(count)
        rows = keys, a.reshape(count, *a.shape[-2:]), b.reshape(count, *b.shape[-2:]), scales.reshape(count, rank)
        one = functools.partial(_one, target=target, size=size, iterations=iterations)
        mapped = functools.partial(jax.lax.map, lambda row, one=one: one(*row))
        # One matrix at a time on a CPU, for the reason that `mlora_jax.core.squeeze` gives.
        found = jax.lax.platform_dependent(rows, cpu=mapped, default=jax.vmap(lambda row, one=one: one(*row)))
        pair = (x.reshape(*leading, *x.shape[1:]) for x in found)
        made[parent] = {name: jnp.ones_like(leaf) for name, leaf in leaves.items()} | dict(
            zip(FACTORS, pair, strict=True)
        )

    def pick(path, leaf):
        *parent, name = path_names(path)
        return made[tuple(parent)][name].astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(pick, adapter)


def _one(key, a, b, scales, *, target: int, size: int, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Returns A' [D, R] and B' [R, F] of one pair; `size` directions are drawn."""
    wide, rank = wide_dtype(a.dtype), a.shape[-1]
    left, right = a.astype(wide) * scales.astype(wide)[None], b.astype(wide)
    draw, fresh_key = jax.random.split(key)
    with jax.default_matmul_precision("highest"):
        basis, _ = jnp.linalg.qr(left @ (right @ jax.random.normal(draw, (right.shape[-1], size), wide)))
        for _ in range(iterations):
            beside, _ = jnp.linalg.qr(right.T @ (left.T @ basis))  # [F, size]
            basis, _ = jnp.linalg.qr(left @ (right @ beside))
        small = (basis.T @ left) @ right  # [size, F]
        q, r = jnp.linalg.qr(small.T)
        u, s, vt = jnp.linalg.svd(r.T, full_matrices=False)
        lengths = jnp.linalg.norm(left, axis=0) * jnp.linalg.norm(right, axis=1)
        real = (s > 8 * jnp.finfo(wide).eps * jnp.linalg.norm(lengths)) & (jnp.arange(len(s)) < target)
        root = jnp.sqrt(jnp.where(real, s, 0.0))
        new_a, new_b = (basis @ u) * root[None], root[:, None] * (vt @ q.T)
    missing = rank - len(s)
    real = jnp.pad(real, (0, missing))
    new_a, new_b = jnp.pad(new_a, [(0, 0), (0, missing)]), jnp.pad(new_b, [(0, missing), (0, 0)])
    fresh, _ = initialize_factors(fresh_key, a.shape[0], 1, rank, dtype=wide)
    alive = jnp.arange(rank) < target
    return jnp.where(real[None], new_a, jnp.where(alive[None], fresh, 0.0)), new_b

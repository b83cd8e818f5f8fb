"""Starts of the factors that are made from the frozen kernel and are taken out of it.

Such a method trains ``x (W - A0 B0) + x A B`` from ``A = A0, B = B0`` on. The frozen kernel is shared by all trials and
is never changed here. Instead, an adapter of rank R trains its first R/2 columns, and its other R/2 columns hold A0 and
-B0 and stay as they are: ``x W + x A B - x A0 B0`` is the same function. The update rule "lower_half" belongs to these
starts. The adapter is a plain one at all times: it reads out, squeezes and exports as any other of rank R.

All functions take a kernel [..., D, F] and the profile p [R] of the trained function, and return leaves by name, whose
R is that of p. If R is odd, the last column is zero. R/2 must not exceed D and F.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mlora_jax.core.product import wide_dtype
from mlora_jax.core.rank_axes import GATE, A, B


def _one_by_one(factorise, kernels: jax.Array):
    """Applies a factorisation to kernels [..., D, F]; a CPU takes one at a time, see `mlora_jax.core.squeeze`."""
    rows = kernels.reshape(-1, *kernels.shape[-2:])
    mapped = functools.partial(jax.lax.map, factorise)
    found = jax.lax.platform_dependent(rows, cpu=mapped, default=jax.vmap(factorise))
    return tuple(x.reshape(*kernels.shape[:-2], *x.shape[1:]) for x in found)


def _svd(kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
    return u, s, vt


def _half(kernel: jax.Array, p: jax.Array) -> int:
    half, most = p.shape[-1] // 2, min(kernel.shape[-2:])
    if not 1 <= half <= most:
        raise ValueError(
            f"a start from a kernel of shape {kernel.shape[-2:]} takes R/2 of its directions, at most {most}; got R = "
            f"{p.shape[-1]}"
        )
    return half


def _filled(columns: jax.Array, rank: int, axis: int) -> jax.Array:
    """Returns an array with zeros behind its entries along an axis, R in all."""
    widths = [(0, 0)] * columns.ndim
    widths[axis] = (0, rank - columns.shape[axis])
    return jnp.pad(columns, widths)


def _over(s: jax.Array, p: jax.Array) -> jax.Array:
    """Returns singular values [..., R/2] divided by the first entries of the profile."""
    return s / jnp.broadcast_to(p[: s.shape[-1]].astype(s.dtype), s.shape)


def _taken_out(a: jax.Array, b: jax.Array, p: jax.Array) -> dict[str, jax.Array]:
    """Returns A and B of rank R from those of rank R/2: with the profile p the second half cancels the first."""
    half, rank = a.shape[-1], p.shape[-1]
    ratio = jnp.broadcast_to((p[:half] / p[half : 2 * half]).astype(b.dtype)[:, None], b.shape)
    pair_a, pair_b = jnp.concatenate([a, a], axis=-1), jnp.concatenate([b, -b * ratio], axis=-2)
    return {A: _filled(pair_a, rank, a.ndim - 1), B: _filled(pair_b, rank, b.ndim - 2)}


def pissa_start(kernel: jax.Array, p: jax.Array) -> dict[str, jax.Array]:
    """PiSSA: with ``W = U diag(s) V^T``, ``A0 = U sqrt(s / p)`` and ``B0 = sqrt(s / p) V^T`` of the R/2 largest s.

    The function at the start is the base model: ``p A0 B0 - p A0 B0 = 0``.

    Args:
      kernel: [..., D, F].
      p: [R], above zero.

    Returns:
      {"a": [..., D, R], "b": [..., R, F]} in the wide dtype of the kernel.

    Raises:
      ValueError: R/2 is below 1, or above D or F.

    Source: PiSSA, arXiv 2404.02948, equations 2 to 4. The SVD is the exact one, which PEFT calls "pissa".
    """
    half = _half(kernel, p)
    u, s, vt = _one_by_one(_svd, kernel.astype(wide_dtype(kernel.dtype)))
    root = jnp.sqrt(_over(s[..., :half], p))
    return _taken_out(u[..., :half] * root[..., None, :], root[..., None] * vt[..., :half, :], p)


def olora_start(kernel: jax.Array, p: jax.Array) -> dict[str, jax.Array]:
    """OLoRA: with ``W^T = Q R``, ``A0`` are the first R/2 rows of R, transposed, and ``B0`` the columns of Q.

    Args, returned values, errors: as `pissa_start`. B0 has orthonormal rows.

    Source: OLoRA, arXiv 2406.01775, and PEFT, which takes ``s A0 B0`` out of W where s is the adapter's scale.
    """
    half = _half(kernel, p)

    def factorise(one):
        q, r = jnp.linalg.qr(one.T)
        return r.T, q.T

    a, b = _one_by_one(factorise, kernel.astype(wide_dtype(kernel.dtype)))
    return _taken_out(a[..., :half], b[..., :half, :], p)


def svfit_start(kernel: jax.Array, p: jax.Array) -> dict[str, jax.Array]:
    """SVFit: ``W = U diag(s) V^T``, of which the R/2 largest s are trained alone: ``A = U``, ``B = V^T``, gate = s / p.

    The update rule "lower_half_gates" belongs to this start.

    Args, errors: as `pissa_start`.

    Returns:
      {"a": [..., D, R], "b": [..., R, F], "gate": [..., R]}.

    Source: SVFit, arXiv 2409.05926.
    """
    half = _half(kernel, p)
    u, s, vt = _one_by_one(_svd, kernel.astype(wide_dtype(kernel.dtype)))
    made = _taken_out(u[..., :half], vt[..., :half, :], p)
    values = jnp.concatenate([_over(s[..., :half], p)] * 2, axis=-1)
    return {**made, GATE: _filled(values, p.shape[-1], values.ndim - 1)}

"""Orthogonal matrices as smooth functions of free ones, so that gradient steps cannot leave the orthogonal group."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def cayley(free: jax.Array) -> jax.Array:
    """Returns the Cayley transform of the skew-symmetric part of a matrix.

        Q = (I - S)^-1 (I + S),   S = (X - X') / 2

    Q is orthogonal for every X, and X = 0 gives the identity. I - S is never singular.

    Args:
      free: X [..., N, N], float32 or better.

    Returns:
      [..., N, N] in the dtype of X.

    Source: Cayley (1846); Helfrich et al. (arXiv 1707.09520) for training by it.

    >>> q = cayley(jnp.array([[0.0, 2.0], [0.0, 0.0]]))
    >>> bool(jnp.allclose(q @ q.T, jnp.eye(2), atol=1e-6))
    True
    """
    skew = (free - jnp.swapaxes(free, -1, -2)) / 2
    identity = jnp.broadcast_to(jnp.eye(free.shape[-1], dtype=free.dtype), free.shape)
    return jnp.linalg.solve(identity - skew, identity + skew)


def turned(start: jax.Array, free: jax.Array) -> jax.Array:
    """Returns the orthogonal matrices U_0 cayley(X) [..., N, N], which are U_0 where X is zero."""
    return jnp.matmul(start, cayley(free), precision=jax.lax.Precision.HIGHEST)


def orthogonality_error(u: np.ndarray | jax.Array) -> float:
    """Returns the largest entry of |U' U - I| over all matrices [..., N, N], computed in float64.

    >>> orthogonality_error(np.eye(3)[None])
    0.0
    """
    wide = np.asarray(u, np.float64)
    return float(np.abs(np.swapaxes(wide, -1, -2) @ wide - np.eye(wide.shape[-1])).max())

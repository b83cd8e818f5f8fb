"""Where the projections start: the principal components of each head's keys and values.

Axes: B batch, T time, L layer, KV key and value heads, Hd features of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlora_jax.kv_cache.attention import Projections
from mlora_jax.models.decoder import Decoder
from mlora_jax.models.decoder_layers import StackedCache


def principal_components(model: Decoder, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Projections:
    """Returns the principal components of the rotated keys and of the values, by falling variance.

    Both are centred. For keys this is right because a part that all keys share adds the same number to all scores of
    a query.

    Args:
      model: the decoder, without projections.
      batches: pairs of tokens int32 [B, T], one text per row, and the number of tokens of each row, int32 [B].

    Returns:
      The projections, in float32.

    Raises:
      ValueError: there are no tokens.
    """
    graphdef, state = nnx.split(model)

    @jax.jit
    def moments(state: Any, tokens: jax.Array, lengths: jax.Array) -> dict[str, jax.Array]:
        _, kept = nnx.merge(graphdef, state).prefill(tokens, tokens.shape[1], stacked=True)
        counted = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.float32)
        found = {"count": jnp.sum(counted)}
        keys, values = cast(StackedCache, kept)[:2]
        for name, x in (("k", keys.swapaxes(3, 4)), ("v", values)):  # [L, B, KV, T, Hd]
            x = x.astype(jnp.float32) * counted[None, :, None, :, None]
            found[f"{name}_sum"] = jnp.sum(x, axis=(1, 3))
            found[f"{name}_gram"] = jnp.einsum("lbktd,lbkte->lkde", x, x, precision=jax.lax.Precision.HIGHEST)
        return found

    total: dict[str, np.ndarray] | None = None
    for tokens, lengths in batches:
        found = {name: np.asarray(x, np.float64) for name, x in moments(state, tokens, lengths).items()}
        total = found if total is None else {name: total[name] + found[name] for name in found}
    if total is None or not total["count"]:
        raise ValueError("there is no text to take principal components of")
    bases = {}
    for name in ("k", "v"):
        mean = total[f"{name}_sum"] / total["count"]
        covariance = total[f"{name}_gram"] / total["count"] - mean[..., :, None] * mean[..., None, :]
        _, vectors = np.linalg.eigh(covariance)
        bases[name] = vectors[..., ::-1].astype(np.float32), mean.astype(np.float32)
    return Projections(bases["k"][0], bases["v"][0], bases["v"][1])

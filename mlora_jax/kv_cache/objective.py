"""The loss of a cut model: its divergence from the full model, and the cross-entropy of the text.

Both are sums over the tokens that a packed row predicts. Logits exist for one chunk of positions at a time.

Axes: B batch, T time, D hidden, V vocabulary, N positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Sums(NamedTuple):
    """Sums over the predicted tokens of a batch, float32 scalars.

    Attributes:
      divergence: KL(full || cut) of the next token, in nats.
      cross_entropy: minus the log-likelihood of the text's own next token, in nats.
      count: the number of predicted tokens.
    """

    divergence: jax.Array
    cross_entropy: jax.Array
    count: jax.Array

    def loss(self, kl_weight: float | jax.Array) -> jax.Array:
        """Returns the weighted mean per token: w KL + (1 - w) cross-entropy."""
        return (kl_weight * self.divergence + (1.0 - kl_weight) * self.cross_entropy) / jnp.maximum(self.count, 1.0)


def distillation_sums(
    model: Any, hidden: jax.Array, full: jax.Array, tokens: jax.Array, segments: jax.Array, *, chunk: int
) -> Sums:
    """Compares a cut model with the full one on packed rows.

    The function is differentiable with respect to `hidden`. A chunk's logits are computed again in the backward pass.

    Args:
      model: a decoder, whose head both models share.
      hidden: [B, T, D], the states of the cut model.
      full: [B, T, D], those of the full model; no gradient reaches them.
      tokens: int32 [B, T].
      segments: int32 [B, T].
      chunk: the number of positions whose logits exist at one time.
    """
    counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    arrays = hidden[:, :-1], jax.lax.stop_gradient(full)[:, :-1], tokens[:, 1:], counted
    chunks = [_in_chunks(x.reshape(-1, *x.shape[2:]), chunk) for x in arrays]

    @jax.checkpoint
    def add(sums: Sums, xs: Any) -> tuple[Sums, None]:
        mine, theirs, targets, counted = xs
        log_p = jax.nn.log_softmax(model.head(mine))  # [N, V]
        log_q = jax.nn.log_softmax(model.head(theirs))
        divergence = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
        own = -jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
        more = (jnp.sum(jnp.where(counted, each, 0.0)) for each in (divergence, own, jnp.ones_like(own)))
        return Sums(*map(jnp.add, sums, more)), None

    none = jnp.zeros((), model.wide_dtype)
    return jax.lax.scan(add, Sums(none, none, none), chunks)[0]


def _in_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """Reshapes x [N, ...] into [chunks, chunk, ...], padded with zeros at the end."""
    x = jnp.pad(x, [(0, -len(x) % chunk)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])

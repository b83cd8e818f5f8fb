"""The next token from logits: the likeliest, or a draw that depends on its request and step alone."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlora_jax.core.ranges import LARGEST_FLOAT, SEEDS

NOT_FINITE = -2  # stands for a token where the largest logit is not finite


class Sampling(NamedTuple):
    """How tokens are drawn. The options are data, so that a new temperature does not compile a new executable.

    Attributes:
      key: a `jax.random.key`.
      temperature: a scalar above 0 that divides the logits.
      top_p: a scalar in (0, 1]: a token is drawn from the likeliest tokens that together have this probability.
    """

    key: jax.Array
    temperature: jax.Array
    top_p: jax.Array


def make_sampling(temperature: float, top_p: float, seed: int) -> Sampling | None:
    """Checks the options of a draw and makes them data.

    Returns:
      The options, or None for a temperature of 0, which is greedy.

    Raises:
      ValueError: a temperature that is negative or not finite, a top_p outside (0, 1], or a seed outside 32 bits.
    """
    if not 0 <= temperature <= LARGEST_FLOAT:
        raise ValueError(f"temperature must be finite and at least 0 (greedy), got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    SEEDS.check("seed", seed)
    if not temperature:
        return None
    # A top_p that would be 0 in float32 becomes the smallest positive number, which keeps the likeliest token alone.
    least = jnp.finfo(jnp.float32).tiny
    return Sampling(
        jax.random.key(seed), jnp.asarray(temperature, jnp.float32), jnp.asarray(max(top_p, least), jnp.float32)
    )


def next_tokens(logits: jax.Array, sampling: Sampling | None, numbers: jax.Array, step: jax.Array) -> jax.Array:
    """One token for every row.

        token ~ softmax(logits / temperature), cut to the nucleus;  key = fold_in(fold_in(key, number), step)

    Args:
      logits: [B, V], float32 at least.
      sampling: how to draw; None takes the likeliest token, and the first of equally likely ones.
      numbers: [B] int32, the numbers of the requests. A row's draw depends on its own logits, number and step only.
      step: [B] int32 or a scalar, the number of tokens that each row made before this one.

    Returns:
      [B] int32; `NOT_FINITE` where the largest logit is infinite or NaN (the largest of NaN and others is NaN).

    Source: top-p is the nucleus of Holtzman et al. (arXiv 1904.09751), after the temperature as in transformers.

    >>> next_tokens(jnp.array([[0.0, 2.0, 1.0]]), None, jnp.array([0]), 0).tolist()
    [1]
    """
    largest = jnp.max(logits, axis=-1)
    if sampling is None:
        # The first of the largest. A CPU computes this several times faster than an argmax.
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        tokens = jnp.min(jnp.where(logits == largest[:, None], ids, logits.shape[-1]), axis=-1)
    else:
        # With the largest logit at 0, even a very small temperature cannot make infinities of different signs.
        cold = jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)
        scaled = (logits - largest[:, None]) / cold
        scaled = jax.lax.cond(sampling.top_p < 1, nucleus, lambda scaled, _: scaled, scaled, sampling.top_p)
        one = lambda number, step: jax.random.fold_in(jax.random.fold_in(sampling.key, number), step)  # noqa: E731
        keys = jax.vmap(one)(numbers, jnp.broadcast_to(step, numbers.shape))
        tokens = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(jnp.isfinite(largest), tokens.astype(jnp.int32), NOT_FINITE)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets the logits [..., V] to -inf outside the smallest set of likeliest tokens that has probability `top_p`.

    The set always holds the likeliest token, and all tokens that are exactly as likely as its last one.

    >>> nucleus(jnp.log(jnp.array([0.5, 0.125, 0.25, 0.125])), 0.6).tolist()[1]
    -inf
    """
    falling = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    shares = jax.nn.softmax(falling, axis=-1)
    inside = jnp.cumsum(shares, axis=-1) - shares < top_p  # the likelier tokens together have less than top_p
    least = jnp.min(jnp.where(inside, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)

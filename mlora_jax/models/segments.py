"""Causal attention within the texts of packed rows, for CPUs: no score between two texts is computed.

Queries and keys are cut into blocks. A loop runs over the pairs of blocks in which some query sees some key, so its
length is data, and the softmax is put together block by block. The backward pass computes the scores again.

Axes: B rows, T tokens, H query heads, KV key and value heads, G = H / KV query heads of a group, Hd features of a head,
n blocks.

Source: Dao et al. (arXiv 2205.14135).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ATTENDED = "attended"  # the name of what the backward pass needs, for the policies of `jax.checkpoint`
BLOCKS = (64, 32, 16)  # the numbers of tokens that a block may have; the largest that divides T is used
HIDDEN = -1e30  # a score of a key that is not seen: its exponential is zero, and it is no NaN if all keys are hidden


def fits_segments(length: int) -> bool:
    """Returns whether rows of this number of tokens can be cut into blocks."""
    return length % BLOCKS[-1] == 0


def attend_in_segments(query: jax.Array, key: jax.Array, value: jax.Array, first_keys: jax.Array) -> jax.Array:
    """Computes softmax(q k' / sqrt(Hd)) v, where query t of a row sees the keys from `first_keys[t]` to t.

    The function is differentiable in reverse mode. Rows and mapped axes are computed one after the other.

    Args:
      query: [B, T, H, Hd], where T is a multiple of 16.
      key: [B, T, KV, Hd].
      value: [B, T, KV, Hd].
      first_keys: int32 [B, T], at most t.

    Returns:
      [B, T, H, Hd] in the dtype of `query`. The softmax is computed in float32, or in float64 for float64.
    """
    batch, length, heads, features = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, features).transpose(0, 2, 3, 1, 4)  # [B, KV, G, T, Hd]
    key, value = (x.transpose(0, 2, 1, 3) for x in (key, value))  # [B, KV, T, Hd]
    mixed = jax.vmap(_attend)(grouped, key, value, first_keys)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, features)


def _pairs(first_keys: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the first query and the first key of each pair of blocks, and the number of pairs."""
    first = first_keys.reshape(-1, size).min(axis=1) // size  # [n], the first block of keys of each block of queries
    numbers = jnp.arange(len(first), dtype=jnp.int32)
    counts = numbers - first + 1
    ends = jnp.cumsum(counts)
    pairs = jnp.arange(len(first) * (len(first) + 1) // 2, dtype=jnp.int32)
    row = jnp.sum(pairs[:, None] >= ends[None], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, len(first) - 1)
    column = first[row] + pairs - (ends - counts)[row]
    return row * size, column * size, ends[-1]


def _block_size(length: int) -> int:
    return next(size for size in BLOCKS if length % size == 0)


def _wide(x: jax.Array):
    return jnp.promote_types(x.dtype, jnp.float32)


def _scores(query, key, first_keys, at, to, size: int):
    """The scores of a pair of blocks [KV, G, size, size], hidden where a query does not see a key."""
    groups, each, _, features = query.shape
    rows = jax.lax.dynamic_slice_in_dim(query, at, size, 2).reshape(groups, each * size, features)
    keys = jax.lax.dynamic_slice_in_dim(key, to, size, 1)
    scores = jnp.einsum("gqd,gkd->gqk", rows, keys, preferred_element_type=_wide(query)) / math.sqrt(features)
    queries, places = at + jnp.arange(size), to + jnp.arange(size)
    first = jax.lax.dynamic_slice_in_dim(first_keys, at, size, 0)
    seen = (places[None] <= queries[:, None]) & (places[None] >= first[:, None])
    return jnp.where(seen[None, None], scores.reshape(groups, each, size, size), HIDDEN), rows, keys


@jax.custom_batching.sequential_vmap
def _forward(query, key, value, first_keys):
    """Returns the mixed values [KV, G, T, Hd] and the logarithm of the softmax's denominator [KV, G, T]."""
    groups, each, length, features = query.shape
    size, wide = _block_size(length), _wide(query)
    ats, tos, count = _pairs(first_keys, size)

    def one(pair, carry):
        largest, total, mixed = carry
        at, to = ats[pair], tos[pair]
        scores, _, _ = _scores(query, key, first_keys, at, to, size)
        old = jax.lax.dynamic_slice_in_dim(largest, at, size, 2)
        new = jnp.maximum(old, scores.max(axis=-1))
        weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(old - new)
        values = jax.lax.dynamic_slice_in_dim(value, to, size, 1)
        flat = weights.reshape(groups, each * size, size).astype(value.dtype)
        part = jnp.einsum("gqk,gkd->gqd", flat, values, preferred_element_type=wide)
        sums = jax.lax.dynamic_slice_in_dim(total, at, size, 2) * kept + weights.sum(axis=-1)
        mix = jax.lax.dynamic_slice_in_dim(mixed, at, size, 2) * kept[..., None]
        mix += part.reshape(groups, each, size, features)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=2)
        return put(largest, new), put(total, sums), put(mixed, mix)

    # A query sees itself, so every row's maximum becomes a real score, above the one that it starts from.
    shape = (groups, each, length)
    start = jnp.full(shape, HIDDEN / 2, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, features), wide)
    largest, total, mixed = jax.lax.fori_loop(0, count, one, start)
    return (mixed / total[..., None]).astype(query.dtype), largest + jnp.log(total)


@jax.custom_batching.sequential_vmap
def _backward(query, key, value, first_keys, mixed, logarithm, cotangent):
    """Returns the gradients of query, key and value."""
    groups, each, length, features = query.shape
    size, wide = _block_size(length), _wide(query)
    ats, tos, count = _pairs(first_keys, size)
    delta = jnp.sum(cotangent.astype(wide) * mixed.astype(wide), axis=-1)  # [KV, G, T]

    def one(pair, carry):
        d_query, d_key, d_value = carry
        at, to = ats[pair], tos[pair]
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, at, size, 2)  # noqa: E731
        scores, rows, keys = _scores(query, key, first_keys, at, to, size)
        weights = jnp.exp(scores - cut(logarithm)[..., None])
        own = cut(cotangent).reshape(groups, each * size, features)
        values = jax.lax.dynamic_slice_in_dim(value, to, size, 1)
        product = functools.partial(jnp.einsum, preferred_element_type=wide)
        d_weights = product("gqd,gkd->gqk", own, values).reshape(groups, each, size, size)
        d_scores = (weights * (d_weights - cut(delta)[..., None]) / math.sqrt(features)).astype(query.dtype)
        d_scores = d_scores.reshape(groups, each * size, size)
        weights = weights.reshape(groups, each * size, size).astype(value.dtype)

        def add(x, part, start, axis):
            old = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
            return jax.lax.dynamic_update_slice_in_dim(x, old + part, start, axis)

        by_query = product("gqk,gkd->gqd", d_scores, keys).reshape(groups, each, size, features)
        d_query = add(d_query, by_query, at, 2)
        d_key = add(d_key, product("gqk,gqd->gkd", d_scores, rows), to, 1)
        d_value = add(d_value, product("gqk,gqd->gkd", weights, own), to, 1)
        return d_query, d_key, d_value

    start = tuple(jnp.zeros(x.shape, wide) for x in (query, key, value))
    found = jax.lax.fori_loop(0, count, one, start)
    return tuple(gradient.astype(x.dtype) for gradient, x in zip(found, (query, key, value), strict=True))


@jax.custom_vjp
def _attend(query, key, value, first_keys):
    """Attends in one row: query [KV, G, T, Hd], key and value [KV, T, Hd], first_keys [T] -> [KV, G, T, Hd]."""
    return _forward(query, key, value, first_keys)[0]


def _attend_forward(query, key, value, first_keys):
    mixed, logarithm = (checkpoint_name(x, ATTENDED) for x in _forward(query, key, value, first_keys))
    return mixed, (query, key, value, first_keys, mixed, logarithm)


def _attend_backward(saved, cotangent):
    return (*_backward(*saved, cotangent), None)


_attend.defvjp(_attend_forward, _attend_backward)

"""Scaled dot-product attention with grouped key and value heads, by the method that suits each platform.

Axes: B batch, T queries, S keys, H query heads, KV key and value heads, Hd features of a head.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlora_jax.models.flash import Flash, flash_attend
from mlora_jax.models.segments import attend_in_segments, fits_segments

# A CPU attends from QUERIES queries of a row at a time, or from more where a row would have more than BLOCKS blocks.
QUERIES, BLOCKS = 96, 16
LITTLE = 2**17  # A batch with at most this many scores is attended at once on a CPU too.


@functools.partial(jax.tree_util.register_dataclass, data_fields=("starts",), meta_fields=("widths",))
@dataclasses.dataclass(frozen=True)
class Spans:
    """The places of the texts in packed rows. A CPU then attends within each text only.

    The texts of a row lie from left to right in the order of `starts`: first all texts of the first width, then all
    texts of the next width.

    Attributes:
      starts: for each width an int32 array [B, N] with the position of the first token of each text. Unused entries at
        the end are -1.
      widths: the widths in falling order, each at most T. No text is longer than its width.
    """

    starts: tuple[jax.Array, ...]
    widths: tuple[int, ...]


class Segments(NamedTuple):
    """The texts of packed rows, which do not see each other.

    Attributes:
      ids: integers [B, T], the text of each token.
      first_keys: int32 [B, T], the first key that each query sees; it sees all keys from there to itself.
      windowed: whether a sliding window hides keys of the query's own text.
    """

    ids: jax.Array
    first_keys: jax.Array
    windowed: bool


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    causal: bool,
    spans: Spans | None = None,
    flash: Flash | None = None,
    segments: Segments | None = None,
) -> jax.Array:
    """Computes softmax(q k' / sqrt(Hd)) v, where each key and value head serves H / KV query heads.

    A TPU runs a flash kernel where rows are long and there is no mask, or only that of segments. A CPU attends within
    each segment only, or, without segments, from one row of the batch and one block of its queries at a time; the
    scores of a block stay in the cache and are computed again in the backward pass. All other cases use
    `jax.nn.dot_product_attention`.

    Args:
      query: [B, T, H, Hd].
      key: [B, S, KV, Hd].
      value: [B, S, KV, Hd].
      mask: boolean [B, 1, T, S], True where a query sees a key, or None. Every query sees some key.
      causal: whether query t sees only keys up to t (T equals S).
      spans: the places of the texts, for a mask under which every query sees itself and no key outside its own text.
        The results within texts are the same with spans and without. Results outside every text are undefined, and
        the function cannot be differentiated.
      flash: when and where the flash kernel runs; None: never.
      segments: what the mask says, if it only hides other segments and what lies behind a window; None otherwise.

    Returns:
      [B, T, H, Hd] in the dtype of `query`. The softmax is computed in float32, or in float64 for float64.
    """
    if flash is not None and causal and flash.takes(query, key):
        if mask is None:
            return flash_attend(query, key, value, flash.mesh)
        if segments is not None and not segments.windowed:
            return flash_attend(query, key, value, flash.mesh, segment_ids=segments.ids)
    operands = (query, key, value) if mask is None else (query, key, value, mask)
    scores = math.prod(query.shape[:3]) * key.shape[1]
    other = _attend_in_float64 if query.dtype == jnp.float64 else _attend_at_once
    if scores <= LITTLE:
        return other(causal, *operands)
    blocks = functools.partial(_attend_in_blocks, causal)
    on_a_mesh = flash is not None and flash.mesh is not None
    if segments is not None and causal and fits_segments(query.shape[1]) and not on_a_mesh:
        first_keys = segments.first_keys
        blocks = lambda query, key, value, mask: attend_in_segments(query, key, value, first_keys)  # noqa: E731
    if spans is not None:
        blocks = functools.partial(_attend_in_spans, causal, spans)
    return jax.lax.platform_dependent(*operands, cpu=blocks, default=functools.partial(other, causal))


def attend_cached(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, head_dim: int | None = None
) -> jax.Array:
    """Computes what `attend` computes, from keys and values in the layout of a cache.

    Args:
      query: [B, T, H, Hd], with a small T: one step of decoding.
      key: [B, KV, Hd, S].
      value: [B, KV, S, Hd]; its number of features may differ from that of the keys.
      mask: boolean [B, 1, T, S]. Every query sees some key.
      head_dim: the number by whose square root the scores are divided; None: the number of features of a query.

    Returns:
      [B, T, H, Hd] in the dtype of `query`, with the features of `value`. The softmax is computed in float32, or in
      float64 for float64.
    """
    batch, length, heads, features = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    groups = key.shape[1]
    # The queries of a group are the rows of one matrix. With other orders of the axes XLA transposes keys or scores.
    query = query.reshape(batch, length, groups, -1, features).transpose(0, 2, 1, 3, 4)  # [B, KV, T, H / KV, Hd]
    query = query.reshape(batch, groups, -1, features)
    scores = jnp.matmul(query, key, preferred_element_type=wide) / math.sqrt(head_dim or features)
    scores = jnp.where(jnp.repeat(mask, heads // groups, axis=2), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.matmul(weights, value, preferred_element_type=wide)  # [B, KV, T H / KV, Hd]
    features = value.shape[-1]
    mixed = mixed.reshape(batch, groups, length, -1, features).transpose(0, 2, 1, 3, 4)
    return mixed.reshape(batch, length, heads, features).astype(query.dtype)


def _attend_at_once(causal: bool, query, key, value, mask=None):
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)


def _attend_in_float64(causal: bool, query, key, value, mask=None):
    """Stands in for `jax.nn.dot_product_attention`, which rounds the scores to float32 for arguments of any dtype."""
    batch, length, heads, features = query.shape
    query = query.reshape(batch, length, key.shape[2], -1, features)
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key) / math.sqrt(features)
    if causal:
        scores = jnp.where(jnp.tri(length, key.shape[1], dtype=bool), scores, -jnp.inf)
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, -jnp.inf)
    mixed = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1), value)
    return mixed.reshape(batch, length, heads, features)


def _attend_in_blocks(causal: bool, *operands):
    return jax.lax.map(lambda row: _attend_row(causal, *row), operands)


def _attend_in_spans(causal: bool, spans: Spans, query, key, value, mask):
    """Computes what `_attend_in_blocks` computes, one text after the other."""

    def row(operands):
        query, key, value, mask, all_starts = operands
        mixed = jnp.zeros_like(query)
        for width, starts in zip(spans.widths, all_starts, strict=True):

            def one(number, mixed, width=width, starts=starts):
                start = jnp.minimum(starts[number], len(mixed) - width)
                part = [jax.lax.dynamic_slice_in_dim(x, start, width) for x in (query, key, value)]
                visible = jax.lax.dynamic_slice(mask, (0, start, start), (1, width, width))
                found = _attend_row(causal, *part, mask=visible)
                # Results of the texts before this one are kept. A text may be shorter than its width: the results
                # behind its end are wrong, and the texts that lie there overwrite them later.
                before = (jnp.arange(width) < starts[number] - start)[:, None, None]
                found = jnp.where(before, jax.lax.dynamic_slice_in_dim(mixed, start, width), found)
                return jax.lax.dynamic_update_slice_in_dim(mixed, found, start, 0)

            mixed = jax.lax.fori_loop(0, jnp.sum(starts >= 0), one, mixed)
        return mixed

    return jax.lax.map(row, (query, key, value, mask, spans.starts))


def _attend_row(causal: bool, query, key, value, mask=None):
    """Attends in one row: query [T, H, Hd], key and value [S, KV, Hd], mask [1, T, S] or None -> [T, H, Hd]."""
    length, heads, features = query.shape
    groups = key.shape[1]
    query = query.transpose(1, 0, 2).reshape(groups, -1, length, features)  # [KV, H / KV, T, Hd]
    key, value = key.transpose(1, 2, 0), value.transpose(1, 0, 2)  # [KV, Hd, S], [KV, S, Hd]
    size = max(QUERIES, -(-length // BLOCKS))
    mixed = []
    for start in range(0, length, size):
        end = min(start + size, length)
        seen = end if causal else key.shape[2]
        visible = jnp.tri(end - start, seen, start, dtype=bool) if causal else jnp.ones((end - start, seen), bool)
        if mask is not None:
            visible &= mask[0, start:end, :seen]
        mixed.append(_attend_block(query[:, :, start:end], key[:, :, :seen], value[:, :seen], visible))
    return jnp.concatenate(mixed, axis=2).reshape(heads, length, features).transpose(1, 0, 2)


@jax.checkpoint
def _attend_block(query, key, value, visible):
    """Attends in one block: query [KV, G, T, Hd], key [KV, Hd, S], value [KV, S, Hd], visible [T, S] -> as query."""
    groups, each, length, features = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(groups, each * length, features)
    scores = jnp.matmul(query, key, preferred_element_type=wide).reshape(groups, each, length, -1)
    scores = jnp.where(visible, scores / math.sqrt(features), -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.reshape(groups, each * length, -1).astype(value.dtype)
    mixed = jnp.matmul(weights, value, preferred_element_type=wide).reshape(groups, each, length, features)
    return (mixed / total).astype(query.dtype)

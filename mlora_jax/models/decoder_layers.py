"""The parts of a decoder: the cache, rotary embeddings, the norm, attention, the MLP, and one layer of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mlora_jax.models.attention import Segments, Spans, attend, attend_cached
from mlora_jax.models.config import DecoderConfig
from mlora_jax.models.flash import Flash


class Cache(NamedTuple):
    """The rotated keys and the values of the tokens that one layer has seen so far.

    The axes have the order in which the products of attention need no transposes.

    Args:
      k: the keys [B, KV, Hd, S] in the compute dtype.
      v: the values [B, KV, S, Hd] in the compute dtype.
    """

    k: jax.Array
    v: jax.Array

    @property
    def slots(self) -> int:
        """S, the largest number of tokens of a row."""
        return self.v.shape[-2]

    def written(self, key: jax.Array, value: jax.Array, positions: jax.Array) -> Cache:
        """Returns the cache with more tokens; positions beyond it are not written.

        Args:
          key: [B, T, KV, Hd].
          value: [B, T, KV, Hd].
          positions: int32 [B, T], the slots of the tokens.
        """
        k, v = _written(self, (), key, value, positions)
        return Cache(k, v)

    def own(self) -> tuple[jax.Array, jax.Array]:
        """Returns the keys [B, KV, Hd, S] and values [B, KV, S, Hd]."""
        return self.k, self.v


class StackedCache(NamedTuple):
    """The caches of all layers as two arrays, for a scan over the layers.

    Args:
      k: the keys [L, B, KV, Hd, S] in the compute dtype.
      v: the values [L, B, KV, S, Hd] in the compute dtype.
      layer: an int32 scalar, the layer that reads and writes; None outside the scan.
    """

    k: jax.Array
    v: jax.Array
    layer: jax.Array | None = None

    @property
    def slots(self) -> int:
        """S, the largest number of tokens of a row."""
        return self.v.shape[-2]

    def written(self, key: jax.Array, value: jax.Array, positions: jax.Array) -> StackedCache:
        """Returns the cache with more tokens of the layer, as `Cache.written` does."""
        k, v = _written(self, (self.layer,), key, value, positions)
        return StackedCache(k, v, self.layer)

    def own(self) -> tuple[jax.Array, jax.Array]:
        """Returns the layer's keys [B, KV, Hd, S] and values [B, KV, S, Hd]."""
        k, v = (jax.lax.dynamic_index_in_dim(part, self.layer, keepdims=False) for part in (self.k, self.v))
        return k, v


def _written(
    cache: Any, layer: tuple, key: jax.Array, value: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows, every = jnp.arange(len(key))[:, None], slice(None)
    return (
        cache.k.at[(*layer, rows, every, every, positions)].set(key.astype(cache.k.dtype)),
        cache.v.at[(*layer, rows, every, positions)].set(value.astype(cache.v.dtype)),
    )


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Returns the angle per position of every rotary pair, stretched as in Llama 3 if the config says so.

        f_i = theta ** (-2 i / Hd)

    Args:
      config: the config with theta, Hd and the scaling.

    Returns:
      float64 [Hd / 2], radians per token.

    Source: RoFormer (arXiv 2104.09864); Llama 3.1's `apply_scaling` for the stretching.
    """
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # These are the turns of a pair within the context of pretraining.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Applies rotary positions to queries or keys, pairing feature i with i + Hd / 2 as Hugging Face does.

    Args:
      x: [B, T, H, Hd].
      cos: [B, T, 1, Hd / 2], at least float32.
      sin: [B, T, 1, Hd / 2], in the dtype of `cos`.

    Returns:
      An array with the shape and dtype of `x`, computed in the dtype of `cos`.
    """
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Returns positions that begin at zero in every segment of a packed row.

    Args:
      segment_ids: integers [B, T]; a new segment begins wherever the value changes.

    Returns:
      int32 [B, T].
    """
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def within_window(mask: jax.Array | None, window: int | jax.Array, positions: jax.Array, keys: jax.Array) -> jax.Array:
    """Restricts a mask to a sliding window: keys at the position of the query and at the `window - 1` before it.

    Args:
      mask: boolean [B, 1, T, S], True where a query sees a key; None: every query sees every key.
      window: a positive integer or an int32 scalar.
      positions: int32 [B, T], the positions of the queries.
      keys: int32 [B, S] or [1, S], the positions of the keys, which are never negative.

    Returns:
      boolean [B, 1, T, S].

    Source: Beltagy et al. (arXiv 2004.05150); `sliding_window_overlay` of transformers' `masking_utils.py`.
    """
    # A finished row in decoding may have queries beyond the last key. Their window ends there, so that they see a key.
    first = jnp.minimum(positions, keys.max(axis=1, keepdims=True)) - window + 1
    near = keys[:, None, None, :] >= first[:, None, :, None]
    return near if mask is None else near & mask


def linear_layer(
    config: DecoderConfig, inputs: int, outputs: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=dtype, kernel_init=init, rngs=rngs)


class RMSNorm(nnx.Module):
    """y = weight * x / sqrt(mean(x ** 2) + eps), with the mean in float32 or better.

    Args:
      features: D, the number of features.
      eps: the number that is added to the mean square.
      dtype: the dtype of the weight.

    Source: Zhang and Sennrich (arXiv 1910.07467).
    """

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis; the result has the shape and dtype of `x`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = jnp.broadcast_to(self.weight[...].astype(wide.dtype), wide.shape)
        return (wide * weight).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions.

    Queries and keys are normalised before they are rotated if the config has `qk_norm`.

    Args:
      config: the shape of the model.
      dtype: the dtype of weights and compute.
      rngs: the keys for fresh weights.

    Source: Ainslie et al. (arXiv 2305.13245) for the grouping; `modeling_qwen3.py` of transformers for the norms.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        heads, groups = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        made: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.q_proj = linear_layer(config, config.hidden_size, heads, bias=config.attention_bias, **made)
        self.k_proj = linear_layer(config, config.hidden_size, groups, bias=config.attention_bias, **made)
        self.v_proj = linear_layer(config, config.hidden_size, groups, bias=config.attention_bias, **made)
        self.o_proj = linear_layer(config, heads, config.hidden_size, bias=config.attention_output_bias, **made)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
        self.qk_norm = config.qk_norm
        self.head_dim = config.head_dim

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        mask: jax.Array | None,
        positions: jax.Array,
        cache: Cache | StackedCache | None,
        spans: Spans | None = None,
        flash: Flash | None = None,
        segments: Segments | None = None,
    ) -> tuple[jax.Array, Cache | StackedCache]:
        """Mixes [B, T, D] over time, and returns the result and the new cache.

        Without a cache, the new one holds these tokens alone.
        """
        batch, length, _ = x.shape
        query, key, value = self._heads(x, rotation)
        if cache is None:
            with jax.named_scope("attention"):
                mixed = attend(query, key, value, mask, causal=True, spans=spans, flash=flash, segments=segments)
            cache = Cache(key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3))
        else:
            if mask is None:
                raise ValueError("a cache needs a mask, which hides the slots without a token")
            cache = cache.written(key, value, positions)
            mixed = attend_cached(query, *(part.astype(x.dtype) for part in cache.own()), mask=mask)
        return self.o_proj(mixed.reshape(batch, length, -1)), cache

    def _heads(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the rotated queries [B, T, H, Hd], the rotated keys [B, T, KV, Hd] and the values [B, T, KV, Hd]."""
        query, key, value = (
            projection(x).astype(x.dtype).reshape(*x.shape[:2], -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, *rotation), rotate(key, *rotation), value


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)).

    Args:
      config: the shape of the model.
      dtype: the dtype of weights and compute.
      rngs: the keys for fresh weights.

    Source: Shazeer (arXiv 2002.05202).
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        made: dict[str, Any] = dict(bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_proj = linear_layer(config, config.hidden_size, config.intermediate_size, **made)
        self.up_proj = linear_layer(config, config.hidden_size, config.intermediate_size, **made)
        self.down_proj = linear_layer(config, config.intermediate_size, config.hidden_size, **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One layer: attention and SwiGLU. Each follows a norm and is added to the residual stream.

    Args:
      config: the shape of the model.
      dtype: the dtype of weights and compute.
      rngs: the keys for fresh weights.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        mask: jax.Array | None,
        positions: jax.Array,
        cache: Cache | StackedCache | None,
        spans: Spans | None = None,
        flash: Flash | None = None,
        segments: Segments | None = None,
    ) -> tuple[jax.Array, Cache | StackedCache]:
        """Applies the layer to [B, T, D], and returns the result and the layer's new cache."""
        normed = self.input_layernorm(x)
        mixed, cache = self.self_attn(normed, rotation, mask, positions, cache, spans, flash, segments)
        # The residual stream keeps its dtype even if an adapter that replaces a projection returns another one.
        x = x + mixed.astype(x.dtype)
        return x + self.mlp(self.post_attention_layernorm(x)).astype(x.dtype), cache

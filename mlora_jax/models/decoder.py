"""The Llama-family decoder: grouped-query attention, rotary positions, RMSNorm, SwiGLU; layers in one scan.

Axes: B batch, T time, S cache slots, D hidden, V vocabulary, L layer, H query heads, KV key and value heads,
Hd features of a head. Attribute names are Hugging Face's, so the path of a module (`layers.self_attn.q_proj`)
is what users know from there. Projections are called, never read: an adapter may have taken their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlora_jax.models.attention import Spans, attend, attend_cached
from mlora_jax.models.config import DecoderConfig
from mlora_jax.models.flash import LEAST, Flash

# State that a layer may change while it runs, should a module put into a layer have any (dropout's counter).
_MUTABLE = (nnx.RngState, nnx.BatchStat)


class Cache(NamedTuple):
    """Keys (already rotated) and values of the tokens that one layer has seen so far.

    A layer has arrays of its own, which a step of decoding writes in place and reads where they lie: a slice of one
    array for all layers would be copied. The last axis of each is the one that its product with a query runs along.

    Args:
      k: keys [B, KV, Hd, S] in the compute dtype.
      v: values [B, KV, S, Hd], alike.
    """

    k: jax.Array
    v: jax.Array


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Angle per position of every rotary pair, with Llama 3's stretching if the config has one.

        f_i = theta ** (-2 i / Hd)

    Args:
      config: gives theta, Hd and the scaling.

    Returns:
      float64 [Hd / 2], radians per token.

    Source: RoFormer (arXiv 2104.09864); Llama 3.1's `apply_scaling` for the stretching.
    """
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # Within the old context.
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Applies rotary positions to queries or keys, pairing feature i with i + Hd / 2 as Hugging Face does.

    Args:
      x: [B, T, H, Hd].
      cos: [B, T, 1, Hd / 2], at least float32.
      sin: alike.

    Returns:
      The shape and dtype of `x`; computed in the dtype of `cos`.
    """
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions that begin at zero with every segment of a packed row.

    Args:
      segment_ids: [B, T] integers; a new segment begins wherever the value changes.

    Returns:
      int32 [B, T].
    """
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def within_window(mask: jax.Array | None, window, positions: jax.Array, keys: jax.Array) -> jax.Array:
    """What a query sees of `mask` in a sliding window: keys at its own position and at the `window - 1` before it.

    Args:
      mask: boolean [B, 1, T, S], or None for all.
      window: positive integer, or int32 scalar.
      positions: int32 [B, T] of the queries.
      keys: int32 [B, S] or [1, S], positions of the keys; never negative.

    Returns:
      boolean [B, 1, T, S].

    Source: Beltagy et al. (arXiv 2004.05150); `sliding_window_overlay` of transformers' `masking_utils.py`.
    """
    # A query beyond the last key (of a row that is done, in decoding) counts from there: it must see something.
    first = jnp.minimum(positions, keys.max(axis=1, keepdims=True)) - window + 1
    near = keys[:, None, None, :] >= first[:, None, :, None]
    return near if mask is None else near & mask


def _linear(config: DecoderConfig, inputs: int, outputs: int, *, bias: bool, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=dtype, kernel_init=init, rngs=rngs)


class RMSNorm(nnx.Module):
    """y = weight * x / sqrt(mean(x ** 2) + eps), with the mean in float32 or better.

    Args:
      features: D.
      eps: added to the mean square.
      dtype: of the weight.

    Source: Zhang and Sennrich (arXiv 1910.07467).
    """

    def __init__(self, features: int, *, eps: float, dtype):
        self.weight = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis; the result has the shape and dtype of `x`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.weight[...].astype(wide.dtype)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions, queries and keys normalised before if the config says so.

    Args:
      config: shape of the model.
      dtype: of weights and compute.
      rngs: keys for fresh weights.

    Source: Ainslie et al. (arXiv 2305.13245) for the grouping; `modeling_qwen3.py` of transformers for the norms.
    """

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        heads, groups = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        made = dict(dtype=dtype, rngs=rngs)
        self.q_proj = _linear(config, config.hidden_size, heads, bias=config.attention_bias, **made)
        self.k_proj = _linear(config, config.hidden_size, groups, bias=config.attention_bias, **made)
        self.v_proj = _linear(config, config.hidden_size, groups, bias=config.attention_bias, **made)
        self.o_proj = _linear(config, heads, config.hidden_size, bias=config.attention_output_bias, **made)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
        self.qk_norm = config.qk_norm
        self.head_dim = config.head_dim

    def __call__(self, x, rotation, mask, positions, cache, spans=None, flash=None):
        """Mixes over time; the cache after it. With None for a cache that is one of these tokens alone."""
        batch, length, _ = x.shape
        query, key, value = (
            projection(x).astype(x.dtype).reshape(batch, length, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, T, H, Hd], [B, T, KV, Hd] twice
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        if cache is None:
            mixed = attend(query, key, value, mask, causal=True, spans=spans, flash=flash)
            cache = Cache(key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3))
        else:
            rows = jnp.arange(batch)[:, None]
            cache = Cache(
                cache.k.at[rows, :, :, positions].set(key.astype(cache.k.dtype)),
                cache.v.at[rows, :, positions].set(value.astype(cache.v.dtype)),
            )
            mixed = attend_cached(query, *(part.astype(x.dtype) for part in cache), mask)
        return self.o_proj(mixed.reshape(batch, length, -1)), cache


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)).

    Args:
      config: shape of the model.
      dtype: of weights and compute.
      rngs: keys for fresh weights.

    Source: Shazeer (arXiv 2002.05202).
    """

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        made = dict(bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_proj = _linear(config, config.hidden_size, config.intermediate_size, **made)
        self.up_proj = _linear(config, config.hidden_size, config.intermediate_size, **made)
        self.down_proj = _linear(config, config.intermediate_size, config.hidden_size, **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One block: attention and SwiGLU, each behind a norm and added to the residual stream.

    Args:
      config: shape of the model.
      dtype: of weights and compute.
      rngs: keys for fresh weights.
    """

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x, rotation, mask, positions, cache, spans=None, flash=None):
        """[B, T, D] and the layer's cache, both as after this layer."""
        mixed, cache = self.self_attn(self.input_layernorm(x), rotation, mask, positions, cache, spans, flash)
        # The residual stream keeps its dtype whatever an adapter in a projection's place returns.
        x = x + mixed.astype(x.dtype)
        return x + self.mlp(self.post_attention_layernorm(x)).astype(x.dtype), cache


class Decoder(nnx.Module):
    """A Llama-family language model whose blocks are one module with a leading layer axis.

    Args:
      config: shape of the model.
      dtype: of weights and compute; norms, softmax, rotary positions and logits are in float32 at least.
      rngs: keys for fresh weights (normal with `config.initializer_range`).

    Attributes:
      remat: recompute each layer in the backward pass instead of keeping what is inside it.
      placement: None, or how weights and activations lie on a mesh where they are used: an object like
        `mlora_jax.parallel.rules.Placement`.
      flash_from: tokens of a row from which a TPU attends by a kernel; None: never.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> from mlora_jax.models.config import DecoderConfig
      >>> config = DecoderConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> model(jnp.array([[1, 2, 3]])).shape
      (1, 3, 11)

    Source: Touvron et al. (arXiv 2302.13971) and `modeling_llama.py` of Hugging Face transformers.
    """

    def __init__(self, config: DecoderConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = False
        self.placement = None
        self.flash_from = LEAST
        normal = nnx.initializers.normal(config.initializer_range)
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, embedding_init=normal, rngs=rngs
        )

        def layer(key):
            return DecoderLayer(config, dtype=dtype, rngs=nnx.Rngs(key))

        graphdef = nnx.graphdef(nnx.eval_shape(layer, jax.random.key(0)))
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(layer(key)))(keys))  # [L, ...]
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = _linear(config, config.hidden_size, config.vocab_size, bias=False, dtype=dtype, rngs=rngs)
            self.lm_head.preferred_element_type = self.wide_dtype

    @property
    def wide_dtype(self):
        """The dtype of reductions and logits: float32, or float64 for a float64 model."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def __call__(self, tokens: jax.Array, *, positions=None, segment_ids=None, parent_ids=None) -> jax.Array:
        """Logits of the next token at every position.

        Args:
          tokens: int32 [B, T], right-padded if rows differ in length.
          positions: as in `hidden`.
          segment_ids: as in `hidden`.
          parent_ids: as in `hidden`.

        Returns:
          float32 [B, T, V] (float64 for a float64 model).
        """
        return self.head(self.hidden(tokens, positions=positions, segment_ids=segment_ids, parent_ids=parent_ids))

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions=None,
        segment_ids=None,
        parent_ids=None,
        spans: Spans | None = None,
        cache: tuple[Cache, ...] | None = None,
        layers: Sequence[DecoderLayer] | None = None,
    ):
        """Hidden states after the final norm.

        Args:
          tokens: int32 [B, T], right-padded if rows differ in length. An id outside 0..V-1 gives NaN.
          positions: int32 [B, T]; None: 0..T-1, or from 0 in every segment. With a cache also the slot that
            each token is written to (beyond the cache: not written), and a query sees slots up to its own.
            Sliding windows are counted in positions.
          segment_ids: integers [B, T]; tokens of different segments do not see each other.
          parent_ids: integers [B, T]; with segment ids, a token also sees the tokens before it of the segment with
            this id. So a row holds a context once and every continuation of it; `positions` must say where each
            of those begins.
          spans: with segment ids, where texts lie that see nothing of each other: saves a CPU work.
          cache: from `init_cache`, `prefill` or an earlier call.
          layers: with a cache, `single_layers()`, for a loop that decodes to take them once.

        Returns:
          [B, T, D] in the compute dtype; with a cache the pair (hidden, cache).

        Raises:
          ValueError: segment ids together with a cache; parent ids without segment ids or positions.
        """
        if parent_ids is not None and (segment_ids is None or positions is None):
            raise ValueError("parent_ids needs segment_ids and positions: which tokens are a continuation, and where")
        if segment_ids is not None and cache is not None:
            raise ValueError("segment_ids and cache exclude each other: decode packed texts as rows of their own")
        counted = positions is None or cache is not None  # so that no two positions are as far apart as there are keys
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
            if segment_ids is not None:
                positions = segment_positions(segment_ids)
        mask = None
        if segment_ids is not None:
            mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [B, 1, T, T]
            if parent_ids is not None:
                mask |= parent_ids[:, None, :, None] == segment_ids[:, None, None, :]
        if cache is not None:
            mask = jnp.arange(cache[0].v.shape[2]) <= positions[:, None, :, None]  # [B, 1, T, S]
        x, written = self._run_layers(tokens, positions, mask, cache, layers, spans, counted=counted)
        return x if cache is None else (x, written)

    def prefill(self, tokens: jax.Array, slots: int):
        """Hidden states of rows from their beginning, and a cache of them with room for more.

        What `hidden` gives with an empty cache, without attending to its empty slots.

        Args:
          tokens: int32 [B, T], right-padded if rows differ in length.
          slots: S, the most tokens a row will hold, at least T.

        Returns:
          [B, T, D] in the compute dtype, and the cache.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x, kept = self._run_layers(tokens, positions, None, keep=True)
        room = (0, slots - tokens.shape[1])
        k = jnp.pad(kept.k, [*[(0, 0)] * 4, room])  # [L, B, KV, Hd, S]
        v = jnp.pad(kept.v, [*[(0, 0)] * 3, room, (0, 0)])
        return x, tuple(Cache(k[index], v[index]) for index in range(self.config.num_layers))

    def single_layers(self) -> tuple[DecoderLayer, ...]:
        """Every layer as a module of its own."""
        graphdef, state = nnx.split(self.layers)
        parts = (jax.tree.map(lambda leaf, index=index: leaf[index], state) for index in range(self.config.num_layers))
        return tuple(nnx.merge(graphdef, part) for part in parts)

    def _run_layers(self, tokens, positions, mask, cache=None, layers=None, spans=None, *, counted=True, keep=False):
        """Hidden states, and per layer the cache after it; without one and to `keep`, caches of these tokens [L, ...].

        `counted`: whether no two positions of a row are as far apart as there are keys.
        """
        keys = positions if cache is None else jnp.arange(mask.shape[-1], dtype=jnp.int32)[None]
        windows = self._windows(keys.shape[1] if counted else None)
        if isinstance(windows, int):
            mask, windows = within_window(mask, windows, positions, keys), None
        placement = self.placement
        flash = Flash(self.flash_from, None if placement is None else placement.mesh)
        rotary = None if self.config.rotary_layers is None else jnp.asarray(self.config.rotary_layers)
        frequencies = jnp.asarray(rope_frequencies(self.config), self.wide_dtype)
        angles = positions[..., None, None].astype(self.wide_dtype) * frequencies  # [B, T, 1, Hd / 2]
        rotation = jnp.cos(angles), jnp.sin(angles)

        def run(layer, x, window, rotates, part):
            seen = mask if window is None else within_window(mask, window, positions, keys)
            turn = rotation
            if rotates is not None:
                turn = jnp.where(rotates, rotation[0], 1.0), jnp.where(rotates, rotation[1], 0.0)
            return layer(x, turn, seen, positions, part, spans, flash)

        if placement is None:
            x = self.embed_tokens(tokens)
        else:
            graphdef, table = nnx.split(self.embed_tokens)
            table = placement.weights({"embed_tokens": table})["embed_tokens"]
            x = placement.activations(nnx.merge(graphdef, table)(tokens))
        if cache is not None:
            # No scan: it would copy the whole cache, as its input or its output, at every step of decoding.
            written = []
            for index, layer in enumerate(self.single_layers() if layers is None else layers):
                of_layer = (None if each is None else each[index] for each in (windows, rotary))
                x, part = run(layer, x, *of_layer, cache[index])
                written.append(part)
            return self.norm(x), tuple(written)
        graphdef, mutable, frozen = nnx.split(self.layers, _MUTABLE, ...)

        def step(x, inputs):
            window, rotates, *state = inputs
            if placement is not None:
                state = placement.weights(state)
            layer = nnx.merge(graphdef, *state)
            x, part = run(layer, x, window, rotates, None)
            if placement is not None:
                x = placement.activations(x)
            return x, (nnx.state(layer, _MUTABLE), part if keep else None)

        if self.remat:
            step = jax.checkpoint(step, prevent_cse=False)  # The scan itself keeps the two passes apart.
        x, (mutable, written) = jax.lax.scan(step, x, (windows, rotary, mutable, frozen))
        if jax.tree.leaves(mutable):
            nnx.update(self.layers, mutable)
        return self.norm(x), written

    def _windows(self, keys: int | None):
        """The window of all layers as an int, one for each as int32 [L], or None if it hides none of so many keys."""
        window, slides = self.config.sliding_window, self.config.sliding_layers
        if window is None or not any(slides) or (keys is not None and keys <= window):
            return None
        return window if all(slides) else jnp.asarray(np.where(slides, window, np.iinfo(np.int32).max), jnp.int32)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits of hidden states, through the embedding if it is tied, else through `lm_head`.

        Args:
          hidden: [..., D] after the final norm.

        Returns:
          float32 [..., V], accumulated in float32 (float64 for a float64 model).
        """
        if self.config.tie_word_embeddings:
            embedding = self.embed_tokens.embedding[...].astype(self.dtype)
            return jnp.einsum(
                "...d,vd->...v", hidden.astype(self.dtype), embedding, preferred_element_type=self.wide_dtype
            )
        return self.lm_head(hidden).astype(self.wide_dtype)

    def init_cache(self, batch: int, length: int) -> tuple[Cache, ...]:
        """An empty cache.

        Args:
          batch: B.
          length: S, the most tokens a row will hold.

        Returns:
          Zeros in the compute dtype, one `Cache` per layer.
        """
        config = self.config
        k = jnp.zeros((batch, config.num_kv_heads, config.head_dim, length), self.dtype)
        return tuple(Cache(jnp.copy(k), jnp.copy(k.swapaxes(2, 3))) for _ in range(config.num_layers))

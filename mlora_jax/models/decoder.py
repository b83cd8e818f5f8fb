"""The Llama-family decoder: grouped-query attention, rotary positions, RMSNorm and SwiGLU. One scan runs the layers.

Axes: B batch, T time, S cache slots, D hidden, V vocabulary, L layer, H query heads, KV key and value heads,
Hd features of a head. Attributes have the names that Hugging Face uses, so users know the path of a module, such as
`layers.self_attn.q_proj`. Projections are called and their weights are never read, because an adapter may have replaced
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mlora_jax.core.product import ADAPTED_OUTPUT, RANK_SPACE
from mlora_jax.models.attention import Segments, Spans
from mlora_jax.models.config import DecoderConfig
from mlora_jax.models.decoder_layers import (
    Cache,
    DecoderLayer,
    RMSNorm,
    StackedCache,
    linear_layer,
    rope_frequencies,
    segment_positions,
    within_window,
)
from mlora_jax.models.flash import LEAST, Flash
from mlora_jax.models.segments import ATTENDED

# The state that a layer may change while it runs. Only added modules, such as dropout, have any.
_MUTABLE = (nnx.RngState, nnx.BatchStat)

# How much is computed again -> what jax keeps of a layer besides its inputs. "none" keeps everything.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RANK_SPACE, ADAPTED_OUTPUT, ATTENDED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
FEW_LAYERS = 8  # up to this number, layers are compiled one by one for training on a CPU, and keep their activations


def choose_remat(setting: str, num_layers: int) -> str:
    """Returns the key of `REMAT` that a setting of `config.train.remat` stands for.

    Args:
      setting: a key of `REMAT`, which is returned, or "auto". A loop over many layers has to copy what it keeps for the
        backward pass, so "auto" is "dots" for more than `FEW_LAYERS` layers, else "none".
      num_layers: L.

    >>> choose_remat("auto", 6), choose_remat("auto", 30), choose_remat("full", 6)
    ('none', 'dots', 'full')
    """
    if setting != "auto":
        return setting
    return "dots" if num_layers > FEW_LAYERS else "none"


def _unstacked(state: Any, layers: int) -> Iterator[Any]:
    """Yields the state of each layer. The gradient of a stacked array is then one concatenation."""
    leaves, structure = jax.tree.flatten(state)
    parts = [jax.lax.split(leaf, [1] * layers, axis=0) for leaf in leaves]
    for index in range(layers):
        yield jax.tree.unflatten(structure, [jnp.squeeze(part[index], axis=0) for part in parts])


def _behind_window(texts: Segments | None, window: int | jax.Array) -> Segments | None:
    """Returns segments of which a query sees no key further back than a window that ends with itself."""
    if texts is None:
        return None
    last = jnp.arange(texts.first_keys.shape[1], dtype=jnp.int32)[None]
    return Segments(texts.ids, jnp.maximum(texts.first_keys, last - window + 1), windowed=True)


class Decoder(nnx.Module):
    """A Llama-family language model whose layers are one module with a leading layer axis.

    Args:
      config: the shape of the model.
      dtype: the dtype of weights and compute. Norms, softmax, rotary positions and logits are in float32 at least.
      rngs: the keys for fresh weights, which are normal with the standard deviation `config.initializer_range`.

    Attributes:
      remat: how much of each layer the backward pass computes again instead of storing it, a key of `REMAT`.
      unroll: whether the layers are compiled one by one instead of as a loop. It saves a CPU the copies with which a
        loop keeps activations for the backward pass, and costs compile time.
      placement: the placement of weights and activations on a mesh while the decoder runs, an object like
        `mlora_jax.parallel.rules.Placement`; None: one device.
      flash_from: the number of tokens per row from which a TPU attends by the flash kernel; None: never.
      cache_form: how a layer stores its keys and values if not all of their features are kept, a hashable object like
        `mlora_jax.kv_cache.CutForm`; None: a `Cache` or a `StackedCache` holds all features.
      quantization: only where `mlora_jax.models.quantized` made the decoder: its `Quantization`, or None.

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

    quantization: Any  # An annotation alone: only `mlora_jax.models.quantized` sets the attribute.

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = "none"
        self.unroll = False
        self.placement: Any = None
        self.flash_from: int | None = LEAST
        self.cache_form: Any = None
        normal = nnx.initializers.normal(config.initializer_range)
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, embedding_init=normal, rngs=rngs
        )

        def layer(key: jax.Array) -> DecoderLayer:
            return DecoderLayer(config, dtype=dtype, rngs=nnx.Rngs(key))

        graphdef = nnx.graphdef(nnx.eval_shape(layer, jax.random.key(0)))
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(layer(key)))(keys))  # [L, ...]
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = linear_layer(
                config, config.hidden_size, config.vocab_size, bias=False, dtype=dtype, rngs=rngs
            )
            self.lm_head.preferred_element_type = self.wide_dtype

    @property
    def wide_dtype(self) -> np.dtype:
        """The dtype of reductions and logits: float32, or float64 for a float64 model."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        parent_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the logits of the next token at every position.

        Args:
          tokens: int32 [B, T], right-padded if rows differ in length.
          positions: see `hidden`.
          segment_ids: see `hidden`.
          parent_ids: see `hidden`.

        Returns:
          float32 [B, T, V] (float64 for a float64 model).
        """
        return self.head(self.hidden(tokens, positions=positions, segment_ids=segment_ids, parent_ids=parent_ids))

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        parent_ids: jax.Array | None = None,
        spans: Spans | None = None,
        cache: tuple[Cache, ...] | StackedCache | None = None,
        layers: Sequence[DecoderLayer] | None = None,
    ) -> Any:
        """Returns the hidden states after the final norm.

        Args:
          tokens: int32 [B, T], right-padded if rows differ in length. An id outside 0..V-1 gives NaN.
          positions: int32 [B, T]; None: 0..T-1, or from 0 in every segment. With a cache, a position is also the slot
            that its token is written to, and a query sees the slots up to its own. A token whose position lies beyond
            the cache is not written. Sliding windows are counted in positions.
          segment_ids: integers [B, T]; tokens of different segments do not see each other.
          parent_ids: integers [B, T], used with segment ids. A token also sees the earlier tokens of the segment with
            this id. So a row can hold a context once, with all its continuations. `positions` must then give the
            position at which each continuation begins.
          spans: used with segment ids. The places of texts that do not see each other, which save a CPU work.
          cache: the cache from `init_cache`, `prefill` or an earlier call. With a `StackedCache`, one scan runs the
            layers.
          layers: used with one `Cache` for each layer. The result of `single_layers()`, which a decoding loop then
            computes only once.

        Returns:
          [B, T, D] in the compute dtype; with a cache, the pair (hidden states, new cache).

        Raises:
          ValueError: segment ids are given with a cache, or parent ids without segment ids or positions.
        """
        if parent_ids is not None and (segment_ids is None or positions is None):
            raise ValueError("parent_ids needs segment_ids and positions: which tokens are a continuation, and where")
        if segment_ids is not None and cache is not None:
            raise ValueError("segment_ids and cache exclude each other: decode packed texts as rows of their own")
        # In these cases the distance of two positions is below the number of keys.
        counted = positions is None or cache is not None
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
            held = cache if isinstance(cache, StackedCache) else cache[0]
            slots = jnp.arange(held.slots)[None, None, None]
            mask = slots <= positions[:, None, :, None]  # [B, 1, T, S]
        texts = None
        if segment_ids is not None and parent_ids is None and counted:
            starts = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] - positions
            texts = Segments(segment_ids, starts, windowed=False)
        x, written = self._run_layers(tokens, positions, mask, cache, layers, spans, texts, counted=counted)
        return x if cache is None else (x, written)

    def prefill(
        self, tokens: jax.Array, slots: int, *, stacked: bool = False
    ) -> tuple[jax.Array, tuple[Cache, ...] | StackedCache]:
        """Computes the hidden states of whole prompts, and a cache that holds them and has room for more tokens.

        The result is that of `hidden` with an empty cache, but this method does not attend to empty slots.

        Args:
          tokens: int32 [B, T], right-padded if rows differ in length.
          slots: S, the largest number of tokens that a row will hold, at least T.
          stacked: the form of the cache, see `init_cache`. A `cache_form` has arrays for each layer in any case.

        Returns:
          The pair (hidden states [B, T, D] in the compute dtype, cache).
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x, kept = self._run_layers(tokens, positions, None, keep=True)
        if self.cache_form is not None:
            return x, tuple(self.cache_form.cut(index, each, slots) for index, each in enumerate(kept))
        room = (0, slots - tokens.shape[1])
        k = jnp.pad(kept.k, [*[(0, 0)] * 4, room])  # [L, B, KV, Hd, S]
        v = jnp.pad(kept.v, [*[(0, 0)] * 3, room, (0, 0)])
        if stacked:
            return x, StackedCache(k, v)
        return x, tuple(Cache(k[index], v[index]) for index in range(self.config.num_layers))

    def single_layers(self) -> tuple[DecoderLayer, ...]:
        """Returns every layer as a module of its own."""
        graphdef, state = nnx.split(self.layers)
        parts = (jax.tree.map(lambda leaf, index=index: leaf[index], state) for index in range(self.config.num_layers))
        return tuple(nnx.merge(graphdef, part) for part in parts)

    def _run_layers(
        self, tokens, positions, mask, cache=None, layers=None, spans=None, texts=None, *, counted=True, keep=False
    ) -> tuple[jax.Array, Any]:
        """Returns the hidden states and, with a cache, the new cache of each layer.

        Args:
          tokens: see `hidden`.
          positions: int32 [B, T].
          mask: boolean [B, 1, T, S] or None.
          cache: see `hidden`.
          layers: see `hidden`.
          spans: see `hidden`.
          texts: the `Segments` of packed rows whose positions begin at zero in every segment; None otherwise.
          counted: whether the distance of any two positions of a row is below the number of keys.
          keep: whether to return, where no cache is given, a `Cache` of these tokens whose arrays begin with [L], or
            one `Cache` for each layer if there is a `cache_form`.
        """
        keys = positions if cache is None else jnp.arange(mask.shape[-1], dtype=jnp.int32)[None]
        windows = self._windows(keys.shape[1] if counted else None)
        if isinstance(windows, int):
            texts = _behind_window(texts, windows)
            mask, windows = within_window(mask, windows, positions, keys), None
        placement = self.placement
        flash = Flash(self.flash_from, None if placement is None else placement.mesh)
        rotary = None if self.config.rotary_layers is None else jnp.asarray(self.config.rotary_layers)
        frequencies = jnp.asarray(rope_frequencies(self.config), self.wide_dtype)
        turned = positions[..., None, None].astype(self.wide_dtype)  # [B, T, 1, 1]
        angles = turned * jnp.expand_dims(frequencies, range(positions.ndim + 1))  # [B, T, 1, Hd / 2]
        rotation = jnp.cos(angles), jnp.sin(angles)

        def run(layer, x, window, rotates, part):
            seen, inside = mask, texts
            if window is not None:
                seen, inside = within_window(mask, window, positions, keys), _behind_window(texts, window)
            turn = rotation
            if rotates is not None:
                turn = jnp.where(rotates, rotation[0], 1.0), jnp.where(rotates, rotation[1], 0.0)
            return layer(x, turn, seen, positions, part, spans, flash, inside)

        if placement is None:
            x = self.embed_tokens(tokens)
        else:
            graphdef, table = nnx.split(self.embed_tokens)
            table = placement.weights({"embed_tokens": table})["embed_tokens"]
            x = placement.activations(nnx.merge(graphdef, table)(tokens))
        apart = cache is not None and not isinstance(cache, StackedCache)
        if apart or (keep and self.cache_form is not None):
            written = []
            for index, layer in enumerate(self.single_layers() if layers is None else layers):
                window, rotates = (None if each is None else each[index] for each in (windows, rotary))
                x, part = run(layer, x, window, rotates, None if cache is None else cache[index])
                written.append(part)
            return self.norm(x), tuple(written)
        graphdef, mutable, frozen = nnx.split(self.layers, _MUTABLE, ...)
        if self.unroll and cache is None and not keep and placement is None and not jax.tree.leaves(mutable):
            for index, state in enumerate(_unstacked(frozen, self.config.num_layers)):
                window, rotates = (None if each is None else each[index] for each in (windows, rotary))

                def one(x, state, window=window, rotates=rotates):
                    return run(nnx.merge(graphdef, mutable, state), x, window, rotates, None)[0]

                if self.remat != "none":
                    one = jax.checkpoint(one, policy=REMAT[self.remat])
                x = one(x, state)
            return self.norm(x), None

        def step(carry, inputs):
            x, cache = carry
            index, window, rotates, *state = inputs
            if placement is not None:
                state = placement.weights(state)
            layer = nnx.merge(graphdef, *state)
            x, part = run(layer, x, window, rotates, None if cache is None else cache._replace(layer=index))
            if placement is not None:
                x = placement.activations(x)
            if cache is not None:
                cache, part = part._replace(layer=None), None
            return (x, cache), (nnx.state(layer, _MUTABLE), part if keep else None)

        if self.remat != "none":
            # The scan itself keeps the two passes apart.
            step = jax.checkpoint(step, prevent_cse=False, policy=REMAT[self.remat])
        # The cache is carried and written in place. As an input and an output of the scan it would be copied.
        indices = None if cache is None else jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (x, cache), (mutable, written) = jax.lax.scan(step, (x, cache), (indices, windows, rotary, mutable, frozen))
        if jax.tree.leaves(mutable):
            nnx.update(self.layers, mutable)
        return self.norm(x), written if cache is None else cache

    def _windows(self, keys: int | None) -> int | jax.Array | None:
        """Returns the window as an int if all layers share it, else the windows of the layers as int32 [L].

        Returns None where no window hides any of this number of keys.
        """
        window, slides = self.config.sliding_window, self.config.sliding_layers
        if window is None or slides is None or not any(slides) or (keys is not None and keys <= window):
            return None
        return window if all(slides) else jnp.asarray(np.where(slides, window, np.iinfo(np.int32).max), jnp.int32)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Computes the logits of hidden states with the embedding if the weights are tied, else with `lm_head`.

        Args:
          hidden: the hidden states [..., D] after the final norm.

        Returns:
          float32 [..., V], accumulated in float32 (float64 for a float64 model).
        """
        if self.config.tie_word_embeddings:
            embedding = self.embed_tokens.embedding[...].astype(self.dtype)
            return jnp.einsum(
                "...d,vd->...v", hidden.astype(self.dtype), embedding, preferred_element_type=self.wide_dtype
            )
        return self.lm_head(hidden).astype(self.wide_dtype)

    def init_cache(self, batch: int, length: int, *, stacked: bool = False) -> tuple[Cache, ...] | StackedCache:
        """Returns an empty cache.

        With stacked arrays, a program that decodes does not grow with the number of layers. A CPU copies a layer's part
        of them at every step, so that it is faster with arrays for each layer.

        Args:
          batch: B, the number of rows.
          length: S, the largest number of tokens that a row will hold.
          stacked: whether to return a `StackedCache`. A `cache_form` has arrays for each layer in any case.

        Returns:
          One `Cache` of zeros in the compute dtype for each layer, or a `StackedCache` of zeros. With a `cache_form`,
          its own cache for each layer.
        """
        if self.cache_form is not None:
            return self.cache_form.empty(batch, length, self.dtype)
        config = self.config
        k = jnp.zeros((batch, config.num_kv_heads, config.head_dim, length), self.dtype)
        if stacked:
            k = jnp.zeros((config.num_layers, *k.shape), self.dtype)
            return StackedCache(k, jnp.zeros_like(k.swapaxes(3, 4)))
        return tuple(Cache(jnp.copy(k), jnp.copy(k.swapaxes(2, 3))) for _ in range(config.num_layers))

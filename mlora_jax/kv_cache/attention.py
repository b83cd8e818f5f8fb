"""Attention whose keys and values are projected, so that the first entries of a cached vector are a good short cache.

For each layer and each key and value head there are orthogonal matrices U_k and U_v [Hd, Hd]. The cache holds the first
r entries of U_k' k, where k is the key **after** its rotary positions, and the first r entries of U_v' v. A query meets
U_k' q, cut at r. The mixed values return through the first r columns of U_v before they reach `o_proj`:

    scores = (U_k' q)[:r] . (U_k' k)[:r] / sqrt(Hd)
    output = U_v[:, :r] sum_t w_t (U_v' v_t)[:r] + (I - U_v[:, :r] U_v[:, :r]') m

m is the mean value of the head. Its term is a constant, because the weights w sum to one, and it is zero at r = Hd. A
mean key is not needed: it would add the same number to all scores of a query.

The ranks r are data. So one executable serves every rate, per layer and head. With a `CutCache` they are shapes
instead, and the cache is really smaller. The linear layers are called and their weights are not read, so adapters may
sit on them. This is why U_v is a small product of its own, although the weights of `o_proj` could hold it.

Source: Lin et al., MatryoshkaKV (arXiv 2410.14731), and the authors' code (github.com/The-kamisato/MatryoshkaKV-cache),
which projects queries and keys after the rotation, and keeps the mean of the values.

Axes: B batch, T time, L layer, H query heads, KV key and value heads, G = H / KV, Hd features of a head.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlora_jax.kv_cache.cut import CutCache, CutForm
from mlora_jax.kv_cache.ranks import Ranks
from mlora_jax.kv_cache.variables import KVBasis, KVMean, KVRank
from mlora_jax.models.attention import Segments, Spans, attend, attend_cached
from mlora_jax.models.decoder import Decoder
from mlora_jax.models.decoder_layers import Attention, Cache, StackedCache
from mlora_jax.models.flash import Flash


@dataclasses.dataclass(frozen=True)
class Projections:
    """The projections of all layers and heads.

    Attributes:
      u_k: [L, KV, Hd, Hd], the orthogonal matrices of the keys, float32 at least.
      u_v: [L, KV, Hd, Hd], those of the values.
      mean_v: [L, KV, Hd], the mean values.
    """

    u_k: np.ndarray | jax.Array
    u_v: np.ndarray | jax.Array
    mean_v: np.ndarray | jax.Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, KV, Hd)."""
        layers, heads, head_dim = self.mean_v.shape
        return layers, heads, head_dim


class ProjectedAttention(Attention):
    """An attention that projects keys and values, and keeps the first entries of both.

    Args:
      attention: the attention to replace, stacked over layers or not. Its projections and norms are used as they are.
      projections: the projections, with the same leading axes.
      ranks: the ranks, with the same leading axes.
    """

    def __init__(self, attention: Attention, projections: Projections, ranks: Ranks) -> None:
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.qk_norm, self.head_dim = attention.qk_norm, attention.head_dim
        if self.qk_norm:
            self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.k_basis, self.v_basis = KVBasis(jnp.asarray(projections.u_k)), KVBasis(jnp.asarray(projections.u_v))
        self.v_mean = KVMean(jnp.asarray(projections.mean_v))
        self.k_rank, self.v_rank = (KVRank(jnp.asarray(kind, jnp.int32)) for kind in ranks)

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        mask: jax.Array | None,
        positions: jax.Array,
        cache: Cache | StackedCache | CutCache | None,
        spans: Spans | None = None,
        flash: Flash | None = None,
        segments: Segments | None = None,
    ) -> tuple[jax.Array, Cache | StackedCache | CutCache]:
        """Mixes [B, T, D] over time, and returns the result and the new cache, which holds projected entries."""
        batch, length, _ = x.shape
        query, key, value = self._heads(x, rotation)
        u_k, u_v = self.k_basis[...], self.v_basis[...]  # [KV, Hd, Hd]
        query = query.reshape(batch, length, len(u_k), -1, self.head_dim)
        query = _product("btkgd,kde->btkge", query, u_k).reshape(batch, length, -1, self.head_dim)
        key, value = _product("btkd,kde->btke", key, u_k), _product("btkd,kde->btke", value, u_v)
        key, value = self._masked(key, self.k_rank), self._masked(value, self.v_rank)
        if isinstance(cache, CutCache):
            if mask is None:
                raise ValueError("a cache needs a mask, which hides the slots without a token")
            cache = cache.written(key, value, positions)
            mixed = self._attend_cut(query, cache, mask)
        elif cache is None:
            mixed = attend(query, key, value, mask, causal=True, spans=spans, flash=flash, segments=segments)
            cache = Cache(key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3))
        else:
            if mask is None:
                raise ValueError("a cache needs a mask, which hides the slots without a token")
            cache = cache.written(key, value, positions)
            mixed = attend_cached(query, *(part.astype(x.dtype) for part in cache.own()), mask=mask)
        if not isinstance(cache, CutCache):
            mixed = mixed.reshape(batch, length, len(u_v), -1, self.head_dim)
            mixed = _product("btkge,kde->btkgd", mixed, u_v)
        mixed = mixed + self._rest().astype(x.dtype)[None, None, :, None]  # [B, T, KV, G, Hd]
        return self.o_proj(mixed.reshape(batch, length, -1)), cache

    def _masked(self, x: jax.Array, rank: KVRank) -> jax.Array:
        """Sets the entries of x [..., KV, Hd] that are not kept to zero."""
        kept = jnp.arange(self.head_dim)[None] < rank[...][:, None]  # [KV, Hd]
        return jnp.where(jnp.expand_dims(kept, range(x.ndim - 2)), x, 0)

    def _rest(self) -> jax.Array:
        """Returns the part [KV, Hd] of the mean values that the kept entries lack."""
        u_v, mean = self.v_basis[...], self.v_mean[...]
        kept = self._masked(jnp.einsum("kd,kde->ke", mean, u_v), self.v_rank)
        return mean - jnp.einsum("ke,kde->kd", kept, u_v)

    def _attend_cut(self, query: jax.Array, cache: CutCache, mask: jax.Array) -> jax.Array:
        """Attends to a cut cache: query [B, T, H, Hd] -> [B, T, KV, G, Hd]."""
        batch, length, _, features = query.shape
        groups = len(self.v_basis[...])
        query = query.reshape(batch, length, groups, -1, features)
        mixed = []
        for heads, part in zip(cache.heads, cache.parts, strict=True):
            chosen, rank, value_rank = np.asarray(heads), part.k.shape[-2], part.v.shape[-1]
            asked = query[:, :, chosen, :, :rank].reshape(batch, length, -1, rank)
            stored = (kept.astype(query.dtype) for kept in part.own())
            found = attend_cached(asked, *stored, mask=mask, head_dim=features)
            found = found.reshape(batch, length, len(heads), -1, value_rank)
            mixed.append(_product("btkge,kde->btkgd", found, self.v_basis[...][chosen, :, :value_rank]))
        order = np.argsort(np.concatenate(cache.heads))
        return jnp.concatenate(mixed, axis=2)[:, :, order]


def _product(axes: str, x: jax.Array, u: jax.Array) -> jax.Array:
    """Multiplies by bases in float32 or better, because rounded bases are not orthogonal; the result has x's dtype."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(axes, x.astype(wide), u.astype(wide)).astype(x.dtype)


def identity(model: Decoder) -> Projections:
    """Returns projections that change nothing, for a model."""
    layers, heads, head_dim = cache_shape(model)
    u = np.broadcast_to(np.eye(head_dim, dtype=np.float32), (layers, heads, head_dim, head_dim))
    return Projections(u, u, np.zeros((layers, heads, head_dim), np.float32))


def cache_shape(model: Decoder) -> tuple[int, int, int]:
    """Returns (L, KV, Hd) of a model."""
    return model.config.num_layers, model.config.num_kv_heads, model.config.head_dim


def project(model: Decoder, projections: Projections, ranks: Ranks | None = None, *, cut: bool = False) -> Decoder:
    """Replaces the attention of a decoder by one that projects keys and values.

    The paths of the linear layers stay the same, so adapters of the decoder fit, before and after.

    Args:
      model: the decoder, with adapters or without. It is not changed, and the new one shares its arrays.
      projections: the projections of all layers and heads.
      ranks: the ranks, from 1 to Hd; None: all entries are kept.
      cut: whether a cache stores only the kept entries. The ranks are then constants of a compiled program. Without it
        a cache has all entries, of which those that are not kept are zero, and the ranks are data.

    Returns:
      The new decoder.

    Raises:
      ValueError: the projections or the ranks have another shape than the model's heads, a rank is outside 1..Hd, or
        the model has projections already.

    Example:
      >>> from mlora_jax.models.config import DecoderConfig
      >>> config = DecoderConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> project(model, identity(model)).layers.self_attn.k_rank.tolist()
      [[4, 4], [4, 4]]
    """
    shape = cache_shape(model)
    if isinstance(model.layers.self_attn, ProjectedAttention):
        raise ValueError("the model has projections of keys and values already: project the model without them")
    check_fit(projections, shape)
    ranks = Ranks.full(*shape) if ranks is None else ranks
    for name, kind in zip(Ranks._fields, ranks, strict=True):
        if kind.shape != shape[:2] or kind.min() < 1 or kind.max() > shape[2]:
            raise ValueError(
                f"the ranks of {name} must be [{shape[0]}, {shape[1]}] integers in 1..{shape[2]}, "
                f"not {list(kind.shape)} in {kind.min()}..{kind.max()}"
            )
    model = nnx.clone(model)
    model.layers.self_attn = ProjectedAttention(model.layers.self_attn, projections, ranks)
    model.cache_form = CutForm.of(ranks) if cut else None
    return model


def check_fit(projections: Projections, shape: tuple[int, int, int]) -> None:
    """Raises a ValueError if projections are not those of heads of this shape.

    Args:
      projections: the projections.
      shape: (L, KV, Hd) of the model.
    """
    square = (*shape, shape[2])
    found = projections.u_k.shape, projections.u_v.shape, projections.mean_v.shape
    if found != (square, square, shape):
        layers, heads, features = projections.shape
        raise ValueError(
            f"the projections are for {layers} layers of {heads} key and value heads with {features} features; the "
            f"model has {shape[0]} layers of {shape[1]} heads with {shape[2]} features"
        )

"""The cache of deployment, which stores only the entries that are kept: its arrays are as small as its ranks.

The heads of one layer may have different ranks. Those with the same rank of keys and the same rank of values share a
pair of arrays, so no entry is padding: the bytes are those of the ranks. If all heads of a layer have the same ranks,
the layer has one pair, k [B, KV, r, S] and v [B, KV, S, r].

Axes: B batch, T time, S cache slots, L layer, KV key and value heads, Hd features of a head, r kept entries.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mlora_jax.kv_cache.ranks import Ranks
from mlora_jax.models.decoder_layers import Cache

Heads = tuple[tuple[int, ...], ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=("heads",))
@dataclasses.dataclass(frozen=True)
class CutCache:
    """The kept entries of the projected keys and values of one layer.

    Attributes:
      parts: for each group of heads a `Cache` with k [B, n, r, S] and v [B, n, S, r'], in the compute dtype.
      heads: for each group the indices of its n heads.
    """

    parts: tuple[Cache, ...]
    heads: Heads

    @property
    def slots(self) -> int:
        """S, the largest number of tokens of a row."""
        return self.parts[0].slots

    def written(self, key: jax.Array, value: jax.Array, positions: jax.Array) -> CutCache:
        """Returns the cache with more tokens; positions beyond it are not written.

        Args:
          key: the projected keys [B, T, KV, Hd], whose first entries are kept.
          value: the projected values [B, T, KV, Hd].
          positions: int32 [B, T], the slots of the tokens.
        """
        parts = []
        for heads, part in zip(self.heads, self.parts, strict=True):
            chosen, (rank, value_rank) = np.asarray(heads), (part.k.shape[-2], part.v.shape[-1])
            kept = key[:, :, chosen, :rank], value[:, :, chosen, :value_rank]
            parts.append(part.written(*kept, positions))
        return CutCache(tuple(parts), self.heads)


@dataclasses.dataclass(frozen=True)
class CutForm:
    """The ranks of all layers and heads as constants of a compiled program, which decide the shapes of its cache.

    Attributes:
      k: for each layer the ranks of the keys of its KV heads.
      v: for each layer the ranks of the values.
    """

    k: tuple[tuple[int, ...], ...]
    v: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, ranks: Ranks) -> CutForm:
        """Returns the form of these ranks."""
        return cls(*(tuple(tuple(map(int, heads)) for heads in kind) for kind in ranks))

    def heads(self, layer: int) -> Heads:
        """Returns the heads of a layer in groups with the same ranks.

        >>> CutForm(k=((4, 2, 4),), v=((4, 4, 4),)).heads(0)
        ((0, 2), (1,))
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for head, ranks in enumerate(zip(self.k[layer], self.v[layer], strict=True)):
            groups.setdefault(ranks, []).append(head)
        return tuple(map(tuple, groups.values()))

    def empty(self, batch: int, length: int, dtype: DTypeLike) -> tuple[CutCache, ...]:
        """Returns a cache of zeros for each layer.

        Args:
          batch: B.
          length: S, the largest number of tokens that a row will hold.
          dtype: the compute dtype.
        """

        def part(layer: int, heads: tuple[int, ...]) -> Cache:
            rank, value_rank = self.k[layer][heads[0]], self.v[layer][heads[0]]
            k = jnp.zeros((batch, len(heads), rank, length), dtype)
            return Cache(k, jnp.zeros((batch, len(heads), length, value_rank), dtype))

        groups = [self.heads(layer) for layer in range(len(self.k))]
        return tuple(CutCache(tuple(part(i, each) for each in heads), heads) for i, heads in enumerate(groups))

    def cut(self, layer: int, whole: Cache, slots: int) -> CutCache:
        """Returns the kept entries of a layer's cache, with room for more tokens.

        Args:
          layer: the index of the layer.
          whole: the projected keys [B, KV, Hd, T] and values [B, KV, T, Hd] of all features.
          slots: S, at least T.
        """
        parts, room, groups = [], (0, slots - whole.slots), self.heads(layer)
        for heads in groups:
            chosen = np.asarray(heads)
            k = whole.k[:, chosen, : self.k[layer][heads[0]]]
            v = whole.v[:, chosen, :, : self.v[layer][heads[0]]]
            none = (0, 0)
            parts.append(Cache(jnp.pad(k, (none, none, none, room)), jnp.pad(v, (none, none, room, none))))
        return CutCache(tuple(parts), groups)


def cache_bytes(cache: object) -> int:
    """Returns the bytes of a cache's arrays in any form."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))

"""The factors of a read-out at a rank, layer by layer. Every other format is made from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mlora_jax.core import RankHierarchy, Reading, get_readout, read_out
from mlora_jax.core.hierarchy import check_rank
from mlora_jax.core.product import without_gate
from mlora_jax.core.rank_axes import FACTORS, adapter_layers, leading_axes, rank_of

# One rank for all layers, or path of a module -> one rank per stacked layer, as `mlora_jax.evaluate.Allocation.ranks`.
RankOrRanks = int | Mapping[str, Sequence[int]]


class LayerFactors(NamedTuple):
    """The factors of one layer in a read-out, which adds ``(x a) b`` to the output of the layer.

    Attributes:
      a: [D, r], float32 or float64.
      b: [r, F], of the same dtype, multiplied by the read-out's scale.
    """

    a: np.ndarray
    b: np.ndarray

    @property
    def rank(self) -> int:
        """r, the number of columns of `a`."""
        return self.a.shape[1]


def layer_factors(
    adapter: Any,
    hierarchy: RankHierarchy,
    rank: RankOrRanks,
    *,
    readout: str = "prefix",
    trained_profile: jax.Array | None = None,
    profiles: Mapping[int, jax.Array] | None = None,
) -> dict[tuple[str, int | None], LayerFactors]:
    """Returns the function of a read-out as plain factors.

    Args:
      adapter: the tree of an adapter's leaves; a gate is multiplied into b.
      hierarchy: the S, scales and weights of the adapter, with the same R.
      rank: the read-out's rank, 0..R; or ranks per layer for every module of the adapter.
      readout: a key of `mlora_jax.core.READOUTS` that takes the adapter alone, or one whose profiles are given.
      trained_profile: the profile [R] of the trained function, which "squeeze" keeps; None is `hierarchy.lora()`.
      profiles: rank -> p [R], as `mlora_jax.training.readout_files.read_profiles` returns them; "calibrated" needs
        them.

    Returns:
      (path, layer) -> factors, in the order of the adapter; the layer is None if the module is not stacked. Layers of
      rank 0 are left out.

    Raises:
      ValueError: the read-out is unknown; a rank is outside 0..R or has no fitted profile; the ranks name other modules
        or layers than the adapter has; the factors have another R than the hierarchy.
    """
    if (get_readout(readout).stored == "profiles") != (profiles is not None):
        raise ValueError(f"fitted profiles belong to a read-out that is stored as profiles; got {readout!r}")
    factors = _plain_factors(adapter)
    for path, pair in factors.items():
        for name, factor in pair.items():
            if rank_of(name, factor) != hierarchy.max_rank:
                r = rank_of(name, factor)
                raise ValueError(f"{path} has rank {r}, but the hierarchy's R is {hierarchy.max_rank}")
    if profiles is None:
        reading = read_out(adapter, hierarchy, readout, trained_profile=trained_profile)
    else:
        reading = Reading(adapter, hierarchy, readout, profiles)
    if not isinstance(rank, Mapping):
        spread = reading.layer_ranks(rank)
        rank = rank if spread is None else {path: np.ravel(each).tolist() for path, each in spread.items()}
    ranks = _ranks_of_layers(factors, hierarchy, rank)
    factors = _plain_factors(reading.adapter)
    p_of = {r: np.asarray(reading.layer_profile(r)) for r in {r for rows in ranks.values() for r in rows}}
    found = {}
    for path, pair in factors.items():
        a, b = (np.asarray(pair[name]) for name in FACTORS)
        wide = np.promote_types(a.dtype, np.float32)
        a, b = a.astype(wide), b.astype(wide)
        stacked = a.ndim > 2
        rows = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), ranks[path], strict=True)
        for layer, (left, right, r) in enumerate(rows):
            if r:
                scaled = p_of[r][:r, None].astype(wide) * right[:r]
                found[path, layer if stacked else None] = LayerFactors(left[:, :r], scaled)
    return found


def _plain_factors(adapter) -> dict[str, dict[str, Any]]:
    """Returns dotted path of a layer -> its factors, with a gate multiplied into B."""
    return {path: without_gate(leaves) for path, leaves in adapter_layers(adapter).items()}


def _ranks_of_layers(factors: Mapping, hierarchy: RankHierarchy, rank: RankOrRanks) -> dict[str, tuple[int, ...]]:
    layers = {path: math.prod(leading_axes(pair)) for path, pair in factors.items()}
    ranks = rank if isinstance(rank, Mapping) else {path: (rank,) * count for path, count in layers.items()}
    if set(ranks) != set(layers):
        raise ValueError(f"ranks must name the modules {', '.join(sorted(layers))}; got {', '.join(sorted(ranks))}")
    for path, count in layers.items():
        if len(ranks[path]) != count:
            raise ValueError(f"{path} has {count} layers, got the ranks {tuple(ranks[path])}")
    check = lambda path, r: check_rank(r, f"the rank of {path}", low=0, high=hierarchy.max_rank)  # noqa: E731
    return {path: tuple(check(path, r) for r in ranks[path]) for path in layers}

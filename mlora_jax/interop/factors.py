"""An adapter read out at a rank, layer by layer: what every other format is made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mlora_jax.config import FACTOR_READOUTS
from mlora_jax.core import RankHierarchy, readout_profile, squeeze
from mlora_jax.core.hierarchy import check_rank
from mlora_jax.core.product import without_gate
from mlora_jax.core.rank_axes import FACTORS, PROFILE, adapter_layers, leading_axes, rank_of
from mlora_jax.training.fitted import fitted

# One rank for all, or path of a module -> a rank per stacked layer, as `mlora_jax.evaluate.Allocation.ranks`.
RankOrRanks = int | Mapping[str, Sequence[int]]


class LayerFactors(NamedTuple):
    """One layer's share of an adapter, read out: it adds ``(x a) b`` to what the layer computes.

    Attributes:
      a: [D, r], float32 or float64.
      b: [r, F], alike, with the read-out's scale in it.
    """

    a: np.ndarray
    b: np.ndarray

    @property
    def rank(self) -> int:
        """r."""
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
    """The function of a read-out as plain factors.

    Args:
      adapter: tree of an adapter's leaves; a gate is multiplied into b.
      hierarchy: S, scales and weights, with the same R.
      rank: the read-out's rank, 0..R; or ranks per layer for every module of the adapter.
      readout: "prefix", "nested", "masked", "squeeze" or "calibrated".
      trained_profile: profile [R] of the trained function, which "squeeze" keeps; None is `hierarchy.lora()`.
      profiles: rank -> p [R], as `mlora_jax.training.fitted.read_profiles` gives them; "calibrated" needs them.

    Returns:
      (path, layer) -> factors, in the order of the adapter; the layer is None where nothing is stacked. A layer of rank
      0 is left out.

    Raises:
      ValueError: an unknown read-out, a rank outside 0..R or one that nothing was fitted to, ranks of other modules or
        layers than the adapter's, factors of another R than the hierarchy's.
    """
    known = (*FACTOR_READOUTS, "calibrated")
    if readout not in known:
        raise ValueError(f"unknown read-out {readout!r}; known: {', '.join(known)}")
    if (readout == "calibrated") != (profiles is not None):
        raise ValueError(f"fitted profiles are what 'calibrated' needs, and no other read-out; got {readout!r}")
    factors = {path: without_gate(leaves) for path, leaves in adapter_layers(adapter).items()}
    for path, pair in factors.items():
        for name, factor in pair.items():
            if rank_of(name, factor) != hierarchy.max_rank:
                r = rank_of(name, factor)
                raise ValueError(f"{path} has rank {r}, but the hierarchy's R is {hierarchy.max_rank}")
    ranks = _ranks_of_layers(factors, hierarchy, rank)
    if readout == "squeeze":
        p = hierarchy.lora() if trained_profile is None else trained_profile
        profile = {path: {PROFILE: np.broadcast_to(p, (*leading_axes(pair), len(p)))} for path, pair in factors.items()}
        factors, hierarchy = squeeze(factors, profile, ranks=hierarchy.ranks)
        readout = "prefix"
    used = {r for rows in ranks.values() for r in rows}
    p_of = {
        r: np.asarray(readout_profile(hierarchy, readout, r) if profiles is None else fitted(profiles, r)) for r in used
    }
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

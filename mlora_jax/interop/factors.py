"""An adapter read out at a rank, layer by layer: what every other format is made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mlora_jax.core import RankHierarchy, Reading, get_readout, read_out
from mlora_jax.core.hierarchy import check_rank
from mlora_jax.core.product import path_names

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
    adapter,
    hierarchy: RankHierarchy,
    rank: RankOrRanks,
    *,
    readout: str = "prefix",
    trained_profile: jax.Array | None = None,
    profiles: Mapping[int, jax.Array] | None = None,
) -> dict[tuple[str, int | None], LayerFactors]:
    """The function of a read-out as plain factors.

    Args:
      adapter: tree of factors a [..., D, R] and b [..., R, F].
      hierarchy: S, scales and weights, with the same R.
      rank: of the read-out, 0..R; or ranks per layer, of every module of the adapter.
      readout: "prefix", "nested", "masked", "squeeze" or "calibrated".
      trained_profile: profile [R] of the trained function, which "squeeze" keeps; None is `hierarchy.lora()`.
      profiles: of "calibrated": rank -> p [R], as `mlora_jax.training.readout_files.read_profiles`.

    Returns:
      (path, layer) -> factors, in the order of the adapter; the layer is None where nothing is stacked. A layer of rank
      0 is left out.

    Raises:
      ValueError: an unknown read-out, a rank outside 0..R or one that nothing was fitted to, ranks of other modules or
        layers than the adapter's, factors of another R than the hierarchy's.
    """
    if (get_readout(readout).stored == "profiles") != (profiles is not None):
        raise ValueError(f"fitted profiles belong to a read-out that is stored as profiles; got {readout!r}")
    factors = by_path(adapter)
    for path, pair in factors.items():
        if pair["a"].shape[-1] != hierarchy.max_rank:
            raise ValueError(f"{path} has rank {pair['a'].shape[-1]}, but the hierarchy's R is {hierarchy.max_rank}")
    ranks = _ranks_of_layers(factors, hierarchy, rank)
    if profiles is None:
        reading = read_out(adapter, hierarchy, readout, trained_profile=trained_profile)
    else:
        reading = Reading(adapter, hierarchy, readout, profiles)
    factors = by_path(reading.adapter)
    p_of = {r: np.asarray(reading.profile(r)) for r in {r for rows in ranks.values() for r in rows}}
    found = {}
    for path, pair in factors.items():
        wide = np.promote_types(pair["a"].dtype, np.float32)
        a, b = (np.asarray(pair[name]).astype(wide) for name in ("a", "b"))
        stacked = a.ndim > 2
        rows = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), ranks[path], strict=True)
        for layer, (left, right, r) in enumerate(rows):
            if r:
                scaled = p_of[r][:r, None].astype(wide) * right[:r]
                found[path, layer if stacked else None] = LayerFactors(left[:, :r], scaled)
    return found


def by_path(adapter) -> dict[str, dict[str, Any]]:
    """Dotted path of a module -> {"a": [..., D, R], "b": [..., R, F]}.

    Raises:
      ValueError: the tree holds no factors, or something else.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
        *parent, role = path_names(path)
        found.setdefault(".".join(parent), {})[role] = leaf
    if not found or any(set(pair) != {"a", "b"} for pair in found.values()):
        raise ValueError("this tree is no adapter: pass the third value of split(model)")
    return found


def _ranks_of_layers(factors: Mapping, hierarchy: RankHierarchy, rank: RankOrRanks) -> dict[str, tuple[int, ...]]:
    layers = {path: math.prod(pair["a"].shape[:-2]) for path, pair in factors.items()}
    ranks = rank if isinstance(rank, Mapping) else {path: (rank,) * count for path, count in layers.items()}
    if set(ranks) != set(layers):
        raise ValueError(f"ranks must name the modules {', '.join(sorted(layers))}; got {', '.join(sorted(ranks))}")
    for path, count in layers.items():
        if len(ranks[path]) != count:
            raise ValueError(f"{path} has {count} layers, got the ranks {tuple(ranks[path])}")
    check = lambda path, r: check_rank(r, f"the rank of {path}", low=0, high=hierarchy.max_rank)  # noqa: E731
    return {path: tuple(check(path, r) for r in ranks[path]) for path in layers}

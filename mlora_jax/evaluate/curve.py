"""The rank-accuracy curve: what each prefix of one adapter is worth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from mlora_jax.adapt import set_profile
from mlora_jax.core import RankHierarchy, readout_profile, squeeze, summarize

# Anything that gives per-item verdicts [items] (bool) of an adapter under a profile [R].
Evaluator = Callable[[object, jax.Array], np.ndarray]


@dataclasses.dataclass(frozen=True)
class RankCurve:
    """Accuracy at every rank.

    Attributes:
      readout: "prefix", "nested", "masked" or "squeeze".
      ranks: S.
      accuracies: in 0..1, one per rank.
      standard_errors: of the accuracies over items, ``sqrt(a (1 - a) / (n - 1))`` (the harness's estimate).
      items: how many items each accuracy is over.
      linear: AURAC over the rank.
      log2: AURAC over the binary logarithm of the rank.
      mean: plain mean of the accuracies.
    """

    readout: str
    ranks: tuple[int, ...]
    accuracies: tuple[float, ...]
    standard_errors: tuple[float, ...]
    items: int
    linear: float
    log2: float
    mean: float


_squeezed = jax.jit(lambda adapter, profile: squeeze(adapter, profile)[0])


def accuracy_and_error(verdicts: np.ndarray) -> tuple[float, float]:
    """Mean of 0/1 verdicts [n] and the standard error of that mean (0 for one item)."""
    n, accuracy = len(verdicts), float(np.mean(verdicts))
    return accuracy, math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else 0.0


def rank_curve(
    evaluate: Evaluator,
    adapter,
    profile,
    hierarchy: RankHierarchy,
    *,
    readout: str = "prefix",
    function: jax.Array | None = None,
) -> RankCurve:
    """Accuracy of one adapter at every rank of S under a read-out.

    Args:
      evaluate: (adapter, p [R]) -> verdicts [items].
      adapter: trained tree.
      profile: the adapter's profile tree; used by "squeeze" only.
      hierarchy: S, scales and weights.
      readout: a key of `READOUTS`, or "squeeze": prefixes of the singular value decomposition of the trained function.
      function: profile [R] of the trained function at full rank, which "squeeze" keeps; None is `hierarchy.lora()`.

    Raises:
      ValueError: an unknown read-out.
    """
    name = readout
    if readout == "squeeze":
        readout = "prefix"
        function = hierarchy.lora() if function is None else function
        adapter = jax.block_until_ready(_squeezed(adapter, set_profile(profile, function)))
        hierarchy = RankHierarchy(hierarchy.ranks, max_rank=hierarchy.max_rank)  # the scale is in the factors now
    verdicts = [evaluate(adapter, readout_profile(hierarchy, readout, rank)) for rank in hierarchy.ranks]
    accuracies, errors = zip(*map(accuracy_and_error, verdicts), strict=True)
    areas = dataclasses.asdict(summarize(accuracies, hierarchy.ranks))
    return RankCurve(name, hierarchy.ranks, accuracies, errors, len(verdicts[0]), **areas)

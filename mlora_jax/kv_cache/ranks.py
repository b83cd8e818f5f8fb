"""The ranks of a cache: how many entries each layer and head keeps of a key and of a value, and what they cost.

Axes: L layer, KV key and value heads, Hd features of a head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from mlora_jax.core.ranges import Range

KINDS = ("k", "v")  # the order of the first axis of `Ranks.stacked` and of the first column of `RankPath.order`
_BUDGET = Range(low=0.0, high=1.0, open_low=True)


class Ranks(NamedTuple):
    """The number of entries that are kept.

    Attributes:
      k: int32 [L, KV], of each key, from 1 to Hd.
      v: int32 [L, KV], of each value, from 1 to Hd.
    """

    k: np.ndarray | jax.Array
    v: np.ndarray | jax.Array

    @classmethod
    def full(cls, layers: int, heads: int, head_dim: int) -> Ranks:
        """Returns the ranks of a cache that keeps everything."""
        return cls(*(np.full((layers, heads), head_dim, np.int32) for _ in KINDS))

    @property
    def stacked(self) -> np.ndarray:
        """int32 [2, L, KV]: the ranks of keys, then those of values."""
        return np.stack([self.k, self.v])

    @property
    def entries(self) -> int:
        """The number of entries that one token takes in the cache, over all layers and heads."""
        return int(self.stacked.sum())


def check_levels(levels: int, head_dim: int) -> int:
    """Returns the number of entries between two ranks of the grid Hd/levels, 2 Hd/levels, ..., Hd.

    Args:
      levels: the number of ranks of the grid.
      head_dim: Hd.

    Raises:
      ValueError: Hd is not a multiple of the number of levels.

    >>> check_levels(8, 64)
    8
    """
    if levels < 1 or head_dim % levels:
        fitting = ", ".join(str(n) for n in range(1, head_dim + 1) if head_dim % n == 0)
        raise ValueError(f"levels={levels} does not divide the {head_dim} features of a head; allowed: {fitting}")
    return head_dim // levels


def check_budget(budget: float, name: str = "kv_budget") -> float:
    """Returns a budget, a fraction of the bytes of the full cache, if it is above 0 and at most 1.

    Raises:
      ValueError: the budget is outside this range.
    """
    try:
        return _BUDGET.check(name, float(budget))
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number above 0 and at most 1, got {budget!r}") from None


def uniform_ranks(budget: float, layers: int, heads: int, head_dim: int) -> Ranks:
    """Returns the largest rank, the same for all layers and heads, whose cache fits a budget.

    Args:
      budget: the fraction of the bytes of the full cache.
      layers: L.
      heads: KV.
      head_dim: Hd.

    Raises:
      ValueError: the budget is outside (0, 1], or leaves less than one entry per head.

    >>> int(uniform_ranks(0.4, 2, 1, 64).k[0, 0])
    25
    """
    rank = math.floor(check_budget(budget) * head_dim + 1e-9)
    if rank < 1:
        raise ValueError(f"kv_budget={budget} keeps no entry of {head_dim}: it must be at least {1 / head_dim:.4g}")
    return Ranks(*(np.full((layers, heads), rank, np.int32) for _ in KINDS))


@dataclasses.dataclass(frozen=True)
class RankPath:
    """The order in which a search lowers the ranks, from the full cache on. Its beginnings are the ranks of budgets.

    Attributes:
      order: int32 [steps, 3], of each step: the index in `KINDS`, the layer and the head whose rank falls.
      step: the number of entries by which a rank falls.
      shape: (L, KV, Hd).
    """

    order: np.ndarray
    step: int
    shape: tuple[int, int, int]

    def at(self, budget: float) -> Ranks:
        """Returns the ranks after as few steps as the budget asks for.

        Args:
          budget: the fraction of the bytes of the full cache.

        Raises:
          ValueError: the budget is outside (0, 1], or below the smallest one that was searched.
        """
        layers, heads, head_dim = self.shape
        full = len(KINDS) * layers * heads * head_dim
        steps = math.ceil(full * (1.0 - check_budget(budget)) / self.step - 1e-9)
        if steps > len(self.order):
            least = 1.0 - len(self.order) * self.step / full
            raise ValueError(f"kv_budget={budget} is below {least:.4g}, the smallest budget that was searched")
        taken = np.zeros((len(KINDS), layers, heads), np.int32)
        np.add.at(taken, tuple(self.order[:steps].T), 1)
        return Ranks(*(head_dim - self.step * taken))


# How the ranks of a budget are found -> what that means, for messages and help.
RATES: Mapping[str, str] = {
    "searched": "the ranks per layer and head that the search found for the budget",
    "uniform": "one rank for all layers and heads",
}

"""The rank-accuracy curve: the accuracy of one adapter at every rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mlora_jax.core import RankHierarchy, read_out, summarize

# (adapter, profile [R]) -> verdicts [items] bool, whether each item is right.
Evaluator = Callable[[object, jax.Array], np.ndarray]


@dataclasses.dataclass(frozen=True)
class RankCurve:
    """Accuracy at every rank.

    Attributes:
      readout: a key of `mlora_jax.core.READOUTS`.
      ranks: the ranks S.
      accuracies: the accuracy at each rank, in 0..1.
      standard_errors: the standard error of each accuracy over items, ``sqrt(a (1 - a) / (n - 1))`` (the harness's
        estimate).
      items: the number of items that each accuracy is a mean of.
      linear: AURAC over the rank.
      log2: AURAC over the binary logarithm of the rank.
      mean: the plain mean of the accuracies.
      verdicts: [ranks, items] bool, whether each item is right; None if only the accuracies are recorded. Two curves
        can be equal although their verdicts differ.
    """

    readout: str
    ranks: tuple[int, ...]
    accuracies: tuple[float, ...]
    standard_errors: tuple[float | None, ...]
    items: int | None
    linear: float
    log2: float
    mean: float
    verdicts: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, readout: str, ranks: Sequence[int], verdicts: Any) -> RankCurve:
        """Makes the curve from the results of every item.

        Args:
          readout: the name of the read-out.
          ranks: the ranks, strictly increasing.
          verdicts: [ranks, items], each 0 or 1; every rank has the same items in the same order.

        Raises:
          ValueError: a result is neither 0 nor 1, the numbers of rows and ranks differ, or the ranks are not valid.

        >>> RankCurve.of("prefix", (1, 2), [[0, 0, 1, 1], [0, 1, 1, 1]]).accuracies
        (0.5, 0.75)
        """
        checked = check_verdicts(verdicts, ranks)
        accuracies, errors = zip(*map(accuracy_and_error, checked), strict=True)
        areas = dataclasses.asdict(summarize(accuracies, ranks))
        return cls(readout, tuple(ranks), accuracies, errors, checked.shape[1], **areas, verdicts=checked)


def accuracy_and_error(verdicts: np.ndarray) -> tuple[float, float]:
    """The mean of 0/1 verdicts [n] and the standard error of this mean (0 for one item)."""
    n, accuracy = len(verdicts), float(np.mean(verdicts))
    return accuracy, math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else 0.0


def check_verdicts(verdicts: Any, ranks: Sequence[int]) -> np.ndarray:
    """Checks the results of every item and returns them as an array [ranks, items] bool.

    Raises:
      ValueError: the numbers of rows and ranks differ, there are no items, or a result is neither 0 nor 1 (or is NaN).
    """
    try:
        values = np.asarray(verdicts)
    except ValueError:  # rows of unequal length
        raise ValueError(f"every rank needs the same items, got {[len(row) for row in verdicts]} of them") from None
    if values.ndim != 2 or len(values) != len(ranks) or not values.size:
        raise ValueError(
            f"verdicts must be [ranks, items] with one row for each of the ranks {tuple(ranks)}, got {values.shape}"
        )
    if values.dtype != bool:
        wrong = ~np.isin(values, (0, 1))
        if np.any(wrong):
            rank, item = np.argwhere(wrong)[0]
            raise ValueError(
                f"verdicts must be 0 or 1, got {values[rank, item]!s} for item {item} at rank {ranks[rank]}"
                f"{f', one of {np.sum(wrong)} such' if np.sum(wrong) > 1 else ''}"
            )
    return values.astype(bool)


def rank_curve(
    evaluate: Evaluator,
    adapter: Any,
    hierarchy: RankHierarchy,
    *,
    readout: str = "prefix",
    trained_profile: jax.Array | None = None,
) -> RankCurve:
    """Measures the accuracy of one adapter at every rank of S under a read-out.

    Args:
      evaluate: (adapter, p [R]) -> verdicts [items].
      adapter: the trained tree of factors.
      hierarchy: the adapter's ranks S, scales and weights.
      readout: a key of `mlora_jax.core.READOUTS`, for a read-out that needs only the adapter.
      trained_profile: the profile [R] of the trained function, which "squeeze" keeps; None stands for
        `hierarchy.lora()`.

    Raises:
      ValueError: the read-out is unknown, or it needs training data.
    """
    reading = read_out(adapter, hierarchy, readout, trained_profile=trained_profile)
    verdicts = [evaluate(reading.adapter, p) for p in reading.curve().values()]
    return RankCurve.of(readout, reading.hierarchy.ranks, verdicts)

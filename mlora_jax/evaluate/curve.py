"""The rank-accuracy curve: what each prefix of one adapter is worth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mlora_jax.core import RankHierarchy, read_out, summarize

# Anything that gives per-item verdicts [items] (bool) of an adapter under a profile [R].
Evaluator = Callable[[object, jax.Array], np.ndarray]


@dataclasses.dataclass(frozen=True)
class RankCurve:
    """Accuracy at every rank.

    Attributes:
      readout: a key of `mlora_jax.core.READOUTS`.
      ranks: S.
      accuracies: in 0..1, one per rank.
      standard_errors: of the accuracies over items, ``sqrt(a (1 - a) / (n - 1))`` (the harness's estimate).
      items: how many items each accuracy is over.
      linear: AURAC over the rank.
      log2: AURAC over the binary logarithm of the rank.
      mean: plain mean of the accuracies.
      verdicts: [ranks, items] bool, whether each item is right; None where only the accuracies are on record. It is no
        part of a comparison of curves.
    """

    readout: str
    ranks: tuple[int, ...]
    accuracies: tuple[float, ...]
    standard_errors: tuple[float, ...]
    items: int
    linear: float
    log2: float
    mean: float
    verdicts: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, readout: str, ranks: Sequence[int], verdicts) -> RankCurve:
        """The curve of per-item results.

        Args:
          readout: its name.
          ranks: strictly increasing.
          verdicts: [ranks, items], each 0 or 1; the items are the same ones in the same order at every rank.

        Raises:
          ValueError: results other than 0 and 1, another number of rows than of ranks, unusable ranks.

        >>> RankCurve.of("prefix", (1, 2), [[0, 0, 1, 1], [0, 1, 1, 1]]).accuracies
        (0.5, 0.75)
        """
        verdicts = check_verdicts(verdicts, ranks)
        accuracies, errors = zip(*map(accuracy_and_error, verdicts), strict=True)
        areas = dataclasses.asdict(summarize(accuracies, ranks))
        return cls(readout, tuple(ranks), accuracies, errors, verdicts.shape[1], **areas, verdicts=verdicts)


def accuracy_and_error(verdicts: np.ndarray) -> tuple[float, float]:
    """Mean of 0/1 verdicts [n] and the standard error of that mean (0 for one item)."""
    n, accuracy = len(verdicts), float(np.mean(verdicts))
    return accuracy, math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else 0.0


def check_verdicts(verdicts, ranks: Sequence[int]) -> np.ndarray:
    """Per-item results as [ranks, items] bool.

    Raises:
      ValueError: another number of rows than of ranks, no items, or a result that is neither 0 nor 1, such as NaN.
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
    """Accuracy of one adapter at every rank of S under a read-out.

    Args:
      evaluate: (adapter, p [R]) -> verdicts [items].
      adapter: the trained tree of factors.
      hierarchy: its ranks, scales and weights.
      readout: a key of `mlora_jax.core.READOUTS` that takes nothing but the adapter.
      trained_profile: the profile [R] of the trained function, which "squeeze" keeps; None is `hierarchy.lora()`.

    Raises:
      ValueError: an unknown read-out, or one that needs training data.
    """
    reading = read_out(adapter, hierarchy, readout, trained_profile=trained_profile)
    verdicts = [evaluate(reading.adapter, p) for p in reading.curve().values()]
    return RankCurve.of(readout, reading.hierarchy.ranks, verdicts)

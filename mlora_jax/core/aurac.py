"""AURAC: the area under the rank-accuracy curve, the score of a whole family of prefixes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

# Each function maps ranks to their positions on the x axis. The reference code calls "linear" v1 and "log2" v2.
AXES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda ranks: ranks.astype(float),
    "log2": lambda ranks: np.log2(ranks),
}


def aurac(accuracies: Sequence[float], ranks: Sequence[int], axis: str = "log2") -> float:
    """Returns the area under the rank-accuracy curve, divided by the length of the rank axis.

    It sums trapezoids over x = r (`axis="linear"`) or x = log2 r (`axis="log2"`). A curve of one rank has the area a_1.

    Args:
      accuracies: [n] finite numbers in the unit of the result (here 0..1).
      ranks: [n] strictly increasing positive ranks.
      axis: a key of `AXES`.

    Returns:
      The mean height of the curve, in the unit of `accuracies`.

    Raises:
      ValueError: the axis is unknown; the ranks are not positive and strictly increasing; the lengths differ; the curve
        is empty; or an accuracy is not finite.

    Source: MatryoshkaLoRA, arXiv 2605.07850 (AURAC).

    >>> aurac([0.2, 0.4, 0.6], [1, 2, 4])
    0.4
    >>> round(aurac([0.2, 0.4, 0.6], [1, 2, 4], axis="linear"), 6)
    0.433333
    """
    if axis not in AXES:
        raise ValueError(f"unknown axis {axis!r}; known: {', '.join(AXES)}")
    heights, positions = np.asarray(accuracies, dtype=float), np.asarray(ranks, dtype=float)
    if heights.ndim != 1 or positions.ndim != 1 or len(heights) != len(positions):
        raise ValueError(
            f"accuracies and ranks must be two lists of one length, got shapes {heights.shape}, {positions.shape}: "
            f"{_short(accuracies)} and {_short(ranks)}"
        )
    if not len(heights):
        raise ValueError("the curve is empty: accuracies and ranks have no entries")
    if not np.all(np.isfinite(heights)):
        raise ValueError(f"accuracies must be finite, got {heights.tolist()}")
    if not np.all(np.isfinite(positions)) or np.any(positions <= 0):
        raise ValueError(f"ranks must be positive, got {positions.tolist()}")
    if np.any(np.diff(positions) <= 0):
        raise ValueError(f"ranks must be strictly increasing without repeats, got {positions.tolist()}")
    if len(heights) == 1:
        return float(heights[0])
    x = AXES[axis](positions)
    return float(np.sum(np.diff(x) * (heights[1:] + heights[:-1]) / 2) / (x[-1] - x[0]))


def _short(values) -> str:
    text = str(np.asarray(values).tolist())
    return text if len(text) < 200 else text[:197] + "..."


@dataclasses.dataclass(frozen=True)
class CurveSummary:
    """Three summaries of a rank-accuracy curve, in the unit of its accuracies.

    Attributes:
      linear: AURAC over the axis "linear".
      log2: AURAC over the axis "log2".
      mean: the mean of the accuracies.
    """

    linear: float
    log2: float
    mean: float


def summarize(accuracies: Sequence[float], ranks: Sequence[int]) -> CurveSummary:
    """Returns both AURACs and the plain mean of one curve; arguments and errors are those of `aurac`.

    >>> summarize([0.5, 1.0], [1, 2])
    CurveSummary(linear=0.75, log2=0.75, mean=0.75)
    """
    area = {axis: aurac(accuracies, ranks, axis) for axis in AXES}
    return CurveSummary(linear=area["linear"], log2=area["log2"], mean=math.fsum(accuracies) / len(accuracies))

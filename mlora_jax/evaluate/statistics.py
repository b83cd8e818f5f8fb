"""How sure a rank-accuracy curve is: bootstrap intervals over items, and two adapters compared on the same items."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr

from mlora_jax.core import aurac
from mlora_jax.evaluate.curve import RankCurve, check_verdicts


class Interval(NamedTuple):
    """A confidence interval low..high, and the value of the sample itself."""

    low: float
    high: float
    value: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The first of two adapters less the second, on the same items.

    Attributes:
      ranks: of both curves.
      aurac: difference of the AURACs and its bootstrap interval.
      differences: of the accuracies, one per rank.
      standard_errors: of those differences, ``sd(d) / sqrt(n)`` over the items' differences d in {-1, 0, 1} (0 for one
        item).
      p_values: of McNemar's exact test, one per rank: how likely at least so uneven a split of the items that only one
        of the two has right would be, were each as likely to fall to either. Not corrected for the number of ranks.
    """

    ranks: tuple[int, ...]
    aurac: Interval
    differences: tuple[float, ...]
    standard_errors: tuple[float, ...]
    p_values: tuple[float, ...]


def bootstrap_aurac(
    verdicts,
    ranks: Sequence[int],
    *,
    axis: str = "log2",
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """AURAC with a percentile bootstrap interval over items.

    An item is drawn with its verdicts at all ranks, so what the ranks share is kept. AURAC is linear in the accuracies:
    it is the mean over items of ``z_i = sum over r of w_r v_ri``, w being the trapezoids' weights, and the bootstrap is
    that of a mean. Of one rank it is the bootstrap of an accuracy.

    Args:
      verdicts: [ranks, items], each 0 or 1.
      ranks: strictly increasing.
      axis: a key of `AXES`.
      samples: how many times the items are drawn anew, with replacement.
      confidence: share of the samples within the interval, in (0, 1).
      seed: of the draws.

    Returns:
      The interval, in 0..1 as the accuracies.

    Raises:
      ValueError: verdicts other than 0 and 1, another number of rows than of ranks, and what `aurac` refuses.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    >>> bootstrap_aurac([[0, 1, 1, 1], [1, 1, 1, 1]], (1, 2)).value
    0.875
    """
    verdicts = check_verdicts(verdicts, ranks)
    return _bootstrap_mean(_weights(ranks, axis) @ verdicts, samples, confidence, seed)


def compare(
    first: RankCurve,
    second: RankCurve,
    *,
    axis: str = "log2",
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """The paired comparison of two adapters, or of two read-outs of one.

    Both curves must be over the same items in the same order; their number is all that can be checked.

    Args:
      first, second: curves with verdicts.
      axis, samples, confidence, seed: as `bootstrap_aurac`; an item is drawn with the verdicts of both.

    Raises:
      ValueError: the curves have other ranks or another number of items, or one has no verdicts.

    Sources: McNemar (1947), Psychometrika 12, in its exact form; on paired differences Miller (2024), arXiv 2411.00640.

    >>> better = RankCurve.of("prefix", (1, 2), [[1, 1, 0, 1], [1, 1, 1, 1]])
    >>> worse = RankCurve.of("prefix", (1, 2), [[0, 1, 0, 1], [0, 0, 1, 1]])
    >>> found = compare(better, worse)
    >>> found.differences, found.p_values, found.aurac.value
    ((0.25, 0.5), (1.0, 0.5), 0.375)
    """
    for name, curve in (("first", first), ("second", second)):
        if curve.verdicts is None:
            raise ValueError(f"the {name} curve ({curve.readout}, ranks {curve.ranks}) has no verdicts to compare")
    if first.ranks != second.ranks:
        raise ValueError(f"the curves have different ranks: {first.ranks} and {second.ranks}")
    if first.verdicts.shape != second.verdicts.shape:
        raise ValueError(f"the curves have different items: {first.verdicts.shape[1]} and {second.verdicts.shape[1]}")
    pairs = [_compare_verdicts(*rows) for rows in zip(first.verdicts, second.verdicts, strict=True)]
    differences, errors, p_values = zip(*pairs, strict=True)
    signed = first.verdicts.astype(int) - second.verdicts.astype(int)  # [ranks, items]
    area = _bootstrap_mean(_weights(first.ranks, axis) @ signed, samples, confidence, seed)
    return Comparison(first.ranks, area, differences, errors, p_values)


def _compare_verdicts(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """(difference of the accuracies, its standard error, McNemar's exact p value) of verdicts [items] bool."""
    d = first.astype(int) - second.astype(int)
    error = float(np.std(d, ddof=1)) / len(d) ** 0.5 if len(d) > 1 else 0.0
    wins, losses = int(np.sum(d > 0)), int(np.sum(d < 0))
    # The binomial of p = 1/2 is symmetric: both tails are as heavy.
    p_value = min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5))) if wins + losses else 1.0
    return float(np.mean(d)), error, p_value


def _weights(ranks: Sequence[int], axis: str) -> np.ndarray:
    """[ranks], the weight of each accuracy in AURAC."""
    return np.array([aurac(unit, ranks, axis) for unit in np.eye(len(ranks))])


def _bootstrap_mean(z: np.ndarray, samples: int, confidence: float, seed: int) -> Interval:
    """The percentile interval of the mean of z [items]."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    # Items of equal z are exchangeable, so how many of each are drawn is all that counts: [samples, distinct values].
    values, counts = np.unique(z, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(z), counts / len(z), size=samples)
    means = drawn @ values / len(z)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), float(np.mean(z)))

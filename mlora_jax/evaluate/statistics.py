"""Uncertainty of rank-accuracy curves: bootstrap intervals over items, and paired comparisons of two adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import bdtr

from mlora_jax.core import aurac
from mlora_jax.evaluate.curve import RankCurve, check_verdicts


class Interval(NamedTuple):
    """A confidence interval low..high, and the value that the sample itself has."""

    low: float
    high: float
    value: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of one adapter minus those of another, on the same items.

    Attributes:
      ranks: the ranks of both curves.
      aurac: the difference of the AURACs and its bootstrap interval.
      differences: the difference of the accuracies at each rank.
      standard_errors: the standard error of each difference, ``sd(d) / sqrt(n)`` over the items' differences d in
        {-1, 0, 1} (0 for one item).
      p_values: the p-value of McNemar's exact test at each rank. The test looks at the items that only one of the two
        adapters has right. The p-value is the probability that they are split at least as unevenly, if each of them is
        equally likely to be right for either adapter. It is not corrected for the number of ranks.
    """

    ranks: tuple[int, ...]
    aurac: Interval
    differences: tuple[float, ...]
    standard_errors: tuple[float, ...]
    p_values: tuple[float, ...]


def bootstrap_aurac(
    verdicts: Any,
    ranks: Sequence[int],
    *,
    axis: str = "log2",
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """AURAC with a percentile bootstrap interval over items.

    An item is drawn with its verdicts at all ranks, which keeps the correlation between the ranks. AURAC is linear in
    the accuracies: it is the mean over items of ``z_i = sum over r of w_r v_ri`` with the weights w of the trapezoids,
    so the bootstrap is that of a mean. For one rank, it is the bootstrap of an accuracy.

    Args:
      verdicts: [ranks, items], each 0 or 1.
      ranks: the ranks, strictly increasing.
      axis: a key of `AXES`.
      samples: how many samples of the items are drawn, with replacement.
      confidence: the share of the samples that lie within the interval, in (0, 1).
      seed: the seed of the draws.

    Returns:
      The interval, in 0..1 like the accuracies.

    Raises:
      ValueError: a verdict is neither 0 nor 1, the numbers of rows and ranks differ, or `aurac` does not accept the
        ranks or the axis.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    >>> bootstrap_aurac([[0, 1, 1, 1], [1, 1, 1, 1]], (1, 2)).value
    0.875
    """
    return _bootstrap_mean(_weights(ranks, axis) @ check_verdicts(verdicts, ranks), samples, confidence, seed)


def compare(
    first: RankCurve,
    second: RankCurve,
    *,
    axis: str = "log2",
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compares two adapters, or two read-outs of one adapter, item by item.

    Both curves must have the same items in the same order; only the number of items is checked.

    Args:
      first, second: two curves with verdicts.
      axis, samples, confidence, seed: as in `bootstrap_aurac`; an item is drawn with the verdicts of both curves.

    Raises:
      ValueError: the curves differ in their ranks or in their number of items, or one of them has no verdicts.

    Sources: McNemar (1947), Psychometrika 12, in its exact form; on paired differences Miller (2024), arXiv 2411.00640.

    >>> better = RankCurve.of("prefix", (1, 2), [[1, 1, 0, 1], [1, 1, 1, 1]])
    >>> worse = RankCurve.of("prefix", (1, 2), [[0, 1, 0, 1], [0, 0, 1, 1]])
    >>> found = compare(better, worse)
    >>> found.differences, found.p_values, found.aurac.value
    ((0.25, 0.5), (1.0, 0.5), 0.375)
    """
    ours, theirs = _verdicts_of("first", first), _verdicts_of("second", second)
    if first.ranks != second.ranks:
        raise ValueError(f"the curves have different ranks: {first.ranks} and {second.ranks}")
    if ours.shape != theirs.shape:
        raise ValueError(f"the curves have different items: {ours.shape[1]} and {theirs.shape[1]}")
    pairs = [_compare_verdicts(*rows) for rows in zip(ours, theirs, strict=True)]
    differences, errors, p_values = zip(*pairs, strict=True)
    signed = ours.astype(int) - theirs.astype(int)  # [ranks, items]
    area = _bootstrap_mean(_weights(first.ranks, axis) @ signed, samples, confidence, seed)
    return Comparison(first.ranks, area, differences, errors, p_values)


def _verdicts_of(name: str, curve: RankCurve) -> np.ndarray:
    if curve.verdicts is None:
        raise ValueError(f"the {name} curve ({curve.readout}, ranks {curve.ranks}) has no verdicts to compare")
    return curve.verdicts


def _compare_verdicts(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """(difference of the accuracies, its standard error, McNemar's exact p value) of verdicts [items] bool."""
    d = first.astype(int) - second.astype(int)
    error = float(np.std(d, ddof=1)) / len(d) ** 0.5 if len(d) > 1 else 0.0
    wins, losses = int(np.sum(d > 0)), int(np.sum(d < 0))
    # The binomial distribution with p = 1/2 is symmetric: both tails have the same probability.
    p_value = min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5))) if wins + losses else 1.0
    return float(np.mean(d)), error, p_value


def _weights(ranks: Sequence[int], axis: str) -> np.ndarray:
    """The weight [ranks] of each accuracy in AURAC."""
    return np.array([aurac(unit.tolist(), ranks, axis) for unit in np.eye(len(ranks))])


def _bootstrap_mean(z: np.ndarray, samples: int, confidence: float, seed: int) -> Interval:
    """The percentile interval of the mean of z [items]."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    # Items of equal z are exchangeable, so only the number of draws of each value matters: [samples, distinct values].
    values, counts = np.unique(z, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(z), counts / len(z), size=samples)
    means = drawn @ values / len(z)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), float(np.mean(z)))

"""Rank profiles: the weight of every column of A and row of B, in training and when the adapter is read out.

A *rank profile* is a vector ``p`` of length R; an adapted layer computes ``y = x W + ((x A) * p) B``. LoRA, DyLoRA and
MatryoshkaLoRA differ only in the choice of ``p``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

# Each function maps a rank r to its scale s_r. "sqrt" is the rule of rsLoRA.
SCALINGS: dict[str, Callable[[int], float]] = {
    "none": lambda r: 1.0,
    "rank": lambda r: 1.0 / r,
    "sqrt": lambda r: 1.0 / math.sqrt(r),
}


def powers_of_two(max_rank: int) -> tuple[int, ...]:
    """Returns the default training ranks S: the powers of two up to R, and R itself.

    Args:
      max_rank: R, at least 1.

    Returns:
      Strictly increasing ranks that end at `max_rank`. R is a member even when it is not a power of two, because
      a column that no rank of S uses would never be trained.

    Raises:
      ValueError: `max_rank` is not a positive integer.

    >>> powers_of_two(8), powers_of_two(12)
    ((1, 2, 4, 8), (1, 2, 4, 8, 12))
    """
    max_rank = check_rank(max_rank, "max_rank", low=1)
    powers = tuple(2**i for i in range(max_rank.bit_length()))
    return powers if powers[-1] == max_rank else (*powers, max_rank)


def check_rank(rank: Any, name: str, *, low: int, high: int | None = None) -> int:
    """Returns a rank as an int.

    Args:
      rank: the value to check.
      name: the name of the value, for the message.
      low: the smallest allowed rank.
      high: the largest allowed rank; None: there is none.

    Raises:
      ValueError: the value is not an integer in this range.
    """
    number = int(rank) if isinstance(rank, numbers.Integral) and not isinstance(rank, bool) else None
    if number is None or number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be an integer in {low}..{'' if high is None else high}, got {rank!r}")
    return number


@dataclasses.dataclass(frozen=True)
class RankHierarchy:
    """The training ranks S, their scales s_r and weights w_r, and the profiles that follow from them.

    Attributes:
      ranks: S, strictly increasing positive integers.
      scaling: the rule for s_r, a key of `SCALINGS`.
      weights: w_r, one per rank of S; finite, not negative, not all zero. None means 1 for every rank.
      max_rank: R, the length of every profile. None means the largest rank of S. Columns above the largest rank of S
        take part in LoRA only.

    Raises:
      ValueError: S is empty or not strictly increasing, or has a rank below 1 or above R; the scaling is unknown; or
        there is not one weight per rank of S, a weight is negative or not finite, or all are zero.

    Source: MatryoshkaLoRA, arXiv 2605.07850, the diagonal P; DyLoRA, arXiv 2210.07558, the random prefix.

    >>> hierarchy = RankHierarchy((1, 2, 4))
    >>> hierarchy.matryoshka().tolist(), hierarchy.prefix(2).tolist()
    ([3.0, 2.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0])
    """

    ranks: Sequence[int]
    scaling: str = "none"
    weights: Sequence[float] | None = None
    max_rank: int = cast("int", None)  # `__post_init__` replaces None

    def __post_init__(self) -> None:
        try:
            given = tuple(self.ranks)
        except TypeError:
            raise ValueError(f"ranks must be a sequence of integers, got {self.ranks!r}") from None
        if not given:
            raise ValueError("ranks must name at least one rank, got none")
        ranks = tuple(check_rank(r, "every rank of S", low=1) for r in given)
        if any(later <= earlier for earlier, later in itertools.pairwise(ranks)):
            raise ValueError(f"ranks must be strictly increasing without repeats, got {ranks}")
        max_rank = ranks[-1] if self.max_rank is None else check_rank(self.max_rank, "max_rank", low=1)
        if ranks[-1] > max_rank:
            raise ValueError(f"rank {ranks[-1]} of S is above the adapter's rank R = {max_rank}; S is {ranks}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"unknown scaling {self.scaling!r}; known: {', '.join(SCALINGS)}")
        weights = self.weights
        if weights is not None:
            try:
                weights = tuple(float(w) for w in weights)
            except (TypeError, ValueError):
                raise ValueError(f"weights must be a sequence of numbers, got {weights!r}") from None
            if len(weights) != len(ranks):
                raise ValueError(f"weights {weights} and ranks {ranks} differ in length")
            if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
                raise ValueError(f"weights must be finite, not negative and not all zero, got {weights}")
        for name, value in (("ranks", ranks), ("weights", weights), ("max_rank", max_rank)):
            object.__setattr__(self, name, value)

    def scale(self, r: int) -> float:
        """Returns the scale s_r of a rank r.

        Raises:
          ValueError: r is outside 1..R.
        """
        return SCALINGS[self.scaling](check_rank(r, "rank", low=1, high=self.max_rank))

    def lora(self) -> jax.Array:
        """Returns LoRA's training profile [R]: s_R everywhere."""
        return self.prefix(self.max_rank)

    def matryoshka(self) -> jax.Array:
        """Returns MatryoshkaLoRA's diagonal P [R]: P_i is the sum of w_r s_r over r in S with r >= i."""
        return _profile(self._weighted_prefix_sum(self.max_rank))

    def prefix(self, r: int) -> jax.Array:
        """Returns the paper's read-out at rank r, [R]: s_r for i <= r, else 0. Rank 0 is the base model.

        Raises:
          ValueError: r is outside 0..R.
        """
        r = self._read_out_rank(r)
        return _profile(np.where(self._index() <= r, self.scale(r) if r else 0.0, 0.0))

    def nested(self, r: int) -> jax.Array:
        """Returns the training diagonal over ranks of S up to r, [R]: the sum of w_q s_q over q in S with i <= q <= r.

        Raises:
          ValueError: r is outside 0..R.
        """
        return _profile(self._weighted_prefix_sum(self._read_out_rank(r)))

    def masked(self, r: int) -> jax.Array:
        """Returns the training diagonal cut at r, [R]: P_i for i <= r, else 0.

        Raises:
          ValueError: r is outside 0..R.
        """
        r = self._read_out_rank(r)
        return _profile(np.where(self._index() <= r, self._weighted_prefix_sum(self.max_rank), 0.0))

    def prefix_at(self, r: jax.Array) -> jax.Array:
        """Returns `prefix` [R] for a traced rank; r is an int32 scalar in 1..R and is not checked."""
        scales = _profile(np.array([self.scale(q) for q in range(1, self.max_rank + 1)]))
        return jnp.where(self._index() <= r, scales[r - 1], 0.0)

    def sample_prefix(self, key: jax.Array) -> jax.Array:
        """Draws a profile as DyLoRA does, [R]: `prefix(b)` with a random b of S. It is traceable.

        The probability of b is proportional to its weight. Without weights all ranks of S are equally likely.

        Args:
          key: a `jax.random.key`.
        """
        # Equal weights must draw the same ranks as no weights. With probabilities, jax.random.choice draws others.
        shares = None if self.weights is None or self._even() else jnp.array(self.weights) / math.fsum(self.weights)
        return self.prefix_at(jax.random.choice(key, jnp.array(self.ranks), p=shares))

    def stratified_ranks(self, key: jax.Array, count: int) -> jax.Array:
        """Draws a rank of S for each of `count` examples, int32 [count], spread as evenly as possible and shuffled.

        The number of times that a rank is drawn is `count` times its share of the weights, rounded down or up. The
        rounding is random, so that the shares are exact on average. The method is traceable.

        Args:
          key: a `jax.random.key`.
          count: the number of ranks, at least 1.

        >>> sorted(RankHierarchy((1, 2, 4)).stratified_ranks(jax.random.key(0), 6).tolist())
        [1, 1, 2, 2, 4, 4]
        """
        start, order = jax.random.split(key)
        if self.weights is None or self._even():
            index = (jax.random.randint(start, (), 0, len(self.ranks)) + jnp.arange(count)) % len(self.ranks)
        else:  # systematic sampling
            edges = np.cumsum(np.array(self.weights) / math.fsum(self.weights))[:-1]
            points = (jax.random.uniform(start, dtype=float) + jnp.arange(count, dtype=float)) / count
            index = jnp.searchsorted(jnp.asarray(edges, points.dtype), points, side="right")
        return jax.random.permutation(order, jnp.array(self.ranks, jnp.int32)[index])

    def truncate(self, r: int) -> RankHierarchy:
        """Returns the hierarchy of an adapter that `mlora_jax.truncate` has cut to rank r.

        The new S has the ranks of S up to r, and r itself. A scale depends on its own rank only, so `prefix(q)` stays
        the same function for every q <= r; so does `nested(q)` for q < r, and for q = r if r was in S. `masked` and
        `matryoshka` change, because they sum over all of S and the larger ranks are missing.

        Args:
          r: the new rank, in 1..R.

        Returns:
          A hierarchy with R = r. Its weights are those of the ranks that stay; r has weight 1 if it was not in S. If
          all of these are zero, every weight is 1.

        Raises:
          ValueError: r is outside 1..R.

        >>> RankHierarchy((1, 2, 4, 8), "sqrt").truncate(3).ranks
        (1, 2, 3)
        """
        r = check_rank(r, "rank to truncate to", low=1, high=self.max_rank)
        weights = dict(zip(self.ranks, self.weights or (1.0,) * len(self.ranks), strict=True))
        kept = {q: weight for q, weight in weights.items() if q <= r} | {r: weights.get(r, 1.0)}
        given = self.weights is not None and any(kept.values())
        return RankHierarchy(tuple(kept), self.scaling, tuple(kept.values()) if given else None, max_rank=r)

    def _even(self) -> bool:
        return self.weights is None or len(set(self.weights)) == 1

    def _index(self) -> np.ndarray:
        return np.arange(1, self.max_rank + 1)

    def _read_out_rank(self, r: int) -> int:
        return check_rank(r, "rank of a read-out", low=0, high=self.max_rank)

    def _weighted_prefix_sum(self, r: int) -> np.ndarray:
        total = np.zeros(self.max_rank)
        weights = self.weights or (1.0,) * len(self.ranks)
        for q, weight in zip(self.ranks, weights, strict=True):
            if q <= r:
                total[:q] += weight * self.scale(q)
        return total


def _profile(values: np.ndarray) -> jax.Array:
    # The dtype is jax's default float. Under jax_enable_x64 it is float64, so that 1/sqrt(r) is not rounded to float32.
    return jnp.asarray(values, dtype=float)

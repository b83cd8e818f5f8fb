"""Searches the ranks of layers and heads, greedily, by what held-out text loses.

A round lowers the rank of every layer and head by one step of the grid, each alone, once for its keys and once for its
values, and measures the divergence from the full model. Then the ranks whose fall costs least fall, a share of them at
once. Rounds follow until the smallest budget is reached, so one search gives the ranks of all larger budgets.

Source: the greedy search of Lin et al. (arXiv 2410.14731), and `cal_adaptive_rate.py` of the authors' code, which
measures the change of the last hidden states and lowers three quarters of the ranks in a round.

Axes: L layer, KV key and value heads, Hd features of a head, B rows, T time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlora_jax.kv_cache.attention import Projections
from mlora_jax.kv_cache.objective import Sums, distillation_sums
from mlora_jax.kv_cache.ranks import KINDS, RankPath, Ranks, check_budget, check_levels
from mlora_jax.kv_cache.text import TextRows
from mlora_jax.kv_cache.training import CHUNK, ProjectedTrees
from mlora_jax.models.decoder import Decoder


class Measured(NamedTuple):
    """What a cut model loses on text, per predicted token, in nats.

    Attributes:
      divergence: KL(full || cut).
      cross_entropy: of the text's own tokens; its exponential is the perplexity.
    """

    divergence: float
    cross_entropy: float

    @property
    def perplexity(self) -> float:
        """The exponential of the cross-entropy."""
        return math.exp(self.cross_entropy)


class Meter:
    """Measures a projected model on fixed rows at any ranks, in one executable.

    Args:
      model: the decoder without projections, with an adapter or without.
      projections: the projections.
      rows: the packed text.
      batch_size: the number of rows that are computed at one time.

    Attributes:
      compiled: the jitted function, whose cache size counts compilations.
    """

    def __init__(self, model: Decoder, projections: Projections, rows: TextRows, *, batch_size: int) -> None:
        teacher, full = nnx.split(model)
        graphdef, *trees = ProjectedTrees.of(model, projections)

        @jax.jit
        def states(full: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
            return nnx.merge(teacher, full).hidden(tokens, segment_ids=segments)

        @jax.jit
        def sums(trees: Any, ranks: Ranks, states: jax.Array, tokens: jax.Array, segments: jax.Array) -> Sums:
            cut = ProjectedTrees(graphdef, *trees).at(ranks=ranks)
            hidden = cut.hidden(tokens, segment_ids=segments)
            return distillation_sums(cut, hidden, states, tokens, segments, chunk=CHUNK)

        self.compiled: Any = sums
        self._trees, self._batches = tuple(trees), []
        for start in range(0, len(rows.tokens), batch_size):
            room = ((0, max(0, start + batch_size - len(rows.tokens))), (0, 0))
            part = [jnp.asarray(np.pad(x[start : start + batch_size], room)) for x in rows]
            self._batches.append((states(full, *part), *part))  # the full model's states, once for all ranks

    def __call__(self, ranks: Ranks) -> Measured:
        """Returns what the model loses at these ranks."""
        ranks = Ranks(*(jnp.asarray(kind, jnp.int32) for kind in ranks))
        total = np.zeros(3)
        for batch in self._batches:
            total += np.asarray([float(each) for each in self.compiled(self._trees, ranks, *batch)])
        return Measured(*(total[:2] / max(total[2], 1.0)).tolist())


def search_ranks(
    measure: Callable[[Ranks], float],
    shape: tuple[int, int, int],
    *,
    levels: int,
    budget: float,
    share: float,
    report: Callable[[float, float], None] = lambda budget, error: None,
) -> RankPath:
    """Returns the order in which ranks fall.

    Args:
      measure: ranks -> what the model loses at them; less is better.
      shape: (L, KV, Hd).
      levels: the number of ranks of the grid, a divisor of Hd. No rank falls below Hd / levels.
      budget: the smallest fraction of the bytes of the full cache that is searched.
      share: the fraction of the ranks that fall in a round, above 0; at least one falls. A smaller one costs more
        rounds, each of which measures every rank that may still fall.
      report: a function that gets the budget and the error of the best candidate of each round.

    Raises:
      ValueError: the levels do not divide Hd, or the budget is outside (0, 1] or below 1 / levels.

    >>> def measure(ranks):  # the second head is of no use
    ...     return float(np.sum(4 - ranks.stacked[:, 0, 0]))
    >>> search_ranks(measure, (1, 2, 4), levels=4, budget=0.5, share=0.1).at(0.7).k.tolist()
    [[4, 1]]
    """
    layers, heads, head_dim = shape
    step = check_levels(levels, head_dim)
    if check_budget(budget, "search.budget") < 1.0 / levels:
        raise ValueError(f"search.budget={budget} is below 1/levels = {1 / levels:.4g}, the smallest rank of all heads")
    full = len(KINDS) * layers * heads * levels  # in steps
    wanted = math.ceil(full * (1.0 - budget) - 1e-9)
    ranks, order = Ranks.full(*shape).stacked, []
    while len(order) < wanted:
        errors = {}
        for place in _candidates(ranks, step):
            tried = ranks.copy()
            tried[place] -= step
            errors[place] = measure(Ranks(*tried))
        best = sorted(errors, key=lambda place: errors[place])
        falling = best[: min(max(1, int(share * len(best))), wanted - len(order))]
        for place in falling:
            ranks[place] -= step
            order.append(place)
        report(1.0 - len(order) / full, errors[best[0]])
    return RankPath(np.asarray(order, np.int32).reshape(-1, 3), step, shape)


def _candidates(ranks: np.ndarray, step: int) -> Iterable[tuple[int, ...]]:
    return (place for place in np.ndindex(ranks.shape) if ranks[place] > step)

"""A read-out fitted to data: R numbers for each rank, the factors left as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlora_jax.core import RankHierarchy
from mlora_jax.train.objective import AnswerBatch


def calibrate(
    loss: Callable[[jax.Array, AnswerBatch], jax.Array],
    hierarchy: RankHierarchy,
    batches: Iterable[AnswerBatch],
    *,
    steps: int,
    learning_rate: float,
    key: jax.Array,
) -> np.ndarray:
    """The profile of every rank that fits a trained adapter best.

    The profile of rank r is ``prefix(r)`` times a number for each of its r columns, which begin at 1 and follow the
    gradient of the training loss (Adam, linear decay to zero). The ranks of S are spread evenly over the examples of
    every batch, so all are fitted in the time of one.

    Args:
      loss: (profiles [B, R], batch) -> nats summed over the answer tokens; differentiable in the profiles.
      hierarchy: S and scales of the adapter.
      batches: at least `steps` of them are not needed: fitting ends with the last.
      steps: at most.
      learning_rate: of the numbers, at the first step.
      key: `jax.random.key` for which example is of which rank.

    Returns:
      Profiles [ranks of S, R], zero beyond each rank.
    """
    prefixes = jnp.stack([hierarchy.prefix(rank) for rank in hierarchy.ranks])  # [ranks, R]
    optimizer = optax.adam(optax.linear_schedule(learning_rate, 0.0, steps))

    @jax.jit
    def step(numbers, state, batch, key):
        def mean(numbers):
            drawn = hierarchy.spread(key, len(batch["tokens"]))  # [B]
            rows = jnp.searchsorted(jnp.array(hierarchy.ranks), drawn)
            return loss((prefixes * numbers)[rows], batch) / jnp.maximum(jnp.sum(batch["weights"]), 1.0)

        updates, state = optimizer.update(jax.grad(mean)(numbers), state, numbers)
        return optax.apply_updates(numbers, updates), state

    numbers = jnp.ones_like(prefixes)
    state = optimizer.init(numbers)
    for number, batch in zip(range(steps), batches, strict=False):
        numbers, state = jax.block_until_ready(step(numbers, state, batch, jax.random.fold_in(key, number)))
    return np.asarray(prefixes * numbers)

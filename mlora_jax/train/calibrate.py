"""A read-out fitted to data: R numbers for each rank, the factors left as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mlora_jax.core import RankHierarchy
from mlora_jax.parallel.arrays import fetch, put_replicated
from mlora_jax.train.objective import AnswerBatch


def calibrate(
    loss: Callable[[Any, jax.Array, AnswerBatch], jax.Array],
    trees: Any,
    hierarchy: RankHierarchy,
    batches: Iterable[AnswerBatch],
    *,
    steps: int,
    learning_rate: float,
    key: jax.Array,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """The profile of every rank that fits a trained adapter best.

    The profile of rank r is ``prefix(r)`` times a number for each of its r columns, which begin at 1 and follow the
    gradient of the training loss (Adam, linear decay to zero). The ranks of S are spread evenly over the examples of
    every batch, so all are fitted in the time of one.

    Args:
      loss: (trees, profiles [B, R], batch) -> nats summed over the answer tokens; differentiable in the profiles. The
        same function compiles once.
      trees: arrays that `loss` needs.
      hierarchy: S and scales of the adapter.
      batches: at least `steps`.
      steps: of the optimizer.
      learning_rate: of the numbers, at the first step.
      key: `jax.random.key` for which example is of which rank.
      mesh: where `trees` and batches lie; None for one device.

    Returns:
      Profiles [ranks of S, R], zero beyond each rank.
    """
    prefixes = _prefixes(hierarchy)
    numbers = jnp.ones_like(prefixes)
    numbers, state = put_replicated((numbers, optax.scale_by_adam().init(numbers)), mesh)
    for number, batch in zip(range(steps), batches, strict=False):
        rate = learning_rate * (1 - number / steps)
        keys = jax.random.fold_in(key, number)
        fitted = jax.block_until_ready(_step(loss, hierarchy, trees, numbers, state, batch, keys, rate))
        numbers, state = put_replicated(fitted, mesh)
    return np.asarray(prefixes) * np.asarray(fetch(numbers))


def _prefixes(hierarchy: RankHierarchy) -> jax.Array:
    return jnp.stack([hierarchy.prefix(rank) for rank in hierarchy.ranks])  # [ranks, R]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(loss, hierarchy: RankHierarchy, trees, numbers, state, batch, key, rate):
    def mean(numbers):
        drawn = hierarchy.spread(key, len(batch["tokens"]))  # [B]
        rows = jnp.searchsorted(jnp.array(hierarchy.ranks), drawn)
        total = loss(trees, (_prefixes(hierarchy) * numbers)[rows], batch)
        return total / jnp.maximum(jnp.sum(batch["weights"]), 1.0)

    updates, state = optax.scale_by_adam().update(jax.grad(mean)(numbers), state)
    return jax.tree.map(lambda x, update: x - rate * update, numbers, updates), state

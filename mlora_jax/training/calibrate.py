"""A read-out that is fitted to data: R numbers for each rank, while the factors stay as they are."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mlora_jax.core import RankHierarchy
from mlora_jax.parallel.arrays import fetch, put_replicated
from mlora_jax.training.objective import AnswerBatch

COMPARED = 4  # batches on which the fixed read-outs are compared


def calibrate(
    loss: Callable[[Any, jax.Array, AnswerBatch], jax.Array],
    trees: Any,
    hierarchy: RankHierarchy,
    trained_profile: jax.Array,
    batches: Iterable[AnswerBatch],
    *,
    steps: int,
    learning_rate: float,
    key: jax.Array,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Fits the profile of every rank to a trained adapter.

    The profile of rank r is a fixed read-out times a number for each of its r columns. The numbers begin at 1 and
    follow the gradient of the training loss (Adam, linear decay to zero). The fixed read-out is the one of `prefix(r)`,
    `nested(r)` and the trained function cut at r that has the smallest loss on the first batches. The best start has to
    be chosen, because under some scalings these profiles lie farther apart than the numbers can move. The ranks of S
    are spread evenly over the examples of every batch, whatever their weights in training, so all profiles are fitted
    in the time of one.

    Args:
      loss: (trees, profiles [B, R], batch) -> nats summed over the answer tokens; differentiable in the profiles. The
        same function compiles once.
      trees: the arrays that `loss` needs.
      hierarchy: the S and the scales of the adapter.
      trained_profile: the profile [R] of the trained function at full rank.
      batches: the training batches, at least `steps` of them.
      steps: the number of optimizer steps.
      learning_rate: the learning rate of the numbers at the first step.
      key: the `jax.random.key` that assigns ranks to examples.
      mesh: the mesh on which `trees` and batches lie; None for one device.

    Returns:
      Profiles [ranks of S, R], zero beyond each rank.
    """
    evenly = dataclasses.replace(hierarchy, weights=None)
    batches = iter(batches)
    first = list(itertools.islice(batches, COMPARED))
    starts = np.stack(
        [_best_fixed(loss, trees, hierarchy, trained_profile, rank, first, mesh) for rank in hierarchy.ranks]
    )
    numbers = jnp.ones_like(starts)
    starts, numbers, state = put_replicated((starts, numbers, optax.scale_by_adam().init(numbers)), mesh)
    for number, batch in zip(range(steps), itertools.chain(first, batches), strict=False):
        rate = learning_rate * (1 - number / steps)
        keys = jax.random.fold_in(key, number)
        fitted = jax.block_until_ready(_step(loss, evenly, trees, starts, numbers, state, batch, keys, rate))
        numbers, state = put_replicated(fitted, mesh)
    return np.asarray(fetch(starts)) * np.asarray(fetch(numbers))


def _best_fixed(loss, trees, hierarchy: RankHierarchy, trained_profile, rank: int, batches, mesh) -> np.ndarray:
    """Returns the fixed read-out [R] at a rank with the smallest loss on some batches."""
    cut = jnp.where(jnp.arange(hierarchy.max_rank) < rank, trained_profile, 0.0)
    losses = {}
    for p in (hierarchy.prefix(rank), hierarchy.nested(rank), cut):
        losses[tuple(np.asarray(p).tolist())] = sum(
            float(_value(loss, trees, put_replicated(p, mesh), batch)) for batch in batches
        )
    return np.array(
        min(losses, key=lambda p: losses[p] if math.isfinite(losses[p]) else math.inf), trained_profile.dtype
    )


@functools.partial(jax.jit, static_argnums=0)
def _value(loss, trees, p, batch):
    return loss(trees, jnp.broadcast_to(p, (len(batch["tokens"]), len(p))), batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(loss, evenly: RankHierarchy, trees, starts, numbers, state, batch, key, rate):
    def mean(numbers):
        drawn = evenly.stratified_ranks(key, len(batch["tokens"]))  # [B]
        rows = jnp.searchsorted(jnp.array(evenly.ranks), drawn)
        total = loss(trees, (starts * numbers)[rows], batch)
        return total / jnp.maximum(jnp.sum(batch["weights"]), 1.0)

    updates, state = optax.scale_by_adam().update(jax.grad(mean)(numbers), state)
    return jax.tree.map(lambda x, update: x - rate * update, numbers, updates), state

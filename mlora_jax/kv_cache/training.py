"""Trains the projections: only they move, and they stay orthogonal.

A step draws a rank of the grid for the keys and for the values of every layer and head, so all prefixes learn. The
ranks are data: one executable serves all draws.

Axes: A micro-batches, B rows of a micro-batch, T time, L layer, KV key and value heads, Hd features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mlora_jax.kv_cache.attention import Projections, cache_shape, project
from mlora_jax.kv_cache.objective import Sums, distillation_sums
from mlora_jax.kv_cache.orthogonal import turned
from mlora_jax.kv_cache.ranks import KINDS, Ranks, check_levels
from mlora_jax.kv_cache.text import TextRows
from mlora_jax.kv_cache.variables import KVBasis, KVRank
from mlora_jax.models.decoder import Decoder
from mlora_jax.training.pretrain import make_optimizer

CHUNK = 256  # positions whose logits exist at one time


class ProjectedTrees(NamedTuple):
    """A projected decoder as pytrees; `nnx.merge` takes all four.

    Attributes:
      graphdef: the graph definition.
      bases: the orthogonal matrices of keys and values.
      ranks: the ranks, which are data.
      rest: all other variables, which are frozen.
    """

    graphdef: Any
    bases: Any
    ranks: Any
    rest: Any

    @classmethod
    def of(cls, model: Decoder, projections: Projections) -> ProjectedTrees:
        """Splits a decoder that these projections are put into."""
        return cls(*nnx.split(project(model, projections), KVBasis, KVRank, ...))

    def at(self, u: Mapping[str, jax.Array] | None = None, ranks: Ranks | None = None) -> Decoder:
        """Returns the decoder with other matrices {"k": U_k, "v": U_v}, or at other ranks; None keeps its own."""
        bases = self.bases if u is None else _with(self.bases, {f"{name}_basis": u[name] for name in KINDS})
        kept = self.ranks if ranks is None else _with(self.ranks, {f"{n}_rank": getattr(ranks, n) for n in KINDS})
        return nnx.merge(self.graphdef, bases, kept, self.rest)


def _with(tree: Any, values: Mapping[str, Any]) -> Any:
    """Returns a tree whose leaves are the values of their last name."""
    flat = nnx.to_flat_state(tree)
    return nnx.from_flat_state([(path, leaf.replace(jnp.asarray(values[str(path[-1])]))) for path, leaf in flat])


def draw_ranks(key: jax.Array, shape: tuple[int, int, int], levels: int) -> Ranks:
    """Draws a rank of the grid Hd/levels, 2 Hd/levels, ..., Hd for the keys and the values of every layer and head.

    Args:
      key: a `jax.random.key`.
      shape: (L, KV, Hd).
      levels: the number of ranks of the grid, a divisor of Hd.
    """
    step = check_levels(levels, shape[2])
    drawn = step * jax.random.randint(key, (len(KINDS), *shape[:2]), 1, levels + 1, jnp.int32)
    return Ranks(*drawn)


class StepMeans(NamedTuple):
    """What one step of training returns besides its state: means per token, in nats.

    Attributes:
      loss: the weighted sum that is minimised.
      divergence: KL(full || cut).
      cross_entropy: of the text's own next tokens.
    """

    loss: jax.Array
    divergence: jax.Array
    cross_entropy: jax.Array


def make_step(
    model: Decoder,
    start: Projections,
    optimizer: optax.GradientTransformation,
    *,
    levels: int,
    kl_weight: float,
    remat: str = "none",
) -> tuple[Callable[..., tuple[Any, Any, StepMeans]], Any]:
    """Compiles a step over the free matrices X of `orthogonal.turned`.

    Args:
      model: the decoder, with an adapter or without; its function without projections is the teacher.
      start: the projections at X = 0.
      optimizer: an optimizer of optax.
      levels: the number of ranks of the grid.
      kl_weight: the weight of KL(full || cut); the cross-entropy has the rest of 1.
      remat: how much of a layer the backward pass computes again, a key of `mlora_jax.models.decoder.REMAT`.

    Returns:
      (step, frozen): step(frozen, free, optimizer_state, key, tokens [A, B, T], segments [A, B, T]) returns the new
      free matrices, the new optimizer state and a `StepMeans`. Each micro-batch draws its own ranks.
    """
    shape = cache_shape(model)
    check_levels(levels, shape[2])
    model = nnx.clone(model)
    model.remat = remat
    graphdef, bases, ranks, rest = ProjectedTrees.of(model, start)
    teacher, full = nnx.split(model)

    def loss_of(free, trees, first, full, key, tokens, segments) -> tuple[jax.Array, Sums]:
        u = {name: turned(first[name], free[name]) for name in KINDS}
        cut = trees.at(u, draw_ranks(key, shape, levels))
        whole = nnx.merge(teacher, full)
        mine, theirs = (each.hidden(tokens, segment_ids=segments) for each in (cut, whole))
        sums = distillation_sums(whole, mine, theirs, tokens, segments, chunk=CHUNK)
        # The sum, not the mean: a micro-batch counts by its tokens.
        return sums.loss(kl_weight) * sums.count, sums

    @jax.jit
    def step(frozen, free, optimizer_state, key, tokens, segments):
        bases, ranks, rest, first, full = frozen
        trees = ProjectedTrees(graphdef, bases, ranks, rest)

        def add(carry, micro_batch):
            number, tokens, segments = micro_batch
            gradient, sums = jax.grad(loss_of, has_aux=True)(
                free, trees, first, full, jax.random.fold_in(key, number), tokens, segments
            )
            return jax.tree.map(jnp.add, carry, (gradient, sums)), None

        none = jnp.zeros((), model.wide_dtype)
        empty = jax.tree.map(jnp.zeros_like, free), Sums(none, none, none)
        numbers = jnp.arange(len(tokens), dtype=jnp.uint32)
        (gradient, sums), _ = jax.lax.scan(add, empty, (numbers, tokens, segments))
        count = jnp.maximum(sums.count, 1.0)
        gradient = jax.tree.map(lambda x: x / count, gradient)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, free)
        means = StepMeans(sums.loss(kl_weight), sums.divergence / count, sums.cross_entropy / count)
        return optax.apply_updates(free, updates), optimizer_state, means

    first = {"k": jnp.asarray(start.u_k), "v": jnp.asarray(start.u_v)}
    return step, (bases, ranks, rest, first, full)


def train_projections(
    model: Decoder,
    start: Projections,
    rows: TextRows,
    train: Mapping[str, Any],
    *,
    levels: int,
    seed: int,
    report: Callable[[int, StepMeans], None] = lambda number, step: None,
) -> Projections:
    """Trains projections from a start.

    Args:
      model: the decoder, which stays as it is.
      start: the projections to begin with, such as `principal_components`.
      rows: the packed training text.
      train: the group `train` of a config, see `configs/kv_cache_smollm2.py`. With steps = 0 the start is returned.
      levels: the number of ranks of the grid.
      seed: the seed of the order of the rows and of the ranks.
      report: a function that gets the number of each step and its `StepMeans`.

    Returns:
      The trained projections in float32, orthogonal to rounding.

    Raises:
      ValueError: a batch has more rows than the text, the batch is not a multiple of the accumulation, the number of
        levels does not divide Hd, or the loss is not finite.
    """
    steps, size, accumulation = train["steps"], train["batch_size"], train["accumulation"]
    check_levels(levels, cache_shape(model)[2])
    if size % accumulation:
        raise ValueError(f"train.batch_size={size} must be a multiple of train.accumulation={accumulation}")
    if not steps:
        return start
    if len(rows.tokens) < size:
        raise ValueError(f"the training text fills {len(rows.tokens)} rows, less than train.batch_size={size}")
    optimizer = make_optimizer(train)
    how: dict[str, Any] = dict(levels=levels, kl_weight=train["kl_weight"], remat=train["remat"])
    step, frozen = make_step(model, start, optimizer, **how)
    free = {"k": jnp.zeros_like(jnp.asarray(start.u_k)), "v": jnp.zeros_like(jnp.asarray(start.u_v))}
    state, key = optimizer.init(free), jax.random.key(seed)
    order, micro = np.random.default_rng(seed), []
    for number in range(steps):
        if len(micro) < size:  # another pass over the text
            micro = [*micro, *order.permutation(len(rows.tokens)).tolist()]
        chosen, micro = np.asarray(micro[:size]), micro[size:]
        batch = (x[chosen].reshape(accumulation, size // accumulation, -1) for x in rows)
        free, state, means = step(frozen, free, state, jax.random.fold_in(key, number), *batch)
        if not np.isfinite(float(means.loss)):
            raise ValueError(f"the loss of step {number + 1} is {float(means.loss)}: try a smaller train.learning_rate")
        report(number + 1, means)
    return finished(start, free)


def finished(start: Projections, free: Mapping[str, jax.Array]) -> Projections:
    """Returns the projections that free matrices stand for, computed in float64 and rounded to float32."""

    def one(u: Any, x: Any) -> np.ndarray:
        x = np.asarray(x, np.float64)
        skew, identity = (x - np.swapaxes(x, -1, -2)) / 2, np.eye(x.shape[-1])
        return (np.asarray(u, np.float64) @ np.linalg.solve(identity - skew, identity + skew)).astype(np.float32)

    return Projections(one(start.u_k, free["k"]), one(start.u_v, free["v"]), np.asarray(start.mean_v))

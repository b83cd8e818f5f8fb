"""Maestro: ordered dropout, which puts the columns of one layer in the order of their importance at each step."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from mlora_jax.core.rank_axes import (
    FACTORS,
    B,
    adapter_rank,
    along_rank_of_layers,
    by_parent,
    leading_axes,
    leaf_name,
    path_names,
)
from mlora_jax.core.transforms import AfterUpdate

Tree = Any

EPSILON = 1e-7  # a tail whose two norms are below this in their product is gone


def truncate_one_layer(adapter: Tree, key: jax.Array) -> Tree:
    """Cuts one layer to a random rank: its columns of A beyond b are zero. All other layers stay as they are.

    The layer is drawn uniformly from all layers, and b from 1..R. The gradient of the cut columns of A and of their
    rows of B is zero.

    Args:
      adapter: the tree of factors.
      key: a `jax.random.key`.

    Source: Maestro, arXiv 2308.14929, section 3.1 (LoD): in expectation over b, the optimum of a linear model has the
    columns in the order of its singular values.
    """
    draw_layer, draw_rank = jax.random.split(key)
    layers, rank = by_parent(adapter), adapter_rank(adapter)
    counts = {parent: math.prod(leading_axes(leaves)) for parent, leaves in layers.items()}
    chosen = jax.random.randint(draw_layer, (), 0, sum(counts.values()))
    kept = jnp.arange(rank) < jax.random.randint(draw_rank, (), 1, rank + 1)  # [R]
    masks, start = {}, 0
    for parent, count in counts.items():
        here = (jnp.arange(start, start + count) == chosen).reshape(*leading_axes(layers[parent]), 1)
        shape = (*here.shape[:-1], rank)
        masks[parent] = ~jnp.broadcast_to(here, shape) | jnp.broadcast_to(kept, shape)
        start += count

    def cut(path, leaf):
        *parent, name = path_names(path)
        if name != FACTORS[0]:
            return leaf
        return jnp.where(along_rank_of_layers(name, masks[tuple(parent)]), leaf, 0.0)

    return jax.tree_util.tree_map_with_path(cut, adapter)


def shrink_tails(adapter: Tree, after: AfterUpdate) -> Tree:
    """Takes a step along the gradient of the hierarchical group lasso, and removes the tails that are zero by then.

        penalty = sum over b of (|A[:, b:]|_F + |B[b:]|_F),   A <- A - rate strength d penalty / d A,   the same for B

    A tail, which is all columns from one on, is set to zero if ``|A[:, b:]|_F |B[b:]|_F`` is at most 1e-7; it has no
    gradient from then on.

    Args:
      adapter: the tree of factors.
      after: the numbers of the step: the learning rate, and the weight of the penalty as `strength`.

    Source: Maestro, arXiv 2308.14929, section 3.2. Here the penalty is decoupled from Adam, as weight decay is. Its
    weight differs between the paper's tasks; 1e-3 is our choice.
    """
    rate = jnp.asarray(after.learning_rate) * jnp.asarray(after.strength)
    norms = {
        parent: [_tail_norms(name, leaves[name]) for name in FACTORS] for parent, leaves in by_parent(adapter).items()
    }

    def one(path, leaf):
        name, (of_a, of_b) = leaf_name(path), norms[path_names(path)[:-1]]
        if name not in FACTORS:
            return leaf
        own = of_a if name == FACTORS[0] else of_b
        # Column i is in all tails that begin at or before it, so the penalty pulls on it by the sum of their 1 / norm.
        over = jnp.cumsum(jnp.where(own > 0, 1 / jnp.where(own > 0, own, 1.0), 0.0), axis=-1)
        # The pull on one column never takes it past zero.
        factor = jnp.maximum(1 - rate.astype(leaf.dtype) * over, 0.0)
        # At the start B is zero everywhere, and nothing is removed.
        gone = (of_a * of_b <= EPSILON) & (of_b[..., :1] > 0)
        return leaf * along_rank_of_layers(name, jnp.where(gone, 0.0, factor)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, adapter)


def _tail_norms(name: str, leaf: jax.Array) -> jax.Array:
    """Returns the norms [..., R] of the columns of A, or the rows of B, from each one to the last."""
    beside = -1 if name == B else -2
    squares = jnp.sum(jnp.square(leaf), axis=beside)
    return jnp.sqrt(jnp.flip(jnp.cumsum(jnp.flip(squares, axis=-1), axis=-1), axis=-1))

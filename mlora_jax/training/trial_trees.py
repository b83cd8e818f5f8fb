"""Trees of arrays with a leading axis over trials, and the random keys of a trial."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class TrialKeys(NamedTuple):
    """The independent random keys of a trial.

    The order of the data has no key here, because it follows from the seed itself.

    Attributes:
      adapter: the key for the fresh factors.
      draws: the key for the draws of profiles.
      dropout: the key for dropout.
    """

    adapter: jax.Array
    draws: jax.Array
    dropout: jax.Array


def trial_keys(seed: int) -> TrialKeys:
    """Returns the keys that follow from a trial's seed."""
    return TrialKeys(*(jax.random.fold_in(jax.random.key(seed), number) for number in range(3)))


def select_trials(chosen: np.ndarray | jax.Array, these: Any, those: Any) -> Any:
    """Takes the chosen trials from one tree and the others from a second tree.

    Args:
      chosen: [K] bool, whether a trial is taken from `these`.
      these: the tree for the chosen trials, leaves [K, ...].
      those: the tree for the other trials, leaves [K, ...].
    """
    return jax.tree.map(lambda x, y: jnp.where(chosen.reshape(-1, *(1,) * (x.ndim - 1)), x, y), these, those)


def stack_trees(trees: Iterable[Any]) -> Any:
    """Stacks K trees of arrays into one tree with a leading K."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def take_trial(tree: Any, number: int) -> Any:
    """Returns the tree of one trial from a tree with a leading K.

    On a mesh the arrays of the other trials are not gathered.
    """
    return jax.tree.map(lambda leaf: _from_mesh(leaf, number) if _on_mesh(leaf) else leaf[number], tree)


def _on_mesh(leaf) -> bool:
    plain = not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return isinstance(leaf, jax.Array) and plain and len(leaf.sharding.device_set) > 1


@jax.jit
def _from_mesh(leaf: jax.Array, number) -> jax.Array:
    chosen = jnp.arange(len(leaf)).reshape(-1, *(1,) * (leaf.ndim - 1)) == number
    if leaf.dtype == bool:
        return jnp.any(chosen & leaf, axis=0)
    return jnp.sum(jnp.where(chosen, leaf, 0), axis=0, dtype=leaf.dtype)

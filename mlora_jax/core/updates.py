"""Update rules: a rule changes Adam's update before it is added to an adapter. `UPDATES` is the table of them.

The rates of columns are data, so rules that differ only in them share an executable. To add a rule, add a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.core.hierarchy import RankHierarchy
from mlora_jax.core.rank_axes import GATE, leaf_name
from mlora_jax.core.rows import find_row

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """A row of `UPDATES`: ``adapter <- proximal(adapter + column_rates * update)``.

    Attributes:
      summary: one line for tables and errors.
      column_rates: (hierarchy) -> [R], a factor on the update of column i of A, of row i of B and of entry i of a gate;
        0 freezes them.
      proximal: (adapter) -> adapter, the proximal step after the update; None if there is none.
      needs_gate: true if the rule acts on gates, which the method must then have.
    """

    summary: str
    column_rates: Callable[[RankHierarchy], jax.Array] = lambda hierarchy: jnp.ones(hierarchy.max_rank)
    proximal: Callable[[Tree], Tree] | None = None
    needs_gate: bool = False


def _upper_half(hierarchy: RankHierarchy) -> jax.Array:
    return jnp.asarray(np.arange(hierarchy.max_rank) >= hierarchy.max_rank // 2, float)


def _first_faster(hierarchy: RankHierarchy, *, rate: float) -> jax.Array:
    return jnp.asarray(np.where(np.arange(hierarchy.max_rank) == 0, rate, 1.0), float)


def soft_threshold_gates(adapter: Tree, *, threshold: float) -> Tree:
    """Applies ``g <- sign(g) max(|g| - threshold, 0)`` to every gate; factors stay as they are.

    Args:
      adapter: the tree of factors and gates.
      threshold: the amount by which every entry comes nearer to zero.

    Source: SoRA, arXiv 2311.11696, equation 8.
    """

    def shrink(path, leaf):
        if leaf_name(path) != GATE:
            return leaf
        return jnp.sign(leaf) * jnp.maximum(jnp.abs(leaf) - threshold, 0.0)

    return jax.tree_util.tree_map_with_path(shrink, adapter)


UPDATES: dict[str, Update] = {
    "none": Update(summary="Adam's update as it is"),
    "upper_half": Update(
        summary="only the columns above R/2 move: every prefix up to R/2 stays", column_rates=_upper_half
    ),
    "first_column_3": Update(
        summary="the update of the first column three times", column_rates=functools.partial(_first_faster, rate=3.0)
    ),
    "soft_threshold": Update(
        summary="every gate comes nearer to zero by 3e-4, as in SoRA",
        proximal=functools.partial(soft_threshold_gates, threshold=3e-4),
        needs_gate=True,
    ),
}


def get_update(name: str) -> Update:
    """Returns the update rule that has the given name.

    Raises:
      ValueError: no update rule has this name; the message names the nearest and all known ones.
    """
    return find_row(UPDATES, name, "update")

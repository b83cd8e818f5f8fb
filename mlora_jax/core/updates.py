"""Update rules: a rule changes Adam's update before it is added to an adapter. `UPDATES` is the table of them.

Rates and strengths are data, so rules that differ only in them share an executable. To add a rule, add a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.core.adalora import keep_budget
from mlora_jax.core.hierarchy import RankHierarchy
from mlora_jax.core.ordered_dropout import shrink_tails, truncate_one_layer
from mlora_jax.core.rank_axes import ADAPTER_LEAVES, GATE, A, B, leaf_name
from mlora_jax.core.rows import find_row
from mlora_jax.core.transforms import AfterUpdate, StepRule

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """A row of `UPDATES`: ``leaf <- proximal(leaf + leaf_rate * column_rates * update)``.

    Attributes:
      summary: one line for tables and errors.
      column_rates: (hierarchy) -> [R], a factor on the update of column i of A, of row i of B and of entry i of a gate;
        0 freezes them.
      leaf_rates: pairs of a leaf's name, a key of `mlora_jax.core.rank_axes.RANK_AXES`, and a factor on the update of
        all leaves of this name; 0 freezes them. Leaves that are not named have the factor 1.
      proximal: (adapter, `AfterUpdate`) -> adapter, the proximal step after the update; None if there is none.
      perturb: (adapter, key) -> adapter, a random change of the adapter inside the loss, see `StepRule`; None if there
        is none.
      strength: a number for the proximal step, such as a threshold.
      needs_gate: true if the rule acts on gates, which the method must then have.
      needs_optimizer: the optimizer whose state the proximal step reads, a key of
        `mlora_jax.core.optimizers.OPTIMIZERS`, which the method must then have; empty if there is none.
    """

    summary: str
    column_rates: Callable[[RankHierarchy], jax.Array] = lambda hierarchy: jnp.ones(hierarchy.max_rank)
    leaf_rates: tuple[tuple[str, float], ...] = ()
    proximal: Callable[[Tree, AfterUpdate], Tree] | None = None
    perturb: Callable[[Tree, jax.Array], Tree] | None = None
    strength: float = 0.0
    needs_gate: bool = False
    needs_optimizer: str = ""

    @property
    def rule(self) -> StepRule:
        """The functions of this rule that are compiled into the training step."""
        return StepRule(self.proximal, self.perturb)

    def all_leaf_rates(self) -> dict[str, float]:
        """Returns the factor of every kind of leaf of an adapter."""
        return dict.fromkeys(ADAPTER_LEAVES, 1.0) | dict(self.leaf_rates)


def _upper_half(hierarchy: RankHierarchy) -> jax.Array:
    return jnp.asarray(np.arange(hierarchy.max_rank) >= hierarchy.max_rank // 2, float)


def _lower_half(hierarchy: RankHierarchy) -> jax.Array:
    return jnp.asarray(np.arange(hierarchy.max_rank) < hierarchy.max_rank // 2, float)


def _first_faster(hierarchy: RankHierarchy, *, rate: float) -> jax.Array:
    return jnp.asarray(np.where(np.arange(hierarchy.max_rank) == 0, rate, 1.0), float)


def soft_threshold_gates(
    adapter: Tree, after: AfterUpdate, *, threshold: Callable[[AfterUpdate], Any] = lambda after: after.strength
) -> Tree:
    """Applies ``g <- sign(g) max(|g| - lambda, 0)`` to every gate; factors stay as they are.

    Args:
      adapter: the tree of factors and gates.
      after: the numbers of the step.
      threshold: the function that computes lambda, the amount by which every entry comes nearer to zero.

    Source: SoRA, arXiv 2311.11696, equation 8. As in the authors' code, the learning rate is no part of lambda.
    """

    def shrink(path, leaf):
        if leaf_name(path) != GATE:
            return leaf
        amount = jnp.asarray(threshold(after), leaf.dtype)
        return jnp.sign(leaf) * jnp.maximum(jnp.abs(leaf) - amount, 0.0)

    return jax.tree_util.tree_map_with_path(shrink, adapter)


def rising_in_stages(after: AfterUpdate, *, stages: int) -> jax.Array:
    """Returns a threshold that rises from 0 to ``strength`` in stages of equal length.

    In stage k of n, counted from 0, it is ``strength k / (n - 1)``.

    Args:
      after: the numbers of the step.
      stages: n, at least 2.

    Source: the dense-to-sparse schedule of SoRA, arXiv 2311.11696, algorithm 1. The authors' script takes 7 values from
    0 to 7e-4. There the first value is trained for 50 epochs and each of the others for 15; here all stages have the
    same share of the steps of one run.
    """
    stage = jnp.clip(jnp.ceil(jnp.asarray(after.progress) * stages) - 1, 0, stages - 1)
    return after.strength * stage / (stages - 1)


def rising_after_half(after: AfterUpdate) -> jax.Array:
    """Returns a threshold that is 0 for the first half of the steps and then rises linearly to ``strength``.

    Args:
      after: the numbers of the step.

    Source: CoDyRA, arXiv 2412.01004: dense training first, then a proximal step on the importance weights. The authors'
    schedule is not public in what we could read; half of the steps and the largest threshold .005 are those of a public
    reimplementation.
    """
    return after.strength * jnp.clip(2 * jnp.asarray(after.progress) - 1, 0.0, 1.0)


UPDATES: dict[str, Update] = {
    "none": Update(summary="Adam's update as it is"),
    "upper_half": Update(
        summary="only the columns above R/2 move: every prefix up to R/2 stays", column_rates=_upper_half
    ),
    "lower_half": Update(summary="only the columns up to R/2 move", column_rates=_lower_half),
    "lower_half_gates": Update(
        summary="only the gates of the columns up to R/2 move",
        column_rates=_lower_half,
        leaf_rates=((A, 0.0), (B, 0.0)),
        needs_gate=True,
    ),
    "first_column_3": Update(
        summary="the update of the first column three times", column_rates=functools.partial(_first_faster, rate=3.0)
    ),
    "lora_plus": Update(summary="B has 16 times the learning rate of A, as in LoRA+", leaf_rates=((B, 16.0),)),
    "budget": Update(
        summary="the gates of all but the most important components are zero; the budget falls to 2/3, as in AdaLoRA",
        proximal=keep_budget,
        needs_gate=True,
        needs_optimizer="adalora",
    ),
    "ordered_dropout": Update(
        summary="a random layer is cut to a random rank at each step, and a group lasso shrinks tails, as in Maestro",
        perturb=truncate_one_layer,
        proximal=shrink_tails,
        strength=1e-3,
    ),
    "soft_threshold": Update(
        summary="every gate comes nearer to zero by 3e-4, as in SoRA",
        proximal=soft_threshold_gates,
        strength=3e-4,
        needs_gate=True,
    ),
    "soft_threshold_late": Update(
        summary="soft_threshold whose threshold rises to .005 in the second half of the steps, as for CoDyRA",
        proximal=functools.partial(soft_threshold_gates, threshold=rising_after_half),
        strength=0.005,
        needs_gate=True,
    ),
    "soft_threshold_rising": Update(
        summary="soft_threshold whose threshold rises from 0 to 7e-4 in 7 stages, as in SoRA's schedule",
        proximal=functools.partial(soft_threshold_gates, threshold=functools.partial(rising_in_stages, stages=7)),
        strength=7e-4,
        needs_gate=True,
    ),
}


def get_update(name: str) -> Update:
    """Returns the update rule that has the given name.

    Raises:
      ValueError: no update rule has this name; the message names the nearest and all known ones.
    """
    return find_row(UPDATES, name, "update")

"""Policies: a policy chooses the profiles that a training step uses. `POLICIES` is the table of them.

A policy only draws arrays, so every policy with the same number of profiles runs in the same executable.

Axes: M micro-batches of a step, N profiles each, E examples of a micro-batch, R rank. E is 1 where all examples share
a profile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.core.hierarchy import RankHierarchy
from mlora_jax.core.rows import find_row
from mlora_jax.core.updates import UPDATES, Update


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("profiles", "update_mask", "column_rates", "loss_weights", "leaf_rates", "strength"),
    meta_fields=("per_example",),
)
@dataclasses.dataclass(frozen=True)
class Draw:
    """The profiles and weights of one training step.

    The step's loss is the weighted mean of its losses under the N profiles.

    Attributes:
      profiles: [N, E, R] rank profiles; [M, N, E, R] from `draw_step`, one row per micro-batch.
      update_mask: [R], 1 if column i of A and row i of B have a gradient, else 0.
      column_rates: [R], a factor on Adam's update of column i of A and row i of B; it is 0 where `update_mask` is 0.
      loss_weights: [N], the weight of each profile's loss in the loss of the step; they sum to 1.
      leaf_rates: a dictionary: name of a leaf -> scalar, a factor on Adam's update of these leaves; None means 1.
      strength: scalar, the number for the proximal step of the update rule; None if there is none.
      per_example: if true, every example has a profile of its own and E is the number of examples; otherwise E is 1.
        It is static, so a compiled step never guesses it from a shape.
    """

    profiles: jax.Array
    update_mask: jax.Array
    column_rates: jax.Array
    loss_weights: jax.Array
    leaf_rates: Mapping[str, jax.Array] | None = None
    strength: jax.Array | None = None
    per_example: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """A rule for drawing profiles.

    Attributes:
      draw: (hierarchy, key) -> Draw; it is traceable, and random only through `key`. If `every` is "example", it is
        (hierarchy, key, examples) -> Draw, and E is the number of examples of the whole step.
      count: (hierarchy) -> N, the number of profiles that a step uses. A step costs as much as N steps of LoRA.
      every: "micro_batch" draws for each micro-batch of a step, "step" draws once for the whole step, and "example"
        draws a profile for each example of the step.
      trained_profile: (hierarchy) -> [R], the profile of the trained function at full rank, which `squeeze` preserves.
      uses_weights: true if training depends on the hierarchy's weights w_r.
      summary: one line for tables and errors.
    """

    draw: Callable[..., Draw]
    summary: str
    count: Callable[[RankHierarchy], int] = lambda hierarchy: 1
    every: str = "micro_batch"
    trained_profile: Callable[[RankHierarchy], jax.Array] = RankHierarchy.lora
    uses_weights: bool = False


def _largest_prefix(hierarchy: RankHierarchy) -> jax.Array:
    return hierarchy.prefix(hierarchy.ranks[-1])


def _all_columns(hierarchy: RankHierarchy, profiles: jax.Array) -> Draw:
    """Returns the draw in which all examples share the profiles [N, R], with equal weights."""
    count, ones = len(profiles), jnp.ones_like(profiles[0])
    return Draw(profiles[:, None], ones, ones, jnp.full(count, 1.0 / count, profiles.dtype))


def _lora(hierarchy, key):
    return _all_columns(hierarchy, hierarchy.lora()[None])


def _matryoshka(hierarchy, key):
    return _all_columns(hierarchy, hierarchy.matryoshka()[None])


def _dylora(hierarchy, key):
    return _all_columns(hierarchy, hierarchy.sample_prefix(key)[None])


def _any_rank(hierarchy, key):
    return jax.random.randint(key, (), 1, hierarchy.max_rank + 1)


def _dylora_original(hierarchy, key):
    return _all_columns(hierarchy, hierarchy.prefix_at(_any_rank(hierarchy, key))[None])


def _dylora_frozen(hierarchy, key):
    rank = _any_rank(hierarchy, key)
    profile = hierarchy.prefix_at(rank)
    only_last = (jnp.arange(1, hierarchy.max_rank + 1) == rank).astype(profile.dtype)
    return dataclasses.replace(_all_columns(hierarchy, profile[None]), update_mask=only_last)


def _matryoshka_exact(hierarchy, key):
    draw = _all_columns(hierarchy, jnp.stack([hierarchy.prefix(r) for r in hierarchy.ranks]))
    if hierarchy.weights is None:
        return draw
    weights = np.array(hierarchy.weights)
    return dataclasses.replace(draw, loss_weights=jnp.asarray(weights / weights.sum(), float))


def _sandwich(hierarchy, key):
    between = hierarchy.ranks[1:-1] or hierarchy.ranks
    middle = hierarchy.prefix_at(jax.random.choice(key, jnp.array(between)))
    ends = [hierarchy.prefix(hierarchy.ranks[0]), hierarchy.prefix(hierarchy.ranks[-1])]
    return _all_columns(hierarchy, jnp.stack([*ends, middle]))


def _per_example(hierarchy, key, examples):
    profiles = jax.vmap(hierarchy.prefix_at)(hierarchy.stratified_ranks(key, examples))  # [E, R]
    ones = jnp.ones_like(profiles[0])
    return Draw(profiles[None], ones, ones, jnp.ones(1, profiles.dtype), per_example=True)


# To add a policy, add a row. Sources: LoRA arXiv 2106.09685; DyLoRA arXiv 2210.07558, whose original code draws
# b from 1..R once per step; MatryoshkaLoRA arXiv 2605.07850; the sandwich rule of slimmable networks, arXiv 1903.05134.
POLICIES: dict[str, Policy] = {
    "lora": Policy(draw=_lora, summary="every column at s_R"),
    "dylora": Policy(
        draw=_dylora,
        trained_profile=_largest_prefix,
        uses_weights=True,
        summary="a prefix b of S per micro-batch, as in the MatryoshkaLoRA paper",
    ),
    "dylora_original": Policy(
        draw=_dylora_original, every="step", summary="a prefix b of 1..R per step, as in DyLoRA's code"
    ),
    "dylora_frozen": Policy(
        draw=_dylora_frozen, every="step", summary="dylora_original that moves column and row b only"
    ),
    "matryoshka": Policy(
        draw=_matryoshka, trained_profile=RankHierarchy.matryoshka, uses_weights=True, summary="the paper's diagonal P"
    ),
    "matryoshka_exact": Policy(
        draw=_matryoshka_exact,
        trained_profile=_largest_prefix,
        count=lambda hierarchy: len(hierarchy.ranks),
        uses_weights=True,
        summary="the mean of the losses at every prefix of S",
    ),
    "sandwich": Policy(
        draw=_sandwich,
        trained_profile=_largest_prefix,
        count=lambda hierarchy: 3,
        summary="the mean of the losses at the smallest, the largest and one random prefix between them",
    ),
    "per_example": Policy(
        draw=_per_example,
        trained_profile=_largest_prefix,
        every="example",
        uses_weights=True,
        summary="a prefix of S for each example, spread evenly over the step's examples and shuffled",
    ),
}


def get_policy(name: str) -> Policy:
    """Returns the policy that has the given name.

    Raises:
      ValueError: no policy has this name; the message names the nearest and all known ones.
    """
    return find_row(POLICIES, name, "policy")


def draw_step(
    policy: Policy,
    hierarchy: RankHierarchy,
    key: jax.Array,
    step: int | jax.Array,
    *,
    accumulation: int,
    examples: int = 1,
    update: Update = UPDATES["none"],
) -> Draw:
    """Returns the draw of one optimizer step.

    Args:
      policy: a row of `POLICIES`.
      hierarchy: the ranks S, their scales s_r and weights w_r, and R.
      key: the trial's `jax.random.key` for draws; the same key and step always give the same draw.
      step: the number of the step, an int32 scalar that may be traced.
      accumulation: M, the number of micro-batches in the step.
      examples: B, the number of examples in a micro-batch; only a policy that draws for every example needs it.
      update: a row of `UPDATES`; the draw has the rates and the strength of this rule.

    Returns:
      Draw with profiles [M, N, E, R], update_mask [R], column_rates [R], loss_weights [N], the scalars of leaf_rates
      and strength; E is B for a policy that draws for every example, else 1.

    >>> hierarchy = RankHierarchy((1, 2))
    >>> draw_step(get_policy("matryoshka_exact"), hierarchy, jax.random.key(0), 0, accumulation=3).profiles.shape
    (3, 2, 1, 2)
    >>> draw_step(get_policy("per_example"), hierarchy, jax.random.key(0), 0, accumulation=3, examples=4).profiles.shape
    (3, 1, 4, 2)
    """
    draw = _draw_profiles(policy, hierarchy, jax.random.fold_in(key, step), accumulation, examples)
    dtype = draw.update_mask.dtype
    return dataclasses.replace(
        draw,
        column_rates=draw.update_mask * update.column_rates(hierarchy).astype(dtype),
        leaf_rates={name: jnp.asarray(rate, dtype) for name, rate in update.all_leaf_rates().items()},
        strength=jnp.asarray(update.strength, dtype),
    )


def _draw_profiles(policy: Policy, hierarchy: RankHierarchy, key: jax.Array, accumulation: int, examples: int) -> Draw:
    if policy.every == "example":
        draw = policy.draw(hierarchy, key, accumulation * examples)
        count, _, rank = draw.profiles.shape
        profiles = draw.profiles.reshape(count, accumulation, examples, rank).swapaxes(0, 1)
        return dataclasses.replace(draw, profiles=profiles)
    if policy.every == "step":
        draw = policy.draw(hierarchy, key)
        profiles = jnp.broadcast_to(draw.profiles, (accumulation, *draw.profiles.shape))
        return dataclasses.replace(draw, profiles=profiles)
    keys = jax.vmap(lambda m: jax.random.fold_in(key, m))(jnp.arange(accumulation))
    draws = jax.vmap(lambda k: policy.draw(hierarchy, k))(keys)
    first = jax.tree.map(lambda leaf: leaf[0], draws)  # the mask and the weights are the same in every micro-batch
    return dataclasses.replace(first, profiles=draws.profiles)

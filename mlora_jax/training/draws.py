"""The draws of trials that train together, as one compiled function of the step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.core.hierarchy import RankHierarchy
from mlora_jax.core.policies import Draw, Policy, draw_step
from mlora_jax.core.updates import UPDATES, Update


class DrawnBy(NamedTuple):
    """The parts of a trial that its draws depend on besides its key and the step.

    Attributes:
      policy: the policy that draws.
      hierarchy: the ranks, scales and weights of the trial.
      update: the update rule of the phase.
    """

    policy: Policy
    hierarchy: RankHierarchy
    update: Update = UPDATES["none"]


def compile_draws(
    drawn_by: Sequence[DrawnBy], keys: jax.Array, *, accumulation: int, examples: int
) -> Callable[[Any], Draw]:
    """Compiles the draws of K trials into one function: step -> Draw with a leading K.

    Args:
      drawn_by: the policy, hierarchy and update rule of each trial. The profiles of all trials have one shape
        [N, E, R].
      keys: [K] `jax.random.key`s for the draws.
      accumulation: M, the number of micro-batches.
      examples: B, the number of examples in a micro-batch.
    """
    return functools.partial(_jitted_draws(tuple(drawn_by), accumulation, examples), keys)


@functools.lru_cache(maxsize=256)
def _jitted_draws(drawn_by: tuple[DrawnBy, ...], accumulation: int, examples: int) -> Callable:
    """Returns the compiled draws; cached, so that a batch with the same methods as another one compiles nothing."""
    members: dict[DrawnBy, list[int]] = {}
    for number, each in enumerate(drawn_by):
        members.setdefault(each, []).append(number)
    # The index is unsigned: a signed one is normalised in a dtype that depends on jax_enable_x64 at its first use.
    back = np.argsort(np.concatenate(list(members.values()))).astype(np.uint32)

    @jax.jit
    def draw(keys, step):
        def one_kind(policy, hierarchy, update, numbers):
            options = dict(accumulation=accumulation, examples=examples, update=update)
            one = functools.partial(draw_step, policy, hierarchy, step=step, **options)
            return jax.vmap(lambda key: one(key=key))(keys[np.array(numbers, np.uint32)])

        parts = [one_kind(*kind, numbers) for kind, numbers in members.items()]
        return jax.tree.map(lambda *xs: jnp.concatenate(xs)[back], *parts)

    return draw

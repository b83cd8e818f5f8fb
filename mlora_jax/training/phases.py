"""The phases of trials: which policy trains when and with which scales, and what happens in between."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mlora_jax.adapters import set_profile
from mlora_jax.config import further_methods
from mlora_jax.core import Draw, Method, RankHierarchy, get_method
from mlora_jax.core.squeeze import Tree, map_gradients, squeeze_factors
from mlora_jax.training.loop import TrialKeys, compile_draws
from mlora_jax.training.step import Schedule, TrialState
from mlora_jax.trials import Trial


class PhaseShape(NamedTuple):
    """What of a phase decides about its executable.

    Attributes:
      end: how many steps are finished when it ends.
      profiles: N, its cost in LoRA steps.
      per_example: whether every example has a profile of its own.
      carry: of the method, for what happens before it; "" for the first phase.
    """

    end: int
    profiles: int
    per_example: bool
    carry: str


@dataclasses.dataclass(frozen=True)
class TrialPhases:
    """The phases of a run's trials.

    Attributes:
      config: resolved.
      steps: optimizer steps of a trial.
    """

    config: ConfigDict
    steps: int

    def method(self, trial: Trial) -> Method:
        """How a trial is trained."""
        return get_method(trial.method, further_methods(self.config))

    def hierarchy(self, trial: Trial, phase: int = -1) -> RankHierarchy:
        """S, scales and weights of a trial in a phase, by default in the last one."""
        return self.method(trial).hierarchy(trial.hierarchy(self.config.adapter.ranks), phase)

    def hierarchy_at(self, trial: Trial, step: int) -> RankHierarchy:
        """S, scales and weights of what a trial has trained when so many steps are finished."""
        starts = self.method(trial).starts(self.steps)
        return self.hierarchy(trial, max(bisect.bisect_left(starts, step) - 1, 0))

    def begun(self, trial: Trial, step: int) -> list[tuple[str, float]]:
        """Policies and fractions of the phases that a trial has trained in when so many steps are finished."""
        method = self.method(trial)
        count = max(bisect.bisect_left(method.starts(self.steps), step), 1)
        return [(phase.policy, phase.fraction) for phase in method.phases[:count]]

    def trained_profile(self, trial: Trial, phase: int = -1) -> jax.Array:
        """The profile [R] of the function that a phase trains at full rank, by default the last one."""
        return self.method(trial).policies[phase].trained_profile(self.hierarchy(trial, phase))

    def shape(self, trial: Trial) -> tuple[PhaseShape, ...]:
        """What trials need to have in common to be one executable in every phase, and to change phase together."""
        method = self.method(trial)
        ends = (*method.starts(self.steps)[1:], self.steps)
        shapes = []
        for phase, (policy, end) in enumerate(zip(method.policies, ends, strict=True)):
            count = policy.count(self.hierarchy(trial, phase))
            shapes.append(PhaseShape(end, count, policy.every == "example", method.carry if phase else ""))
        return tuple(shapes)

    def cost(self, trial: Trial) -> float:
        """Forward and backward passes of a trial relative to LoRA's; squeezing is not counted."""
        start, passes = 0, 0
        for shape in self.shape(trial):
            start, passes = shape.end, passes + (shape.end - start) * shape.profiles
        return passes / self.steps

    def schedules(self, trials: Sequence[Trial]) -> Callable[[int], Schedule]:
        """Finished steps -> learning rates and lengths [K] of trials that train together."""
        warmup, count = self.config.train.warmup_steps, len(trials)
        rates = jnp.array([trial.learning_rate for trial in trials], float)
        starts = self.method(trials[0]).anneals_from(self.steps)
        # A later phase is one whose warm-up is over: from its start on the rate falls to zero.
        each = [
            Schedule(rates, jnp.full(count, max(start, warmup), float), jnp.full(count, end, float))
            for start, end in itertools.pairwise((*starts, self.steps))
        ]
        return lambda step: each[bisect.bisect_right(starts, step) - 1]

    def draws(self, trials: Sequence[Trial], keys: TrialKeys) -> Callable[[int], Draw]:
        """Finished steps -> the draws of trials that train together, with a leading K."""
        starts = self.method(trials[0]).starts(self.steps)
        by_phase = [self.draws_in(phase, trials, keys) for phase in range(len(starts))]
        return lambda step: by_phase[bisect.bisect_right(starts, step) - 1](step)

    def draws_in(self, phase: int, trials: Sequence[Trial], keys: TrialKeys) -> Callable[[Any], Draw]:
        """Those of one phase."""
        options = self.config.train
        drawn_by = [(self.method(trial).policies[phase], self.hierarchy(trial, phase)) for trial in trials]
        rows = options.batch_size // options.accumulation
        return compile_draws(drawn_by, keys.draws, accumulation=options.accumulation, examples=rows)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="init")
def squeeze_trials(
    optimizer: optax.GradientTransformation,
    carry: str,
    profile: Tree,
    state: TrialState,
    functions: jax.Array,
    keys: jax.Array,
    *,
    init: str = "fan_rank",
) -> TrialState:
    """Squeezes the factors of K trials, all layers of all of them in one program.

    Args:
      optimizer: from `make_optimizer`.
      carry: "rotate" takes the optimizer's moments along, the second ones as if the gradients of different columns were
        uncorrelated, and a gate's as zero; others start it anew.
      profile: profile tree.
      state: of K trials.
      functions: [K, R], the profile of the function that each trial keeps.
      keys: [K] `jax.random.key`s for fresh columns.
      init: of those, as `config.adapter.init`.
    """
    profiles = jax.vmap(lambda p: set_profile(profile, p))(functions)
    adapter, gradient_maps = squeeze_factors(state.adapter, profiles, key=keys, init=init)
    if carry == "rotate":
        follow = functools.partial(_map_moments, gradient_maps=gradient_maps)
        moments = jax.tree.map(follow, state.optimizer, is_leaf=_is_adam)
    else:
        moments = jax.vmap(optimizer.init)(adapter)
    return state._replace(adapter=adapter, optimizer=moments)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _map_moments(node: Any, *, gradient_maps: Tree) -> Any:
    if not _is_adam(node):
        return node
    return node._replace(
        mu=map_gradients(node.mu, gradient_maps), nu=map_gradients(node.nu, gradient_maps, squared=True)
    )

"""The phases of a run's trials: the policy, the scales and the starting action of each phase."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlora_jax.config import further_methods
from mlora_jax.config_type import ConfigDict
from mlora_jax.core import Action, Draw, Method, RankHierarchy, get_action, get_method
from mlora_jax.core.transforms import StepRule
from mlora_jax.training.draws import DrawnBy, compile_draws
from mlora_jax.training.step import Schedule
from mlora_jax.training.trial_trees import TrialKeys
from mlora_jax.trials import Trial


class AdapterForm(NamedTuple):
    """The settings of a trial that decide the shapes of its adapter and of its optimizer's state.

    Attributes:
      rank: R.
      gate: whether every adapted layer has a gate.
      optimizer: the name of the optimizer, a key of `mlora_jax.core.optimizers.OPTIMIZERS`.
    """

    rank: int
    gate: bool = False
    optimizer: str = "adam"


class PhaseShape(NamedTuple):
    """The properties of a phase that decide its executable, and which trials can go through it together.

    Attributes:
      end: the number of steps that are finished when the phase ends.
      profiles: N, the number of profiles per step, which is the cost of a step in LoRA steps.
      per_example: whether every example has a profile of its own.
      start: the action before the phase; empty for the first phase, before which every trial is handled alone.
      rule: the functions of the update rule that are compiled.
      schedule: the period over which the learning rate of the method decays, one of `SCHEDULES`.
    """

    end: int
    profiles: int
    per_example: bool
    start: str
    rule: StepRule
    schedule: str


@dataclasses.dataclass(frozen=True)
class TrialPhases:
    """The phases of a run's trials.

    Attributes:
      config: the resolved config.
      steps: the number of optimizer steps of a trial.
    """

    config: ConfigDict
    steps: int

    def method(self, trial: Trial) -> Method:
        """Returns the method that trains a trial."""
        return get_method(trial.method, further_methods(self.config))

    def form(self, trial: Trial) -> AdapterForm:
        """Returns the form of a trial's adapter."""
        method = self.method(trial)
        return AdapterForm(trial.rank, bool(method.gate), method.optimizer)

    def hierarchy(self, trial: Trial, phase: int = -1) -> RankHierarchy:
        """Returns the ranks, scales and weights of a trial in a phase, by default in the last one."""
        return self.method(trial).hierarchy(trial.hierarchy(self.config.adapter.ranks), phase)

    def hierarchy_at(self, trial: Trial, step: int) -> RankHierarchy:
        """Returns the ranks, scales and weights of a trial's adapter after a number of finished steps."""
        starts = self.method(trial).starts(self.steps)
        return self.hierarchy(trial, max(bisect.bisect_left(starts, step) - 1, 0))

    def begun(self, trial: Trial, step: int) -> list[tuple[str, float]]:
        """Returns the policies and fractions of the phases that a trial has begun after a number of finished steps."""
        method = self.method(trial)
        count = max(bisect.bisect_left(method.starts(self.steps), step), 1)
        return [(phase.policy, phase.fraction) for phase in method.phases[:count]]

    def trained_profile(self, trial: Trial, phase: int = -1) -> jax.Array:
        """Returns the profile [R] of the function that a phase, by default the last one, trains at full rank."""
        return self.method(trial).trained_profile(self.hierarchy(trial, phase), phase)

    def start(self, trial: Trial, phase: int) -> Action:
        """Returns the action on a trial's adapter before a phase."""
        name, options = self.method(trial).phases[phase].start, self.config.adapter
        if not name:
            name = ("peft" if options.start_from else options.init) if phase == 0 else "none"
        return get_action(name)

    def shape(self, trial: Trial) -> tuple[PhaseShape, ...]:
        """Returns the shapes of a trial's phases.

        Trials with equal shapes share one executable in every phase and change phase at the same step.
        """
        method = self.method(trial)
        ends = (*method.starts(self.steps)[1:], self.steps)
        shapes = []
        for at, (phase, end) in enumerate(zip(method.phases, ends, strict=True)):
            policy, update = method.policies[at], method.updates[at]
            shape = PhaseShape(
                end=end,
                profiles=policy.count(self.hierarchy(trial, at)),
                per_example=policy.every == "example",
                start=phase.start if at else "",
                rule=update.rule,
                schedule=method.schedule,
            )
            shapes.append(shape)
        return tuple(shapes)

    def cost(self, trial: Trial) -> float:
        """Returns the number of forward and backward passes of a trial relative to LoRA; actions are not counted."""
        start, passes = 0, 0
        for shape in self.shape(trial):
            start, passes = shape.end, passes + (shape.end - start) * shape.profiles
        return passes / self.steps

    def schedule(self, trials: Sequence[Trial], phase: int) -> Schedule:
        """Returns the learning rates and lengths [K], in a phase, of trials that train together."""
        warmup, count, method = self.config.train.warmup_steps, len(trials), self.method(trials[0])
        rates = jnp.array([trial.learning_rate for trial in trials], float)
        first, anneals = method.starts(self.steps)[phase], method.anneals_from(self.steps)
        # A later decay has no warm-up: the learning rate falls to zero from its start on.
        start, end = next(pair for pair in reversed([*itertools.pairwise((*anneals, self.steps))]) if pair[0] <= first)
        return Schedule(rates, jnp.full(count, max(start, warmup), float), jnp.full(count, end, float))

    def draws(self, trials: Sequence[Trial], phase: int, keys: TrialKeys) -> Callable[[Any], Draw]:
        """Returns the draws, in a phase, of trials that train together.

        Args:
          trials: the K trials.
          phase: the index of the phase.
          keys: the keys of the trials, with a leading K.

        Returns:
          A function: the number of finished steps -> Draw with a leading K.
        """
        options, methods = self.config.train, [self.method(trial) for trial in trials]
        drawn_by = [
            DrawnBy(method.policies[phase], self.hierarchy(trial, phase), method.updates[phase])
            for trial, method in zip(trials, methods, strict=True)
        ]
        rows = options.batch_size // options.accumulation
        return compile_draws(drawn_by, keys.draws, accumulation=options.accumulation, examples=rows)

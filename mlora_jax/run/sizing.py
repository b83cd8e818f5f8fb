"""How many trials train at once: groups that share executables, cut into batches that fit in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mlora_jax.parallel import hosts
from mlora_jax.parallel.mesh import shards_of
from mlora_jax.parallel.rules import shardings
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.starts import first_state
from mlora_jax.training.grid import bytes_on_device, cut_evenly, group_trials, largest_batch, memory_limit, memory_of
from mlora_jax.training.step import TrialState, init_state
from mlora_jax.training.trial_trees import stack_trees, trial_keys
from mlora_jax.training.trials_step import batch_shapes
from mlora_jax.trials import Trial


class StepTiming(NamedTuple):
    """The tokens that a timed step computes, padding included, and the median of its seconds."""

    tokens: int
    seconds: float


def plan_batches(
    experiment: Experiment, trials: Sequence[Trial], *, before_each: Callable[[], None] = lambda: None
) -> list[tuple[tuple[Trial, ...], int]]:
    """Cuts trials into batches: (trials, slots) each. Compiles where the size is to be found out.

    Args:
      experiment: loaded.
      trials: what is to be trained.
      before_each: called before every group of trials that share an executable; may raise to leave.

    Raises:
      ValueError: not even one trial fits in memory.
    """
    groups = group_trials(trials, lambda trial: (experiment.form(trial), experiment.phases.shape(trial)))
    batches = []
    for group in groups:
        before_each()
        at_once = experiment.config.train.trials_at_once or fitting_trials(experiment, group)
        # Slots fill the trial axis of the mesh.
        cuts = cut_evenly(group, min(at_once, len(group)))
        batches += [(some, _filled(experiment, slots)) for some, slots in cuts]
    return batches


def fitting_trials(experiment: Experiment, group: Sequence[Trial]) -> int:
    """How many trials of a group fit in memory at once; on a CPU one, if that is faster."""
    base, beside = bytes_on_device(experiment.adapted_for(group[0]).base), _beside_a_step(experiment, group[0])
    limit = memory_limit(experiment.config.train.memory_gib)
    phases = range(len(experiment.phases.shape(group[0])))

    def needed(count: int) -> int:
        count = _filled(experiment, count)
        each = [memory_of(compile_step(experiment, group[0], count, phase)) for phase in phases]
        return max(each) + count * beside

    most = hosts.broadcast(largest_batch(needed, base, len(group), limit))
    fewest = min(_filled(experiment, 1), len(group))
    if most <= fewest or jax.default_backend() != "cpu":
        return most

    def seconds_per_trial(count: int) -> float:
        slotted = [*group[:count], *[group[0]] * (_filled(experiment, count) - count)]
        return time_steps(experiment, slotted, 2).seconds / count

    # On a CPU many trials at once fall out of its caches, and may be slower than one after the other.
    return hosts.broadcast(min((most, fewest), key=seconds_per_trial))


def time_steps(experiment: Experiment, trials: Sequence[Trial], steps: int, phase: int = 0) -> StepTiming:
    """Trains trials of one group for a few steps as in one of their phases, and forgets them."""
    adapted = experiment.adapted_for(trials[0])
    state, keys = first_state(experiment, trials)
    rule = experiment.phases.shape(trials[0])[phase].rule
    schedule, draws = experiment.phases.schedule(trials, phase), experiment.phases.draws(trials, phase, keys)
    arrays, seconds = next(experiment.batches(trials)), []
    for number in range(steps + 1):
        start = time.monotonic()
        state, metrics = adapted.step(
            adapted.base, adapted.profile, state, arrays, draws(number), schedule, keys.dropout, rule=rule
        )
        jax.block_until_ready(metrics)
        seconds.append(time.monotonic() - start)
    tokens = experiment.row_shape.tokens(arrays["passes"]) * len(trials) * shards_of(experiment.mesh)
    return StepTiming(tokens, float(np.median(seconds[1:])))  # the first one compiles


def compile_step(experiment: Experiment, trial: Trial, count: int, phase: int) -> jax.stages.Compiled:
    """The step of `count` trials like this one in one of its phases."""
    adapted, phases = experiment.adapted_for(trial), experiment.phases
    shards, pipeline = shards_of(experiment.mesh), experiment.pipeline([trial])
    batch = batch_shapes(experiment.row_shape, pipeline.passes, trials=count, shards=shards)
    keys = jax.eval_shape(lambda: trial_keys(0))
    draw = jax.eval_shape(phases.draws([trial], phase, stack_trees([trial_keys(0)])), 0)

    def many(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), tree)

    draw = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), draw)
    schedule = jax.eval_shape(lambda: phases.schedule([trial] * count, phase))
    return adapted.step.compile(
        adapted.base,
        adapted.profile,
        many(_one_state(experiment, trial)),
        batch,
        draw,
        schedule,
        many(keys.dropout),
        rule=phases.shape(trial)[phase].rule,
    )


def _filled(experiment: Experiment, count: int) -> int:
    axis = 1 if experiment.mesh is None else experiment.mesh.shape["trial"]
    return -(-count // axis) * axis


def _beside_a_step(experiment: Experiment, trial: Trial) -> int:
    """Returns the bytes that one trial holds outside its step: its best adapter, and a copy that is saved."""
    best = experiment.adapted_for(trial).adapter if experiment.config.validation.keep == "best" else None
    return _trial_bytes(experiment, _one_state(experiment, trial)) + 2 * _trial_bytes(experiment, best)


def _trial_bytes(experiment: Experiment, tree: Any) -> int:
    """The bytes of one trial's share of a tree that lies along the trial axis, on one device."""
    mesh = experiment.mesh
    axis = 1 if mesh is None else mesh.shape["trial"]
    return -(-bytes_on_device(tree, None if mesh is None else shardings(tree, mesh)) // axis)


def _one_state(experiment: Experiment, trial: Trial) -> TrialState:
    """Returns the shapes of one trial's state."""
    adapted = experiment.adapted_for(trial)
    return jax.eval_shape(lambda adapter: init_state(adapter, adapted.optimizer), adapted.adapter)

"""How the phases of a run's trials begin: the first state of a trial, and the phases of a batch for the loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.core import ActionInput
from mlora_jax.core.actions import ACTIONS, run_action
from mlora_jax.parallel.arrays import on_one_device, put_weights
from mlora_jax.parallel.rules import shardings
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.needs import collect
from mlora_jax.training.actions import act_on_trials
from mlora_jax.training.loop import LoopPhase
from mlora_jax.training.step import TrialState, init_state
from mlora_jax.training.trial_trees import TrialKeys, stack_trees, take_trial, trial_keys
from mlora_jax.trials import Trial


def first_state(experiment: Experiment, trials: Sequence[Trial]) -> tuple[TrialState, TrialKeys]:
    """The state and the keys [K] of trials of one form before their first step."""
    adapted = experiment.adapted_for(trials[0])
    keys = [trial_keys(trial.seed) for trial in trials]
    adapters = [first_adapter(experiment, trial, key.adapter) for trial, key in zip(trials, keys, strict=True)]
    first = functools.partial(init_state, optimizer=adapted.optimizer)
    mesh = experiment.mesh
    if mesh is None:
        return stack_trees(map(first, adapters)), stack_trees(keys)
    # By way of the host, so that no device holds more than its part.
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(jax.device_get, adapters))
    placed = shardings(jax.eval_shape(jax.vmap(first), stacked), mesh, trials=True)
    state = jax.jit(jax.vmap(first), out_shardings=placed)(put_weights(stacked, mesh, trials=True))
    return state, stack_trees(keys)


def first_adapter(experiment: Experiment, trial: Trial, key: jax.Array) -> Any:
    """The adapter that the action before a trial's first phase makes.

    Raises:
      ValueError, FileNotFoundError: an adapter to start from that cannot be used; the message names it.
    """
    action, p = experiment.phases.start(trial, 0), experiment.phases.trained_profile(trial, 0)
    template = experiment.adapted_for(trial).adapter
    needed = collect(action.needs, experiment, trial, template, p, key=key)
    init = experiment.config.adapter.init
    gate = experiment.phases.method(trial).gate_start
    given = ActionInput(adapter=template, trained_profile=p, key=key, needed=needed, init=init, gate_start=gate)
    return run_action(action, given).adapter


def check_first_adapters(experiment: Experiment, trials: Sequence[Trial]) -> None:
    """Makes first adapters of trials that begin with a PEFT adapter: now rather than behind the trials before them.

    Raises:
      ValueError, FileNotFoundError: the adapter cannot be used; the message names it.
    """
    alike = {(trial.rank, trial.method, trial.scaling): trial for trial in trials}
    for trial in alike.values():
        if "peft_adapter" in experiment.phases.start(trial, 0).needs:
            first_adapter(experiment, trial, jax.random.key(0))


def loop_phases(experiment: Experiment, trials: Sequence[Trial], keys: TrialKeys) -> list[LoopPhase]:
    """The phases of trials that train together."""
    adapted, phases = experiment.adapted_for(trials[0]), experiment.phases
    found = []
    for number, first_step in enumerate(phases.method(trials[0]).starts(experiment.steps)):
        rule = phases.shape(trials[0])[number].rule

        def step(state, batch, draw, schedule, rule=rule):
            arguments = state, batch, draw, schedule, keys.dropout
            return adapted.step(adapted.base, adapted.profile, *arguments, rule=rule)

        start = functools.partial(_start_phase, experiment, trials, keys, number)
        draws, schedule = phases.draws(trials, number, keys), phases.schedule(trials, number)
        found.append(LoopPhase(first_step, start, draws, schedule, step))
    return found


def _start_phase(
    experiment: Experiment, trials: Sequence[Trial], keys: TrialKeys, phase: int, state: TrialState
) -> TrialState:
    """The state at the end of a phase as that at the beginning of the next one, `phase`."""
    adapted, ended = experiment.adapted_for(trials[0]), phase - 1
    action = experiment.phases.start(trials[0], phase)
    if action is ACTIONS["none"]:
        return state
    profiles = jnp.stack([experiment.phases.trained_profile(trial, ended) for trial in trials])
    fresh = jax.vmap(lambda key: jax.random.fold_in(key, ended))(keys.adapter)
    act = functools.partial(act_on_trials, action, adapted.optimizer, init=experiment.config.adapter.init)

    def needed(slots: Sequence[int]) -> dict[str, Any]:
        if not action.needs:
            return {}
        each = []
        for slot in slots:
            hierarchy = experiment.phases.hierarchy(trials[slot], ended)
            one = take_trial(state.adapter, slot), profiles[slot]
            each.append(collect(action.needs, experiment, trials[slot], *one, hierarchy=hierarchy))
        return stack_trees(each)

    if experiment.mesh is None:
        return act(state, profiles, fresh, needed(range(len(trials))))
    # One trial after the other on one device, the results on the host.
    done = []
    for slot in range(len(trials)):
        one = jax.tree.map(lambda leaf: leaf[None], on_one_device(take_trial(state, slot)))
        own = slice(slot, slot + 1)
        done.append(jax.device_get(act(one, profiles[own], fresh[own], needed([slot]))))
    return put_weights(jax.tree.map(lambda *x: np.concatenate(x), *done), experiment.mesh, trials=True)

"""The stage that trains a batch of trials: from its newest checkpoint to its adapters on disk."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.evaluate import rank_curve
from mlora_jax.parallel import hosts
from mlora_jax.parallel.arrays import fetch
from mlora_jax.run.stage import Stage
from mlora_jax.run.starts import first_state, loop_phases
from mlora_jax.training.adapter_file import save_adapter
from mlora_jax.training.checkpoint import Checkpoints
from mlora_jax.training.grid import TrialBatch
from mlora_jax.training.loop import BatchState, Cadence, LoopState, train_trials
from mlora_jax.training.trial_trees import TrialKeys, select_trials, take_trial
from mlora_jax.trials import Trial


def train_batch(run: Stage, batch: TrialBatch) -> None:
    """Trains a batch to its end and saves its adapters.

    Raises:
      ValueError: the batch was planned for another number of trials side by side.
      Interrupted: a signal came; everything is saved.
    """
    config, experiment = run.config, run.experiment
    run.progress.say(f"{batch.name}: {len(batch.trials)} trials at once")
    _check_slots(run, batch)
    with Checkpoints(run.folder.checkpoints(batch), keep=config.checkpoint.keep) as checkpoints:
        state, keys = _start(run, batch)
        state, loop, batches = _resume(run, batch, checkpoints, state)
        state = train_trials(
            loop_phases(experiment, batch.slotted, keys),
            batches,
            state,
            loop,
            steps=experiment.steps,
            cadence=Cadence(
                config.train.log_every, config.validation.every, config.checkpoint.every, config.validation.patience
            ),
            observer=BatchObserver(run, batch, checkpoints, batches),
        )
        checkpoints.wait()
        _save_adapters(run, batch, state, loop)
    hosts.wait("checkpoints are closed")
    for tracker in run.trackers:
        tracker.finish([trial.name for trial in batch.trials])
    run.folder.finish(batch)
    run.progress.expect({trial.name: 0 for trial in batch.trials})


def _check_slots(run: Stage, batch: TrialBatch) -> None:
    mesh = run.experiment.mesh
    if mesh is not None and batch.slots % (side_by_side := mesh.shape["trial"]):
        raise ValueError(
            f"{batch.name} was planned for {batch.slots} trials at a time, which config.parallel.trial {side_by_side} "
            "does not divide: go on with one that does, such as config.parallel.trial=1"
        )


def _start(run: Stage, batch: TrialBatch) -> tuple[BatchState, TrialKeys]:
    """The state and the keys of a batch before its first step."""
    start, keys = first_state(run.experiment, batch.slotted)
    best = jax.tree.map(jnp.copy, start.adapter) if run.config.validation.keep == "best" else None
    return BatchState(start, best), keys


def _resume(run: Stage, batch: TrialBatch, checkpoints: Checkpoints, start: BatchState):
    """The newest sound checkpoint's state, loop and data, records cut back to it; or the beginning."""
    batches = run.experiment.batches(batch.slotted)
    names = [trial.name for trial in batch.trials]
    restored = checkpoints.restore(start)
    if restored is None:
        state, loop = start, LoopState.of(batch.slots)
    else:
        state, loop = restored.state, LoopState(**restored.values["memory"])
        batches.set_state(restored.values["data"])
        run.progress.say(f"{batch.name} goes on from step {loop.step}")
        run.progress.expect(dict.fromkeys(names, run.experiment.steps - loop.step))
    # Other batches may have written in between; curves are written when a batch is trained, never before.
    run.metrics.keep(lambda record: record["trial"] not in names or record["step"] <= loop.step)
    for tracker in run.trackers:
        tracker.go_back(names, loop.step)
    return state, loop, batches


class BatchObserver:
    """The observer of a run's training loop; see `mlora_jax.training.loop.Observer`."""

    def __init__(self, run: Stage, batch: TrialBatch, checkpoints: Checkpoints, batches: Any) -> None:
        self._run, self._batch, self._checkpoints, self._batches = run, batch, checkpoints, batches
        self.interrupted = hosts.polled(run.signal_came)

    def log(self, step: int, slot: int, values: dict[str, Any]) -> None:
        """Writes a trial's values to metrics.jsonl and the trackers, and shows them."""
        if slot < len(self._batch.trials):
            log_values(self._run, self._batch.trials[slot], step, values)

    def validate(self, step: int, adapters: Any, slots: Sequence[bool]) -> list[float | None]:
        """Scores the trials that are still trained on the validation rows."""
        scores: list[float | None] = [None] * self._batch.slots
        measure = self._run.config.validation.measure
        for slot, trial in enumerate(self._batch.trials):
            if slots[slot]:
                score = validation_score(self._run, trial, step, take_trial(adapters, slot))
                scores[slot] = -score if measure == "loss" else score
                self._run.record(trial=trial.name, step=step, time=time.time(), **{f"validation_{measure}": score})
        return hosts.broadcast(scores)

    def save(self, state: BatchState, loop: LoopState) -> None:
        """Keeps a checkpoint with what the loop and the data iterator need to go on."""
        # "memory" is what checkpoints have always called the state of the loop.
        values = {"memory": dataclasses.asdict(loop), "data": self._batches.get_state()}
        self._checkpoints.save(loop.step, state, values)


def log_values(run: Stage, trial: Trial, step: int, values: dict[str, Any]) -> None:
    """Writes one trial's values after a number of steps, and shows them."""
    run.record(trial=trial.name, step=step, time=time.time(), **values)
    shown = {name: values[name] for name in ("loss", "tokens_per_second")}
    run.progress.advance(trial.name, run.experiment.steps - step, step=step, **shown)
    if not values["finite"]:
        run.progress.say(f"{trial.name}: FAILED before step {step}, the loss is not finite; the others go on")


def validation_score(run: Stage, trial: Trial, step: int, adapter: Any) -> float:
    """AURAC over log2 rank by prefix on the validation rows, or the mean over the prefixes of their loss."""
    adapted, hierarchy = run.experiment.adapted_for(trial), run.experiment.phases.hierarchy_at(trial, step)
    if run.config.validation.measure == "loss":
        loss = adapted.validation_loss()
        return float(np.mean([loss(adapter, hierarchy.prefix(rank)) for rank in hierarchy.ranks]))
    return rank_curve(adapted.evaluators["validation"], adapter, hierarchy).log2


def _save_adapters(run: Stage, batch: TrialBatch, state: BatchState, loop: LoopState) -> None:
    adapters, finite = state.trials.adapter, np.asarray(fetch(state.trials.finite))
    steps = np.asarray(fetch(state.trials.step))
    scored = np.array([loop.best(slot)[0] >= 0 for slot in range(batch.slots)])
    if state.best is not None:
        adapters = select_trials(scored, state.best, adapters)
    for slot, trial in enumerate(batch.trials):
        description = {
            "trial": dataclasses.asdict(trial),
            "phases": run.experiment.phases.begun(trial, loop.step),
            "base_model": run.config.model.path,
            "task": run.experiment.data.task.name,
            "targets": list(run.config.adapter.targets),
            "steps": int(steps[slot]),
            "finite": bool(finite[slot]),
        }
        if state.best is not None and scored[slot]:
            at, score = loop.best(slot)
            description["best"] = {"step": min((at + 1) * run.config.validation.every, loop.step), "score": score}
        # Where all trials of a batch failed before a phase, its action did not happen.
        hierarchy = run.experiment.phases.hierarchy_at(trial, loop.step)
        save = functools.partial(save_adapter, run.folder.adapter(trial), fetch(take_trial(adapters, slot)))
        hosts.on_first_process(functools.partial(save, hierarchy, description))

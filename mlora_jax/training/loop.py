"""Trains a batch of trials: draw, step, log, validate, save."""

from __future__ import annotations

import bisect
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import jax
import numpy as np

from mlora_jax.core.policies import Draw
from mlora_jax.training.step import Schedule, TrialState
from mlora_jax.training.trial_trees import select_trials


@dataclasses.dataclass
class LoopState:
    """The state, besides arrays, from which the loop resumes exactly. All of it can be stored as JSON.

    Attributes:
      step: the number of finished steps.
      losses: [steps since the last log, K], the losses that are not logged yet.
      reported: [K], whether a trial is still logged; a trial that has failed or stopped is not.
      scores: [validations, K], None for a trial that was no longer trained.
      ended: whether nothing is left to train.
      before: the number of validations that came before the last phase of the method. They do not count for the choice
        of the best adapter.
    """

    step: int
    losses: list[list[float]]
    reported: list[bool]
    scores: list[list[float | None]]
    ended: bool = False
    before: int = 0

    @classmethod
    def of(cls, slots: int) -> LoopState:
        """Returns the state before the first step.

        Args:
          slots: K, the number of trials.
        """
        return cls(0, [], [True] * slots, [])

    def best(self, slot: int) -> tuple[int, float]:
        """Returns the index and the score of a trial's best validation; (-1, -inf) if none has a finite score.

        Args:
          slot: which of the K trials.
        """
        scores = [
            (at, score) for at, row in enumerate(self.scores) if at >= self.before and _is_score(score := row[slot])
        ]
        return max(scores, key=lambda pair: pair[1], default=(-1, -math.inf))


class BatchState(NamedTuple):
    """The arrays of a batch of trials.

    Attributes:
      trials: the state that training changes.
      best: the adapters that scored best so far; None if they are not kept.
    """

    trials: TrialState
    best: Any


@dataclasses.dataclass(frozen=True)
class LoopPhase:
    """A phase of a batch of trials, as functions of arrays.

    Attributes:
      first_step: the number of steps that are finished when the phase begins.
      start: trial state -> trial state, the action before the first step of the phase. The loop does not call it for
        the first phase, because the state that the loop is given is already its result.
      draw: the number of finished steps -> Draw, with a leading K.
      schedule: the learning rates, with a leading K.
      step: (trial state, batch, draw, schedule) -> (trial state, metrics), all with a leading K.
    """

    first_step: int
    start: Callable[[TrialState], TrialState]
    draw: Callable[[int], Draw]
    schedule: Schedule
    step: Callable[[TrialState, Mapping[str, Any], Draw, Schedule], tuple[TrialState, dict[str, jax.Array]]]


class Observer(Protocol):
    """The object to which the loop reports, and which it asks for scores and signals."""

    def log(self, step: int, slot: int, values: dict[str, Any]) -> None:
        """Logs the values of a trial.

        Args:
          step: the number of finished steps.
          slot: which of the K trials.
          values: loss (the mean over the steps since the last log), gradient_norm and learning_rate (those of the last
            step), tokens_per_second (of a trial, without padding) and finite.
        """

    def validate(self, step: int, adapters: Any, slots: Sequence[bool]) -> list[float | None]:
        """Returns the scores [K] of the trials that `slots` marks, and None for the others; higher is better.

        Args:
          step: the number of finished steps.
          adapters: the tree of adapters, leaves [K, ...].
          slots: [K], whether a trial is scored.
        """
        ...

    def save(self, state: BatchState, loop: LoopState) -> None:
        """Saves a checkpoint. The loop calls this when a checkpoint is due, and at the end.

        Args:
          state: the arrays.
          loop: the state of the loop.
        """

    def interrupted(self) -> int:
        """Returns the number of the signal that arrived, or 0. The loop calls this after every step.

        The number is the same in every process.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Cadence:
    """How often the loop logs, validates and saves.

    Attributes:
      log: the number of steps between two logs; 0 logs at the end only.
      validate: the number of steps between two validations; 0 never validates.
      save: the number of steps between two checkpoints; 0 saves at the end only.
      patience: the number of validations without progress after which a trial stops; 0 never stops one.
    """

    log: int
    validate: int
    save: int
    patience: int


class Interrupted(SystemExit):
    """A signal stopped the run, and everything is saved. The exit status is 128 + the number of the signal."""


def train_trials(
    phases: Sequence[LoopPhase],
    batches: Iterator[Mapping[str, np.ndarray | jax.Array]],
    state: BatchState,
    loop: LoopState,
    *,
    steps: int,
    cadence: Cadence,
    observer: Observer,
) -> BatchState:
    """Trains K trials to the end, or until all of them have failed or stopped.

    Args:
      phases: the phases in order; the first one begins at step 0.
      batches: the batches of the steps from `loop.step` on, as a `TrialsPipeline` makes them.
      state: the arrays to start from; their buffers are consumed. At the step at which a phase begins, this is the
        state before the phase's `start`.
      loop: the state of the loop to start from; it is updated in place.
      steps: the number of steps in all.
      cadence: how often to log, validate and save.
      observer: the object that receives logs and checkpoints, and that returns scores and signals.

    Returns:
      The state after the last step.

    Raises:
      Interrupted: a signal arrived, and everything is saved.
    """
    pending, tokens, since = [], 0, time.monotonic()

    def collect():
        loop.losses += np.asarray(jax.device_get(pending), float).tolist()
        pending.clear()

    def due(every: int) -> bool:
        return bool(every) and loop.step % every == 0

    firsts = [phase.first_step for phase in phases]
    while not loop.ended:
        at = bisect.bisect_right(firsts, loop.step) - 1
        phase = phases[at]
        if at and loop.step == phase.first_step:
            state = state._replace(trials=jax.block_until_ready(phase.start(state.trials)))
            loop.before = len(loop.scores)
        batch = next(batches)
        trials, metrics = phase.step(state.trials, batch, phase.draw(loop.step), phase.schedule)
        if pending:
            jax.block_until_ready(
                pending[-1]
            )  # the host stays at most one step ahead of the device, see ChoiceEvaluator
        state = state._replace(trials=trials)
        pending.append(metrics["loss"])
        loop.step, tokens = loop.step + 1, tokens + float(batch["real_tokens"])
        last = loop.step == steps
        if due(cadence.log) or last:
            collect()
            _report(loop, loop.reported, metrics, tokens / (time.monotonic() - since), observer)
            loop.losses, tokens, since = [], 0, time.monotonic()
        if due(cadence.validate) or (last and cadence.validate):
            before = loop.reported
            in_last_phase = loop.step > firsts[-1]
            state = _validate(state, loop, cadence.patience if in_last_phase else 0, observer)
            stopped = [old and not new for old, new in zip(before, loop.reported, strict=True)]
            if any(stopped) and (pending or loop.losses):
                collect()
                _report(loop, stopped, metrics, tokens / (time.monotonic() - since), observer)
        loop.ended, stop = last or not any(loop.reported), observer.interrupted()
        if loop.ended or stop or due(cadence.save):
            collect()
            observer.save(state, loop)
        if stop and not loop.ended:
            raise Interrupted(128 + stop)
    return state


def _report(loop: LoopState, slots: Sequence[bool], metrics, tokens_per_second: float, observer: Observer) -> None:
    """Logs the trials of some slots; a trial that is no longer finite is logged for the last time."""
    values = jax.device_get(metrics)
    losses = np.asarray(loop.losses).mean(axis=0)
    for trial in np.flatnonzero(slots).tolist():
        found = {name: value[trial].item() for name, value in values.items()}
        observer.log(loop.step, trial, found | {"loss": losses[trial].item(), "tokens_per_second": tokens_per_second})
        loop.reported[trial] &= found["finite"]


def _validate(state: BatchState, loop: LoopState, patience: int, observer: Observer) -> BatchState:
    """Scores the trials that are still trained, keeps the best adapters, and stops trials without progress."""
    before = [loop.best(slot)[1] for slot in range(len(loop.reported))]
    loop.scores.append(observer.validate(loop.step, state.trials.adapter, loop.reported))
    better = np.array([_is_score(new) and new > old for new, old in zip(loop.scores[-1], before, strict=True)])
    if state.best is not None:
        state = state._replace(best=_keep_better(better, state.trials.adapter, state.best))
    if patience:
        waited = [len(loop.scores) - 1 - max(loop.best(slot)[0], loop.before - 1) for slot in range(len(before))]
        loop.reported = [on and gone < patience for on, gone in zip(loop.reported, waited, strict=True)]
        stopped = state.trials.finite & ~np.asarray(loop.reported)
        state = state._replace(trials=state.trials._replace(stopped=stopped | state.trials.stopped))
    return state


def _is_score(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


_keep_better = jax.jit(select_trials, donate_argnums=2)  # the buffers of the earlier best are reused

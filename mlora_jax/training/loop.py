"""Training a batch of trials: draw, step, log, validate, save."""

from __future__ import annotations

import bisect
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from mlora_jax.core.policies import Draw
from mlora_jax.training.step import Schedule, TrialState
from mlora_jax.training.trial_trees import select_trials


@dataclasses.dataclass
class LoopState:
    """What the loop must know, besides arrays, to go on exactly where it was. JSON holds all of it.

    Attributes:
      step: finished steps.
      losses: [steps since the last log, K].
      reported: [K], whether a trial's steps are still written down: until it has failed or stopped.
      scores: [validations, K], None for a trial that was no longer trained.
      ended: whether nothing is left to train.
      before: how many of the validations came before the last phase of the method: they choose nothing.
    """

    step: int
    losses: list[list[float]]
    reported: list[bool]
    scores: list[list[float | None]]
    ended: bool = False
    before: int = 0

    @classmethod
    def of(cls, slots: int) -> LoopState:
        """At the start."""
        return cls(0, [], [True] * slots, [])

    def best(self, slot: int) -> tuple[int, float]:
        """Which validation of a trial was its best, and its score; (-1, -inf) before the first with a finite one."""
        scores = [(at, row[slot]) for at, row in enumerate(self.scores) if at >= self.before and _is_score(row[slot])]
        return max(scores, key=lambda pair: pair[1], default=(-1, -math.inf))


class BatchState(NamedTuple):
    """The arrays of a batch of trials: what trains, and the adapters that scored best so far (None if not kept)."""

    trials: TrialState
    best: Any


@dataclasses.dataclass(frozen=True)
class LoopPhase:
    """A phase of the trials of a batch, as functions of arrays.

    Attributes:
      first_step: how many steps are finished when it begins.
      start: trial state -> trial state, what happens before its first step. The loop does not call that of the first
        phase, whose result is the state that it is given.
      draw: finished steps -> Draw, with a leading K.
      schedule: the learning rates, with a leading K.
      step: (trial state, batch, draw, schedule) -> (trial state, metrics), all with a leading K.
    """

    first_step: int
    start: Callable[[TrialState], TrialState]
    draw: Callable[[int], Draw]
    schedule: Schedule
    step: Callable[[TrialState, dict[str, np.ndarray], Draw, Schedule], tuple[TrialState, dict[str, jax.Array]]]


class Observer(Protocol):
    """Who a loop reports to and asks."""

    def log(self, step: int, slot: int, values: dict[str, Any]) -> None:
        """Writes down a trial's values after a number of steps.

        Args:
          step: finished steps.
          slot: which of the K trials.
          values: loss (the mean over the steps since the last log), gradient_norm and learning_rate (of the last step),
            tokens_per_second and finite.
        """

    def validate(self, step: int, adapters: Any, slots: Sequence[bool]) -> list[float | None]:
        """Scores [K] of the trials that `slots` marks, higher is better; None for the others.

        Args:
          step: finished steps.
          adapters: trees [K, ...].
          slots: [K].
        """

    def save(self, state: BatchState, loop: LoopState) -> None:
        """Keeps a checkpoint; called when one is due, and at the end."""

    def interrupted(self) -> int:
        """The number of the signal that came, or 0, the same in every process; asked after every step."""


@dataclasses.dataclass(frozen=True)
class Cadence:
    """Steps between two logs, validations and checkpoints (0: at the end only), and validations without progress."""

    log: int
    validate: int
    save: int
    patience: int


class Interrupted(SystemExit):
    """The run was asked to stop by a signal, and everything is saved; the exit status is 128 + the signal's number."""


def train_trials(
    phases: Sequence[LoopPhase],
    batches: Iterator[dict[str, np.ndarray]],
    state: BatchState,
    loop: LoopState,
    *,
    steps: int,
    cadence: Cadence,
    observer: Observer,
) -> BatchState:
    """Trains K trials to the end, or until none of them is left to train.

    Args:
      phases: in order; the first one begins at step 0.
      batches: step batches, arrays [K, M, B, ...], from step `loop.step` on.
      state: where to start; its buffers are consumed. A state of the step at which a phase begins is from before the
        phase's start.
      loop: where to start; kept up to date.
      steps: how many there are in all.
      cadence: when to do what.
      observer: who is reported to and asked.

    Returns:
      The state after the last step.

    Raises:
      Interrupted: a signal came, and everything is saved.
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
            jax.block_until_ready(pending[-1])  # one step ahead of the device, no more: see ChoiceEvaluator
        state = state._replace(trials=trials)
        pending.append(metrics["loss"])
        loop.step, tokens = loop.step + 1, tokens + math.prod(batch["tokens"].shape[1:])
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
    """Logs the trials of some slots; one whose loss is not finite for the last time."""
    values = jax.device_get(metrics)
    losses = np.asarray(loop.losses).mean(axis=0)
    for trial in np.flatnonzero(slots).tolist():
        found = {name: value[trial].item() for name, value in values.items()}
        observer.log(loop.step, trial, found | {"loss": losses[trial].item(), "tokens_per_second": tokens_per_second})
        loop.reported[trial] &= found["finite"]


def _validate(state: BatchState, loop: LoopState, patience: int, observer: Observer) -> BatchState:
    """Scores the trials that are still trained, keeps the best adapters, and stops who has not got better."""
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


def _is_score(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


_keep_better = jax.jit(select_trials, donate_argnums=2)  # so that no earlier best is kept alive

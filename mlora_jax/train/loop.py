"""Training a batch of trials: draw, step, log, validate, save."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlora_jax.core.hierarchy import RankHierarchy
from mlora_jax.core.policies import Draw, Policy, draw_step
from mlora_jax.train.step import TrialState, train_step


class TrialKeys(NamedTuple):
    """The independent random keys of a trial; the data order takes the seed itself."""

    adapter: jax.Array
    draws: jax.Array
    dropout: jax.Array


def trial_keys(seed: int) -> TrialKeys:
    """The keys that follow from a trial's seed."""
    return TrialKeys(*(jax.random.fold_in(jax.random.key(seed), number) for number in range(3)))


class TrialsStep:
    """`train_step` for K trials at once on one frozen base: one executable per K, number of profiles and batch shape.

    Called with base, profile tree, and then state, batch, draw, schedule and dropout key with a leading K. The state's
    buffers are reused for the result.

    Args:
      graphdef: of the adapted decoder in training mode.
      optimizer: from `make_optimizer`.
      chunk: answer positions with logits at one time.
    """

    def __init__(self, graphdef, optimizer: optax.GradientTransformation, *, chunk: int):
        step = functools.partial(train_step, graphdef, optimizer, chunk)
        self._jitted = jax.jit(jax.vmap(step, in_axes=(None, None, 0, 0, 0, 0, 0)), donate_argnums=(2,))
        self._executables: dict[tuple, jax.stages.Compiled] = {}
        self._seconds: list[float] = []

    def compile(self, *arguments) -> jax.stages.Compiled:
        """The executable for arguments of these shapes; arrays or `jax.ShapeDtypeStruct`s."""
        key = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments[2:]))
        if key not in self._executables:
            start = time.monotonic()
            self._executables[key] = self._jitted.lower(*arguments).compile()
            self._seconds.append(time.monotonic() - start)
        return self._executables[key]

    def __call__(self, *arguments) -> tuple[TrialState, dict[str, jax.Array]]:
        return self.compile(*arguments)(*arguments)

    @property
    def compilations(self) -> int:
        """How many executables were compiled."""
        return len(self._executables)

    @property
    def compile_seconds(self) -> float:
        """Mean over them."""
        return float(np.mean(self._seconds))


def compile_draws(
    drawn_by: Sequence[tuple[Policy, RankHierarchy]], keys: jax.Array, *, accumulation: int, examples: int
) -> Callable[[Any], Draw]:
    """The draws of K trials as one function: step -> profiles [K, M, N, E, R], update_mask [K, R], loss_weights [K, N].

    Args:
      drawn_by: policy and hierarchy of every trial; profiles of one shape [N, E, R] for each.
      keys: [K] `jax.random.key`s for draws.
      accumulation: M.
      examples: B, of a micro-batch.
    """
    return functools.partial(_jitted_draws(tuple(drawn_by), accumulation, examples), keys)


@functools.lru_cache(maxsize=256)
def _jitted_draws(drawn_by: tuple[tuple[Policy, RankHierarchy], ...], accumulation: int, examples: int) -> Callable:
    """Cached, so that a batch of the same methods as another one compiles nothing."""
    members: dict[tuple, list[int]] = {}
    for number, each in enumerate(drawn_by):
        members.setdefault(each, []).append(number)
    # Unsigned: a signed index is normalised in a dtype that depends on jax_enable_x64 when it was first used.
    back = np.argsort(np.concatenate(list(members.values()))).astype(np.uint32)

    @jax.jit
    def draw(keys, step):
        def one_kind(policy, hierarchy, numbers):
            sizes = dict(accumulation=accumulation, examples=examples)
            one = functools.partial(draw_step, policy, hierarchy, step=step, **sizes)
            return jax.vmap(lambda key: one(key=key))(keys[np.array(numbers, np.uint32)])

        parts = [one_kind(*kind, numbers) for kind, numbers in members.items()]
        return jax.tree.map(lambda *xs: jnp.concatenate(xs)[back], *parts)

    return draw


@dataclasses.dataclass
class Memory:
    """What the loop must know, besides arrays, to go on exactly where it was; JSON holds all of it.

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
    def of(cls, slots: int) -> Memory:
        """At the start."""
        return cls(0, [], [True] * slots, [])

    def best(self, slot: int) -> tuple[int, float]:
        """Which validation of a trial was its best, and its score; (-1, -inf) before the first with a finite one."""
        scores = [(at, row[slot]) for at, row in enumerate(self.scores) if at >= self.before and _is_score(row[slot])]
        return max(scores, key=lambda pair: pair[1], default=(-1, -math.inf))


class State(NamedTuple):
    """The arrays of a batch of trials: what trains, and the adapters that scored best so far (None if not kept)."""

    trials: TrialState
    best: Any


@dataclasses.dataclass(frozen=True)
class Turn:
    """Where a phase begins that is not the first.

    Attributes:
      step: how many steps are finished then.
      action: trial state -> trial state.
    """

    step: int
    action: Callable[[TrialState], TrialState]


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
    step: Callable,
    batches: Iterator[dict[str, np.ndarray]],
    draw: Callable[[int], Draw],
    state: State,
    memory: Memory,
    *,
    steps: int,
    cadence: Cadence,
    log: Callable[[int, int, dict[str, Any]], None],
    validate: Callable[[int, Any, Sequence[bool]], list[float | None]],
    save: Callable[[State, Memory], None],
    interrupted: Callable[[], int],
    turns: Sequence[Turn] = (),
) -> State:
    """Trains K trials to the end, or until none of them is left to train.

    Args:
      step: (trial state, batch, draw) -> (trial state, metrics), all with a leading K.
      batches: step batches, arrays [K, M, B, ...], from step `memory.step` on.
      draw: finished steps -> Draw.
      state: where to start; its buffers are consumed.
      memory: where to start; kept up to date.
      steps: how many there are in all.
      cadence: when to do what.
      log: called with (finished steps, trial, values) where values has loss (mean over the steps since the last log),
        gradient_norm and learning_rate (of the last step), tokens_per_second and finite.
      validate: (finished steps, adapters [K, ...], which to look at) -> scores [K], higher is better.
      save: called when a checkpoint is due, and at the end.
      interrupted: asked after every step and its validation; gives the number of the signal that came, or 0.
      turns: between the phases of the trials. A checkpoint of that step is from before the action.

    Raises:
      Interrupted: after a save.
    """
    pending, tokens, since = [], 0, time.monotonic()

    def collect():
        memory.losses += np.asarray(jax.device_get(pending), float).tolist()
        pending.clear()

    due = lambda every: every and memory.step % every == 0  # noqa: E731
    while not memory.ended:
        for turn in turns:
            if memory.step == turn.step:
                state = state._replace(trials=jax.block_until_ready(turn.action(state.trials)))
                memory.before = len(memory.scores)
        batch = next(batches)
        trials, metrics = step(state.trials, batch, draw(memory.step))
        if pending:
            jax.block_until_ready(pending[-1])  # one step ahead of the device, no more: see ChoiceEvaluator
        state = state._replace(trials=trials)
        pending.append(metrics["loss"])
        memory.step, tokens = memory.step + 1, tokens + batch["tokens"][0].size
        last = memory.step == steps
        if due(cadence.log) or last:
            collect()
            _report(memory, memory.reported, metrics, tokens / (time.monotonic() - since), log)
            memory.losses, tokens, since = [], 0, time.monotonic()
        if due(cadence.validate) or (cadence.validate and last):
            before = memory.reported
            in_last_phase = all(memory.step > turn.step for turn in turns)
            state = _validate(state, memory, cadence.patience if in_last_phase else 0, validate)
            stopped = [old and not new for old, new in zip(before, memory.reported, strict=True)]
            if any(stopped) and (pending or memory.losses):
                collect()
                _report(memory, stopped, metrics, tokens / (time.monotonic() - since), log)
        memory.ended, stop = last or not any(memory.reported), interrupted()
        if memory.ended or stop or due(cadence.save):
            collect()
            save(state, memory)
        if stop and not memory.ended:
            raise Interrupted(128 + stop)
    return state


def _report(memory: Memory, slots: Sequence[bool], metrics, tokens_per_second: float, log) -> None:
    """Logs the trials of some slots; one whose loss is not finite for the last time."""
    values = jax.device_get(metrics)
    losses = np.asarray(memory.losses).mean(axis=0)
    for trial in np.flatnonzero(slots).tolist():
        found = {name: value[trial].item() for name, value in values.items()}
        log(memory.step, trial, found | {"loss": losses[trial].item(), "tokens_per_second": tokens_per_second})
        memory.reported[trial] &= found["finite"]


def _validate(state: State, memory: Memory, patience: int, validate) -> State:
    """Scores the trials that are still trained, keeps the best adapters, and stops who has not got better."""
    before = [memory.best(slot)[1] for slot in range(len(memory.reported))]
    memory.scores.append(validate(memory.step, state.trials.adapter, memory.reported))
    better = np.array([_is_score(new) and new > old for new, old in zip(memory.scores[-1], before, strict=True)])
    if state.best is not None:
        state = state._replace(best=_keep_better(better, state.trials.adapter, state.best))
    if patience:
        waited = [len(memory.scores) - 1 - max(memory.best(slot)[0], memory.before - 1) for slot in range(len(before))]
        memory.reported = [on and gone < patience for on, gone in zip(memory.reported, waited, strict=True)]
        stopped = state.trials.finite & ~jnp.asarray(memory.reported)
        state = state._replace(trials=state.trials._replace(stopped=stopped | state.trials.stopped))
    return state


def _is_score(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def select_trials(chosen: np.ndarray, these, those):
    """The trees of the trials that are chosen [K] from `these`, the others' from `those`; leaves [K, ...]."""
    return jax.tree.map(lambda x, y: jnp.where(chosen.reshape(-1, *(1,) * (x.ndim - 1)), x, y), these, those)


_keep_better = jax.jit(select_trials, donate_argnums=2)  # so that no earlier best is kept alive


def stack_trees(trees: Iterable[Any]) -> Any:
    """K trees of arrays as one with a leading K."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def take_trial(tree, number: int) -> Any:
    """The tree of one trial from a tree with a leading K."""
    return jax.tree.map(lambda leaf: leaf[number], tree)

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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlora_jax.core.hierarchy import RankHierarchy
from mlora_jax.core.policies import Draw, Policy, draw_step
from mlora_jax.parallel.arrays import put, split_rows
from mlora_jax.parallel.mesh import ROWS, shards_of
from mlora_jax.parallel.rules import replicated, rows_sharding, shardings
from mlora_jax.training.step import SHARDS, TrialState, train_step


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

    On a mesh the trials lie along `trial` and the rows of a batch along `data` and `fsdp`. Every part of the rows has
    a gradient of its own until they are summed, once, at the end of the step.

    Args:
      graphdef: of the adapted decoder in training mode.
      optimizer: from `make_optimizer`.
      chunk: answer positions with logits at one time.
      mesh: None for one device. K is a multiple of its `trial`, B of its `data` x `fsdp`.
      engine: "jit", or "pmap" for `jax.pmap` over the rows, all else being on each of one host's devices.
    """

    def __init__(
        self,
        graphdef,
        optimizer: optax.GradientTransformation,
        *,
        chunk: int,
        mesh: Mesh | None = None,
        engine: str = "jit",
    ):
        self._step = functools.partial(train_step, graphdef, optimizer, chunk)
        self._mesh, self._engine = mesh, engine if shards_of(mesh) > 1 else "jit"
        self._executables: dict[tuple, jax.stages.Compiled] = {}
        self._seconds: list[float] = []

    def compile(self, *arguments) -> jax.stages.Compiled:
        """The executable for arguments of these shapes; arrays or `jax.ShapeDtypeStruct`s."""
        key = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments[2:]))
        if key not in self._executables:
            start = time.monotonic()
            if self._mesh is not None:
                base, profile, *rest = arguments
                rest = jax.eval_shape(self._arrange, *rest)
                arguments = base, profile, *map(_laid_out, rest, self.layout(*rest))
            self._executables[key] = self._traceable(arguments).lower(*arguments).compile()
            self._seconds.append(time.monotonic() - start)
        return self._executables[key]

    def __call__(self, base, profile, *arguments) -> tuple[TrialState, dict[str, jax.Array]]:
        compiled = self.compile(base, profile, *arguments)
        if self._mesh is not None:
            arguments = self._arrange(*arguments)
            arguments = map(put, arguments, self.layout(*arguments))
        return compiled(base, profile, *arguments)

    def _arrange(self, state, batch, draw, schedule, keys) -> tuple:
        """For `jax.pmap`, which maps over a leading axis: batch and profiles as [S, K, ...]."""
        if self._engine == "pmap":
            batch, draw = _in_shards(batch, draw, shards_of(self._mesh), trials=True)
        return state, batch, draw, schedule, keys

    def layout(self, state, batch, draw, schedule, keys) -> tuple:
        """How the arguments behind base and profile tree lie on the mesh: trees of shardings."""
        whole = replicated(self._mesh)
        if self._engine == "pmap":
            rows, trial, state = (
                NamedSharding(self._mesh, PartitionSpec(ROWS)),
                whole,
                jax.tree.map(lambda _: whole, state),
            )
            batch, profiles = jax.tree.map(lambda _: rows, batch), rows if draw.profiles.ndim == 6 else whole
        else:
            trial, state = NamedSharding(self._mesh, PartitionSpec("trial")), shardings(state, self._mesh, trials=True)
            rows = functools.partial(rows_sharding, self._mesh, trials=True)
            batch = jax.tree.map(lambda leaf: rows(leaf.ndim, 2), batch)
            profiles = rows(5, 3) if draw.profiles.shape[3] > 1 else trial
        return state, batch, Draw(profiles, trial, trial), jax.tree.map(lambda _: trial, schedule), trial

    def _traceable(self, arguments):
        """What is compiled, for arguments of this structure."""
        shards, in_axes = shards_of(self._mesh), (None, None, 0, 0, 0, 0, 0)
        if self._mesh is None:
            return jax.jit(jax.vmap(self._step, in_axes=in_axes), donate_argnums=2)
        step = functools.partial(self._step, sharded=shards > 1)
        if self._engine == "pmap":
            return jax.pmap(
                jax.vmap(step, in_axes=in_axes),
                **_over_shards(per_example=arguments[4].profiles.ndim == 6),
                devices=self._mesh.devices.flat,
                donate_argnums=2,
            )
        if shards > 1:
            step = functools.partial(_step_in_shards, step, shards)
        placed = jax.tree.map(lambda leaf: leaf.sharding, arguments[2]), replicated(self._mesh)
        step = jax.vmap(step, in_axes=in_axes, spmd_axis_name="trial")
        return jax.jit(step, donate_argnums=2, out_shardings=placed)

    @property
    def compilations(self) -> int:
        """How many executables were compiled."""
        return len(self._executables)

    @property
    def executables(self) -> tuple[jax.stages.Compiled, ...]:
        """Those that were compiled."""
        return tuple(self._executables.values())

    @property
    def compile_seconds(self) -> float:
        """Mean over them."""
        return float(np.mean(self._seconds))


def _laid_out(tree, placed):
    """Structures of arrays that lie like this."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, placed)


def _step_in_shards(step, shards: int, base, profile, state, batch, draw: Draw, schedule, key):
    """One trial's step, mapped over parts of its rows."""
    per_example = draw.profiles.shape[2] > 1
    batch, draw = _in_shards(batch, draw, shards, trials=False)
    mapped = jax.vmap(step, **_over_shards(per_example=per_example), spmd_axis_name=ROWS)
    return mapped(base, profile, state, batch, draw, schedule, key)


def _over_shards(*, per_example: bool) -> dict[str, Any]:
    """How a training step is mapped over parts of its rows."""
    drawn = Draw(0 if per_example else None, None, None)
    return dict(in_axes=(None, None, None, 0, drawn, None, None), out_axes=None, axis_name=SHARDS)


def _in_shards(batch, draw: Draw, shards: int, *, trials: bool) -> tuple[Any, Draw]:
    """Rows [M, B, ...], with K in front for `trials`, as [S, M, B / S, ...], and profiles per example alike."""
    axis = 1 + trials
    batch = jax.tree.map(lambda x: split_rows(x, axis, shards), batch)
    if draw.profiles.shape[axis + 1] > 1:
        draw = draw._replace(profiles=split_rows(draw.profiles, axis + 1, shards))
    return batch, draw


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
      interrupted: asked after every step and its validation; gives the number of the signal that came, or 0, the
        same in every process.
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
        memory.step, tokens = memory.step + 1, tokens + math.prod(batch["tokens"].shape[1:])
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
        stopped = state.trials.finite & ~np.asarray(memory.reported)
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
    """The tree of one trial from a tree with a leading K; on a mesh without gathering those of the others."""
    return jax.tree.map(lambda leaf: _from_mesh(leaf, number) if _on_mesh(leaf) else leaf[number], tree)


def _on_mesh(leaf) -> bool:
    plain = not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return isinstance(leaf, jax.Array) and plain and len(leaf.sharding.device_set) > 1


@jax.jit
def _from_mesh(leaf: jax.Array, number) -> jax.Array:
    chosen = jnp.arange(len(leaf)).reshape(-1, *(1,) * (leaf.ndim - 1)) == number
    if leaf.dtype == bool:
        return jnp.any(chosen & leaf, axis=0)
    return jnp.sum(jnp.where(chosen, leaf, 0), axis=0, dtype=leaf.dtype)

"""The training step of K trials at once, compiled once for every number of profiles, on one device or on a mesh."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlora_jax.core.policies import Draw
from mlora_jax.core.transforms import StepRule
from mlora_jax.data.packing import RowShape
from mlora_jax.parallel.arrays import put
from mlora_jax.parallel.mesh import ROWS, shards_of
from mlora_jax.parallel.rules import replicated, rows_sharding, shardings
from mlora_jax.training.step import SHARDS, PackedRows, Passes, TrialState, train_step

# A row has few answers, and a large chunk of them would be padding for the most part.
CHUNK = 256
NO_RULE = StepRule()


def split_batch(batch: Mapping[str, Any]) -> tuple[PackedRows, Passes]:
    """Returns the arrays of a packed batch that the training step takes.

    Args:
      batch: the arrays by name; it may hold others.
    """
    rows = PackedRows(**{name: batch[name] for name in PackedRows._fields})
    return rows, Passes(**{name: batch[name] for name in Passes._fields})


def batch_shapes(shape: RowShape, passes: int, *, trials: int, shards: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the arrays of a packed batch that the training step takes.

    Args:
      shape: the shapes of the rows.
      passes: P, the size of the axis of passes.
      trials: K.
      shards: S.
    """
    width, leading = shape.widths[0], (trials, shards, passes)
    rows = jax.ShapeDtypeStruct((*leading, shape.rows, width), jnp.int32)
    answers = jax.ShapeDtypeStruct((*leading, shape.rows * width), jnp.int32)
    return {
        "tokens": rows,
        "examples": rows,
        "positions": answers,
        "targets": answers,
        "weights": jax.ShapeDtypeStruct(answers.shape, jnp.float32),
        "passes": jax.ShapeDtypeStruct((len(shape.widths),), jnp.int32),
        "answers": jax.ShapeDtypeStruct((passes,), jnp.int32),
    }


class TrialsStep:
    """Runs `train_step` for K trials at once on one frozen base.

    There is one executable for each K, number of profiles and update rule: all batches of a run have the same shapes.
    The arguments of a call are the base and the profile tree, then state, batch, draw, schedule and dropout key, and
    the functions of the phase's update rule. All but the batch's plan have a leading K, and the arrays of the
    batch [K, S]. The state's buffers are reused for the result.

    On a mesh the trials lie along `trial` and the shards of a batch along `data` and `fsdp`. Every shard has a
    gradient of its own. The gradients are summed once, at the end of the step.

    Args:
      graphdef: the graph definition of the adapted decoder in training mode.
      optimizer: the optimizer that `make_optimizer` returned.
      chunk: how many answer positions have logits at one time.
      widths: the widths of packed rows, in falling order.
      micro_batch: B, the number of examples of a micro-batch.
      plan: the passes of every step as Python integers, if they are known when the step is compiled, such as for a
        count of its costs; None: every batch brings its own.
      mesh: the mesh, or None for one device. K is a multiple of its `trial`, S is its `data` x `fsdp`.
      engine: "jit", or "pmap" for `jax.pmap` over the shards. With "pmap" everything but the batch is replicated on
        all devices of one host.
    """

    def __init__(
        self,
        graphdef: Any,
        optimizer: optax.GradientTransformation,
        *,
        chunk: int,
        widths: Sequence[int],
        micro_batch: int,
        plan: Passes | None = None,
        mesh: Mesh | None = None,
        engine: str = "jit",
    ) -> None:
        self._step = functools.partial(train_step, graphdef, optimizer, chunk, tuple(widths), micro_batch)
        self._plan = plan
        self._mesh, self._engine = mesh, engine if shards_of(mesh) > 1 else "jit"
        self._executables: dict[tuple, jax.stages.Compiled] = {}
        self._seconds: list[float] = []

    def compile(
        self,
        base: Any,
        profile: Any,
        state: Any,
        batch: Mapping[str, Any],
        *others: Any,
        rule: StepRule = NO_RULE,
    ) -> jax.stages.Compiled:
        """Returns the executable for arguments of these shapes.

        Args:
          base, profile, state, batch, others: the arguments of a call, as arrays or `jax.ShapeDtypeStruct`s.
          rule: the functions of the update rule.
        """
        arguments = state, *split_batch(batch), *others
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments))
        key = rule, jax.tree.structure(arguments), shapes
        if key not in self._executables:
            start = time.monotonic()
            if self._mesh is not None:
                arguments = jax.eval_shape(self._arrange, *arguments)
                arguments = tuple(map(_laid_out, arguments, self.layout(*arguments)))
            traceable = self._traceable(base, arguments, rule)
            self._executables[key] = traceable.lower(base, profile, *arguments).compile()
            self._seconds.append(time.monotonic() - start)
        return self._executables[key]

    def __call__(
        self,
        base: Any,
        profile: Any,
        state: TrialState,
        batch: Mapping[str, Any],
        *others: Any,
        rule: StepRule = NO_RULE,
    ) -> tuple[TrialState, dict[str, jax.Array]]:
        compiled = self.compile(base, profile, state, batch, *others, rule=rule)
        arguments = state, *split_batch(batch), *others
        if self._mesh is not None:
            arguments = self._arrange(*arguments)
            arguments = tuple(map(put, arguments, self.layout(*arguments)))
        return compiled(base, profile, *arguments)

    def _arrange(self, state, rows: PackedRows, plan: Passes, draw, schedule, keys) -> tuple:
        """Returns the arguments as the engine takes them: `jax.pmap` needs the rows as [S, K, ...]."""
        if self._engine == "pmap":
            rows = jax.tree.map(lambda x: x.swapaxes(0, 1), rows)
        return state, rows, plan, draw, schedule, keys

    def layout(self, state: Any, rows: PackedRows, plan: Passes, draw: Draw, schedule: Any, keys: Any) -> tuple:
        """Returns the trees of shardings of the arguments that follow base and profile tree.

        Args:
          state: the state of K trials.
          rows: the rows of K trials, [K, S, ...].
          plan: the passes over the rows.
          draw: the draws of K trials.
          schedule: the schedules of K trials.
          keys: the dropout keys of K trials.

        Raises:
          ValueError: there is no mesh.
        """
        if self._mesh is None:
            raise ValueError("a training step on one device has no layout on a mesh")
        mesh, whole = self._mesh, replicated(self._mesh)
        if self._engine == "pmap":
            lie, trial = NamedSharding(self._mesh, PartitionSpec(ROWS)), whole
            state, rows = jax.tree.map(lambda _: whole, state), jax.tree.map(lambda _: lie, rows)
        else:
            trial, state = NamedSharding(self._mesh, PartitionSpec("trial")), shardings(state, self._mesh, trials=True)
            rows = jax.tree.map(lambda leaf: rows_sharding(mesh, leaf.ndim, 1, trials=True), rows)
        draw = jax.tree.map(lambda _: trial, draw)
        plan = jax.tree.map(lambda _: whole, plan)
        return state, rows, plan, draw, jax.tree.map(lambda _: trial, schedule), trial

    def _traceable(self, base, arguments, rule: StepRule):
        """Returns the traceable function for arguments of this structure."""
        state, rows, *_ = arguments
        shards, by_trial = shards_of(self._mesh), (None, None, 0, 0, None, 0, 0, 0)
        step = functools.partial(self._step, rule=rule, sharded=shards > 1)
        if self._plan is not None:
            step = _with_plan(step, self._plan)
        over_shards: dict[str, Any] = dict(in_axes=(None, None, None, 0, *(None,) * 4), out_axes=None, axis_name=SHARDS)
        if self._mesh is None:
            return jax.jit(_of_few(_of_one_shard(step), len(rows.tokens), by_trial), donate_argnums=2)
        if self._engine == "pmap":
            step, devices = jax.vmap(step, in_axes=by_trial), list(self._mesh.devices.flat)
            return jax.pmap(step, **over_shards, devices=devices, donate_argnums=2)
        if shards > 1:
            step = jax.vmap(step, **over_shards, spmd_axis_name=ROWS)
        else:
            step = _of_one_shard(step)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state), replicated(self._mesh)
        step = jax.vmap(step, in_axes=by_trial, spmd_axis_name="trial")
        return jax.jit(step, donate_argnums=2, out_shardings=placed)

    @property
    def compilations(self) -> int:
        """The number of executables that were compiled."""
        return len(self._executables)

    @property
    def executables(self) -> tuple[jax.stages.Compiled, ...]:
        """The executables that were compiled."""
        return tuple(self._executables.values())

    @property
    def compile_seconds(self) -> float:
        """The mean time to compile an executable, in seconds."""
        return float(np.mean(self._seconds))


def _laid_out(tree, placed):
    """Returns a `jax.ShapeDtypeStruct` for every array of a tree, with the sharding from `placed`."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, placed)


def _with_plan(step, plan: Passes):
    """Returns a step that goes through the passes of a plan, whatever the plan of the batch."""

    def planned(base, profile, state, rows, _, *others):
        return step(base, profile, state, rows, plan, *others)

    return planned


def _of_one_shard(step):
    """Returns a step that takes rows [S, ...] of a single shard."""

    def alone(base, profile, state, rows, *others):
        return step(base, profile, state, jax.tree.map(lambda x: x[0], rows), *others)

    return alone


def _of_few(step, trials: int, in_axes: tuple):
    """Returns the step of K trials. One trial is not mapped, because a mapped product is slower on a CPU."""
    if trials > 1:
        return jax.vmap(step, in_axes=in_axes)

    def alone(*arguments):
        one = (
            x if axis is None else jax.tree.map(lambda leaf: leaf[0], x)
            for x, axis in zip(arguments, in_axes, strict=True)
        )
        return jax.tree.map(lambda leaf: leaf[None], step(*one))

    return alone

"""The training step of K trials at once, compiled once for every shape, on one device or on a mesh."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlora_jax.core.policies import Draw
from mlora_jax.parallel.arrays import put, split_rows
from mlora_jax.parallel.mesh import ROWS, shards_of
from mlora_jax.parallel.rules import replicated, rows_sharding, shardings
from mlora_jax.training.step import SHARDS, TrialState, train_step

Proximal = Callable[[Any], Any]  # adapter -> adapter, applied after the update


class TrialsStep:
    """Runs `train_step` for K trials at once on one frozen base.

    There is one executable for each K, number of profiles and batch shape. The arguments of a call are the base and
    the profile tree, then state, batch, draw, schedule and dropout key with a leading K, and the proximal step of the
    phase's update rule. The state's buffers are reused for the result.

    On a mesh the trials lie along `trial` and the rows of a batch along `data` and `fsdp`. Every shard of the rows has
    a gradient of its own. The gradients are summed once, at the end of the step.

    Args:
      graphdef: the graph definition of the adapted decoder in training mode.
      optimizer: the optimizer that `make_optimizer` returned.
      chunk: how many answer positions have logits at one time.
      mesh: the mesh, or None for one device. K is a multiple of its `trial`, B a multiple of its `data` x `fsdp`.
      engine: "jit", or "pmap" for `jax.pmap` over the rows. With "pmap" everything but the rows is replicated on all
        devices of one host.
    """

    def __init__(
        self,
        graphdef: Any,
        optimizer: optax.GradientTransformation,
        *,
        chunk: int,
        mesh: Mesh | None = None,
        engine: str = "jit",
    ) -> None:
        self._step = functools.partial(train_step, graphdef, optimizer, chunk)
        self._mesh, self._engine = mesh, engine if shards_of(mesh) > 1 else "jit"
        self._executables: dict[tuple, jax.stages.Compiled] = {}
        self._seconds: list[float] = []

    def compile(self, *arguments: Any, proximal: Proximal | None = None) -> jax.stages.Compiled:
        """Returns the executable for arguments of these shapes.

        Args:
          arguments: the arguments of a call, as arrays or `jax.ShapeDtypeStruct`s.
          proximal: the proximal step of the update rule, or None.
        """
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments[2:]))
        key = proximal, jax.tree.structure(arguments[2:]), shapes
        if key not in self._executables:
            start = time.monotonic()
            if self._mesh is not None:
                base, profile, *rest = arguments
                rest = jax.eval_shape(self._arrange, *rest)
                arguments = base, profile, *map(_laid_out, rest, self.layout(*rest))
            self._executables[key] = self._traceable(arguments, proximal).lower(*arguments).compile()
            self._seconds.append(time.monotonic() - start)
        return self._executables[key]

    def __call__(
        self, base: Any, profile: Any, *arguments: Any, proximal: Proximal | None = None
    ) -> tuple[TrialState, dict[str, jax.Array]]:
        compiled = self.compile(base, profile, *arguments, proximal=proximal)
        if self._mesh is not None:
            arguments = self._arrange(*arguments)
            arguments = tuple(map(put, arguments, self.layout(*arguments)))
        return compiled(base, profile, *arguments)

    def _arrange(self, state, batch, draw, schedule, keys) -> tuple:
        """Returns the arguments as the engine takes them: `jax.pmap` needs batch and profiles as [S, K, ...]."""
        if self._engine == "pmap":
            batch, draw = _in_shards(batch, draw, shards_of(self._mesh), trials=True)
        return state, batch, draw, schedule, keys

    def layout(self, state: Any, batch: Any, draw: Draw, schedule: Any, keys: Any) -> tuple:
        """Returns the trees of shardings of the arguments that follow base and profile tree.

        Args:
          state: the state of K trials.
          batch: the batches of K trials.
          draw: the draws of K trials.
          schedule: the schedules of K trials.
          keys: the dropout keys of K trials.

        Raises:
          ValueError: there is no mesh.
        """
        if self._mesh is None:
            raise ValueError("a training step on one device has no layout on a mesh")
        whole = replicated(self._mesh)
        if self._engine == "pmap":
            rows, trial, state = (
                NamedSharding(self._mesh, PartitionSpec(ROWS)),
                whole,
                jax.tree.map(lambda _: whole, state),
            )
            batch, profiles = jax.tree.map(lambda _: rows, batch), rows if draw.per_example else whole
        else:
            trial, state = NamedSharding(self._mesh, PartitionSpec("trial")), shardings(state, self._mesh, trials=True)
            rows = functools.partial(rows_sharding, self._mesh, trials=True)
            batch = jax.tree.map(lambda leaf: rows(leaf.ndim, 2), batch)
            profiles = rows(5, 3) if draw.per_example else trial
        draw = dataclasses.replace(draw, profiles=profiles, update_mask=trial, column_rates=trial, loss_weights=trial)
        return state, batch, draw, jax.tree.map(lambda _: trial, schedule), trial

    def _traceable(self, arguments, proximal: Proximal | None):
        """Returns the traceable function for arguments of this structure."""
        shards, in_axes = shards_of(self._mesh), (None, None, 0, 0, 0, 0, 0)
        step = functools.partial(self._step, proximal=proximal)
        if self._mesh is None:
            return jax.jit(jax.vmap(step, in_axes=in_axes), donate_argnums=2)
        step = functools.partial(step, sharded=shards > 1)
        if self._engine == "pmap":
            return jax.pmap(
                jax.vmap(step, in_axes=in_axes),
                **_over_shards(arguments[4]),
                devices=list(self._mesh.devices.flat),
                donate_argnums=2,
            )
        if shards > 1:
            step = functools.partial(_step_in_shards, step, shards)
        placed = jax.tree.map(lambda leaf: leaf.sharding, arguments[2]), replicated(self._mesh)
        step = jax.vmap(step, in_axes=in_axes, spmd_axis_name="trial")
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


def _step_in_shards(step, shards: int, base, profile, state, batch, draw: Draw, schedule, key):
    """Maps the step of one trial over shards of its rows."""
    batch, draw = _in_shards(batch, draw, shards, trials=False)
    mapped = jax.vmap(step, **_over_shards(draw), spmd_axis_name=ROWS)
    return mapped(base, profile, state, batch, draw, schedule, key)


def _over_shards(draw: Draw) -> dict[str, Any]:
    """Returns the arguments with which `jax.vmap` or `jax.pmap` maps a training step over shards of its rows."""
    profiles = 0 if draw.per_example else None
    drawn = dataclasses.replace(draw, profiles=profiles, update_mask=None, column_rates=None, loss_weights=None)
    return dict(in_axes=(None, None, None, 0, drawn, None, None), out_axes=None, axis_name=SHARDS)


def _in_shards(batch, draw: Draw, shards: int, *, trials: bool) -> tuple[Any, Draw]:
    """Returns rows [M, B, ...] as [S, M, B / S, ...], and profiles per example likewise.

    With `trials` the rows have a leading K, and the result is [S, K, M, B / S, ...].
    """
    axis = 1 + trials
    batch = jax.tree.map(lambda x: split_rows(x, axis, shards), batch)
    if draw.per_example:
        draw = dataclasses.replace(draw, profiles=split_rows(draw.profiles, axis + 1, shards))
    return batch, draw

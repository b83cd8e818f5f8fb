"""The training step of K trials at once: compiled once for every shape, on one device or on a mesh."""

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

Proximal = Callable[[Any], Any]  # adapter -> adapter, behind the update


class TrialsStep:
    """`train_step` for K trials at once on one frozen base: one executable per K, number of profiles and batch shape.

    It is called with base, profile tree, and then state, batch, draw, schedule and dropout key with a leading K, and
    with the proximal step of the phase's update rule. The state's buffers are reused for the result.

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

    def compile(self, *arguments, proximal: Proximal | None = None) -> jax.stages.Compiled:
        """The executable for arguments of these shapes; arrays or `jax.ShapeDtypeStruct`s."""
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
        self, base, profile, *arguments, proximal: Proximal | None = None
    ) -> tuple[TrialState, dict[str, jax.Array]]:
        compiled = self.compile(base, profile, *arguments, proximal=proximal)
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
            batch, profiles = jax.tree.map(lambda _: rows, batch), rows if draw.per_example else whole
        else:
            trial, state = NamedSharding(self._mesh, PartitionSpec("trial")), shardings(state, self._mesh, trials=True)
            rows = functools.partial(rows_sharding, self._mesh, trials=True)
            batch = jax.tree.map(lambda leaf: rows(leaf.ndim, 2), batch)
            profiles = rows(5, 3) if draw.per_example else trial
        draw = dataclasses.replace(draw, profiles=profiles, update_mask=trial, column_rates=trial, loss_weights=trial)
        return state, batch, draw, jax.tree.map(lambda _: trial, schedule), trial

    def _traceable(self, arguments, proximal: Proximal | None):
        """What is compiled, for arguments of this structure."""
        shards, in_axes = shards_of(self._mesh), (None, None, 0, 0, 0, 0, 0)
        step = functools.partial(self._step, proximal=proximal)
        if self._mesh is None:
            return jax.jit(jax.vmap(step, in_axes=in_axes), donate_argnums=2)
        step = functools.partial(step, sharded=shards > 1)
        if self._engine == "pmap":
            return jax.pmap(
                jax.vmap(step, in_axes=in_axes),
                **_over_shards(arguments[4]),
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
    batch, draw = _in_shards(batch, draw, shards, trials=False)
    mapped = jax.vmap(step, **_over_shards(draw), spmd_axis_name=ROWS)
    return mapped(base, profile, state, batch, draw, schedule, key)


def _over_shards(draw: Draw) -> dict[str, Any]:
    """How a training step is mapped over parts of its rows."""
    profiles = 0 if draw.per_example else None
    drawn = dataclasses.replace(draw, profiles=profiles, update_mask=None, column_rates=None, loss_weights=None)
    return dict(in_axes=(None, None, None, 0, drawn, None, None), out_axes=None, axis_name=SHARDS)


def _in_shards(batch, draw: Draw, shards: int, *, trials: bool) -> tuple[Any, Draw]:
    """Rows [M, B, ...], with K in front for `trials`, as [S, M, B / S, ...], and profiles per example alike."""
    axis = 1 + trials
    batch = jax.tree.map(lambda x: split_rows(x, axis, shards), batch)
    if draw.per_example:
        draw = dataclasses.replace(draw, profiles=split_rows(draw.profiles, axis + 1, shards))
    return batch, draw

"""The programs of an experiment, compiled for a slice of TPU chips from shapes alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from mlora_jax.adapt import adapt, split
from mlora_jax.config import Trial, expand_trials
from mlora_jax.evaluate.generation import STEPS, Generator
from mlora_jax.models import Decoder, DecoderConfig
from mlora_jax.parallel.chips import Slice
from mlora_jax.parallel.mesh import EVALUATED, make_mesh, shards_of
from mlora_jax.parallel.rules import Placement, replicated, rows_sharding, shardings
from mlora_jax.train.loop import TrialsStep, stack_trees, trial_keys
from mlora_jax.train.phases import TrialPhases
from mlora_jax.train.step import Schedule, init_state, make_optimizer

OPTIMIZER = ("beta1", "beta2", "epsilon", "weight_decay", "clip")


@dataclasses.dataclass(frozen=True)
class Abstract:
    """An adapted decoder without its arrays.

    Attributes:
      graphdefs: in training mode and in evaluation mode.
      base, adapter, profile: trees of `jax.ShapeDtypeStruct`.
    """

    graphdefs: tuple[Any, Any]
    base: Any
    adapter: Any
    profile: Any


def abstract_model(config: ConfigDict, shape: DecoderConfig, rank: int, mesh) -> Abstract:
    """The adapted decoder of an experiment on a mesh; nothing of its size is made.

    Args:
      config: resolved.
      shape: of the decoder.
      rank: R.
      mesh: None for one device.
    """
    options = config.adapter

    def make():
        model = Decoder(shape, dtype=jnp.dtype(config.model.dtype or "bfloat16"), rngs=nnx.Rngs(0))
        model.remat = config.train.remat
        model.placement = None if mesh is None else Placement(mesh)
        key = jax.random.key(0)
        return adapt(model, rank, options.targets, key=key, init=options.init, dropout=options.dropout)

    model = nnx.eval_shape(make)
    graphdef, base, adapter, profile = split(model)
    model.eval()
    return Abstract((graphdef, split(model)[0]), base, adapter, profile)


def base_bytes(config: ConfigDict, shape: DecoderConfig) -> int:
    """Of the frozen base."""
    base = abstract_model(config, shape, 1, None).base
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(base))


@dataclasses.dataclass(frozen=True)
class Programs:
    """What an experiment compiles, for one rank and one mesh.

    Attributes:
      config: resolved.
      shape: of the decoder.
      rank: R.
      slice: to compile for.
      sizes: of the axes of the mesh.
    """

    config: ConfigDict
    shape: DecoderConfig
    rank: int
    slice: Slice
    sizes: Mapping[str, int]

    @functools.cached_property
    def mesh(self):
        """Over the devices of the slice."""
        return make_mesh(self.sizes, self.slice.devices)

    @functools.cached_property
    def model(self) -> Abstract:
        """The adapted decoder."""
        return abstract_model(self.config, self.shape, self.rank, self.mesh)

    @functools.cached_property
    def optimizer(self):
        """Of the adapter."""
        return make_optimizer(**{name: self.config.train[name] for name in OPTIMIZER})

    @property
    def answers(self) -> int:
        """A, answer tokens of a row: half of its tokens."""
        return self.config.data.max_length // 2

    def weights(self, tree, *, trials: bool = False):
        """A tree of structures with the shardings of the rules."""
        return _placed(tree, shardings(tree, self.mesh, trials=trials))

    def state(self, trials: int):
        """Of training K trials."""
        one = jax.eval_shape(lambda adapter: init_state(adapter, self.optimizer), self.model.adapter)
        many = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((trials, *leaf.shape), leaf.dtype), one)
        return self.weights(many, trials=True)

    def train(self, batch: int, accumulation: int) -> jax.stages.Lowered:
        """A step of as many trials as the trial axis is long, each of `batch` rows in `accumulation` micro-batches."""
        config, trials = self.config, self.sizes["trial"]
        shape = (trials, accumulation, batch // accumulation)
        integers = lambda size: jax.ShapeDtypeStruct((*shape, size), jnp.int32)  # noqa: E731
        rows = {
            "tokens": integers(config.data.max_length),
            "positions": integers(self.answers),
            "targets": integers(self.answers),
            "weights": jax.ShapeDtypeStruct((*shape, self.answers), jnp.float32),
        }
        with config.unlocked():
            sized = ConfigDict(config)
        sized.train.batch_size, sized.train.accumulation = batch, accumulation
        trial = self._trial()
        draws = TrialPhases(sized, 1000).draws_in(0, [trial], stack_trees([trial_keys(0)]))
        draw = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((trials, *leaf.shape[1:]), leaf.dtype), jax.eval_shape(draws, 0)
        )
        schedule = Schedule(*[jax.ShapeDtypeStruct((trials,), jnp.float32)] * 3)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), trials))
        step = TrialsStep(self.model.graphdefs[0], self.optimizer, chunk=config.train.loss_chunk, mesh=self.mesh)
        base, profile = self.weights(self.model.base), self.weights(self.model.profile)
        return step.compile(base, profile, self.state(trials), rows, draw, schedule, keys)

    def _trial(self) -> Trial:
        return dataclasses.replace(expand_trials(self.config)[0], rank=self.rank)

"""The programs of an experiment, compiled for a slice of TPU chips from shapes alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from mlora_jax.adapters import adapt, split
from mlora_jax.config_type import ConfigDict
from mlora_jax.core import powers_of_two
from mlora_jax.data.packing import RowShape
from mlora_jax.evaluate.programs import GenerationPrograms, PromptRows, State
from mlora_jax.models import Decoder, DecoderConfig
from mlora_jax.models.decoder import choose_remat
from mlora_jax.parallel.chips import Slice
from mlora_jax.parallel.mesh import EVALUATED, make_mesh, shards_of
from mlora_jax.parallel.rules import Placement, replicated, rows_sharding, shardings
from mlora_jax.training.phases import AdapterForm, TrialPhases
from mlora_jax.training.step import Passes, Schedule, init_state, make_optimizer
from mlora_jax.training.trial_trees import stack_trees, trial_keys
from mlora_jax.training.trials_step import CHUNK, TrialsStep, batch_shapes
from mlora_jax.trials import Trial, expand_trials

# A number of steps that has room for every phase; the programs do not depend on it.
STEPS_OF_A_RUN = 1000
OPTIMIZER = ("beta1", "beta2", "epsilon", "weight_decay", "clip")


def _placed(tree, placed):
    """Returns a `jax.ShapeDtypeStruct` for every array of a tree, with the sharding from `placed`."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, placed)


@dataclasses.dataclass(frozen=True)
class Abstract:
    """An adapted decoder without its arrays.

    Attributes:
      graphdefs: the graph definitions in training mode and in evaluation mode.
      base, adapter, profile: the trees of `jax.ShapeDtypeStruct`s.
    """

    graphdefs: tuple[Any, Any]
    base: Any
    adapter: Any
    profile: Any


def abstract_model(
    config: ConfigDict, shape: DecoderConfig, form: AdapterForm, mesh: Mesh | None, flash_from: int | None
) -> Abstract:
    """Returns the adapted decoder of an experiment on a mesh, without allocating its arrays.

    Args:
      config: the resolved config.
      shape: the shape of the decoder.
      form: the form of the adapter.
      mesh: the mesh, or None for one device.
      flash_from: see `Decoder`.
    """
    options = config.adapter

    def make():
        model = Decoder(shape, dtype=jnp.dtype(config.model.dtype or "bfloat16"), rngs=nnx.Rngs(0))
        model.remat = choose_remat(config.train.remat, model.config.num_layers)
        model.flash_from = flash_from
        model.placement = None if mesh is None else Placement(mesh)
        key = jax.random.key(0)
        return adapt(
            model, form.rank, options.targets, key=key, init=options.init, dropout=options.dropout, gate=form.gate
        )

    model = nnx.eval_shape(make)
    graphdef, base, adapter, profile = split(model)
    model.eval()
    return Abstract((graphdef, split(model)[0]), base, adapter, profile)


def base_bytes(config: ConfigDict, shape: DecoderConfig) -> int:
    """Returns the bytes of the frozen base.

    Args:
      config: the resolved config.
      shape: the shape of the decoder.
    """
    base = abstract_model(config, shape, AdapterForm(1), None, None).base
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(base))


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs that an experiment compiles for one rank and one mesh.

    Attributes:
      config: the resolved config.
      shape: the shape of the decoder.
      rank: R.
      slice: the slice of chips to compile for.
      sizes: axis of the mesh -> its size.
      flash_from: the number of tokens from which attention uses the flash kernel; None never uses it.
    """

    config: ConfigDict
    shape: DecoderConfig
    rank: int
    slice: Slice
    sizes: Mapping[str, int]
    flash_from: int | None

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh over the devices of the slice."""
        return make_mesh(self.sizes, self.slice.devices)

    @functools.cached_property
    def model(self) -> Abstract:
        """The adapted decoder."""
        form = TrialPhases(self.config, STEPS_OF_A_RUN).form(self._trial())
        return abstract_model(self.config, self.shape, form, self.mesh, self.flash_from)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the adapter."""
        form = TrialPhases(self.config, STEPS_OF_A_RUN).form(self._trial())
        ranks = tuple(self.config.adapter.ranks) or powers_of_two(form.rank)
        numbers = {name: self.config.train[name] for name in OPTIMIZER}
        return make_optimizer(**numbers, kind=form.optimizer, ranks=ranks)

    @property
    def answers(self) -> int:
        """A, the number of answer tokens in a row, which is half of its tokens."""
        return self.config.data.max_length // 2

    def weights(self, tree: Any, *, trials: bool = False) -> Any:
        """Returns a tree of `jax.ShapeDtypeStruct`s with the shardings of the rules.

        Args:
          tree: the tree of shapes and dtypes.
          trials: whether the leaves have a leading K.
        """
        return _placed(tree, shardings(tree, self.mesh, trials=trials))

    def state(self, trials: int) -> Any:
        """Returns the shapes of the training state of K trials.

        Args:
          trials: K.
        """
        one = jax.eval_shape(lambda adapter: init_state(adapter, self.optimizer), self.model.adapter)
        many = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((trials, *leaf.shape), leaf.dtype), one)
        return self.weights(many, trials=True)

    def train(self, batch: int, accumulation: int) -> jax.stages.Compiled:
        """Compiles a training step of as many trials as the trial axis has parts.

        Args:
          batch: the number of rows of each trial in a step.
          accumulation: the number of micro-batches in a step.
        """
        config, trials = self.config, self.sizes["trial"]
        shards = shards_of(self.mesh)
        packed = RowShape((config.data.max_length,), max(1, batch // accumulation // shards))
        rows = batch_shapes(packed, packed.passes(-(-batch // shards)), trials=trials, shards=shards)
        sized = config.copy_and_resolve_references()
        with sized.unlocked():
            sized.train.batch_size, sized.train.accumulation = batch, accumulation
        trial = self._trial()
        phases = TrialPhases(sized, STEPS_OF_A_RUN)
        draws = phases.draws([trial], 0, stack_trees([trial_keys(0)]))
        draw = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((trials, *leaf.shape[1:]), leaf.dtype), jax.eval_shape(draws, 0)
        )
        schedule = Schedule(*[jax.ShapeDtypeStruct((trials,), jnp.float32)] * 3)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), trials))
        step = TrialsStep(
            self.model.graphdefs[0],
            self.optimizer,
            chunk=min(config.train.loss_chunk, CHUNK),
            widths=packed.widths,
            micro_batch=batch // accumulation,
            plan=Passes((accumulation,), packed.rows * self.answers),
            mesh=self.mesh,
        )
        base, profile = self.weights(self.model.base), self.weights(self.model.profile)
        arguments = base, profile, self.state(trials), rows, draw, schedule, keys
        return step.compile(*arguments, rule=phases.shape(trial)[0].rule)

    def prefill(self, batch: int) -> jax.stages.Compiled:
        """Compiles the prefill of prompts as long as the longest training row, into a cache with room for answers.

        Args:
          batch: the number of prompts.
        """
        lie = rows_sharding(self.mesh, 2, 0, over=EVALUATED)
        tokens = jax.ShapeDtypeStruct((batch, self.config.data.max_length), jnp.int32, sharding=lie)
        prompts = tokens, self._prompt_rows(batch), None, self._whole((batch,)), None
        arguments = *self._weights, *prompts, self._state(batch), None
        return self._generation.prefill.lower(self.slots, False, *arguments).compile()

    def decode(self, batch: int) -> jax.stages.Compiled:
        """Compiles the decoding of `STEPS` tokens in each row of a batch, with a cache for `slots` tokens each.

        Args:
          batch: the number of rows.
        """
        arguments = *self._weights, self._state(batch), self._prompt_rows(batch), self._whole(()), None
        return self._generation.decode.lower(False, *arguments).compile()

    @property
    def slots(self) -> int:
        """The number of tokens in the cache, for prompt and answer."""
        return self.config.data.max_length + self.config.evaluation.max_new_tokens

    @functools.cached_property
    def _generation(self) -> GenerationPrograms:
        # The values of this profile are replaced by the p of each call.
        profile = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.model.profile)
        eos = self.shape.eos_token_ids
        return GenerationPrograms(self.model.graphdefs[1], profile, eos=eos, ends=eos, settings=None, mesh=self.mesh)

    @functools.cached_property
    def _weights(self) -> tuple:
        """The base, the adapter and p [R]."""
        p = jax.ShapeDtypeStruct((self.rank,), jnp.float32, sharding=replicated(self.mesh))
        return self.weights(self.model.base), self.weights(self.model.adapter), p

    def _state(self, batch: int) -> State:
        """Returns the shape and sharding of the state of a batch, all of whose rows are prefilled or decoded."""
        base, adapter, _ = self._weights
        state = jax.eval_shape(functools.partial(self._generation.begin, batch, self.slots), base, adapter)
        return _placed(state, self._generation.placed(state))

    def _prompt_rows(self, batch: int) -> PromptRows:
        return PromptRows(*(self._whole((batch,)) for _ in PromptRows._fields))

    def _whole(self, shape: tuple[int, ...]) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated(self.mesh))

    def _trial(self) -> Trial:
        return dataclasses.replace(expand_trials(self.config)[0], rank=self.rank)

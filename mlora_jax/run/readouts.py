"""The read-outs of a run's trials: an adapter and one profile for every rank of S."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlora_jax.adapters import InputGram, set_profile, split, watch_inputs
from mlora_jax.core import RankHierarchy, readout_profile
from mlora_jax.core.squeeze import squeeze_factors
from mlora_jax.evaluate import read_out
from mlora_jax.parallel import hosts
from mlora_jax.parallel.arrays import fetch, on_one_device, put_replicated, put_rows, put_weights, split_rows
from mlora_jax.parallel.mesh import ROWS, shards_of
from mlora_jax.run.experiment import Experiment
from mlora_jax.training.adapter_file import save_adapter
from mlora_jax.training.calibrate import calibrate
from mlora_jax.training.fitted import CALIBRATED, SQUEEZED, read_profiles, write_profiles
from mlora_jax.training.loop import trial_keys
from mlora_jax.training.objective import answer_loss
from mlora_jax.trials import Trial


class ReadOut(NamedTuple):
    """What an adapter is measured as.

    Attributes:
      adapter: tree of factors; another one than was trained if the read-out is a squeeze.
      profiles: rank of S -> p [R].
    """

    adapter: Any
    profiles: dict[int, jax.Array]


def read_out_trial(
    experiment: Experiment, trial: Trial, adapter, hierarchy: RankHierarchy, readout: str, folder
) -> ReadOut:
    """A named read-out of a trained trial.

    Args:
      experiment: of the run.
      trial: of it.
      adapter: trained tree.
      hierarchy: of the adapter.
      readout: of `READOUT_NAMES`. "calibrated" and "squeeze_inputs" run the model on training data.
      folder: of the adapter. What was made of data is kept there, for
        `mlora_jax.training.fitted.find_readout`, and fitted profiles are read again.
    """
    if readout == "calibrated":
        profiles = _calibrated(experiment, trial, adapter, hierarchy, pathlib.Path(folder))
        return ReadOut(adapter, profiles)
    adapted, trained_profile = experiment.adapted(trial.rank), experiment.phases.trained_profile(trial)
    if readout == "squeeze_inputs":
        grams = _input_grams(experiment, trial, adapter, trained_profile)
        squeezed = jax.jit(squeeze_factors)(
            adapter, set_profile(adapted.profile, trained_profile), grams=grams, key=jax.random.key(0)
        )
        # The scale is in the factors now.
        hierarchy, readout = RankHierarchy(hierarchy.ranks, max_rank=hierarchy.max_rank), "prefix"
        adapter = fetch(squeezed.adapter)
        hosts.on_first_process(
            lambda: save_adapter(pathlib.Path(folder) / SQUEEZED, adapter, hierarchy, {"of": trial.name})
        )
    adapter, hierarchy, name = read_out(adapter, adapted.profile, hierarchy, readout, trained_profile)
    return ReadOut(adapter, {rank: readout_profile(hierarchy, name, rank) for rank in hierarchy.ranks})


def _calibrated(experiment: Experiment, trial: Trial, adapter, hierarchy: RankHierarchy, folder: pathlib.Path) -> dict:
    if not hosts.broadcast(hosts.is_first() and (folder / CALIBRATED).is_file()):
        adapted, options = experiment.adapted(trial.rank), experiment.config.calibration
        profiles = calibrate(
            _loss_of(adapted.evaluation_graphdef, experiment.config.train.loss_chunk, experiment.mesh),
            (adapted.base, put_weights(adapter, experiment.mesh), put_replicated(adapted.profile, experiment.mesh)),
            hierarchy,
            experiment.phases.trained_profile(trial),
            (put_rows(batch, experiment.mesh, 0) for batch in _batches(experiment, trial)),
            steps=min(options.steps, experiment.steps),
            learning_rate=options.learning_rate,
            key=jax.random.fold_in(trial_keys(trial.seed).draws, experiment.steps),
            mesh=experiment.mesh,
        )
        hosts.on_first_process(lambda: write_profiles(folder, hierarchy.ranks, profiles))
    return hosts.broadcast(read_profiles(folder) if hosts.is_first() else {})


@functools.lru_cache(maxsize=16)
def _loss_of(graphdef, chunk: int, mesh: Mesh | None):
    """(trees, profiles [B, R], batch) -> nats; one function for all trials of a model, so that it compiles once."""

    def loss(trees, profiles, batch):
        base, adapter, profile = trees
        values = set_profile(profile, profiles, per_example=True)
        return answer_loss(graphdef, base, adapter, values, batch, chunk=chunk)

    def loss_of_parts(trees, profiles, batch):
        parts = _parts((profiles, batch), mesh)
        return jnp.sum(jax.vmap(loss, in_axes=(None, 0, 0), spmd_axis_name=ROWS)(trees, *parts))

    return loss if mesh is None else loss_of_parts


def _input_grams(experiment: Experiment, trial: Trial, adapter, trained_profile: jax.Array):
    """Of the trained function's inputs in a few batches of training data, padding left out."""
    adapted = experiment.adapted(trial.rank)
    model = nnx.merge(adapted.evaluation_graphdef, adapted.base, adapted.adapter, adapted.profile)
    graphdef, base, _, profile, grams = split(watch_inputs(model), mutable=InputGram)

    mesh = experiment.mesh
    add = _sum_of(graphdef, mesh)
    adapter, (profile, grams) = put_weights(adapter, mesh), put_replicated((profile, grams), mesh)
    for _, batch in zip(range(experiment.config.calibration.batches), _batches(experiment, trial), strict=False):
        answered = np.max(np.where(batch["weights"] > 0, batch["positions"], -1), axis=1)  # the last token that counts
        real = np.arange(batch["tokens"].shape[1]) <= answered[:, None]
        profiles = real.astype(np.float32)[..., None] * np.asarray(trained_profile)  # [B, T, R]
        rows = put_rows((batch["tokens"], profiles), mesh, 0)
        grams = put_replicated(jax.block_until_ready(add(base, adapter, profile, grams, *rows)), mesh)
    return grams if mesh is None else on_one_device(grams)


@functools.lru_cache(maxsize=16)
def _sum_of(graphdef, mesh: Mesh | None):
    """(base, adapter, profile, grams, tokens [B, T], profiles [B, T, R]) -> grams with those of these tokens added."""

    def add(base, adapter, profile, grams, tokens, profiles):
        values = set_profile(profile, profiles, per_example=True)
        model = nnx.merge(graphdef, base, adapter, values, grams)
        model.hidden(tokens)
        return nnx.state(model, InputGram)

    def add_of_parts(base, adapter, profile, grams, tokens, profiles):
        def of_part(tokens, profiles):
            return add(base, adapter, profile, jax.tree.map(jnp.zeros_like, grams), tokens, profiles)

        made = jax.vmap(of_part, spmd_axis_name=ROWS)(*_parts((tokens, profiles), mesh))
        return jax.tree.map(lambda old, new: old + jnp.sum(new, axis=0), grams, made)

    return jax.jit(add if mesh is None else add_of_parts)


def _parts(rows, mesh: Mesh):
    """Arrays [B, ...] as [S, B / S, ...], a part for each shard of the rows."""
    parts = jax.tree.map(lambda x: split_rows(x, 0, shards_of(mesh)), rows)
    return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(ROWS)))


def _batches(experiment: Experiment, trial: Trial):
    """Training batches of a trial in its own order, micro-batches joined."""
    for arrays in experiment.pipeline([trial]):
        yield {name: np.reshape(part, (-1, part.shape[-1])) for name, part in arrays.items()}  # [M * B, ...]

"""What actions need besides an adapter, and how a run collects it: one table.

Adding a need is adding a row to `NEEDS`; an action names it in `Action.needs`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlora_jax.adapters import InputGram, set_profile, split, watch_inputs
from mlora_jax.core import RankHierarchy
from mlora_jax.core.rank_axes import by_parent, path_names
from mlora_jax.interop import start_from_peft
from mlora_jax.models.quantized import dense_kernel
from mlora_jax.parallel.arrays import on_one_device, put_replicated, put_rows, put_weights, split_rows
from mlora_jax.parallel.mesh import ROWS, shards_of
from mlora_jax.run.adapted import adapt_model
from mlora_jax.run.experiment import Experiment
from mlora_jax.training.calibrate import calibrate
from mlora_jax.training.objective import answer_loss
from mlora_jax.training.trial_trees import trial_keys
from mlora_jax.trials import Trial


class Asked(NamedTuple):
    """The trial and the experiment that something is collected for.

    Attributes:
      experiment: loaded.
      trial: the trial.
      adapter: its tree of factors.
      trained_profile: [R], the profile of the function that the adapter computes.
      hierarchy: the adapter's ranks, scales and weights.
      key: a `jax.random.key`.
    """

    experiment: Experiment
    trial: Trial
    adapter: Any
    trained_profile: jax.Array
    hierarchy: RankHierarchy
    key: jax.Array


def collect(
    needs: Sequence[str],
    experiment: Experiment,
    trial: Trial,
    adapter: Any,
    trained_profile: jax.Array,
    *,
    hierarchy: RankHierarchy | None = None,
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Collects what an action needs for one trial.

    Args:
      needs: keys of `NEEDS`.
      experiment: loaded.
      trial: one of its trials.
      adapter: the trial's tree of factors.
      trained_profile: [R], the profile of the function that the adapter computes.
      hierarchy: the adapter's ranks, scales and weights; None takes those of the trial's last phase.
      key: a `jax.random.key` for what is random; None takes the trial's key for adapters.

    Returns:
      need -> what was collected.
    """
    if not needs:
        return {}
    hierarchy = experiment.phases.hierarchy(trial) if hierarchy is None else hierarchy
    key = trial_keys(trial.seed).adapter if key is None else key
    asked = Asked(experiment, trial, adapter, trained_profile, hierarchy, key)
    return {name: NEEDS[name](asked) for name in needs}


def _peft_adapter(asked: Asked) -> Any:
    """The adapter of `config.adapter.start_from`; what it does not hold is drawn from the key."""
    experiment = asked.experiment
    model = adapt_model(experiment, experiment.form(asked.trial), asked.key)
    return start_from_peft(experiment.config.adapter.start_from, model, asked.trained_profile)


def _kernels(asked: Asked) -> Any:
    """The frozen kernel [..., D, F] of every adapted layer, under the key ``kernel`` beside the factors' place.

    A quantised kernel is given as the array that the layer computes with.
    """
    experiment, adapted = asked.experiment, asked.experiment.adapted_for(asked.trial)
    parents, tree = set(by_parent(adapted.adapter)), {}
    kernels = jax.tree_util.tree_leaves_with_path(adapted.base, is_leaf=lambda node: isinstance(node, nnx.Variable))
    for path, variable in kernels:
        *parent, layer, name = path_names(path)
        if layer == "base" and name == "kernel" and tuple(parent) in parents:
            node = functools.reduce(lambda found, part: found.setdefault(part, {}), parent, tree)
            kernel = dense_kernel(variable.get_value())
            node["kernel"] = kernel if experiment.mesh is None else on_one_device(kernel)
    if by_parent(tree).keys() != parents:
        missing = ", ".join(sorted(".".join(parent) for parent in parents - by_parent(tree).keys()))
        raise ValueError(f"these adapted layers have no kernel [D, F] of their own: {missing}")
    return tree


def _gradients(asked: Asked) -> Any:
    """The mean gradient of the training loss by the factors, over the first `calibration.batches` batches."""
    experiment, adapted = asked.experiment, asked.experiment.adapted_for(asked.trial)
    mesh = experiment.mesh
    adapter, profile = put_weights(asked.adapter, mesh), put_replicated(adapted.profile, mesh)
    loss = _loss_of(adapted.evaluation_graphdef, experiment.config.train.loss_chunk, mesh)
    gradient, answers = jax.tree.map(jnp.zeros_like, adapter), 0.0
    for batch in _some_micro_batches(asked):
        p = np.broadcast_to(asked.trained_profile, (len(batch["tokens"]), len(asked.trained_profile)))
        rows = put_rows((np.array(p), batch), mesh, 0)
        found = _gradient(loss, adapted.base, adapter, profile, *rows)
        gradient = jax.tree.map(jnp.add, gradient, jax.block_until_ready(found))
        answers += float(np.sum(batch["weights"]))
    gradient = jax.tree.map(lambda leaf: leaf / max(answers, 1.0), gradient)
    return gradient if mesh is None else on_one_device(gradient)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(loss, base, adapter, profile, p, batch):
    return jax.grad(lambda adapter: loss((base, adapter, profile), p, batch))(adapter)


def _hidden_moments(asked: Asked) -> Any:
    """``H^T H`` [..., R, R] of what B is given, ``H = X A diag(p)``, over some batches; padding is left out."""
    return _moments(asked, inputs=False)


def _input_moments(asked: Asked) -> Any:
    """``X^T X`` [..., D, D] of the inputs of every adapted layer over some batches; padding is left out."""
    return _moments(asked, inputs=True)


def _input_statistics(asked: Asked) -> Any:
    """``(X, 1)^T (X, 1)`` [..., D + 1, D + 1] of the inputs of every adapted layer: second moments, sums and count."""
    return _moments(asked, inputs=True, mean=True)


def _moments(asked: Asked, *, inputs: bool, mean: bool = False) -> Any:
    experiment, adapted = asked.experiment, asked.experiment.adapted_for(asked.trial)
    model = nnx.merge(adapted.evaluation_graphdef, adapted.base, adapted.adapter, adapted.profile)
    graphdef, base, _, profile, grams = split(watch_inputs(model, inputs=inputs, mean=mean), mutable=InputGram)
    mesh = experiment.mesh
    add = _sum_of(graphdef, mesh)
    adapter, (profile, grams) = put_weights(asked.adapter, mesh), put_replicated((profile, grams), mesh)
    for batch in _some_batches(asked):
        answered = np.max(np.where(batch["weights"] > 0, batch["positions"], -1), axis=1)  # the last token that counts
        real = np.arange(batch["tokens"].shape[1]) <= answered[:, None]
        profiles = real.astype(np.float32)[..., None] * np.asarray(asked.trained_profile)  # [B, T, R]
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


def _fitted_profiles(asked: Asked) -> np.ndarray:
    """Profiles [ranks of S, R] that are fitted to training data, see `mlora_jax.training.calibrate`."""
    experiment, adapted = asked.experiment, asked.experiment.adapted_for(asked.trial)
    options, mesh = experiment.config.calibration, experiment.mesh
    return calibrate(
        _loss_of(adapted.evaluation_graphdef, experiment.config.train.loss_chunk, mesh),
        (adapted.base, put_weights(asked.adapter, mesh), put_replicated(adapted.profile, mesh)),
        asked.hierarchy,
        asked.trained_profile,
        (put_rows(batch, mesh, 0) for batch in _batches(experiment, asked.trial)),
        steps=min(options.steps, experiment.steps),
        learning_rate=options.learning_rate,
        key=jax.random.fold_in(trial_keys(asked.trial.seed).draws, experiment.steps),
        mesh=mesh,
    )


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


def _parts(rows: Any, mesh: Any) -> Any:
    """Arrays [B, ...] as [S, B / S, ...], a part for each shard of the rows."""
    parts = jax.tree.map(lambda x: split_rows(x, 0, shards_of(mesh)), rows)
    return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(ROWS)))


def _some_batches(asked: Asked) -> Iterator[dict[str, np.ndarray]]:
    return itertools.islice(_batches(asked.experiment, asked.trial), asked.experiment.config.calibration.batches)


def _batches(experiment: Experiment, trial: Trial) -> Iterator[dict[str, np.ndarray]]:
    """The training batches of a trial in its own order, micro-batches joined."""
    for arrays in experiment.pipeline([trial]).pipelines[0]:
        yield {name: np.reshape(part, (-1, part.shape[-1])) for name, part in arrays.items()}  # [M * B, ...]


def _some_micro_batches(asked: Asked) -> Iterator[dict[str, np.ndarray]]:
    """The rows of `_some_batches`, as many at once as a training step holds."""
    experiment = asked.experiment
    batches = experiment.pipeline([asked.trial]).pipelines[0]
    for arrays in itertools.islice(batches, experiment.config.calibration.batches):
        for number in range(experiment.config.train.accumulation):
            yield {name: part[number] for name, part in arrays.items()}  # of [M, B, ...]


NEEDS: dict[str, Callable[[Asked], Any]] = {
    "peft_adapter": _peft_adapter,
    "kernels": _kernels,
    "gradients": _gradients,
    "hidden_moments": _hidden_moments,
    "input_moments": _input_moments,
    "input_statistics": _input_statistics,
    "fitted_profiles": _fitted_profiles,
}

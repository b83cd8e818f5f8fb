"""The adapted model of an experiment: its trees, its compiled training step and its evaluators."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import optax
from flax import nnx

from mlora_jax.adapters import AdaptedLayer, adapt, fold_in_training, split
from mlora_jax.core import powers_of_two
from mlora_jax.models.decoder import FEW_LAYERS
from mlora_jax.parallel.arrays import put_weights
from mlora_jax.run.evaluators import Evaluator, make_evaluator, make_validation_loss
from mlora_jax.training.phases import AdapterForm
from mlora_jax.training.step import make_optimizer
from mlora_jax.training.trials_step import CHUNK, TrialsStep

if TYPE_CHECKING:
    from mlora_jax.run.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The adapted model of one form.

    Attributes:
      base, adapter, profile: the trees of `mlora_jax.split`; the adapter is one trial's, before training.
      evaluation_graphdef: the model's graph definition in evaluation mode.
      train_graphdef: the model's graph definition in training mode.
      optimizer: an optax transformation without its learning rate.
      step: trains K trials at once.
      evaluators: split -> (adapter, p [R]) -> verdicts [items].
      validation_loss: () -> a function (adapter, p [R]) -> nats per answer token on the validation rows; made once.
    """

    base: Any
    adapter: Any
    profile: Any
    evaluation_graphdef: Any
    train_graphdef: Any
    optimizer: optax.GradientTransformation
    step: TrialsStep
    evaluators: dict[str, Evaluator]
    validation_loss: Callable[[], Callable[[Any, jax.Array], float]]


def adapt_model(experiment: Experiment, form: AdapterForm, key: jax.Array) -> nnx.Module:
    """The experiment's model with fresh adapters of a form.

    Raises:
      ValueError: targets that fit no layer, or the embedding among them.
    """
    options = experiment.config.adapter
    model = adapt(
        experiment.model,
        form.rank,
        options.targets,
        key=key,
        init=options.init,
        dropout=options.dropout,
        gate=form.gate,
    )
    if isinstance(getattr(model, "embed_tokens", None), AdaptedLayer):
        raise ValueError(
            f"config.adapter.targets {tuple(options.targets)} take embed_tokens too, which is no linear layer and "
            "has no place in an export: name the layers to adapt, for example q_proj, v_proj"
        )
    return model


def make_adapted(experiment: Experiment, form: AdapterForm) -> Adapted:
    """The adapted model of a form, its base on the experiment's devices."""
    mesh = experiment.mesh
    adapted: Any = adapt_model(experiment, form, jax.random.key(0))
    on_one_cpu = jax.default_backend() == "cpu" and mesh is None
    adapted.unroll = on_one_cpu and experiment.model.config.num_layers <= FEW_LAYERS
    fold_in_training(adapted, on=on_one_cpu)
    train_graphdef, base, adapter, profile = split(adapted)
    base = put_weights(base, mesh)
    if mesh is not None:
        adapter = jax.device_get(adapter)  # a template, of no use on a device
    adapted.eval()
    adapted.unroll = False
    fold_in_training(adapted, on=False)
    graphdef, *_ = split(adapted)
    optimizer, step = _optimizer_and_step(experiment, form, train_graphdef)
    return Adapted(
        base=base,
        adapter=adapter,
        profile=profile,
        evaluation_graphdef=graphdef,
        train_graphdef=train_graphdef,
        optimizer=optimizer,
        step=step,
        evaluators={
            name: make_evaluator(experiment, graphdef, base, profile, rows) for name, rows in experiment.rows.items()
        },
        validation_loss=functools.cache(
            functools.partial(make_validation_loss, experiment, graphdef, base, profile),
        ),
    )


def with_optimizer(experiment: Experiment, form: AdapterForm, adapted: Adapted) -> Adapted:
    """The adapted model of a form that differs from the form of `adapted` in the optimizer only."""
    optimizer, step = _optimizer_and_step(experiment, form, adapted.train_graphdef)
    return dataclasses.replace(adapted, optimizer=optimizer, step=step)


def _optimizer_and_step(
    experiment: Experiment, form: AdapterForm, train_graphdef: Any
) -> tuple[optax.GradientTransformation, TrialsStep]:
    config = experiment.config
    optimizer = make_optimizer(
        **{name: config.train[name] for name in ("beta1", "beta2", "epsilon", "weight_decay", "clip")},
        kind=form.optimizer,
        ranks=tuple(config.adapter.ranks) or powers_of_two(form.rank),
    )
    step = TrialsStep(
        train_graphdef,
        optimizer,
        chunk=min(config.train.loss_chunk, CHUNK),
        widths=experiment.row_shape.widths,
        micro_batch=config.train.batch_size // config.train.accumulation,
        mesh=experiment.mesh,
        engine=config.parallel.engine,
    )
    return optimizer, step

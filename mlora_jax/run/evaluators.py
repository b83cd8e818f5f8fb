"""Makes the functions that measure adapters on an experiment's rows: the task's metric, and the validation loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlora_jax.adapters import set_profile
from mlora_jax.data.pipeline import collate
from mlora_jax.evaluate import ChoiceEvaluator, GenerationEvaluator, Scorer, TokenEvaluator
from mlora_jax.parallel.arrays import fetch, put_replicated, put_rows, put_weights
from mlora_jax.parallel.mesh import EVALUATED, shards_of
from mlora_jax.training.objective import answer_loss

if TYPE_CHECKING:
    from mlora_jax.run.experiment import Experiment

SCORED = {"choice": ChoiceEvaluator, "tokens": TokenEvaluator}  # the metrics that need no generated text
Evaluator = ChoiceEvaluator | TokenEvaluator | GenerationEvaluator


def make_evaluator(
    experiment: Experiment,
    graphdef: nnx.GraphDef[Any],
    base: nnx.State,
    profile: nnx.State,
    rows: Sequence[dict[str, Any]],
) -> Evaluator:
    """Returns the evaluator of the task's metric on some rows: (adapter, p [R]) -> verdicts [items] bool.

    Args:
      experiment: the experiment.
      graphdef, base, profile: the trees of `mlora_jax.split`, in evaluation mode.
      rows: the rows to measure on.
    """
    config, data = experiment.config, experiment.data
    shapes: dict[str, Any] = dict(
        max_length=config.data.max_length,
        batch_size=config.evaluation.batch_size,
        pad_multiple=config.data.pad_multiple,
        mesh=experiment.mesh,
    )
    if data.task.metric in SCORED:
        scorer = Scorer(graphdef, base, profile, chunk=config.train.loss_chunk, **shapes)
        return SCORED[data.task.metric](scorer, rows, experiment.tokenizer, boundary=data.boundary)
    # As the harness does, a long prompt makes room for its answer.
    room = experiment.model.config.max_position_embeddings - config.evaluation.max_new_tokens
    shapes["max_length"] = min(config.data.max_length, room)
    return GenerationEvaluator(
        graphdef,
        base,
        profile,
        rows,
        experiment.tokenizer,
        boundary=data.boundary,
        task=data.task,
        max_new_tokens=config.evaluation.max_new_tokens,
        stop=sorted(experiment.tokenizer.eos_ids),
        settings=experiment.generation_settings,
        **shapes,
    )


def make_validation_loss(
    experiment: Experiment, graphdef: nnx.GraphDef[Any], base: nnx.State, profile: nnx.State
) -> Callable[[Any, jax.Array], float]:
    """Returns the validation loss: (adapter, p [R]) -> nats per answer token on the validation rows.

    Args:
      experiment: the experiment.
      graphdef, base, profile: the trees of `mlora_jax.split`, in evaluation mode.
    """
    config, examples, mesh = experiment.config, experiment.validation.examples, experiment.mesh
    shards = shards_of(mesh, EVALUATED)
    size = -(-config.evaluation.batch_size // shards) * shards
    parts = [
        collate(examples[start : start + size], batch_size=size, pad_multiple=config.data.pad_multiple)
        for start in range(0, len(examples), size)
    ]
    answers = sum(part["weights"].sum() for part in parts)
    # [S, B / S, ...]
    batches = [{name: x.reshape(shards, -1, x.shape[-1]) for name, x in part.items()} for part in parts]
    batches = [put_rows(batch, mesh, 0, over=EVALUATED) for batch in batches]

    @jax.jit
    def total(base, adapter, p, batch):
        values = set_profile(profile, p)
        one = lambda part: answer_loss(  # noqa: E731
            graphdef, base, adapter, values, part, chunk=config.train.loss_chunk
        )
        if mesh is None:
            return one(jax.tree.map(lambda x: x[0], batch))
        return jnp.sum(jax.vmap(one, spmd_axis_name=EVALUATED)(batch))

    def mean(adapter, p):
        adapter, p = put_weights(adapter, mesh), put_replicated(p, mesh)
        return sum(float(fetch(total(base, adapter, p, batch))) for batch in batches) / answers

    return mean

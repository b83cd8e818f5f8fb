"""One training step of one trial, as a pure function of arrays."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from mlora_jax.adapters import set_dropout_key, set_profile
from mlora_jax.core.optimizers import get_optimizer
from mlora_jax.core.policies import Draw
from mlora_jax.core.product import scale_leaves, scale_ranks
from mlora_jax.core.transforms import AfterUpdate, Numbers, StepRule, Transform
from mlora_jax.training.objective import AnswerBatch, answer_loss

PERTURB = 2**31 - 1  # the number by which the key of a perturbation differs from those of dropout
SHARDS = "shards"  # the name of the axis over shards of the rows


class Schedule(NamedTuple):
    """Traced numbers that may differ between trials of one executable.

    Attributes:
      learning_rate: peak learning rate, scalar.
      warmup_steps: steps of linear warm-up from zero, scalar.
      total_steps: the step at which the learning rate is zero, scalar.
    """

    learning_rate: Any
    warmup_steps: Any
    total_steps: Any


class TrialState(NamedTuple):
    """The state that a training step changes.

    Attributes:
      adapter: tree of factors, fp32 (or fp64) masters.
      optimizer: the optax state.
      step: int32 scalar, the number of finished steps.
      finite: bool scalar. It becomes False at the first step whose loss, gradient or new adapter is not finite. Such a
        trial is frozen: adapter, optimizer and step stay what they were before that step.
      stopped: bool scalar; True freezes a trial that has been trained enough.
    """

    adapter: Any
    optimizer: Any
    step: jax.Array
    finite: jax.Array
    stopped: jax.Array


def learning_rate_at(schedule: Schedule, step: Any) -> jax.Array:
    """Returns the learning rate of a linear warm-up that is followed by a linear decay to zero.

    ``peak * step / warmup`` before the end of the warm-up, then ``peak * (total - step) / (total - warmup)``.

    Args:
      schedule: the peak and the lengths.
      step: the number of finished steps.

    Source: `get_linear_schedule_with_warmup` of Hugging Face transformers.

    >>> [float(learning_rate_at(Schedule(1.0, 2, 6), step)) for step in (0, 1, 2, 4, 6)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    peak, warmup, total = (jnp.asarray(x, float) for x in schedule)
    step = jnp.asarray(step, float)
    rising = step / jnp.maximum(warmup, 1.0)
    falling = (total - step) / jnp.maximum(total - warmup, 1.0)
    return peak * jnp.where(step < warmup, rising, jnp.clip(falling, 0.0, 1.0))


def make_optimizer(
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    clip: float,
    kind: str = "adam",
    ranks: tuple[int, ...] = (),
) -> optax.GradientTransformation:
    """Returns AdamW or another optimizer without its learning rate, which the training step applies because it is data.

    Args:
      beta1: the decay of the first moment.
      beta2: the decay of the second moment.
      epsilon: the number that is added to the root of the second moment.
      weight_decay: the decoupled weight decay, which is multiplied by the learning rate.
      clip: the largest global gradient norm; 0 turns clipping off.
      kind: a key of `mlora_jax.core.optimizers.OPTIMIZERS`.
      ranks: S, for optimizers that work block by block.

    Raises:
      ValueError: the kind is unknown.
    """
    row, numbers = get_optimizer(kind), Numbers(beta1, beta2, epsilon, clip, tuple(ranks))
    decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
    if row.instead is not None:
        return optax.chain(_transformation(row.instead(numbers)), decay)
    parts = [optax.clip_by_global_norm(clip) if clip else optax.identity()]
    parts += [] if row.before is None else [_transformation(row.before(numbers))]
    return optax.chain(*parts, optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon), decay)


def _transformation(transform: Transform) -> optax.GradientTransformation:
    return optax.GradientTransformation(*cast("Any", transform))


def init_state(adapter: Any, optimizer: optax.GradientTransformation) -> TrialState:
    """Returns the state before the first step."""
    no = jnp.zeros((), bool)
    return TrialState(adapter, optimizer.init(adapter), jnp.zeros((), jnp.int32), finite=~no, stopped=no)


class PackedRows(NamedTuple):
    """The rows of one trial's step. The arrays are described at `mlora_jax.data.packing.packed_arrays`.

    Attributes:
      tokens: [P, b, T] int32.
      examples: [P, b, T] int32, the number of the token's example in the step, -1 for padding.
      positions: [P, b T] int32.
      targets: [P, b T] int32.
      weights: [P, b T] float32.
    """

    tokens: jax.Array
    examples: jax.Array
    positions: jax.Array
    targets: jax.Array
    weights: jax.Array


class Passes(NamedTuple):
    """The passes over the rows of a step, which all trials and shards have in common.

    Attributes:
      passes: int32 [number of widths], the number of passes of each width; or Python integers.
      answers: int32 [P], the largest number of answers in each pass; or one Python integer for all passes.
    """

    passes: Any
    answers: Any


def train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    chunk: int,
    widths: Sequence[int],
    micro_batch: int,
    base: Any,
    profile: Any,
    state: TrialState,
    rows: PackedRows,
    plan: Passes,
    draw: Draw,
    schedule: Schedule,
    dropout_key: jax.Array,
    *,
    rule: StepRule = StepRule(),  # noqa: B008 - it is immutable
    sharded: bool = False,
) -> tuple[TrialState, dict[str, jax.Array]]:
    """Takes one optimizer step on packed rows with N profiles each.

    The loss is the mean over the answer tokens of all rows and the weighted mean over the N profiles. How the examples
    lie in rows changes the cost and not the result. The function is pure: `jax.jit` takes it with the first five
    arguments static, and `jax.vmap` maps it over trials.

    Args:
      graphdef: the graph definition of the adapted decoder in training mode.
      optimizer: the optimizer that `make_optimizer` returned.
      chunk: how many answer positions have logits at one time.
      widths: the widths of the rows in falling order, at most T.
      micro_batch: B, the number of examples of a micro-batch.
      base: the frozen tree.
      profile: the profile tree; its values are replaced by the draw's.
      state: the adapter, the optimizer state and the step.
      rows: the rows.
      plan: the passes over the rows.
      draw: profiles [M, N, E, R] with E one or B, update_mask [R], column_rates [R], loss_weights [N], leaf_rates and
        strength. Example number m B + e of the step gets the profile of micro-batch m, and the one of e if every
        example has its own.
      schedule: the learning rate and the lengths.
      dropout_key: the trial's `jax.random.key` for dropout, folded with the step; unused without dropout.
      rule: the functions of the phase's update rule, `mlora_jax.core.Update.rule`.
      sharded: whether the step is mapped over shards of the examples by an axis named `SHARDS`. Gradients are summed
        over this axis once, after all rows, and the result is the same in every shard.

    Returns:
      The next state, and a dict of scalars: loss (nats per answer token), gradient_norm (before clipping),
      learning_rate and finite (bool).
    """
    total = functools.partial(jax.lax.psum, axis_name=SHARDS) if sharded else lambda tree: tree
    answers = jnp.maximum(total(jnp.sum(rows.weights)), 1.0)
    count = draw.profiles.shape[1]
    key = jax.random.fold_in(dropout_key, state.step)
    perturbing_key = jax.random.fold_in(key, PERTURB)  # the same in all shards
    key = jax.random.fold_in(key, jax.lax.axis_index(SHARDS)) if sharded else key

    def loss_under(adapter, part: PackedRows, found, p, weight, key):
        adapter = adapter if rule.perturb is None else rule.perturb(adapter, perturbing_key)
        p, per_token = _profiles_of(p, part.examples, micro_batch, per_example=draw.per_example)
        values = set_dropout_key(set_profile(profile, p, per_example=per_token), key)
        batch = AnswerBatch(tokens=part.tokens, positions=part.positions, targets=part.targets, weights=part.weights)
        texts = dict(segment_ids=part.examples, answers=found)
        nats = answer_loss(graphdef, base, adapter, values, batch, chunk=chunk, **texts)
        return nats * (weight / answers).astype(nats.dtype)

    def add_pass(width, first, number, carry):
        part = _rows_of_pass(rows, first + number, width)
        own = jax.random.fold_in(key, first + number)
        xs = draw.profiles.swapaxes(0, 1), draw.loss_weights, jax.random.split(own, count)  # profiles [N, M, E, R]

        def add_profile(carry, x):
            gradient = jax.value_and_grad(loss_under)
            found = plan.answers if isinstance(plan.answers, int) else plan.answers[first + number]
            loss, gradient = gradient(state.adapter, part, found, *x)
            return jax.tree.map(jnp.add, carry, (loss.astype(carry[0].dtype), gradient)), None

        if count == 1:
            return add_profile(carry, jax.tree.map(lambda x: x[0], xs))[0]
        return jax.lax.scan(add_profile, carry, xs)[0]

    carry, first = (jnp.zeros((), float), jax.tree.map(jnp.zeros_like, state.adapter)), 0
    for index, width in enumerate(widths):
        carry = jax.lax.fori_loop(0, plan.passes[index], functools.partial(add_pass, width, first), carry)
        first = first + plan.passes[index]
    loss, gradient = total(carry)

    gradient = scale_ranks(gradient, draw.update_mask)
    rate = learning_rate_at(schedule, state.step)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.adapter)
    # A masked column keeps momentum from the steps in which it could move, so its learning rate here must be 0.
    updates = jax.tree.map(lambda u: -rate.astype(u.dtype) * u, scale_ranks(updates, draw.column_rates))
    updates = updates if draw.leaf_rates is None else scale_leaves(updates, draw.leaf_rates)
    adapter = optax.apply_updates(state.adapter, updates)
    if rule.proximal is not None:
        progress = (state.step + 1) / jnp.maximum(jnp.asarray(schedule.total_steps, float), 1.0)
        strength = 0.0 if draw.strength is None else draw.strength
        adapter = rule.proximal(adapter, AfterUpdate(strength, jnp.minimum(progress, 1.0), rate, optimizer_state))
    norm = optax.tree.norm(gradient)
    # The adapter is checked too, because no later step would notice that the last update broke it.
    whole = functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(adapter)])
    finite = state.finite & (state.stopped | (jnp.isfinite(loss) & jnp.isfinite(norm) & whole))
    going = finite & ~state.stopped
    adapter, optimizer_state, step = jax.tree.map(
        lambda new, old: jnp.where(going, new, old),
        (adapter, optimizer_state, state.step + 1),
        (state.adapter, state.optimizer, state.step),
    )
    metrics = {"loss": loss, "gradient_norm": norm, "learning_rate": rate, "finite": finite}
    return TrialState(adapter, optimizer_state, step, finite, state.stopped), metrics


def _rows_of_pass(rows: PackedRows, number: jax.Array, width: int) -> PackedRows:
    """Returns the rows of a pass: tokens and examples [b, width], positions, targets and weights [b width]."""
    part = PackedRows._make(jax.lax.dynamic_index_in_dim(x, number, keepdims=False) for x in rows)
    answers = len(part.tokens) * width
    tokens, examples = part.tokens[:, :width], part.examples[:, :width]
    return PackedRows(tokens, examples, *(x[:answers] for x in (part.positions, part.targets, part.weights)))


def _profiles_of(p: jax.Array, examples: jax.Array, micro_batch: int, *, per_example: bool) -> tuple[jax.Array, bool]:
    """Returns the profiles of the tokens of a pass.

    Args:
      p: [M, E, R], the profiles of all micro-batches.
      examples: int32 [b, T], the number of the token's example in the step; -1 for padding, which has a zero profile.
      micro_batch: B, the number of examples of a micro-batch.
      per_example: whether every example has a profile of its own.

    Returns:
      (profile, whether it is one per token): [b, T, R] and true, or [R] and false where all tokens share one.
    """
    if not per_example and len(p) == 1:
        return p[0, 0], False
    each = p.reshape(-1, p.shape[-1])
    number = examples if per_example else examples // micro_batch
    return jnp.take(each, jnp.where(examples < 0, len(each), number), axis=0, mode="fill", fill_value=0), True

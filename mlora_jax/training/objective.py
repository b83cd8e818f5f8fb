"""The loss: cross-entropy over answer tokens in chunks, whose gradient is computed together with the loss.

Logits exist for one chunk of answer positions at a time. Each chunk's gradient with respect to its hidden states
(and an adapted output head) is computed immediately, so that nothing of size [tokens, vocabulary] is kept for a
backward pass and no logit is computed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx

from mlora_jax.adapters import AdapterParam, RankProfile, fold_where_cheaper


class AnswerBatch(TypedDict):
    """One micro-batch: B rows of T tokens with up to A answer tokens each. A step stacks M micro-batches.

    Attributes:
      tokens: [B, T] int32, right-padded.
      positions: [B, A] int32, the index whose hidden state predicts the answer token. If `positions`, `targets` and
        `weights` have the shape [A], these are positions in the whole batch, with its rows one after the other.
      targets: [B, A] int32, the answer token.
      weights: [B, A] float32, 1 for an answer token, 0 for padding.
    """

    tokens: jax.Array
    positions: jax.Array
    targets: jax.Array
    weights: jax.Array


def token_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the log-probabilities of targets [...] under logits [..., V], in the dtype of the logits."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _is_likeliest(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns whether targets [...] are the first of the largest logits [..., V].

    On a CPU this is much faster than `argmax`.
    """
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    numbers = jnp.expand_dims(jnp.arange(logits.shape[-1]), range(targets.ndim))
    earlier = numbers < targets[..., None]
    return ~jnp.any(~(logits <= chosen) | (earlier & (logits == chosen)), axis=-1)


def answer_loss(
    graphdef: Any,
    base: Any,
    adapter: Any,
    profile: Any,
    batch: AnswerBatch,
    *,
    chunk: int,
    segment_ids: jax.Array | None = None,
    answers: jax.Array | None = None,
) -> jax.Array:
    """Returns the sum over answer tokens of weight times negative log-likelihood, in nats.

    The loss is differentiable with respect to `adapter`, including an adapted `lm_head`, and to profiles. For
    `lm_head`, it is differentiable with respect to a profile per example or token only.

    Args:
      graphdef: the graph definition; it and the next three are what `mlora_jax.split` returned for an adapted
        `Decoder`.
      base: the frozen tree.
      adapter: the trained tree.
      profile: the profile tree, with one profile, or one per example [B, R] or token [B, T, R] (`set_profile`).
      batch: one micro-batch.
      chunk: how many answer positions have logits at one time, at least 1.
      segment_ids: integers [B, T], for rows that hold several texts; see `Decoder.hidden`.
      answers: an int32 scalar or a Python integer, how many of the positions count, which are the first ones of a batch
        whose positions have the shape [A]; the logits of the others are not computed. None: all positions count.

    Returns:
      A float32 scalar (float64 for a float64 model).

    Raises:
      ValueError: the shape of a profile per example or token does not fit the batch.
    """
    model = nnx.merge(graphdef, base, adapter, profile)
    states = _answer_states(model, batch, segment_ids=segment_ids)
    chunks = [_in_chunks(x, chunk) for x in (states, batch["targets"].reshape(-1), batch["weights"].reshape(-1))]
    graphdef, head, rest, profiles = _split_head(model, batch, chunk)
    size = chunks[0].shape[1]
    count = len(chunks[0]) if answers is None else (answers + size - 1) // size
    with jax.named_scope("head_and_loss"):
        return _chunked_loss(graphdef, head, jax.lax.stop_gradient(rest), profiles, count, *chunks)


def answer_scores(
    graphdef: Any,
    base: Any,
    adapter: Any,
    profile: Any,
    batch: AnswerBatch,
    *,
    chunk: int,
    layout: Mapping[str, Any] | None = None,
) -> tuple[jax.Array, ...]:
    """Returns how likely each answer token is, and whether it is the likeliest token.

    Args:
      graphdef, base, adapter, profile, batch, chunk: as `answer_loss`.
      layout: further arguments of `Decoder.hidden`, for rows that hold several texts.

    Returns:
      The log-likelihoods in nats, and whether the target is the first of the largest logits, both in the shape of the
      targets. Padding gets values too.
    """
    model = fold_where_cheaper(nnx.merge(graphdef, base, adapter, profile))
    targets = batch["targets"].reshape(-1)
    chunk = -(-targets.size // -(-targets.size // chunk))  # chunks of even size need little padding in the last one
    chunks = [_in_chunks(x, chunk) for x in (_answer_states(model, batch, **(layout or {})), targets)]
    graphdef, head, rest, profiles = _split_head(model, batch, chunk)

    def one(xs):
        profiles, hidden, targets = xs
        logits = nnx.merge(graphdef, head, rest, profiles).head(hidden)
        return token_log_likelihood(logits, targets), _is_likeliest(logits, targets)

    shape = batch["targets"].shape
    return tuple(
        values.reshape(-1)[: batch["targets"].size].reshape(shape) for values in jax.lax.map(one, (profiles, *chunks))
    )


def _split_head(model, batch: AnswerBatch, chunk: int) -> tuple:
    """Splits a model at its head.

    Returns:
      (graphdef, factors of the head, all else, profiles of the head that differ between positions, in chunks).
    """

    def differs(path, node):  # a profile [B, R] or [B, T, R] must be gathered at the positions of each chunk
        return isinstance(node, RankProfile) and "lm_head" in path and node[...].ndim > 1

    def gather(p):
        rows = batch["tokens"].shape
        if p.shape[:-1] != rows[: p.ndim - 1]:
            raise ValueError(f"the profile of lm_head has shape {p.shape}, but the batch has {rows} tokens")
        if p.ndim == 2:
            p = jnp.broadcast_to(p[:, None], (*rows, p.shape[-1]))
        return _in_chunks(_at_answers(p, batch), chunk)  # [chunks, chunk, R]

    factors = nnx.All(AdapterParam, nnx.PathContains("lm_head"))
    graphdef, head, profiles, rest = nnx.split(model, factors, differs, ...)
    return graphdef, head, rest, jax.tree.map(gather, profiles)


def _answer_states(model, batch: AnswerBatch, **layout) -> jax.Array:
    return _at_answers(model.hidden(batch["tokens"], **layout), batch)


def _at_answers(x: jax.Array, batch: AnswerBatch) -> jax.Array:
    """Gathers x [B, T, D] at the answer positions into [B A, D], or into [A, D] for positions of the whole batch."""
    if batch["positions"].ndim == 1:
        return x.reshape(-1, x.shape[-1])[batch["positions"]]
    return jnp.take_along_axis(x, batch["positions"][..., None], axis=1).reshape(-1, x.shape[-1])


def _in_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """Reshapes x [N, ...] into [chunks, chunk, ...], padded with zeros at the end."""
    chunk = min(chunk, len(x))
    x = jnp.pad(x, [(0, -len(x) % chunk)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])


def _chunk_loss(graphdef, head, rest, profiles, hidden, targets, weights) -> jax.Array:
    logits = nnx.merge(graphdef, head, rest, profiles).head(hidden)  # [chunk, V]
    return -jnp.sum(weights.astype(logits.dtype) * token_log_likelihood(logits, targets))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(graphdef, head, rest, profiles, count, hidden, targets, weights) -> jax.Array:
    """Returns the loss over the first `count` chunks.

    hidden is [chunks, chunk, D], targets and weights are [chunks, chunk], and profiles are [chunks, chunk, R].
    """
    xs = profiles, hidden, targets, weights

    def add(index, loss):
        return loss + _chunk_loss(graphdef, head, rest, *jax.tree.map(lambda x: x[index], xs))

    return jax.lax.fori_loop(0, count, add, jnp.zeros((), jax.eval_shape(lambda: add(0, 0.0)).dtype))


def _forward(graphdef, head, rest, profiles, count, hidden, targets, weights):
    gradient = jax.value_and_grad(functools.partial(_chunk_loss, graphdef), argnums=(0, 2, 3))
    xs = profiles, hidden, targets, weights

    def add(index, carry):
        loss, d_head, d_others = carry
        more, (more_head, *others) = gradient(head, rest, *jax.tree.map(lambda x: x[index], xs))
        put = lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part.astype(x.dtype), index, 0)  # noqa: E731
        return loss + more, jax.tree.map(jnp.add, d_head, more_head), jax.tree.map(put, d_others, tuple(others))

    dtype = jax.eval_shape(lambda: gradient(head, rest, *jax.tree.map(lambda x: x[0], xs))[0]).dtype
    start = jnp.zeros((), dtype), *jax.tree.map(jnp.zeros_like, (head, (profiles, hidden)))
    loss, d_head, (d_profiles, d_hidden) = jax.lax.fori_loop(0, count, add, start)
    return loss, (d_head, d_profiles, d_hidden)


def _backward(graphdef, residuals, g):
    d_head, d_profiles, d_hidden = jax.tree.map(lambda x: (x * g).astype(x.dtype), residuals)
    return d_head, None, d_profiles, None, d_hidden, None, None


_chunked_loss.defvjp(_forward, _backward)

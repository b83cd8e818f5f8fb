"""The loss: cross-entropy over answer tokens, in chunks, its gradient formed while the loss is.

Logits exist for one chunk of answer positions at a time. Each chunk's gradient with respect to its hidden states
(and an adapted output head) is taken at once, so that nothing of size [tokens, vocabulary] is ever kept for a
backward pass and no logit is computed twice.
"""

from __future__ import annotations

import functools
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx

from mlora_jax.adapt import AdapterParam


class AnswerBatch(TypedDict):
    """One micro-batch. B rows of T tokens with up to A answer tokens each; a step stacks M of them in front.

    Attributes:
      tokens: [B, T] int32, right-padded.
      positions: [B, A] int32, the index whose hidden state predicts the answer token.
      targets: [B, A] int32, the answer token.
      weights: [B, A] float32, 1 for an answer token, 0 for padding.
    """

    tokens: jax.Array
    positions: jax.Array
    targets: jax.Array
    weights: jax.Array


def token_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probabilities of targets [...] under logits [..., V], in the dtype of the logits."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def answer_loss(graphdef, base, adapter, profile, batch: AnswerBatch, *, chunk: int) -> jax.Array:
    """Sum over answer tokens of weight times negative log-likelihood, in nats.

    Differentiable with respect to `adapter`; factors of an adapted `lm_head` get their gradient too.

    Args:
      graphdef: with the next three, what `mlora_jax.split` returned for an adapted `Decoder`.
      base: frozen tree.
      adapter: trained tree.
      profile: profile tree.
      batch: one micro-batch.
      chunk: how many answer positions have logits at one time, at least 1.

    Returns:
      float32 scalar (float64 for a float64 model).
    """
    model = nnx.merge(graphdef, base, adapter, profile)
    hidden = _answer_states(model, batch)
    graphdef, head, rest = nnx.split(model, nnx.All(AdapterParam, nnx.PathContains("lm_head")), ...)
    chunks = [_in_chunks(x, chunk) for x in (hidden, batch["targets"], batch["weights"])]
    return _chunked_loss(graphdef, head, jax.lax.stop_gradient(rest), *chunks)


def answer_log_likelihoods(graphdef, base, adapter, profile, batch: AnswerBatch, *, chunk: int) -> jax.Array:
    """Log-likelihood in nats of every answer token, [B, A]; arguments as `answer_loss`. Padding gets a value too."""
    model = nnx.merge(graphdef, base, adapter, profile)
    chunks = [_in_chunks(x, chunk) for x in (_answer_states(model, batch), batch["targets"])]
    values = jax.lax.map(lambda xs: token_log_likelihood(model.head(xs[0]), xs[1]), tuple(chunks))
    return values.reshape(-1)[: batch["targets"].size].reshape(batch["targets"].shape)


def _answer_states(model, batch: AnswerBatch) -> jax.Array:
    hidden = model.hidden(batch["tokens"])  # [B, T, D]
    return jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1)  # [B, A, D]


def _in_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, A, ...] as [chunks, chunk, ...], zeros at the end."""
    x = x.reshape(-1, *x.shape[2:])
    chunk = min(chunk, len(x))
    x = jnp.pad(x, [(0, -len(x) % chunk)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])


def _chunk_loss(graphdef, head, rest, hidden, targets, weights) -> jax.Array:
    logits = nnx.merge(graphdef, head, rest).head(hidden)  # [chunk, V]
    return -jnp.sum(weights.astype(logits.dtype) * token_log_likelihood(logits, targets))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(graphdef, head, rest, hidden, targets, weights) -> jax.Array:
    """The loss over hidden [chunks, chunk, D], targets and weights [chunks, chunk]."""
    losses = jax.lax.map(lambda xs: _chunk_loss(graphdef, head, rest, *xs), (hidden, targets, weights))
    return jnp.sum(losses)


def _forward(graphdef, head, rest, hidden, targets, weights):
    gradient = jax.value_and_grad(functools.partial(_chunk_loss, graphdef), argnums=(0, 2))

    def one(head_gradient: Any, xs):
        loss, (d_head, d_hidden) = gradient(head, rest, *xs)
        return jax.tree.map(jnp.add, head_gradient, d_head), (loss, d_hidden)

    d_head, (losses, d_hidden) = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, head), (hidden, targets, weights))
    return jnp.sum(losses), (d_head, d_hidden)


def _backward(graphdef, residuals, g):
    d_head, d_hidden = jax.tree.map(lambda x: (x * g).astype(x.dtype), residuals)
    return d_head, None, d_hidden, None, None


_chunked_loss.defvjp(_forward, _backward)

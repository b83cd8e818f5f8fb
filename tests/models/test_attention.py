"""Attention against torch's, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mlora_jax.models import attention
from mlora_jax.models.attention import Spans, attend, attend_cached


def inputs(batch, queries, keys, heads, groups, features, dtype, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, queries, heads, features), *2 * [(batch, keys, groups, features)]]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def expected(arrays, visible):
    """Outputs, and gradients of the sum of their squares."""
    query, key, value = (torch.from_numpy(array).requires_grad_() for array in arrays)
    heads = query.shape[2] // key.shape[2]
    key_, value_ = (x.repeat_interleave(heads, dim=2).transpose(1, 2) for x in (key, value))
    scores = query.transpose(1, 2) @ key_.transpose(2, 3) / query.shape[-1] ** 0.5
    weights = torch.softmax(scores.masked_fill(~torch.from_numpy(np.array(visible)), -torch.inf), dim=-1)
    found = (weights @ value_).transpose(1, 2)
    (found**2).sum().backward()
    return [found.detach().numpy(), *(x.grad.numpy() for x in (query, key, value))]


def outputs(arrays, mask, causal):
    def loss(*arrays):
        found = attend(*arrays, mask, causal)
        return jnp.sum(found**2), found

    (_, found), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [found, *gradients]


# Blocks of 96 queries: within one, of several, and with an end that is no whole block.
@pytest.mark.parametrize("little", [0, 2**30], ids=["blocks", "at once"])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(40, 40, True), (200, 200, True), (100, 130, False)])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(monkeypatch, little, queries, keys, causal, masked):
    monkeypatch.setattr(attention, "LITTLE", little)
    arrays = inputs(3, queries, keys, 6, 2, 8, np.float32)
    visible = np.tri(queries, keys, dtype=bool) if causal else np.ones((queries, keys), bool)
    mask = np.random.default_rng(1).random((3, 1, queries, keys)) < 0.7
    mask[..., 0] = True  # every query sees a key
    visible = np.broadcast_to(visible & mask if masked else visible, (3, 1, queries, keys))
    found = outputs(arrays, jnp.asarray(mask) if masked else None, causal)
    for mine, other in zip(found, expected(arrays, visible), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("little", [0, 2**30])
def test_half_precision_keeps_its_dtype(monkeypatch, little):
    monkeypatch.setattr(attention, "LITTLE", little)
    arrays = inputs(2, 120, 120, 4, 2, 8, np.float32)
    found = attend(*(jnp.asarray(array, jnp.bfloat16) for array in arrays), None, True)
    assert found.dtype == jnp.bfloat16
    visible = np.broadcast_to(np.tri(120, dtype=bool), (2, 1, 120, 120))
    np.testing.assert_allclose(found.astype(np.float32), expected(arrays, visible)[0], atol=0.04)


def test_no_scores_are_kept_for_the_backward_pass(monkeypatch):
    """On a CPU; elsewhere it is the library's affair."""
    monkeypatch.setattr(attention, "LITTLE", 0)
    arrays = inputs(4, 256, 256, 4, 4, 8, np.float32)
    step = jax.jit(jax.grad(lambda *arrays: jnp.sum(attend(*arrays, None, True)), argnums=(0, 1, 2)))
    memory = step.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert memory < 4 * 4 * 256 * 256 * 4  # bytes of all scores


@pytest.mark.parametrize("queries", [1, 3])
def test_keys_and_values_in_the_layout_of_a_cache(queries):
    query, key, value = inputs(3, queries, 50, 6, 2, 8, np.float32)
    mask = np.random.default_rng(1).random((3, 1, queries, 50)) < 0.7
    found = jax.jit(attend_cached)(query, key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3), mask)
    expected_ = expected((query, key, value), np.broadcast_to(mask, (3, 1, queries, 50)))[0]
    np.testing.assert_allclose(found, expected_, atol=2e-5, rtol=1e-4)


def test_attention_within_spans(monkeypatch):
    """Widths that are more than the texts, also where such a width would go beyond the row."""
    monkeypatch.setattr(attention, "LITTLE", 0)
    lengths = ((60, 41, 38, 12, 9), (64, 64, 30))  # of texts; the second row is full, but for two tokens
    starts = {64: np.full((2, 3), -1, np.int32), 40: np.full((2, 3), -1, np.int32)}
    segments = np.zeros((2, 160), int)
    for row, texts in enumerate(lengths):
        begin = 0
        for number, length in enumerate(texts):
            places = starts[64 if length > 40 else 40][row]
            places[np.argmax(places < 0)] = begin
            segments[row, begin : begin + length] = number + 1
            begin += length
    mask = (segments[:, None, :, None] == segments[:, None, None]) & (np.random.default_rng(2).random((160, 160)) < 0.7)
    mask |= np.eye(160, dtype=bool)
    arrays = inputs(2, 160, 160, 6, 2, 8, np.float32)
    spans = Spans(tuple(map(jnp.asarray, starts.values())), tuple(starts))
    found = jax.jit(lambda *arrays: attend(*arrays, True, spans))(*arrays, jnp.asarray(mask))
    wanted = expected(arrays, mask & np.tri(160, dtype=bool))[0]
    np.testing.assert_allclose(found[segments > 0], wanted[segments > 0], atol=2e-5, rtol=1e-4)

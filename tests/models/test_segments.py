"""Attention within the texts of packed rows, against PyTorch on each text alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from mlora_jax.models import Decoder
from mlora_jax.models import attention as attention_module
from mlora_jax.models.segments import attend_in_segments
from tests.tiny import tiny_config


def expected(query, key, value, texts, cotangent, window=None):
    """Mixed values and gradients, text after text and head after head, by `scaled_dot_product_attention`."""
    made = [torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True) for x in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    parts, start = [], 0
    for length in texts:
        q, k, v = (x[start : start + length].transpose(0, 1) for x in made)
        k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
        at = torch.arange(length)
        seen = at[None] <= at[:, None]
        if window:
            seen &= at[None] > at[:, None] - window
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(0, 1))
        start += length
    mixed = torch.cat(parts)
    (mixed * torch.tensor(np.asarray(cotangent[: len(mixed)]), dtype=torch.float64)).sum().backward()
    return mixed.detach().numpy(), [x.grad.numpy() for x in made]


def draw(length, heads, groups, features, dtype, seed=0):
    generator = np.random.default_rng(seed)
    shapes = (
        (length, heads, features),
        (length, groups, features),
        (length, groups, features),
        (length, heads, features),
    )
    return [jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes]


def first_keys_of(texts, window=None):
    starts = np.concatenate([np.full(length, sum(texts[:at])) for at, length in enumerate(texts)])
    if window:
        starts = np.maximum(starts, np.arange(len(starts)) - window + 1)
    return jnp.asarray(starts, jnp.int32)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("texts", "heads", "groups"),
    [((64,), 2, 2), ((5, 70, 1, 20), 4, 2), ((100, 60), 6, 2), ((16, 16), 3, 1), ((130, 30, 96), 2, 1)],
)
@pytest.mark.parametrize("window", [None, 7])
def test_texts_are_attended_alone(dtype, texts, heads, groups, window):
    with jax.enable_x64(dtype == "float64"):
        query, key, value, cotangent = draw(sum(texts), heads, groups, 8, dtype)
        starts = first_keys_of(texts, window)

        def mixed(*parts):
            return attend_in_segments(*(part[None] for part in parts), starts[None])[0]

        found, pull = jax.vjp(jax.jit(mixed), query, key, value)
        gradients = pull(cotangent)
        values, expected_gradients = expected(query, key, value, texts, cotangent, window)
        tolerance = dict(atol=1e-5 if dtype == "float32" else 1e-12)
        np.testing.assert_allclose(found, values, **tolerance)
        for one, other in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(one, other, **tolerance)


def test_rows_and_mapped_axes_have_texts_of_their_own():
    rows = [(30, 18), (48,), (1, 40, 7)]
    parts = [draw(48, 4, 2, 8, "float32", seed) for seed in range(3)]
    query, key, value, cotangent = (jnp.stack(each) for each in zip(*parts, strict=True))
    starts = jnp.stack([first_keys_of(texts) for texts in rows])
    together = attend_in_segments(query, key, value, starts)
    mapped = jax.vmap(lambda *one: attend_in_segments(*(x[None] for x in one))[0])(query, key, value, starts)
    for at, texts in enumerate(rows):
        values, _ = expected(query[at], key[at], value[at], texts, cotangent[at])
        np.testing.assert_allclose(together[at], values, atol=1e-5)
        np.testing.assert_allclose(mapped[at], values, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"sliding_window": 9, "sliding_layers": (True, True)}, {"sliding_window": 9, "sliding_layers": (True, False)}],
    ids=["full", "window", "mixed"],
)
@pytest.mark.parametrize("unroll", [False, True])
def test_a_decoder_computes_packed_texts_as_texts_alone(monkeypatch, changes, unroll):
    """Also where every batch has too few scores for the blocks of a CPU."""
    monkeypatch.setattr(attention_module, "LITTLE", 0)
    model = Decoder(tiny_config(**changes), rngs=nnx.Rngs(0))
    model.unroll = unroll
    generator = np.random.default_rng(0)
    texts = [generator.integers(3, 300, length) for length in (20, 33, 11)]
    tokens = np.concatenate(texts)[None]
    ids = np.concatenate([np.full(len(text), at) for at, text in enumerate(texts)])[None]
    found = model.hidden(jnp.asarray(tokens), segment_ids=jnp.asarray(ids))[0]
    start = 0
    for text in texts:
        alone = model.hidden(jnp.asarray(text)[None])[0]
        np.testing.assert_allclose(found[start : start + len(text)], alone, atol=2e-5)
        start += len(text)

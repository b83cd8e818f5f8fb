"""The TPU's attention kernel, interpreted on a CPU, against NumPy."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mlora_jax.models import attention, flash
from mlora_jax.models.flash import Flash, fits_flash, flash_attend

AXES = ("trial", "data", "fsdp", "tensor")


def inputs(batch=2, length=256, heads=4, groups=2, features=64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, heads, features), *2 * [(batch, length, groups, features)]]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def numpy_attention(query, key, value, cotangent, ids=None):
    """Output, and gradients of its product with the cotangent, in float64; `ids` [B, T] are those of texts."""
    query, key, value, cotangent = (x.astype(np.float64) for x in (query, key, value, cotangent))
    each = query.shape[2] // key.shape[2]
    wide_key, wide_value = (np.repeat(x, each, axis=2) for x in (key, value))
    length, scale = query.shape[1], 1 / np.sqrt(query.shape[-1])
    scores = np.einsum("bthd,bshd->bhts", query, wide_key) * scale
    seen = np.tri(length, dtype=bool)[None, None]
    if ids is not None:
        seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("bthd,bshd->bhts", cotangent, wide_value)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    gather = lambda x: x.reshape(*x.shape[:2], key.shape[2], each, -1).sum(3)  # noqa: E731
    return (
        np.einsum("bhts,bshd->bthd", weights, wide_value),
        np.einsum("bhts,bshd->bthd", d_scores, wide_key),
        gather(np.einsum("bhts,bthd->bshd", d_scores, query)),
        gather(np.einsum("bhts,bthd->bshd", weights, cotangent)),
    )


def run(attend, arrays, cotangent):
    def loss(*arrays):
        found = attend(*arrays)
        return jnp.sum(found * cotangent), found

    (_, found), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return found, *gradients


@pytest.mark.parametrize(("groups", "length"), [(2, 256), pytest.param(4, 384, marks=pytest.mark.slow)])
def test_values_and_gradients(monkeypatch, groups, length):
    """In blocks of 128: some of them are behind every key that a query sees, some on the diagonal, some before it."""
    monkeypatch.setattr(flash, "BLOCKS", (128,))
    arrays = inputs(groups=groups, length=length)
    cotangent = np.random.default_rng(1).standard_normal(arrays[0].shape).astype(np.float32)
    found = run(functools.partial(flash_attend, interpret=True), arrays, cotangent)
    for mine, other in zip(found, numpy_attention(*arrays, cotangent), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5, rtol=1e-4)


def test_texts_of_packed_rows_do_not_see_each_other(monkeypatch):
    """Texts begin within blocks and at their edges, others in each row; by `attend`, as a step calls it."""
    monkeypatch.setattr(flash, "BLOCKS", (128,))
    monkeypatch.setattr(attention, "flash_attend", functools.partial(flash_attend, interpret=True))
    monkeypatch.setattr(Flash, "takes", lambda self, query, key: True)
    arrays = inputs()
    ids = np.stack([np.repeat([0, 1, 2], [100, 28, 128]), np.repeat([5, 3, -1], [1, 200, 55])]).astype(np.int32)
    starts = np.array([[np.argmax(row == each) for each in row] for row in ids], np.int32)
    segments = attention.Segments(jnp.asarray(ids), jnp.asarray(starts), windowed=False)
    mask = jnp.asarray(ids[:, None, :, None] == ids[:, None, None, :])
    cotangent = np.random.default_rng(1).standard_normal(arrays[0].shape).astype(np.float32)
    attend = lambda *parts: attention.attend(*parts, mask, True, flash=Flash(), segments=segments)  # noqa: E731
    for mine, other in zip(run(attend, arrays, cotangent), numpy_attention(*arrays, cotangent, ids), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5, rtol=1e-4)


def test_on_a_mesh_under_mapped_rows():
    """Rows mapped along the mesh, heads cut along `tensor`: what a training step does."""
    arrays = inputs(batch=2, length=128)
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(1, 2, 1, 2), AXES)
    cotangent = np.random.default_rng(1).standard_normal(arrays[0].shape).astype(np.float32)
    one = functools.partial(flash_attend, mesh=mesh, interpret=True)
    mapped = jax.vmap(one, spmd_axis_name=("data", "fsdp"))

    def attend(*arrays):
        return mapped(*(x[:, None] for x in arrays))[:, 0]

    found = run(attend, arrays, cotangent)
    for mine, other in zip(found, numpy_attention(*arrays, cotangent), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("queries", "keys", "dtype", "fits"),
    [
        (256, 256, jnp.bfloat16, True),
        (256, 256, jnp.float16, False),
        (200, 200, jnp.bfloat16, False),
        (128, 256, jnp.bfloat16, False),
    ],
)
def test_what_the_kernel_takes(queries, keys, dtype, fits):
    structures = (jax.ShapeDtypeStruct((1, length, 2, 64), dtype) for length in (queries, keys))
    assert fits_flash(*structures) == fits


@pytest.mark.parametrize(
    ("platform", "least", "length", "masked", "runs"),
    [
        ("tpu", 128, 128, False, True),
        ("tpu", 256, 128, False, False),
        ("tpu", None, 128, False, False),
        ("tpu", 128, 128, True, False),
        ("cpu", 128, 128, False, False),
    ],
)
def test_when_the_kernel_runs(monkeypatch, platform, least, length, masked, runs):
    """On TPUs, for long rows, without a mask; the means of other platforms else."""
    called = []
    monkeypatch.setattr(attention, "flash_attend", lambda query, *rest: called.append(rest) or query)
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)], object))
    query, key, value = (jnp.asarray(x) for x in inputs(length=length))
    mask = jnp.ones((2, 1, length, length), bool) if masked else None
    attention.attend(query, key, value, mask, True, flash=Flash(least, mesh))
    assert bool(called) == runs

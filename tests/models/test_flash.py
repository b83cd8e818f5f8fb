"""The TPU's attention kernel, interpreted on a CPU, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mlora_jax.models.flash import fits_flash, flash_attend

AXES = ("trial", "data", "fsdp", "tensor")


def inputs(batch=2, length=256, heads=4, groups=2, features=64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, heads, features), *2 * [(batch, length, groups, features)]]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def numpy_attention(query, key, value, cotangent):
    """Output, and gradients of its product with the cotangent, in float64."""
    query, key, value, cotangent = (x.astype(np.float64) for x in (query, key, value, cotangent))
    each = query.shape[2] // key.shape[2]
    wide_key, wide_value = (np.repeat(x, each, axis=2) for x in (key, value))
    length, scale = query.shape[1], 1 / np.sqrt(query.shape[-1])
    scores = np.einsum("bthd,bshd->bhts", query, wide_key) * scale
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
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


@pytest.mark.parametrize("groups", [2, 4])
def test_values_and_gradients(groups):
    arrays = inputs(groups=groups)
    cotangent = np.random.default_rng(1).standard_normal(arrays[0].shape).astype(np.float32)
    found = run(functools.partial(flash_attend, interpret=True), arrays, cotangent)
    for mine, other in zip(found, numpy_attention(*arrays, cotangent), strict=True):
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

"""The chunked loss against the plain one, and what its program must not contain."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax.adapt import adapt, split
from mlora_jax.models import Decoder
from mlora_jax.train.objective import answer_log_likelihoods, answer_loss
from tests.tiny import tiny_config

VOCABULARY = 331  # appears in no other shape


def make(*, tied, targets=("q_proj", "down_proj"), dtype=jnp.float32):
    config = tiny_config(vocab_size=VOCABULARY, tie_word_embeddings=tied)
    model = adapt(Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)), 3, targets, key=jax.random.key(1))
    graphdef, base, adapter, profile = split(model)
    keys = iter(jax.random.split(jax.random.key(2), 50))
    adapter = jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape, x.dtype), adapter)
    return graphdef, base, adapter, profile


def make_batch(rows=3, length=7, answers=4):
    generator = np.random.default_rng(0)
    return {
        "tokens": generator.integers(0, VOCABULARY, (rows, length)).astype(np.int32),
        "positions": generator.integers(0, length, (rows, answers)).astype(np.int32),
        "targets": generator.integers(0, VOCABULARY, (rows, answers)).astype(np.int32),
        "weights": generator.integers(0, 2, (rows, answers)).astype(np.float32),
    }


def plain_loss(graphdef, base, adapter, profile, batch):
    """All logits, autodiff."""
    logits = nnx.merge(graphdef, base, adapter, profile)(batch["tokens"])
    logits = jnp.take_along_axis(logits, batch["positions"][..., None], axis=1)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * batch["weights"])


@pytest.mark.parametrize(
    ("tied", "targets"), [(True, ("q_proj", "down_proj")), (False, ("v_proj",)), (False, ("lm_head", "o_proj"))]
)
def test_loss_and_gradient_equal_the_plain_ones(tied, targets):
    with jax.enable_x64(True):
        graphdef, base, adapter, profile = make(tied=tied, targets=targets, dtype=jnp.float64)
        batch = make_batch()
        plain = jax.jit(jax.value_and_grad(lambda a: 3.0 * plain_loss(graphdef, base, a, profile, batch)))(adapter)
        assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain[1])) > 0
        for chunk in (1, 5, 100):
            ours = jax.jit(
                jax.value_and_grad(lambda a, c=chunk: 3.0 * answer_loss(graphdef, base, a, profile, batch, chunk=c))
            )(adapter)
            for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
                np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-12)


def test_log_likelihoods_sum_to_the_loss():
    graphdef, base, adapter, profile = make(tied=True)
    batch = make_batch()
    values = jax.jit(lambda b: answer_log_likelihoods(graphdef, base, adapter, profile, b, chunk=5))(batch)
    loss = jax.jit(lambda b: answer_loss(graphdef, base, adapter, profile, b, chunk=7))(batch)
    np.testing.assert_allclose(-np.sum(values * batch["weights"]), loss, rtol=1e-5)


def test_padding_changes_nothing():
    graphdef, base, adapter, profile = make(tied=True)
    batch = make_batch()
    wider = {name: np.pad(value, ((0, 2), (0, 3))) for name, value in batch.items()}
    gradient = jax.jit(jax.grad(lambda a, b: answer_loss(graphdef, base, a, profile, b, chunk=5)))
    for left, right in zip(
        jax.tree.leaves(gradient(adapter, batch)), jax.tree.leaves(gradient(adapter, wider)), strict=True
    ):
        np.testing.assert_allclose(left, right, rtol=2e-4, atol=1e-5)


def shapes_with_vocabulary(program: str) -> set[tuple[int, ...]]:
    found = re.findall(r"(?:f32|bf16|tensor)[\[<]([0-9x,]+)", program)
    shapes = {tuple(int(n) for n in re.split("[x,]", shape) if n) for shape in found}
    return {shape for shape in shapes if VOCABULARY in shape}


@pytest.mark.parametrize("tied", [True, False])
def test_no_array_of_tokens_times_vocabulary(tied):
    """Compiled training program: with a vocabulary axis there are the embedding [V, D] and one chunk of logits."""
    graphdef, base, adapter, profile = make(tied=tied)
    batch = make_batch(rows=8, length=64, answers=32)

    def gradient(loss):
        return jax.jit(jax.grad(loss)).lower(adapter).compile().as_text()

    chunk = 16
    ours = gradient(lambda a: answer_loss(graphdef, base, a, profile, batch, chunk=chunk))
    sizes = {int(np.prod(shape)) // VOCABULARY for shape in shapes_with_vocabulary(ours)}
    assert sizes and max(sizes) <= 16  # D = 16 and chunk = 16
    plain = gradient(lambda a: plain_loss(graphdef, base, a, profile, batch))
    sizes = {int(np.prod(shape)) // VOCABULARY for shape in shapes_with_vocabulary(plain)}
    assert max(sizes) >= 8 * 32  # the check sees what it looks for

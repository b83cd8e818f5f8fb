"""The chunked loss against the plain one, and what its program must not contain."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax.adapters import adapt, set_profile, split
from mlora_jax.models import Decoder
from mlora_jax.training.objective import answer_loss, answer_scores
from tests.tiny import random_like, tiny_config

VOCABULARY = 331  # appears in no other shape


def make(*, tied, targets=("q_proj", "down_proj"), dtype=jnp.float32):
    config = tiny_config(vocab_size=VOCABULARY, tie_word_embeddings=tied)
    model = adapt(Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)), 3, targets, key=jax.random.key(1))
    graphdef, base, adapter, profile = split(model)
    return graphdef, base, random_like(adapter, seed=2, scale=0.3), profile


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


@pytest.mark.parametrize("per", ["example", "token"])
def test_a_profile_of_its_own_reaches_the_adapted_head_at_every_answer_position(per):
    """Also where a chunk has as many positions as there are examples."""
    with jax.enable_x64(True):
        graphdef, base, adapter, profile = make(tied=False, targets=("lm_head", "o_proj"), dtype=jnp.float64)
        batch = make_batch()
        shape = (3, 3) if per == "example" else (3, 7, 3)
        p = jax.random.uniform(jax.random.key(3), shape)
        profile = set_profile(profile, p, per_example=True)
        plain = jax.jit(jax.value_and_grad(lambda a: plain_loss(graphdef, base, a, profile, batch)))(adapter)
        for chunk in (3, 5, 100):
            loss = functools.partial(answer_loss, batch=batch, chunk=chunk)
            ours = jax.jit(jax.value_and_grad(lambda a, loss=loss: loss(graphdef, base, a, profile)))(adapter)
            for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
                np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-12)
            values, _ = answer_scores(graphdef, base, adapter, profile, batch, chunk=chunk)
            np.testing.assert_allclose(-np.sum(values * batch["weights"]), plain[0], rtol=1e-10)


def test_a_profile_of_another_batch_is_refused_at_the_head():
    graphdef, base, adapter, profile = make(tied=False, targets=("lm_head",))
    profile = set_profile(profile, jnp.ones((1, 3)), per_example=True)
    with pytest.raises(ValueError, match=r"profile of lm_head has shape \(1, 3\), but the batch has \(3, 7\) tokens"):
        answer_loss(graphdef, base, adapter, profile, make_batch(), chunk=3)


def test_log_likelihoods_sum_to_the_loss():
    graphdef, base, adapter, profile = make(tied=True)
    batch = make_batch()
    values = jax.jit(lambda b: answer_scores(graphdef, base, adapter, profile, b, chunk=5)[0])(batch)
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


def test_the_likeliest_is_the_first_of_the_largest_logits():
    graphdef, base, adapter, profile = make(tied=False)
    batch = make_batch()
    embedding = base["lm_head"]["kernel"][...]
    base["lm_head"]["kernel"][...] = jnp.concatenate([embedding[:, :4]] * 83, axis=1)[:, :VOCABULARY]  # many ties
    values = nnx.merge(graphdef, base, adapter, profile)(batch["tokens"])
    best = np.argmax(np.take_along_axis(np.asarray(values), batch["positions"][..., None], axis=1), axis=-1)
    for shift, expected in ((0, True), (4, False)):
        asked = {**batch, "targets": jnp.asarray(best + shift, jnp.int32)}
        likeliest = answer_scores(graphdef, base, adapter, profile, asked, chunk=5)[1]
        np.testing.assert_array_equal(likeliest, np.full(best.shape, expected))


def test_positions_of_the_whole_batch():
    graphdef, base, adapter, profile = make(tied=False, targets=("lm_head",))
    profile = set_profile(profile, jax.random.uniform(jax.random.key(3), (3, 3)), per_example=True)
    batch = make_batch()
    rows, length = batch["tokens"].shape
    flat = {name: batch[name].reshape(-1) for name in ("targets", "weights")} | {"tokens": batch["tokens"]}
    flat["positions"] = (batch["positions"] + length * np.arange(rows)[:, None]).reshape(-1)
    expected = answer_scores(graphdef, base, adapter, profile, batch, chunk=4)
    found = answer_scores(graphdef, base, adapter, profile, flat, chunk=4)
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, other.reshape(-1))

"""The start, the loss and the training of projections, against NumPy and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from transformers import LlamaForCausalLM

from mlora_jax.kv_cache import (
    Meter,
    cache_shape,
    cayley,
    draw_ranks,
    identity,
    orthogonality_error,
    principal_components,
    project,
    train_projections,
    uniform_ranks,
)
from mlora_jax.kv_cache.text import TextRows
from mlora_jax.kv_cache.training import make_step
from mlora_jax.models import Decoder, load_decoder
from tests.kv_cache.made import random_projections, random_ranks
from tests.oracles.torch_generate import one_thread
from tests.tiny import tiny_config, write_checkpoint

TRAIN = dict(
    steps=4, batch_size=4, accumulation=1, learning_rate=0.05, warmup_steps=1, beta1=0.9, beta2=0.98, weight_decay=0.0,
    clip=1.0, kl_weight=0.25, remat="none",
)  # fmt: skip
LEVELS = 3  # of heads with six features: no power of two


def text_rows(count=8, length=12, seed=0) -> TextRows:
    """Rows of two texts and some padding."""
    random = np.random.default_rng(seed)
    segments = np.repeat([[1, 2, 0]], [5, 5, 2], axis=1) * np.ones((count, 1), np.int32)
    return TextRows(random.integers(0, 40, (count, length)).astype(np.int32), segments.astype(np.int32))


@pytest.fixture(scope="module")
def model():
    return Decoder(tiny_config(vocab_size=40, num_layers=1, head_dim=6), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def trained(model):
    return train_projections(model, identity(model), text_rows(), TRAIN, levels=LEVELS, seed=0)


def distance(first, second) -> float:
    return max(float(np.abs(first.u_k - second.u_k).max()), float(np.abs(first.u_v - second.u_v).max()))


def test_cayley_is_the_formula():
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 5))
    skew = (x - x.swapaxes(-1, -2)) / 2
    expected = np.linalg.inv(np.eye(5) - skew) @ (np.eye(5) + skew)
    np.testing.assert_allclose(cayley(jnp.asarray(x, jnp.float32)), expected, rtol=0, atol=2e-6)
    assert orthogonality_error(cayley(jnp.asarray(30 * x, jnp.float32))) < 1e-5


def test_principal_components_are_those_of_the_keys_of_transformers(tmp_path):
    folder = write_checkpoint(tmp_path)
    model = load_decoder(folder)
    random = np.random.default_rng(0)
    tokens, lengths = random.integers(3, 300, (3, 10)).astype(np.int32), np.array([10, 4, 0], np.int32)
    found = principal_components(model, [(tokens[:2], lengths[:2]), (tokens[1:], np.array([0, 0], np.int32))])
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kept = {"k": [], "v": []}
    with one_thread(), torch.no_grad():
        for row, length in zip(tokens[:2], lengths, strict=False):
            cache = reference(torch.tensor(row[None, :length]), use_cache=True).past_key_values
            kept["k"].append(np.stack([layer.keys[0].numpy() for layer in cache.layers]))  # [L, KV, T, Hd]
            kept["v"].append(np.stack([layer.values[0].numpy() for layer in cache.layers]))
    for u, parts in ((found.u_k, kept["k"]), (found.u_v, kept["v"])):
        x = np.concatenate(parts, axis=2).astype(np.float64)
        centred = x - x.mean(axis=2, keepdims=True)
        covariance = centred.swapaxes(2, 3) @ centred / x.shape[2]
        turned = u.swapaxes(2, 3) @ covariance @ u
        variances = np.diagonal(turned, axis1=2, axis2=3)
        np.testing.assert_allclose(turned, variances[..., None] * np.eye(x.shape[3]), rtol=0, atol=1e-4)
        assert (np.diff(variances) <= 1e-5).all()
    np.testing.assert_allclose(found.mean_v, np.concatenate(kept["v"], axis=2).mean(axis=2), rtol=0, atol=1e-5)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_measured_loss_is_that_of_the_logits(model):
    rows, shape = text_rows(3), cache_shape(model)
    projections, ranks = random_projections(shape), random_ranks(shape)
    measured = Meter(model, projections, rows, batch_size=2)(ranks)  # the last batch is padded

    def logits(decoder):
        graphdef, state = nnx.split(decoder)
        run = jax.jit(lambda state: nnx.merge(graphdef, state)(rows.tokens, segment_ids=rows.segments))
        return log_softmax(np.asarray(run(state), np.float64))

    full, cut = logits(model), logits(project(model, projections, ranks))
    counted = [(b, t) for b in range(3) for t in (*range(4), *range(5, 9))]
    kl = np.mean([np.sum(np.exp(full[b, t]) * (full[b, t] - cut[b, t])) for b, t in counted])
    entropy = -np.mean([cut[b, t, rows.tokens[b, t + 1]] for b, t in counted])
    np.testing.assert_allclose(measured, (kl, entropy), rtol=1e-5)
    assert measured.divergence > 0.01 and measured.perplexity == pytest.approx(np.exp(entropy), rel=1e-5)


def test_ranks_are_drawn_from_the_grid_for_every_layer_and_head():
    drawn = np.stack([np.stack(draw_ranks(jax.random.key(n), (3, 2, 6), LEVELS)) for n in range(200)])
    assert set(drawn.ravel().tolist()) == {2, 4, 6}
    np.testing.assert_allclose([(drawn == rank).mean() for rank in (2, 4, 6)], 1 / 3, atol=0.04)
    flat = drawn.reshape(200, -1)
    assert np.abs(np.corrcoef(flat.T) - np.eye(12)).max() < 0.35  # each is a draw of its own


def test_only_the_bases_move_and_they_stay_orthogonal(model, trained):
    start = identity(model)
    assert distance(trained, start) > 0.01
    assert max(orthogonality_error(trained.u_k), orthogonality_error(trained.u_v)) < 1e-5
    np.testing.assert_array_equal(trained.mean_v, start.mean_v)


def test_training_lowers_the_loss_of_a_small_cache(model):
    rows, shape = text_rows(), cache_shape(model)
    start = identity(model)
    train = TRAIN | {"steps": 40}
    trained = train_projections(model, start, rows, train, levels=LEVELS, seed=0)
    before, after = (Meter(model, each, rows, batch_size=8) for each in (start, trained))
    for budget in (1 / 3, 2 / 3):
        ranks = uniform_ranks(budget, *shape)
        assert after(ranks).divergence < 0.8 * before(ranks).divergence
    assert after(uniform_ranks(1.0, *shape)).divergence < 1e-6


def test_one_executable_trains_at_all_ranks_and_its_loss_is_the_weighted_sum(model):
    rows = text_rows(4)
    start = random_projections(cache_shape(model))
    optimizer = optax.sgd(0.0)
    step, frozen = make_step(model, start, optimizer, levels=LEVELS, kl_weight=0.25)
    free = {name: jnp.zeros_like(jnp.asarray(start.u_k)) for name in "kv"}
    batch = [x.reshape(2, 2, -1) for x in rows]
    losses = []
    for seed in range(3):
        key = jax.random.key(seed)
        _, _, means = step(frozen, free, optimizer.init(free), key, *batch)
        assert float(means.loss) == pytest.approx(0.25 * float(means.divergence) + 0.75 * float(means.cross_entropy))
        parts = []
        for number in range(2):  # every micro-batch has ranks of its own
            ranks = draw_ranks(jax.random.fold_in(key, number), cache_shape(model), LEVELS)
            part = TextRows(*(x[2 * number : 2 * number + 2] for x in rows))
            parts.append(Meter(model, start, part, batch_size=2)(ranks))
        np.testing.assert_allclose(means[1:], np.mean(parts, axis=0), rtol=1e-5)
        losses.append(float(means.loss))
    assert len(set(losses)) == 3 and step._cache_size() == 1


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_is_computed_again_changes_nothing(model, trained, remat):
    again = train_projections(model, identity(model), text_rows(), TRAIN | {"remat": remat}, levels=LEVELS, seed=0)
    assert distance(again, trained) < 1e-5


CHANGES = {
    "steps": 3, "batch_size": 2, "accumulation": 2, "learning_rate": 0.01, "warmup_steps": 2, "beta1": 0.5,
    "beta2": 0.5, "weight_decay": 0.5, "clip": 1e-9, "kl_weight": 1.0,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("key", CHANGES)
def test_every_key_of_training_changes_the_projections(model, trained, key):
    changed = TRAIN | {key: CHANGES[key]}
    other = train_projections(model, identity(model), text_rows(), changed, levels=LEVELS, seed=0)
    assert distance(other, trained) > 1e-4


def test_seed_and_levels_change_the_projections_and_no_steps_change_nothing(model, trained):
    start = identity(model)
    for other in ({"levels": 6, "seed": 0}, {"levels": LEVELS, "seed": 1}):
        assert distance(train_projections(model, start, text_rows(), TRAIN, **other), trained) > 1e-4
    assert train_projections(model, start, text_rows(), TRAIN | {"steps": 0}, levels=LEVELS, seed=0) is start


@pytest.mark.parametrize(
    ("change", "levels", "message"),
    [
        ({}, 4, "levels=4 does not divide the 6 features of a head; allowed: 1, 2, 3, 6"),
        ({"batch_size": 9}, 3, "the training text fills 8 rows, less than train.batch_size=9"),
        ({"accumulation": 3}, 3, "train.batch_size=4 must be a multiple of train.accumulation=3"),
        ({"warmup_steps": 4}, 3, "train.steps = 4 must be above train.warmup_steps = 4"),
    ],
)
def test_settings_that_cannot_be(model, change, levels, message):
    with pytest.raises(ValueError, match=message):
        train_projections(model, identity(model), text_rows(), TRAIN | change, levels=levels, seed=0)

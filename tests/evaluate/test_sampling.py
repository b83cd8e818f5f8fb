"""Draws of tokens against softmax and against the top-p of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from mlora_jax.evaluate.sampling import NOT_FINITE, make_sampling, next_tokens, nucleus

LOGITS = np.array([1.0, -0.5, 2.0, 0.3, -3.0, 1.4], np.float32)
MANY = 20_000


def shares(temperature, top_p=1.0):
    """Probabilities [V] of a draw, and how often each token came up in `MANY` of them."""
    sampling = make_sampling(temperature, top_p, 7)
    tokens = next_tokens(jnp.broadcast_to(LOGITS, (MANY, 6)), sampling, jnp.arange(MANY), 3)
    warped = TopPLogitsWarper(top_p)(None, torch.tensor(LOGITS)[None] / temperature)
    return torch.softmax(warped, -1)[0].numpy(), np.bincount(tokens, minlength=6) / MANY


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7), (2.0, 0.5)])
def test_draws_follow_softmax_cut_to_the_nucleus(temperature, top_p):
    expected, found = shares(temperature, top_p)
    errors = np.sqrt(expected * (1 - expected) / MANY)
    assert np.all(np.abs(found - expected) <= 4 * errors)
    assert (expected > 0).sum() == (found > 0).sum()


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_the_nucleus_is_that_of_transformers(top_p):
    logits = np.random.default_rng(0).normal(0, 2, (50, 40)).astype(np.float32)
    theirs = TopPLogitsWarper(top_p)(None, torch.tensor(logits)).numpy()
    ours = np.asarray(nucleus(jnp.asarray(logits), top_p))
    np.testing.assert_array_equal(ours, theirs)
    assert np.isfinite(ours).any(axis=-1).all() and not np.isfinite(ours).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-9, 1.0), (1e-44, 1.0), (5.0, 1e-6)])
def test_a_cold_draw_or_a_small_nucleus_is_greedy(temperature, top_p):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, (500, 40)), jnp.float32)
    greedy = next_tokens(logits, None, jnp.arange(500), 0)
    assert np.array_equal(greedy, np.argmax(logits, -1))
    assert np.array_equal(next_tokens(logits, make_sampling(temperature, top_p, 0), jnp.arange(500), 0), greedy)


def test_a_draw_depends_on_its_seed_number_and_step_alone():
    logits = jnp.broadcast_to(LOGITS, (60, 6))

    def draw(seed, step, numbers):
        options = make_sampling(1.0, 0.9, seed)
        return next_tokens(logits[: len(numbers)], options, jnp.asarray(numbers), step).tolist()

    whole = draw(0, 5, range(60))
    assert draw(0, 5, range(59, -1, -1)) == whole[::-1] and draw(0, 5, [17]) == [whole[17]]
    assert len(set(whole)) > 2 and whole != draw(1, 5, range(60)) and whole != draw(0, 6, range(60))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_marked(temperature):
    logits = jnp.array([[0.0, jnp.nan], [jnp.inf, 0.0], [-jnp.inf, -jnp.inf], [-jnp.inf, 3.0]])
    tokens = next_tokens(logits, make_sampling(temperature, 0.9, 0), jnp.arange(4), 0)
    assert tokens.tolist() == [NOT_FINITE, NOT_FINITE, NOT_FINITE, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((-0.1, 1.0, 0), "temperature must be finite and at least 0"),
        ((float("nan"), 1.0, 0), "temperature must be finite"),
        ((1.0, 0.0, 0), "top_p must be above 0 and at most 1, got 0.0"),
        ((1.0, 1.5, 0), "top_p must be above 0"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        make_sampling(*options)


def test_another_temperature_is_no_other_executable():
    draw = jax.jit(next_tokens)
    for options in ((0.5, 1.0, 0), (2.0, 0.4, 9)):
        draw(jnp.zeros((2, 6)), make_sampling(*options), jnp.arange(2), 0)
    assert draw._cache_size() == 1

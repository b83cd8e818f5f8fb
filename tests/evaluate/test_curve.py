"""The curve of an adapter whose verdicts are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax.adapters import adapt, split
from mlora_jax.core import RankHierarchy
from mlora_jax.evaluate import accuracy_and_error, rank_curve
from tests.tiny import random_like

HIERARCHY = RankHierarchy((1, 2, 5), "rank")


@pytest.fixture
def trees():
    _, _, adapter, profile = split(adapt(nnx.Linear(7, 6, rngs=nnx.Rngs(0)), 5, (".*",), key=jax.random.key(0)))
    return random_like(adapter, seed=1), profile


def test_accuracies_are_those_of_each_rank(trees):
    adapter, _ = trees
    seen = []

    def evaluate(given, p):
        assert given is adapter
        seen.append(p)
        return np.arange(10) < 2 * np.count_nonzero(p)

    curve = rank_curve(evaluate, adapter, HIERARCHY)
    assert curve.ranks == (1, 2, 5) and curve.accuracies == (0.2, 0.4, 1.0) and curve.items == 10
    for p, rank in zip(seen, curve.ranks, strict=True):
        np.testing.assert_array_equal(p, HIERARCHY.prefix(rank))
    np.testing.assert_allclose(curve.standard_errors, [(0.16 / 9) ** 0.5, (0.24 / 9) ** 0.5, 0.0])
    np.testing.assert_allclose(curve.linear, (0.3 + 3 * 0.7) / 4)
    np.testing.assert_allclose(curve.log2, (0.3 + np.log2(2.5) * 0.7) / np.log2(5))
    np.testing.assert_allclose(curve.mean, 1.6 / 3)


@pytest.mark.parametrize("readout", ["prefix", "nested", "masked"])
def test_the_read_out_chooses_the_profiles(trees, readout):
    seen = []
    rank_curve(lambda _, p: seen.append(p) or np.ones(2), trees[0], HIERARCHY, readout=readout)
    np.testing.assert_array_equal(seen, [getattr(HIERARCHY, readout)(rank) for rank in HIERARCHY.ranks])


def test_squeeze_evaluates_the_best_approximations_of_the_trained_function(trees):
    adapter, _ = trees
    trained_profile = HIERARCHY.matryoshka()
    a, b = (np.asarray(adapter[name][...]) for name in "ab")
    whole = a * np.asarray(trained_profile) @ b
    u, s, vt = np.linalg.svd(whole)
    errors = []

    def evaluate(given, p):
        rank = int(np.count_nonzero(p))
        best = u[:, :rank] * s[:rank] @ vt[:rank]
        errors.append(np.abs(np.asarray(given["a"][...]) * np.asarray(p) @ np.asarray(given["b"][...]) - best).max())
        return np.ones(3)

    rank_curve(evaluate, adapter, HIERARCHY, readout="squeeze", trained_profile=trained_profile)
    assert len(errors) == 3 and max(errors) < 1e-4 * s[0]


def test_unknown_read_out(trees):
    with pytest.raises(
        ValueError, match=r"unknown read-out 'middle'\. Known read-outs: prefix, squeeze, nested, masked"
    ):
        rank_curve(lambda _, p: np.ones(2), trees[0], HIERARCHY, readout="middle")


def test_error_of_one_item_is_zero():
    assert accuracy_and_error(jnp.array([True])) == (1.0, 0.0)

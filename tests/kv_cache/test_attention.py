"""Projected attention: the formulas in float64, the base at full rank, and ranks as data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax.kv_cache import Ranks, cache_shape, identity, project
from mlora_jax.kv_cache.training import ProjectedTrees
from tests.kv_cache.made import compressor, random_projections, random_ranks
from tests.models.test_decoder import CONFIG, MIXED, TIED, logits_of, make, named, tokens_of
from tests.oracles import numpy_decoder

SHAPE = (2, 12)


@pytest.mark.parametrize("config", [TIED, MIXED], ids=["one head per group", "grouped, windows, norms"])
def test_float64_equals_the_formulas(config):
    tokens = tokens_of(config, SHAPE)
    with jax.enable_x64(True):
        model = make(config, jnp.float64)
        shape = cache_shape(model)
        projections, ranks = random_projections(shape, dtype=np.float64), random_ranks(shape)
        logits = logits_of(project(model, projections, ranks), tokens)
        weights = named(model)
    expected = numpy_decoder.logits(weights, config, tokens, compressor(projections, ranks))
    whole = numpy_decoder.logits(weights, config, tokens)
    assert np.abs(expected - whole).max() > 0.1  # the cut is no trifle
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", [TIED, CONFIG], ids=["tied", "grouped"])
def test_at_full_rank_the_logits_are_those_of_the_base(config):
    model, tokens = make(config), tokens_of(config, SHAPE)
    projected = project(model, random_projections(cache_shape(model)))
    np.testing.assert_allclose(logits_of(projected, tokens), logits_of(model, tokens), rtol=0, atol=1e-4)


def test_one_executable_serves_all_ranks():
    model, tokens = make(CONFIG), jnp.asarray(tokens_of(CONFIG, SHAPE))
    shape = cache_shape(model)
    projections = random_projections(shape)
    graphdef, *trees = ProjectedTrees.of(model, projections)

    @jax.jit
    def logits(trees, ranks):
        return ProjectedTrees(graphdef, *trees).at(ranks=ranks)(tokens)

    for seed in range(3):
        ranks = random_ranks(shape, seed)
        alone = logits_of(project(model, projections, ranks), tokens)
        np.testing.assert_allclose(logits(trees, ranks), alone, rtol=0, atol=1e-5)
    assert logits._cache_size() == 1


def test_the_rank_of_every_layer_and_head_counts():
    model, tokens = make(CONFIG), tokens_of(CONFIG, SHAPE)
    shape = cache_shape(model)
    projections = random_projections(shape)
    whole = logits_of(project(model, projections), tokens)
    for place in np.ndindex(2, *shape[:2]):
        ranks = Ranks.full(*shape).stacked
        ranks[place] = 1
        assert np.abs(logits_of(project(model, projections, Ranks(*ranks)), tokens) - whole).max() > 1e-3, place


def test_the_base_stays_as_it_is():
    model = make(TIED)
    before = nnx.state(model)
    projected = project(model, identity(model))
    assert "k_basis" not in str(nnx.state(model)) and "k_basis" in str(nnx.state(projected))
    kernel = projected.layers.mlp.up_proj.kernel[...]
    assert kernel is before["layers"]["mlp"]["up_proj"]["kernel"][...]  # shared, not copied


def test_what_does_not_fit_is_refused():
    model = make(TIED)
    shape = cache_shape(model)
    layers, heads, features = shape
    projections = identity(model)
    with pytest.raises(ValueError, match=r"for 3 layers of 4 key and value heads with 6 features; the model has 2"):
        project(model, random_projections((layers + 1, heads, features)))
    other = dataclasses.replace(projections, u_v=projections.u_v[..., :4, :4])
    with pytest.raises(ValueError, match="6 features"):
        project(model, other)
    for ranks in (random_ranks((layers, heads + 1, features)), Ranks(*(np.full((layers, heads), 7),) * 2)):
        with pytest.raises(ValueError, match=r"the ranks of k must be \[2, 4\] integers in 1..6, not"):
            project(model, projections, ranks)
    with pytest.raises(ValueError, match="has projections of keys and values already"):
        project(project(model, projections), projections)

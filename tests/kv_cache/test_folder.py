"""Projections on disk: what is read is what was written, and another base is refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax.adapters import adapt
from mlora_jax.kv_cache import RankPath, cache_shape, load_projections, read_projected, save_projections, uniform_ranks
from mlora_jax.kv_cache.folder import base_digest
from mlora_jax.models import Decoder, load_decoder, save_decoder
from tests.kv_cache.made import random_projections
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def model():
    return Decoder(tiny_config(head_dim=6), rngs=nnx.Rngs(0))


@pytest.fixture
def path(model):
    order = np.random.default_rng(0).permutation([[k, i, h] for k in (0, 1) for i in (0, 1) for h in (0, 1)] * 2)
    return RankPath(order.astype(np.int32), 2, cache_shape(model))


@pytest.fixture
def folder(tmp_path, model, path):
    made = random_projections(cache_shape(model))
    return save_projections(tmp_path / "kv", model, made, path, {"base_model": "tiny"})


def test_what_is_read_is_what_was_written(folder, model, path):
    saved, made = load_projections(folder, model), random_projections(cache_shape(model))
    for name in ("u_k", "u_v", "mean_v"):
        np.testing.assert_array_equal(getattr(saved.projections, name), getattr(made, name))
    assert saved.description["base_model"] == "tiny" and saved.description["format"] == 1
    for budget in (1.0, 0.75, 0.5):
        assert saved.ranks(budget).stacked.tolist() == path.at(budget).stacked.tolist()
        uniform = uniform_ranks(budget, *cache_shape(model))
        assert saved.ranks(budget, "uniform").stacked.tolist() == uniform.stacked.tolist()
    assert saved.ranks(0.5).stacked.std() > 0  # the two ways differ


def test_a_budget_is_a_smaller_cache(folder, model):
    for budget in (0.75, 0.5):
        small = read_projected(model, folder, budget)
        entries = load_projections(folder, model).ranks(budget).entries
        assert sum(sum(map(sum, kind)) for kind in (small.cache_form.k, small.cache_form.v)) == entries
    assert read_projected(model, folder, 0.5, cut=False).cache_form is None


def test_the_same_base_in_another_dtype_or_with_an_adapter_is_the_same_base(tmp_path, model):
    save_decoder(tmp_path, model)
    for dtype in (jnp.bfloat16, jnp.float16):
        assert base_digest(load_decoder(tmp_path, dtype=dtype)) == base_digest(model)
    assert base_digest(adapt(model, 2, ("k_proj",), key=jax.random.key(0))) == base_digest(model)


def test_another_base_is_refused_by_name(folder):
    for changes, message in (
        ({}, "another base, tiny: the weights that make keys and values differ"),
        ({"num_layers": 3}, "another base: .* for 2 layers of 2 key and value heads with 6 features; the model has 3"),
        ({"head_dim": 4}, "the model has 2 layers of 2 heads with 4 features"),
        ({"num_kv_heads": 4}, "the model has 2 layers of 4 heads"),
    ):
        other = Decoder(tiny_config(**({"head_dim": 6} | changes)), rngs=nnx.Rngs(1))
        with pytest.raises(ValueError, match=message) as caught:
            load_projections(folder, other)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_folder_is_one_sentence(folder, model, tmp_path):
    for name in ("kv_cache.json", "kv_cache.safetensors"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"holds no projections of keys and values: {name} is missing"):
            load_projections(folder, model)
        (folder / name).write_bytes(kept[:40])
        with pytest.raises(ValueError, match=r"the projections in .* are damaged"):
            load_projections(folder, model)
        (folder / name).write_bytes(kept)
    record = json.loads((folder / "kv_cache.json").read_text())
    (folder / "kv_cache.json").write_text(json.dumps(record | {"format": 2}))
    with pytest.raises(ValueError, match="its format is 2; this version reads 1"):
        load_projections(folder, model)


def test_budgets_and_rates_that_cannot_be(folder, model, tmp_path):
    with pytest.raises(ValueError, match=r"kv_budget must be a number above 0 and at most 1, got 1\.5"):
        read_projected(model, folder, 1.5)
    with pytest.raises(ValueError, match=r"is below 0\.3333, the smallest budget that was searched"):
        read_projected(model, folder, 0.3)
    with pytest.raises(ValueError, match="unknown kv_rates 'best'; known: searched, uniform"):
        read_projected(model, folder, 0.5, "best")
    bare = save_projections(tmp_path / "bare", model, random_projections(cache_shape(model)), None, {})
    with pytest.raises(ValueError, match="no ranks were searched for these projections: give kv_rates=uniform"):
        read_projected(model, bare, 0.5)
    assert load_projections(bare, model).ranks(1.0).entries == 2 * 2 * 2 * 6

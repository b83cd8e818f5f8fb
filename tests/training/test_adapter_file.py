"""Adapters on disk."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mlora_jax.adapters import adapt, split
from mlora_jax.core import RankHierarchy, truncate
from mlora_jax.models import Decoder
from mlora_jax.training.adapter_file import load_adapted, load_adapter, read_adapter, save_adapter
from tests.tiny import tiny_config

HIERARCHY = RankHierarchy((1, 3, 5), "sqrt", weights=(1.0, 2.0, 0.5))


@pytest.fixture
def adapter():
    model = Decoder(tiny_config(), rngs=nnx.Rngs(0))
    return split(adapt(model, 5, ("v_proj", "up_proj"), key=jax.random.key(0)))[2]


@pytest.fixture
def folder(adapter, tmp_path):
    return save_adapter(tmp_path / "adapter", adapter, HIERARCHY, {"method": "matryoshka"})


def test_round_trip(adapter, folder):
    template = jax.tree.map(lambda x: x * 0, adapter)
    loaded, hierarchy, description = load_adapter(folder, template)
    assert hierarchy == HIERARCHY and description["method"] == "matryoshka"
    for left, right in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(left, right)
    names = set(load_file(folder / "adapter.safetensors"))
    assert names == {f"layers.{m}.{f}" for m in ("self_attn.v_proj", "mlp.up_proj") for f in "ab"}
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_a_truncated_adapter_is_saved_with_its_own_hierarchy_only(adapter, tmp_path):
    short = truncate(adapter, 3)
    with pytest.raises(ValueError, match=r"\.a has rank 3, but the hierarchy's R is 5; .* hierarchy\.truncate\(rank\)"):
        save_adapter(tmp_path / "short", short, HIERARCHY, {})
    assert not (tmp_path / "short").exists()
    save_adapter(tmp_path / "short", short, HIERARCHY.truncate(3), {})
    loaded, hierarchy, _ = load_adapter(tmp_path / "short", short)
    assert hierarchy == RankHierarchy((1, 3), "sqrt", weights=(1.0, 2.0))
    jax.tree.map(np.testing.assert_array_equal, loaded, short)


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")


def test_missing_tensor(adapter, folder):
    change_tensors(folder, lambda tensors: tensors.pop("layers.mlp.up_proj.b"))
    with pytest.raises(ValueError, match=r"lacks the tensor layers\.mlp\.up_proj\.b"):
        load_adapter(folder, adapter)


def test_misshapen_tensor(adapter, folder):
    change_tensors(folder, lambda tensors: tensors.update({"layers.mlp.up_proj.b": np.zeros((2, 4, 24), np.float32)}))
    with pytest.raises(ValueError, match=r"up_proj\.b .* has shape \(2, 4, 24\); the model needs \(2, 5, 24\)"):
        load_adapter(folder, adapter)


def test_unknown_tensor(adapter, folder):
    change_tensors(folder, lambda tensors: tensors.update({"layers.mlp.gate_proj.a": np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=r"no place for: layers\.mlp\.gate_proj\.a"):
        load_adapter(folder, adapter)


def test_truncated_file(adapter, folder):
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(folder, adapter)


def test_missing_file(adapter, folder):
    (folder / "adapter.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.json is missing"):
        load_adapter(folder, adapter)


def test_another_format(adapter, folder):
    record = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(ValueError, match="format 99; this version reads 1"):
        load_adapter(folder, adapter)


@pytest.fixture
def gated():
    """(base model, adapter with gates that are not one)."""
    model = Decoder(tiny_config(), rngs=nnx.Rngs(0))
    return model, split(adapt(model, 5, ("v_proj", "up_proj"), key=jax.random.key(0), gate="normal"))[2]


def test_gates_are_stored_and_restored(gated, tmp_path):
    model, adapter = gated
    save_adapter(tmp_path, adapter, HIERARCHY, {})
    names = set(load_file(tmp_path / "adapter.safetensors"))
    assert names == {f"layers.{m}.{f}" for m in ("self_attn.v_proj", "mlp.up_proj") for f in ("a", "b", "gate")}
    loaded = load_adapted(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, loaded.adapter, adapter)
    plain, hierarchy, _ = read_adapter(tmp_path)
    assert hierarchy == HIERARCHY and set(plain["layers.mlp.up_proj"]) == {"a", "b", "gate"}
    np.testing.assert_array_equal(plain["layers.mlp.up_proj"]["gate"], adapter["layers"]["mlp"]["up_proj"]["gate"])


def test_gates_that_do_not_fit_are_named(gated, adapter, tmp_path):
    model, with_gates = gated
    save_adapter(tmp_path, with_gates, HIERARCHY, {})
    with pytest.raises(ValueError, match=r"no place for: layers\.mlp\.up_proj\.gate, layers\.self_attn\.v_proj\.gate"):
        load_adapter(tmp_path, adapter)
    change_tensors(tmp_path, lambda tensors: tensors.update({"layers.mlp.up_proj.gate": np.ones((2, 4), np.float32)}))
    with pytest.raises(ValueError, match=r"no factors of rank 5 for layers\.mlp\.up_proj, but .*gate \(2, 4\)"):
        read_adapter(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop("layers.mlp.up_proj.gate"))
    with pytest.raises(ValueError, match=r"has a gate in layers\.self_attn\.v_proj, but none in layers\.mlp\.up_proj"):
        load_adapted(tmp_path, model)

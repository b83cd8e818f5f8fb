"""An index that does not tell what the shards hold: the tensors decide, and what is missing is named."""

import json

import numpy as np
import pytest
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM

from mlora_jax.models import load_decoder

INDEX = "model.safetensors.index.json"
KEY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    ))  # fmt: skip


@pytest.fixture
def sharded(reference, tmp_path):
    reference.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


def edit(folder, change):
    values = json.loads((folder / INDEX).read_text())
    change(values["weight_map"])
    (folder / INDEX).write_text(json.dumps(values))


def other_shard(shards):
    shards[KEY] = next(name for name in sorted(shards.values()) if name != shards[KEY])


HARMLESS = {
    "the wrong shard": other_shard,
    "an entry less": lambda shards: shards.pop(KEY),
    "an entry that no shard has": lambda shards: shards.update({"model.layers.9.mlp.up_proj.weight": shards[KEY]}),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_tensor_is_found_where_it_is(reference, sharded, name):
    """Every array is that of the model that transformers saved."""
    edit(sharded, HARMLESS[name])
    state = dict(nnx.to_flat_state(nnx.state(load_decoder(sharded))))
    for layer in range(2):
        expected = reference.get_parameter(f"model.layers.{layer}.self_attn.q_proj.weight").detach().numpy().T
        np.testing.assert_array_equal(state["layers", "self_attn", "q_proj", "kernel"][...][layer], expected)
    np.testing.assert_array_equal(state["norm", "weight"][...], reference.get_parameter(NORM).detach().numpy())


def test_a_shard_that_no_entry_names_is_missed_by_name(sharded):
    shards = json.loads((sharded / INDEX).read_text())["weight_map"]
    dropped = shards[KEY]
    edit(sharded, lambda found: [found.pop(name) for name in shards if shards[name] == dropped])
    with pytest.raises(ValueError, match=rf"{KEY}: expected shape \[16, 16\], found no such tensor"):
        load_decoder(sharded)


def test_a_shard_that_is_not_there_is_missed_by_name(sharded):
    edit(sharded, lambda shards: shards.update({KEY: "model-00099-of-00099.safetensors"}))
    with pytest.raises(FileNotFoundError, match=r"lacks the shard 'model-00099-of-00099\.safetensors'"):
        load_decoder(sharded)

"""Checkpoints of transformers, real and random, read and written; damaged ones refused by name."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mlora_jax.models.config import DecoderConfig, RopeScaling
from mlora_jax.models.decoder import Decoder
from mlora_jax.models.hugging_face import WEIGHT_MAP, load_decoder, read_config, save_decoder
from mlora_jax.models.weight_files import StoredTensor
from tests.models.references import LLAMA3, logits_in_torch, logits_of, randomized

TOLERANCE = 1e-4
SMALL = {"vocab_size": 67, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
SHAPES = {
    "tied, as many kv heads": dict(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True),
    "untied, two queries a kv head": dict(num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=False),
    "one kv head, biases": dict(num_attention_heads=4, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "wide heads, llama3 rope": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=20, rope_parameters=LLAMA3),
    "narrow heads, tied, llama3 rope, biases": dict(
        num_attention_heads=8, num_key_value_heads=2, head_dim=4, tie_word_embeddings=True, attention_bias=True,
        mlp_bias=True, rope_parameters=LLAMA3, rms_norm_eps=1e-2,
    ),
}  # fmt: skip


def random_reference(shape, seed=0, **changes):
    """A transformers model none of whose tensors is special: its logits are of size one and more."""
    return randomized(LlamaForCausalLM(LlamaConfig(**(SMALL | shape | changes))).eval(), seed)


def tokens_of(vocab_size, shape=(2, 64)):
    return np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint of transformers, untied, with biases."""
    random_reference(SHAPES["one kv head, biases"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change):
    """Rewrites the weights of a folder after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


@pytest.mark.parametrize("name", ["stories-260k", "tinystories-656k", "stories-3m"])
def test_real_checkpoints_agree_with_transformers(shared, name):
    path = shared / "models" / name
    reference = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model = load_decoder(path)
    tokens = tokens_of(model.config.vocab_size, (2, model.config.max_position_embeddings))
    expected = logits_in_torch(reference, tokens)
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(logits_of(model, tokens), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_random_checkpoints_agree_with_transformers_both_ways(tmp_path, shape):
    reference = random_reference(shape)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_decoder(tmp_path / "theirs")
    tokens = tokens_of(SMALL["vocab_size"])
    expected = logits_in_torch(reference, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits_of(model, tokens), expected, rtol=0, atol=TOLERANCE)
    save_decoder(tmp_path / "ours", model)
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    back = LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    np.testing.assert_array_equal(logits_in_torch(back, tokens), expected)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for tensor in theirs:
        np.testing.assert_array_equal(theirs[tensor], ours[tensor])
    assert load_decoder(tmp_path / "ours").config == model.config


def test_llama3_scaling_matters_in_these_tests():
    shape = SHAPES["wide heads, llama3 rope"]
    tokens = tokens_of(SMALL["vocab_size"])
    plain = {"rope_type": "default", "rope_theta": LLAMA3["rope_theta"]}
    changed = logits_in_torch(random_reference(shape, rope_parameters=plain), tokens)
    assert np.abs(changed - logits_in_torch(random_reference(shape), tokens)).max() > 0.1


def test_the_older_form_of_rope_settings_agrees_too(tmp_path):
    reference = random_reference(SHAPES["wide heads, llama3 rope"])
    reference.save_pretrained(tmp_path)
    older = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    edit_config(tmp_path, rope_parameters="absent", rope_theta=LLAMA3["rope_theta"], rope_scaling=older)
    tokens = tokens_of(SMALL["vocab_size"])
    expected = logits_in_torch(reference, tokens)
    np.testing.assert_allclose(logits_of(load_decoder(tmp_path), tokens), expected, rtol=0, atol=TOLERANCE)


def test_shards_hold_the_same_model(tmp_path):
    reference = random_reference(SHAPES["untied, two queries a kv head"])
    reference.save_pretrained(tmp_path / "one")
    reference.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = (nnx.to_flat_state(nnx.state(load_decoder(tmp_path / name))) for name in ("one", "many"))
    for (path, expected), (other, found) in zip(one, many, strict=True):
        assert path == other
        np.testing.assert_array_equal(found[...], expected[...])
    sorted((tmp_path / "many").glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the shard 'model-00002-of-.*download it"):
        load_decoder(tmp_path / "many")


def test_an_index_does_not_lead_out_of_the_folder(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"shard '\.\./other\.safetensors' lies outside the folder"):
        load_decoder(folder)
    for name in (5, ["a.safetensors"], None):
        index = {"weight_map": {"lm_head.weight": "a.safetensors", "model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(
            ValueError, match=r"index\.json: the shard of model\.norm\.weight must be a file's name, not "
        ):
            load_decoder(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_decoder(folder)


def test_a_tied_pair_may_be_stored_under_either_name_or_both(tmp_path):
    random_reference(SHAPES["tied, as many kv heads"]).save_pretrained(tmp_path)
    expected = load_decoder(tmp_path).embed_tokens.embedding[...]

    def move(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    edit(tmp_path, move)
    np.testing.assert_array_equal(load_decoder(tmp_path).embed_tokens.embedding[...], expected)
    edit(tmp_path, lambda tensors: tensors.update({"model.embed_tokens.weight": tensors["lm_head.weight"]}))
    np.testing.assert_array_equal(load_decoder(tmp_path).embed_tokens.embedding[...], expected)
    edit(tmp_path, lambda tensors: tensors.update({"model.embed_tokens.weight": tensors["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match="both stored and differ: set tie_word_embeddings to false"):
        load_decoder(tmp_path)


def test_bfloat16_on_disk(tmp_path):
    random_reference(SHAPES["untied, two queries a kv head"]).to(torch.bfloat16).save_pretrained(tmp_path)
    tokens = tokens_of(SMALL["vocab_size"])
    # Loaded anew: a model converted in memory has rounded its rotary frequencies too.
    exact, theirs = (
        logits_in_torch(LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval(), tokens)
        for dtype in (torch.float32, torch.bfloat16)
    )
    wide, stored = load_decoder(tmp_path, dtype=jnp.float32), load_decoder(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(wide))} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(stored))} == {jnp.dtype(jnp.bfloat16)}
    assert stored.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits_of(wide, tokens), exact, rtol=0, atol=TOLERANCE)
    ours = logits_of(stored, tokens)
    assert ours.dtype == np.float32
    # No worse than transformers is with the same weights in the same dtype.
    assert np.sqrt(((ours - exact) ** 2).mean()) < 1.2 * np.sqrt(((theirs - exact) ** 2).mean())
    save_decoder(tmp_path / "again", stored)
    assert {array.dtype for array in load_file(tmp_path / "again/model.safetensors").values()} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert json.loads((tmp_path / "again/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert LlamaForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").dtype == torch.bfloat16


def test_norms_stored_wider_stay_wider(folder):
    def narrow(tensors):
        tensors.update({name: array.astype(jnp.bfloat16) for name, array in tensors.items() if "norm" not in name})

    edit(folder, narrow)
    model = load_decoder(folder)
    dtypes = {path[-2]: leaf.dtype.name for path, leaf in nnx.to_flat_state(nnx.state(model))}
    assert {dtypes["input_layernorm"], dtypes["norm"]} == {"float32"}
    assert {dtypes["q_proj"], dtypes["embed_tokens"], dtypes["lm_head"], model.dtype.name} == {"bfloat16"}
    out = jax.eval_shape(lambda tokens: model.hidden(tokens), jnp.zeros((1, 3), jnp.int32))
    assert out.dtype == jnp.bfloat16
    all_narrow = load_decoder(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(all_narrow))} == {jnp.dtype(jnp.bfloat16)}


def test_float64_is_never_narrowed_silently(folder):
    with pytest.raises(ValueError, match=r"float64 needs jax_enable_x64.*dtype=jnp\.float32"):
        load_decoder(folder, dtype=jnp.float64)
    edit(folder, lambda tensors: tensors.update({name: array.astype(np.float64) for name, array in tensors.items()}))
    with pytest.raises(ValueError, match=r"float64 needs jax_enable_x64.*dtype=jnp\.float32"):
        load_decoder(folder)
    assert load_decoder(folder, dtype=jnp.float32).dtype == jnp.float32
    with jax.enable_x64(True):
        model = load_decoder(folder)
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float64)}
        assert jax.eval_shape(model, jnp.zeros((1, 3), jnp.int32)).dtype == jnp.float64
    with pytest.raises(ValueError, match="dtype 'int8' is not one of float32, bfloat16"):
        load_decoder(folder, dtype=jnp.int8)


def delete(name):
    return lambda tensors: tensors.pop(name)


def put(name, array):
    return lambda tensors: tensors.update({name: array})


@pytest.mark.parametrize(
    "change, message",
    [
        (delete("model.layers.1.mlp.up_proj.weight"),
         r"model.layers.1.mlp.up_proj.weight: expected shape \[80, 48\], found no such tensor"),
        (delete("model.layers.2.self_attn.q_proj.bias"),
         r"model.layers.2.self_attn.q_proj.bias: expected shape \[48\], found no such tensor"),
        (delete("lm_head.weight"), r"lm_head.weight: expected shape \[67, 48\], found no such tensor"),
        (put("model.layers.0.self_attn.k_proj.weight", np.zeros((48, 12), np.float32)),
         r"model.layers.0.self_attn.k_proj.weight: expected shape \[12, 48\], found \[48, 12\]"),
        (put("model.norm.weight", np.zeros((1, 48), np.float32)),
         r"model.norm.weight: expected shape \[48\], found \[1, 48\]"),
        (put("model.layers.0.mlp.up_proj.weight", np.zeros((80, 48), np.int8)),
         r"model.layers.0.mlp.up_proj.weight: expected one of F64, F32, F16, BF16, found I8"),
        (put("model.layers.0.mlp.up_proj.weight", np.zeros((80, 48), jnp.float8_e4m3fn)),
         r"model.layers.0.mlp.up_proj.weight: expected one of F64, F32, F16, BF16, found F8_E4M3"),
        (put("model.layers.3.mlp.up_proj.weight", np.zeros((80, 48), np.float32)),
         r"model.layers.3.mlp.up_proj.weight: expected no such tensor, found shape \[80, 48\]"),
        (put("model.layers.0.self_attn.q_norm.weight", np.zeros(12, np.float32)),
         r"model.layers.0.self_attn.q_norm.weight: expected no such tensor, found shape \[12\]"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        load_decoder(folder)


def test_every_misfit_is_counted_and_a_dozen_shown(folder):
    edit_config(folder, num_hidden_layers=9)
    with pytest.raises(ValueError, match=r"config.json describes:\n(  model.*\n){12}  and 84 more") as caught:
        load_decoder(folder)
    assert "model.layers.3.input_layernorm.weight: expected shape [48]" in str(caught.value)


def test_weights_go_to_their_shardings_part_by_part(tmp_path, monkeypatch):
    """Each device gets what its sharding says, and of a tensor only that part is read."""
    random_reference(SHAPES["untied, two queries a kv head"]).save_pretrained(tmp_path, max_shard_size="30KB")
    whole = nnx.to_flat_state(nnx.state(load_decoder(tmp_path)))
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", "tensor"))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "tensor"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    chosen = {"layers.mlp.up_proj.kernel": columns, "layers.mlp.down_proj.kernel": rows, "lm_head.kernel": None}
    read, original = [], StoredTensor.read

    def counted(tensor, out, index):
        read.append((tensor.name, out.size))
        return original(tensor, out, index)

    monkeypatch.setattr(StoredTensor, "read", counted)
    placed = nnx.to_flat_state(nnx.state(load_decoder(tmp_path, sharding=lambda path, _: chosen.get(path, everywhere))))
    for (path, expected), (other, found) in zip(whole, placed, strict=True):
        assert path == other
        np.testing.assert_array_equal(found[...], expected[...])
        wanted = chosen.get(".".join(path), everywhere)
        assert found[...].sharding == (expected[...].sharding if wanted is None else wanted)
        for part in found[...].addressable_shards:
            np.testing.assert_array_equal(part.data, expected[...][part.index])
    sizes = {"mlp.up_proj": [80 * 48 // 4] * 4, "mlp.down_proj": [80 * 48 // 2] * 2, "self_attn.q_proj": [48 * 48]}
    for module, expected in sizes.items():
        assert [size for name, size in read if name == f"model.layers.1.{module}.weight"] == expected


def test_a_sharding_that_does_not_divide_is_named(folder):
    mesh = jax.make_mesh((4,), ("tensor",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))
    with pytest.raises(ValueError, match=r"embed_tokens\.embedding: .*axis 0 is partitioned 4 times.*67"):
        load_decoder(folder, sharding=lambda path, _: sharding if path == "embed_tokens.embedding" else None)


def test_blocks_and_strips_leave_nothing_out(folder, monkeypatch):
    expected = nnx.to_flat_state(nnx.state(load_decoder(folder)))
    monkeypatch.setattr("mlora_jax.models.weight_files._BLOCK", 1500)
    monkeypatch.setattr("mlora_jax.models.weight_files._STRIP", 3)
    for (path, whole), (_, found) in zip(expected, nnx.to_flat_state(nnx.state(load_decoder(folder))), strict=True):
        np.testing.assert_array_equal(found[...], whole[...], err_msg=str(path))


def test_tensors_that_say_nothing_are_passed_over(folder):
    edit(folder, put("model.layers.0.self_attn.rotary_emb.inv_freq", np.zeros(6, np.float32)))
    load_decoder(folder)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_file_is_named(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file .*download it again"):
        load_decoder(folder)


def test_folders_that_are_no_checkpoints(folder, tmp_path):
    (folder / "config.json").rename(folder / "elsewhere.json")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_decoder(folder)
    for content, message in (("{", "is not valid JSON"), ("[]", "holds list, not an object")):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_decoder(folder)
    (folder / "elsewhere.json").rename(folder / "config.json")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors.*pytorch_model\.bin.*pickles.*save_pretrained"):
        load_decoder(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json:"):
        load_decoder(folder)


def test_an_unsupported_model_is_named_with_its_file(folder):
    edit_config(folder, model_type="mixtral")
    with pytest.raises(ValueError, match=r"config\.json: model_type 'mixtral' is not supported.*'llama'"):
        read_config(folder)


def test_the_weight_map_covers_the_model_with_every_option():
    config = DecoderConfig(
        vocab_size=5, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1, attention_bias=True, mlp_bias=True,
        qk_norm=True,
    )  # fmt: skip
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert {".".join(path) for path, _ in nnx.to_flat_state(nnx.state(abstract))} == set(WEIGHT_MAP)


def test_saving_keeps_everything_the_config_says(tmp_path):
    config = DecoderConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6,
        rope_theta=77.0, rope_scaling=RopeScaling(4.0, 1.0, 2.0, 8), rms_norm_eps=3e-4, tie_word_embeddings=True,
        max_position_embeddings=99, attention_bias=True, mlp_bias=False, bos_token_id=None, eos_token_ids=(3, 4),
        initializer_range=0.5,
    )  # fmt: skip
    save_decoder(tmp_path / "a/b", Decoder(config, rngs=nnx.Rngs(0)))
    assert read_config(tmp_path / "a/b") == config
    theirs = LlamaConfig.from_pretrained(tmp_path / "a/b")
    assert (theirs.rope_parameters["rope_theta"], theirs.rope_parameters["factor"]) == (77.0, 4.0)
    assert (theirs.head_dim, theirs.eos_token_id, theirs.max_position_embeddings) == (6, [3, 4], 99)


def test_saving_twice_replaces_and_a_failure_leaves_the_old_file(folder, tmp_path, monkeypatch):
    model = load_decoder(folder)
    save_decoder(tmp_path / "out", model)
    model.norm.weight[...] = model.norm.weight[...] + 1
    save_decoder(tmp_path / "out", model)
    np.testing.assert_array_equal(load_decoder(tmp_path / "out").norm.weight[...], model.norm.weight[...])
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("mlora_jax.models.hugging_face.save_file", full_disk)
    model.norm.weight[...] = model.norm.weight[...] + 1
    with pytest.raises(OSError, match="no space left"):
        save_decoder(tmp_path / "out", model)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_saving_refuses_what_the_layout_cannot_hold(folder, tmp_path):
    class Wrapped(nnx.Module):
        def __init__(self, base):
            self.base = base

    model = load_decoder(folder)
    model.layers.mlp.up_proj = Wrapped(model.layers.mlp.up_proj)
    with pytest.raises(ValueError, match=r"layers.mlp.up_proj.base.bias.*fold or drop the adapter first"):
        save_decoder(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
    shards = tmp_path / "shards"
    shutil.copytree(folder, shards)
    (shards / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"in shards .*give another folder"):
        save_decoder(shards, load_decoder(folder))

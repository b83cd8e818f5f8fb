"""Tiny random checkpoints of every supported model type: logits as in transformers, read and written."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from mlora_jax.models.architectures import ARCHITECTURES
from mlora_jax.models.config import DecoderConfig, read_config
from mlora_jax.models.decoder import Decoder
from mlora_jax.models.hugging_face import load_decoder, save_decoder
from tests.models.references import LLAMA3, logits_in_torch, logits_of, randomized

SMALL = {
    "vocab_size": 67, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 900.0},
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = [SLIDING, FULL, FULL, SLIDING]
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
# Name of the case -> model type and what it changes in SMALL; the windows are shorter than the rows of 24 tokens.
CASES = {
    "llama 2": ("llama", {"num_key_value_heads": 4}),
    "llama 3.2": ("llama", {"tie_word_embeddings": True, "head_dim": 20, "rope_parameters": LLAMA3}),
    "smollm2": (
        "llama", {"tie_word_embeddings": True, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}
    ),
    "mistral 0.1": ("mistral", {"sliding_window": 7}),
    "mistral 0.3": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "ministral": ("ministral", {"sliding_window": 6, "layer_types": MIXED, "head_dim": 16}),
    "qwen2.5": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window from a layer on": ("qwen2", WINDOW | {"max_window_layers": 3}),
    "qwen2, window by layer": ("qwen2", WINDOW | {"layer_types": MIXED}),
    "qwen3": ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3, bias and window": ("qwen3", WINDOW | {"head_dim": 16, "attention_bias": True, "max_window_layers": 1}),
    "smollm3": ("smollm3", {"pad_token_id": 0}),
    "smollm3, window": ("smollm3", WINDOW | {"pad_token_id": 0, "no_rope_layers": [0, 1, 1, 0]}),
    "seed-oss": ("seed_oss", {"head_dim": 14}),
}  # fmt: skip
SLOW = ("llama 2", "mistral 0.3", "qwen2, window by layer", "qwen3, bias and window", "smollm3")


def reference_of(model_type, changes, seed=0):
    """A transformers model none of whose tensors is special: its logits are of size one and more."""
    config = AutoConfig.for_model(model_type, **(SMALL | changes))
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return randomized(reference, seed)


TOKENS = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, 24)).astype(np.int32)


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_logits_agree_with_transformers_both_ways(tmp_path, case):
    """Through float32 and bfloat16 files, one or many, and back through a folder that we write."""
    model_type, changes = CASES[case]
    for stored in (torch.float32, torch.bfloat16):
        reference = reference_of(model_type, changes).to(stored)
        one, many = (tmp_path / f"{stored}-{name}".replace("torch.", "") for name in ("one", "many"))
        reference.save_pretrained(one)
        reference.save_pretrained(many, max_shard_size="20KB")
        assert (one / "model.safetensors").is_file() and len(list(many.glob("model-*.safetensors"))) > 3
        # Loaded anew: a model converted in memory has rounded its rotary frequencies too.
        exact = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).eval()
        expected = logits_in_torch(exact, TOKENS)
        assert np.abs(expected).max() > 1
        for folder in (one, many):
            model = load_decoder(folder, dtype=jnp.float32)
            assert model.config.model_type == model_type
            np.testing.assert_allclose(logits_of(model, TOKENS), expected, rtol=0, atol=1e-4)
    narrow = load_decoder(many)
    assert narrow.dtype == jnp.bfloat16
    for written, theirs, dtype in ((model, exact, "float32"), (narrow, reference, "bfloat16")):
        ours = tmp_path / f"ours-{dtype}"
        save_decoder(ours, written)
        assert read_config(ours) == written.config
        back = AutoModelForCausalLM.from_pretrained(ours, dtype="auto").eval()
        assert type(back) is type(theirs) and back.dtype == getattr(torch, dtype)
        found, wanted = back.state_dict(), theirs.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert load_file(ours / "model.safetensors").keys() == load_file(one / "model.safetensors").keys()
        if dtype == "float32":
            np.testing.assert_array_equal(logits_in_torch(back, TOKENS), expected)


def test_every_model_type_is_tested():
    assert {CASES[case][0] for case in CASES if case not in SLOW} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    "case", ["mistral 0.1", "ministral", "qwen2, window from a layer on", "smollm3, window", "smollm3"]
)
def test_what_single_layers_do_matters_in_these_tests(case):
    """The expected logits are others where no layer has a window, or all rotate."""
    model_type, changes = CASES[case]
    without = {"no_rope_layers": [1] * 4} if case == "smollm3" else {"sliding_window": 64}
    changed = logits_in_torch(reference_of(model_type, changes | without), TOKENS)
    assert np.abs(changed - logits_in_torch(reference_of(model_type, changes), TOKENS)).max() > 0.1


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_absent_keys_have_the_defaults_of_transformers(model_type):
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 32,
             "num_attention_heads": 64}  # fmt: skip
    theirs = AutoConfig.for_model(model_type, **sizes)
    filled = DecoderConfig.from_hugging_face(json.loads(theirs.to_json_string(use_diff=False)))
    assert DecoderConfig.from_hugging_face(sizes | {"model_type": model_type}) == filled
    assert filled.num_kv_heads == theirs.num_key_value_heads


@pytest.mark.parametrize("case", CASES)
def test_a_config_of_transformers_comes_back_whole(case):
    model_type, changes = CASES[case]
    theirs = AutoConfig.for_model(model_type, **(SMALL | changes))
    config = DecoderConfig.from_hugging_face(theirs.to_dict())
    again = AutoConfig.for_model(**config.to_hugging_face()).to_dict()
    for key in ("rope_parameters", "sliding_window", "layer_types", "no_rope_layers", "attention_bias", "bos_token_id",
                "eos_token_id", "head_dim", "num_key_value_heads", "tie_word_embeddings"):  # fmt: skip
        if key in theirs.to_dict() and theirs.to_dict()[key] is not None:
            assert again[key] == theirs.to_dict()[key], key


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gemma3_text"}, "'gemma3_text' is not supported: this decoder knows 'llama', 'mistral', "
         "'ministral', 'qwen2', 'qwen3', 'smollm3', 'seed_oss'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive integer, not 0"),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": MIXED},
         r"layer_types is \['sliding.*'ministral'"),
        ({"model_type": "qwen2", "layer_types": MIXED}, "there is no window: .* use_sliding_window None"),
        ({"model_type": "ministral", "layer_types": MIXED[1:]}, "layer_types must name .* for each of 4 layers"),
        ({"model_type": "ministral", "layer_types": ["chunked_attention"] * 4}, "must name .*'chunked_attention'"),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": None}, "max_window_layers must be"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers must have a 1 .* 4 layers, not"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "_interval must be a positive integer, not 0"),
        ({"model_type": "llama", "rope_parameters": {FULL: {"rope_type": "default"}}}, "per kind of .*full_attention"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hugging_face({key: value for key, value in SMALL.items() if key not in values} | values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "model_type 'llama' has no place in its config.json for qk_norm=True"),
        ({"sliding_window": 4}, "for sliding_window=4, sliding_layers="),
        ({"attention_bias": True, "attention_output_bias": False}, "for attention_output_bias=False"),
        ({"rotary_layers": (True, False)}, "for rotary_layers="),
        ({"model_type": "qwen2"}, "model_type 'qwen2' has no place .* for attention_bias=False"),
        ({"model_type": "mistral", "sliding_window": 4, "sliding_layers": (True, False)}, "for sliding_layers="),
    ],
)
def test_a_model_is_not_written_as_one_that_it_is_not(tmp_path, changes, message):
    config = DecoderConfig(
        vocab_size=5, hidden_size=4, intermediate_size=4, num_layers=2, num_heads=1, **changes
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        save_decoder(tmp_path / "out", Decoder(config, rngs=nnx.Rngs(0)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"sliding_layers": (True, True)}, "without a sliding_window"),
        (
            {"sliding_window": 4, "sliding_layers": (True,)},
            r"sliding_layers must be true or false for each of 2 layers",
        ),
        ({"rotary_layers": (1, 0)}, r"rotary_layers must be true or false for each of 2 layers"),
        ({"qk_norm": 1}, "qk_norm must be true or false, not 1"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(vocab_size=5, hidden_size=4, intermediate_size=4, num_layers=2, num_heads=1, **changes)

"""What of a Hugging Face config.json is understood, and what is refused by name."""

import pytest

from mlora_jax.models.config import DecoderConfig, RopeScaling

LLAMA_1B = {
    "model_type": "llama", "hidden_act": "silu", "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "max_position_embeddings": 131072, "attention_bias": False, "mlp_bias": False, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "pretraining_tp": 1, "use_cache": True, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip


def test_llama_3_2_1b_is_read_whole():
    config = DecoderConfig.from_hugging_face(LLAMA_1B)
    assert config == DecoderConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8,
        head_dim=64, rope_theta=500000.0, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), rms_norm_eps=1e-5,
        tie_word_embeddings=True, max_position_embeddings=131072, attention_bias=False, mlp_bias=False,
        bos_token_id=128000, eos_token_ids=(128001, 128008, 128009),
    )  # fmt: skip
    assert hash(config) == hash(DecoderConfig.from_hugging_face(LLAMA_1B))


def test_both_forms_of_rope_settings_mean_the_same():
    new = {key: value for key, value in LLAMA_1B.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = LLAMA_1B["rope_scaling"] | {"rope_theta": 500000.0}
    assert DecoderConfig.from_hugging_face(new) == DecoderConfig.from_hugging_face(LLAMA_1B)
    plain = LLAMA_1B | {"rope_scaling": None}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    assert DecoderConfig.from_hugging_face(new) == DecoderConfig.from_hugging_face(plain)
    oldest = LLAMA_1B | {"rope_scaling": {"type": "llama3", **LLAMA_1B["rope_scaling"]}}
    del oldest["rope_scaling"]["rope_type"]
    assert DecoderConfig.from_hugging_face(oldest) == DecoderConfig.from_hugging_face(LLAMA_1B)


def test_absent_keys_have_the_defaults_of_llama_config():
    from transformers import LlamaConfig

    sizes = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = DecoderConfig.from_hugging_face({key: LLAMA_1B[key] for key in sizes})
    reference = LlamaConfig(**{key: LLAMA_1B[key] for key in sizes[1:]})
    assert config.num_kv_heads == reference.num_key_value_heads == 32
    assert config.head_dim == reference.head_dim == 64
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.rope_theta == reference.rope_parameters["rope_theta"]
    assert config.rope_scaling is None
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert config.max_position_embeddings == reference.max_position_embeddings
    assert (config.attention_bias, config.mlp_bias) == (reference.attention_bias, reference.mlp_bias)
    assert (config.bos_token_id, config.eos_token_ids) == (reference.bos_token_id, (reference.eos_token_id,))
    assert config.initializer_range == reference.initializer_range


@pytest.mark.parametrize("eos, expected", [(7, (7,)), ([7, 8], (7, 8)), (None, ())])
def test_any_number_of_end_tokens(eos, expected):
    config = DecoderConfig.from_hugging_face(LLAMA_1B | {"eos_token_id": eos})
    assert config.eos_token_ids == expected
    assert DecoderConfig.from_hugging_face(config.to_hugging_face()) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not supported.*'llama'"),
        ({"model_type": None}, r"model_type None is not supported.*'llama'"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported.*'silu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_type 'yarn' is not supported.*'default', 'llama3'"),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic"}},
            r"rope_type 'dynamic' is not supported.*'default', 'llama3'",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"lacks 'low_freq_factor', 'high_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5 is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config .*gptq.*not supported.*'bfloat16'"),
        ({"num_hidden_layers": None}, r"lacks 'num_hidden_layers'"),
        ({"hidden_size": None, "vocab_size": None}, r"lacks 'vocab_size', 'hidden_size'"),
        ({"num_hidden_layers": 0}, r"num_layers must be a positive integer, not 0"),
        ({"hidden_size": 64.0}, r"hidden_size must be a positive integer, not 64.0"),
        ({"num_attention_heads": True}, r"num_heads must be a positive integer, not True"),
        ({"num_key_value_heads": 5}, r"num_heads 32 is not a multiple of num_kv_heads 5"),
        ({"hidden_size": "2048", "head_dim": None}, r"hidden_size must be a positive integer, not '2048'"),
        ({"rope_parameters": ["default"]}, r"rope_parameters must be an object, not \['default'\]"),
        ({"rope_scaling": "llama3"}, r"rope_scaling must be an object, not 'llama3'"),
        (
            {"rope_scaling": {}, "rope_parameters": {"rope_theta": "5e5"}},
            r"rope_theta must be a positive number, not '5e5'",
        ),
        (
            {"rope_scaling": LLAMA_1B["rope_scaling"] | {"factor": [32]}},
            r"factor must be a positive number, not \[32\]",
        ),
        (
            {"rope_scaling": LLAMA_1B["rope_scaling"] | {"original_max_position_embeddings": "8192"}},
            r"original_max_position_embeddings must be a positive number, not '8192'",
        ),
        ({"rms_norm_eps": "1e-5"}, r"rms_norm_eps must be a positive number or 0, not '1e-5'"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps must be a positive number or 0, not nan"),
        ({"initializer_range": [0.1]}, r"initializer_range must be a positive number or 0, not \[0.1\]"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings must be true or false, not 'false'"),
        (
            {"eos_token_id": "</s>"},
            r"a token id \(bos_token_id, .*pad_token_id\) must be an integer, not '</s>'",
        ),
        ({"head_dim": 63}, r"head_dim must be even.*63"),
        ({"head_dim": None, "num_attention_heads": 24}, r"hidden_size 2048 is not a multiple of num_heads 24"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hugging_face(LLAMA_1B | change)


@pytest.mark.parametrize(
    "values, message",
    [
        ((0.0, 1.0, 4.0, 16), "factor must be a positive number, not 0.0"),
        ((8.0, 4.0, 4.0, 16), r"high_freq_factor \(4.0\) must be above low_freq_factor \(4.0\)"),
        ((8.0, 1.0, 4.0, "16"), "original_max_position_embeddings must be a positive number, not '16'"),
    ],
)
def test_impossible_rope_scaling_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(*values)

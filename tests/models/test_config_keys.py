"""Every key of config.json, against transformers: read alike, without effect there too, or refused by name."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlora_jax.models.architectures import ARCHITECTURES
from mlora_jax.models.config import DecoderConfig
from mlora_jax.models.config_keys import CONFIG_KEYS, READ, REFUSED, WITHOUT_EFFECT
from mlora_jax.models.hugging_face import load_decoder
from tests.models.references import logits_in_torch, logits_of
from tests.models.test_architectures import FULL, SLIDING, TOKENS, reference_of

TYPES = tuple(ARCHITECTURES)
# head_dim as this program would take it, so that a null is the same model; SmolLM3's own padding is beyond its V here.
SIZES = {"num_hidden_layers": 2, "head_dim": 12, "pad_token_id": 0}
FACTORS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD = {"original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", **FACTORS, **OLD}
PLAIN = {"rope_type": "default", "rope_theta": 300.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model type -> a checkpoint whose config.json says nothing of rotary embeddings."""
    made = {}
    for model_type in TYPES:
        made[model_type] = tmp_path_factory.mktemp(model_type)
        reference_of(model_type, SIZES).save_pretrained(made[model_type])
        values = json.loads((made[model_type] / "config.json").read_text())
        values.pop("rope_parameters")
        (made[model_type] / "config.json").write_text(json.dumps(values))
    return made


def edited(folder, target, changes):
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(values))
    return target


def logits_there(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return logits_in_torch(model, TOKENS)


# Name of the case -> what it adds to config.json.
ROTARY = {
    "neither": {},
    "theta at the top": {"rope_theta": 300.0},
    "rope_scaling only": {"rope_scaling": LLAMA3},
    "rope_scaling, theta at the top": {"rope_scaling": LLAMA3, "rope_theta": 300.0},
    "rope_scaling, theta within": {"rope_scaling": {**LLAMA3, "rope_theta": 300.0}, "rope_theta": 70.0},
    "rope_scaling by type": {"rope_scaling": {"type": "llama3", **FACTORS, **OLD}, "rope_theta": 300.0},
    "type and rope_type differ": {"rope_scaling": {"type": "linear", **LLAMA3}},
    "rope_type of rope_type": {"rope_scaling": {"type": "llama3", **FACTORS, **OLD, "rope_type": "default"}},
    "factor without a type": {"rope_scaling": FACTORS},
    "rope_parameters only": {"rope_parameters": PLAIN},
    "rope_parameters only, llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 300.0}},
    "rope_parameters by type": {"rope_parameters": {"type": "llama3", **FACTORS, **OLD, "rope_theta": 300.0}},
    "rope_parameters, theta at the top": {"rope_parameters": LLAMA3, "rope_theta": 300.0},
    "rope_parameters, theta at both": {"rope_parameters": PLAIN, "rope_theta": 70.0},
    "both agree": {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 300.0}, "rope_theta": 300.0},
    "both differ in type": {"rope_scaling": LLAMA3, "rope_parameters": PLAIN},
    "both differ in type, theta at the top": {"rope_scaling": LLAMA3, "rope_parameters": PLAIN, "rope_theta": 70.0},
    "both differ in factor": {
        "rope_scaling": LLAMA3 | {"factor": 2.0}, "rope_parameters": LLAMA3 | {"rope_theta": 300.0},
    },
    "the other way": {"rope_scaling": {"rope_type": "default"}, "rope_parameters": LLAMA3 | {"rope_theta": 300.0}},
    "rope_scaling null": {"rope_scaling": None, "rope_parameters": PLAIN},
    "rope_scaling empty": {"rope_scaling": {}, "rope_parameters": PLAIN},
    "rope_parameters null": {"rope_scaling": LLAMA3, "rope_parameters": None},
    "both null": {"rope_scaling": None, "rope_parameters": None, "rope_theta": 300.0},
    "theta null at the top, given within": {"rope_theta": None, "rope_parameters": PLAIN},
    "original absent": {"rope_scaling": {"rope_type": "llama3", **FACTORS}},
    "original at the top": {"rope_scaling": {"rope_type": "llama3", **FACTORS}, "original_max_position_embeddings": 8},
    "original at both": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 8},
    "original at the top of default": {"rope_parameters": PLAIN, "original_max_position_embeddings": 8},
    "partial of one": {"rope_scaling": {**LLAMA3, "partial_rotary_factor": 1.0}, "partial_rotary_factor": None},
}  # fmt: skip
# What transformers fails on, and the message here.
IMPOSSIBLE = {
    "theta null": ({"rope_theta": None}, "rope_theta must be a positive number, not None"),
    "theta null within": (
        {"rope_theta": 300.0, "rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta must be",
    ),
    "type null": ({"rope_scaling": {**LLAMA3, "rope_type": None}}, "rope_type None is not supported"),
    "type null, older name": ({"rope_scaling": {**LLAMA3, "rope_type": None, "type": "llama3"}}, "rope_type None is"),
    "original null": (
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}}, "original_max_pos.* must be a positive",
    ),
    "original null at the top": ({"rope_scaling": LLAMA3, "original_max_position_embeddings": None}, "original_max_"),
    "factor null": ({"rope_scaling": {**LLAMA3, "factor": None}}, "rope_type 'llama3' lacks 'factor'"),
    "scaling is a list": ({"rope_scaling": ["llama3"]}, "rope_scaling must be an object"),
    "part of llama3": ({"rope_scaling": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROTARY)
def test_rotary_settings_agree_with_transformers(folders, tmp_path, case):
    folder = edited(folders["llama"], tmp_path / "model", ROTARY[case])
    np.testing.assert_allclose(logits_of(load_decoder(folder), TOKENS), logits_there(folder), rtol=0, atol=1e-4)


def test_rotary_settings_differ_from_each_other(folders):
    """Else the test before would show nothing: a case is one of at least seven functions."""
    values = json.loads((folders["llama"] / "config.json").read_text())
    found = [DecoderConfig.from_hugging_face(values | changes) for changes in ROTARY.values()]
    assert len(set(found)) >= 7


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_rotary_settings_that_transformers_fails_on_are_refused(folders, tmp_path, case):
    changes, message = IMPOSSIBLE[case]
    folder = edited(folders["llama"], tmp_path / "model", changes)
    with pytest.raises(ValueError, match=message):
        load_decoder(folder)
    with pytest.raises(Exception):  # noqa: B017 - of many classes
        logits_there(folder)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, marks=pytest.mark.slow), {"rope_scaling": LLAMA3, "rope_parameters": PLAIN}],
    ids=["none", "both"],
)
def test_rotary_settings_of_every_model_type(folders, tmp_path, model_type, changes):
    folder = edited(folders[model_type], tmp_path / "model", changes)
    np.testing.assert_allclose(logits_of(load_decoder(folder), TOKENS), logits_there(folder), rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_key_of_transformers_has_a_row(model_type):
    """A key that a new version of transformers adds has to be settled."""
    theirs = AutoConfig.for_model(model_type)
    names = {name for name in {*theirs.to_dict(), *vars(theirs)} if not name.startswith("_")}
    assert names <= set(CONFIG_KEYS[model_type]), names - set(CONFIG_KEYS[model_type])
    assert not theirs.attribute_map  # else these would be further names of the same
    assert set(CONFIG_KEYS) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", TYPES)
def test_nulls_are_refused_where_transformers_refuses_them(folders, model_type):
    values = json.loads((folders[model_type] / "config.json").read_text())
    values.pop("layer_types", None)  # which may need a window
    fields = {name for name in vars(AutoConfig.for_model(model_type)) if not name.startswith("_")}
    for name, key in CONFIG_KEYS[model_type].items():
        if key.effect != READ or name in ("model_type", *set(CONFIG_KEYS[model_type]) - fields):
            continue
        try:
            AutoConfig.for_model(**values | {name: None})
        except Exception:  # of the class for wrong types, which is not public
            with pytest.raises(ValueError, match=rf"{name} must be given a value|lacks '{name}'|{name} None is"):
                DecoderConfig.from_hugging_face(values | {name: None})
        else:
            DecoderConfig.from_hugging_face(values | {name: None})


# Values of keys without effect, other than their defaults, and of keys of other model types, which are alike.
IDLE = {
    "architectures": ["Another"], "dtype": "bfloat16", "torch_dtype": "float16", "transformers_version": "4.0.0",
    "use_cache": False, "chunk_size_feed_forward": 3, "attention_dropout": 0.5, "residual_dropout": 0.4,
    "output_attentions": False, "output_hidden_states": False, "return_dict": True, "id2label": {"0": "a"},
    "label2id": {"a": 0}, "problem_type": "regression", "pretraining_tp": 2,
    "hidden_activation": "gelu", "final_logit_softcapping": 3.0, "attn_logit_softcapping": 3.0, "logit_scale": 0.1,
    "query_pre_attn_scalar": 5.0, "logits_scaling": 2.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.3,
    "residual_multiplier": 0.3, "qk_norm": True, "use_qk_norm": True, "attn_temperature_tuning": True,
    "num_experts": 4, "num_kv_shared_layers": 1, "sliding_window_pattern": 2, "rope_interleaved": True,
    "rope_ratio": 2.0, "parallel_attn": True, "use_bidirectional_attention": True, "default_theta": 50.0,
}  # fmt: skip
FOREIGN = {"attention_bias": True, "mlp_bias": True, "attention_out_bias": True, "no_rope_layers": [0, 1],
           "use_sliding_window": True, "max_window_layers": 1, "no_rope_layer_interval": 1}  # fmt: skip
# A value of every key that is refused.
REFUSALS = {
    "is_causal": False, "is_encoder_decoder": True, "per_layer_config": {"0": {"intermediate_size": 40}},
    "attention_chunk_size": 4, "kv_sharing_modes": ["own", "reuse"], "transformers_weights": "other.safetensors",
    "text_config": {"hidden_size": 4}, "decoder": {"hidden_size": 4}, "generator": {"hidden_size": 4},
    "text_encoder": {"hidden_size": 4}, "quantization_config": {"a": 1}, "sliding_window": 5,
}  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_keys_without_effect_have_none_in_transformers(folders, tmp_path, model_type):
    keys = CONFIG_KEYS[model_type]
    assert {name for name, key in keys.items() if key.effect == WITHOUT_EFFECT} <= set(IDLE)
    idle = IDLE | {name: value for name, value in FOREIGN.items() if name not in keys}
    values = json.loads((folders[model_type] / "config.json").read_text())
    plain, expected = DecoderConfig.from_hugging_face(values), logits_there(folders[model_type])
    assert all(DecoderConfig.from_hugging_face(values | {name: value}) == plain for name, value in idle.items())
    together = edited(folders[model_type], tmp_path / "model", idle)
    np.testing.assert_array_equal(logits_there(together), expected)


@pytest.mark.parametrize("model_type", TYPES)
def test_keys_that_are_refused(folders, model_type):
    keys = CONFIG_KEYS[model_type]
    refused = {name for name, key in keys.items() if key.effect == REFUSED}
    assert refused == set(REFUSALS) - ({"sliding_window"} if keys["sliding_window"].effect == READ else set())
    values = json.loads((folders[model_type] / "config.json").read_text())
    plain = DecoderConfig.from_hugging_face(values)
    for name in refused:
        with pytest.raises(ValueError, match=f"{name} .* is not supported for model_type '{model_type}': "):
            DecoderConfig.from_hugging_face(values | {name: REFUSALS[name]})
        for neutral in keys[name].neutral:
            assert DecoderConfig.from_hugging_face(values | {name: neutral}) == plain


READS = {
    "vocab_size": 68, "hidden_size": 44, "intermediate_size": 81, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 65, "initializer_range": 0.5,
    "rms_norm_eps": 0.1, "tie_word_embeddings": "other", "bos_token_id": 9, "eos_token_id": 9, "pad_token_id": 9,
    "rope_parameters": PLAIN, "rope_scaling": LLAMA3, "rope_theta": 3.0, "attention_bias": "other", "mlp_bias": "other",
    "attention_out_bias": "other", "sliding_window": 6, "layer_types": [SLIDING, FULL], "no_rope_layers": [0, 1],
    "no_rope_layer_interval": 1, "max_window_layers": 1, "use_sliding_window": "other",
}  # fmt: skip
REFUSED_VALUES = {
    "model_type": "x",
    "hidden_act": "gelu",
    "partial_rotary_factor": 0.5,
}
SLIDES = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0, "layer_types": None}
INTERVAL = {"no_rope_layers": None, "no_rope_layer_interval": 2, "layer_types": None}


@pytest.mark.parametrize("model_type", TYPES)
def test_keys_that_are_read_change_something_or_are_refused(folders, model_type):
    row, keys = ARCHITECTURES[model_type], CONFIG_KEYS[model_type]
    values = json.loads((folders[model_type] / "config.json").read_text())
    if row.switched or row.slides:
        values |= {name: value for name, value in SLIDES.items() if name in keys}
    values |= {name: value for name, value in INTERVAL.items() if name in keys}
    plain = DecoderConfig.from_hugging_face(values)
    for name, key in keys.items():
        if key.effect != READ:
            continue
        if name in REFUSED_VALUES:
            with pytest.raises(ValueError, match=name):
                DecoderConfig.from_hugging_face(values | {name: REFUSED_VALUES[name]})
        elif name == "original_max_position_embeddings":
            with_scaling = values | {"rope_scaling": LLAMA3}
            changed = DecoderConfig.from_hugging_face(with_scaling | {name: 7})
            assert changed != DecoderConfig.from_hugging_face(with_scaling)
        elif name == "layer_types" and (row.slides is None or name not in row.layered):
            with pytest.raises(ValueError, match="one kind of layer"):
                DecoderConfig.from_hugging_face(values | {name: READS[name]})
        else:
            value = READS[name]
            value = not values.get(name, row.defaults.get(name, False)) if value == "other" else value
            assert DecoderConfig.from_hugging_face(values | {name: value}) != plain, name


@pytest.mark.parametrize("model_type", ["ministral", "qwen2"])
def test_an_older_name_of_a_kind_of_layer(folders, tmp_path, model_type):
    changes = {"layer_types": ["attention", "attention"]}
    folder = edited(folders[model_type], tmp_path / "model", changes)
    np.testing.assert_allclose(logits_of(load_decoder(folder), TOKENS), logits_there(folder), rtol=0, atol=1e-4)

"""The effect of every key of a `config.json`, for each model type: the key is read, has no effect, or is refused.

The rows of a model type are all attributes of its config class in transformers, and further keys that change what
transformers computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

READ, WITHOUT_EFFECT, REFUSED = "read", "without effect", "refused"


@dataclasses.dataclass(frozen=True)
class ConfigKey:
    """One key of `config.json`.

    Args:
      effect: one of three. READ: the key determines what the model computes, or how texts begin and end.
        WITHOUT_EFFECT: the key changes no output of the model. REFUSED: any value that is not neutral is an error.
      reason: the reason for this effect, for error messages and for readers of this table.
      neutral: the values of a refused key that mean the same as its absence.
      null: whether a null is allowed. Where it is not, a null is an error, as in transformers.
    """

    effect: str
    reason: str = ""
    neutral: tuple[Any, ...] = (None,)
    null: bool = True


_VALUE, _OPTIONAL = ConfigKey(READ, null=False), ConfigKey(READ)
_RESULT = ConfigKey(WITHOUT_EFFECT, "It is about what a call of the model returns beside logits.")
_HEAD = ConfigKey(WITHOUT_EFFECT, "It counts for classifiers.")
_DROPOUT = ConfigKey(WITHOUT_EFFECT, "It counts in training by transformers; here the base is trained without dropout.")
_NESTED = ConfigKey(REFUSED, "a language model within another model is not read: give its own folder")
_CUT_CACHE = ConfigKey(
    REFUSED, "transformers ignores it when it scores a text, but cuts its cache by it when it generates one"
)

_COMMON: Mapping[str, ConfigKey] = {
    "model_type": _VALUE,
    "vocab_size": _VALUE,
    "hidden_size": _VALUE,
    "intermediate_size": _VALUE,
    "num_hidden_layers": _VALUE,
    "num_attention_heads": _VALUE,
    "num_key_value_heads": _OPTIONAL,
    "head_dim": _OPTIONAL,
    "hidden_act": _VALUE,
    "max_position_embeddings": _VALUE,
    "initializer_range": _VALUE,
    "rms_norm_eps": _VALUE,
    "tie_word_embeddings": _VALUE,
    "bos_token_id": _OPTIONAL,
    "eos_token_id": _OPTIONAL,
    "pad_token_id": _OPTIONAL,
    "rope_parameters": _OPTIONAL,
    "rope_scaling": ConfigKey(READ, "The older name of rope_parameters. It counts where both are given."),
    "rope_theta": ConfigKey(READ, "It counts where the object of rotary settings has none."),
    "partial_rotary_factor": ConfigKey(READ, "It must be 1."),
    "original_max_position_embeddings": ConfigKey(READ, "For 'llama3' it counts before that of the rotary settings."),
    "quantization_config": ConfigKey(
        REFUSED, "use a checkpoint whose weights are stored as 'float32', 'bfloat16', 'float16' or 'float64'"
    ),
    "architectures": ConfigKey(WITHOUT_EFFECT, "The weights themselves are checked."),
    "dtype": ConfigKey(WITHOUT_EFFECT, "Weights are read as they are stored, or as the caller asks."),
    "torch_dtype": ConfigKey(WITHOUT_EFFECT, "The older name of dtype."),
    "transformers_version": ConfigKey(WITHOUT_EFFECT, "It says how the file was made."),
    "use_cache": ConfigKey(WITHOUT_EFFECT, "It is about time and memory."),
    "chunk_size_feed_forward": ConfigKey(WITHOUT_EFFECT, "It is about time and memory."),
    "attention_dropout": _DROPOUT,
    "output_attentions": _RESULT,
    "output_hidden_states": _RESULT,
    "return_dict": _RESULT,
    "id2label": _HEAD,
    "label2id": _HEAD,
    "problem_type": _HEAD,
    "is_causal": ConfigKey(REFUSED, "every token sees the tokens before it and no others", (None, True)),
    "is_encoder_decoder": ConfigKey(REFUSED, "there is no encoder", (None, False)),
    "per_layer_config": ConfigKey(REFUSED, "all layers have one shape", (None, {})),
    "attention_chunk_size": _CUT_CACHE,
    "kv_sharing_modes": ConfigKey(REFUSED, "every layer has keys and values of its own"),
    "transformers_weights": ConfigKey(REFUSED, "it names another file of weights than model.safetensors"),
    "text_config": _NESTED,
    "decoder": _NESTED,
    "generator": _NESTED,
    "text_encoder": _NESTED,
}
_HEADS = {"num_key_value_heads": _VALUE}
_BIASES = {"attention_bias": _VALUE, "mlp_bias": _VALUE}
_FULL = {"sliding_window": _CUT_CACHE}
_TENSOR_PARALLEL = {"pretraining_tp": ConfigKey(WITHOUT_EFFECT, "It is about how products are cut.")}
_WINDOW = {"sliding_window": _OPTIONAL}
_LAYERS = {"layer_types": _OPTIONAL}
_SWITCHED = _WINDOW | _LAYERS | {"use_sliding_window": _VALUE}

CONFIG_KEYS: Mapping[str, Mapping[str, ConfigKey]] = {
    model_type: {**_COMMON, **own}
    for model_type, own in {
        "llama": _BIASES | _FULL | _LAYERS | _TENSOR_PARALLEL,
        "mistral": _HEADS | _WINDOW | _LAYERS,
        "ministral": _HEADS | _WINDOW | _LAYERS,
        "qwen2": _SWITCHED | {"max_window_layers": _VALUE},
        "qwen3": _SWITCHED | {"max_window_layers": _VALUE, "attention_bias": _VALUE, "head_dim": _VALUE},
        "smollm3": _SWITCHED | _BIASES | {"no_rope_layers": _OPTIONAL, "no_rope_layer_interval": _VALUE},
        "seed_oss": _BIASES | _FULL | _LAYERS | _TENSOR_PARALLEL | {
            "attention_out_bias": _VALUE, "residual_dropout": _DROPOUT,
        },
    }.items()
}  # fmt: skip


def check_keys(model_type: str, values: Mapping[str, Any]) -> None:
    """Refuses the values of a `config.json` that this program would have to ignore.

    Args:
      model_type: a key of `CONFIG_KEYS`.
      values: the parsed JSON object.

    Raises:
      ValueError: a refused key has a value that is not neutral, or a key is null that must have a value.
    """
    for name, key in CONFIG_KEYS[model_type].items():
        if name not in values:
            continue
        value = values[name]
        if key.effect == REFUSED and not any(value is each or value == each for each in key.neutral):
            raise ValueError(f"{name} {value!r} is not supported for model_type {model_type!r}: {key.reason}")
        if value is None and not key.null:
            raise ValueError(
                f"{name} must be given a value or left out for model_type {model_type!r}, not null: transformers "
                f"refuses that too"
            )

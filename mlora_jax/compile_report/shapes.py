"""The shape of a model without its weights: from a folder, the hub's cache, or a table of known models."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import huggingface_hub

from mlora_jax.models import DecoderConfig
from mlora_jax.models.config import CONFIG_FILE, read_config
from mlora_jax.models.hub import hub_id

_LLAMA_3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
_STRETCHED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Pattern for the names of a model and its variants -> the values of its config.json.
KNOWN: dict[str, dict[str, Any]] = {
    r"Llama-3\.2-1B(-Instruct)?": _LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, **_STRETCHED},
    },
    r"(Meta-)?Llama-3\.1-8B(-Instruct)?": _LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **_STRETCHED},
    },
}


def model_shape(path: str) -> DecoderConfig:
    """Returns the configuration of a model, without its weights and without network access.

    Args:
      path: a Hugging Face folder, the hub id of a model in the cache, or the name of a known model, with or without its
        owner.

    Raises:
      ValueError: the path is none of these.

    >>> model_shape("meta-llama/Llama-3.1-8B-Instruct").num_layers
    32
    """
    if path and (pathlib.Path(path) / CONFIG_FILE).is_file():
        return read_config(path)
    name, on_hub = path, hub_id(path)
    if on_hub is not None:
        name, revision = on_hub
        cached = huggingface_hub.try_to_load_from_cache(name, CONFIG_FILE, revision=revision)
        if isinstance(cached, str):
            return read_config(pathlib.Path(cached).parent)
    for pattern, values in KNOWN.items():
        if re.fullmatch(pattern, name.rpartition("/")[2]):
            return DecoderConfig.from_hugging_face(values)
    raise ValueError(
        f"the shape of the model {path!r} is not known: set config.model.path to a folder with its {CONFIG_FILE}, the "
        "hub id of one that was downloaded, or one of Llama-3.2-1B, Llama-3.1-8B and their -Instruct"
    )

"""Shapes of models that are asked for before they are there."""

from __future__ import annotations

from mlora_jax.models.config import DecoderConfig, RopeScaling, read_config
from mlora_jax.models.hub import checkpoint_folder

_LLAMA3 = dict(
    vocab_size=128256,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    bos_token_id=128000,
    eos_token_ids=(128001, 128008, 128009),
    num_kv_heads=8,
    num_heads=32,
)

# From the config.json of each; their weights are gated, the shapes are public.
KNOWN_SHAPES: dict[str, DecoderConfig] = {
    "meta-llama/Llama-3.2-1B-Instruct": DecoderConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        head_dim=64,
        tie_word_embeddings=True,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        **_LLAMA3,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": DecoderConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        head_dim=128,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        **_LLAMA3,
    ),
}


def decoder_shape(path: str) -> DecoderConfig:
    """The shape of a model: of a known hub id without asking anybody, else from its config.json; weights are not read.

    Raises:
      FileNotFoundError, ValueError: as `checkpoint_folder` and `read_config`.

    >>> decoder_shape("meta-llama/Llama-3.2-1B-Instruct").num_layers
    16
    """
    return KNOWN_SHAPES[path] if path in KNOWN_SHAPES else read_config(checkpoint_folder(path, weights=False))

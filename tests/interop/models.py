"""A tiny checkpoint of transformers and a random adapter on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM

from mlora_jax.adapters import adapt, set_profile, split
from mlora_jax.models import load_decoder
from tests.tiny import random_like

RANK = 6
LAYERS = 3
PATHS = {
    "layers.self_attn.q_proj": "model.layers.{}.self_attn.q_proj",
    "layers.self_attn.v_proj": "model.layers.{}.self_attn.v_proj",
    "layers.mlp.down_proj": "model.layers.{}.mlp.down_proj",
    "lm_head": "lm_head",
}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12)).astype(np.int32)


def save_base(folder, *, dtype=torch.float32, max_shard_size="5GB", **changes):
    """A Llama checkpoint none of whose tensors is special, written by transformers."""
    values = dict(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(values | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + ("norm" in name))
    model.to(dtype).save_pretrained(str(folder), max_shard_size=max_shard_size)
    return folder


def random_adapter(folder, targets=("q_proj", "v_proj", "down_proj", "lm_head"), rank=RANK):
    """(adapted model, adapter tree) of the base in a folder."""
    model = adapt(load_decoder(folder, dtype=jnp.float32), rank, targets, key=jax.random.key(1))
    adapter = split(model)[2]
    return model, random_like(adapter, seed=2, scale=0.3)


def pairs(adapter):
    """{module's name in torch: (a [D, R], b [R, F])}, by indexing the tree by hand."""
    found = {}
    for path, name in PATHS.items():
        node = adapter
        for part in path.split("."):
            node = node[part]
        a, b = np.asarray(node["a"][...]), np.asarray(node["b"][...])
        for layer in range(LAYERS) if a.ndim == 3 else [None]:
            found[name.format(layer)] = (a, b) if layer is None else (a[layer], b[layer])
    return found


def our_logits(model, adapter, p):
    """Logits of the adapted decoder under a profile [R] or {pattern: p}."""
    graphdef, base, _, profile = split(model)
    return np.asarray(_logits(graphdef, base, adapter, set_profile(profile, jax.tree.map(jnp.asarray, p))))


def logits_as_is(model):
    """Logits of an adapted decoder under the profile that it has."""
    return np.asarray(_logits(*split(model)))


def decoder_logits(folder):
    """Logits of the decoder in a folder, by our own reader."""
    return np.asarray(_plain_logits(*nnx.split(load_decoder(folder))))


@functools.partial(jax.jit, static_argnums=0)
def _plain_logits(graphdef, state):
    return nnx.merge(graphdef, state)(jnp.asarray(TOKENS))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, base, adapter, profile):
    return nnx.merge(graphdef, base, adapter, profile)(jnp.asarray(TOKENS))

"""Models of transformers to compare with, and the logits of theirs and ours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def randomized(reference, seed=0):
    """The model with tensors none of which is special: its logits are of size one and more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + ("norm" in name))
    return reference


def logits_in_torch(reference, tokens):
    with torch.no_grad():
        return reference(torch.from_numpy(tokens).long()).logits.float().numpy()


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def logits_of(model, tokens):
    return np.asarray(_logits(*nnx.split(model), jnp.asarray(tokens)))

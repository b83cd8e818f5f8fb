"""Puts adapters on the linear layers of a Flax NNX model, and splits it into pytrees for pure functions."""

from mlora_jax.adapters.layers import LAYERS, AdaptedLayer, AdaptedLinear
from mlora_jax.adapters.model import adapt, fold_in_training, fold_where_cheaper, split, watch_inputs
from mlora_jax.adapters.profiles import set_dropout_key, set_profile
from mlora_jax.adapters.variables import AdapterParam, DropoutKey, InputGram, RankProfile

__all__ = [
    "LAYERS",
    "AdaptedLayer",
    "AdaptedLinear",
    "AdapterParam",
    "DropoutKey",
    "InputGram",
    "RankProfile",
    "adapt",
    "fold_in_training",
    "fold_where_cheaper",
    "set_dropout_key",
    "set_profile",
    "split",
    "watch_inputs",
]

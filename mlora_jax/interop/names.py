"""The names of the decoder's linear layers in other programs."""

from __future__ import annotations

from mlora_jax.models.hugging_face import WEIGHT_MAP

KERNEL = ".kernel"
# The paths of the layers that an adapter of another program may adapt.
LINEAR_PATHS = tuple(name.removesuffix(KERNEL) for name in WEIGHT_MAP if name.endswith(KERNEL))


def weight_name(path: str, layer: int | None) -> str:
    """Returns the name of a linear layer's matrix [F, D] in a Hugging Face checkpoint.

    Args:
      path: the path of the module in our decoder.
      layer: the index of the layer in the stack; None for a layer that is not stacked.

    Raises:
      ValueError: the decoder has no such linear layer.

    >>> weight_name("layers.mlp.up_proj", 3)
    'model.layers.3.mlp.up_proj.weight'
    """
    if path not in LINEAR_PATHS:
        raise ValueError(
            f"{path} has no name in a Hugging Face model; linear layers with one: {', '.join(LINEAR_PATHS)}"
        )
    return WEIGHT_MAP[path + KERNEL][0].format(layer=layer)


def module_name(path: str, layer: int | None) -> str:
    """Returns the name of the torch module, such as "model.layers.3.mlp.up_proj".

    Args:
      path: the path of the module in our decoder.
      layer: the index of the layer in the stack; None for a layer that is not stacked.

    Raises:
      ValueError: the decoder has no such linear layer.
    """
    return weight_name(path, layer).removesuffix(".weight")

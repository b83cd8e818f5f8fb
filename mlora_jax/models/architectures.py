"""The model types of the Llama family and what sets each apart besides its sizes: one row for each type.

A row follows transformers' `configuration_*.py` and `modeling_*.py` of its model type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"
# Older names of the kinds of layers; see `remap_legacy_layer_types` in transformers.
_OLDER_NAMES = {"attention": FULL}


def _every_layer(values: Mapping[str, Any], layers: int) -> list[bool]:
    return [True] * layers


def _from_a_layer_on(values: Mapping[str, Any], layers: int) -> list[bool]:
    first = values["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int):
        raise ValueError(f"max_window_layers must be an integer, not {first!r}")
    return [layer >= first for layer in range(layers)]


def _without_rotation(values: Mapping[str, Any], layers: int) -> list[bool]:
    return [not turned for turned in rotary_layers("smollm3", values, layers)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model type.

    Args:
      class_name: the name of the model class in transformers.
      defaults: maps a key of `config.json` to the value that it has where the file lacks the key.
      keys: maps a field of `DecoderConfig` to its key in `config.json`, for options that not every model type has.
      fixed: maps a field of `DecoderConfig` to its value, for fields that no key changes.
      slides: a function (values, L) -> which layers attend to a sliding window. It counts where the model has a window
        and no `layer_types`. None: the model type has no window.
      switched: whether the window counts only where `use_sliding_window` is true.
      layered: the keys besides `sliding_window` that describe single layers. They are written to `config.json`.
    """

    class_name: str
    defaults: Mapping[str, Any]
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    slides: Callable[[Mapping[str, Any], int], list[bool]] | None = None
    switched: bool = False
    layered: tuple[str, ...] = ()


_MISTRAL = {
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_QWEN = {
    "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
_SWITCHED = ("use_sliding_window", "max_window_layers", "layer_types")
_BIASES = {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}

ARCHITECTURES = {
    "llama": Architecture(
        class_name="LlamaForCausalLM",
        defaults={"bos_token_id": 1, "eos_token_id": 2},
        keys=_BIASES,
    ),
    "mistral": Architecture(
        class_name="MistralForCausalLM",
        defaults=_MISTRAL,
        slides=_every_layer,
    ),
    "ministral": Architecture(
        class_name="MinistralForCausalLM",
        defaults=_MISTRAL,
        slides=_every_layer,
        layered=("layer_types",),
    ),
    "qwen2": Architecture(
        class_name="Qwen2ForCausalLM",
        defaults=_QWEN,
        fixed={"attention_bias": True, "attention_output_bias": False},
        slides=_from_a_layer_on,
        switched=True,
        layered=_SWITCHED,
    ),
    "qwen3": Architecture(
        class_name="Qwen3ForCausalLM",
        defaults=_QWEN | {"head_dim": 128},
        keys={"attention_bias": "attention_bias"},
        fixed={"qk_norm": True},
        slides=_from_a_layer_on,
        switched=True,
        layered=_SWITCHED,
    ),
    "smollm3": Architecture(
        class_name="SmolLM3ForCausalLM",
        defaults={
            "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "bos_token_id": 128000,
            "eos_token_id": 128001, "pad_token_id": 128004, "tie_word_embeddings": True, "no_rope_layer_interval": 4,
        },
        keys=_BIASES,
        slides=_without_rotation,
        switched=True,
        layered=("use_sliding_window", "layer_types", "no_rope_layers"),
    ),
    "seed_oss": Architecture(
        class_name="SeedOssForCausalLM",
        defaults={
            "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288, "bos_token_id": 0,
            "eos_token_id": 2, "pad_token_id": 1, "attention_bias": True, "attention_out_bias": False,
        },
        keys=_BIASES | {"attention_output_bias": "attention_out_bias"},
    ),
}  # fmt: skip


def sliding_layers(model_type: str, values: Mapping[str, Any], layers: int) -> tuple[Any, tuple[bool, ...] | None]:
    """Returns the sliding window and the layers that attend to it.

    Args:
      model_type: a key of `ARCHITECTURES`.
      values: the values of `config.json`, completed with the defaults of the model type.
      layers: L.

    Returns:
      (the size of the window in tokens, for each layer whether it attends to the window), or (None, None) where there
      is no window.

    Raises:
      ValueError: `layer_types` has a wrong length or an unknown kind, or it names a sliding window where the model has
        none, or it names several kinds for a model type whose layers are all alike.
    """
    row = ARCHITECTURES[model_type]
    window, kinds = values.get("sliding_window"), values.get("layer_types")
    if isinstance(kinds, Sequence) and not isinstance(kinds, str):
        kinds = [_OLDER_NAMES.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    if row.slides is None:
        if kinds is not None and any(kind != FULL for kind in kinds):
            raise ValueError(f"a {model_type!r} has one kind of layer, {FULL!r}, but layer_types is {kinds!r}")
        return None, None
    if row.switched and not values.get("use_sliding_window"):
        window = None
    if kinds is None:
        return (None, None) if window is None else (window, tuple(row.slides(values, layers)))
    if not isinstance(kinds, Sequence) or len(kinds) != layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise ValueError(f"layer_types must name {FULL!r} or {SLIDING!r} for each of {layers} layers, not {kinds!r}")
    slides = tuple(kind == SLIDING for kind in kinds)
    if "layer_types" not in row.layered and slides != (window is not None,) * layers:
        raise ValueError(
            f"a {model_type!r} with sliding_window {window!r} has one kind of layer, but layer_types is {kinds!r}: a "
            f"Mistral with both kinds has the model_type 'ministral'"
        )
    if window is None and any(slides):
        raise ValueError(
            f"layer_types names {SLIDING!r}, but there is no window: sliding_window is "
            f"{values.get('sliding_window')!r}, use_sliding_window {values.get('use_sliding_window')!r}"
        )
    return (None, None) if window is None else (window, slides)


def rotary_layers(model_type: str, values: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Returns which layers rotate queries and keys.

    Args:
      model_type: a key of `ARCHITECTURES`.
      values: the values of `config.json`, completed with the defaults of the model type.
      layers: L.

    Raises:
      ValueError: `no_rope_layers` does not have 0 or 1 for every layer, or `no_rope_layer_interval` is not a positive
        integer.
    """
    if "no_rope_layers" not in ARCHITECTURES[model_type].layered:
        return (True,) * layers
    given, interval = values.get("no_rope_layers"), values.get("no_rope_layer_interval")
    if given is None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"no_rope_layer_interval must be a positive integer, not {interval!r}")
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not isinstance(given, Sequence) or len(given) < layers or any(value not in (0, 1) for value in given):
        raise ValueError(f"no_rope_layers must have a 1 (rotary) or 0 for each of {layers} layers, not {given!r}")
    return tuple(bool(value) for value in given[:layers])


def layer_values(
    model_type: str, window: int | None, slides: Sequence[bool] | None, rotary: Sequence[bool] | None, layers: int
) -> dict[str, Any]:
    """Writes the keys of `config.json` from which `sliding_layers` and `rotary_layers` read these settings again.

    Args:
      model_type: a key of `ARCHITECTURES`.
      window: the size of the sliding window in tokens, or None.
      slides: for each layer whether it attends to the window, or None where there is no window.
      rotary: for each layer whether it rotates queries and keys; None: all layers do.
      layers: L.

    Returns:
      The keys that the model type has, with their values.
    """
    row = ARCHITECTURES[model_type]
    slides = [False] * layers if slides is None else list(slides)
    full = slides.index(True) if True in slides else layers
    values = {
        "use_sliding_window": window is not None,
        "max_window_layers": full if all(slides[full:]) else layers,  # has no effect beside layer_types
        "layer_types": [SLIDING if slide else FULL for slide in slides],
        "no_rope_layers": [1] * layers if rotary is None else [int(turned) for turned in rotary],
    }
    written = {key: values[key] for key in row.layered}
    return written if row.slides is None else written | {"sliding_window": window}

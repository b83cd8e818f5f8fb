"""The shape and constants of a Llama-family decoder, read from and written to a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from mlora_jax.models.architectures import ARCHITECTURES, layer_values, rotary_layers, sliding_layers
from mlora_jax.models.config_keys import check_keys
from mlora_jax.models.json_file import read_json_object

CONFIG_FILE = "config.json"
MODEL_TYPES = tuple(ARCHITECTURES)
ACTIVATIONS = ("silu", "swish")  # The two are names of one function.
ROPE_TYPES = ("default", "llama3")
SOURCE_DTYPES = ("float32", "bfloat16", "float16", "float64")

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "max_position_embeddings",
)  # fmt: skip

# Field of `DecoderConfig` -> key of config.json, for values that are copied unchanged.
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_OPTIONAL = {
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
}
_SWITCHES = ("tie_word_embeddings", "attention_bias", "attention_output_bias", "mlp_bias", "qk_norm")
_SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor")

# The default, None, of a field whose value `__post_init__` derives from other fields: the attribute is never None.
_DERIVED: Any = None


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The way in which Llama 3 stretches the rotary wavelengths for contexts longer than those of pretraining.

    Wavelengths up to `original / high_freq_factor` stay the same. Wavelengths from `original / low_freq_factor` on are
    multiplied by `factor`. Wavelengths in between are interpolated.

    Args:
      factor: the factor by which the longest wavelengths grow.
      low_freq_factor: the context length of pretraining divided by the shortest wavelength that grows by all of
        `factor`.
      high_freq_factor: the context length of pretraining divided by the longest wavelength that stays the same.
      original_max_position_embeddings: the context length of pretraining, in tokens.

    Raises:
      ValueError: a value is not positive, or `high_freq_factor` is not above `low_freq_factor`.

    Source: Llama 3.1's `apply_scaling` (meta-llama/llama-models, models/llama3/model.py).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"rope scaling: {name} must be a positive number, not {value!r}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope scaling: high_freq_factor ({self.high_freq_factor}) must be above low_freq_factor "
                f"({self.low_freq_factor})"
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything besides the weights that determines what a decoder computes.

    The config is hashable, so it can be a static part of a compiled function.

    Args:
      vocab_size: V.
      hidden_size: D, the width of the residual stream.
      intermediate_size: the width inside the SwiGLU block.
      num_layers: L.
      num_heads: H, the number of query heads.
      num_kv_heads: KV, the number of key and value heads, a divisor of H; None: H.
      head_dim: Hd, the number of features of one head, which is even; None: hidden_size / num_heads.
      rope_theta: the base of the rotary wavelengths.
      rope_scaling: the stretching of the rotary wavelengths, or None.
      rms_norm_eps: the number that is added to the mean square.
      tie_word_embeddings: whether the output head is the embedding itself.
      max_position_embeddings: the context length in tokens.
      attention_bias: whether q, k and v projections have a bias.
      attention_output_bias: whether the o projection has a bias; None: the value of `attention_bias`.
      mlp_bias: whether gate, up and down projections have a bias.
      qk_norm: whether queries and keys are normalised, each head on its own, before they are rotated.
      sliding_window: the number of latest positions that a query sees, its own included; None: a query sees all
        positions up to its own.
      sliding_layers: for each layer whether it has the sliding window; None: every layer has it, if there is one.
      rotary_layers: for each layer whether it rotates queries and keys; None: every layer does.
      bos_token_id: the token that begins a text, or None.
      eos_token_ids: the tokens that end a text, possibly none.
      pad_token_id: the token that fills rows, or None. It is kept for other programs only.
      initializer_range: the standard deviation of freshly made weights.
      model_type: the name by which transformers knows the model, a key of `ARCHITECTURES`.

    Raises:
      ValueError: a size is not a positive integer, one number of heads does not divide the other, head_dim is odd, a
        constant is not a number of its range, a switch is not true or false, a token is not an id, a field has not one
        value for each layer, or the model type is unknown.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = _DERIVED
    head_dim: int = _DERIVED
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    attention_output_bias: bool = _DERIVED
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    rotary_layers: tuple[bool, ...] | None = None
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    model_type: str = "llama"

    def __post_init__(self) -> None:
        _check_choice("model_type", self.model_type, MODEL_TYPES)
        for name, stand_in in (("num_kv_heads", self.num_heads), ("attention_output_bias", self.attention_bias)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, stand_in)
        for name in _SIZES:
            value = getattr(self, name)
            if name != "head_dim" or value is not None:
                _check_integer(name, value, least=1)
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}: give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        _check_number("rope_theta", self.rope_theta)
        for name in ("rms_norm_eps", "initializer_range"):
            _check_number(name, getattr(self, name), zero=True)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for value in (*self.eos_token_ids, self.bos_token_id, self.pad_token_id):
            if value is not None:
                _check_integer("a token id (bos_token_id, eos_token_id, pad_token_id)", value, least=None)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        self._check_layers()

    def _check_layers(self) -> None:
        """Checks the fields with one value for each layer, and gives equal settings the same form."""
        if self.sliding_window is None:
            if self.sliding_layers is not None:
                raise ValueError(f"sliding_layers {self.sliding_layers!r} without a sliding_window")
        else:
            _check_integer("sliding_window", self.sliding_window, least=1)
            if self.sliding_layers is None:
                object.__setattr__(self, "sliding_layers", (True,) * self.num_layers)
        for name in ("sliding_layers", "rotary_layers"):
            value = getattr(self, name)
            if value is None:
                continue
            if len(value) != self.num_layers or not all(isinstance(each, bool) for each in value):
                raise ValueError(f"{name} must be true or false for each of {self.num_layers} layers, not {value!r}")
        if self.rotary_layers is not None and all(self.rotary_layers):
            object.__setattr__(self, "rotary_layers", None)

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Reads the content of a Hugging Face `config.json`.

        Both forms of the rotary settings are read: `rope_theta` with `rope_scaling`, and the `rope_parameters` that
        transformers 5 writes. Where both are given, `rope_scaling` counts, as in transformers. A key that is absent has
        the default that transformers gives it for the model type. `mlora_jax.models.config_keys` lists the effect of
        every key.

        Args:
          values: the parsed JSON object.

        Returns:
          The configuration.

        Raises:
          ValueError: a model type, activation, rotary type, quantisation or other key is not supported, or a value is
            missing, impossible or of a wrong type.
        """
        model_type = _check_choice("model_type", values.get("model_type"), MODEL_TYPES)
        row = ARCHITECTURES[model_type]
        values = {**row.defaults, **values}
        _check_choice("hidden_act", values.get("hidden_act", "silu"), ACTIVATIONS)
        missing = [key for key in _REQUIRED.values() if values.get(key) is None]
        if missing:
            raise ValueError(f"config.json lacks {_listed(missing)}: without it the shape of the model is unknown")
        check_keys(model_type, values)
        fields = {field: values[key] for field, key in _REQUIRED.items()}
        optional = {**_OPTIONAL, **row.keys}
        fields |= {field: values[key] for field, key in optional.items() if values.get(key) is not None}
        fields |= row.fixed
        layers = fields["num_layers"]
        _check_integer("num_layers", layers, least=1)
        window, slides = sliding_layers(model_type, values, layers)
        theta, scaling = _rope(values)
        eos = values.get("eos_token_id")
        eos = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
        return cls(
            rope_theta=theta,
            rope_scaling=scaling,
            bos_token_id=values.get("bos_token_id"),
            eos_token_ids=eos,
            pad_token_id=values.get("pad_token_id"),
            sliding_window=window,
            sliding_layers=slides,
            rotary_layers=rotary_layers(model_type, values, layers),
            model_type=model_type,
            **fields,
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """Returns the content of a `config.json` that both transformers 4 and transformers 5 read.

        Returns:
          A dict that JSON can hold, from which `DecoderConfig.from_hugging_face` makes this configuration again.

        Raises:
          ValueError: the model type has no key for a field of this configuration that is not at its default.
        """
        row, eos = ARCHITECTURES[self.model_type], self.eos_token_ids
        keys = {**_REQUIRED, **_OPTIONAL, **row.keys}
        scaling = None
        if self.rope_scaling is not None:
            scaling = {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        layered = (self.sliding_window, self.sliding_layers, self.rotary_layers, self.num_layers)
        values = {
            "architectures": [row.class_name],
            "model_type": self.model_type,
            "hidden_act": "silu",
            **{key: getattr(self, field) for field, key in keys.items()},
            **layer_values(self.model_type, *layered),
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
        }
        if self.pad_token_id is not None or "pad_token_id" in row.defaults:
            values["pad_token_id"] = self.pad_token_id
        back = DecoderConfig.from_hugging_face(values)
        if back != self:
            lost = [field.name for field in dataclasses.fields(self)
                    if getattr(self, field.name) != getattr(back, field.name)]  # fmt: skip
            raise ValueError(
                f"model_type {self.model_type!r} has no place in its config.json for "
                f"{', '.join(f'{name}={getattr(self, name)!r}' for name in lost)}"
            )
        return values


def read_config(folder: str | os.PathLike) -> DecoderConfig:
    """Reads the `config.json` of a Hugging Face folder.

    Args:
      folder: the folder.

    Returns:
      The configuration.

    Raises:
      FileNotFoundError: there is no `config.json`.
      ValueError: the file is not a JSON object, or it describes an unsupported model.
    """
    file = pathlib.Path(folder) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}: it is not a Hugging Face model folder")
    values = read_json_object(file)
    try:
        return DecoderConfig.from_hugging_face(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Reads the base and the scaling of the rotary embedding from either form."""
    for key in ("rope_parameters", "rope_scaling"):
        if values.get(key) and not isinstance(values[key], Mapping):
            raise ValueError(f"{key} must be an object, not {values[key]!r}")
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}  # in this order, as in transformers
    nested = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(f"rotary settings per kind of layer ({_listed(nested)}) are not supported")
    theta = _check_number("rope_theta", rope.get("rope_theta", values.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    _check_choice("rope_type", kind, ROPE_TYPES)
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor {partial!r} is not supported: it must be 1.0")
    if kind == "default":
        return theta, None
    missing = [key for key in _SCALING_KEYS if rope.get(key) is None]
    if missing:
        raise ValueError(f"rope_type 'llama3' lacks {_listed(missing)} in config.json")
    # As in transformers, the key outside the object counts before the one in it, and max_position_embeddings last.
    original = rope.get("original_max_position_embeddings", values.get("max_position_embeddings", 2048))
    original = values.get("original_max_position_embeddings", original)
    original = int(_check_number("original_max_position_embeddings", original))
    factors = {key: _check_number(key, rope[key]) for key in _SCALING_KEYS}
    return theta, RopeScaling(**factors, original_max_position_embeddings=original)


def _check_number(name: str, value: Any, *, zero: bool = False) -> float:
    """Returns the value as a float if it is a positive finite number (or 0, where that is allowed)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 < value < math.inf or (zero and value == 0)):
        raise ValueError(f"{name} must be a positive number{' or 0' if zero else ''}, not {value!r}")
    return float(value)


def _check_integer(name: str, value: Any, *, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise ValueError(f"{name} must be {'an' if least is None else 'a positive'} integer, not {value!r}")


def _check_choice(key: str, value: Any, supported: tuple[str, ...]) -> str:
    """Returns the value if it is supported."""
    if value not in supported:
        raise ValueError(f"{key} {value!r} is not supported: this decoder knows {_listed(supported)}")
    return value


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)

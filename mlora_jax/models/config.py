"""Shape and constants of a Llama-family decoder, and what of a Hugging Face `config.json` is supported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

MODEL_TYPES = ("llama",)
ACTIVATIONS = ("silu", "swish")  # Two names of one function.
ROPE_TYPES = ("default", "llama3")
SOURCE_DTYPES = ("float32", "bfloat16", "float16", "float64")

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "max_position_embeddings",
)  # fmt: skip

# Our field -> the key in config.json, for what is carried over as it stands.
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
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "initializer_range": "initializer_range",
}
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary wavelengths beyond the context of pretraining.

    Wavelengths up to `original / high_freq_factor` stay, those from `original / low_freq_factor` on are
    multiplied by `factor`, those between are interpolated.

    Args:
        factor: how much longer the longest wavelengths become.
        low_freq_factor: the context length divided by the wavelength from which all of `factor` applies.
        high_freq_factor: the same ratio from which nothing applies.
        original_max_position_embeddings: context length of pretraining, in tokens.

    Raises:
        ValueError: a value that is not positive, or `high_freq_factor` not above `low_freq_factor`.

    Source: Llama 3.1's `apply_scaling` (meta-llama/llama-models, models/llama3/model.py).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
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
    """What fixes a decoder's function up to its weights; hashable, so it can sit in a compiled graph.

    Args:
        vocab_size: V.
        hidden_size: D, width of the residual stream.
        intermediate_size: width inside the SwiGLU block.
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: key and value heads, a divisor of H; None: as many as H.
        head_dim: features of one head, even; None: hidden_size / num_heads.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: None, or Llama 3's stretching of them.
        rms_norm_eps: added to the mean square.
        tie_word_embeddings: whether the output head is the embedding itself.
        max_position_embeddings: context length in tokens.
        attention_bias: whether q, k, v and o projections have a bias.
        mlp_bias: whether gate, up and down projections have a bias.
        bos_token_id: token that begins a text, or None.
        eos_token_ids: tokens that end a text, possibly none.
        initializer_range: standard deviation of freshly made weights.

    Raises:
        ValueError: a size that is not a positive integer, heads that do not divide, an odd head_dim, a constant that is
            no number of its range, a switch that is not true or false, a token that is not an id.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
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
        for value in (*self.eos_token_ids, *([] if self.bos_token_id is None else [self.bos_token_id])):
            _check_integer("a token id (bos_token_id, eos_token_id)", value, least=None)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Reads the content of a Hugging Face `config.json`.

        Both forms of the rotary settings are understood: `rope_theta` with `rope_scaling`, and the
        `rope_parameters` that transformers 5 writes. A key that is absent has the default of `LlamaConfig`.

        Args:
            values: the parsed JSON object.

        Returns:
            The configuration.

        Raises:
            ValueError: a model type, activation, rotary type or quantisation that is not supported, or a
                value that is missing, impossible or of another type.
        """
        _reject("model_type", values.get("model_type"), MODEL_TYPES)
        _reject("hidden_act", values.get("hidden_act", "silu"), ACTIVATIONS)
        if values.get("quantization_config") is not None:
            raise ValueError(
                f"quantization_config {values['quantization_config']!r} is not supported: use a checkpoint whose "
                f"weights are stored as {_listed(SOURCE_DTYPES)}"
            )
        missing = [key for key in _REQUIRED.values() if values.get(key) is None]
        if missing:
            raise ValueError(f"config.json lacks {_listed(missing)}: without it the shape of the model is unknown")
        fields = {field: values[key] for field, key in _REQUIRED.items()}
        fields |= {field: values[key] for field, key in _OPTIONAL.items() if values.get(key) is not None}
        theta, scaling = _rope(values)
        eos = values.get("eos_token_id", 2)
        eos = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
        return cls(
            rope_theta=theta,
            rope_scaling=scaling,
            bos_token_id=values.get("bos_token_id", 1),
            eos_token_ids=eos,
            **fields,
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers 4 and 5 both read.

        Returns:
            A JSON-able dict; `DecoderConfig.from_hugging_face` gives this configuration back.
        """
        values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        values |= {key: getattr(self, field) for field, key in (_REQUIRED | _OPTIONAL).items()}
        eos = self.eos_token_ids
        scaling = (
            None if self.rope_scaling is None else {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        )
        return values | {
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
        }


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from either form."""
    for key in ("rope_parameters", "rope_scaling"):
        if values.get(key) and not isinstance(values[key], Mapping):
            raise ValueError(f"{key} must be an object, not {values[key]!r}")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = _check_number("rope_theta", rope.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    _reject("rope_type", kind, ROPE_TYPES)
    partial = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor {partial!r} is not supported: it must be 1.0")
    if kind == "default":
        return theta, None
    missing = [key for key in _SCALING_KEYS if rope.get(key) is None]
    if missing:
        raise ValueError(f"rope_type 'llama3' lacks {_listed(missing)} in config.json")
    original = rope.get("original_max_position_embeddings") or values.get("max_position_embeddings", 2048)
    original = int(_check_number("original_max_position_embeddings", original))
    return theta, RopeScaling(*(_check_number(key, rope[key]) for key in _SCALING_KEYS), original)


def _check_number(name: str, value: Any, *, zero: bool = False) -> float:
    """The value as a float, if it is a positive finite number (or 0, where that is allowed)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 < value < math.inf or (zero and value == 0)):
        raise ValueError(f"{name} must be a positive number{' or 0' if zero else ''}, not {value!r}")
    return float(value)


def _check_integer(name: str, value: Any, *, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise ValueError(f"{name} must be {'an' if least is None else 'a positive'} integer, not {value!r}")


def _reject(key: str, value: Any, supported: tuple[str, ...]) -> None:
    if value not in supported:
        raise ValueError(f"{key} {value!r} is not supported: this decoder knows {_listed(supported)}")


def _listed(names) -> str:
    return ", ".join(repr(name) for name in names)

"""The Llama-family decoder, its configuration, its tokenizer and the Hugging Face layout."""

import importlib
from typing import Any

_HOMES = {
    "Cache": "decoder",
    "Decoder": "decoder",
    "DecoderConfig": "config",
    "RopeScaling": "config",
    "Tokenizer": "tokenizer",
    "checkpoint_folder": "hub",
    "load_decoder": "hugging_face",
    "quantize_decoder": "quantized",
    "read_config": "config",
    "save_decoder": "hugging_face",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

"""Nested low-rank adaptation for JAX and Flax: train one LoRA adapter, read it out at every rank."""

import importlib
from typing import Any

_HOMES = {
    "RankHierarchy": "core",
    "adapt": "adapters",
    "aurac": "core",
    "export_peft": "interop",
    "fold": "core",
    "import_peft": "interop",
    "load_adapted": "training.adapter_file",
    "load_adapter": "training.adapter_file",
    "load_decoder": "models",
    "p_scaled_product": "core",
    "rank_curve": "evaluate",
    "save_adapter": "training.adapter_file",
    "set_dropout_key": "adapters",
    "set_profile": "adapters",
    "split": "adapters",
    "squeeze": "core",
    "train": "run.train",
    "truncate": "core",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy, so that `mlora_jax.core` can be imported where flax is not installed.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]

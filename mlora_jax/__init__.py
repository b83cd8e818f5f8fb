"""Nested low-rank adaptation for JAX and Flax: train one LoRA adapter, read it out at every rank."""

import importlib
import sys
import types

_HOMES = {
    "RankHierarchy": "core",
    "adapt": "adapt",
    "aurac": "core",
    "export_peft": "interop",
    "fold": "core",
    "import_peft": "interop",
    "load_adapted": "train.adapter_file",
    "load_adapter": "train.adapter_file",
    "load_decoder": "models",
    "p_scaled_product": "core",
    "rank_curve": "evaluate",
    "save_adapter": "train.adapter_file",
    "set_dropout_key": "adapt",
    "set_profile": "adapt",
    "split": "adapt",
    "squeeze": "core",
    "train": "run",
    "truncate": "core",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str):
    # Lazy, so that `mlora_jax.core` can be imported where flax is not installed.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Package(types.ModuleType):
    """Keeps `mlora_jax.adapt` and `mlora_jax.train` the public functions, though submodules bear the same names."""

    def __setattr__(self, name, value):
        # The import system binds a submodule to its parent once it is loaded.
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return [*globals(), *__all__]

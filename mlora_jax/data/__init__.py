"""Data: tasks as TFDS builders, rows as tokens with a loss mask, and batches that resume exactly.

    from mlora_jax.data import load_task, make_pipeline
    from mlora_jax.data.tokenize import tokenize

    data = load_task("trec", raw_dir="...", tokenizer=tokenizer)
    tokenized = tokenize(data.train, tokenizer, boundary=data.boundary, max_length=512, overflow="error")
    pipeline = make_pipeline(tokenized.examples, seed=0, batch_size=32, accumulation=1, epochs=3)

Names are imported when they are first used, so importing this package imports neither TFDS nor grain.
"""

import importlib
from typing import Any

_HOMES = {
    "Example": "tokenize",
    "Pipeline": "pipeline",
    "Style": "tasks",
    "TASKS": "tasks",
    "Task": "tasks",
    "TaskData": "load",
    "Tokenized": "tokenize",
    "TrialsPipeline": "pipeline",
    "batch_shape": "pipeline",
    "collate": "pipeline",
    "encode_row": "tokenize",
    "find_task": "tasks",
    "load_task": "load",
    "hold_out": "load",
    "make_pipeline": "pipeline",
    "make_trials_pipeline": "pipeline",
    "prompt_tokens": "tokenize",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]  the names are resolved by __getattr__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

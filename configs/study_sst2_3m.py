"""A cell of the study: SST-2 review sentiment on stories-3m.

    python -m experiments.study --workdir DIR --cells sst2_3m --models MODELS --data DATA

MODELS holds the model's folder and DATA that of the raw data, by the names below.

What is compared: `mlora_jax.study.rivals`. Results: docs/study.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The cell's values; the rest is in `mlora_jax.config.DEFAULTS` and `mlora_jax.study.keys`."""
    return ConfigDict(
        {
            "model": {"path": "stories-3m"},
            "data": {"task": "sst2", "raw_dir": "sst2", "pad_multiple": 16, "limit": 5120},
            "train": {"epochs": 1, "batch_size": 32, "trials_at_once": 1},
            "validation": {"holdout": 0.1, "limit": 256},
            "checkpoint": {"every": 0},
            "study": {"groups": ("leading", "dearer"), "rank": 32, "start": (0.0003, 0.001, 0.003)},
        }
    )

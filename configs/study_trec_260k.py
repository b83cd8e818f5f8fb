"""A cell of the study: TREC question types on stories-260k.

    python -m experiments.study --workdir DIR --cells trec_260k --models MODELS --data DATA

MODELS is a folder that holds the model's folder, and DATA one that holds the folder of the raw data; the config below
names both. `mlora_jax/study/rivals.py` defines the groups of rivals, and docs/study.md has the results.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the cell's values; other keys have the defaults of `mlora_jax.config` and `mlora_jax.study.keys`."""
    return ConfigDict(
        {
            "model": {"path": "stories-260k"},
            "data": {"task": "trec", "raw_dir": "trec", "pad_multiple": 16},
            "methods": {
                "renest_50": (("lora", 0.5), ("per_example", 0.5)),
                "renest_30": (("lora", 0.3), ("per_example", 0.7)),
                "renest_rotated": (("lora", 0.7), ("per_example", 0.3), "rotate"),
                "renest_30_first": (("lora", 0.3), ("per_example", 0.7, "squeeze_rotated", "first_column_3")),
            },
            "train": {"epochs": 1, "batch_size": 32, "trials_at_once": 1},
            "validation": {"holdout": 0.1, "limit": 256},
            "checkpoint": {"every": 0},
            "study": {
                "groups": ("leading", "dearer", "separate", "matryoshka", "variants", "recipe"),
                "rank": 32,
                "start": (0.003, 0.01, 0.03),
            },
        }
    )

"""A cell of the study: the quickstart's task on the base that the package ships.

    python -m experiments.study --workdir DIR --cells quickstart

`mlora_jax/study/rivals.py` defines the groups of rivals, and docs/study.md has the results.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the cell's values; other keys have the defaults of `mlora_jax.config` and `mlora_jax.study.keys`."""
    return ConfigDict(
        {
            "model": {"path": "quickstart"},
            "data": {"task": "quickstart", "max_length": 16, "pad_multiple": 16},
            "adapter": {"targets": ("v_proj", "o_proj")},
            "methods": {
                "renest_50": (("lora", 0.5), ("per_example", 0.5)),
                "renest_30": (("lora", 0.3), ("per_example", 0.7)),
                "renest_rotated": (("lora", 0.7), ("per_example", 0.3), "rotate"),
                "renest_30_first": (("lora", 0.3), ("per_example", 0.7, "squeeze_rotated", "first_column_3")),
            },
            "train": {"epochs": 2, "batch_size": 32, "trials_at_once": 1},
            "validation": {"holdout": 0.1, "limit": 256},
            "checkpoint": {"every": 0},
            "evaluation": {"batch_size": 128},
            "study": {
                "groups": (
                    "leading",
                    "dearer",
                    "variants",
                    "recipe",
                    "separate",
                    "weighted",
                    "further",
                    "matryoshka_all",
                    "field",
                ),
                "rank": 16,
                "seeds": (42, 666, 2408, 7, 13),
            },
        }
    )

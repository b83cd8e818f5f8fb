"""A cell of the study: ARC-Easy on SmolLM2-135M-Instruct.

    python -m experiments.study --workdir DIR --cells arc_easy_smollm2 --models MODELS --data DATA \\
        --records results/study

MODELS is a folder that holds the model's folder, and DATA one that holds the folder of the raw data; the config below
names both. `mlora_jax/study/rivals.py` defines the groups of rivals, and docs/study.md has the results.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the cell's values; other keys have the defaults of `mlora_jax.config` and `mlora_jax.study.keys`."""
    return ConfigDict(
        {
            "model": {"path": "smollm2-135m-instruct", "dtype": "float32"},
            "data": {"task": "arc_easy", "raw_dir": "arc_easy", "pad_multiple": 16},
            "methods": {
                "renest_30_first": (("lora", 0.3), ("per_example", 0.7, "squeeze_rotated", "first_column_3")),
            },
            "train": {"epochs": 1, "batch_size": 32, "trials_at_once": 1},
            "validation": {"holdout": 0.1, "limit": 128},
            "checkpoint": {"every": 0},
            "evaluation": {"limit": 200},
            "study": {
                "groups": ("instruct", "recipe", "ceiling", "scalings", "instruct_further"),
                "rank": 32,
                "rates": (5e-6, 1.5e-5, 5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3),
                "start": (5e-4, 1.5e-3),
            },
        }
    )

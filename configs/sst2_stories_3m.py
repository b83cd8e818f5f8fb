"""SST-2 (review sentiment) on stories-3m: LoRA, its squeeze, DyLoRA and MatryoshkaLoRA.

    python -m experiments.run --config configs/sst2_stories_3m.py --workdir DIR \
        --config.model.path=MODEL_FOLDER --config.data.raw_dir=DATA_FOLDER

MODEL_FOLDER is a Hugging Face folder of stories-3m (3.1M parameters, Llama layout). DATA_FOLDER holds the raw files of
SST-2 (train.tsv, dev.tsv, test.tsv). Without this key they are downloaded.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the experiment's values; all other keys have the values of `mlora_jax.config.DEFAULTS`."""
    return ConfigDict(
        {
            "model": {"path": ""},
            "data": {"task": "sst2", "raw_dir": "", "pad_multiple": 16},
            "trials": {
                "method": ("lora", "dylora", "matryoshka"),
                "learning_rate": (1e-3,),
                "seed": (42,),
                "scaling": ("none",),
                "rank": (32,),
            },
            "validation": {"holdout": 0.0},  # There is one learning rate, so there is nothing to choose.
            "train": {"epochs": 3, "batch_size": 32},
        }
    )

"""TREC question types on stories-3m: LoRA (and its squeeze), DyLoRA and MatryoshkaLoRA, two seeds.

    python -m experiments.run --config configs/trec_stories_3m.py --workdir DIR \
        --config.model.path=MODEL_FOLDER --config.data.raw_dir=DATA_FOLDER

MODEL_FOLDER: a Hugging Face folder of stories-3m (3.1M parameters, Llama layout). DATA_FOLDER: the raw files
of TREC (train_5500.label, TREC_10.label); without it they are downloaded.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment's values; the rest is in `mlora_jax.config.DEFAULTS`."""
    return ConfigDict(
        {
            "model": {"path": ""},
            "data": {"task": "trec", "raw_dir": "", "pad_multiple": 16},
            "trials": {
                "method": ("lora", "dylora", "matryoshka"),
                "learning_rate": (1e-3,),
                "seed": (42, 666),
                "scaling": ("none",),
                "rank": (32,),
            },
            "validation": {"holdout": 0.0},  # one learning rate: nothing to choose
            "train": {"epochs": 2, "batch_size": 32},
        }
    )

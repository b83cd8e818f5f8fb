"""GSM8K on stories-3m: every stage of a task that generates answers, on a model that knows children's stories only.

    python -m experiments.run --config configs/gsm8k_stories_3m.py --workdir DIR \
        --config.model.path=MODEL_FOLDER --config.data.raw_dir=DATA_FOLDER

MODEL_FOLDER is a Hugging Face folder of stories-3m (3.1M parameters, Llama layout). DATA_FOLDER holds the raw files of
GSM8K (train.jsonl, test.jsonl). Without this key they are downloaded.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the experiment's values; all other keys have the values of `mlora_jax.config.DEFAULTS`."""
    return ConfigDict(
        {
            "model": {"path": ""},
            # The model's context is 512 tokens. A problem and solution that need more are left out.
            "data": {"task": "gsm8k", "raw_dir": "", "max_length": 512, "overflow": "drop"},
            "trials": {
                "method": ("lora", "dylora", "matryoshka"),
                "learning_rate": (1e-3,),
                "seed": (42,),
                "scaling": ("none",),
                "rank": (32,),
            },
            "validation": {"holdout": 0.0},  # There is one learning rate, so there is nothing to choose.
            "train": {"epochs": 1, "batch_size": 32, "accumulation": 8},
            "evaluation": {"limit": 100, "max_new_tokens": 128},
        }
    )

"""Pretraining of the small decoder that the package ships, on generated text.

    python -m experiments.pretrain --config configs/pretrain_quickstart.py --out DIR

On two CPU cores it takes 2.5 minutes of processor time (4 to 9 minutes of wall time on cores that other work was using
too). Two runs on one machine with one version of jax gave the same bits; another machine or version may round
differently. The record `pretraining.json` beside the weights has their SHA-256, the versions, and the held-out loss to
compare.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the values with which `mlora_jax/assets/quickstart` was made."""
    return ConfigDict(
        {
            "seed": 0,
            "text": {"documents": 40_000, "held_out": 1000},
            "tokenizer": {"vocab_size": 1024},
            "model": {
                "hidden_size": 64,
                "intermediate_size": 160,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 2,
                "tie_word_embeddings": True,
                "max_position_embeddings": 512,
                "initializer_range": 0.1,
            },
            "train": {
                "steps": 1200,
                "batch_size": 32,
                "length": 48,
                "learning_rate": 3e-3,
                "warmup_steps": 100,
                "beta1": 0.9,
                "beta2": 0.98,
                "weight_decay": 0.01,
                "clip": 1.0,
            },
        }
    )

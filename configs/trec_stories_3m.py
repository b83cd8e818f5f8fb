"""TREC (question types) on stories-3m: LoRA, its squeeze, DyLoRA and MatryoshkaLoRA, with two seeds.

    python -m experiments.run --config configs/trec_stories_3m.py --workdir DIR \
        --config.model.path=MODEL_FOLDER --config.data.raw_dir=DATA_FOLDER

MODEL_FOLDER is a Hugging Face folder of stories-3m (3.1M parameters, Llama layout). DATA_FOLDER holds the raw files of
TREC (train_5500.label, TREC_10.label). Without this key they are downloaded.

The run takes about 50 minutes on one CPU core. It gives these accuracies at ranks 1, 2, 4, 8, 16 and 32 (mean of two
seeds):

    base                 0.226
    lora                 0.226  0.237  0.373  0.561  0.829  0.906
    lora + squeeze       0.285  0.430  0.757  0.858  0.904  0.906
    dylora               0.735  0.771  0.803  0.826  0.808  0.776
    matryoshka           0.226  0.229  0.255  0.255  0.459  0.740
    matryoshka (nested)  0.226  0.245  0.241  0.334  0.727  0.830
    matryoshka (masked)  0.190  0.212  0.460  0.647  0.789  0.830

Single seeds differ by up to 0.19 (matryoshka, masked, rank 8). All methods have the same learning rate, not each its
best.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the experiment's values; all other keys have the values of `mlora_jax.config.DEFAULTS`."""
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
            "validation": {"holdout": 0.0},  # There is one learning rate, so there is nothing to choose.
            "train": {"epochs": 2, "batch_size": 32},
        }
    )

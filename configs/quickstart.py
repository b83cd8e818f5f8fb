"""The quickstart: every method on the base and the task that the package ships; no download.

    python -m experiments.run --config configs/quickstart.py --workdir DIR

The task (`mlora_jax/data/quickstart_text.py`): 48 animals of a little world have moved, and the model is to learn
which of 16 homes each lives in now. 4800 training rows, each seen twice (300 steps); 384 test rows, in places where
their animal was not seen.

Hardware: two CPU cores. Wall time: 3 min 33 s with the environment made anew (`make run`).

Expected, accuracy at ranks 1, 2, 4, 8, 16 (mean of seeds 42 and 666; single seeds differ by up to 0.2 at ranks 1 to 4):

    base                 0.02
    lora                 0.04  0.07  0.27  0.62  1.00
    lora + squeeze       0.10  0.31  0.77  1.00  1.00
    dylora               0.29  0.60  0.90  1.00  1.00
    dylora_original      0.18  0.41  0.91  1.00  1.00
    dylora_frozen        0.03  0.04  0.05  0.06  0.07
    matryoshka           0.02  0.02  0.06  0.26  0.81
    matryoshka (nested)  0.02  0.03  0.13  0.62  1.00
    matryoshka (masked)  0.08  0.17  0.37  0.81  1.00
    matryoshka_exact     0.43  0.84  1.00  1.00  1.00
    sandwich             0.45  0.70  0.99  1.00  1.00

matryoshka_exact costs five and sandwich three times the steps of the others. dylora_frozen moves one of 16 columns a
step, so each column gets a sixteenth of the updates.

The criterion for task, targets, steps and rate was plain LoRA: trained at single ranks and cut by SVD it must need
more than rank 1. With all seven projections as targets rank 2 was enough, so v and o it is; at 150 steps LoRA of
ranks 1 to 4 is far from its end, so 300; the rate is one at which full-rank LoRA reaches 1.00, the same for all
methods, not the best of each. First results of DyLoRA and MatryoshkaLoRA were known when targets and steps were
settled.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment's values; the rest is in `mlora_jax.config.DEFAULTS`."""
    return ConfigDict(
        {
            "model": {"path": "quickstart"},
            "data": {"task": "quickstart", "max_length": 16, "pad_multiple": 16},
            "adapter": {"targets": ("v_proj", "o_proj")},
            "trials": {
                "method": (
                    "lora",
                    "dylora",
                    "dylora_original",
                    "dylora_frozen",
                    "matryoshka",
                    "matryoshka_exact",
                    "sandwich",
                ),
                "learning_rate": (1e-2,),
                "seed": (42, 666),
                "scaling": ("none",),
                "rank": (16,),
            },
            "validation": {"holdout": 0.0},  # one learning rate: nothing to choose
            "train": {"epochs": 2, "batch_size": 32},
            "evaluation": {"batch_size": 128},
        }
    )

"""The quickstart: seven methods on the base and the task that the package ships, without any download.

    python -m experiments.run --config configs/quickstart.py --workdir DIR

In the task (`mlora_jax/data/quickstart_text.py`) 48 animals of a little world have moved, and the model learns in which
of 16 homes each lives now. There are 4800 training rows, each seen twice (300 steps), and 384 test rows, which name
places where their animal was not seen in training.

On two CPU cores the run takes 1 min 55 s of wall time.

Expected accuracies at ranks 1, 2, 4, 8 and 16 (mean of seeds 42 and 666; single seeds differ by up to 0.2 at ranks 1 to
4):

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

A step of matryoshka_exact costs five times as much as one of LoRA, and a step of sandwich three times as much.
dylora_frozen moves one of 16 columns per step, so each column gets a sixteenth of the updates.

The task, the targets, the number of steps and the learning rate were chosen by plain LoRA: trained at single ranks and
truncated by SVD, it must need more than rank 1. With all seven projections as targets rank 2 was enough, so the targets
are v and o. After 150 steps LoRA of ranks 1 to 4 has not converged, so there are 300. The learning rate is one at which
LoRA of rank 16 reaches 1.00; all methods have the same learning rate, not each its best. First results of DyLoRA and
MatryoshkaLoRA were known when the targets and the number of steps were chosen.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the experiment's values; all other keys have the values of `mlora_jax.config.DEFAULTS`."""
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
            "validation": {"holdout": 0.0},  # There is one learning rate, so there is nothing to choose.
            "train": {"epochs": 2, "batch_size": 32},
            "evaluation": {"batch_size": 128},
        }
    )

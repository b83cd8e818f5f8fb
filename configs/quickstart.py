"""The quickstart: every method on the base and the task that the package ships; no download.

    python -m experiments.run --config configs/quickstart.py --workdir DIR

The task (`mlora_jax/data/quickstart_text.py`): 48 animals of a little world have moved, and the model is to learn
which of 16 homes each lives in now. 4800 training rows, each seen twice (300 steps); 384 test rows, in places where
their animal was not seen.

Hardware: two CPU cores. Wall time: 3 min 35 s while other work kept both cores busy; 139 s of processor time.

Expected, accuracy at ranks 1, 2, 4, 8, 16 (mean of two seeds; single seeds differ by up to 0.25 at ranks 1 to 4):

    base              0.02
    lora              0.04  0.06  0.20  0.50  1.00
    lora + squeeze    0.10  0.20  0.67  1.00  1.00
    dylora            0.16  0.40  0.80  1.00  1.00
    dylora_original   0.15  0.25  0.79  1.00  1.00
    dylora_frozen     0.04  0.04  0.05  0.06  0.06
    matryoshka        0.02  0.02  0.06  0.24  0.74
    matryoshka_exact  0.27  0.55  0.98  1.00  1.00
    sandwich          0.29  0.48  0.88  1.00  1.00
    LoRA trained at each rank by itself (config.trials.rank): 0.37  0.77  1.00  1.00  1.00

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
            "train": {"epochs": 2, "batch_size": 32},
            "evaluation": {"batch_size": 128},
        }
    )

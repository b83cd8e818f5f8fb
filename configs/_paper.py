"""The values that the paper's experiments share (MatryoshkaLoRA, arXiv 2605.07850), and their variants.

The variants r32 and r256 are the paper's grids at R = 32 and R = 256. The variant smoke runs for about a minute on a
CPU with any small model. It goes through every stage of the grid on one device, with one scaling, and says nothing
about the methods.
"""

from typing import Any

from ml_collections import ConfigDict

LEARNING_RATES = (
    *(5e-6, 6e-6, 7e-6, 8e-6, 9e-6),
    *(1e-5, 2e-5, 3e-5, 4e-5, 5e-5, 6e-5, 7e-5, 8e-5, 9e-5),
    *(1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 8e-4, 9e-4, 1e-3),
)

MODELS = {"llama32_1b": "meta-llama/Llama-3.2-1B-Instruct", "llama31_8b": "meta-llama/Llama-3.1-8B-Instruct"}

SHARED = {
    "adapter": {
        "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "init": "fan_rank",
    },
    "trials": {
        "method": ("lora", "dylora", "matryoshka"),
        "learning_rate": LEARNING_RATES,
        "seed": (42, 666, 2408),
        "scaling": ("none", "rank", "sqrt"),
    },
    "train": {
        "epochs": 3,
        "batch_size": 32,
        "accumulation": 8,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "weight_decay": 0.0,
        "clip": 1.0,
        "warmup_steps": 0,
        "remat": "full",
    },
}

TASKS = {
    "gsm8k": {
        "data": {"task": "gsm8k", "style": "reference", "max_length": 512, "overflow": "truncate"},
        "evaluation": {"tasks": (("gsm8k", 3), ("gsm8k", 8)), "max_new_tokens": 256},
    },
    "platypus": {
        # The data set has training rows only. One row in fifty is held out to test on, and 512 more to choose learning
        # rates on.
        "data": {
            "task": "platypus",
            "style": "reference",
            "max_length": 512,
            "overflow": "truncate",
            "holdout": 0.02,
        },
        "evaluation": {"tasks": (("arc_challenge", 25), ("hellaswag", 10), ("mmlu", 5), ("winogrande", 5))},
    },
}

# The paper reads adapters out by prefix. Other read-outs can be added to a finished run.
READOUTS = {"readouts": {"lora": ("prefix",), "dylora": ("prefix",), "matryoshka": ("prefix",)}}

FULL = {"model": {"dtype": "bfloat16"}}
# All 12 trials have two steps and one shape, and train in one batch, so that little is compiled.
SMOKE = {
    "model": {"path": "", "dtype": "float32"},
    "data": {"limit": 4, "pad_multiple": 512},
    "trials": {"learning_rate": (1e-3, 1e-2), "seed": (42, 666), "scaling": ("sqrt",), "rank": (2,)},
    "train": {"epochs": 1, "batch_size": 2, "accumulation": 2, "remat": "none", "log_every": 1, "trials_at_once": 12},
    "validation": {"limit": 2},
    "evaluation": {"limit": 2, "batch_size": 16, "max_new_tokens": 4},
}
# Every number of shots needs two more executables, so the smoke run of GSM8K has only one number.
SMOKE_OF_TASK = {"gsm8k": {"evaluation": {"tasks": (("gsm8k", 3),)}}, "platypus": {}}
VARIANTS = {
    "r32": {**FULL, "trials": {"rank": (32,)}},
    "r256": {**FULL, "trials": {"rank": (256,)}},
    "smoke": SMOKE,
}


def paper_config(model: str, task: str, variant: str) -> ConfigDict:
    """Returns the config of one grid of the paper.

    Args:
      model: a key of `MODELS`.
      task: a key of `TASKS`.
      variant: a key of `VARIANTS`.

    Raises:
      ValueError: the variant is unknown.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of the config, expected one of {', '.join(VARIANTS)}")
    config: Any = ConfigDict({"model": {"path": MODELS[model]}})
    smoke = SMOKE_OF_TASK[task] if variant == "smoke" else {}
    for values in (SHARED, TASKS[task], {"evaluation": READOUTS}, VARIANTS[variant], smoke):
        for group, keys in values.items():
            config[group] = {**config.get(group, ConfigDict()).to_dict(), **keys}
    return config

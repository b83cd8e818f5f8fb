"""GSM8K on Llama-3.2-1B-Instruct with the settings of the MatryoshkaLoRA paper (arXiv 2605.07850), R = 32.

    python -m experiments.run --config configs/gsm8k_llama32_1b.py --workdir DIR --config.model.path=MODEL_FOLDER

MODEL_FOLDER: a download of meta-llama/Llama-3.2-1B-Instruct. GSM8K is downloaded unless config.data.raw_dir names a
folder with train.jsonl and test.jsonl. The product is 3 methods x 3 scalings x 3 seeds x 23 learning rates = 621 trials
of 701 steps; one of them is `--config.trials.method="('matryoshka',)" --config.trials.learning_rate="(1e-4,)"
--config.trials.seed="(42,)" --config.trials.scaling="('none',)"`. Needs an accelerator; not yet run by us.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment's values; the rest is in `mlora_jax.config.DEFAULTS`."""
    return ConfigDict(
        {
            "model": {"path": "", "dtype": "bfloat16"},
            "data": {"task": "gsm8k", "style": "reference", "max_length": 512, "overflow": "truncate"},
            "adapter": {
                "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                "init": "fan_rank",
            },
            "trials": {
                "method": ("lora", "dylora", "matryoshka"),
                "learning_rate": (
                    *(5e-6, 6e-6, 7e-6, 8e-6, 9e-6),
                    *(1e-5, 2e-5, 3e-5, 4e-5, 5e-5, 6e-5, 7e-5, 8e-5, 9e-5),
                    *(1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 8e-4, 9e-4, 1e-3),
                ),
                "seed": (42, 666, 2408),
                "scaling": ("none", "rank", "sqrt"),
                "rank": (32,),
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
                "remat": True,
            },
            "evaluation": {"max_new_tokens": 256},
        }
    )

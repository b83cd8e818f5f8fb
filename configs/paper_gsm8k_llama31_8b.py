"""GSM8K on Llama-3.1-8B-Instruct with the settings of the MatryoshkaLoRA paper (arXiv 2605.07850).

    python -m experiments.plan --config paper_gsm8k_llama31_8b:r32 --estimate
    python -m experiments.run --config paper_gsm8k_llama31_8b:r32 --workdir DIR
    python -m experiments.run --config paper_gsm8k_llama31_8b:smoke --workdir DIR --config.model.path=MODEL_FOLDER

r32 and r256 are the grids at R = 32 and 256: 3 methods x 3 scalings x 3 seeds x 23 learning rates = 621 trials of
653 steps, measured on GSM8K with 3 and 8 shots at every rank. smoke is a run of minutes on a CPU. The
weights are gated: accept their terms on the hub and log in, or give a download by --config.model.path=MODEL_FOLDER. The
commands of every table: docs/paper.md. The grids need accelerators and have not been run by us.
"""

from ml_collections import ConfigDict

from ._paper import paper_config


def get_config(variant: str = "r32") -> ConfigDict:
    """The experiment's values ("r32", "r256" or "smoke"); the rest is in `mlora_jax.config.DEFAULTS`."""
    return paper_config("llama31_8b", "gsm8k", variant)

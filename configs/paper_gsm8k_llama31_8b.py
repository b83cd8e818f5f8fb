"""GSM8K on Llama-3.1-8B-Instruct with the settings of the MatryoshkaLoRA paper (arXiv 2605.07850).

    python -m experiments.plan --config paper_gsm8k_llama31_8b:r32 --estimate
    python -m experiments.run --config paper_gsm8k_llama31_8b:r32 --workdir DIR
    python -m experiments.run --config paper_gsm8k_llama31_8b:smoke --workdir DIR --config.model.path=MODEL_FOLDER

r32 and r256 are the grids at R = 32 and 256: 3 methods x 3 scalings x 3 seeds x 23 learning rates = 621 trials of
653 steps, measured on GSM8K with 3 and 8 shots at every rank. smoke runs for minutes on a CPU. The
weights are gated: accept their terms on the hub and log in, or name a downloaded folder by
--config.model.path=MODEL_FOLDER. docs/paper.md has the commands of every table. The grids need accelerators, and this
project has not run them.
"""

from ml_collections import ConfigDict

from ._paper import paper_config


def get_config(variant: str = "r32") -> ConfigDict:
    """Returns the values of a variant: "r32", "r256" or "smoke". Other keys have their defaults."""
    return paper_config("llama31_8b", "gsm8k", variant)

"""GSM8K on Llama-3.2-1B-Instruct with the settings of the MatryoshkaLoRA paper (arXiv 2605.07850).

    python -m experiments.run --config paper_gsm8k_llama32_1b:r32 --workdir DIR        # R = 32; r256 for R = 256
    python -m experiments.plan --config paper_gsm8k_llama32_1b:r32 --estimate          # what it costs, without weights or accelerator
    python -m experiments.run --config paper_gsm8k_llama32_1b:smoke --workdir DIR --config.model.path=MODEL_FOLDER

3 methods x 3 scalings x 3 seeds x 23 learning rates = 621 trials of 653 steps (701 if config.validation.holdout=0.0), evaluated on GSM8K with 3 and 8 shots. The
weights are gated: accept their terms on the hub and log in, or give a download by --config.model.path=MODEL_FOLDER. All
commands and tables: docs/paper.md. The grids need accelerators and have not been run by us; the smoke variant has.
"""

from ml_collections import ConfigDict

from configs._paper import paper_config


def get_config(variant: str = "r32") -> ConfigDict:
    """The experiment's values ("r32", "r256" or "smoke"); the rest is in `mlora_jax.config.DEFAULTS`."""
    return paper_config("llama32_1b", "gsm8k", variant)

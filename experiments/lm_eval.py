"""The command `python -m experiments.lm_eval`; its code is `mlora_jax.cli.lm_eval`."""

from mlora_jax.cli.commands import start

if __name__ == "__main__":
    start("lm_eval")

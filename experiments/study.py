"""The command `python -m experiments.study`; its code is `mlora_jax.cli.study`."""

from mlora_jax.cli.commands import start

if __name__ == "__main__":
    start("study")

"""The command `python -m experiments.ranks`; its code is `mlora_jax.cli.ranks`."""

from mlora_jax.cli.commands import start

if __name__ == "__main__":
    start("ranks")

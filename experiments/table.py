"""The command `python -m experiments.table`; its code is `mlora_jax.cli.table`."""

from mlora_jax.cli.commands import start

if __name__ == "__main__":
    start("table")

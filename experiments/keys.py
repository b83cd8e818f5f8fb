"""The command `python -m experiments.keys`; its code is `mlora_jax.cli.keys`."""

from mlora_jax.cli.commands import start

if __name__ == "__main__":
    start("keys")

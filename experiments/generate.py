"""The command `python -m experiments.generate`; its code is `mlora_jax.cli.generate`."""

from mlora_jax.cli.commands import start

if __name__ == "__main__":
    start("generate")

"""The command `python -m experiments.run`; its code is `mlora_jax.cli.run`."""

from mlora_jax.cli.commands import start

if __name__ == "__main__":
    start("run")

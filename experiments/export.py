"""The command `python -m experiments.export`; its code is `mlora_jax.cli.export`."""

from mlora_jax.cli.commands import start

if __name__ == "__main__":
    start("export")

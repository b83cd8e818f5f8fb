"""The command `python -m experiments.plan`; its code is `mlora_jax.cli.plan`."""

from mlora_jax.cli.commands import start

if __name__ == "__main__":
    start("plan")

"""The command `python -m experiments.pretrain`; its code is `mlora_jax.cli.pretrain`."""

from mlora_jax.cli.commands import start

if __name__ == "__main__":
    start("pretrain")

"""The command `python -m experiments.compile_report`; its code is `mlora_jax.cli.compile_report`."""

from mlora_jax.cli.commands import start

if __name__ == "__main__":
    start("compile_report")

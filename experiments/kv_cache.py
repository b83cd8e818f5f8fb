"""The command `python -m experiments.kv_cache`; its code is `mlora_jax.cli.kv_cache`."""

from mlora_jax.cli.commands import start

if __name__ == "__main__":
    start("kv_cache")

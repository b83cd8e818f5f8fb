"""Pretrains the shipped decoder: `python -m experiments.pretrain --config configs/pretrain_quickstart.py --out DIR`.

Any value of the config can be set on the command line: `--config.train.steps=300`.
"""

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "File whose get_config() gives the values.", lock_config=True)
OUT = flags.DEFINE_string("out", None, "Folder that the model is written to, in the layout of Hugging Face.")
flags.mark_flags_as_required(["config", "out"])


def main() -> None:
    """Parses the command line, trains and writes the folder. Bad input ends the command with a message of one line."""
    try:
        app.run(_run)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def _run(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments {arguments[1:]}")
    # absl shows the messages of every library as soon as an app runs.
    logging.set_verbosity(logging.WARNING)
    from mlora_jax.compilation_cache import use_compilation_cache
    from mlora_jax.training.pretrain import pretrain

    config_file = config_flags.get_config_filename(flags.FLAGS["config"])
    command = f"python -m experiments.pretrain --config {config_file} --out DIR"
    with use_compilation_cache():
        record = pretrain(CONFIG.value, str(OUT.value), command=command)
    print(f"{record['parameters']:,} parameters, held-out loss {record['held_out_loss']}, in {OUT.value}")


if __name__ == "__main__":
    main()

"""Makes a smaller KV cache for a base: `python -m experiments.kv_cache --config configs/kv_cache_smollm2.py --out DIR`.

It trains orthogonal projections of keys and values whose first entries are a good short cache, and searches the ranks
of layers and heads. Any value of the config can be set on the command line: `--config.train.steps=300`. The file of the
config says what its keys mean. DIR then serves the other commands:

    python -m experiments.generate --adapter FOLDER --rank 8 --kv DIR --kv_budget 0.4 --prompt "Once upon a time"
    python -m experiments.lm_eval --model_args checkpoint=MODEL,kv=DIR,kv_budget=0.4 --tasks arc_easy
"""

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "File whose get_config() gives the values.", lock_config=True)
OUT = flags.DEFINE_string("out", None, "Folder that the projections are written to.")
flags.mark_flags_as_required(["config", "out"])


def main() -> None:
    """Parses the command line and makes the projections. Bad input ends the command with a message of one line."""
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
    from mlora_jax.kv_cache.run import make_projections

    config_file = config_flags.get_config_filename(flags.FLAGS["config"])
    command = f"python -m experiments.kv_cache --config {config_file} --out DIR"
    with use_compilation_cache():
        record = make_projections(CONFIG.value, str(OUT.value), command=command)
    print(f"projections of {record['base_model']}, orthogonal to {record['orthogonality_error']:.1e}, in {OUT.value}")


if __name__ == "__main__":
    main()

"""Writes the page docs/config.md, which lists every config key: `python -m experiments.keys [--out docs/config.md]`.

Without `--out` it prints the page.
"""

from __future__ import annotations

from absl import app, flags

from mlora_jax.cli.keys_page import write

OUT = flags.DEFINE_string("out", None, "File that the page is written to; by default it is printed.")


def main() -> None:
    """Parses the command line and writes the page. Bad input ends the command with a message of one line."""
    try:
        app.run(_write)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def _write(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise ValueError(f"what is {' '.join(arguments[1:])!r}? Options begin with --")
    write(OUT.value)


if __name__ == "__main__":
    main()

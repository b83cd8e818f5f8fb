"""Writes the page docs/config.md, which lists every key that a config may set, also those of the study."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import cast

from mlora_jax.config import KEYS, Group, keys_page
from mlora_jax.study.keys import NAME, STUDY

# The top level of the table holds only groups, which the cast tells the type checker.
GROUPS: dict[str, Group] = {**cast(Mapping[str, Group], KEYS.keys), NAME: STUDY}
HEAD = """\
# Keys of a config

This page is made by `python -m experiments.keys --out docs/config.md` from the tables in `mlora_jax/config/keys.py` and
`mlora_jax/study/keys.py`; a test fails when it is stale.

A config file sets some of these keys, and the command line of `experiments.run` and of the other commands with a
`--config` can set every one but those of the study: `--config.train.epochs=5`,
`--config.trials.learning_rate="(1e-4,3e-4)"`. `python -m experiments.run --config NAME --help` prints the same list
with the values of that config.

"May change" says whether a run that has begun may go on with another value. Another value of the other keys needs
another `--workdir`.

A cell of the study (`configs/study_*.py`) also has a group `study`, which only `experiments.study` reads. The other
commands check this group and leave it out.

"""


def text() -> str:
    """Returns the text of docs/config.md."""
    return HEAD + keys_page(GROUPS)


def write(path: str | None) -> None:
    """Writes the page to a file, or prints it.

    Args:
      path: the file; None or an empty text: the page is printed.
    """
    if path:
        pathlib.Path(path).write_text(text(), encoding="utf-8")
    else:
        print(text(), end="")

"""The commands as a user types them."""

import os
import pathlib
import subprocess
import sys

from tests.conftest import QUICKLY_COMPILED

ROOT = pathlib.Path(__file__).parents[2]


def run_command(name, *arguments, environment=None):
    """`python -m experiments.NAME` in a process of its own, by default with machine code that is not optimised."""
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)],
        cwd=ROOT,
        env=environment or os.environ | {"XLA_FLAGS": QUICKLY_COMPILED},
        capture_output=True,
        text=True,
        timeout=300,
    )

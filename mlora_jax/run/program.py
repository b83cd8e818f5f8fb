"""Names the code that runs, so that a number can be traced to what measured it."""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
import subprocess


@functools.cache
def code_origin() -> tuple[str, str]:
    """Returns the version of this package and the commit of its repository.

    The commit is "" outside a repository, and ends in "+" if files differ from it.
    """
    git = ["git", "-C", str(pathlib.Path(__file__).parents[1])]
    asked = [["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "-uno", "."]]
    try:
        commit, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip() for words in asked
        )
    except (OSError, subprocess.CalledProcessError):
        commit, changed = "", ""
    try:
        version = importlib.metadata.version("mlora_jax")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return version, commit + "+" * bool(changed)


def program_version() -> str:
    """Returns `code_origin` in one text, such as "0.1.0 (1a2b3c4d5e)"."""
    version, revision = code_origin()
    return f"{version or 'not installed'} ({revision or 'no repository'})"

"""Keeps compiled programs in a folder, so that another process with the same programs compiles nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from mlora_jax.disk import user_cache_folder

logger = logging.getLogger(__name__)

OFF = "off"
LARGEST = 2 << 30  # The least recently used programs are deleted until the folder takes at most this many bytes.
LEAST_ROOM = 256 << 20  # Nothing is added where less than this many bytes are free.
_FOLDER = "jax_compilation_cache_dir"
# Small programs are kept too: a start has hundreds of them.
_SECONDS, _BYTES = "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes"
_NEVER = 1e9


def threads() -> int:
    """The threads among which XLA divides its work on a CPU: NPROC, or the cores that this process may use."""
    if os.environ.get("NPROC", "").isdecimal():
        return int(os.environ["NPROC"])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def use_compilation_cache(folder: str = "") -> Iterator[None]:
    """Keeps what jax compiles in the context in a folder, and takes from there what is kept already.

    Nothing changes if jax has a folder already, from the environment variable JAX_COMPILATION_CACHE_DIR or from the
    program that calls this library. Nothing is kept either if several processes compute on CPUs, because their
    connections refuse programs that another process has compiled. The options of jax are as before after the context.

    Programs are kept apart by the number of threads, because XLA compiles a CPU's program for that number and jax does
    not look at it: a program for another number would be slower, and the last bits of its results might differ.

    The folder must belong to a user whom you trust, since programs in it are run. A folder that cannot be used is
    reported by a warning, and so is an entry that cannot be read; the program is then compiled. An entry that cannot be
    read stays until somebody deletes it. Before the context begins, the least recently used programs are deleted until
    the folder takes at most 2 GiB.

    Args:
      folder: the folder, which is made if it does not exist; "" is `mlora_jax/compiled` in the user's cache folder;
        "off" keeps nothing.
    """
    if folder == OFF or getattr(jax.config, _FOLDER) or _on_cpus_of_several_processes():
        yield
        return
    root = pathlib.Path(folder).expanduser() if folder else user_cache_folder() / "compiled"
    path = root / f"threads-{threads()}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(exist_ok=True)
        _delete_oldest(root)
        writable = os.access(path, os.W_OK) and shutil.disk_usage(path).free > LEAST_ROOM
    except OSError as error:
        logger.warning(
            "compiled programs cannot be kept in %s, so every start compiles them anew (%s): set "
            'config.compilation.cache to another folder or to "off"', root, error.strerror,
        )  # fmt: skip
        yield
        return
    options = {_FOLDER: str(path.absolute()), _SECONDS: 0.0 if writable else _NEVER, _BYTES: -1}
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # jax opens a folder once and would keep it


def _on_cpus_of_several_processes() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1 and jax.default_backend() == "cpu"


def _delete_oldest(folder: pathlib.Path) -> None:
    """Deletes the least recently used programs above `LARGEST` bytes, and the empty files that a full disk leaves."""
    entries = []
    for file in folder.glob("threads-*/*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process deletes too
            status = file.stat()
            used = max(status.st_atime, status.st_mtime) if status.st_size else -1.0
            entries.append((used, status.st_size, file))
    excess = sum(size for _, size, _ in entries) - LARGEST
    for used, size, file in sorted(entries):
        if excess <= 0 and used >= 0:
            break
        with contextlib.suppress(PermissionError):  # a folder that others fill can still be read
            file.unlink(missing_ok=True)
            excess -= size

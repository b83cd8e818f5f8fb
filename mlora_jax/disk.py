"""Writes files whole or not at all, and reports a full disk in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

# NumPy's error states how many items were written, but not why.
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")
_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it is larger than a file may be there (see ulimit -f)",
}


class DiskFullError(OSError):
    """An error of writing because the disk is full; the message is one line.

    Args:
      fact: a sentence that says what could not be written, where, and how much room is missing.
      stands: a sentence that says what is not lost.
    """

    def __init__(self, fact: str, stands: str = "") -> None:
        super().__init__(f"{fact}. {f'{stands}. ' if stands else ''}Make room there, and run the same command again")
        self.fact = fact

    def renamed(self, before: str | os.PathLike[str], after: str | os.PathLike[str]) -> DiskFullError:
        """Returns the same error with another path, for a file that is written under one path and then renamed.

        Args:
          before: the path that is written to.
          after: the path that the user gave.
        """
        return DiskFullError(self.fact.replace(str(before), str(after)))


def lack_of_room(error: BaseException | None) -> int | None:
    """Returns the system's error number if an error, or one of its causes, says that there was no room to write."""
    while error is not None:
        if isinstance(error, DiskFullError):
            return errno.ENOSPC
        # Libraries with their own file access, such as safetensors and tensorstore, quote the error of the system.
        for number in _CAUSES:
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return number
        if isinstance(error, OSError) and _CUT_SHORT.search(str(error)):
            return errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None


def disk_full(
    error: BaseException,
    what: str,
    folder: str | os.PathLike[str],
    *,
    partial: str | os.PathLike[str] | None = None,
    needed: int | None = None,
) -> DiskFullError | None:
    """Returns a `DiskFullError` for an error in writing if there was no room, else None.

    Args:
      error: the error that was raised.
      what: a name for what could not be written.
      folder: a folder on the file system that was written to.
      partial: a file or folder that holds a part of it and will be removed; its room counts as free.
      needed: the bytes that are needed; None if they are not known.
    """
    number = lack_of_room(error)
    if number is None or isinstance(error, DiskFullError):
        return error if isinstance(error, DiskFullError) else None
    fact = f"{what} could not be written: {_CAUSES[number]}"
    if number != errno.ENOSPC:
        return DiskFullError(fact + (f", and it needs {_bytes(needed)}" if needed else ""))
    folder = pathlib.Path(folder).absolute()
    folder = next(each for each in (folder, *folder.parents) if each.is_dir())
    free = shutil.disk_usage(folder).free + (0 if partial is None else size_on_disk(partial))
    names = os.statvfs(folder)
    if names.f_files and not names.f_favail:
        return DiskFullError(f"{fact}: no further file can be made there (see df -i)")
    if needed is None or needed <= free:  # a disk has blocks, so a file takes more room than its size
        return DiskFullError(f"{fact}, and it needs more than the {_bytes(free)} that were free")
    return DiskFullError(
        f"{fact}. It needs about {_bytes(needed)}, and {_bytes(free)} were free: {_bytes(needed - free)} are missing"
    )


def _bytes(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def size_on_disk(path: str | os.PathLike[str]) -> int:
    """Returns the room that a file or a folder takes on the disk, in bytes; 0 if it does not exist."""
    path = pathlib.Path(path)
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    taken = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            taken += file.stat().st_blocks * 512
    return taken


def ignore_echoes() -> None:
    """Silences, from now on, errors about a full disk that objects raise once more when they are garbage-collected."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if lack_of_room(unraisable.exc_value) is None:
            before(unraisable)

    sys.unraisablehook = hook


def user_cache_folder() -> pathlib.Path:
    """Returns the package's folder in the user's cache folder, which is XDG_CACHE_HOME or by default ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "mlora_jax"


@contextlib.contextmanager
def naming(
    path: str | os.PathLike[str], *, partial: str | os.PathLike[str] | None = None, needed: int | None = None
) -> Iterator[None]:
    """Turns errors about a full disk into a `DiskFullError` that names the file.

    Args:
      path: the path of the file.
      partial: a file that is written in its place and that is removed on failure.
      needed: the size of the file in bytes; None if it is not known.

    Raises:
      DiskFullError: there was no room.
    """
    try:
        yield
    except Exception as error:
        full = disk_full(error, str(path), pathlib.Path(path).parent, partial=partial, needed=needed)
        if full is None:
            raise
        raise full from None  # the writer's message adds nothing, and the errors of safetensors are not OSErrors


@contextlib.contextmanager
def write_aside(target: pathlib.Path, *, needed: int | None = None) -> Iterator[pathlib.Path]:
    """Yields a path beside `target` to write to. The file is renamed to `target` on success and removed on failure.

    Args:
      target: the path of the file.
      needed: the size that the file will have in bytes, for the message if there is no room.

    Raises:
      DiskFullError: there is no room for the file.
    """
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with naming(target, partial=aside, needed=needed):
            yield aside
            aside.chmod(0o644)  # safetensors writes files that only their owner may read
            os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)

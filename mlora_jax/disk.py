"""Files that are written whole or not at all, and one line about a disk that has no room for them."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator

# NumPy tells how many items it wrote, and no reason.
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")
_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it is larger than a file may be there (see ulimit -f)",
}


class DiskFullError(OSError):
    """Something could not be written for want of room; the message is one line.

    Args:
      fact: what could not be written, where, and how much room is missing.
      stands: a sentence about what is not lost.
    """

    def __init__(self, fact: str, stands: str = ""):
        super().__init__(f"{fact}. {f'{stands}. ' if stands else ''}Make room there, and run the same command again")
        self.fact = fact

    def renamed(self, before, after) -> DiskFullError:
        """The same about the path that the user gave, for what is written under another one and renamed."""
        return DiskFullError(self.fact.replace(str(before), str(after)))


def lack_of_room(error: BaseException | None) -> int | None:
    """The number of the system's error if an error, or one that led to it, says that there was no room to write."""
    while error is not None:
        if isinstance(error, DiskFullError):
            return errno.ENOSPC
        # Libraries with file access of their own, such as safetensors and tensorstore, quote the system in their text.
        for number in _CAUSES:
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return number
        if isinstance(error, OSError) and _CUT_SHORT.search(str(error)):
            return errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None


def disk_full(
    error: BaseException, what: str, folder, *, partial=None, needed: int | None = None
) -> DiskFullError | None:
    """The one line about an error in writing if it came for want of room, or None.

    Args:
      error: that was raised.
      what: could not be written.
      folder: on the file system on which it was to be.
      partial: file or folder that holds a part of it and will be removed: its room counts as free.
      needed: bytes; None if they are not known.
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
    if needed is None or needed <= free:  # more is taken than is written, since a disk has blocks
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


def size_on_disk(path) -> int:
    """What a file or a folder takes of the disk, in bytes; 0 if it is not there."""
    path = pathlib.Path(path)
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    taken = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            taken += file.stat().st_blocks * 512
    return taken


def ignore_echoes() -> None:
    """Keeps Python quiet, from now on, about a full disk that objects find once more when they are collected."""
    before = sys.unraisablehook

    def hook(unraisable) -> None:
        if lack_of_room(unraisable.exc_value) is None:
            before(unraisable)

    sys.unraisablehook = hook


@contextlib.contextmanager
def naming(path, *, partial=None, needed: int | None = None) -> Iterator[None]:
    """Says by a `DiskFullError` which file it was for which there was no room.

    Args:
      path: of the file.
      partial: a file that is written in its place, and removed on failure.
      needed: bytes; None if they are not known.

    Raises:
      DiskFullError: there was no room.
    """
    try:
        yield
    except Exception as error:
        full = disk_full(error, str(path), pathlib.Path(path).parent, partial=partial, needed=needed)
        if full is None:
            raise
        raise full from None  # what the writer says adds nothing, and safetensors' errors are no OSError


@contextlib.contextmanager
def write_aside(target: pathlib.Path, *, needed: int | None = None) -> Iterator[pathlib.Path]:
    """A neighbour of `target` to write to, renamed to it on success and removed on failure.

    Args:
      target: path of the file.
      needed: how many bytes it will have, for the message if there is no room for them.

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

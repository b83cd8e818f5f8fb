"""The reader of every text file that a user hands over: prompts, data, tables, JSON, YAML and chat templates.

Text is UTF-8 unless a data set is published in another encoding. A UTF-8 byte-order mark is no part of the text. A line
ends with LF, CRLF or CR, as in Python's text mode, and with nothing else: U+2028, NEL, NUL and the other characters at
which `str.splitlines` cuts may stand within a line. The last line needs no end.
"""

from __future__ import annotations

import io
import pathlib
import re
from collections.abc import Iterable, Iterator

UTF8_MARK = b"\xef\xbb\xbf"
# The first bytes of files that are no text in an encoding that begins with ASCII: UTF-32 in little-endian order begins
# as UTF-16 does, so it comes first.
SIGNATURES = (
    (b"\xff\xfe\x00\x00", "is UTF-32 text: save it as UTF-8"),
    (b"\x00\x00\xfe\xff", "is UTF-32 text: save it as UTF-8"),
    (b"\xff\xfe", "is UTF-16 text: save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text: save it as UTF-8"),
    (b"\x1f\x8b", "is compressed by gzip: decompress it"),
    (b"BZh91AY&SY", "is compressed by bzip2: decompress it"),
    (b"\xfd7zXZ\x00", "is compressed by xz: decompress it"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd: decompress it"),
    (b"PK\x03\x04", "is a zip archive: unpack it"),
)


class MalformedLineError(ValueError):
    """A line that cannot be used; the message is `FILE, line N: what is wrong`."""

    def __init__(self, path: str | pathlib.Path, line: int, problem: str):
        super().__init__(f"{path}, line {line}: {problem}")


def read_text(path: str | pathlib.Path) -> str:
    r"""The text of a UTF-8 file, every line end as "\n".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not UTF-8 text; the message names file, line and byte.
    """
    text = decode_text(pathlib.Path(path).read_bytes(), path)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | pathlib.Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, see `text_lines`."""
    with pathlib.Path(path).open("rb") as file:
        yield from text_lines(file, path)


def decode_text(content: bytes, name: str | pathlib.Path) -> str:
    r"""The text of a file's bytes, UTF-8, its line ends as they are.

    Args:
      content: the whole file.
      name: what errors call it.

    Raises:
      ValueError: it is not UTF-8 text; the message names file, line and byte.

    >>> decode_text(b"\xef\xbb\xbfa\r\n", "file")
    'a\r\n'
    """
    body, _ = _beginning(content, name, "utf-8")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        for _ in text_lines(io.BytesIO(content), name):  # the error of the line at fault
            pass
        raise


def text_lines(file: Iterable[bytes], name: str | pathlib.Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    r"""The lines of a binary file.

    Args:
      file: the bytes, cut behind each "\n" as a binary file gives them.
      name: what errors call it.
      encoding: one that begins with ASCII, such as latin-1. A file with a UTF-8 byte-order mark is UTF-8 all the same.

    Yields:
      (number from 1, text without its line end), blank lines too.

    Raises:
      ValueError: a line is not text of this encoding; the message names file, line and byte.

    >>> list(text_lines([b"\xef\xbb\xbfa\rb\r\n", b"\n", b"c"], "file"))
    [(1, 'a'), (2, 'b'), (3, ''), (4, 'c')]
    """
    number = 0
    for part in file:
        if not number:
            part, encoding = _beginning(part, name, encoding)
        lines = part.removesuffix(b"\n").removesuffix(b"\r").split(b"\r") if part.endswith(b"\n") else _open_end(part)
        for line in lines:
            number += 1
            try:
                yield number, line.decode(encoding)
            except UnicodeDecodeError as error:
                problem = (
                    f"byte {error.start + 1} of the line, 0x{line[error.start]:02X}, is not {encoding.upper()} text "
                    f"({error.reason}): save the file as {encoding.upper()}"
                )
                raise MalformedLineError(name, number, problem) from None
        number = number or 1  # a first part that is a byte-order mark and no more


def _open_end(part: bytes) -> list[bytes]:
    """The lines of a last part, which no LF ends."""
    *lines, last = part.split(b"\r")
    return [*lines, last] if last else lines


def _beginning(content: bytes, name: str | pathlib.Path, encoding: str) -> tuple[bytes, str]:
    """The content without a byte-order mark, and its encoding."""
    for signature, problem in SIGNATURES:
        if content.startswith(signature):
            raise ValueError(f"{name} {problem}")
    if content.startswith(UTF8_MARK):
        return content.removeprefix(UTF8_MARK), "utf-8"
    return content, encoding


def check_text(text: str, name: str) -> str:
    """Returns a text that can be encoded.

    Raises:
      ValueError: it holds half a surrogate pair, as "\\ud800" in JSON or an argument that is not UTF-8 gives one.
    """
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{name} holds half a surrogate pair, which is not text")
    return text

"""Reads every text file that a user provides: prompts, data, tables, JSON, YAML and chat templates.

Text is UTF-8 unless a data set is published in another encoding. A UTF-8 byte-order mark is not part of the text. A
line ends with LF, CRLF or CR, as in Python's text mode. No other character ends a line: U+2028, NEL and the other
characters at which `str.splitlines` cuts, and NUL, may occur within a line. The last line needs no line end.
"""

from __future__ import annotations

import io
import pathlib
import re
from collections.abc import Iterable, Iterator

UTF8_MARK = b"\xef\xbb\xbf"
# The first bytes of files that are not text in an extension of ASCII. UTF-32 stands before UTF-16, because
# little-endian UTF-32 begins like UTF-16.
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
    """The error for a line that cannot be used. Its message is `FILE, line N: what is wrong`."""

    def __init__(self, path: str | pathlib.Path, line: int, problem: str) -> None:
        super().__init__(f"{path}, line {line}: {problem}")


def read_text(path: str | pathlib.Path) -> str:
    r"""Reads the text of a UTF-8 file, with "\n" for every line end.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not UTF-8 text. The message names the file, the line and the byte.
    """
    text = decode_text(pathlib.Path(path).read_bytes(), path)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields the numbers and texts of the lines of a UTF-8 file; see `text_lines`."""
    with pathlib.Path(path).open("rb") as file:
        yield from text_lines(file, path)


def decode_text(content: bytes, name: str | pathlib.Path) -> str:
    r"""Decodes the UTF-8 bytes of a file. Line ends stay the same.

    Args:
      content: the bytes of the whole file.
      name: the name of the file in error messages.

    Returns:
      The text, without a byte-order mark.

    Raises:
      ValueError: the bytes are not UTF-8 text. The message names the file, the line and the byte.

    >>> decode_text(b"\xef\xbb\xbfa\r\n", "file")
    'a\r\n'
    """
    body, _ = _beginning(content, name, "utf-8")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        for _ in text_lines(io.BytesIO(content), name):  # raises an error that names the line
            pass
        raise


def text_lines(file: Iterable[bytes], name: str | pathlib.Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    r"""Yields the lines of a binary file.

    Args:
      file: the bytes of the file, cut after each "\n", as a binary file yields them.
      name: the name of the file in error messages.
      encoding: an extension of ASCII, such as latin-1. A file with a UTF-8 byte-order mark is read as UTF-8 instead.

    Yields:
      (the number of the line from 1, its text without the line end), also for blank lines.

    Raises:
      ValueError: a line is not text in this encoding. The message names the file, the line and the byte.

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
        number = number or 1  # for a first part that is only a byte-order mark


def _open_end(part: bytes) -> list[bytes]:
    """Splits the last part of a file, which does not end with LF, into lines."""
    *lines, last = part.split(b"\r")
    return [*lines, last] if last else lines


def _beginning(content: bytes, name: str | pathlib.Path, encoding: str) -> tuple[bytes, str]:
    """Returns the content without a byte-order mark, and its encoding."""
    for signature, problem in SIGNATURES:
        if content.startswith(signature):
            raise ValueError(f"{name} {problem}")
    if content.startswith(UTF8_MARK):
        return content.removeprefix(UTF8_MARK), "utf-8"
    return content, encoding


def check_text(text: str, name: str) -> str:
    """Returns the text if it can be encoded.

    Args:
      text: the text.
      name: the name of the text in error messages.

    Raises:
      ValueError: the text holds half a surrogate pair, which comes from "\\ud800" in JSON or from a command-line
        argument that is not UTF-8.
    """
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{name} holds half a surrogate pair, which is not text")
    return text

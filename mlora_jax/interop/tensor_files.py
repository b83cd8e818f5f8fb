"""Safetensors files as bytes: unchanged tensors are copied byte by byte, whatever their dtype."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from mlora_jax.disk import write_aside

_CHUNK = 2**24  # the number of bytes that are copied at one time


class TensorLocation(NamedTuple):
    """The location of a tensor's bytes in a file.

    Attributes:
      file: the file that holds the tensor.
      code: the dtype as safetensors calls it, such as "BF16".
      shape: the shape of the tensor.
      start: the position of its first byte in the file.
      size: the size of the tensor in bytes.
    """

    file: pathlib.Path
    code: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> bytes:
        """Reads the bytes of the tensor."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


class Header(NamedTuple):
    """The header of a safetensors file.

    Attributes:
      tensors: name -> location, in the order of the bytes.
      metadata: the strings that the writer stored in the header.
    """

    tensors: dict[str, TensorLocation]
    metadata: dict[str, str]


def read_header(path: pathlib.Path) -> Header:
    """Reads the header of a safetensors file: 8 bytes with its length, little-endian, and then as many bytes of JSON.

    Args:
      path: the file.

    Raises:
      ValueError: the file is damaged or cut short.

    Source: the format's own description, github.com/huggingface/safetensors.
    """
    try:
        with safe_open(path, framework="np"):
            pass  # opening the file checks header, offsets and length
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        values = json.loads(file.read(length))
    metadata = values.pop("__metadata__", {})
    tensors = {}
    for name, entry in sorted(values.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        start, end = entry["data_offsets"]
        tensors[name] = TensorLocation(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return Header(tensors, metadata)


def write_tensors(
    path: pathlib.Path,
    tensors: Mapping[str, TensorLocation],
    metadata: Mapping[str, str],
    replace: Callable[[str, Callable[[], bytes]], bytes | None],
) -> None:
    """Writes a file of tensors that come from other files, with one tensor in memory at a time.

    Args:
      path: the file; it is written under another name and then renamed.
      tensors: name -> location of each tensor of the new file.
      metadata: the strings for the header.
      replace: (name, function that reads the old bytes) -> equally many new bytes, or None to copy the old bytes.
    """
    # Wide elements come first, as in the format's own writer, because readers need tensors aligned to their elements.
    tensors = dict(sorted(tensors.items(), key=lambda item: -(item[1].size // max(1, math.prod(item[1].shape)))))
    values: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        values[name] = {"dtype": tensor.code, "shape": tensor.shape, "data_offsets": [at, at + tensor.size]}
        at += tensor.size
    header = json.dumps(values, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # padding aligns the data
    with write_aside(path, needed=8 + len(header) + at) as aside, aside.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name, tensor in tensors.items():
            new = replace(name, tensor.read)
            if new is None:
                _copy(tensor, file)
            else:
                file.write(new)


def _copy(tensor: TensorLocation, file) -> None:
    with tensor.file.open("rb") as source:
        source.seek(tensor.start)
        left = tensor.size
        while left:
            part = source.read(min(left, _CHUNK))
            file.write(part)
            left -= len(part)

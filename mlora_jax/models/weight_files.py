"""Finds the safetensors files of a Hugging Face folder, lists their tensors, and reads them block by block."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from mlora_jax.models.json_file import read_json_object

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The dtype codes of safetensors that a weight may have.
STORED_DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
                 "BF16": jnp.dtype(jnp.bfloat16)}  # fmt: skip

_BLOCK = 2**23  # The bytes that are read at once, which loading holds besides the array that it fills.
_ROWS = 1024  # The rows that are compared at once.
_STRIP = 64  # The rows that are transposed at once, few enough that their columns stay in the cache.


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: the open file that holds it, and its entry in the header of that file.

    Args:
      file: the open file, a `safe_open`.
      name: the name of the tensor.
      shape: the shape of the tensor.
      code: the code of its dtype: a key of `STORED_DTYPES`, or the code of a dtype that weights cannot have.
    """

    file: Any
    name: str
    shape: tuple[int, ...]
    code: str

    def read(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Fills an array with a part of a tensor of at least one axis, block by block.

        Args:
          out: an array with the shape of the part, any strides and any float dtype.
          index: one slice with a beginning and an end for each axis.
        """
        rows, rest = index[0], index[1:]
        width = STORED_DTYPES[self.code].itemsize * max(1, out[:1].size)
        step = max(1, _BLOCK // width)
        tensor = self.file.get_slice(self.name)
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            block, place = tensor[(slice(start, stop), *rest)], out[start - rows.start : stop - rows.start]
            for strip in range(0, len(block), _STRIP):
                place[strip : strip + _STRIP] = block[strip : strip + _STRIP]

    def equals(self, other: StoredTensor) -> bool:
        """Returns whether this matrix and another hold the same values."""
        if self.shape != other.shape:
            return False
        rows = [slice(start, min(start + _ROWS, self.shape[0])) for start in range(0, self.shape[0], _ROWS)]
        return all(np.array_equal(*(each.file.get_slice(each.name)[part] for each in (self, other))) for part in rows)


def open_weights(folder: pathlib.Path, open_files: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """Opens every weight file and reads its header. It reads no data yet.

    Args:
      folder: a Hugging Face folder.
      open_files: the stack that closes the files.

    Returns:
      A dict from the names of tensors to the tensors.

    Raises:
      FileNotFoundError: see `weight_files`.
      ValueError: a file is damaged or cut short, or the index is not valid.
    """
    stored = {}
    for file in weight_files(folder):
        try:
            tensors = open_files.enter_context(safe_open(file, framework="np"))
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file ({error}): download it again") from None
        for name in tensors.keys():
            header = tensors.get_slice(name)
            stored[name] = StoredTensor(tensors, name, tuple(header.get_shape()), header.get_dtype())
    return stored


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the single weight file if there is one, else the shards that the index names.

    Args:
      folder: a Hugging Face folder.

    Raises:
      FileNotFoundError: there are no safetensors, or a shard is missing.
      ValueError: the index names no files, or names one outside the folder.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        found = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        other = f" but {found}, which are pickles and are never opened" if found else ""
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS_FILE} and no {INDEX_FILE}{other}: get the safetensors files, or convert with "
            f"transformers' `model.save_pretrained(folder)`"
        )
    shards = shard_names(index)
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks the shard{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))} that "
            f"{INDEX_FILE} names: download {'them' if len(missing) > 1 else 'it'}"
        )
    return [folder / name for name in shards]


def shard_names(index: pathlib.Path) -> list[str]:
    """Returns the names of the files that an index lists.

    Args:
      index: the path of `model.safetensors.index.json`.

    Raises:
      ValueError: the index names no files, or names one outside its folder.
    """
    shards = read_json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map: download it again")
    wrong = next(((name, file) for name, file in shards.items() if not isinstance(file, str)), None)
    if wrong:
        raise ValueError(f"{index}: the shard of {wrong[0]} must be a file's name, not {wrong[1]!r}: download it again")
    names = sorted(set(shards.values()))
    for name in names:
        if pathlib.PurePath(name).name != name:
            raise ValueError(f"{index}: shard {name!r} lies outside the folder")
    return names

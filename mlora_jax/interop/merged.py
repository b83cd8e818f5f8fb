"""Exports a base model and an adapter as one merged Hugging Face folder."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlora_jax.core import RankHierarchy
from mlora_jax.interop.factors import LayerFactors, RankOrRanks, layer_factors
from mlora_jax.interop.folder import check_free, new_folder, write_json, write_record
from mlora_jax.interop.names import weight_name
from mlora_jax.interop.tensor_files import TensorLocation, read_header, write_tensors
from mlora_jax.models.config import CONFIG_FILE
from mlora_jax.models.json_file import read_json_object
from mlora_jax.models.weight_files import INDEX_FILE, STORED_DTYPES, WEIGHTS_FILE, weight_files

# Files that are not copied: weights in any format, because they lack the adapter, and the base's own model card.
_LEFT_OUT = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|index\.json)|README\.md|\..*", re.I)
_TEMPLATES = "additional_chat_templates"  # the only folder that belongs to a tokenizer
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}  # the units of huggingface_hub


def export_merged(
    path: str | os.PathLike,
    adapter: Any,
    hierarchy: RankHierarchy,
    rank: RankOrRanks,
    *,
    readout: str = "prefix",
    base_model: str | os.PathLike,
    trained_profile: jax.Array | None = None,
    profiles: Mapping[int, jax.Array] | None = None,
    max_shard_size: int | str | None = None,
    description: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes base and adapter as one model, ``W + A diag(p) B``, in a Hugging Face folder.

    The base's own files are read tensor by tensor. An adapted matrix is summed in float32 or wider and stored in its
    old dtype. Everything else is copied bit by bit, including config and tokenizer. The folder appears whole or not at
    all; an earlier export there is replaced.

    Args:
      path: the folder to write.
      adapter, hierarchy, readout, trained_profile, profiles: as `export_peft`.
      rank: the rank of the read-out, 0..R, where 0 copies the base; or ranks per layer.
      base_model: the folder of the base model.
      max_shard_size: the largest size of a file in bytes, such as 2_000_000_000 or "2GB" (a larger tensor gets a file
        of its own); None keeps the base's files.
      description: further JSON values for `mlora_jax.json`.

    Returns:
      The folder.

    Raises:
      FileNotFoundError: the base is not a folder with a config and safetensors.
      ValueError: `layer_factors` refuses the arguments; the base lacks a layer, has it in another shape, or does not
        store it as floats; a file is damaged; the dtype of a matrix cannot hold the sum; the shard size is unusable.
      FileExistsError: the folder holds something else, or is the folder of the base.
    """
    base = pathlib.Path(base_model).expanduser().resolve()
    if not (base / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{base_model} has no {CONFIG_FILE}: it is not a Hugging Face model folder")
    if check_free(path) == base:
        raise FileExistsError(f"{base} is the base model itself: give another folder")
    limit = None if max_shard_size is None else _bytes(max_shard_size)
    found = layer_factors(adapter, hierarchy, rank, readout=readout, trained_profile=trained_profile, profiles=profiles)
    factors = {weight_name(*key): each for key, each in found.items()}
    files = {file.name: read_header(file) for file in weight_files(base)}
    stored = {name: tensor for header in files.values() for name, tensor in header.tensors.items()}
    for name, each in factors.items():
        _check(base, name, stored.get(name), each)
    if limit is None:
        shards = {name: header.tensors for name, header in files.items()}
    else:
        shards = _shards(stored, limit)
    metadata = next((header.metadata for header in files.values() if header.metadata), {"format": "pt"})
    with new_folder(path) as folder:
        for name, tensors in shards.items():
            write_tensors(folder / name, tensors, metadata, lambda name, raw: _summed(stored, factors, name, raw))
        if set(shards) != {WEIGHTS_FILE}:
            write_json(folder / INDEX_FILE, _index(base, shards))
        _copy_other_files(base, folder)
        write_record(folder, hierarchy, rank, readout, {**(description or {}), "base_model": str(base_model)})
    return pathlib.Path(path)


def _check(base: pathlib.Path, name: str, tensor: TensorLocation | None, factors: LayerFactors) -> None:
    shape = (factors.b.shape[1], factors.a.shape[0])  # [F, D]
    if tensor is None:
        raise ValueError(f"the adapter has factors for {name}, which the weights in {base} lack")
    if tensor.shape != shape:
        raise ValueError(f"{name} in {tensor.file} has shape {list(tensor.shape)}; the adapter needs {list(shape)}")
    if tensor.code not in STORED_DTYPES:
        raise ValueError(
            f"{name} in {tensor.file} is stored as {tensor.code}: an adapter can be added to "
            f"{', '.join(STORED_DTYPES)}; give the base before quantisation"
        )


def _summed(stored: Mapping[str, TensorLocation], factors: Mapping[str, LayerFactors], name: str, raw) -> bytes | None:
    """Returns the bytes of a matrix with its adapter, or None if it has no adapter; `raw` reads the old bytes."""
    if name not in factors:
        return None
    tensor, (a, b) = stored[name], factors[name]
    dtype = STORED_DTYPES[tensor.code]
    wide = np.promote_types(a.dtype, np.float64 if dtype == np.float64 else np.float32)
    weight = np.frombuffer(raw(), dtype).reshape(tensor.shape).astype(wide)
    with np.errstate(over="ignore"):  # overflow is checked below
        summed = (weight + (a.astype(wide) @ b.astype(wide)).T).astype(dtype)
    if not np.isfinite(summed.astype(wide)).all():
        raise ValueError(f"{name} with its adapter has values that {dtype.name} cannot hold, or that are not finite")
    return summed.tobytes()


def _shards(stored: Mapping[str, TensorLocation], limit: int) -> dict[str, dict[str, TensorLocation]]:
    """Returns file -> tensors, in the base's order; a new file begins where a tensor would exceed the limit."""
    groups: list[dict[str, TensorLocation]] = [{}]
    for name, tensor in stored.items():
        if groups[-1] and sum(each.size for each in groups[-1].values()) + tensor.size > limit:
            groups.append({})
        groups[-1][name] = tensor
    if len(groups) == 1:
        return {WEIGHTS_FILE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, start=1)}


def _index(base: pathlib.Path, shards: Mapping[str, Mapping[str, TensorLocation]]) -> dict[str, Any]:
    before = read_json_object(base / INDEX_FILE).get("metadata") if (base / INDEX_FILE).is_file() else None
    total = sum(tensor.size for tensors in shards.values() for tensor in tensors.values())
    places = {name: file for file, tensors in shards.items() for name in tensors}
    return {"metadata": {**(before or {}), "total_size": total}, "weight_map": dict(sorted(places.items()))}


def _copy_other_files(base: pathlib.Path, folder: pathlib.Path) -> None:
    for file in sorted(base.iterdir()):
        if file.is_file() and not _LEFT_OUT.fullmatch(file.name):
            shutil.copyfile(file, folder / file.name)
    if (base / _TEMPLATES).is_dir():
        shutil.copytree(base / _TEMPLATES, folder / _TEMPLATES)


def _bytes(size: int | str) -> int:
    """Returns a shard size in bytes.

    >>> _bytes("1.5MB"), _bytes(10)
    (1500000, 10)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", str(size).strip(), re.I)
    number = float(match[1]) * _UNITS[(match[2] or "").upper()] if match else 0
    if isinstance(size, bool) or number < 1:
        raise ValueError(f'max_shard_size must be bytes, or like "500MB" or "5GB"; got {size!r}')
    return int(number)

"""A read-out in our own format: a smaller adapter, which `load_adapter` reads and every command takes."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlora_jax.core import RankHierarchy, truncate
from mlora_jax.interop.factors import RankOrRanks, by_path, layer_factors
from mlora_jax.interop.folder import check_free, new_folder, write_record
from mlora_jax.training.adapter_file import save_adapter


def export_adapter(
    path: str | os.PathLike,
    adapter,
    hierarchy: RankHierarchy,
    rank: RankOrRanks,
    *,
    readout: str = "prefix",
    base_model: str,
    trained_profile: jax.Array | None = None,
    profiles: Mapping[int, jax.Array] | None = None,
    description: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes a read-out as an adapter of its own, `adapter.safetensors` and `adapter.json`.

    By prefix the factors are cut and keep their hierarchy, so every smaller rank reads out as before. Other read-outs,
    and ranks per layer, get their scale put into B and scaling "none": the function at the exported rank is the same.

    Args:
      path: the folder.
      adapter, hierarchy, readout, trained_profile, profiles: as `export_peft`.
      rank: 1..R; or ranks per layer, 0..R.
      base_model: folder of the base, which is written down.
      description: further JSON values.

    Returns:
      The folder.

    Raises:
      ValueError, FileExistsError: as `export_peft`.
    """
    check_free(path)
    found = layer_factors(adapter, hierarchy, rank, readout=readout, trained_profile=trained_profile, profiles=profiles)
    if not found:
        raise ValueError("every layer has rank 0, which is the base model itself: there is no adapter to write")
    r = max(each.rank for each in found.values())
    if readout == "prefix" and not isinstance(rank, Mapping):
        smaller, kept = truncate(by_path(adapter), rank), hierarchy.truncate(rank)
    else:
        smaller, kept = _padded(by_path(adapter), found, r), RankHierarchy(hierarchy.truncate(r).ranks, max_rank=r)
    with new_folder(path) as folder:
        save_adapter(folder, smaller, kept, {**(description or {}), "base_model": str(base_model)})
        write_record(folder, hierarchy, rank, readout, description)
    return pathlib.Path(path)


def _padded(factors: Mapping, found: Mapping, rank: int) -> dict[str, dict[str, np.ndarray]]:
    """The layers in stacks again, all of one rank."""
    stacks = {}
    for path, pair in factors.items():
        (*leading, features_in, _), features_out = pair["a"].shape, pair["b"].shape[-1]
        dtype = np.promote_types(pair["a"].dtype, np.float32)
        a, b = np.zeros((*leading, features_in, rank), dtype), np.zeros((*leading, rank, features_out), dtype)
        for (name, layer), each in found.items():
            if name == path:
                at = ... if layer is None else layer
                a[at][:, : each.rank], b[at][: each.rank] = each.a, each.b
        stacks[path] = {"a": a, "b": b}
    return stacks

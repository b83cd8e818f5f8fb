"""Exports a read-out in our own format: a smaller adapter, which `load_adapter` reads and every command accepts."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlora_jax.core import RankHierarchy, truncate
from mlora_jax.core.product import without_gate
from mlora_jax.core.rank_axes import FACTORS, adapter_layers, leading_axes
from mlora_jax.interop.factors import RankOrRanks, layer_factors
from mlora_jax.interop.folder import check_free, new_folder, write_record
from mlora_jax.training.adapter_file import save_adapter


def export_adapter(
    path: str | os.PathLike,
    adapter: Any,
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

    With the read-out "prefix" the factors are cut and keep their hierarchy, so every smaller rank reads out as before.
    For other read-outs, and for ranks per layer, B takes the scale and the scaling is "none", so the function at the
    exported rank is the same. Gates are multiplied into B, so the exported adapter has none.

    Args:
      path: the folder to write.
      adapter, hierarchy, readout, trained_profile, profiles: as `export_peft`.
      rank: the rank of the read-out, 1..R; or ranks per layer, 0..R.
      base_model: the folder of the base model, which goes into the description.
      description: further JSON values for the description.

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
    layers = {layer: without_gate(leaves) for layer, leaves in adapter_layers(adapter).items()}
    if readout == "prefix" and not isinstance(rank, Mapping):
        smaller, kept = truncate(layers, rank), hierarchy.truncate(rank)
    else:
        smaller, kept = _padded(layers, found, r), RankHierarchy(hierarchy.truncate(r).ranks, max_rank=r)
    with new_folder(path) as folder:
        save_adapter(folder, smaller, kept, {**(description or {}), "base_model": str(base_model)})
        write_record(folder, hierarchy, rank, readout, description)
    return pathlib.Path(path)


def _padded(factors: Mapping, found: Mapping, rank: int) -> dict[str, dict[str, np.ndarray]]:
    """Stacks the layers again, with all factors padded by zeros to one rank."""
    stacks = {}
    for path, pair in factors.items():
        old_a, old_b = (pair[name] for name in FACTORS)
        leading, dtype = leading_axes(pair), np.promote_types(old_a.dtype, np.float32)
        a, b = np.zeros((*leading, old_a.shape[-2], rank), dtype), np.zeros((*leading, rank, old_b.shape[-1]), dtype)
        for (name, layer), each in found.items():
            if name == path:
                at = ... if layer is None else layer
                a[at][:, : each.rank], b[at][: each.rank] = each.a, each.b
        stacks[path] = dict(zip(FACTORS, (a, b), strict=True))
    return stacks

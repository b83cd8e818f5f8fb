"""Exports adapters as folders that PEFT and vLLM load."""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from mlora_jax.core import RankHierarchy
from mlora_jax.core.rank_axes import adapter_layers, leading_axes
from mlora_jax.disk import write_aside
from mlora_jax.interop.factors import LayerFactors, RankOrRanks, layer_factors
from mlora_jax.interop.folder import check_free, new_folder, write_json, write_record
from mlora_jax.interop.names import LINEAR_PATHS, module_name
from mlora_jax.models.hub import hub_id

PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # the prefix of every tensor's name, from PEFT's wrapper and its tuner

# Program -> the ranks that it can be configured for. vLLM: `MaxLoRARanks` in vllm/config/lora.py, which is
# Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] in the documentation of 0.14 (docs.vllm.ai/en/v0.14.0/api/vllm/config/
# lora). In older versions the list begins at 8, so 1 is not used here. rank_pattern is not used either: older versions
# of `PEFTHelper` in vllm/lora/peft_helper.py keep one r and one lora_alpha for all modules and drop the patterns; only
# the latest version reads them.
RANKS_FOR: dict[str, tuple[int, ...]] = {"vllm": (8, 16, 32, 64, 128, 256, 320, 512)}


def accepted_rank(rank: int, program: str) -> int:
    """Returns the smallest rank that is at least `rank` and that a program accepts.

    Args:
      rank: the rank of the adapter.
      program: a key of `RANKS_FOR`.

    Raises:
      ValueError: the program is unknown, or the rank is above all that it accepts.

    >>> accepted_rank(20, "vllm")
    32
    """
    if program not in RANKS_FOR:
        raise ValueError(f"the ranks of {program!r} are not known; known: {', '.join(RANKS_FOR)}")
    accepted = RANKS_FOR[program]
    if rank > accepted[-1]:
        raise ValueError(f"rank {rank} is above what {program} accepts: {', '.join(map(str, accepted))}")
    return next(r for r in accepted if r >= rank)


def export_peft(
    path: str | os.PathLike,
    adapter: Any,
    hierarchy: RankHierarchy,
    rank: RankOrRanks,
    *,
    readout: str = "prefix",
    base_model: str,
    trained_profile: jax.Array | None = None,
    profiles: Mapping[int, jax.Array] | None = None,
    ranks_for: str | None = None,
    description: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes a read-out as a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`.

    The scale and the gate are multiplied into B and ``lora_alpha = r``, so every scaling and read-out is exact. Ranks
    that differ between layers go into `rank_pattern` and `alpha_pattern`; a layer of rank 0 is left out. The file
    `mlora_jax.json` in the same folder says which read-out of which hierarchy this is. The folder appears whole or not
    at all; an earlier export there is replaced.

    Args:
      path: the folder to write.
      adapter: the tree of the leaves of an adapter on the decoder.
      hierarchy: the S, scales and weights of the adapter.
      rank: the rank of the read-out, 1..R; or ranks per layer, 0..R, as `mlora_jax.evaluate.Allocation.ranks`.
      readout: "prefix", "nested", "masked", "squeeze" or "calibrated".
      base_model: the folder or the hub id of the base, "OWNER/NAME" or "OWNER/NAME@REVISION", from which PEFT loads it.
      trained_profile: the profile [R] of the trained function, which "squeeze" keeps; None is `hierarchy.lora()`.
      profiles: rank -> p [R], as `mlora_jax.training.readout_files.read_profiles` returns them; "calibrated" needs
        them.
      ranks_for: a key of `RANKS_FOR`; all layers are padded with zeros to one rank that this program accepts.
      description: further JSON values for `mlora_jax.json`.

    Returns:
      The folder.

    Raises:
      ValueError: `layer_factors` refuses the arguments; no layer has a rank above 0; the adapter has layers for which
        a Hugging Face model has no name; the program does not accept the rank.
      FileExistsError: the folder holds something else.
    """
    check_free(path)
    found = layer_factors(adapter, hierarchy, rank, readout=readout, trained_profile=trained_profile, profiles=profiles)
    if not found:
        raise ValueError("every layer has rank 0, which is the base model itself: PEFT has no adapter without layers")
    largest = max(each.rank for each in found.values())
    r = accepted_rank(largest, ranks_for) if ranks_for else largest
    if ranks_for:
        found = {key: _padded(each, r) for key, each in found.items()}
    layers = {module_name(*key): each for key, each in found.items()}
    repository, revision = hub_id(str(base_model)) or (str(base_model), None)
    pattern = {re.escape(name): each.rank for name, each in layers.items() if each.rank != r}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": repository,
        "revision": revision,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": _target_modules(found, adapter),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {}
    for name, each in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(each.a.T)  # [r, D]
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(each.b.T)  # [F, r]
    with new_folder(path) as folder:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        with write_aside(folder / PEFT_TENSORS, needed=needed) as file:
            save_file(tensors, file, metadata={"format": "pt"})
        write_json(folder / PEFT_CONFIG, config)
        write_record(folder, hierarchy, rank, readout, description)
    return pathlib.Path(path)


def _padded(factors: LayerFactors, rank: int) -> LayerFactors:
    more = rank - factors.rank
    return LayerFactors(np.pad(factors.a, [(0, 0), (0, more)]), np.pad(factors.b, [(0, more), (0, 0)]))


def _target_modules(found: Mapping[tuple[str, int | None], LayerFactors], adapter) -> list[str]:
    """Returns the `target_modules` with which PEFT adapts exactly the layers in the file.

    For PEFT a target means all modules whose name ends in a dot and the target. A bare "q_proj" therefore stands for
    every layer. If some layers were left out, the other layers are named in full.
    """
    tails = Counter(path.rsplit(".", 1)[-1] for path in LINEAR_PATHS)
    counts = Counter(path for path, _ in found)
    names = []
    for path, leaves in adapter_layers(adapter).items():
        tail = path.rsplit(".", 1)[-1]
        if counts[path] == math.prod(leading_axes(leaves)) and tails[tail] == 1:
            names.append(tail)
        else:
            names += [module_name(*key) for key in found if key[0] == path]
    return sorted(names)

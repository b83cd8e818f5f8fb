"""Adapters on disk: the leaves (A, B and possibly a gate) as safetensors, and their description as JSON."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mlora_jax.adapters import adapt, split
from mlora_jax.core import RankHierarchy, get_policy
from mlora_jax.core.rank_axes import adapter_layers, has_gate, leaf_ranks, path_names
from mlora_jax.disk import write_aside

FORMAT = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


def save_adapter(
    folder: str | os.PathLike, adapter: Any, hierarchy: RankHierarchy, description: Mapping[str, Any]
) -> pathlib.Path:
    """Writes an adapter; each of its two files appears whole or not at all.

    Args:
      folder: the folder to write; it is made if it does not exist.
      adapter: the tree of the adapter's leaves.
      hierarchy: the adapter's S, scaling, weights and R.
      description: further JSON values, such as the method, the seed and the base model.

    Returns:
      The folder.

    Raises:
      ValueError: a leaf has a rank other than the hierarchy's R, or the tree is not an adapter. Nothing is written.
    """
    folder = pathlib.Path(folder)
    for name, rank in leaf_ranks(adapter).items():
        if rank != hierarchy.max_rank:
            raise ValueError(
                f"{name} has rank {rank}, but the hierarchy's R is {hierarchy.max_rank}; "
                "a truncated adapter is saved with hierarchy.truncate(rank)"
            )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.asarray(leaf) for name, leaf in _named_leaves(adapter)}
    record = {
        "format": FORMAT,
        "rank": hierarchy.max_rank,
        "ranks": list(hierarchy.ranks),
        "scaling": hierarchy.scaling,
        "weights": None if hierarchy.weights is None else list(hierarchy.weights),
        **description,
    }
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with write_aside(folder / TENSORS, needed=needed) as file:
        save_file(tensors, file, metadata={"format": "mlora_jax"})
    with write_aside(folder / DESCRIPTION) as file:
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


def load_adapter(folder: str | os.PathLike, template: Any) -> tuple[Any, RankHierarchy, dict[str, Any]]:
    """Reads what `save_adapter` wrote.

    Args:
      folder: the adapter's folder.
      template: the adapter tree of a model adapted with the same rank, targets and gates. It gives the structure and
        the shapes.

    Returns:
      (adapter, hierarchy, description).

    Raises:
      FileNotFoundError: one of the two files is missing.
      ValueError: a file is damaged; a tensor is missing, unknown, or has another shape than in the template.
    """
    folder, record = pathlib.Path(folder), read_description(folder)
    tensors = _read_tensors(folder)
    expected = dict(_named_leaves(template))
    unknown = sorted(set(tensors) - set(expected))
    for name, leaf in expected.items():
        if name not in tensors:
            raise ValueError(f"{folder / TENSORS} lacks the tensor {name}")
        if tensors[name].shape != leaf.shape:
            raise ValueError(
                f"{name} in {folder / TENSORS} has shape {tensors[name].shape}; the model needs {leaf.shape}"
            )
    if unknown:
        raise ValueError(f"{folder / TENSORS} holds tensors that the model has no place for: {', '.join(unknown)}")
    adapter = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.numpy.asarray(tensors[".".join(path_names(path))], leaf.dtype), template
    )
    return adapter, _hierarchy(record), record


def read_adapter(folder: str | os.PathLike) -> tuple[dict[str, dict[str, np.ndarray]], RankHierarchy, dict[str, Any]]:
    """Reads what `save_adapter` wrote, without the model of the adapter.

    Args:
      folder: the adapter's folder.

    Returns:
      (adapter, hierarchy, description). The adapter is {path: {"a": [..., D, R], "b": [..., R, F]}}; the layers with
      a gate also have "gate" [..., R].

    Raises:
      FileNotFoundError: one of the two files is missing.
      ValueError: a file is damaged; a tensor is missing, unknown, or has another rank than the description says.
    """
    folder, record = pathlib.Path(folder), read_description(folder)
    adapter: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in _read_tensors(folder).items():
        path, _, role = name.rpartition(".")
        adapter.setdefault(path, {})[role] = tensor
    for path, leaves in adapter.items():
        try:
            fits = set(leaf_ranks(adapter_layers({path: leaves})).values()) == {record["rank"]}
        except ValueError:
            fits = False
        if not fits:
            shapes = ", ".join(f"{role} {tensor.shape}" for role, tensor in leaves.items())
            raise ValueError(f"{folder / TENSORS} holds no factors of rank {record['rank']} for {path}, but {shapes}")
    return adapter, _hierarchy(record), record


def read_description(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads the JSON values of an adapter that `save_adapter` wrote.

    Args:
      folder: the adapter's folder.

    Raises:
      FileNotFoundError: one of the two files is missing.
      ValueError: the JSON is damaged, or another version wrote it.
    """
    folder = pathlib.Path(folder)
    for name in (TENSORS, DESCRIPTION):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no adapter: {name} is missing")
    try:
        record = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"the adapter in {folder} is damaged: {error}") from error
    if record.get("format") != FORMAT:
        raise ValueError(f"{folder / DESCRIPTION} has format {record.get('format')!r}; this version reads {FORMAT}")
    return record


def trained_profile(description: Mapping[str, Any], hierarchy: RankHierarchy) -> jax.Array | None:
    """Returns the profile [R] of the function that was trained at full rank.

    Args:
      description: the JSON values of an adapter that a run wrote.
      hierarchy: the adapter's hierarchy.

    Returns:
      The profile, or None if the description does not name a method.
    """
    method = (description.get("trial") or {}).get("method")
    policy = description["phases"][-1][0] if description.get("phases") else method
    return get_policy(policy).trained_profile(hierarchy) if policy else None


class AdaptedModel(NamedTuple):
    """A model in evaluation mode with an adapter from a folder.

    Attributes:
      graphdef, base, adapter, profile: the four parts that `mlora_jax.split` returns.
      hierarchy: the adapter's S, scaling, weights and R.
      description: the JSON values of the adapter's folder.
    """

    graphdef: Any
    base: Any
    adapter: Any
    profile: Any
    hierarchy: RankHierarchy
    description: dict[str, Any]


def load_adapted(folder: str | os.PathLike, model: nnx.Module) -> AdaptedModel:
    """Adapts those layers of a model for which an adapter's folder has factors, and reads the factors.

    Args:
      folder: the adapter's folder.
      model: the base model, which is left as it is.

    Raises:
      FileNotFoundError: as `load_adapter`.
      ValueError: as `load_adapter`; the folder has factors for a layer that the model does not have, or gates for only
        some of the layers.
    """
    record = read_description(folder)
    leaves: dict[str, list[str]] = {}
    try:
        with safe_open(pathlib.Path(folder) / TENSORS, framework="numpy") as file:
            for tensor in sorted(file.keys()):
                layer, _, name = tensor.rpartition(".")
                leaves.setdefault(layer, []).append(name)
    except SafetensorError as error:
        raise ValueError(f"the adapter in {folder} is damaged: {error}") from error
    gated = [layer for layer, names in leaves.items() if has_gate(names)]
    if gated and len(gated) < len(leaves):
        bare = ", ".join(sorted(set(leaves) - set(gated)))
        raise ValueError(
            f"{pathlib.Path(folder) / TENSORS} has a gate in {', '.join(gated)}, but none in {bare}: all layers have "
            "one or none"
        )
    targets = [re.escape(layer) for layer in sorted(leaves)]
    adapted = adapt(model, record["rank"], targets, key=jax.random.key(0), gate=bool(gated))
    adapted.eval()
    graphdef, base, template, profile = split(adapted)
    adapter, hierarchy, description = load_adapter(folder, template)
    return AdaptedModel(graphdef, base, adapter, profile, hierarchy, description)


def _read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(folder / TENSORS, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"the adapter in {folder} is damaged: {error}") from error


def _hierarchy(record: Mapping[str, Any]) -> RankHierarchy:
    return RankHierarchy(record["ranks"], record["scaling"], record["weights"], max_rank=record["rank"])


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(".".join(path_names(path)), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]

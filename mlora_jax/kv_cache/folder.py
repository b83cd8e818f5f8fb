"""Projections on disk: `kv_cache.safetensors` with the arrays, and `kv_cache.json` that says what they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mlora_jax.disk import write_aside
from mlora_jax.kv_cache.attention import Projections, cache_shape, check_fit, project
from mlora_jax.kv_cache.ranks import RATES, RankPath, Ranks, check_budget, uniform_ranks
from mlora_jax.models.decoder import Decoder

FORMAT = 1
TENSORS, DESCRIPTION = "kv_cache.safetensors", "kv_cache.json"
ORDER = "order"  # the name of the tensor of a `RankPath`


class SavedProjections(NamedTuple):
    """The content of a folder.

    Attributes:
      projections: the projections.
      path: the ranks that a search found; None if there was no search.
      description: the values of the JSON file.
    """

    projections: Projections
    path: RankPath | None
    description: dict[str, Any]

    def ranks(self, budget: float, rates: str = "searched") -> Ranks:
        """Returns the ranks of a budget.

        Args:
          budget: the fraction of the bytes of the full cache.
          rates: a key of `RATES`.

        Raises:
          ValueError: the budget is outside (0, 1] or was not searched, or the rates are unknown.
        """
        if rates not in RATES:
            raise ValueError(f"unknown kv_rates {rates!r}; known: {', '.join(RATES)}")
        if check_budget(budget) == 1.0:
            return Ranks.full(*self.projections.shape)
        if rates == "uniform":
            return uniform_ranks(budget, *self.projections.shape)
        if self.path is None:
            raise ValueError("no ranks were searched for these projections: give kv_rates=uniform, or run the search")
        return self.path.at(budget)


def base_digest(model: Decoder) -> str:
    """Returns a digest of the weights that make keys and values, the same for every float dtype of the model.

    It is the SHA-256 of the signs of these weights, which rounding keeps.

    Args:
      model: a decoder that is not quantised.
    """
    digest = hashlib.sha256()
    for layer in (model.layers.self_attn.k_proj, model.layers.self_attn.v_proj):
        kernel = getattr(layer, "base", layer).kernel[...]
        digest.update(np.packbits(np.signbit(np.asarray(kernel, np.float32))).tobytes())
    return digest.hexdigest()


def save_projections(
    folder: str | os.PathLike,
    model: Decoder,
    projections: Projections,
    path: RankPath | None,
    description: Mapping[str, Any],
) -> pathlib.Path:
    """Writes projections; each of the two files appears whole or not at all.

    Args:
      folder: the folder to write; it is made if it does not exist.
      model: the base model, of which a digest is kept.
      projections: the projections.
      path: the searched ranks, or None.
      description: further JSON values, such as the base model's name and the config.

    Returns:
      The folder.
    """
    check_fit(projections, cache_shape(model))
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(np.asarray(getattr(projections, name))) for name in _SHAPES}
    record = {"format": FORMAT, "base_digest": base_digest(model), "step": None, **description}
    if path is not None:
        tensors[ORDER], record["step"] = path.order, path.step
    with write_aside(folder / TENSORS, needed=sum(x.nbytes for x in tensors.values())) as file:
        save_file(tensors, file, metadata={"format": "mlora_jax"})
    with write_aside(folder / DESCRIPTION) as file:
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


_SHAPES = ("u_k", "u_v", "mean_v")


def load_projections(folder: str | os.PathLike, model: Decoder) -> SavedProjections:
    """Reads what `save_projections` wrote for a model.

    Args:
      folder: the folder.
      model: the base model, before it is quantised.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or the projections are those of another base.
    """
    folder = pathlib.Path(folder).expanduser()
    for name in (TENSORS, DESCRIPTION):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no projections of keys and values: {name} is missing")
    try:
        record, tensors = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")), load_file(folder / TENSORS)
        if record.get("format") != FORMAT:
            raise ValueError(f"its format is {record.get('format')!r}; this version reads {FORMAT}")
        projections = Projections(*(tensors[name] for name in _SHAPES))
        shape = projections.shape
        path = RankPath(tensors[ORDER], record["step"], shape) if ORDER in tensors else None
    except (json.JSONDecodeError, SafetensorError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"the projections in {folder} are damaged: {error}") from None
    try:
        check_fit(projections, cache_shape(model))
    except ValueError as error:
        raise ValueError(f"{folder} belongs to another base: {error}") from None
    if record["base_digest"] != base_digest(model):
        raise ValueError(
            f"{folder} belongs to another base, {record.get('base_model', 'which it does not name')}: the weights that "
            "make keys and values differ"
        )
    return SavedProjections(projections, path, record)


def read_projected(
    model: Decoder, folder: str | os.PathLike, budget: float, rates: str = "searched", *, cut: bool = True
) -> Decoder:
    """Returns a model whose cache has the projections of a folder, at the ranks of a budget.

    Args:
      model: the base model, before it is quantised or adapted.
      folder: the folder that `save_projections` wrote.
      budget: the fraction of the bytes of the full cache.
      rates: a key of `RATES`.
      cut: as in `project`.

    Raises:
      FileNotFoundError, ValueError: as `load_projections` and `SavedProjections.ranks`.
    """
    saved = load_projections(folder, model)
    return project(model, saved.projections, saved.ranks(budget, rates), cut=cut)

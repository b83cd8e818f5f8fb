"""Tensors that PEFT saves whole beside the factors: copies of the base's tensors, or trained replacements of them.

PEFT writes them for `modules_to_save`, `trainable_token_indices` and `save_embedding_layers`. It sets the last by
itself if embedding or head is adapted or the vocabulary was resized.
Source: `get_peft_model_state_dict` in peft/utils/save_and_load.py.
"""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from mlora_jax.interop.peft_export import PREFIX
from mlora_jax.models.hugging_face import EMBEDDING, HEAD, WEIGHT_MAP

logger = logging.getLogger(__name__)

MODULES, TOKENS = "modules_to_save", "trainable_token_indices"  # keys of adapter_config.json
_WRAPPED = re.compile(r"\.(token_adapter\.base_layer|base_layer|modules_to_save(\.default)?)(?=\.)")
_ROWS = ".token_adapter.trainable_tokens_delta"  # despite the name, the rows that replace those of the base


class WholeTensors(NamedTuple):
    """The result of a comparison of a folder's whole tensors with the base's.

    Attributes:
      unexpected: complaints about tensors that are missing, misshapen, or unknown to the base.
      changed: one line for each tensor that differs from the base's.
      advice: sentences that say what to do about `changed`.
    """

    unexpected: list[str]
    changed: list[str]
    advice: list[str]


def compare_whole(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], model: nnx.Module) -> WholeTensors:
    """Compares the whole tensors of a PEFT adapter with the base's.

    A tensor counts as the base's if one of the two, rounded to the other's dtype, equals the other. Additional rows of
    the base, such as the padding of a vocabulary, stay, with a warning.

    Args:
      tensors: name -> array in its stored dtype, for everything in the file but the factors.
      config: the values of `adapter_config.json`.
      model: the base decoder, adapted or not.
    """
    base, whole = _base_tensors(model), WholeTensors([], [], [])
    _compare_modules(tensors, config, base, whole)
    _compare_rows(tensors, config, base, whole)
    return whole


def refuse_changed(folder: pathlib.Path, whole: WholeTensors) -> None:
    """Raises an error if a whole tensor differs from the base's.

    Args:
      folder: the folder of the PEFT adapter.
      whole: the result of `compare_whole`.

    Raises:
      ValueError: a whole tensor differs from the base's.
    """
    if whole.changed:
        lines = "\n  ".join(whole.changed)
        raise ValueError("\n".join([f"{folder} changes the base, besides by its factors:\n  {lines}", *whole.advice]))


def _compare_modules(tensors, config: Mapping[str, Any], base: Mapping[str, Any], whole: WholeTensors) -> None:
    found = {_WRAPPED.sub("", name.removeprefix(PREFIX)): name for name in tensors if not name.endswith(_ROWS)}
    for name in (name for entry in config.get(MODULES) or () for name in _inside(entry, base)):
        if name not in found:
            whole.unexpected.append(f"{PREFIX}{name}: expected shape {list(base[name].shape)}, found no such tensor")
    enlarged = None
    for name, stored in found.items():
        if name not in base:
            whole.unexpected.append(f"{stored}: nothing in adapter_config.json asks for this tensor")
            continue
        saved, own = tensors[stored], np.asarray(base[name])
        if saved.shape[1:] != own.shape[1:] or (saved.shape != own.shape and name not in (EMBEDDING, HEAD)):
            whole.unexpected.append(f"{stored}: expected shape {list(own.shape)}, found {list(saved.shape)}")
            continue
        both = min(len(saved), len(own))
        difference = _difference(saved[:both], own[:both])
        if len(saved) > len(own):
            enlarged = len(saved)
            whole.changed.append(
                f"{stored}: it has {len(saved)} rows, and the base model {len(own)}: the vocabulary was enlarged; "
                f"of the rows that both have, {difference or 'none differs'}"
            )
        elif difference:
            whole.changed.append(f"{stored}: of its {both} rows, {difference}")
        elif len(saved) < len(own):
            logger.warning(
                "%s has %d rows, and the base model %d: the tokens from %d on keep the base's rows, although the "
                "adapter was trained without them",
                stored, len(saved), len(own), len(saved),
            )  # fmt: skip
    if whole.changed:
        first = f"base.resize_token_embeddings({enlarged}); " * bool(enlarged)
        embedding, head = (
            tensors[found[name]] if name in found else np.asarray(base[name]) for name in (EMBEDDING, HEAD)
        )
        if base[HEAD] is base[EMBEDDING] and not np.array_equal(embedding, head):
            first += "base.config.tie_word_embeddings = False; "
        whole.advice.append(
            "The factors belong to a base with these tensors in it. Make that with PEFT, and give it as the model: "
            f"{first}PeftModel.from_pretrained(base, ADAPTER).unload().save_pretrained(NEW_BASE)"
        )


def _compare_rows(tensors, config: Mapping[str, Any], base: Mapping[str, Any], whole: WholeTensors) -> None:
    found = {
        f"{name.removeprefix(PREFIX).removesuffix(_ROWS)}.weight": name for name in tensors if name.endswith(_ROWS)
    }
    tokens, before = _token_indices(config.get(TOKENS), base), len(whole.changed)
    for name in tokens:
        if name not in found:
            whole.unexpected.append(f"{PREFIX}{name.removesuffix('.weight')}{_ROWS}: expected, found no such tensor")
    if EMBEDDING in tokens and base[HEAD] is base[EMBEDDING]:
        tokens.setdefault(HEAD, tokens[EMBEDDING])  # a tied tensor may be saved under both names
    for name, stored in found.items():
        saved, indices = tensors[stored], tokens.get(name)
        if indices is None:
            whole.unexpected.append(f"{stored}: nothing in adapter_config.json asks for this tensor")
        elif saved.shape != (len(indices), *base[name].shape[1:]) or max(indices) >= len(base[name]):
            whole.unexpected.append(
                f"{stored}: expected the rows {indices} of {list(base[name].shape)}, found shape {list(saved.shape)}"
            )
        elif difference := _difference(saved, np.asarray(base[name])[indices], indices):
            whole.changed.append(f"{stored}: of its {len(indices)} rows, {difference}")
    if len(whole.changed) > before:
        whole.advice.append(
            "Rows of single tokens can only be merged together with the factors, into a model without an adapter: "
            "PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(NEW_MODEL)"
        )


def _base_tensors(model: nnx.Module) -> dict[str, jax.Array | np.ndarray]:
    """Returns name in the checkpoint -> the base's tensor, including a tied head."""
    leaves = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path)).replace(".base.", ".")
        if name in WEIGHT_MAP and isinstance(leaf[...], jax.Array):  # a quantised kernel differs from the checkpoint's
            leaves[name] = leaf[...]
    found = {}
    for path, array in leaves.items():
        template, transposed = WEIGHT_MAP[path]
        for layer in range(len(array)) if "{layer}" in template else [None]:
            tensor = array if layer is None else array[layer]
            found[template.format(layer=layer)] = tensor.T if transposed else tensor
    return {HEAD: found[EMBEDDING], **found} if EMBEDDING in found else found


def _inside(entry: str, names: Mapping[str, Any]) -> Iterator[str]:
    """Yields the names of the tensors in those modules whose names end in an entry.

    Source: `_set_trainable` in peft/utils/other.py.
    """
    for name in names:
        parts = name.split(".")[:-1]
        if any(".".join(parts[: end + 1]).endswith(entry) for end in range(len(parts))):
            yield name


def _token_indices(value: Any, names: Mapping[str, Any]) -> dict[str, list[int]]:
    """Returns tensor -> the tokens whose rows are trained; a bare list belongs to the embedding."""
    entries = value if isinstance(value, dict) else {EMBEDDING.removesuffix(".weight"): value} if value else {}
    return {name: list(indices) for entry, indices in entries.items() for name in _inside(entry, names)}


def _difference(saved: np.ndarray, own: np.ndarray, numbers: list[int] | None = None) -> str:
    """Returns the end of a sentence that says which rows differ and by how much; it is empty if none differs."""
    with np.errstate(over="ignore"):
        same = (saved.astype(own.dtype) == own) | (own.astype(saved.dtype) == saved)
    rows = np.flatnonzero(~same.reshape(len(same), -1).all(axis=1))
    if not len(rows):
        return ""
    largest = np.abs(saved[rows].astype(np.float64) - own[rows].astype(np.float64)).max()
    named = [int(row) if numbers is None else numbers[row] for row in rows[:4]]
    listing = ", ".join(map(str, named)) + (", ..." if len(rows) > 4 else "")
    verb = "differs" if len(rows) == 1 else "differ"
    return f"{len(rows)} {verb} from the base model's ({listing}), by {largest:.3g} at most"

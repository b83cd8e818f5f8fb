"""Imports PEFT's LoRA adapters as a starting point for training."""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from mlora_jax.adapters import adapt, set_profile, split
from mlora_jax.core import RankHierarchy, powers_of_two
from mlora_jax.core.hierarchy import check_rank
from mlora_jax.core.product import times_gate
from mlora_jax.core.rank_axes import FACTORS, adapter_layers
from mlora_jax.interop.factors import LayerFactors
from mlora_jax.interop.folder import read_record
from mlora_jax.interop.names import KERNEL, LINEAR_PATHS, module_name
from mlora_jax.interop.peft_export import PEFT_CONFIG, PEFT_TENSORS, PREFIX
from mlora_jax.interop.peft_whole import compare_whole, refuse_changed
from mlora_jax.models.json_file import read_json_object
from mlora_jax.models.weight_files import STORED_DTYPES

# The keys of adapter_config.json that are used, and those that do not affect the function of a trained adapter.
_USED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "init_lora_weights", "modules_to_save", "trainable_token_indices",
}  # fmt: skip
_HARMLESS = {
    "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
    "lora_dropout", "runtime_config", "megatron_core", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# The values with which any other key counts as absent.
_UNSET = (None, False, "none", [], {}, "")
# The other values (pissa, olora, corda, loftq, lora_ga, mica) also change the base's weights, at least in some version.
_INITS = (True, False, "gaussian", "eva", "orthogonal")
_ALL_LINEAR = "all-linear"


class _Layer(NamedTuple):
    """A linear layer of our model.

    Attributes:
      path: the path of the module.
      layer: the index in the stack; None for a layer that is not stacked.
      features_in: D.
      features_out: F.
    """

    path: str
    layer: int | None
    features_in: int
    features_out: int


def import_peft(
    path: str | os.PathLike,
    model: nnx.Module,
    *,
    key: jax.Array,
    rank: int | None = None,
    init: str = "fan_rank",
    dropout: float = 0.0,
) -> tuple[nnx.Module, RankHierarchy]:
    """Adapts our decoder with a PEFT adapter, which can then be trained further or read out.

    The adapter's scale is multiplied into B. If the folder is our own export of the read-out "prefix" at one rank,
    factors and hierarchy are those that were exported, cut to that rank, so every smaller rank reads out as before.
    Otherwise the scaling is "none" and S is the powers of two up to R.

    Args:
      path: the folder with `adapter_config.json` and `adapter_model.safetensors`.
      model: the base decoder, which is left as it is.
      key: the `jax.random.key` for columns of A that the file does not have. Their rows of B are zero, so the function
        is the file's, and training can move them.
      rank: R; None is the largest rank in the file, without columns that are zero in A and in B.
      init, dropout: as `mlora_jax.adapt`.

    Returns:
      The adapted model, which computes what PEFT computes, and the hierarchy. The function of the model is the prefix
      of rank R of this hierarchy.

    Raises:
      FileNotFoundError: there is no such folder, or one of the two files is missing (pickles are never opened).
      ValueError: the adapter uses something unsupported, such as DoRA or biases; a tensor that is saved whole, such as
        an embedding, differs from the base's; the model lacks a module; a tensor is missing, unexpected, misshapen or
        not a float; a file is damaged.
    """
    layers, folder = _linear_layers(model), pathlib.Path(path).expanduser()
    found = _read_layers(folder, layers, model)
    largest = max(1, max(each.rank for each in found.values()))
    r = largest if rank is None else check_rank(rank, f"the rank for {path}", low=largest)
    hierarchy, record = RankHierarchy(powers_of_two(r), max_rank=r), read_record(folder)
    if record and record.get("readout") == "prefix" and record.get("rank") == r:
        hierarchy = record["hierarchy"].truncate(r)
    paths = sorted({layers[name].path for name in found})
    adapted = adapt(model, r, [re.escape(each) for each in paths], key=key, init=init, dropout=dropout)
    graphdef, base, adapter, profile = split(adapted)
    p = hierarchy.lora()
    adapter = _filled(adapter, {layers[name]: each for name, each in found.items()}, p)
    return nnx.merge(graphdef, base, adapter, set_profile(profile, p)), hierarchy


def start_from_peft(path: str | os.PathLike, model: nnx.Module, trained_profile: jax.Array) -> Any:
    """Returns the adapter tree of an adapted model with the factors of a PEFT adapter instead of fresh ones.

    Args:
      path: as `import_peft`.
      model: the adapted model. Its R is at least the file's, and all layers of the file are adapted. Other layers, and
        columns that the file does not have, stay as they are, with B zero.
      trained_profile: the profile [R] under which the model computes what PEFT computes.

    Returns:
      The adapter tree, as the third result of `mlora_jax.split`.

    Raises:
      FileNotFoundError: as `import_peft`.
      ValueError: as `import_peft`; the file's rank is above R; a layer of the file has no adapter in the model; the
        profile is zero where the file has columns.
    """
    layers = _linear_layers(model)
    found = _read_layers(pathlib.Path(path).expanduser(), layers, model)
    adapter = split(model)[2]
    adapted = adapter_layers(adapter)
    missing = sorted({layers[name].path for name in found} - set(adapted))
    if missing:
        raise ValueError(f"{path} has factors for {', '.join(missing)}, which the targets leave out: add them")
    largest = max(1, max(each.rank for each in found.values()))
    if largest > len(trained_profile):
        raise ValueError(f"{path} has rank {largest}, above the rank {len(trained_profile)} to train: raise that")
    return _filled(adapter, {layers[name]: each for name, each in found.items()}, trained_profile)


def _linear_layers(model: nnx.Module) -> dict[str, _Layer]:
    """Returns the name of the torch module -> our layer."""
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        dotted = ".".join(map(str, path)).replace(f".base{KERNEL}", KERNEL)
        name = dotted.removesuffix(KERNEL)
        if dotted.endswith(KERNEL) and name in LINEAR_PATHS:
            *leading, features_in, features_out = leaf.shape
            for layer in range(math.prod(leading)) if leading else [None]:
                found[module_name(name, layer)] = _Layer(name, layer, features_in, features_out)
    if not found:
        raise ValueError("a PEFT adapter can be read into the decoders of load_decoder only")
    return found


def _read_layers(folder: pathlib.Path, layers: Mapping[str, _Layer], model: nnx.Module) -> dict[str, LayerFactors]:
    """Returns name -> factors [D, r] and [r, F] with the scale in B, without zero columns at the end."""
    config = _read_config(folder)
    expected = _targeted(folder, config, layers)
    tensors = _read_tensors(folder)
    complaints, found = [], {}
    for name in expected:
        r, scale = _rank_and_scale(config, name)
        shapes = {"lora_A": (r, layers[name].features_in), "lora_B": (layers[name].features_out, r)}
        pair = []
        for role, shape in shapes.items():
            tensor = tensors.pop(f"{PREFIX}{name}.{role}.weight", None)
            if tensor is None:
                complaints.append(f"{PREFIX}{name}.{role}.weight: expected shape {list(shape)}, found no such tensor")
            elif tensor.shape != shape:
                complaints.append(f"{PREFIX}{name}.{role}.weight: expected shape {list(shape)}, found {tensor.shape}")
            else:
                pair.append(_at_least_float32(tensor).T)
        if len(pair) == 2:
            found[name] = _without_dead_columns(pair[0], scale * pair[1])
    whole = compare_whole(tensors, config, model)
    complaints += whole.unexpected
    if complaints:
        shown = complaints[:12] + [f"and {len(complaints) - 12} more"] * (len(complaints) > 12)
        listing = "\n  ".join(shown)
        raise ValueError(f"the tensors in {folder} are not those its {PEFT_CONFIG} describes:\n  {listing}")
    refuse_changed(folder, whole)
    return found


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / PEFT_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a PEFT adapter: it has no {PEFT_CONFIG}")
    config = read_json_object(file)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type {config.get('peft_type')!r} is not supported, only 'LORA' is")
    for name, value in config.items():
        if name not in _USED | _HARMLESS and value not in _UNSET:
            raise ValueError(f"{file}: {name}={value!r} is not supported: only plain LoRA factors can be read")
    if config.get("init_lora_weights", True) not in _INITS:
        raise ValueError(
            f"{file}: init_lora_weights={config['init_lora_weights']!r} is not supported: such an adapter belongs to "
            "changed base weights; convert it by PEFT's path_initial_model_for_weight_conversion"
        )
    ranks = {"r": config.get("r", 8), **(config.get("rank_pattern") or {})}
    for name, value in ranks.items():
        check_rank(value, f"{file}: the rank {name!r}", low=1)
    alphas = {"lora_alpha": config.get("lora_alpha", 8), **(config.get("alpha_pattern") or {})}
    for name, value in alphas.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{file}: the alpha {name!r} must be a number, got {value!r}")
    return config


def _rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Returns the r of a module, and the factor of B A: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    r = _by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    return r, alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the name or a tail of it after a dot.

    Source: `get_pattern_key` in peft/utils/other.py.
    """
    return next((value for key, value in (patterns or {}).items() if _fits(rf"(.*\.)?({key})$", name)), default)


def _fits(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{PEFT_CONFIG}: {pattern!r} is no regular expression: {error}") from None


def _targeted(folder: pathlib.Path, config: Mapping[str, Any], layers: Mapping[str, _Layer]) -> list[str]:
    """Returns the names of the model's modules that the config targets.

    Source: `check_target_module_exists` in peft/tuners/tuners_utils.py.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or ()
    if not targets:
        raise ValueError(f"{folder / PEFT_CONFIG} names no target_modules")
    if _ALL_LINEAR in (targets, *(targets if len(targets) == 1 else ())):
        # For PEFT "all-linear" means all linear layers but the head.
        chosen = [name for name, layer in layers.items() if layer.path.startswith("layers.")]
    else:
        strange = [target for target in _listed(targets) if not any(_names(target, targets, each) for each in layers)]
        if strange:
            there = ", ".join(sorted({each.path.rsplit(".", 1)[-1] for each in layers.values()}))
            raise ValueError(
                f"{folder / PEFT_CONFIG}: target_modules {', '.join(map(repr, strange))} match no linear layer of this "
                f"model; linear layers here: {there}"
            )
        chosen = [name for name in layers if any(_names(target, targets, name) for target in _listed(targets))]
    chosen = [name for name in chosen if not any(_names(target, excluded, name) for target in _listed(excluded))]
    if not chosen:
        raise ValueError(f"{folder / PEFT_CONFIG}: exclude_modules leaves no module of target_modules")
    return chosen


def _listed(targets: str | Sequence[str]) -> Sequence[str]:
    return [targets] if isinstance(targets, str) else targets


def _names(target: str, targets: str | Sequence[str], name: str) -> bool:
    """Returns whether a target means a module.

    A single string is a pattern for the whole name; an entry of a list is a tail of the name.
    """
    if isinstance(targets, str):
        return _fits(rf"(?:{target})\Z", name)
    return name == target or name.endswith(f".{target}")


def _read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    file = folder / PEFT_TENSORS
    if not file.is_file():
        found = sorted(each.name for pattern in ("*.bin", "*.pt", "*.pth") for each in folder.glob(pattern))
        other = f" but {', '.join(found)}, pickles that are never opened" if found else ""
        raise FileNotFoundError(f"{folder} has no {PEFT_TENSORS}{other}: save the adapter as safetensors")
    tensors = {}
    try:
        with safe_open(file, framework="np") as stored:
            for name in stored.keys():
                code = stored.get_slice(name).get_dtype()
                if code not in STORED_DTYPES:
                    raise ValueError(f"{name} in {file} is stored as {code}, not as {', '.join(STORED_DTYPES)}")
                tensors[name] = stored.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from None
    wrong = sorted(name for name, value in tensors.items() if not np.isfinite(value).all())
    if wrong:
        raise ValueError(f"{', '.join(wrong[:4])} in {file} hold values that are not finite")
    return tensors


def _at_least_float32(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.float64 else array.astype(np.float32)


def _without_dead_columns(a: np.ndarray, b: np.ndarray) -> LayerFactors:
    """Cuts columns at the end that are zero in A and in B, because no gradient ever reaches them."""
    alive = np.flatnonzero(a.any(axis=0) | b.any(axis=1))
    r = alive[-1] + 1 if len(alive) else 0
    return LayerFactors(a[:, :r], b[:r])


def _filled(adapter: Any, found: Mapping[_Layer, LayerFactors], p: jax.Array) -> Any:
    """Returns the tree with new factors.

    B is divided by the profile and by the gate, so that the adapter computes the function of the factors under them.
    """
    layers = adapter_layers(adapter)
    stacks = {path: {name: np.array(leaf) for name, leaf in leaves.items()} for path, leaves in layers.items()}
    for (path, layer, *_), (a, b) in found.items():
        r, at = a.shape[1], ... if layer is None else layer
        left, right = (stacks[path][name][at] for name in FACTORS)
        gate_and_p = times_gate(np.asarray(p), stacks[path])  # [R], or [..., R] with a gate
        scales = gate_and_p if gate_and_p.ndim == 1 else gate_and_p[at]
        silent = scales[:r, None] == 0
        if (silent & (b != 0)).any():
            raise ValueError(f"{path} has {r} columns, of which the profile {scales.tolist()} uses only some")
        left[:, :r] = a
        right[:r] = b / np.where(silent, 1.0, scales[:r, None])
    paths = {}
    for path, leaf in nnx.to_flat_state(adapter):
        *parent, role = map(str, path)
        paths[path] = leaf.replace(jnp.asarray(stacks[".".join(parent)][role], leaf.dtype))
    return nnx.from_flat_state(list(paths.items()))

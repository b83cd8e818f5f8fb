"""Loads decoders from Hugging Face folders, and saves them: `config.json` and safetensors, in one file or in shards."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from mlora_jax.disk import write_aside
from mlora_jax.models.config import CONFIG_FILE, SOURCE_DTYPES, DecoderConfig, read_config
from mlora_jax.models.decoder import Decoder
from mlora_jax.models.hub import checkpoint_folder
from mlora_jax.models.weight_files import INDEX_FILE, STORED_DTYPES, WEIGHTS_FILE, StoredTensor, open_weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Path in the decoder's state -> (name in the checkpoint, whether the matrix is stored transposed).
# PyTorch keeps a Linear's matrix as [F, D], Flax as [D, F].
WEIGHT_MAP = {
    "embed_tokens.embedding": (EMBEDDING, False),
    "layers.input_layernorm.weight": ("model.layers.{layer}.input_layernorm.weight", False),
    "layers.self_attn.q_proj.kernel": ("model.layers.{layer}.self_attn.q_proj.weight", True),
    "layers.self_attn.q_proj.bias": ("model.layers.{layer}.self_attn.q_proj.bias", False),
    "layers.self_attn.k_proj.kernel": ("model.layers.{layer}.self_attn.k_proj.weight", True),
    "layers.self_attn.k_proj.bias": ("model.layers.{layer}.self_attn.k_proj.bias", False),
    "layers.self_attn.v_proj.kernel": ("model.layers.{layer}.self_attn.v_proj.weight", True),
    "layers.self_attn.v_proj.bias": ("model.layers.{layer}.self_attn.v_proj.bias", False),
    "layers.self_attn.q_norm.weight": ("model.layers.{layer}.self_attn.q_norm.weight", False),
    "layers.self_attn.k_norm.weight": ("model.layers.{layer}.self_attn.k_norm.weight", False),
    "layers.self_attn.o_proj.kernel": ("model.layers.{layer}.self_attn.o_proj.weight", True),
    "layers.self_attn.o_proj.bias": ("model.layers.{layer}.self_attn.o_proj.bias", False),
    "layers.post_attention_layernorm.weight": ("model.layers.{layer}.post_attention_layernorm.weight", False),
    "layers.mlp.gate_proj.kernel": ("model.layers.{layer}.mlp.gate_proj.weight", True),
    "layers.mlp.gate_proj.bias": ("model.layers.{layer}.mlp.gate_proj.bias", False),
    "layers.mlp.up_proj.kernel": ("model.layers.{layer}.mlp.up_proj.weight", True),
    "layers.mlp.up_proj.bias": ("model.layers.{layer}.mlp.up_proj.bias", False),
    "layers.mlp.down_proj.kernel": ("model.layers.{layer}.mlp.down_proj.weight", True),
    "layers.mlp.down_proj.bias": ("model.layers.{layer}.mlp.down_proj.bias", False),
    "norm.weight": ("model.norm.weight", False),
    "lm_head.kernel": (HEAD, True),
}

# Tensors that old exporters wrote and that follow from the config.
HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")

_ALIGNMENT = 64  # The alignment in bytes that XLA needs to use memory which it did not allocate.
_COMPLAINTS = 12  # The most differences that a message lists: the checkpoint of another model has hundreds.


def load_decoder(
    path: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None] | None = None,
) -> Decoder:
    """Loads a Llama-family decoder from a Hugging Face folder or from the hub.

    The arrays of the decoder are filled one at a time, block by block from the files. Each goes to its devices before
    the next is read. So the host holds, besides the model itself, only the part of one array that one device gets.

    Args:
      path: a folder with `config.json` and with `model.safetensors` or its shards and index. A string that names no
        folder may be a hub id "OWNER/NAME", which huggingface_hub finds in its cache or downloads to it.
      dtype: the dtype of weights and compute: float32, bfloat16, float16 or float64. None: every weight has the dtype
        in which it is stored, and compute has the dtype of the embedding.
      sharding: a function of the dotted path (such as `layers.mlp.up_proj.kernel`, a key of `WEIGHT_MAP`) and the shape
        (such as [L, D, F]) of an array, which returns the sharding of the array. A process reads only the parts that
        its own devices get. None: every array is whole on the default device.

    Returns:
      The decoder.

    Raises:
      FileNotFoundError: there is no such folder, or it has no config or no safetensors; the hub does not have the id;
        or the hub cannot be reached and the cache does not have the id.
      ValueError: the architecture is not supported; a tensor is missing, misshapen, not of floats or unknown; a file is
        damaged; jax would silently narrow the dtype; or a sharding does not divide an array.

    Example:
      >>> model = load_decoder("/data/Llama-3.2-1B", dtype=jnp.bfloat16)  # doctest: +SKIP
      >>> model = load_decoder("Qwen/Qwen3-0.6B", sharding=lambda path, shape: replicated)  # doctest: +SKIP
    """
    folder = checkpoint_folder(path)
    config = read_config(folder)
    with contextlib.ExitStack() as open_files:
        stored = open_weights(folder, open_files)
        names = _source_names(config, stored)
        return _assemble(folder, config, stored, names, None if dtype is None else _checked(dtype), sharding)


def save_decoder(path: str | os.PathLike, model: Decoder) -> None:
    """Writes a decoder as a Hugging Face folder that transformers and `load_decoder` read.

    Each file is written under another name and then renamed. The config comes last, so a folder with a config is
    complete.

    Args:
      path: the folder, which is created if it does not exist. Its `model.safetensors` and `config.json` are replaced.
      model: a decoder without adapters (fold them first).

    Raises:
      ValueError: the model is quantised, or it holds arrays that this format cannot store, such as those of an adapter.
      FileExistsError: the folder holds a checkpoint in shards, which would remain next to the new file.
    """
    leaves = {_dotted(names): leaf for names, leaf in nnx.to_flat_state(nnx.state(model))}
    extra = sorted(set(leaves) - set(WEIGHT_MAP))
    if extra:
        raise ValueError(f"cannot save {extra[:4]} in the Hugging Face layout: fold or drop the adapter first")
    if getattr(model, "quantization", None):
        raise ValueError(
            f"cannot save a base quantised to {model.quantization.format}: save the model it was made from"
        )
    folder = pathlib.Path(path)
    if (folder / INDEX_FILE).exists():
        raise FileExistsError(f"{folder} holds a checkpoint in shards ({INDEX_FILE}): give another folder")
    tensors = {}
    for name, leaf in leaves.items():
        source, transposed = WEIGHT_MAP[name]
        array = np.asarray(leaf[...])
        array = np.swapaxes(array, -1, -2) if transposed else array
        stack = enumerate(array) if "{layer}" in source else [(None, array)]
        # The writer takes the bytes in the order of memory, so it would write a transposed view untransposed.
        tensors |= {source.format(layer=layer): np.ascontiguousarray(value) for layer, value in stack}
    values = model.config.to_hugging_face() | {"torch_dtype": model.dtype.name}
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with write_aside(folder / WEIGHTS_FILE, needed=needed) as file:
        save_file(tensors, file, metadata={"format": "pt"})
    with write_aside(folder / CONFIG_FILE) as file:
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _source_names(config: DecoderConfig, stored: dict[str, StoredTensor]) -> dict[str, str]:
    """Maps expected tensors to stored tensors whose names differ: a tied pair may be stored under either name."""
    if not config.tie_word_embeddings or HEAD not in stored:
        return {}
    if EMBEDDING not in stored:
        return {EMBEDDING: HEAD}
    if not stored[EMBEDDING].equals(stored[HEAD]):
        raise ValueError(
            f"config.json says tie_word_embeddings, but {EMBEDDING} and {HEAD} are both stored and differ: set "
            f"tie_word_embeddings to false"
        )
    return {}


def _assemble(folder, config: DecoderConfig, stored: dict[str, StoredTensor], names, dtype, sharding) -> Decoder:
    """Makes the decoder's arrays one after the other."""

    def abstract(dtype):
        return nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))))

    leaves = nnx.to_flat_state(abstract(jnp.float32)[1])
    sources = {path: _tensors(path, leaf.shape, names) for path, leaf in leaves}  # path -> [(name, shape), ...]
    _check(folder, config, stored, [pair for pairs in sources.values() for pair in pairs])

    def dtype_of(path):
        if dtype is not None:
            return dtype
        return _checked(np.result_type(*(STORED_DTYPES[stored[name].code] for name, _ in sources[path])))

    graphdef, state = abstract(dtype_of(("embed_tokens", "embedding")))
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        tensors = [stored[name] for name, _ in sources[path]]
        read = functools.partial(_read, path, tensors, dtype_of(path))
        placement = None if sharding is None else sharding(_dotted(path), leaf.shape)
        filled.append((path, leaf.replace(_placed(_dotted(path), leaf.shape, placement, read))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _read(path: tuple[Any, ...], tensors, dtype, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Reads the part of one array of the decoder between `bounds`, a beginning and an end for each axis."""
    array = _aligned([end - start for start, end in bounds], dtype)
    places, inner = [array], [slice(*pair) for pair in bounds]
    if path[0] == "layers":
        places, tensors, inner = array, tensors[inner[0]], inner[1:]
    for place, tensor in zip(places, tensors, strict=True):
        if WEIGHT_MAP[_dotted(path)][1]:
            tensor.read(place.T, tuple(inner[::-1]))
        else:
            tensor.read(place, tuple(inner))
    return array


def _aligned(shape: list[int], dtype) -> np.ndarray:
    """Allocates memory that a CPU device can use without a copy, which NumPy's own allocation does not ensure."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _placed(name: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding | None, read) -> jax.Array:
    """Places an array on its devices. `read(bounds)` reads a part, once for all devices that get the same part."""
    if sharding is None:
        return jax.device_put(read(tuple((0, size) for size in shape)))
    try:
        indices = sharding.addressable_devices_indices_map(shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    wanted = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        for device, index in indices.items()
        if index is not None
    }
    arrays = {}
    for bounds in dict.fromkeys(wanted.values()):
        part = read(bounds)
        arrays |= {device: jax.device_put(part, device) for device in wanted if wanted[device] == bounds}
        # Without this wait the host would hold both this part, until its transfer ends, and the next part.
        jax.block_until_ready(list(arrays.values()))
    return jax.make_array_from_single_device_arrays(shape, sharding, [arrays[device] for device in wanted])


def _tensors(path: tuple[Any, ...], shape: tuple[int, ...], names: dict[str, str]):
    """Returns the names and shapes of the stored tensors that make up one array of the decoder."""
    template, transposed = WEIGHT_MAP[_dotted(path)]
    layers = range(shape[0]) if path[0] == "layers" else [None]
    shape = shape[1:] if path[0] == "layers" else shape
    expected = [template.format(layer=layer) for layer in layers]
    return [(names.get(name, name), shape[::-1] if transposed else shape) for name in expected]


def _check(folder, config: DecoderConfig, stored: dict[str, StoredTensor], expected: list[tuple[str, tuple]]) -> None:
    """Compares the tensors in the files with those that the config needs, before any data is read."""
    complaints = []
    for name, shape in expected:
        found = stored.get(name)
        if found is None:
            complaints.append(f"{name}: expected shape {list(shape)}, found no such tensor")
        elif found.shape != shape:
            complaints.append(f"{name}: expected shape {list(shape)}, found {list(found.shape)}")
        elif found.code not in STORED_DTYPES:
            complaints.append(f"{name}: expected one of {', '.join(STORED_DTYPES)}, found {found.code}")
    known = {name for name, _ in expected} | ({EMBEDDING, HEAD} if config.tie_word_embeddings else set())
    for name in sorted(set(stored) - known):
        if not HARMLESS.search(name):
            complaints.append(f"{name}: expected no such tensor, found shape {list(stored[name].shape)}")
    if complaints:
        shown = complaints[:_COMPLAINTS]
        more = [f"and {len(complaints) - len(shown)} more"] if len(complaints) > len(shown) else []
        listing = "\n  ".join(shown + more)
        raise ValueError(f"the weights in {folder} are not those its {CONFIG_FILE} describes:\n  {listing}")


def _checked(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype if weights may have it and jax does not narrow it."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in SOURCE_DTYPES:
        raise ValueError(f"dtype {dtype.name!r} is not one of {', '.join(SOURCE_DTYPES)}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"dtype {dtype.name} needs jax_enable_x64: set it, or load with dtype=jnp.float32")
    return dtype


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(path)

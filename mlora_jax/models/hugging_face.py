"""Decoders from and to Hugging Face folders: `config.json` and safetensors, one file or many shards."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
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

# Tensors that old exporters wrote and that hold nothing a config does not say.
HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")

_ALIGNMENT = 64  # bytes; what XLA asks of memory that is not its own
_COMPLAINTS = 12  # Named in one message; a checkpoint of another model differs in hundreds.


def load_decoder(
    path: str | os.PathLike,
    *,
    dtype=None,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None] | None = None,
) -> Decoder:
    """Loads a Llama-family decoder from a Hugging Face folder or from the hub.

    One array of the decoder is filled at a time, block by block from the files, and goes to its devices before the
    next: beyond the model itself the host holds the part of one array that one device gets.

    Args:
      path: a folder with `config.json` and `model.safetensors` or its shards and index; or, as a string that is no
        folder, a hub id "OWNER/NAME", which huggingface_hub downloads to its cache or finds there.
      dtype: of weights and compute (float32, bfloat16, float16 or float64); None: every weight as it is
        stored, compute in the dtype of the embedding.
      sharding: dotted path (`layers.mlp.up_proj.kernel`, a key of `WEIGHT_MAP`) and shape ([L, D, F]) of an array ->
        the sharding in which it is made; a process reads only what its own devices get. None: whole, on the default
        device.

    Returns:
      The decoder.

    Raises:
      FileNotFoundError: no such folder, or no config or safetensors in it; a hub id that the hub does not have, or
        that the cache does not have and the hub cannot be asked for.
      ValueError: an unsupported architecture; a missing, misshapen, non-float or unknown tensor; a damaged
        file; a dtype that jax would silently narrow; a sharding that does not divide an array.

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

    Each file is written aside and renamed, the config last: a folder with a config is complete.

    Args:
      path: the folder; made if absent. A `model.safetensors` and `config.json` in it are replaced.
      model: a decoder without adapters (fold them first).

    Raises:
      ValueError: the model holds arrays that this format has no place for, such as an adapter's, or is quantised.
      FileExistsError: the folder holds a checkpoint in shards, which would stay beside the new file.
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
        # The writer takes the bytes as they lie in memory: a view would be written untransposed.
        tensors |= {source.format(layer=layer): np.ascontiguousarray(value) for layer, value in stack}
    values = model.config.to_hugging_face() | {"torch_dtype": model.dtype.name}
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with write_aside(folder / WEIGHTS_FILE, needed=needed) as file:
        save_file(tensors, file, metadata={"format": "pt"})
    with write_aside(folder / CONFIG_FILE) as file:
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _source_names(config: DecoderConfig, stored: dict[str, StoredTensor]) -> dict[str, str]:
    """Expected tensor -> stored tensor, where they differ: a tied pair may be stored under either name."""
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


def _read(path: tuple[str, ...], tensors, dtype, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The part of one array of the decoder between `bounds`, a beginning and an end for each axis."""
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
    """Memory that a CPU device takes over as it is; where NumPy puts an array it would be copied."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _placed(name: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding | None, read) -> jax.Array:
    """An array on its devices; `read(bounds)` makes a part, once for all devices that get the same."""
    if sharding is None:
        return jax.device_put(read(tuple((0, size) for size in shape)))
    try:
        indices = sharding.addressable_devices_indices_map(shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    wanted = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        for device, index in indices.items()
    }
    arrays = {}
    for bounds in dict.fromkeys(wanted.values()):
        part = read(bounds)
        arrays |= {device: jax.device_put(part, device) for device in wanted if wanted[device] == bounds}
        # Else the host would hold this part until its transfer ends, and meanwhile the next.
        jax.block_until_ready(list(arrays.values()))
    return jax.make_array_from_single_device_arrays(shape, sharding, [arrays[device] for device in wanted])


def _tensors(path: tuple[str, ...], shape: tuple[int, ...], names: dict[str, str]):
    """The stored names and shapes that make up one array of the decoder."""
    template, transposed = WEIGHT_MAP[_dotted(path)]
    layers = range(shape[0]) if path[0] == "layers" else [None]
    shape = shape[1:] if path[0] == "layers" else shape
    expected = [template.format(layer=layer) for layer in layers]
    return [(names.get(name, name), shape[::-1] if transposed else shape) for name in expected]


def _check(folder, config: DecoderConfig, stored: dict[str, StoredTensor], expected: list[tuple[str, tuple]]) -> None:
    """Compares what the files hold with what the config asks for, before any data is read."""
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


def _checked(dtype) -> np.dtype:
    """The dtype, unless it is no weight's dtype or jax would narrow it."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in SOURCE_DTYPES:
        raise ValueError(f"dtype {dtype.name!r} is not one of {', '.join(SOURCE_DTYPES)}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"dtype {dtype.name} needs jax_enable_x64: set it, or load with dtype=jnp.float32")
    return dtype


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(path)

"""Decoders from and to Hugging Face folders: `config.json` and safetensors, one file or many shards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mlora_jax.models.config import SOURCE_DTYPES, DecoderConfig
from mlora_jax.models.decoder import Decoder
from mlora_jax.models.json_file import read_json_object

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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

# The dtype codes of safetensors that a weight may have.
STORED_DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
                 "BF16": jnp.dtype(jnp.bfloat16)}  # fmt: skip

_COMPLAINTS = 12  # Named in one message; a checkpoint of another model differs in hundreds.


@dataclasses.dataclass(frozen=True)
class _Stored:
    """One tensor of a checkpoint: which open file holds it, and what that file's header says of it."""

    file: Any
    shape: tuple[int, ...]
    code: str


def load_decoder(path: str | os.PathLike, *, dtype=None) -> Decoder:
    """Loads a Llama-family decoder from a Hugging Face folder.

    One stacked array is filled at a time, tensor by tensor, so the host holds the model once.

    Args:
        path: a folder with `config.json` and `model.safetensors` or its shards and index.
        dtype: of weights and compute (float32, bfloat16, float16 or float64); None: every weight as it is
            stored, compute in the dtype of the embedding.

    Returns:
        The decoder on the default device.

    Raises:
        FileNotFoundError: no such folder, or no config or safetensors in it.
        ValueError: an unsupported architecture; a missing, misshapen, non-float or unknown tensor; a damaged
            file; a dtype that jax would silently narrow.

    Example:
        >>> model = load_decoder("/data/Llama-3.2-1B", dtype=jnp.bfloat16)  # doctest: +SKIP
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r} is not a folder: download the model first, for example with "
            f"`hf download OWNER/NAME --local-dir FOLDER`, and give FOLDER"
        )
    config = read_config(folder)
    with contextlib.ExitStack() as open_files:
        stored = _headers(folder, open_files)
        names = _source_names(config, stored)
        return _assemble(folder, config, stored, names, None if dtype is None else _checked(dtype))


def read_config(folder: str | os.PathLike) -> DecoderConfig:
    """Reads the `config.json` of a Hugging Face folder.

    Args:
        folder: the folder.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: it is not a JSON object, or describes an unsupported model.
    """
    file = pathlib.Path(folder) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}: it is not a Hugging Face model folder")
    values = read_json_object(file)
    try:
        return DecoderConfig.from_hugging_face(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


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
    with write_aside(folder / WEIGHTS_FILE) as file:
        save_file(tensors, file, metadata={"format": "pt"})
    with write_aside(folder / CONFIG_FILE) as file:
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def write_aside(target: pathlib.Path):
    """A neighbour of `target` to write to, renamed to it on success and removed on failure."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield aside
        aside.chmod(0o644)  # safetensors writes files that only their owner may read
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _headers(folder: pathlib.Path, open_files: contextlib.ExitStack) -> dict[str, _Stored]:
    """Opens every weight file and reads what it holds, no data yet."""
    stored = {}
    for file in _weight_files(folder):
        try:
            tensors = open_files.enter_context(safe_open(file, framework="np"))
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file ({error}): download it again") from None
        for name in tensors.keys():
            header = tensors.get_slice(name)
            stored[name] = _Stored(tensors, tuple(header.get_shape()), header.get_dtype())
    return stored


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The one file if there is one, else the shards that the index names."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        found = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        other = f" but {found}, which are pickles and are never opened" if found else ""
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS_FILE} and no {INDEX_FILE}{other}: get the safetensors files, or convert with "
            f"transformers' `model.save_pretrained(folder)`"
        )
    shards = read_json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map: download it again")
    wrong = next(((name, file) for name, file in shards.items() if not isinstance(file, str)), None)
    if wrong:
        raise ValueError(f"{index}: the shard of {wrong[0]} must be a file's name, not {wrong[1]!r}: download it again")
    for name in sorted(set(shards.values())):
        if pathlib.PurePath(name).name != name:
            raise ValueError(f"{index}: shard {name!r} lies outside the folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks the shard {name!r} that {INDEX_FILE} names: download it")
    return [folder / name for name in sorted(set(shards.values()))]


def _source_names(config: DecoderConfig, stored: dict[str, _Stored]) -> dict[str, str]:
    """Expected tensor -> stored tensor, where they differ: a tied pair may be stored under either name."""
    if not config.tie_word_embeddings or HEAD not in stored:
        return {}
    if EMBEDDING not in stored:
        return {EMBEDDING: HEAD}
    pair = [stored[name].file.get_tensor(name) for name in (EMBEDDING, HEAD)]
    if not np.array_equal(*pair):
        raise ValueError(
            f"config.json says tie_word_embeddings, but {EMBEDDING} and {HEAD} are both stored and differ: set "
            f"tie_word_embeddings to false"
        )
    return {}


def _assemble(folder, config: DecoderConfig, stored: dict[str, _Stored], names: dict[str, str], dtype) -> Decoder:
    """Fills the decoder's arrays one after the other."""

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
        array = np.empty(leaf.shape, dtype_of(path))
        places = array if path[0] == "layers" else [array]
        transposed = WEIGHT_MAP[_dotted(path)][1]
        for place, (name, _) in zip(places, sources[path], strict=True):
            tensor = stored[name].file.get_tensor(name)
            place[...] = tensor.T if transposed else tensor
        filled.append((path, leaf.replace(jnp.asarray(array))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _tensors(path: tuple[str, ...], shape: tuple[int, ...], names: dict[str, str]):
    """The stored names and shapes that make up one array of the decoder."""
    template, transposed = WEIGHT_MAP[_dotted(path)]
    layers = range(shape[0]) if path[0] == "layers" else [None]
    shape = shape[1:] if path[0] == "layers" else shape
    expected = [template.format(layer=layer) for layer in layers]
    return [(names.get(name, name), shape[::-1] if transposed else shape) for name in expected]


def _check(folder, config: DecoderConfig, stored: dict[str, _Stored], expected: list[tuple[str, tuple]]) -> None:
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

"""What an experiment is made of, from its config: the mesh, the frozen base with its tokenizer, the data."""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mlora_jax.config_type import ConfigDict
from mlora_jax.data import TaskData, load_task
from mlora_jax.data.load import hold_out
from mlora_jax.models import Decoder, Tokenizer, checkpoint_folder, load_decoder, quantize_decoder
from mlora_jax.models.config import CONFIG_FILE
from mlora_jax.models.decoder import choose_remat
from mlora_jax.models.weight_files import weight_files
from mlora_jax.parallel import hosts
from mlora_jax.parallel.mesh import AXES, make_mesh, shards_of
from mlora_jax.parallel.rules import Placement, spec_of

SAMPLES, SAMPLE_BYTES = 256, 4096  # of a weight file, for its digest


def run_mesh(config: ConfigDict) -> Mesh | None:
    """The mesh of `config.parallel`; None for a single device, or if jax is told to take a certain one by default.

    Where `data` is -1 it is the most that the devices and the rows of a micro-batch leave; devices that it cannot use
    stay idle, except that no process may.

    Raises:
      ValueError: axes that do not fit the devices, or rows that they do not divide.
    """
    if jax.config.jax_default_device is not None:  # pyright: ignore[reportAttributeAccessIssue]  # jax does not type it
        return None
    options, devices = config.parallel, jax.devices()
    sizes = {axis: options[axis] for axis in AXES}
    rows = config.train.batch_size // config.train.accumulation
    if sizes["data"] == -1 and hosts.count() == 1 and min(sizes["trial"], sizes["fsdp"], sizes["tensor"]) > 0:
        others = sizes["trial"] * sizes["fsdp"] * sizes["tensor"]
        fitting = [n for n in range(1, len(devices) // others + 1) if rows % (n * sizes["fsdp"]) == 0]
        if fitting:
            devices = devices[: fitting[-1] * others]
    mesh = make_mesh(sizes, devices)
    if mesh.size == 1:
        return None
    if options.engine == "pmap" and hosts.count() > 1:
        raise ValueError("config.parallel.engine='pmap' is for the devices of one process: use 'jit'")
    if rows % (parts := shards_of(mesh)):
        raise ValueError(
            f"the {rows} rows of a micro-batch (config.train.batch_size {config.train.batch_size} / "
            f"config.train.accumulation {config.train.accumulation}) do not divide into {parts} parts "
            f"(config.parallel.data {mesh.shape['data']} x config.parallel.fsdp {mesh.shape['fsdp']}): lower the "
            "accumulation, or give devices to config.parallel.trial or config.parallel.tensor"
        )
    return mesh


def load_model(config: ConfigDict, mesh: Mesh | None = None) -> tuple[Decoder, Tokenizer]:
    """The frozen base, laid out on the mesh as it is read, and its tokenizer, from `config.model`."""
    dtype = config.model.dtype
    if dtype == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]  # jax does not type it
        raise ValueError("config.model.dtype='float64' needs the environment variable JAX_ENABLE_X64=1")
    folder = model_folder(config.model.path)
    sharding = None
    if mesh is not None:
        sharding = lambda path, shape: NamedSharding(mesh, spec_of(path, shape, mesh))  # noqa: E731
    model = load_decoder(folder, dtype=jnp.dtype(dtype) if dtype else None, sharding=sharding)
    if mesh is not None and config.parallel.engine == "jit":
        model.placement = Placement(mesh)
    if config.model.quantization:
        model = quantize_decoder(model, config.model.quantization)
    model.remat = choose_remat(config.train.remat, model.config.num_layers)
    return model, Tokenizer.load(folder)


def model_folder(path: str) -> pathlib.Path:
    """The folder of a model, of one on the hub after its download; for "quickstart" the base that the package ships.

    Raises:
      FileNotFoundError, ValueError: as `mlora_jax.models.checkpoint_folder`; no path.
    """
    if path == "quickstart":
        return pathlib.Path(str(importlib.resources.files("mlora_jax") / "assets" / "quickstart"))
    if not path:
        raise ValueError(
            "config.model.path is not set: give a Hugging Face folder or a hub id by --config.model.path=FOLDER"
        )
    return checkpoint_folder(path)


def model_digest(path: str) -> str:
    """A digest of a base model: of its config, and of the size and samples of the bytes of every weight file."""
    folder = model_folder(path)
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    for name in weight_files(folder):
        size = name.stat().st_size
        digest.update(str(size).encode())
        with name.open("rb") as file:
            for part in range(SAMPLES):
                file.seek(size * part // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check_context(config: ConfigDict, model: Decoder, *, generates: bool) -> None:
    """Raises ValueError if a config asks for more tokens than the model's context holds.

    Args:
      config: resolved.
      model: its `max_position_embeddings` is the context.
      generates: whether answers are generated, so that the context must hold `evaluation.max_new_tokens` and a prompt.
    """
    context = model.config.max_position_embeddings
    if config.data.max_length > context:
        raise ValueError(
            f"config.data.max_length={config.data.max_length} is above the model's context of {context} tokens "
            f"(max_position_embeddings in its config.json): set config.data.max_length={context} or less"
        )
    if generates and config.evaluation.max_new_tokens >= context:
        raise ValueError(
            f"config.evaluation.max_new_tokens={config.evaluation.max_new_tokens} leaves no room for a prompt in the "
            f"model's context of {context} tokens (max_position_embeddings in its config.json): lower it"
        )


def load_data(config: ConfigDict, tokenizer: Tokenizer) -> TaskData:
    """The task's rows, from `config.data`."""
    options = config.data
    return load_task(
        options.task,
        raw_dir=options.raw_dir,
        cache_dir=options.cache_dir,
        style=options.style,
        file=options.file,
        evaluation_file=options.evaluation_file,
        holdout=options.holdout,
        ignored_keys=options.ignored_keys,
        tokenizer=tokenizer,
    )


def hold_out_validation(data: TaskData, fraction: float, limit: int) -> tuple[Sequence[dict], list[dict]]:
    """Rows to train on, and rows to validate on.

    Those are the first `limit` of the data set's own validation split if it has one; otherwise the rows of its training
    split with the smallest sha256 of "0:ROW", `fraction` of them and at most `limit`.
    """
    if not fraction:
        return data.train, []
    if len(data.validation):
        return data.train, list(itertools.islice(data.validation, limit))
    held = hold_out(len(data.train), fraction, limit=limit, name="validation.holdout")
    return [row for at, row in enumerate(data.train) if at not in held], [data.train[at] for at in sorted(held)]

"""Loads a checkpoint with an adapter at one rank, from the arguments that the harness gets as `--model_args`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from mlora_jax.adapters import adapt, split
from mlora_jax.core import RankHierarchy
from mlora_jax.core.ranges import LARGEST_INTEGER, SEEDS, Range
from mlora_jax.kv_cache import read_projected
from mlora_jax.models import Decoder, Tokenizer, checkpoint_folder, load_decoder, quantize_decoder
from mlora_jax.models.generation_config import GenerationSettings, read_generation_settings
from mlora_jax.training.adapter_file import load_adapted as read_adapted
from mlora_jax.training.adapter_file import read_description, trained_profile
from mlora_jax.training.readout_files import find_readout

BATCH_SIZE, PAD_MULTIPLE = 32, 16


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An adapted decoder in evaluation mode and the profile of one rank.

    Attributes:
      graphdef, base, adapter, profile: the decoder as `mlora_jax.split` returns it.
      p: the profile [R].
      hierarchy: the adapter's ranks S, scaling and weights; None without an adapter.
      tokenizer: the checkpoint's tokenizer.
      eos: the token ids that end an answer.
      settings: the checkpoint's generation settings.
      max_length, batch_size, pad_multiple: the shapes of evaluation, see `Generator` and `Scorer`.
      name: the name of the model: checkpoint, adapter, rank and read-out.
      seed: the seed of sampled generation.
    """

    graphdef: Any
    base: Any
    adapter: Any
    profile: Any
    p: jax.Array
    hierarchy: RankHierarchy | None
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    settings: GenerationSettings
    max_length: int
    batch_size: int
    pad_multiple: int
    name: str
    seed: int


def load_adapted(**options: Any) -> Loaded:
    """Loads a model from files.

    Args:
      checkpoint: the Hugging Face folder or hub id of the base model.
      adapter: the folder that `save_adapter` wrote; empty loads the base model alone.
      rank: the rank of the read-out, in 0..R; 0 is the base model, and None stands for the largest rank of S.
      readout: a key of `mlora_jax.core.READOUTS`. A read-out that needs training data is loaded as the adapter's run
        made it.
      dtype: the dtype of weights and compute; empty keeps the stored dtype.
      quantization: the quantization of the base model's kernels, as in `config.model.quantization`; empty is none.
      kv: the folder of projections of keys and values that `experiments.kv_cache` wrote; empty keeps the full cache.
        An adapter goes on top of it.
      kv_budget: the fraction of the full cache's bytes that the cache may take, above 0 and at most 1. It must be given
        with `kv`.
      kv_rates: a key of `mlora_jax.kv_cache.RATES`: "searched" ranks per layer and head, or a "uniform" rank.
      max_length: the context, in tokens; None stands for the model's own context.
      batch_size, pad_multiple, seed: see `Loaded`.

    Returns:
      The loaded model.

    Raises:
      ValueError: an option (the message names the nearest one), the rank or the read-out is unknown, a rank is given
        without an adapter, a budget of the cache is given without projections or the other way round, the projections
        are those of another base, or a number is outside its range.
      FileNotFoundError: a file of the checkpoint or the adapter is missing.
    """
    known = inspect.signature(_load).parameters
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown model argument {name!r}: {hint}known: {', '.join(known)}")
    if not options.get("checkpoint"):
        raise ValueError("the model argument checkpoint=FOLDER is missing")
    return _load(**options)


def _load(
    checkpoint: str,
    adapter: str = "",
    rank: int | None = None,
    readout: str = "prefix",
    dtype: str = "",
    quantization: str = "",
    kv: str = "",
    kv_budget: float | None = None,
    kv_rates: str = "searched",
    max_length: int | None = None,
    batch_size: int = BATCH_SIZE,
    pad_multiple: int = PAD_MULTIPLE,
    seed: int = 0,
) -> Loaded:
    for name, value in {"batch_size": batch_size, "pad_multiple": pad_multiple}.items():
        Range(low=1, high=LARGEST_INTEGER).check(name, int(value))
    SEEDS.check("seed", seed)
    folder = checkpoint_folder(checkpoint)
    model, tokenizer = load_decoder(folder, dtype=jnp.dtype(dtype) if dtype else None), Tokenizer.load(folder)
    model = with_cache_budget(model, kv, kv_budget, kv_rates)
    if quantization:
        model = quantize_decoder(model, quantization)
    context = model.config.max_position_embeddings
    if max_length is not None and not 1 < max_length <= context:
        raise ValueError(f"max_length={max_length} must be in 2..{context}, the model's context")
    name = str(checkpoint)
    if kv:
        name += f" with {kv_budget} of the cache by {kv} ({kv_rates})"
    if adapter:
        trees, p, hierarchy = _read_out(model, pathlib.Path(adapter).expanduser(), rank, readout)
        name += f" + {adapter} at rank {hierarchy.ranks[-1] if rank is None else rank} ({readout})"
    elif rank:
        raise ValueError(f"rank={rank} of no adapter: give adapter=FOLDER, or rank=0 for the base model")
    else:
        trees, p, hierarchy = _unadapted(model), jnp.zeros(1), None
    return Loaded(
        *trees,
        p=p,
        hierarchy=hierarchy,
        tokenizer=tokenizer,
        eos=tuple(sorted(tokenizer.eos_ids)),
        settings=read_generation_settings(folder),
        max_length=max_length or context,
        batch_size=int(batch_size),
        pad_multiple=int(pad_multiple),
        name=name,
        seed=seed,
    )


def with_cache_budget(model: Decoder, kv: str, kv_budget: float | None, kv_rates: str) -> Decoder:
    """Returns a base model whose cache has a budget, or the model itself if no projections are given.

    Args:
      model: the base model, before it is quantised or adapted.
      kv, kv_budget, kv_rates: as in `load_adapted`.

    Raises:
      FileNotFoundError, ValueError: as `load_adapted`.
    """
    if not kv and kv_budget is None:
        return model
    if kv_budget is None:
        raise ValueError(f"kv={kv} needs kv_budget, the fraction of the cache's bytes, above 0 and at most 1")
    if not kv:
        raise ValueError(f"kv_budget={kv_budget} needs kv=FOLDER, the projections of keys and values")
    return read_projected(model, kv, kv_budget, kv_rates)


def _read_out(
    model: Decoder, folder: pathlib.Path, rank: int | None, readout: str
) -> tuple[tuple[Any, Any, Any, Any], Any, RankHierarchy]:
    """Reads an adapter's folder out at a rank: ((graphdef, base, adapter, profile), `Reading.profile`, hierarchy)."""
    description, found = read_description(folder), find_readout(folder, readout)
    graphdef, base, adapter, profile, hierarchy, _ = read_adapted(found.folder, model)
    reading = found.read(adapter, hierarchy, trained_profile(description, hierarchy))
    p = reading.profile(reading.hierarchy.ranks[-1] if rank is None else rank)
    return (graphdef, base, reading.adapter, profile), p, reading.hierarchy


def _unadapted(model: Decoder) -> tuple[Any, Any, Any, Any]:
    """(graphdef, base, adapter, profile) of the base model, with an adapter that does nothing."""
    adapted = adapt(model, 1, ("q_proj",), key=jax.random.key(0))
    adapted.eval()
    return split(adapted)

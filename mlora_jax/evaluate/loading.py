"""A checkpoint with an adapter from its folder, at a rank: what the harness's `--model_args` name."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError, safe_open

from mlora_jax.adapt import adapt, set_profile, split
from mlora_jax.core import RankHierarchy, get_policy, readout_profile, squeeze
from mlora_jax.models import Decoder, Tokenizer, load_decoder
from mlora_jax.train.adapter_file import DESCRIPTION, TENSORS, load_adapter

BATCH_SIZE, PAD_MULTIPLE = 32, 32


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An adapted decoder in evaluation mode and the profile of one rank.

    Attributes:
      graphdef, base, adapter, profile: of `mlora_jax.split`.
      p: profile [R].
      hierarchy: S, scaling and weights; None without an adapter.
      tokenizer: of the checkpoint.
      eos: token ids that end an answer.
      max_length, batch_size, pad_multiple: shapes of evaluation.
      name: checkpoint, adapter, rank and read-out.
      seed: of sampled generation.
    """

    graphdef: Any
    base: Any
    adapter: Any
    profile: Any
    p: jax.Array
    hierarchy: RankHierarchy | None
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    max_length: int
    batch_size: int
    pad_multiple: int
    name: str
    seed: int


def load_adapted(**options: Any) -> Loaded:
    """A model from files.

    Args:
      checkpoint: Hugging Face folder of the base.
      adapter: folder that `save_adapter` wrote; empty: the base alone.
      rank: of the read-out, 0..R; 0 is the base, None the largest of S.
      readout: "prefix", "nested", "masked" or "squeeze".
      dtype: of weights and compute; empty: as stored.
      max_length: the context in tokens; None: the model's.
      batch_size, pad_multiple, seed: see `Loaded`.

    Raises:
      ValueError: an unknown option (the message names the nearest), rank or read-out; a rank of no adapter.
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
    max_length: int | None = None,
    batch_size: int = BATCH_SIZE,
    pad_multiple: int = PAD_MULTIPLE,
    seed: int = 0,
) -> Loaded:
    folder = pathlib.Path(checkpoint).expanduser()
    model, tokenizer = load_decoder(folder, dtype=jnp.dtype(dtype) if dtype else None), Tokenizer.load(folder)
    context = model.config.max_position_embeddings
    if max_length is not None and not 1 < max_length <= context:
        raise ValueError(f"max_length={max_length} must be in 2..{context}, the model's context")
    name = str(checkpoint)
    if adapter:
        trees, p, hierarchy = _read_out(model, pathlib.Path(adapter).expanduser(), rank, readout)
        name += f" + {adapter} at rank {hierarchy.ranks[-1] if rank is None else rank} ({readout})"
    elif rank:
        raise ValueError(f"rank={rank} of no adapter: give adapter=FOLDER, or rank=0 for the base model")
    else:
        trees, p, hierarchy = _adapted(model, 1, ("q_proj",)), jnp.zeros(1), None
    return Loaded(
        *trees,
        p=p,
        hierarchy=hierarchy,
        tokenizer=tokenizer,
        eos=tuple(sorted({*tokenizer.eos_ids, *model.config.eos_token_ids})),
        max_length=max_length or context,
        batch_size=int(batch_size),
        pad_multiple=int(pad_multiple),
        name=name,
        seed=seed,
    )


def _read_out(model: Decoder, folder: pathlib.Path, rank: int | None, readout: str):
    """((graphdef, base, adapter, profile), p [R], hierarchy) of an adapter's folder."""
    graphdef, base, template, profile = _adapted(model, *_described(folder))
    adapter, hierarchy, description = load_adapter(folder, template)
    if readout == "squeeze":
        method = (description.get("trial") or {}).get("method")
        function = get_policy(method).function(hierarchy) if method else hierarchy.lora()
        adapter = jax.jit(lambda adapter, profile: squeeze(adapter, profile)[0])(
            adapter, set_profile(profile, function)
        )
        hierarchy = RankHierarchy(hierarchy.ranks, max_rank=hierarchy.max_rank)  # the scale is in the factors now
    rank = hierarchy.ranks[-1] if rank is None else rank
    p = readout_profile(hierarchy, "prefix" if readout == "squeeze" else readout, rank)
    return (graphdef, base, adapter, profile), p, hierarchy


def _described(folder: pathlib.Path) -> tuple[int, tuple[str, ...]]:
    """R and the adapted layers of an adapter's folder, as patterns for `adapt`."""
    for file in (TENSORS, DESCRIPTION):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no adapter: {file} is missing")
    try:
        rank = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["rank"]
        with safe_open(folder / TENSORS, framework="numpy") as file:
            layers = {name.rpartition(".")[0] for name in file.keys()}
    except (ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"the adapter in {folder} is damaged: {error}") from error
    return rank, tuple(re.escape(layer) for layer in sorted(layers))


def _adapted(model: Decoder, rank: int, targets: tuple[str, ...]) -> tuple:
    adapted = adapt(model, rank, targets, key=jax.random.key(0))
    adapted.eval()
    return split(adapted)

"""Makes the projections of one base from a config: load, principal components, training, search, measures, files."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from mlora_jax.core.ranges import LARGEST_FLOAT, LARGEST_INTEGER, SEEDS, Range
from mlora_jax.kv_cache.attention import Projections, cache_shape
from mlora_jax.kv_cache.folder import load_projections, save_projections
from mlora_jax.kv_cache.orthogonal import orthogonality_error
from mlora_jax.kv_cache.pca import principal_components
from mlora_jax.kv_cache.ranks import RankPath, check_budget, check_levels, uniform_ranks
from mlora_jax.kv_cache.search import Meter, search_ranks
from mlora_jax.kv_cache.text import TextRows, encode, packed_rows, read_documents, single_rows
from mlora_jax.kv_cache.training import StepMeans, train_projections
from mlora_jax.models import Decoder, Tokenizer, checkpoint_folder, load_decoder
from mlora_jax.models.decoder import REMAT
from mlora_jax.training.progress import RunProgress

_COUNT = Range(low=1, high=LARGEST_INTEGER)
_WHOLE = Range(low=0, high=LARGEST_INTEGER)
RANGES = {
    "seed": SEEDS,
    "levels": _COUNT,
    "data.length": Range(low=2, high=LARGEST_INTEGER),
    "data.held_out_documents": _COUNT,
    "pca.texts": _COUNT,
    "train.steps": _WHOLE,
    "train.batch_size": _COUNT,
    "train.accumulation": _COUNT,
    "train.learning_rate": Range(low=0.0, high=LARGEST_FLOAT, open_low=True),
    "train.warmup_steps": _WHOLE,
    "train.beta1": Range(low=0.0, high=0.999999),
    "train.beta2": Range(low=0.0, high=0.999999),
    "train.weight_decay": Range(low=0.0, high=LARGEST_FLOAT),
    "train.clip": Range(low=0.0, high=LARGEST_FLOAT, open_low=True),
    "train.kl_weight": Range(low=0.0, high=1.0),
    "search.budget": Range(low=0.0, high=1.0, open_low=True),
    "search.share": Range(low=0.0, high=1.0, open_low=True),
    "search.rows": _COUNT,
    "search.batch_size": _COUNT,
}


def make_projections(config: Mapping[str, Any], folder: str | os.PathLike, *, command: str = "") -> dict[str, Any]:
    """Makes the projections that a config describes, and writes their folder.

    The trained projections are written before the search. If the folder holds those of the same base, text and settings
    of training, they are not trained again; so a search can be repeated with other settings.

    Args:
      config: the values of `configs/kv_cache_smollm2.py`, which says what each key means.
      folder: the folder to write; it is made if it does not exist.
      command: the command that asked for this, which goes into the record.

    Returns:
      The record, which is also in `kv_cache.json`: the command, the config, the base, the largest deviation from
      orthogonality, and the measures on held-out text at every budget of the config.

    Raises:
      FileNotFoundError: a file of the base or of the text is missing.
      ValueError: a value is outside its range, the base's heads do not fit the levels, or there is too little text.
    """
    _check(config)
    model, tokenizer = _load(config["model"])
    check_levels(config["levels"], cache_shape(model)[2])
    train, held_out = _documents(config["data"])
    length = config["data"]["length"]
    if length > model.config.max_position_embeddings:
        raise ValueError(f"data.length={length} is above the {model.config.max_position_embeddings} of the base")
    pieces = encode(train, tokenizer, length)
    packed = packed_rows(pieces, length)
    rows = TextRows(*(x[: config["search"]["rows"]] for x in packed_rows(encode(held_out, tokenizer, length), length)))
    record = {
        "command": command,
        "base_model": pathlib.Path(config["model"]["path"]).name or config["model"]["path"],
        "shape": dict(zip(("layers", "heads", "head_dim"), cache_shape(model), strict=True)),
        "config": json.loads(json.dumps(_plain(config))),
        "training": _fingerprint(config, packed),
    }
    with RunProgress() as progress:
        batches = single_rows(pieces[: config["pca"]["texts"]], length, config["train"]["batch_size"])
        start = principal_components(model, batches)
        progress.say(f"principal components of {min(len(pieces), config['pca']['texts'])} texts")
        trained = _trained_before(folder, model, record["training"])
        if trained is None:
            trained = _train(model, start, packed, config, progress)
        else:
            progress.say(f"takes the trained projections in {folder}")
        record["orthogonality_error"] = max(orthogonality_error(trained.u_k), orthogonality_error(trained.u_v))
        save_projections(folder, model, trained, None, record)  # a search that is stopped loses no training
        meter = Meter(model, trained, rows, batch_size=config["search"]["batch_size"])
        path = _search(meter, cache_shape(model), config, progress.say)
        before = Meter(model, start, rows, batch_size=config["search"]["batch_size"])
        record["measures"] = _measures(before, meter, path, cache_shape(model), config)
        for line in _lines(record["measures"]):
            progress.say(line)
    save_projections(folder, model, trained, path, record)
    return record


# The keys of a config that decide what is trained; the others belong to the search and the measures.
_TRAINED_BY = ("seed", "levels", "model", "pca", "train")


def _fingerprint(config: Mapping[str, Any], rows: TextRows) -> str:
    """Returns a digest of all that the trained projections depend on besides the base's weights."""
    digest = hashlib.sha256(json.dumps({key: _plain(config[key]) for key in _TRAINED_BY}, sort_keys=True).encode())
    for array in rows:
        digest.update(array.tobytes())
    return digest.hexdigest()


def _trained_before(folder: str | os.PathLike, model: Decoder, training: str) -> Projections | None:
    """Returns the projections of a folder if this training made them for this base; None otherwise."""
    try:
        saved = load_projections(folder, model)
    except (OSError, ValueError):
        return None
    return saved.projections if saved.description.get("training") == training else None


def _check(config: Mapping[str, Any]) -> None:
    for key, within in RANGES.items():
        group, _, name = key.rpartition(".")
        within.check(f"config.{key}", (config[group] if group else config)[name])
    remat = config["train"]["remat"]
    if remat not in REMAT:
        raise ValueError(f"config.train.remat must be one of {', '.join(REMAT)}, got {remat!r}")
    for budget in config["budgets"]:
        check_budget(budget, "config.budgets")
    for key in ("model.path", "data.train"):
        group, _, name = key.partition(".")
        if not config[group][name]:
            raise ValueError(f"give --config.{key}: it is empty")


def _load(options: Mapping[str, Any]) -> tuple[Decoder, Tokenizer]:
    folder = checkpoint_folder(options["path"])
    dtype = jnp.dtype(options["dtype"]) if options["dtype"] else None
    return load_decoder(folder, dtype=dtype), Tokenizer.load(folder)


def _documents(data: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns the training documents and the held-out ones."""
    train = read_documents(data["train"])
    if data["held_out"]:
        return train, read_documents(data["held_out"])
    count = data["held_out_documents"]
    if count >= len(train):
        raise ValueError(f"data.held_out_documents={count} leaves none of the {len(train)} documents of data.train")
    return train[:-count], train[-count:]


def _train(
    model: Decoder, start: Projections, rows: TextRows, config: Mapping[str, Any], progress: RunProgress
) -> Projections:
    train = config["train"]
    steps, began = train["steps"], time.monotonic()
    progress.expect({"projections": steps})

    def report(number: int, means: StepMeans) -> None:
        speed = number * train["batch_size"] * rows.tokens.shape[1] / (time.monotonic() - began)
        left = steps - number
        progress.advance("projections", left, step=number, loss=float(means.loss), tokens_per_second=speed)

    return train_projections(model, start, rows, train, levels=config["levels"], seed=config["seed"], report=report)


def _search(
    meter: Meter, shape: tuple[int, int, int], config: Mapping[str, Any], say: Callable[[str], None]
) -> RankPath | None:
    """Returns the searched ranks; None if the config asks for none, by a budget of 1."""
    search = config["search"]
    if search["budget"] == 1.0:
        return None
    return search_ranks(
        lambda ranks: meter(ranks).divergence,
        shape,
        levels=config["levels"],
        budget=search["budget"],
        share=search["share"],
        report=lambda budget, error: say(f"searched ranks to {budget:.3f} of the cache, divergence {error:.4f}"),
    )


def _measures(
    before: Meter, after: Meter, path: RankPath | None, shape: tuple[int, int, int], config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns a record for each budget and way: PCA, trained at one rank, trained at the searched ranks."""
    found = []
    for budget in config["budgets"]:
        uniform = uniform_ranks(budget, *shape)
        ways = {"pca": (before, uniform), "trained": (after, uniform)}
        if path is not None and budget >= config["search"]["budget"]:
            ways["searched"] = after, path.at(budget)
        for way, (meter, ranks) in ways.items():
            loss = meter(ranks)
            found.append(
                {
                    "budget": budget,
                    "way": way,
                    "entries_per_token": ranks.entries,
                    "divergence": loss.divergence,
                    "perplexity": loss.perplexity,
                }
            )
    return found


def _lines(measures: list[dict[str, Any]]) -> list[str]:
    return [
        f"{each['budget']:.0%} of the cache, {each['way']}: divergence {each['divergence']:.4f}, "
        f"perplexity {each['perplexity']:.3f}"
        for each in measures
    ]


def _plain(config: Any) -> Any:
    """Returns nested mappings as dicts, which JSON can hold."""
    return {key: _plain(value) for key, value in config.items()} if hasattr(config, "items") else config

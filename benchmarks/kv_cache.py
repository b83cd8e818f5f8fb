"""Measures the KV cache in nested ranks: perplexity and accuracy against the bytes of a token, and decoding.

It makes projections of a base (principal components, and trained ones with searched ranks), or takes them from `--work`
if they are there, and measures at each budget: the perplexity on text that neither training nor search has seen, the
accuracy on tasks of lm-evaluation-harness, and the bytes and the decoded tokens per second of a cache of `--context`
tokens. One JSON line goes to standard output and to `results/kv_cache.jsonl`; `--page` then writes docs/kv_cache.md and
its figure.

    python -m benchmarks.kv_cache --checkpoint MODEL_FOLDER --text TEXT.json --raw_dir DATA --tasks arc_easy
        --work FOLDER [--steps N] [--limit N] [--context N] [--set search.share=0.1]

TEXT.json is a list of texts. Its last `--test` texts are measured, the `--held_out` texts before them serve the search,
and all others train. `--small` runs a tiny random model.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import records, shapes
from benchmarks.kv_cache_page import write_page
from configs.kv_cache_smollm2 import get_config
from mlora_jax.adapters import adapt, split
from mlora_jax.compilation_cache import use_compilation_cache
from mlora_jax.core import aurac
from mlora_jax.evaluate.harness import NestedLM, evaluate_all, item_verdicts
from mlora_jax.evaluate.loading import load_adapted
from mlora_jax.evaluate.task_files import load_tasks
from mlora_jax.kv_cache import (
    Meter,
    Projections,
    Ranks,
    SavedProjections,
    cache_bytes,
    load_projections,
    project,
)
from mlora_jax.kv_cache.run import make_projections
from mlora_jax.kv_cache.text import encode, packed_rows, read_documents
from mlora_jax.models import Decoder, Tokenizer, load_decoder

BUDGETS = (1.0, 0.75, 0.6, 0.4, 0.25)
# The ways to a smaller cache -> the folder of its projections, and how ranks follow from a budget.
WAYS = {"pca": ("pca", "uniform"), "trained": ("trained", "uniform"), "searched": ("trained", "searched")}
# What the folder of principal components differs in.
PCA = {"train.steps": 0, "search.budget": 1.0}


def main(arguments: list[str]) -> None:
    """Reads the command line and prints the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "text", "raw_dir", "work"):
        parser.add_argument(f"--{name}", type=pathlib.Path)
    parser.add_argument("--tasks", default="arc_easy", help="names of tasks with commas between them; may be empty")
    counts = {"steps": 300, "length": 512, "limit": 300, "shots": 0, "test": 100, "held_out": 50, "test_rows": 16,
              "context": 2048, "rows": 1, "decoded": 32, "repeats": 5}  # fmt: skip
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the config")
    parser.add_argument("--results", type=pathlib.Path, default=records.RESULTS)
    parser.add_argument("--small", action="store_true", help="a tiny model; nothing goes to the results")
    parser.add_argument("--page", action="store_true", help="write docs/kv_cache.md, and measure nothing")
    options = parser.parse_args(arguments)
    if options.page:
        write_page(options.results)
        return
    if not options.small and not (options.checkpoint and options.text and options.work):
        parser.error("--checkpoint, --text and --work are needed")
    if options.tasks and not options.small and not options.raw_dir:
        parser.error("--raw_dir is needed, or --tasks=")
    with tempfile.TemporaryDirectory(prefix="kv_cache_") as folder, use_compilation_cache():
        if options.small:
            make_small(options, pathlib.Path(folder))
        record = measure(options)
    print(json.dumps(record), flush=True)
    if not options.small:
        records.append(record, options.results)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the projections where they are missing, measures, and returns the record."""
    made, name = records.origin(), options.checkpoint.name
    say = lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True)  # noqa: E731
    folders, test = prepare(options, say)
    model, tokenizer = load_decoder(options.checkpoint, dtype=jnp.float32), Tokenizer.load(options.checkpoint)
    saved = {folder: load_projections(path, model) for folder, path in folders.items()}
    cells = ranks_of(saved)
    found: dict[tuple[str, float], dict[str, Any]] = {}
    itemsize = jnp.dtype(model.dtype).itemsize
    for (way, budget), ranks in cells.items():
        found[way, budget] = {"budget": budget, "bytes_per_token": ranks.entries * itemsize}
    rows = packed_rows(encode(test, tokenizer, options.length), options.length)
    rows = type(rows)(*(x[: options.test_rows] for x in rows))
    meters = {folder: Meter(model, each.projections, rows, batch_size=1) for folder, each in saved.items()}
    for (way, budget), ranks in cells.items():
        loss = meters[WAYS[way][0]](ranks)
        found[way, budget] |= {"perplexity": loss.perplexity, "divergence": loss.divergence}
        say(f"{way} {budget}: perplexity {loss.perplexity:.3f}")
    del meters
    for place, scores in accuracies(options, model, saved, cells, say).items():
        found[place]["accuracies"] = scores
    for place, speed in decoding(options, model, saved, cells, say).items():
        found[place] |= speed
    peers = {way: {"cells": [found[way, budget] for budget in BUDGETS if (way, budget) in found]} for way in WAYS}
    for values in peers.values():
        values["areas"] = areas(values["cells"])
    keys = ("tasks", "shots", "limit", "steps", "length", "test_rows", "context", "rows", "decoded", "repeats")
    description = saved["trained"].description
    settings = {
        "about": name,
        **{key: getattr(options, key) for key in keys},
        "dtype": "float32",
        "training_seconds": description.get("seconds"),
        "config": description["config"] | {"model": None, "data": None},
    }
    return records.new_record("kv_cache", name, settings, peers, made=made)


def ranks_of(saved: dict[str, SavedProjections]) -> dict[tuple[str, float], Ranks]:
    """Returns (way, budget) -> the ranks to measure."""
    return {
        (way, budget): saved[folder].ranks(budget, rates)
        for budget in BUDGETS
        for way, (folder, rates) in WAYS.items()
        if rates != "searched" or budget >= saved[folder].description["config"]["search"]["budget"]
    }


def prepare(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict[str, pathlib.Path], list[str]]:
    """Writes the texts and the projections into `--work` where they are missing; returns the folders, and the test."""
    documents = read_documents(options.text)
    held_out, test = documents[-options.test - options.held_out : -options.test], documents[-options.test :]
    parts = {"train": documents[: -options.test - options.held_out], "held_out": held_out}
    options.work.mkdir(parents=True, exist_ok=True)
    files = {name: options.work / f"{name}.json" for name in parts}
    for name, file in files.items():
        file.write_text(json.dumps(parts[name]), encoding="utf-8")
    folders = {name: options.work / name for name in ("pca", "trained")}
    for name, folder in folders.items():
        if _finished(folder):
            say(f"takes the projections in {name} that are there")
            continue
        config = get_config()
        given = {key: _value(text) for key, _, text in (each.partition("=") for each in options.set)}
        values = {
            "model.path": str(options.checkpoint),
            "data.train": str(files["train"]),
            "data.held_out": str(files["held_out"]),
            "data.length": options.length,
            "train.steps": options.steps,
            **given,
            **(PCA if name == "pca" else {}),
        }
        config.update_from_flattened_dict(values)
        began = time.monotonic()
        # The progress is printed to standard output, which is kept for the record.
        out, sys.stdout = sys.stdout, sys.stderr
        try:
            make_projections(config, folder, command="python -m benchmarks.kv_cache")
        finally:
            sys.stdout = out
        _note_seconds(folder, round(time.monotonic() - began, 1))
    return folders, test


def _finished(folder: pathlib.Path) -> bool:
    """Returns whether a folder has projections whose ranks were searched and measured."""
    file = folder / "kv_cache.json"
    return file.is_file() and "measures" in json.loads(file.read_text(encoding="utf-8"))


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _note_seconds(folder: pathlib.Path, seconds: float) -> None:
    file = folder / "kv_cache.json"
    description = json.loads(file.read_text(encoding="utf-8")) | {"seconds": seconds}
    file.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def accuracies(
    options: argparse.Namespace,
    model: Decoder,
    saved: dict[str, SavedProjections],
    cells: dict[tuple[str, float], Ranks],
    say: Callable[[str], None],
) -> dict[tuple[str, float], dict[str, Any]]:
    """Returns (way, budget) -> task -> accuracy, its standard error and the share of verdicts equal to the base's."""
    tasks = [name for name in options.tasks.split(",") if name]
    if not tasks:
        return {}
    loaded = load_adapted(checkpoint=str(options.checkpoint), dtype="float32", batch_size=4)
    found: dict[tuple[str, float], dict[str, Any]] = {}
    prepared = {name: load_tasks([name], raw_dir=str(options.raw_dir)) for name in tasks}
    options_of = dict(num_fewshot=options.shots, limit=options.limit or None, bootstrap_iters=0)
    first: dict[str, np.ndarray] = {}
    lm = None
    for place, ranks in cells.items():
        projections = saved[WAYS[place[0]][0]].projections
        trees = _split_as_loaded(model, projections, ranks)
        if lm is None:
            lm = NestedLM.of(_with(loaded, trees))
        lm.scorer = lm.scorer.with_base(trees[1])  # ranks and bases are data: nothing is compiled again
        found[place] = {}
        for name, task in prepared.items():
            results = evaluate_all(lm, {"cut": lm.variant}, task, **options_of)["cut"]
            verdicts, metric = item_verdicts(results)
            first.setdefault(name, verdicts)
            found[place][name] = {
                "accuracy": float(verdicts.mean()),
                "standard_error": float(verdicts.std() / np.sqrt(len(verdicts))),
                "same": float((verdicts == first[name]).mean()),
                "items": len(verdicts),
                "metric": metric,
            }
            say(f"{place[0]} {place[1]}: {name} {verdicts.mean():.4f}")
    return found


def _split_as_loaded(model: Decoder, projections: Projections, ranks: Ranks) -> tuple[Any, Any, Any, Any]:
    adapted = adapt(project(model, projections, ranks), 1, ("q_proj",), key=jax.random.key(0))
    adapted.eval()
    return split(adapted)


def _with(loaded: Any, trees: tuple[Any, Any, Any, Any]) -> Any:
    return dataclasses.replace(
        loaded, **dict(zip(("graphdef", "base", "adapter", "profile"), trees, strict=True)), p=jnp.zeros(1)
    )


def decoding(
    options: argparse.Namespace,
    model: Decoder,
    saved: dict[str, SavedProjections],
    cells: dict[tuple[str, float], Ranks],
    say: Callable[[str], None],
) -> dict[tuple[str, float], dict[str, Any]]:
    """Returns (way, budget) -> the bytes of a whole cache, and the decoded tokens per second at the end of it.

    The full cache, without projections, is timed beside them in turns; "times" is their ratio.
    """
    context = min(options.context, model.config.max_position_embeddings)
    steps: dict[Any, Callable[[], float]] = {"full": _decoder_of(model, options, context)}
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for place, ranks in cells.items():
        if place[0] == "pca":  # its cache has the shapes of a trained one with one rank
            continue
        small = project(model, saved[WAYS[place[0]][0]].projections, ranks, cut=True)
        found[place] = {"cache_bytes": cache_bytes(small.init_cache(options.rows, context))}
        steps[place] = _decoder_of(small, options, context)
    full_bytes = cache_bytes(model.init_cache(options.rows, context))
    seconds: dict[Any, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 1):
        for name, run in steps.items():
            took = run()
            if repeat:  # the first pass compiles
                seconds[name].append(took)
    full = statistics.median(seconds.pop("full"))
    work = options.rows * options.decoded
    for place, each in seconds.items():
        median = statistics.median(each)
        found[place] |= {"full_bytes": full_bytes, "tokens_per_second": work / median, "times": full / median}
        found[place]["full_tokens_per_second"] = work / full
        say(f"{place[0]} {place[1]}: {work / median:.1f} tokens/s, {full / median:.2f} times the full cache")
    return found


def _decoder_of(model: Decoder, options: argparse.Namespace, context: int) -> Callable[[], float]:
    """Returns a function that decodes the last tokens of a context and returns the seconds that this took."""
    graphdef, state = nnx.split(model)
    begin = context - options.decoded

    @jax.jit
    def run(state: Any, cache: Any) -> jax.Array:
        decoder = nnx.merge(graphdef, state)
        layers = decoder.single_layers()

        def step(number: jax.Array, carry: Any) -> Any:
            cache, token = carry
            positions = jnp.full((options.rows, 1), begin + number, jnp.int32)
            hidden, cache = decoder.hidden(token, positions=positions, cache=cache, layers=layers)
            return cache, jnp.argmax(decoder.head(hidden), axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, options.decoded, step, (cache, jnp.ones((options.rows, 1), jnp.int32)))[1]

    def timed() -> float:
        cache = jax.block_until_ready(jax.tree.map(lambda x: x + 0.1, model.init_cache(options.rows, context)))
        began = time.perf_counter()
        jax.block_until_ready(run(state, cache))
        return time.perf_counter() - began

    return timed


def areas(cells: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the areas under the curves of accuracy and of log perplexity over bytes per token (both axes linear).

    Each is divided by the length of the axis of bytes, so it is a mean over budgets.
    """
    rising = sorted(cells, key=lambda cell: cell["bytes_per_token"])
    if len({cell["bytes_per_token"] for cell in rising}) < len(rising):
        return {}
    sizes = [cell["bytes_per_token"] for cell in rising]
    found = {"log_perplexity": aurac([float(np.log(cell["perplexity"])) for cell in rising], sizes, axis="linear")}
    for task in rising[0].get("accuracies", {}):
        values = [cell["accuracies"][task]["accuracy"] for cell in rising]
        found[task] = aurac(values, sizes, axis="linear")
    return found


def make_small(options: argparse.Namespace, work: pathlib.Path) -> None:
    """Sets the options to a tiny random model, made-up text and four questions."""
    options.checkpoint = shapes.random_model(work / "tiny", shapes.TINY, tokenizer=shapes.shipped_tokenizer())
    options.text, options.work, options.raw_dir = work / "text.json", work / "work", work / "raw"
    options.text.write_text(json.dumps(shapes.made_up_texts(60)), encoding="utf-8")
    options.set += ["train.batch_size=2", "train.accumulation=1", "train.warmup_steps=1", "levels=4"]
    options.set += ["search.share=1.0", "pca.texts=4"]
    small = {"steps": 2, "length": 48, "limit": 2, "test": 8, "held_out": 8, "test_rows": 2, "context": 32,
             "decoded": 4, "repeats": 1, "rows": 2, "tasks": "arc_easy"}  # fmt: skip
    for name, value in small.items():
        setattr(options, name, value)
    rows = [
        {
            "instruction": "Please choose the correct answer to the question: Is ice cold?\n\n"
            "Answer1: yes Answer2: no\n\nAnswer format: answer1/answer2",
            "input": "",
            "output": "the correct answer is answer1",
            "answer": "answer1",
        }
    ] * 4
    folder = options.raw_dir / "arc_easy"
    folder.mkdir(parents=True)
    for name in ("train.json", "test.json"):
        (folder / name).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

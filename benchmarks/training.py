"""Times training steps of this package and of PEFT, eager and compiled, in turns: `python -m benchmarks.training`.

Both train the same examples in the same steps: LoRA of rank 32 on all linear projections, AdamW, float32. Each peer has
a process of its own that lives through the whole comparison, and only one computes at a time. Tokens per second count
the tokens of the examples, without padding. One JSON line per shape goes to standard output and to
`results/training.jsonl`; `--page` then writes docs/speed.md.

    python -m benchmarks.training --shapes stories-3m,random-15m,smollm2-135m,llama-1b-2-layers \
        --models MODELS --gsm8k GSM8K [--tokenizer FOLDER] [--steps N] [--repeats N] [--threads N]

MODELS holds the folders `stories-3m` and `smollm2-135m-instruct`, GSM8K the file `train.jsonl`. Random weights take the
tokenizer of SmolLM2, or of `--tokenizer`. `--small` runs a tiny random model on made-up sums. The program needs the
extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

from benchmarks import records, shapes, training_peers
from benchmarks.page import write_page
from benchmarks.workers import Worker, compare, serve

REMAT = {f"ours_{word}": word for word in ("none", "dots", "full")}  # how much of a layer is computed again
PEERS = ("ours", "peft", "peft_compiled", *REMAT)
RANK = 32


def main(arguments: list[str]) -> None:
    """Reads the command line, and prints one record per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="stories-3m", help=f"some of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--models", type=pathlib.Path, help="the folder of the models' folders")
    parser.add_argument("--gsm8k", type=pathlib.Path, help="the folder of train.jsonl and test.jsonl")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="a model's folder, for random weights")
    parser.add_argument("--peers", default=",".join(PEERS[:3]), help=f"some of {', '.join(PEERS)}")
    parser.add_argument("--steps", type=int, default=0, help="steps of a repeat; 0 takes those of the shape")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=pathlib.Path, default=records.RESULTS)
    parser.add_argument("--small", action="store_true", help="a tiny model; nothing goes to the results")
    parser.add_argument("--page", action="store_true", help="write docs/speed.md from the results, and measure nothing")
    parser.add_argument("--peer", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peer:
        serve(lambda spec: training_peers.make(options.peer, spec), threads=options.threads)
        return
    if options.page:
        write_page(options.results)
        return
    names = ["tiny"] if options.small else options.shapes.split(",")
    if unknown := [name for name in names if name not in (*shapes.SHAPES, "tiny")]:
        parser.error(f"unknown shape {unknown[0]!r}, expected some of {', '.join(shapes.SHAPES)}")
    if unknown := set(options.peers.split(",")) - {*PEERS}:
        parser.error(f"unknown peer {min(unknown)!r}, expected some of {', '.join(PEERS)}")
    if not options.small and not options.gsm8k:
        parser.error("--gsm8k is missing")
    for name in names:
        record = measure(name, options)
        print(json.dumps(record), flush=True)
        if not options.small:
            records.append(record, options.results)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compares the peers on one shape, and returns the record.

    Args:
      name: a key of `shapes.SHAPES`, or "tiny".
      options: the command line.

    Raises:
      FileNotFoundError: a folder that the shape needs is not given or does not exist.
    """
    shape = shapes.SMALL if name == "tiny" else shapes.SHAPES[name]
    steps, made = options.steps or shape.steps, records.origin()
    peers = options.peers.split(",")
    with tempfile.TemporaryDirectory(prefix="speed_") as folder:
        work = pathlib.Path(folder)
        model = model_folder(shape, options, work)
        config = training_config(
            shape, model, work, data_of(shape, model, options, work, rows=shape.batch * (steps + 1))
        )
        examples = str(work / "examples.json")
        common = {"model": str(model), "examples": examples, "rank": RANK, "threads": options.threads}
        torch_spec = {**common, "device": "cpu", "dtype": "float32", "dynamic": True}
        specs: dict[str, dict[str, Any]] = {
            "ours": {"config": config, "steps": steps, "examples": examples},
            "peft": {**torch_spec, "compiled": False},
            "peft_compiled": {**torch_spec, "compiled": True},
        }
        for peer, remat in REMAT.items():
            recomputed = {**config, "train": {**config["train"], "remat": remat}}
            specs[peer] = {"config": recomputed, "steps": steps, "examples": str(work / f"{peer}.json")}
        cold = None if options.small else work / "caches"
        workers = {
            peer: Worker("benchmarks.training", peer, specs[peer], threads=options.threads, cold=cold)
            for peer in PEERS
            if peer in peers or peer == "ours"  # ours writes the examples
        }
        try:
            say = lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True)  # noqa: E731
            found = compare(workers, repeats=options.repeats, say=say)
        finally:
            for worker in workers.values():
                worker.close()
    work_done = found["ours"].get("loaded", {})
    settings = {
        "about": shape.about,
        "batch": shape.batch,
        "row": shape.row,
        "steps": steps,
        "repeats": options.repeats,
        "threads": options.threads,
        "rank": RANK,
        "dtype": "float32",
        **{key: work_done.get(key) for key in ("sequences", "tokens", "targets")},
    }
    peers_found = {peer: summary(values, work_done.get("tokens", 0)) for peer, values in found.items()}
    return records.new_record("training", name, settings, peers_found, made=made)


def summary(found: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Returns the measurements of a peer from its replies.

    Args:
      found: an entry of what `workers.compare` returns.
      tokens: the number of tokens of a pass.
    """
    if "error" in found:
        return {"error": found["error"]}
    runs, facts = found["runs"], dict(found["facts"])
    return {
        **records.measurements(
            [run["seconds"] for run in runs], tokens, unit="tokens", first=found["first"]["seconds"]
        ),
        "first_loss": round(found["first"]["first_loss"], 5),
        "loaded_mib": found["loaded"]["loaded_mib"],
        "peak_mib": facts.pop("process_mib", facts.pop("peak_mib")),
        **facts,
    }


def model_folder(shape: shapes.Shape, options: argparse.Namespace, work: pathlib.Path) -> pathlib.Path:
    """Returns the folder of a shape's model; random weights are written to `work`.

    Raises:
      FileNotFoundError: a folder is not given or does not exist.
    """
    if shape.folder:
        return _existing(options.models and options.models / shape.folder, f"--models with a folder {shape.folder}")
    tokenizer = shapes.shipped_tokenizer()
    if not options.small:
        of_smollm2 = options.models and options.models / shapes.SHAPES["smollm2-135m"].folder
        tokenizer = _existing(options.tokenizer or of_smollm2, "--tokenizer, or --models with smollm2-135m-instruct")
    return shapes.random_model(work / "model", shape.config, tokenizer=tokenizer)


def _existing(folder: pathlib.Path | None, needed: str) -> pathlib.Path:
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(f"the shape needs {needed}, got {folder}")
    return folder.resolve()


def data_of(
    shape: shapes.Shape, model: pathlib.Path, options: argparse.Namespace, work: pathlib.Path, *, rows: int
) -> dict[str, Any]:
    """Returns the config's group `data`: GSM8K as it is, or rows of the shape's length made of its texts.

    Args:
      shape: the shape.
      model: the folder of its tokenizer.
      options: the command line.
      work: the folder for what is written.
      rows: the least number of rows of own data.
    """
    from mlora_jax.models import Tokenizer

    common = {"cache_dir": str(work / "data"), "max_length": 512}
    if not shape.row and not options.small:
        return {**common, "task": "gsm8k", "raw_dir": str(options.gsm8k.resolve()), "overflow": "drop"}
    texts = shapes.made_up_texts(4 * rows) if options.small else shapes.gsm8k_texts(options.gsm8k)
    tokenizer = Tokenizer.load(model)
    count = lambda text: len(tokenizer.encode(text, bos=False))  # noqa: E731
    # Some rows more, because at least one is held out as a test row.
    file = shapes.write_rows(work / "rows.jsonl", texts, rows=rows + 8, length=shape.row, count_tokens=count)
    return {**common, "file": str(file), "holdout": 0.01, "max_length": shape.row or 512, "overflow": "truncate"}


def training_config(shape: shapes.Shape, model: pathlib.Path, work: pathlib.Path, data: dict[str, Any]) -> dict:
    """Returns the config of this package's run: one trial of LoRA that trains alone, without held-out rows."""
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "data": data,
        "adapter": {"targets": training_peers.TARGETS},
        "trials": {
            "method": ("lora",),
            "learning_rate": (training_peers.LEARNING_RATE,),
            "seed": (0,),
            "scaling": ("none",),
            "rank": (RANK,),
        },
        "train": {"epochs": 1, "batch_size": shape.batch, "accumulation": 1, "trials_at_once": 1},
        "validation": {"holdout": 0.0},
        "evaluation": {"limit": 1, "max_new_tokens": 256},
    }


if __name__ == "__main__":
    main(sys.argv[1:])

"""Measures training and decoding on one GPU within a time limit: `python -m benchmarks.gpu [--minutes 8]`.

The program needs neither data nor checkpoints. Its parts are

- training steps of Llama-3.2-1B's shape in bfloat16, 4 and 16 rows of 512 tokens, R 32 and 256, beside PEFT with
  `torch.compile` where torch with CUDA is installed;
- 16 trials of SmolLM2-135M's shape at once, and one alone;
- decoding of a batch of 64 by Llama-3.2-1B's shape.

A part whose time does not come is recorded as skipped. Every peer has a process of its own; they run one after the
other, since each takes the GPU's memory. One JSON line per part goes to standard output and to `results/gpu.jsonl` as
soon as the part ends; `--page` then writes docs/speed.md. `--small` runs every part with tiny sizes on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import records, shapes, training_peers
from benchmarks.page import write_page
from benchmarks.workers import Peer, Reply, Worker, WorkerError, peak_mib, serve

# Device kind -> the largest FLOP/s in bfloat16 without sparsity, by the vendor's data sheet of the SXM form.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
LEAST_SECONDS = 30  # a peer does not start with less time left


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
      about: a description for the table.
      config: entries of the model's `config.json`.
      peers: name -> the kind of its process (a key of `KINDS`) and its number of trials.
      rows: the rows of a training step, or the batch of decoding.
      row: the tokens of a row; for decoding those of a prompt.
      rank: R.
      steps: the training steps of a repeat, or the tokens that are decoded.
    """

    about: str
    config: Mapping[str, Any]
    peers: Mapping[str, tuple[str, int]]
    rows: int
    row: int
    rank: int
    steps: int


def training_part(rows: int, rank: int) -> Part:
    """Returns the part that trains Llama-3.2-1B's shape.

    Args:
      rows: the number of rows of 512 tokens in a step.
      rank: R.
    """
    peers = {"ours": ("ours", 1), "peft_compiled": ("peft", 1)}
    return Part(
        f"Llama-3.2-1B's shape, {rows} rows of 512 tokens, R {rank}", shapes.LLAMA_1B, peers, rows, 512, rank, 8
    )


GRID = {"16 trials at once": ("ours", 16), "one trial alone": ("ours", 1)}
PARTS = {
    "train-16x512-r32": training_part(16, 32),
    "train-4x512-r32": training_part(4, 32),
    "grid-16": Part("a grid of SmolLM2-135M's shape, 4 rows of 512 tokens", shapes.SMOLLM2_135M, GRID, 4, 512, 32, 4),
    "decode-64": Part("decoding, Llama-3.2-1B's shape", shapes.LLAMA_1B, {"ours": ("decode", 1)}, 64, 128, 32, 128),
    "train-16x512-r256": training_part(16, 256),
    "train-4x512-r256": training_part(4, 256),
}
SMALL_GRID = {"2 trials at once": ("ours", 2)}
SMALL = {
    "train-small": Part("tiny", shapes.TINY, {"ours": ("ours", 1), "peft": ("peft", 1)}, 2, 32, 4, 2),
    "grid-small": Part("tiny grid", shapes.TINY, SMALL_GRID, 2, 32, 4, 2),
    "decode-small": Part("tiny decoding", shapes.TINY, {"ours": ("decode", 1)}, 4, 8, 4, 4),
}


def main(arguments: list[str]) -> None:
    """Reads the command line, and prints one record per part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="the time limit of the whole program")
    parser.add_argument("--parts", default="", help=f"some of {', '.join(PARTS)}; the default is all, in this order")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=pathlib.Path, default=records.RESULTS)
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU; nothing goes to the results")
    parser.add_argument("--page", action="store_true", help="write docs/speed.md from the results, and measure nothing")
    parser.add_argument("--peer", default="", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if options.peer:
        serve(KINDS[options.peer], threads=options.threads)
        return
    if options.page:
        write_page(options.results)
        return
    parts = SMALL if options.small else PARTS
    names = options.parts.split(",") if options.parts else [*parts]
    if unknown := [name for name in names if name not in parts]:
        parser.error(f"unknown part {unknown[0]!r}, expected some of {', '.join(parts)}")
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="speed_") as folder:
        for name in names:
            record = measure(name, parts[name], options, pathlib.Path(folder), end=end)
            print(json.dumps(record), flush=True)
            if not options.small:
                records.append(record, options.results)


def measure(name: str, part: Part, options: argparse.Namespace, work: pathlib.Path, *, end: float) -> dict[str, Any]:
    """Runs the peers of a part one after the other, and returns the record.

    Args:
      name: the name of the part.
      part: the part.
      options: the command line.
      work: the folder for models and data; a model that is there already is used again.
      end: the time of `time.monotonic` at which a process is ended.
    """
    peers: dict[str, dict[str, Any]] = {}
    made = records.origin()
    for peer, (kind, trials) in part.peers.items():
        reason = "" if kind != "peft" or options.small else missing_torch()
        if end - time.monotonic() < LEAST_SECONDS:
            reason = "no time was left"
        if reason:
            print(f"{name}: {peer}: skipped, {reason}", file=sys.stderr, flush=True)
            peers[peer] = {"skipped": reason}
            continue
        spec = specification(part, kind, trials, work, small=options.small)
        worker = Worker("benchmarks.gpu", kind, spec, threads=options.threads)
        timer = threading.Timer(end - time.monotonic(), worker.kill)
        timer.start()
        try:
            peers[peer] = results_of(worker, part, repeats=options.repeats)
        except WorkerError as error:
            peers[peer] = {"error": "no time was left" if time.monotonic() >= end else str(error)}
        finally:
            timer.cancel()
            worker.close()
        print(f"{name}: {peer}: {json.dumps(peers[peer])}", file=sys.stderr, flush=True)
    work_of_part = f"{part.steps} steps of {part.rows} rows of {part.row} tokens"
    if "decode" in {kind for kind, _ in part.peers.values()}:
        work_of_part = f"{part.steps} tokens for each of {part.rows} prompts of {part.row} tokens"
    settings = {
        "about": part.about,
        "work": work_of_part,
        **{key: getattr(part, key) for key in ("rows", "row", "rank", "steps")},
        "repeats": options.repeats,
        "dtype": "bfloat16",
    }
    record = records.new_record("gpu", name, settings, peers, made=made)
    record["hardware"]["gpu"] = next((peer["device"] for peer in peers.values() if "device" in peer), None)
    return record


def results_of(worker: Worker, part: Part, *, repeats: int) -> dict[str, Any]:
    """Loads a peer, lets it run once to compile and then `repeats` times, and returns its measurements.

    Args:
      worker: the process.
      part: its part.
      repeats: the number of timed runs.

    Raises:
      WorkerError: as `Worker.ask`.
    """
    loaded = worker.ask("load")
    first = worker.ask("run")
    seconds = [worker.ask("run")["seconds"] for _ in range(repeats)]
    facts = worker.ask("facts")
    tokens = first["tokens"] if "tokens" in first else loaded["tokens"]
    found = records.measurements(seconds, tokens, unit="tokens", first=first.get("all_seconds", first["seconds"]))
    peak = next((value for kind, value in PEAK_FLOPS.items() if kind in (facts.get("device") or "")), None)
    if "all_seconds" not in first:
        flops = model_flops(part, tokens, loaded["targets"])
        rate = flops / tokens * found["tokens_per_second"]["median"]
        found |= {"flops_per_second": rate, "utilisation": rate / peak if peak else None}
    return {**found, **facts}


def model_flops(part: Part, tokens: int, targets: int) -> float:
    """Returns the FLOPs of training that the model itself needs.

    A frozen weight takes 2 FLOPs per token forward and 2 backward, for the gradient of its input. A weight of the
    adapter takes 2 more for its own gradient. The head counts at answer tokens only. Causal attention takes 2 T^2 H
    forward in a layer and row of T tokens, where H is the width of all heads together, and twice as much backward.

    Args:
      part: a part that trains.
      tokens: the number of tokens of a repeat.
      targets: the number of answer tokens among them.
    """
    heads = part.config["num_attention_heads"]
    config = {"head_dim": part.config["hidden_size"] // heads, **part.config}
    tensors = shapes.llama_shapes(config)
    kernels = [shape for name, shape in tensors.items() if "proj" in name]
    frozen = sum(rows * columns for rows, columns in kernels)
    adapter = part.rank * sum(rows + columns for rows, columns in kernels)
    head = config["vocab_size"] * config["hidden_size"]
    attention = 6 * part.row * heads * config["head_dim"] * config["num_hidden_layers"]
    return (4.0 * frozen + 6.0 * adapter + attention) * tokens + 4.0 * head * targets


def missing_torch() -> str:
    """Returns why PEFT cannot run on the GPU, or "" if it can."""
    program = "import torch, peft, transformers; assert torch.cuda.is_available(), 'torch sees no CUDA device'"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return "" if done.returncode == 0 else records.without_paths(done.stderr.strip().splitlines()[-1])


def specification(part: Part, kind: str, trials: int, work: pathlib.Path, *, small: bool) -> dict[str, Any]:
    """Returns the values from which a peer is made; writes its model and its data if they are not there.

    Args:
      part: the part.
      kind: a key of `KINDS`.
      trials: the number of trials that train at once.
      work: the folder for models and data.
      small: whether torch runs on the CPU, without a compiler.
    """
    from mlora_jax.models import Tokenizer

    layers, width = part.config["num_hidden_layers"], part.config["hidden_size"]
    model = work / f"model-{layers}-{width}"
    if not model.is_dir():
        shapes.random_model(model, part.config, tokenizer=shapes.shipped_tokenizer(), dtype="bfloat16")
    file = work / f"rows-{part.rows}-{part.row}-{part.steps}.jsonl"
    if not file.is_file():
        tokenizer = Tokenizer.load(model)
        texts = shapes.made_up_texts(2000)
        count: Callable[[str], int] = lambda text: len(tokenizer.encode(text, bos=False))  # noqa: E731
        shapes.write_rows(file, texts, rows=part.rows * part.steps + 8, length=part.row, count_tokens=count)
    config = {
        "model": {"path": str(model), "dtype": "bfloat16"},
        "data": {
            "file": str(file),
            "cache_dir": str(work / "data"),
            "holdout": 0.01,
            "max_length": part.row,
            "overflow": "truncate",
        },
        "adapter": {"targets": training_peers.TARGETS},
        "trials": {
            "method": ("lora",),
            "learning_rate": (training_peers.LEARNING_RATE,),
            "seed": tuple(range(trials)),
            "scaling": ("none",),
            "rank": (part.rank,),
        },
        "train": {"epochs": 1, "batch_size": part.rows, "accumulation": 1, "trials_at_once": trials},
        "validation": {"holdout": 0.0},
        "evaluation": {"limit": 1, "max_new_tokens": 4},
    }
    examples = work / f"examples-{part.rows}-{part.row}-{part.steps}-{trials}.json"
    return {
        "config": config,
        "steps": part.steps,
        "examples": str(examples),
        "model": str(model),
        "rank": part.rank,
        "compiled": not small,
        "dynamic": False,  # every row is full
        "device": "cpu" if small else "cuda",
        "dtype": "bfloat16",
        "threads": os.cpu_count() or 1,
        "rows": part.rows,
        "row": part.row,
    }


class Decode:
    """Decodes a batch of random prompts with an adapter of random factors, without an end token.

    Args:
      spec: "model" (a Hugging Face folder), "rank", "rows" (the batch), "row" (the tokens of a prompt) and "steps" (the
        tokens to decode).
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec

    def load(self) -> Reply:
        """Loads the model and makes the prompts."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from mlora_jax.adapters import adapt, split
        from mlora_jax.evaluate import Generator
        from mlora_jax.models import load_decoder

        spec = self._spec
        model = load_decoder(spec["model"], dtype=jnp.bfloat16)
        adapted = adapt(model, spec["rank"], training_peers.TARGETS, key=jax.random.key(0))
        adapted.eval()
        graphdef, base, self._adapter, profile = split(adapted)
        self._generator = Generator(
            graphdef,
            base,
            profile,
            max_length=model.config.max_position_embeddings,
            batch_size=spec["rows"],
            pad_multiple=16,
            eos=(),
        )
        draw = np.random.default_rng(0)
        self._prompts = draw.integers(3, model.config.vocab_size, (spec["rows"], spec["row"])).tolist()
        self._p = jnp.ones(spec["rank"])
        return {"loaded_mib": peak_mib()}

    def run(self) -> Reply:
        """Decodes; returns the seconds that all tokens but the first took, and "all_seconds" with prefill."""
        steps, rows = self._spec["steps"], self._spec["rows"]
        first = self._seconds(1)
        every = self._seconds(steps + 1)
        return {"seconds": max(every - first, 1e-9), "all_seconds": every, "tokens": steps * rows}

    def _seconds(self, tokens: int) -> float:
        start = time.perf_counter()
        self._generator.generate(self._adapter, self._prompts, self._p, max_new_tokens=tokens)
        return time.perf_counter() - start

    def facts(self) -> Reply:
        """Returns the number of executables and the device's peak memory."""
        import jax

        device = jax.devices()[0]
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return {
            "executables": self._generator.compilations,
            "device": device.device_kind,
            "device_peak_mib": None if peak is None else round(peak / 2**20, 1),
        }


KINDS: dict[str, Callable[[dict[str, Any]], Peer]] = {
    "ours": training_peers.Ours,
    "peft": training_peers.Peft,
    "decode": Decode,
}


if __name__ == "__main__":
    main(sys.argv[1:])

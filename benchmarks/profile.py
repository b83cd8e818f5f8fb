"""Shows where the time of a training step goes: `python -m benchmarks.profile`.

The program traces some steps with the profiler of jax, sums the time of every operation of the compiled step and
assigns it to a part of the step by the scope and the operation that the compiled program names. It trains the same
examples by the same parts of a run as `benchmarks.training`. One JSON line per shape goes to standard output and to
`results/profile.jsonl`; `python -m benchmarks.training --page` then writes docs/speed.md.

    python -m benchmarks.profile --shapes stories-3m,random-15m,smollm2-135m,llama-1b-2-layers \
        --models MODELS --gsm8k GSM8K [--tokenizer FOLDER] [--steps N] [--threads N]
"""

from __future__ import annotations

import argparse
import collections
import glob
import itertools
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping

from benchmarks import records, shapes
from benchmarks.training import RANK, data_of, model_folder, training_config
from benchmarks.training_peers import Ours

# The parts of a step in the order in which an operation is assigned: the first one whose expression matches its scope
# (`op_name`) or its name takes it.
PARTS: dict[str, str] = {
    "logits and loss": r"head_and_loss",
    "attention without its projections": r"/attention/|\(attention\)",
    "products with the sum of kernel and adapter": r"folded_product.*dot_general",
    "products with the adapter's factors": r"adapter.*dot_general",
    "products with frozen kernels": r"dot_general",
    "copies of the loop over layers": r"dynamic_slice|dynamic_update_slice|dynamic_index|dynamic_update_index| copy",
    "optimizer, norms, activations and the rest": r"",
}
# An operation that only runs others; the profiler counts their time for it too.
_OUTER = ("while", "call", "conditional")


def main(arguments: list[str]) -> None:
    """Reads the command line, and prints one record per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="stories-3m", help=f"some of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--models", type=pathlib.Path, help="the folder of the models' folders")
    parser.add_argument("--gsm8k", type=pathlib.Path, help="the folder of train.jsonl and test.jsonl")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="a model's folder, for random weights")
    parser.add_argument("--steps", type=int, default=3, help="the number of steps that are traced")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=pathlib.Path, default=records.RESULTS)
    parser.add_argument("--small", action="store_true", help="a tiny model; nothing goes to the results")
    options = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    os.sched_setaffinity(0, cores)  # XLA takes as many threads as there are cores for this process
    names = ["tiny"] if options.small else options.shapes.split(",")
    if unknown := [name for name in names if name not in (*shapes.SHAPES, "tiny")]:
        parser.error(f"unknown shape {unknown[0]!r}, expected some of {', '.join(shapes.SHAPES)}")
    if not options.small and not options.gsm8k:
        parser.error("--gsm8k is missing")
    for name in names:
        record = measure(name, options)
        print(json.dumps(record), flush=True)
        if not options.small:
            records.append(record, options.results)


def measure(name: str, options: argparse.Namespace) -> dict:
    """Profiles the steps of one shape, and returns the record.

    Args:
      name: a key of `shapes.SHAPES`, or "tiny".
      options: the command line.
    """
    shape, made = shapes.SMALL if name == "tiny" else shapes.SHAPES[name], records.origin()
    with tempfile.TemporaryDirectory(prefix="profile_") as folder:
        work = pathlib.Path(folder)
        model = model_folder(shape, options, work)
        data = data_of(shape, model, options, work, rows=shape.batch * (options.steps + 1))
        config = training_config(shape, model, work, data)
        run = Ours({"config": config, "steps": options.steps, "examples": str(work / "examples.json")})
        loaded = run.load()
        run.run()  # compiles
        unprofiled = run.run()["seconds"]
        by_operation = operation_seconds(run, work / "trace")
        parts = part_seconds(by_operation, run.program())
    settings = {"about": shape.about, "batch": shape.batch, "row": shape.row, "steps": options.steps, "rank": RANK}
    settings |= {"threads": options.threads, "dtype": "float32", "tokens": loaded["tokens"]}
    return records.new_record("profile", name, settings, {"ours": {"seconds": unprofiled, "parts": parts}}, made=made)


def operation_seconds(run: Ours, folder: pathlib.Path) -> dict[str, float]:
    """Returns operation of the compiled step -> its seconds in a pass over the steps, summed over the threads.

    Args:
      run: a loaded run whose programs are compiled.
      folder: the folder for the trace.
    """
    import jax

    with jax.profiler.trace(str(folder)):
        run.run()
    (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    trace, found = jax.profiler.ProfileData.from_file(file), collections.Counter()
    events = itertools.chain.from_iterable(line.events for plane in trace.planes for line in plane.lines)
    for event in events:
        stats = dict(event.stats)
        if "hlo_op" in stats and stats.get("hlo_module", "").startswith("jit_alone"):
            found[str(stats["hlo_op"])] += event.duration_ns / 1e9
    return dict(found)


def part_seconds(operations: Mapping[str, float], program: str) -> dict[str, float]:
    """Returns part of `PARTS` -> its seconds.

    Args:
      operations: operation -> seconds.
      program: the text of the compiled step, which names the scope of every operation.
    """
    scopes = dict(named_operations(program))
    found = dict.fromkeys(PARTS, 0.0)
    for name, seconds in operations.items():
        if name.split(".")[0] in _OUTER:
            continue
        scope = scopes.get(name, "")
        part = next(part for part, pattern in PARTS.items() if re.search(pattern, f"{scope} {name}") or not pattern)
        found[part] += seconds
    return {part: round(seconds, 4) for part, seconds in found.items()}


def named_operations(program: str) -> Iterable[tuple[str, str]]:
    """Yields every operation of a compiled program and its scope, "" if it has none.

    >>> list(named_operations('  %dot.1 = f32[2]{0} dot(%a, %b), metadata={op_name="jit(f)/adapter/dot_general"}'))
    [('dot.1', 'jit(f)/adapter/dot_general')]
    """
    for line in re.finditer(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", program, re.MULTILINE):
        scope = re.search(r'op_name="([^"]*)"', line[2])
        yield line[1], scope[1] if scope else ""


if __name__ == "__main__":
    main(sys.argv[1:])

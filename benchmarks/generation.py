"""Times rank-accuracy curves of this package, of lm-evaluation-harness and of `transformers.generate`, in turns.

All peers evaluate the base and every rank of one adapter on the same items of one task, by default 100 items of GSM8K,
whose answers are generated. This package runs all ranks in one pass. The others run one rank after the other, and get
the base's weights with the adapter folded in at that rank. Each peer has a process of its own, and only one computes at
a time. One JSON line goes to standard output and to `results/generation.jsonl`; `--page` then writes docs/speed.md.

    python -m benchmarks.generation --checkpoint MODEL_FOLDER --gsm8k GSM8K [--adapter ADAPTER_FOLDER] [--limit N]
        [--shots N] [--gen_tokens N] [--ranks 0,32] [--repeats N] [--threads N]

ADAPTER_FOLDER is the folder of an adapter of a run; without it the adapter has small random factors. `--task` with
`--raw_dir` takes another of the harness's tasks; where answers are choices, `generate` reports an error and the others
go on. `--small` runs a tiny random model on two made-up questions. The program needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks import generation_peers, records, shapes
from benchmarks.page import write_page
from benchmarks.workers import Worker, compare, serve


def main(arguments: list[str]) -> None:
    """Reads the command line and prints the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "gsm8k", "raw_dir"):
        parser.add_argument(f"--{name}", type=pathlib.Path)
    parser.add_argument("--adapter", type=pathlib.Path, help="the folder of an adapter; the default is a random one")
    parser.add_argument("--task", default="gsm8k")
    for name, default in (("shots", 0), ("limit", 100), ("gen_tokens", 128), ("batch_size", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ranks", default="0,1,2,4,8,16,32", help="the ranks of the curve; 0 is the base")
    parser.add_argument("--peers", default=",".join(generation_peers.PEERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=pathlib.Path, default=records.RESULTS)
    parser.add_argument("--small", action="store_true", help="a tiny model; nothing goes to the results")
    parser.add_argument("--page", action="store_true", help="write docs/speed.md from the results, and measure nothing")
    parser.add_argument("--peer", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peer:
        serve(generation_peers.PEERS[options.peer], threads=options.threads)
    elif options.page:
        write_page(options.results)
    else:
        if unknown := set(options.peers.split(",")) - {*generation_peers.PEERS}:
            parser.error(f"unknown peer {min(unknown)!r}, expected some of {', '.join(generation_peers.PEERS)}")
        if not options.small and not (options.checkpoint and (options.gsm8k or options.raw_dir)):
            parser.error("--checkpoint and --gsm8k (or --raw_dir) are needed")
        record = measure(options)
        print(json.dumps(record), flush=True)
        if not options.small:
            records.append(record, options.results)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compares the peers on one model, and returns the record.

    Args:
      options: the command line.
    """
    made = records.origin()
    with tempfile.TemporaryDirectory(prefix="speed_") as folder:
        work = pathlib.Path(folder)
        if options.small:
            make_small(options, work)
        ranks = [int(rank) for rank in options.ranks.split(",")]
        shared = work / "shared"
        shared.mkdir()
        spec = {
            "checkpoint": str(options.checkpoint.resolve()),
            "adapter": str(options.adapter.resolve()) if options.adapter else "",
            "max_rank": max(*ranks, 1),
            "ranks": ranks,
            "task": options.task,
            "raw_dir": str((options.raw_dir or options.gsm8k).resolve()),
            "shots": options.shots,
            "limit": options.limit or None,
            "gen_tokens": options.gen_tokens,
            "batch_size": options.batch_size,
            "shared": str(shared),
            "threads": options.threads,
        }
        cold = None if options.small else work / "caches"
        workers = {
            peer: Worker("benchmarks.generation", peer, spec, threads=options.threads, cold=cold)
            for peer in generation_peers.PEERS
            if peer in options.peers.split(",") or peer == "ours"  # ours writes what the others need
        }
        name = options.checkpoint.name
        try:
            say = lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True)  # noqa: E731
            found = compare(workers, repeats=options.repeats, say=say)
        finally:
            for worker in workers.values():
                worker.close()
    first = found["ours"].get("first")
    items = len(next(iter(first["verdicts"].values()))) if first else 0
    settings = {
        "about": f"{name}, {options.task}, {options.shots} shots",
        **{key: spec[key] for key in ("task", "shots", "ranks", "gen_tokens", "batch_size", "threads")},
        "items": items,
        "repeats": options.repeats,
        "adapter": "trained" if options.adapter else "random factors",
        "dtype": "float32",
    }
    peers = {peer: summary(values, first, items * len(ranks)) for peer, values in found.items()}
    return records.new_record("generation", settings["about"], settings, peers, made=made)


def summary(found: dict[str, Any], ours: dict[str, Any] | None, answers: int) -> dict[str, Any]:
    """Returns the measurements of a peer, and how many of its answers equal this package's.

    Args:
      found: an entry of what `workers.compare` returns.
      ours: the first reply of this package; None if it failed.
      answers: the number of answers of a curve, over all ranks.
    """
    if "error" in found:
        return {"error": found["error"]}
    runs, first, facts = found["runs"], found["first"], dict(found["facts"])
    seconds = [run["seconds"] for run in runs]
    summed = records.measurements(seconds, answers, unit="answers", first=first["seconds"])
    accuracies = {rank: float(np.mean(values)) for rank, values in first.get("verdicts", {}).items()}
    return {
        **summed,
        "accuracies": accuracies,
        # The texts, or the verdicts where the task scores choices.
        "equal": _equal(first, ours, "texts") if any(first["texts"].values()) else _equal(first, ours, "verdicts"),
        "loaded_mib": found["loaded"]["loaded_mib"],
        "peak_mib": facts.pop("peak_mib"),
        **facts,
    }


def _equal(first: dict[str, Any], ours: dict[str, Any] | None, kind: str) -> float | None:
    """Returns the share of a peer's texts or verdicts that equal this package's, over all ranks; None for itself."""
    if ours is None or first is ours or kind not in first:
        return None
    pairs = [pair for rank in first[kind] for pair in zip(first[kind][rank], ours[kind][rank], strict=True)]
    return float(np.mean([left == right for left, right in pairs])) if pairs else None


def make_small(options: argparse.Namespace, work: pathlib.Path) -> None:
    """Sets the options to a tiny random model and two made-up questions.

    Args:
      options: the command line; it is changed.
      work: the folder for model and questions.
    """
    options.checkpoint = shapes.random_model(work / "tiny", shapes.TINY, tokenizer=shapes.shipped_tokenizer())
    options.gsm8k, options.adapter = work / "gsm8k", None
    options.gsm8k.mkdir()
    texts = shapes.made_up_texts(8)
    lines = [
        {"question": question, "answer": f"{answer}\n#### {answer.split()[-1].rstrip('.')}"}
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    ]
    for name in ("train.jsonl", "test.jsonl"):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (options.gsm8k / name).write_text(text, encoding="utf-8")
    options.limit, options.gen_tokens, options.ranks, options.batch_size = 2, 4, "0,4", 2


if __name__ == "__main__":
    main(sys.argv[1:])

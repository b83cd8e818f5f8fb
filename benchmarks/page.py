"""Writes docs/speed.md from the records of the speed benchmarks."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.records import RESULTS, ROOT, latest, read

PAGE = ROOT / "docs" / "speed.md"
NAMES = {
    "ours": "this package",
    "ours_none": 'this package, `remat="none"`',
    "ours_dots": 'this package, `remat="dots"`',
    "ours_full": 'this package, `remat="full"`',
    "peft": "PEFT, eager",
    "peft_compiled": "PEFT, `torch.compile`",
    "harness": "lm-evaluation-harness, Hugging Face backend",
    "generate": "`transformers.generate`",
}

INTRODUCTION = """\
# Speed

This page is written by `python -m benchmarks.training --page` from the JSON lines in `results/`. Install the peers by
`pip install -e ".[bench]"`. Every peer has a process of its own. On a CPU the processes live through the whole
comparison and take turns, so that only one computes at a time; each repeat begins with another peer. A first pass over
the same work, in which programs are compiled, precedes the repeats and is not timed with them. Figures are medians over
the repeats, with the slowest and the fastest repeat in brackets.
"""

TRAINING = """\
## Training

    python -m benchmarks.training --shapes stories-3m,random-15m,smollm2-135m,llama-1b-2-layers \\
        --models MODELS --gsm8k GSM8K

`MODELS` holds the folders of the models, `GSM8K` the files of the data set. Both sides train a LoRA adapter of rank 32
on all seven linear projections by AdamW in float32, on the same examples in each step. They are examples of GSM8K in
the order to which a run shuffles them; for the layers of Llama-3.2-1B they are rows of 512 tokens, each of which joins
several of them. This package goes through the parts of a run (`Experiment.load`, its batches, its compiled step). PEFT
gets rows that are padded on the right to the longest of the batch, an attention mask where rows differ in length,
labels of -100 outside the answers, scaled dot product attention and the fused AdamW. Its compiled form is
`torch.compile(model, dynamic=True)`.

Tokens are those of the examples, without padding. "times" says how many times as fast this package is. Memory is the
largest resident memory of the process, with its libraries and compilers. "compile" is the time that the first pass took
beyond the median repeat. "executables" counts compiled training steps; for PEFT it counts the graphs that torch
captured. "padding" is the share of the computed tokens that are padding. "times its products" compares the time of the
steps with that of their matrix products, each timed alone at its shape (`benchmarks/products.py`). The first loss is
that of the first step, before any update. Equal first losses show that both sides train the same examples.
"""

GENERATION = """\
## Evaluation by generation

    python -m benchmarks.generation --checkpoint MODEL --gsm8k GSM8K [--adapter ADAPTER]

Each peer answers the same items of GSM8K with the base and with every rank of one adapter, and the time is that of the
whole curve. This package evaluates all ranks in one pass (`mlora_jax.evaluate.harness.evaluate_all`). The others get
the base's weights with the adapter folded in at each rank, so that they have no adapter to compute. The time to fold is
not counted. "equal answers" is the share of the answers at all ranks whose text equals this package's.
"""

PROFILE = """\
## Where the time of a training step goes

    python -m benchmarks.profile --shapes stories-3m,random-15m,smollm2-135m,llama-1b-2-layers \\
        --models MODELS --gsm8k GSM8K

The program sums the time of every operation of the compiled step, as jax's profiler traces it, and assigns it to a part
of the step by the scope that the compiled program names. The figures are shares of the summed time. Sums of kernel and
adapter are multiplied where that is cheaper than multiplying by the factors (`mlora_jax.core.product.folding_pays`).
"""

GPU = """\
## GPU

    python -m benchmarks.gpu --minutes 8

The program needs one GPU, and neither data nor checkpoints. The peers run one after the other, since each takes the
GPU's memory. The program trains random weights of the shapes of Llama-3.2-1B and SmolLM2-135M in bfloat16 on rows that
are full, trains 16 trials at once and one alone, and decodes a batch of 64. Model FLOPs utilisation counts 4 FLOPs per
token and weight of the frozen layers (no gradient of these weights is needed), 6 per token and weight of the adapter, 4
per answer token and weight of the head, and those of causal attention. Recomputation does not count. `--small` runs
every part on a CPU with tiny sizes.
"""


def write_page(results: pathlib.Path = RESULTS, file: pathlib.Path = PAGE) -> pathlib.Path:
    """Writes the page, and returns its file.

    Args:
      results: the folder of the records.
      file: the file to write.
    """
    text = page(*(read(name, results) for name in ("training", "profile", "generation", "gpu")))
    file.write_text(text, encoding="utf-8")
    return file


def page(
    training: Sequence[Mapping[str, Any]],
    profile: Sequence[Mapping[str, Any]],
    generation: Sequence[Mapping[str, Any]],
    gpu: Sequence[Mapping[str, Any]],
) -> str:
    """Returns the page in Markdown. Of several records of a shape the last one counts.

    Args:
      training, profile, generation, gpu: the records of the four benchmarks.
    """
    parts = [INTRODUCTION]
    for introduction, found, work, columns, none in (
        (TRAINING, training, training_work, TRAINING_COLUMNS, "There is no record of training yet."),
        (GENERATION, generation, generation_work, GENERATION_COLUMNS, "There is no record of generation yet."),
        (GPU, gpu, gpu_work, GPU_COLUMNS, "The GPU part has not been run."),
    ):
        parts += [introduction] if found else [introduction, f"{none}\n"]
        parts += [_section(record, work(record["settings"]), columns) for record in latest(found).values()]
        parts += [PROFILE, _profile(list(latest(profile).values()))] if profile and found is training else []
    return "\n".join(parts)


# The columns of the tables: heading -> the cell of a peer, from the record and the peer's name.
Cell = Callable[[Mapping[str, Any], str], str]
TRAINING_COLUMNS: dict[str, Cell] = {
    "tokens/s": lambda record, peer: _spread(record["peers"][peer]["tokens_per_second"]),
    "times": lambda record, peer: _times(record, peer, "tokens_per_second"),
    "memory, MiB": lambda record, peer: f"{record['peers'][peer]['peak_mib']:,.0f}",
    "compile, s": lambda record, peer: _compile_seconds(record["peers"][peer]),
    "executables": lambda record, peer: str(record["peers"][peer]["executables"]),
    "padding": lambda record, peer: _optional(record["peers"][peer].get("padding"), ".1%"),
    "times its products": lambda record, peer: _of_products(record["peers"][peer]),
    "first loss": lambda record, peer: f"{record['peers'][peer]['first_loss']:.4f}",
}
GENERATION_COLUMNS: dict[str, Cell] = {
    "answers/s": lambda record, peer: _spread(record["peers"][peer]["answers_per_second"]),
    "times": lambda record, peer: _times(record, peer, "answers_per_second"),
    "memory, MiB": TRAINING_COLUMNS["memory, MiB"],
    "compile, s": TRAINING_COLUMNS["compile, s"],
    "equal answers": lambda record, peer: _optional(record["peers"][peer].get("equal"), ".1%"),
}
GPU_COLUMNS: dict[str, Cell] = {
    "tokens/s": TRAINING_COLUMNS["tokens/s"],
    "model FLOPs utilisation": lambda record, peer: _optional(record["peers"][peer].get("utilisation"), ".1%"),
    "device memory, MiB": lambda record, peer: _optional(record["peers"][peer].get("device_peak_mib"), ",.0f"),
    "compile, s": TRAINING_COLUMNS["compile, s"],
}


def training_work(settings: Mapping[str, Any]) -> str:
    """Returns the sentence that says what a repeat of the training benchmark does."""
    return (
        f"{settings['steps']} steps of {settings['batch']} examples, {settings['tokens'] or 0:,} tokens, "
        f"{settings['targets'] or 0:,} of them answer tokens; {settings['repeats']} repeats."
    )


def generation_work(settings: Mapping[str, Any]) -> str:
    """Returns the sentence that says what a repeat of the generation benchmark does."""
    return (
        f"{settings['items']} items of {settings['task']} with {settings['shots']} shots at ranks "
        f"{', '.join(map(str, settings['ranks']))}; at most {settings['gen_tokens']} tokens per answer; batches of "
        f"{settings['batch_size']}; {settings['repeats']} repeats; adapter: {settings['adapter']}."
    )


def gpu_work(settings: Mapping[str, Any]) -> str:
    """Returns the sentence that says what a repeat of a part of the GPU benchmark does."""
    return f"{settings['work']}; {settings['repeats']} repeats."


def _profile(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of the parts of a step, with a column for each shape."""
    lines = [
        _line(["", *(record["settings"]["about"] for record in found)]),
        _line(["---", *["---:"] * len(found)]),
    ]
    parts = [record["peers"]["ours"]["parts"] for record in found]
    for name in dict.fromkeys(name for each in parts for name in each):
        lines.append(_line([name, *(f"{each.get(name, 0.0) / sum(each.values()):.1%}" for each in parts)]))
    return "\n".join([*lines, "", _origin(found[-1]), ""])


def _section(record: Mapping[str, Any], work: str, columns: Mapping[str, Cell]) -> str:
    """Returns the table of a record; for a peer that failed or was left out, it says why."""
    lines = [_line(["", *columns]), _line(["---", *["---:"] * len(columns)])]
    for name, peer in record["peers"].items():
        cells = [cell(record, name) for cell in columns.values()] if "seconds" in peer else []
        for reason in ("error", "skipped"):
            if reason in peer:
                cells = [f"{reason}: {peer[reason]}".replace("|", r"\|"), *[""] * (len(columns) - 1)]
        lines.append(_line([str(NAMES.get(name, name)), *cells]))
    return "\n".join([f"### {record['settings']['about']}", "", work, "", *lines, "", _origin(record), ""])


def _compile_seconds(peer: Mapping[str, Any]) -> str:
    """Returns the cell of a peer, empty where nothing is compiled and a slow first pass has other reasons."""
    return f"{peer['compile_seconds']:.1f}" if peer["executables"] else ""


def _of_products(peer: Mapping[str, Any]) -> str:
    """Returns the median time of a peer as a multiple of that of its matrix products alone."""
    products = peer.get("products")
    return f"{statistics.median(peer['seconds']) / products['seconds']:.2f}" if products else ""


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _spread(values: Mapping[str, float]) -> str:
    digits = 0 if values["median"] >= 100 else 2
    return f"{values['median']:,.{digits}f} ({values['low']:,.{digits}f} to {values['high']:,.{digits}f})"


def _times(record: Mapping[str, Any], peer: str, measure: str) -> str:
    """Returns how many times as fast as a peer this package is."""
    ours = record["peers"].get("ours", {})
    if peer == "ours" or measure not in ours:
        return ""
    return f"{ours[measure]['median'] / record['peers'][peer][measure]['median']:.2f}"


def _origin(record: Mapping[str, Any]) -> str:
    hardware, settings = record["hardware"], record["settings"]
    threads = f", {settings['threads']} threads" if "threads" in settings else ""
    machine = f"{hardware.get('gpu') or hardware['cpu']}, {hardware['cores']} cores{threads}"
    libraries = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    at = f"Measured on {record['date'][:10]} at commit {record['revision']}"
    return f"{at} on {machine} (load {hardware['load']} before); {libraries}."


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

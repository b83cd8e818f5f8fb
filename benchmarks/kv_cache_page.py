"""Writes docs/kv_cache.md and its figure from the records of `benchmarks.kv_cache`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.records import RESULTS, ROOT, latest, read

PAGE = ROOT / "docs" / "kv_cache.md"
FIGURE = "kv_cache.png"
NAMES = {"pca": "PCA, one rank", "trained": "trained, one rank", "searched": "trained, searched ranks"}
AIM = 0.4  # the budget of the comparison under each table

INTRODUCTION = """\
# The KV cache in nested ranks

This page is written by `python -m benchmarks.kv_cache --page` from the JSON lines in `results/`.

A decoder keeps the key and the value of every token, layer and head. Here each head has two orthogonal matrices, U_k
and U_v, and the cache keeps the first r entries of `U_k' k` and of `U_v' v` (MatryoshkaKV, arXiv
[2410.14731](https://arxiv.org/abs/2410.14731)). The matrices are trained so that every r gives a good cache, as every
prefix of a nested adapter is a good adapter. r may differ between layers, heads, keys and values.

- **Positions.** Keys are projected after their rotary positions, as in the authors' code. A query is projected by the
  same U_k and cut at r. Mixed values return through U_v, and the part of the mean value that the cut removes is added.
  At full rank the logits are those of the base.
- **Start.** U_k and U_v begin as the principal components of keys and values over a few texts.
- **Training.** Each micro-batch draws a rank of the grid Hd/8, 2 Hd/8, ..., Hd for the keys and the values of every
  layer and head. The loss is 0.25 KL(full || cut) + 0.75 cross-entropy. Only the matrices move. They are U_0 times a
  Cayley transform, so they stay orthogonal without a penalty. The ranks are data: one executable serves all draws.
- **Search.** Ranks fall greedily. A round lowers every rank alone and measures the divergence on held-out text. Then
  the ranks whose fall costs least fall, a share of them at once. One search serves every budget.
- **Deployment.** The heads of a layer that have the same ranks share a pair of arrays, `k [B, n, r, S]` and
  `v [B, n, S, r']`, so the bytes are exactly those of the ranks. If all heads have one rank, there is one pair per
  layer, `k [B, KV, r, S]` and `v [B, KV, S, r]`. U_v stays a product of its own and is not folded into the weights of
  `o_proj`, because an adapter may sit there.

## Commands

    python -m experiments.kv_cache --config configs/kv_cache_smollm2.py --out KV --config.data.train=TEXT.json
    python -m experiments.lm_eval --model_args checkpoint=MODEL,kv=KV,kv_budget=0.4 --tasks arc_easy --raw_dir DATA
    python -m experiments.generate --adapter ADAPTER --rank 8 --kv KV --kv_budget 0.4 --prompt "Once upon a time"

`kv_budget` is the fraction of the full cache's bytes. `kv_rates=uniform` (`--kv_rates uniform`) takes one rank for all
heads. An adapter goes on top: the cache is then nested in its ranks, and the weights in those of the adapter. KV holds
`kv_cache.safetensors` and `kv_cache.json`. A folder that was made for other weights is refused.

## In a notebook

```python
import jax.numpy as jnp
from flax import nnx
from mlora_jax.kv_cache import (
    Meter,
    cache_bytes,
    cache_shape,
    principal_components,
    project,
    search_ranks,
    train_projections,
    uniform_ranks,
)
from mlora_jax.kv_cache.text import encode, packed_rows, read_documents, single_rows
from mlora_jax.models import Tokenizer, checkpoint_folder, load_decoder

folder = checkpoint_folder("HuggingFaceTB/SmolLM2-135M-Instruct")
model, tokenizer = load_decoder(folder, dtype=jnp.float32), Tokenizer.load(folder)
pieces = encode(read_documents("TEXT.json"), tokenizer, 256)
train, held_out = packed_rows(pieces[:-4], 256), packed_rows(pieces[-4:], 256)

start = principal_components(model, single_rows(pieces[:32], 256, 4))
settings = dict(
    steps=20,
    batch_size=2,
    accumulation=1,
    learning_rate=5e-3,
    warmup_steps=2,
    beta1=0.9,
    beta2=0.98,
    weight_decay=0.0,
    clip=1.0,
    kl_weight=0.25,
    remat="full",
)
projections = train_projections(model, start, train, settings, levels=4, seed=0)

meter = Meter(model, projections, held_out, batch_size=1)  # any ranks, one executable
shape = cache_shape(model)
path = search_ranks(lambda ranks: meter(ranks).divergence, shape, levels=4, budget=0.5, share=1.0)
for name, ranks in {"one rank": uniform_ranks(0.5, *shape), "searched": path.at(0.5)}.items():
    print(name, meter(ranks))

small = project(model, projections, path.at(0.5), cut=True)
print(cache_bytes(small.init_cache(1, 256)), "bytes instead of", cache_bytes(model.init_cache(1, 256)))
```

## Measured

    python -m benchmarks.kv_cache --checkpoint MODEL --text TEXT.json --raw_dir DATA --tasks arc_easy --work FOLDER

Perplexity is that of text which neither training nor search has seen. Accuracy is that of lm-evaluation-harness. "same
verdicts" is the share of the items whose verdict equals the full model's. An area is the mean height of the curve over
the bytes per token (trapezoids over a linear axis, divided by its length); that of perplexity is over its logarithm.
Decoding takes the last tokens of a full context; "times" is the speed relative to the full cache without projections,
timed in turns. Figures of speed are medians.
"""


def write_page(results: pathlib.Path = RESULTS, file: pathlib.Path = PAGE) -> pathlib.Path:
    """Writes the page, and the figure beside it if there is a record.

    Args:
      results: the folder of the records.
      file: the page.
    """
    found = list(latest(read("kv_cache", results)).values())
    if found:
        draw(found, file.with_name(FIGURE))
    file.write_text(page(found), encoding="utf-8")
    return file


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns the text of the page for records, of which there may be none."""
    if not found:
        return f"{INTRODUCTION}\nThere is no record yet.\n"
    figure = f"![perplexity and accuracy against the bytes that a token takes in the cache]({FIGURE})\n"
    return "\n".join([INTRODUCTION, figure, *map(_section, found)])


def _section(record: Mapping[str, Any]) -> str:
    settings, peers = record["settings"], record["peers"]
    tasks = [name for name in settings["tasks"].split(",") if name]
    head = ["cache", "way", "bytes per token", "perplexity", *tasks, *(f"{task}, same verdicts" for task in tasks)]
    head += ["cache, MiB", "tokens/s", "times"]
    lines = [f"### {settings['about']}", "", _about(settings), "", _line(head), _line(["---", "---", *_right(head)])]
    budgets = sorted({cell["budget"] for way in peers.values() for cell in way["cells"]}, reverse=True)
    for budget in budgets:
        for way, values in peers.items():
            for cell in values["cells"]:
                if cell["budget"] == budget:
                    lines.append(_line(_cells(cell, way, tasks)))
    lines += ["", _line(["way", "area, log perplexity", *(f"area, {task}" for task in tasks)])]
    lines.append(_line(["---", *["---:"] * (1 + len(tasks))]))
    for way, values in peers.items():
        found = values["areas"]
        lines.append(_line([NAMES[way], *(_number(found.get(key), 4) for key in ("log_perplexity", *tasks))]))
    lines += ["", *_at_aim(peers, tasks), _origin(record), ""]
    return "\n".join(lines)


def _about(settings: Mapping[str, Any]) -> str:
    trained = settings["config"]["train"]
    seconds = settings.get("training_seconds")
    took = f", which took {seconds / 60:.0f} minutes with the search" if seconds else ""
    limit = f"{settings['limit']} items of each task, {settings['shots']} shots; " if settings["tasks"] else ""
    return (
        f"{settings['steps']} steps of {trained['batch_size']} rows of {settings['length']} tokens{took}; {limit}"
        f"perplexity on {settings['test_rows']} rows; decoding of {settings['decoded']} tokens of {settings['rows']} "
        f"row(s) at a context of {settings['context']}; {settings['dtype']}."
    )


def _cells(cell: Mapping[str, Any], way: str, tasks: Sequence[str]) -> list[str]:
    scores = [cell.get("accuracies", {}).get(task) for task in tasks]
    size = cell.get("cache_bytes")
    return [
        f"{cell['budget']:.0%}",
        NAMES[way],
        f"{cell['bytes_per_token']:,}",
        f"{cell['perplexity']:.3f}",
        *("" if score is None else f"{score['accuracy']:.3f} ± {score['standard_error']:.3f}" for score in scores),
        *("" if score is None else f"{score['same']:.1%}" for score in scores),
        "" if size is None else f"{size / 2**20:.2f}",
        _number(cell.get("tokens_per_second"), 1),
        _number(cell.get("times"), 2),
    ]


def _at_aim(peers: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """Returns sentences on what each way loses of the full model's accuracy at the budget `AIM`."""
    lines = []
    for task in tasks:
        full = next((c for way in peers.values() for c in way["cells"] if c["budget"] == 1.0), None)
        lost = []
        for way, values in peers.items():
            cell = next((c for c in values["cells"] if c["budget"] == AIM), None)
            if full and cell and task in cell.get("accuracies", {}) and full["accuracies"][task]["accuracy"]:
                share = 1 - cell["accuracies"][task]["accuracy"] / full["accuracies"][task]["accuracy"]
                lost.append(f"{NAMES[way]} {share:.1%}")
        if lost:
            lines += [
                f"At {AIM:.0%} of the bytes the loss of the full cache's accuracy on {task} is: {'; '.join(lost)}.",
                "",
            ]
    return lines


def draw(found: Sequence[Mapping[str, Any]], file: pathlib.Path) -> None:
    """Draws perplexity, and the accuracy of every task, over the bytes per token: a row of panels for each model."""
    panels = []
    for record in found:
        tasks = [name for name in record["settings"]["tasks"].split(",") if name]
        panels.append([("perplexity", lambda cell: cell["perplexity"]), *((task, _accuracy(task)) for task in tasks)])
    columns = max(map(len, panels))
    figure = Figure(figsize=(5.0 * columns, 3.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), columns, squeeze=False)
    for record, row, areas in zip(found, panels, axes, strict=True):
        for area in areas[len(row) :]:
            area.set_visible(False)
        for (name, value), area in zip(row, areas, strict=False):
            for (way, values), marker in zip(record["peers"].items(), "os^", strict=False):
                cells = sorted(values["cells"], key=lambda cell: cell["bytes_per_token"])
                area.plot([c["bytes_per_token"] for c in cells], [*map(value, cells)], marker=marker, label=NAMES[way])
            area.set_xlabel("cache bytes per token")
            area.set_ylabel(name if name == "perplexity" else f"accuracy on {name}")
            area.set_title(record["settings"]["about"])
            if name == "perplexity":
                area.set_yscale("log")
            area.legend()
    figure.savefig(file, dpi=110)


def _accuracy(task: str) -> Any:
    return lambda cell: cell["accuracies"][task]["accuracy"]


def _origin(record: Mapping[str, Any]) -> str:
    hardware = record["hardware"]
    libraries = ", ".join(f"{name} {record['versions'][name]}" for name in ("python", "jax", "flax", "lm_eval"))
    return (
        f"Measured on {record['date'][:10]} at commit {record['revision']} on {hardware['cpu']}, {hardware['cores']} "
        f"cores (load {hardware['load']} before); {libraries}."
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _right(head: Sequence[str]) -> list[str]:
    return ["---:"] * (len(head) - 2)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

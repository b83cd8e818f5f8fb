"""The rows of the compile report. Each row is about a model, a slice, a rank and a batch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mlora_jax.compile_report.layout import Layout, choose_layout
from mlora_jax.compile_report.programs import Programs, base_bytes
from mlora_jax.compile_report.records import Record, Records, measure
from mlora_jax.compile_report.shapes import model_shape
from mlora_jax.config_type import ConfigDict
from mlora_jax.evaluate.programs import STEPS
from mlora_jax.parallel.chips import Slice, topology
from mlora_jax.trials import expand_trials

LARGEST = "largest"
PROGRAMS = ("train", "prefill", "decode")
# The config groups that affect a program, besides the values of the row.
DECIDING = ("adapter", "train", "methods", "parallel")
ATTEMPTS = 6  # the number of compilations in the search for the largest batch
ENOUGH = 0.85  # the share of the memory for activations at which a batch is called the largest


@dataclasses.dataclass(frozen=True)
class Row:
    """The subject of one row of the report.

    Attributes:
      model: the path of the model.
      topology: the name of the slice.
      rank: R.
      batch: the number of sequences in a step, or `LARGEST` for the largest that fits in one micro-batch.
    """

    model: str
    topology: str
    rank: int
    batch: int | str


@dataclasses.dataclass(frozen=True)
class Result:
    """A row and its results.

    Attributes:
      row: the row that was asked for.
      chips: the number of chips of the slice.
      layout: the layout of the training step.
      records: program -> its record.
      requests: the number of rows of prefill and decode on all chips.
    """

    row: Row
    chips: int
    layout: Layout
    records: dict[str, Record]
    requests: int


class Reporter:
    """Compiles the programs of rows, each program once.

    Args:
      config: the resolved config; the rows replace its model, ranks and batch size.
      records: the records of earlier runs, to which new ones are added.
      flash_from: the number of tokens from which attention uses the flash kernel; None never uses it.
      programs: the programs to compile, a selection of `PROGRAMS`.
      say: a function that is called with a line of text before every compilation.
      slices: name -> slice.
    """

    def __init__(
        self,
        config: ConfigDict,
        records: Records,
        *,
        flash_from: int | None,
        programs: Sequence[str] = PROGRAMS,
        say: Callable[[str], None] = lambda line: None,
        slices: Callable[[str], Slice] = topology,
    ) -> None:
        self._config, self._records, self._flash_from, self._say = config, records, flash_from, say
        self._programs = programs
        self._slice = functools.cache(slices)
        self._shape = functools.cache(model_shape)
        self._base_bytes = functools.cache(lambda model: base_bytes(config, self._shape(model)))
        self._made = functools.lru_cache(maxsize=4)(self._make)

    def result(self, row: Row) -> Result:
        """Returns the records of one row.

        Args:
          row: the row.

        Raises:
          ValueError: the topology or the model is unknown, or the mesh cannot shard the batch.
        """
        slice_ = self._slice(row.topology)
        options = self._config.train
        batch = options.batch_size if isinstance(row.batch, str) else row.batch
        layout, train = self._layout(row, batch, options.accumulation), None
        if row.batch == LARGEST:
            layout, train = self._largest(row, layout)
        elif "train" in self._programs:
            train = self._train(row, layout)
        records = {"train": train} if train is not None and "train" in self._programs else {}
        shards = slice_.count // layout.sizes["tensor"]
        requests = math.ceil(self._config.evaluation.batch_size / shards) * shards
        for name in self._programs:
            if name != "train":
                records[name] = self._generation(name, row, layout, requests)
        return Result(row, slice_.count, layout, records, requests)

    def _layout(self, row: Row, batch: int, accumulation: int) -> Layout:
        slice_ = self._slice(row.topology)
        sizes = dict(base_bytes=self._base_bytes(row.model), memory=slice_.chip.memory)
        return choose_layout(
            self._config.parallel, chips=len(slice_.devices), batch=batch, accumulation=accumulation, **sizes
        )

    def _largest(self, row: Row, first: Layout) -> tuple[Layout, Record]:
        """Finds the largest batch that fits in one micro-batch.

        The search changes the number of rows on every chip, in which memory is nearly linear.
        """

        def attempt(rows: int) -> Record:
            found[rows] = self._train(row, layout(rows))
            return found[rows]

        def layout(rows: int) -> Layout:
            return dataclasses.replace(first, batch=rows * first.row_shards, accumulation=1)

        found: dict[int, Record] = {}
        attempt(first.rows * first.accumulation)
        ((_, record),) = found.items()
        held = record.parameters + record.optimizer
        room = record.limit - held
        for _ in range(ATTEMPTS):
            low = max((rows for rows in found if found[rows].within), default=0)
            high = min((rows for rows in found if not found[rows].within), default=None)
            if high is not None and high - low <= max(1, low // 32):
                break
            if low and found[low].needed >= held + ENOUGH * room:
                break
            target = held + (1 + ENOUGH) / 2 * room
            if high is None:
                attempt(max(low + 1, _meet(found, 0, low, target)))
            else:
                guess, step = _meet(found, low, high, target), max(1, (high - low) // 8)
                attempt(min(max(guess, low + step), high - step))
        fitting = [n for n in found if found[n].within]
        rows = max(fitting, default=min(found))
        return layout(rows), found[rows]

    def _train(self, row: Row, layout: Layout) -> Record:
        programs = self._of(row, layout)
        parameters, optimizer = self._held(row, layout)
        key = self._key(row, layout, "train") | {
            "batch": layout.batch,
            "accumulation": layout.accumulation,
            "answers": self._config.data.max_length // 2,
        }
        return self._record(
            key,
            row,
            lambda: programs().train(layout.batch, layout.accumulation),
            parameters=parameters,
            optimizer=optimizer,
        )

    def _generation(self, name: str, row: Row, layout: Layout, requests: int) -> Record:
        programs = self._of(row, layout)
        parameters, _ = self._held(row, layout)
        new = self._config.evaluation.max_new_tokens
        key = self._key(row, layout, name) | {"requests": requests, "new_tokens": new}
        compiled = lambda: getattr(programs(), name)(requests)  # noqa: E731
        runs = STEPS if name == "decode" else 1
        return self._record(key, row, compiled, parameters=parameters, optimizer=0, runs=runs)

    def _record(self, key: dict[str, Any], row: Row, compiled, **options) -> Record:
        def make():
            shown = ", ".join(f"{name} {value}" for name, value in key.items() if name != "config")
            self._say(f"compiling {shown}")
            return measure(key, compiled, self._slice(row.topology), **options)

        return self._records.get(key, make)

    def _key(self, row: Row, layout: Layout, program: str) -> dict[str, Any]:
        config = {name: self._config[name] for name in DECIDING} | {"dtype": self._config.model.dtype}
        config["method"] = expand_trials(self._config)[0].method
        config = json.dumps(config, sort_keys=True, default=lambda node: node.to_dict())
        return {
            "program": program,
            "model": row.model,
            "topology": row.topology,
            "rank": row.rank,
            "mesh": dict(layout.sizes),
            "length": self._config.data.max_length,
            "flash_from": self._flash_from,
            "jax": jax.__version__,
            # jax defines its options at run time.
            "effort": jax.config.jax_exec_time_optimization_effort,  # pyright: ignore[reportAttributeAccessIssue]
            "config": hashlib.sha256(config.encode()).hexdigest()[:12],
        }

    def _of(self, row: Row, layout: Layout) -> Callable[[], Programs]:
        return functools.partial(self._made, row.model, row.topology, row.rank, tuple(layout.sizes.items()))

    def _make(self, model: str, topology_: str, rank: int, sizes: tuple) -> Programs:
        shape, slice_ = self._shape(model), self._slice(topology_)
        return Programs(self._config, shape, rank, slice_, dict(sizes), self._flash_from)

    def _held(self, row: Row, layout: Layout) -> tuple[int, int]:
        """Returns the bytes on one chip of the base, and those of adapter, moments and counts."""
        programs = self._of(row, layout)()
        base = programs.weights(programs.model.base)
        return _bytes_on_one(base), _bytes_on_one(programs.state(layout.trials))


def _bytes_on_one(tree) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _meet(found: dict[int, Record], low: int, high: int, target: float) -> int:
    """Returns the number of rows at which a line through two measurements meets a number of bytes.

    If `low` is 0, there is no measurement for it; parameters and optimizer are what no rows need.
    """
    above = found[high].needed
    below = found[low].needed if low else found[high].parameters + found[high].optimizer
    slope = max((above - below) / (high - low), 1.0)
    return int(low + (target - below) / slope)

"""Records of the memory and time that a compiled program takes, which a later run of the same command reuses."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlora_jax.models.flash import product_flops
from mlora_jax.parallel.chips import GIB, Slice
from mlora_jax.parallel.hlo import Costs, program_costs
from mlora_jax.parallel.hlo_text import Shape

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_MUCH = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)


def _flash_flops(products: int, operands: Sequence[Shape]) -> float:
    """Counts the FLOPs of a kernel whose first operand with heads is the queries [..., H, T, Hd]."""
    *heads, length, features = next(each.sizes for each in operands if each.dtype in ("bf16", "f32"))
    return products * product_flops(math.prod(heads), length, features)


# The matrix products of jax's splash attention kernels. fwd: scores and mixture. dq: scores, and the gradients of
# scores and queries. dkv: scores, and the gradients of scores, values and keys.
FLASH = {
    "splash_mha_fwd": functools.partial(_flash_flops, 2),
    "splash_mha_dq": functools.partial(_flash_flops, 3),
    "splash_mha_dkv": functools.partial(_flash_flops, 4),
}


@dataclasses.dataclass(frozen=True)
class Record:
    """One program on one slice; bytes, FLOPs and seconds are those of one chip and one run of the program.

    Attributes:
      key: what was compiled: model, topology, program, rank, batch, mesh and so on.
      fits: whether the compiler found room for the program.
      needed: the bytes of memory at the peak.
      limit: the bytes that the compiler may use, or the memory of the chip if the compiler did not say.
      parameters: the bytes of the frozen base.
      optimizer: the bytes of factors, moments and counts.
      activations: the bytes of intermediate values, of results that replace no argument, and of the program.
      flops, main_bytes, moved: see `mlora_jax.parallel.hlo.Costs`; None if the program does not fit.
      collectives: for each collective [kind, devices in a group, runs, bytes moved].
      seconds: "compute", "HBM" and "interconnect" -> the least time that each of them takes.
      notes: sentences about what the counts leave out.
      compile_seconds: the time that compilation took on this machine.
    """

    key: dict[str, Any]
    fits: bool
    needed: int
    limit: int
    parameters: int
    optimizer: int
    activations: int
    flops: float | None = None
    main_bytes: float | None = None
    moved: float | None = None
    collectives: list[list] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0

    @property
    def within(self) -> bool:
        """Whether the program needs at most `limit`; the compiler may find room for a little more."""
        return self.fits and self.needed <= self.limit

    @property
    def bound(self) -> str:
        """The resource that bounds the time of the program: "compute", "HBM" or "interconnect"."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def step_seconds(self) -> float:
        """The least time of a run by the roofline; a program that overlaps nothing takes the sum of `seconds`."""
        return self.seconds[self.bound]


class Records:
    """The records by their keys, stored as JSON lines.

    Args:
      path: the file; None keeps the records in memory.
    """

    def __init__(self, path: str | pathlib.Path | None = None) -> None:
        self._path = pathlib.Path(path) if path else None
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path and self._path.is_file() else []
        self._found = {_name(each["key"]): Record(**each) for each in map(json.loads, filter(str.strip, lines))}

    def get(self, key: Mapping[str, Any], make: Callable[[], Record]) -> Record:
        """Returns the record of a key.

        Args:
          key: what is compiled.
          make: makes the record if there is none yet.
        """
        name = _name(key)
        if name not in self._found:
            record = self._found[name] = make()
            if self._path:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(dataclasses.asdict(record)) + "\n")
        return self._found[name]


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def measure(
    key: Mapping[str, Any],
    compile_program: Callable[[], jax.stages.Compiled],
    slice_: Slice,
    *,
    parameters: int,
    optimizer: int,
    runs: int = 1,
) -> Record:
    """Compiles a program and measures what it takes.

    Args:
      key: the key of the record.
      compile_program: compiles the program; raises `jax.errors.JaxRuntimeError` if the memory does not suffice.
      slice_: the slice for which the program is compiled.
      parameters: the bytes of the frozen base on one chip.
      optimizer: the bytes of factors, moments and counts on one chip.
      runs: how often a loop runs whose length is not in the program; the record is that of one run of its body.

    Raises:
      ValueError: the program does not compile, for another reason than memory.
      RuntimeError: the compiler reports no program text or no memory.
    """
    start, chip = time.monotonic(), slice_.chip
    try:
        compiled = compile_program()
    except jax.errors.JaxRuntimeError as error:
        needed, limit = out_of_memory(str(error))
        rest = needed - parameters - optimizer
        return Record(dict(key), False, needed, limit, parameters, optimizer, rest)
    elapsed = time.monotonic() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise RuntimeError(f"the compiler for {chip.name} reports no program text or no memory")
    costs = program_costs(text, open_trips=runs, kernels=FLASH)
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    share = slice_.per_device
    flops = costs.flops / runs
    return Record(
        key=dict(key),
        fits=True,
        needed=needed,
        limit=usable_memory(slice_),
        parameters=parameters,
        optimizer=optimizer,
        activations=needed - parameters - optimizer,
        flops=flops,
        main_bytes=costs.main_bytes / runs,
        moved=costs.moved_bytes / runs,
        collectives=[[each.kind, each.group, each.count / runs, each.moved / runs] for each in costs.traffic],
        seconds={
            "compute": flops / (chip.flops * share),
            "HBM": costs.main_bytes / runs / (chip.memory_bandwidth * share),
            "interconnect": costs.moved_bytes / runs / (chip.link_bandwidth * share),
        },
        notes=_notes(costs, runs),
        compile_seconds=elapsed,
    )


@functools.cache
def usable_memory(slice_: Slice) -> int:
    """Returns the bytes of one device that the compiler gives to programs, which are a little less than a chip has.

    Args:
      slice_: the slice of chips.
    """
    memory = int(slice_.chip.memory * slice_.per_device)
    device = jax.sharding.SingleDeviceSharding(slice_.devices[0])
    too_many = jax.ShapeDtypeStruct((2, memory), jnp.int8, sharding=device)
    try:
        jax.jit(lambda x: x + 1).lower(too_many).compile()
    except jax.errors.JaxRuntimeError as error:
        return out_of_memory(str(error))[1]
    return memory  # this compiler does not check memory


def _notes(costs: Costs, runs: int) -> list[str]:
    notes = []
    if costs.open_loops and runs == 1:
        notes.append(f"{costs.open_loops} loops of unknown length are counted once")
    if costs.silent_kernels:
        names = ", ".join(sorted(costs.silent_kernels))
        notes.append(f"FLOPs of the kernels {names} are not counted")
    return notes


def out_of_memory(message: str) -> tuple[int, int]:
    """Reads the bytes that a program needs and the bytes that there are from the compiler's error.

    Args:
      message: the text of the error.

    Raises:
      ValueError: the error has another cause.

    >>> out_of_memory("Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded ...")
    (21474836480, 16911433728)
    """
    found = next(filter(None, (pattern.search(message) for pattern in _TOO_MUCH)), None)
    if not found:
        raise ValueError(f"the program does not compile: {message[:2000]}")
    amounts = (found[1], found[2]), (found[3], found[4])
    needed, limit = (int(float(number) * _UNITS[unit]) for number, unit in amounts)
    return needed, limit


def too_large(record: Record, *, row_shards: int, rows: int, micro_batches: int) -> str:
    """Returns a sentence about why a program does not fit, and what to change in the config.

    Args:
      record: the record of a program that does not fit.
      row_shards: the number of shards of the rows of a micro-batch.
      rows: the number of rows of a micro-batch on one chip.
      micro_batches: the number of micro-batches in a step.
    """
    lacking = record.needed - record.limit
    text = (
        f"does not fit: {record.needed / GIB:.2f} GiB of {record.limit / GIB:.2f} GiB on every chip, "
        f"{lacking / GIB:.2f} GiB too much"
    )
    if record.parameters + record.optimizer > 0.5 * record.limit:
        held = (record.parameters + record.optimizer) / GIB
        return f"{text}; base, adapter and optimizer are {held:.2f} GiB of it: raise config.parallel.fsdp"
    if rows > 1:
        return (
            f"{text}; activations of {rows} rows at a time are {record.activations / GIB:.2f} GiB of it: raise "
            f"config.parallel.data, or config.train.accumulation above {micro_batches}"
        )
    return (
        f"{text}; activations of one row are {record.activations / GIB:.2f} GiB of it: raise config.parallel.tensor, "
        "lower config.data.max_length or config.train.loss_chunk, or set config.train.remat='full'"
    )

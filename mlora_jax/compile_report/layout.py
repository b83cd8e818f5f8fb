"""Chooses the mesh, the micro-batches and the trials on a slice where the config leaves them open."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from mlora_jax.parallel.mesh import AXES, mesh_sizes

# The share of a chip's memory that the frozen base may take before it is sharded along fsdp.
BASE_SHARE = 0.25
OPEN = {"trial": 1, "data": -1, "fsdp": 1, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of a training step on a slice.

    Attributes:
      sizes: axis of the mesh -> its size.
      batch: the number of sequences in a step of one trial.
      accumulation: the number of micro-batches in a step.
      chosen: whether the config left the axes open.
    """

    sizes: Mapping[str, int]
    batch: int
    accumulation: int
    chosen: bool

    @property
    def row_shards(self) -> int:
        """The number of shards of the rows of a micro-batch."""
        return self.sizes["data"] * self.sizes["fsdp"]

    @property
    def rows(self) -> int:
        """The number of rows of a micro-batch on one chip."""
        return self.batch // self.accumulation // self.row_shards

    @property
    def trials(self) -> int:
        """K, with one trial on each part of the trial axis."""
        return self.sizes["trial"]


def choose_layout(
    parallel: Mapping[str, int], *, chips: int, batch: int, accumulation: int, base_bytes: int, memory: int
) -> Layout:
    """Returns the layout that a config asks for, or chooses one if the config leaves the axes open.

    The chosen mesh shards the base along `fsdp` until it takes a quarter of a chip's memory and shards the rows along
    `data` with the remaining chips. If there are more chips than rows, several trials train side by side. If a
    micro-batch of the config has fewer rows than there are chips, the micro-batches become larger.

    Args:
      parallel: `config.parallel`.
      chips: the number of chips of the slice.
      batch: the number of sequences in a step.
      accumulation: the config's number of micro-batches.
      base_bytes: the bytes of the frozen base.
      memory: the memory of a chip in bytes.

    Raises:
      ValueError: the axes do not fit the slice, or the rows cannot be cut into so many shards.

    >>> open_axes = {"trial": 1, "data": -1, "fsdp": 1, "tensor": 1}
    >>> dict(choose_layout(open_axes, chips=64, batch=32, accumulation=8, base_bytes=16, memory=16).sizes)
    {'trial': 2, 'data': 8, 'fsdp': 4, 'tensor': 1}
    """
    sizes: dict[str, int]
    chosen = all(parallel.get(axis, size) == size for axis, size in OPEN.items())
    if chosen:
        shards = math.gcd(chips, batch)
        divisors = [size for size in range(1, shards + 1) if shards % size == 0]
        fsdp = next((size for size in divisors if base_bytes / size <= BASE_SHARE * memory), shards)
        tensor = next((size for size in _divisors(chips // shards) if base_bytes / fsdp / size <= memory / 2), 1)
        sizes = dict(zip(AXES, (chips // shards // tensor, shards // fsdp, fsdp, tensor), strict=True))
    else:
        sizes = mesh_sizes(parallel, chips)
    shards = sizes["data"] * sizes["fsdp"]
    if batch % shards:
        raise ValueError(
            f"a batch of {batch} cannot be cut into data {sizes['data']} x fsdp {sizes['fsdp']} = {shards} parts: give "
            f"config.parallel axes whose product divides it, or a batch that is a multiple of {shards}"
        )
    parts = [count for count in _divisors(batch // shards) if count <= accumulation]
    return Layout(sizes, batch, parts[-1], chosen)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]

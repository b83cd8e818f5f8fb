"""How work is laid out on a slice where the config leaves it open: mesh, micro-batches, trials."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from mlora_jax.parallel.mesh import AXES, mesh_sizes

# The share of a chip's memory that the frozen base may take before it is cut along fsdp.
BASE_SHARE = 0.25
OPEN = {"trial": 1, "data": -1, "fsdp": 1, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a train step is compiled with.

    Attributes:
      sizes: of the axes of the mesh.
      batch: sequences of a step of one trial.
      accumulation: micro-batches of a step.
      chosen: whether the config left the axes open.
    """

    sizes: Mapping[str, int]
    batch: int
    accumulation: int
    chosen: bool

    @property
    def row_shards(self) -> int:
        """Parts that the rows of a micro-batch are cut into."""
        return self.sizes["data"] * self.sizes["fsdp"]

    @property
    def rows(self) -> int:
        """Of a micro-batch on one chip."""
        return self.batch // self.accumulation // self.row_shards

    @property
    def trials(self) -> int:
        """K: one on each part of the trial axis."""
        return self.sizes["trial"]


def choose_layout(
    parallel: Mapping[str, int], *, chips: int, batch: int, accumulation: int, base_bytes: int, memory: int
) -> Layout:
    """The mesh that a config asks for, or one that suits.

    That one cuts the base along `fsdp` until it takes a quarter of a chip's memory, lays the rows along `data` for the
    rest, and puts more trials beside each other where there are more chips than rows. The micro-batches become larger
    than the config's where there would be fewer rows than chips.

    Args:
      parallel: `config.parallel`.
      chips: of the slice.
      batch: sequences of a step.
      accumulation: the config's.
      base_bytes: of the frozen base.
      memory: of a chip, bytes.

    Raises:
      ValueError: axes that do not fit the slice, or rows that cannot be cut into so many parts.

    >>> open_axes = {"trial": 1, "data": -1, "fsdp": 1, "tensor": 1}
    >>> dict(choose_layout(open_axes, chips=64, batch=32, accumulation=8, base_bytes=16, memory=16).sizes)
    {'trial': 2, 'data': 8, 'fsdp': 4, 'tensor': 1}
    """
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

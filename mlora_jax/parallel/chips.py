"""The published numbers of TPU chips, and slices to compile programs for. Neither needs a TPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip.

    Attributes:
      name: the name that topologies begin with, such as v5e.
      flops: the peak rate of dense bfloat16 products, FLOP/s.
      memory: the memory of the chip, bytes; the compiler reserves some of it.
      memory_bandwidth: the rate of the main memory, bytes/s.
      link_bandwidth: the rate of all links to other chips together, bytes/s in one direction.
      axes: the number of axes of the torus.
      source: where the numbers are published.
    """

    name: str
    flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    axes: int
    source: str


_DOCS = "https://cloud.google.com/tpu/docs"
# Bidirectional rates are halved: in a ring, a chip sends as much as it receives.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # 197 TFLOPs, 16 GB, 819 GBps, 400 GBps bidirectional.
        Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9, 2, f"{_DOCS}/v5e"),
        # 918 TFLOPs, 32 GB, 1638 GBps, 800 GBps bidirectional.
        Chip("v6e", 918e12, 32 * GIB, 1638e9, 400e9, 2, f"{_DOCS}/v6e"),
        # 459 TFLOPs, 95 GiB, 2765 GBps, 1200 GBps bidirectional.
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, 3, f"{_DOCS}/v5p"),
        # 275 TFLOPs, 32 GiB, 1200 GBps; six links of 50 GB/s, from Jouppi et al. (arXiv 2304.01433).
        Chip("v4", 275e12, 32 * GIB, 1200e9, 300e9, 3, f"{_DOCS}/v4"),
    )
}
# Without these settings the TPU compiler looks for chips, asks a metadata server, and serves one process at a time.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # the compiler needs a value, but the topology's name decides
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are wired together.

    Attributes:
      name: the topology, such as v5e:4x4.
      chip: the kind of the chips.
      count: the number of chips.
      devices: descriptions of devices; programs can be compiled for them, but cannot run on them.
    """

    name: str
    chip: Chip
    count: int
    devices: tuple[jax.Device, ...]  # pyright: ignore[reportInvalidTypeForm]  jax exports the class as a variable

    @property
    def per_device(self) -> float:
        """The number of chips per device: 1, or less for chips whose cores are separate devices."""
        return self.count / len(self.devices)


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Returns the chip and the shape of a slice.

    Args:
      name: the topology, such as v5e:4x4.

    Raises:
      ValueError: the chip is unknown, or the shape is malformed.

    >>> chip, shape = parse_topology("v5e:4x4")
    >>> chip.name, shape
    ('v5e', (4, 4))
    """
    kind, _, sizes = name.partition(":")
    axes = CHIPS[kind].axes if kind in CHIPS else 0
    if not axes or not re.fullmatch("x".join([r"[1-9]\d*"] * axes), sizes):
        shapes = ", ".join(f"{chip.name}:{'x'.join('2' * chip.axes)}" for chip in CHIPS.values())
        raise ValueError(
            f"unknown topology {name!r}: it must be a chip and the shape of its slice, like {shapes} or v5e:16x16"
        )
    return CHIPS[kind], tuple(int(size) for size in sizes.split("x"))


def topology(name: str) -> Slice:
    """Returns a slice to compile for, as the TPU compiler in the `libtpu` wheel describes it.

    Args:
      name: the topology, such as v5e:16x16.

    Raises:
      ModuleNotFoundError: the TPU compiler is not installed.
      ValueError: the name is malformed, or the compiler does not know the topology.
    """
    chip, shape = parse_topology(name)
    if not has_compiler():
        raise ModuleNotFoundError(
            "the TPU compiler is not installed: pip install 'mlora_jax[tpu]', or name its file in TPU_LIBRARY_PATH"
        )
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"the TPU compiler does not know the topology {name!r}: {error}") from None
    return Slice(name, chip, math.prod(shape), tuple(found.devices))


def has_compiler() -> bool:
    """Whether the TPU compiler is installed."""
    return bool(os.environ.get("TPU_LIBRARY_PATH")) or importlib.util.find_spec("libtpu") is not None

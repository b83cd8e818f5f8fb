"""The mesh of devices that a run is laid out on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

# From the slowest links to the fastest, as devices are numbered: neighbours on the tensor axis talk in every layer.
AXES = ("trial", "data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # of a training batch
EVALUATED = ("trial", "data", "fsdp")  # of requests: one adapter at a time is evaluated


def mesh_sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The size of every axis.

    Args:
      sizes: of `AXES`; at most one is -1 and takes what the others leave. Other keys are not looked at.
      count: devices.

    Raises:
      ValueError: a size that is neither -1 nor positive, two of -1, or sizes that do not use all devices.

    >>> mesh_sizes({"trial": 1, "data": -1, "fsdp": 4, "tensor": 1}, 8)
    {'trial': 1, 'data': 2, 'fsdp': 4, 'tensor': 1}
    """
    found = {axis: sizes[axis] for axis in AXES}
    for axis, size in found.items():
        if size < 1 and size != -1:
            raise ValueError(
                f"config.parallel.{axis} must be at least 1, or -1 for the rest of the devices; got {size}"
            )
    open_axes = [axis for axis, size in found.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"config.parallel.{' and config.parallel.'.join(open_axes)} are both -1: give all but one")
    fixed = math.prod(size for size in found.values() if size != -1)
    if count % fixed or (not open_axes and count != fixed):
        shown = " x ".join(f"{axis} {size}" for axis, size in found.items() if size != -1)
        raise ValueError(f"config.parallel asks for {shown} = {fixed} devices, and there are {count}")
    return {axis: count // fixed if size == -1 else size for axis, size in found.items()}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all of `AXES`.

    Args:
      sizes: as `mesh_sizes` takes them.
      devices: None are all there are, of every process.

    Raises:
      ValueError: as `mesh_sizes`.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(mesh_sizes(sizes, len(devices)).values())
    if devices[0].platform == "tpu" and len(devices) > 1:
        kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
        # Along the wires of the torus; devices that are no box in it, some being idle, have no such order.
        with contextlib.suppress(AssertionError, NotImplementedError, ValueError):
            return jax.make_mesh(shape, AXES, devices=devices, axis_types=kinds)
    return Mesh(np.asarray(devices, object).reshape(shape), AXES)


def shards_of(mesh: Mesh | None, axes: tuple[str, ...] = ROWS) -> int:
    """How many parts an array has whose axis lies along these axes of the mesh; 1 without one."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)

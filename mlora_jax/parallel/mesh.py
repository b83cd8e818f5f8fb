"""The mesh of the devices of a run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

# The axes are ordered from the slowest links to the fastest, as devices are numbered: neighbours on the tensor axis
# communicate in every layer.
AXES = ("trial", "data", "fsdp", "tensor")
# The axes that the rows of a training batch are sharded over.
ROWS = ("data", "fsdp")
# The axes that requests of an evaluation are sharded over; adapters are evaluated one at a time.
EVALUATED = ("trial", "data", "fsdp")


def mesh_sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Returns the size of every axis of the mesh.

    Args:
      sizes: the size of each of `AXES`. At most one is -1, which stands for all devices that the others leave. Other
        keys are ignored.
      count: the number of devices.

    Raises:
      ValueError: a size is neither -1 nor positive, two sizes are -1, or the sizes do not use all devices.

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


def make_mesh(
    sizes: Mapping[str, int],
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]  jax exports it as a variable
) -> Mesh:
    """Makes a mesh with all of `AXES`.

    Args:
      sizes: the size of each axis, as in `mesh_sizes`.
      devices: the devices of the mesh; None stands for all devices of all processes.

    Raises:
      ValueError: the sizes do not fit, see `mesh_sizes`.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(mesh_sizes(sizes, len(devices)).values())
    if devices[0].platform == "tpu" and len(devices) > 1:
        kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
        # jax orders devices along the wires of the torus. It has no order for devices that do not fill a box of it.
        with contextlib.suppress(AssertionError, NotImplementedError, ValueError):
            return jax.make_mesh(shape, AXES, devices=devices, axis_types=kinds)
    return Mesh(np.asarray(devices, object).reshape(shape), AXES)


def shards_of(mesh: Mesh | None, axes: tuple[str, ...] = ROWS) -> int:
    """Returns how many parts an axis is cut into if it is sharded over these axes of the mesh; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)

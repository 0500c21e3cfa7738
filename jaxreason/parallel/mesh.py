"""The device mesh: axis names, and a shape that must fit the devices."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")  # outermost first: tensor neighbours share the fastest links


def resolve_shape(shape: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """The size of every axis, with one -1 replaced by what is left.

    Raises ValueError naming the axis and both numbers when the shape does not fit the devices.
    """
    unknown = set(shape) - set(AXES)
    if unknown:
        raise ValueError(f"mesh.shape has axis {sorted(unknown)[0]!r}; axes are {', '.join(AXES)}")
    sizes = {axis: shape.get(axis, 1) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(
                f"mesh.shape.{axis} is {size}; it must be at least 1, or -1 for the rest"
            )
    if len(free) > 1:
        raise ValueError(
            f"mesh.shape has -1 for {' and '.join(free)}; only one axis can take the rest"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if num_devices % known:
            raise ValueError(
                f"mesh.shape: {num_devices} devices are not a multiple of {known}, "
                f"the product of the other axes, so {free[0]} cannot take the rest"
            )
        sizes[free[0]] = num_devices // known
    elif known != num_devices:
        raise ValueError(f"mesh.shape {sizes} needs {known} devices, but there are {num_devices}")
    return sizes


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all `devices` (default: all there are) with the axes of `AXES`."""
    devices = jax.devices() if devices is None else devices
    sizes = resolve_shape(shape, len(devices))
    grid = np.asarray(devices).reshape(tuple(sizes.values()))
    # jax.make_mesh defaults to Explicit axes; the compiler places collectives only for Auto ones.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))

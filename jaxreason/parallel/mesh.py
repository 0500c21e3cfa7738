"""The device mesh: axis names, a shape that must fit the devices, a layout that suits their links.

Axes, outermost first; the further in, the more often its devices speak:
  data     whole copies of the weights; gradients are summed once a step
  fsdp     weights, gradients and optimizer state are split, and gathered layer by layer
  expert   splits rows as fsdp does, and experts besides: tokens are exchanged in every layer
  context  splits the length of a row: keys and values pass around in every layer
  tensor   splits heads, MLPs and the vocabulary: activations are exchanged twice a layer
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "expert", "context", "tensor")


def platform(mesh: Mesh | None) -> str:
    """Of the devices: cpu | gpu | cuda | tpu."""
    return (jax.devices() if mesh is None else mesh.devices.flat)[0].platform


def capability(mesh: Mesh | None) -> str | None:
    """Compute capability of the devices, as in 9.0; None of those that are no NVIDIA GPUs."""
    device = (jax.devices() if mesh is None else mesh.devices.flat)[0]
    return getattr(device, "compute_capability", None)


def resolve_shape(shape: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """The size of every axis, with one -1 replaced by what is left.

    Raises ValueError naming the axis, both numbers and what would fit when the shape does not fit
    the devices.
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
                f"mesh.shape: {num_devices} devices are not a multiple of {known}, the product of "
                f"the other axes, so {free[0]} cannot take the rest; the product can be "
                f"{', '.join(str(n) for n in range(1, num_devices + 1) if num_devices % n == 0)}"
            )
        sizes[free[0]] = num_devices // known
    elif known != num_devices:
        raise ValueError(
            f"mesh.shape {sizes} needs {known} devices, but there are {num_devices}; set axes "
            f"whose product is {num_devices}, one of them to -1 for what the others leave"
        )
    return sizes


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all `devices` (default: all there are) with the axes of `AXES`.

    Inner axes take neighbours: GPUs of one host before those of another, TPUs along the torus of
    their slice before those of another slice.
    """
    devices = jax.devices() if devices is None else devices
    sizes = tuple(resolve_shape(shape, len(devices)).values())
    # jax.make_mesh defaults to Explicit axes; the compiler places collectives only for Auto ones.
    return Mesh(_grid(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the mesh's shape, those with fast links between them side by side."""
    islands: dict[int, list[jax.Device]] = {}  # by fast links: TPU slices, NVLink domains
    for device in devices:
        islands.setdefault(getattr(device, "slice_index", 0), []).append(device)
    across = _outermost(sizes, len(islands))
    within = tuple(size // outer for size, outer in zip(sizes, across))
    if devices[0].platform != "tpu" or math.prod(across) != len(islands):
        nearby = lambda device: (getattr(device, "slice_index", 0), device.process_index, device.id)
        return np.asarray(sorted(devices, key=nearby)).reshape(sizes)
    grids = [
        mesh_utils.create_device_mesh(within, islands[i], allow_split_physical_axes=True)
        for i in sorted(islands)
    ]
    outer = np.asarray(grids).reshape(*across, *within)
    order = [axis for i in range(len(sizes)) for axis in (i, len(sizes) + i)]
    return outer.transpose(order).reshape(sizes)


def _outermost(sizes: tuple[int, ...], islands: int) -> tuple[int, ...]:
    """How many ways each axis is cut between islands, as far out as it goes."""
    across = []
    for size in sizes:
        across.append(math.gcd(size, islands))
        islands //= across[-1]
    return tuple(across)

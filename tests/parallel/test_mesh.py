"""A mesh that fits, and an error with both numbers where it does not."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec

from jaxreason.parallel import hosts, rules
from jaxreason.parallel.mesh import AXES, _grid, make_mesh, resolve_shape


def test_one_axis_takes_the_rest():
    ones = dict.fromkeys(AXES, 1)
    assert resolve_shape({"data": -1}, 8) == {**ones, "data": 8}
    assert resolve_shape({"fsdp": -1, "tensor": 2}, 8) == {**ones, "fsdp": 4, "tensor": 2}
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert mesh.axis_names == AXES and mesh.devices.shape == (2, 2, 1, 1, 2)
    assert mesh.devices.flatten().tolist() == jax.devices()  # tensor neighbours are neighbours


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"model": 2}, "mesh.shape has axis 'model'; axes are data, fsdp, expert, context, tensor"),
        ({"data": 0}, r"mesh.shape.data is 0; it must be at least 1, or -1"),
        ({"data": -1, "fsdp": -1}, "-1 for data and fsdp; only one axis"),
        ({"data": -1, "tensor": 3}, "8 devices are not a multiple of 3.*can be 1, 2, 4, 8$"),
        ({"data": 2, "fsdp": 2}, "needs 4 devices, but there are 8; set axes whose product is 8"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(shape, message):
    with pytest.raises(ValueError, match=message):
        resolve_shape(shape, 8)


def test_rows_are_cut_evenly_or_refused():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    hosts.check_rows(mesh, rows=16, microbatches=2, num_shards=4)
    with pytest.raises(ValueError, match=r"data.rows = 12 is not a multiple of .* = 4 \* 2"):
        hosts.check_rows(mesh, rows=12, microbatches=2, num_shards=4)
    with pytest.raises(ValueError, match=r"= 6 is not a multiple of mesh axes data x .* = 4"):
        hosts.check_rows(mesh, rows=12, microbatches=2, num_shards=2)
    hosts.check_rows(None, rows=3, microbatches=1, num_shards=1)


def test_the_table():
    assert rules.spec(("batch", "length", "heads")) == PartitionSpec(
        ("data", "fsdp", "expert"), "context", "tensor"
    )
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sizes = [rules.axis_size(mesh, name) for name in ("batch", "embed", "length", "residual")]
    assert sizes == [4, 2, 1, 2]
    with pytest.raises(
        ValueError,
        match=r"weight wq: dim 1 \(heads\) = 3 is not a multiple of mesh axis tensor = 2; .* 1, 3$",
    ):
        rules.sharding(mesh, "wq", (4, 3, 8), ("embed", "heads", "head_dim"))


def test_global_rows_are_the_rows_given():
    mesh = make_mesh({"data": 4, "fsdp": 2})
    rows = {"a": np.arange(16).reshape(8, 2), "b": np.arange(8.0)}
    made = hosts.to_global(mesh, rows)
    assert made["a"].sharding.shard_shape((8, 2)) == (1, 2)
    jax.tree.map(np.testing.assert_array_equal, made, rows)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a layout reads of a device."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"


def ids_of(sizes, devices):
    grid = _grid(sizes, devices)
    return np.asarray([device.id for device in grid.flat]).reshape(grid.shape).tolist()


def test_inner_axes_take_neighbours_whatever_order_the_devices_come_in():
    """Four hosts of four GPUs, two hosts to an NVLink domain."""
    devices = [Device(id=i, process_index=i // 4, slice_index=i // 8) for i in range(16)]
    shuffled = [devices[i] for i in np.random.default_rng(0).permutation(16)]
    assert ids_of((2, 2, 4), shuffled) == np.arange(16).reshape(2, 2, 4).tolist()


def test_slices_are_crossed_by_the_outermost_axes(monkeypatch):
    """Two TPU slices of eight: each is laid out by itself, and only `data` goes from one to the
    other."""
    devices = [Device(id=i, process_index=i // 4, slice_index=i // 8, platform="tpu")
               for i in range(16)]  # fmt: skip
    asked = []

    def one_slice(shape, devices, allow_split_physical_axes):
        asked.append(shape)
        return np.asarray(devices[::-1]).reshape(shape)  # a torus has an order of its own

    monkeypatch.setattr(mesh_utils, "create_device_mesh", one_slice)
    ids = np.asarray(ids_of((4, 2, 2), devices))
    assert asked == [(2, 2, 2)] * 2
    assert (ids[:2] < 8).all() and (ids[2:] >= 8).all()
    assert ids[0, 0].tolist() == [7, 6]

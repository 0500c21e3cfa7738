"""Rows and devices of several processes, on meshes whose devices say that they are of several.

What needs real processes is in tests/test_processes.py.
"""

import dataclasses
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxreason.parallel import hosts
from jaxreason.parallel.mesh import AXES, make_mesh
from jaxreason.rollout.parts import pack, unpack
from jaxreason.types import Completion


@dataclasses.dataclass(frozen=True, order=True)
class Device:
    """As much of a jax.Device as a sharding's index map asks for."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def owned(num_processes: int, rows: int, num_shards: int, monkeypatch, **shape: int):
    """{process: its shards} on a mesh of this shape over so many processes."""
    sizes = [shape.get(axis, 1) for axis in AXES]
    per_process = int(np.prod(sizes)) // num_processes
    devices = [Device(i, i // per_process) for i in range(int(np.prod(sizes)))]
    index = dict(zip(devices, np.ndindex(*sizes), strict=True))
    blocks = sizes[0] * sizes[1] * sizes[2]  # data x fsdp x expert

    def index_map(self, shape):
        size = shape[0] // blocks
        block = lambda i: (i[0] * sizes[1] + i[1]) * sizes[2] + i[2]
        return {d: (slice(block(i) * size, (block(i) + 1) * size),) for d, i in index.items()}

    monkeypatch.setattr(jax.sharding.NamedSharding, "devices_indices_map", index_map)
    return hosts._shards(make_mesh({"data": 8}), rows, num_shards)


def test_shards_lie_where_their_rows_do(monkeypatch):
    assert owned(2, 8, 4, monkeypatch, data=4) == {0: (0, 1), 1: (2, 3)}
    # Two processes share each row block where the tensor axis crosses them.
    assert owned(4, 8, 2, monkeypatch, data=2, tensor=4) == {0: (0,), 1: (0,), 2: (1,), 3: (1,)}
    assert owned(2, 8, 1, monkeypatch, tensor=4) == {0: (0,), 1: (0,)}


def test_a_shard_on_two_processes_is_refused_with_what_would_do(monkeypatch):
    with pytest.raises(ValueError, match=r"data\.num_shards is 2, .* holds 4 .* multiple of 4$"):
        owned(4, 16, 2, monkeypatch, data=8)


def test_alone_all_shards_are_ones_own():
    assert hosts.own_shards(make_mesh({"data": 8}), 8, 4) == (0, 1, 2, 3)
    assert hosts.own_shards(None, 8, 4) == (0, 1, 2, 3)


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "tensor": 4}])
def test_rows_arrive_in_order(shape):
    rows = np.arange(16 * 3).reshape(16, 3)
    mesh: Mesh = make_mesh(shape)
    for shards, num_shards in (((0,), 1), ((0, 1, 2, 3), 4)):
        got = hosts.to_global(mesh, {"x": rows}, shards, num_shards)["x"]
        np.testing.assert_array_equal(got, rows)
        assert got.sharding.spec[0] == ("data", "fsdp", "expert")


def test_a_process_has_its_part_of_the_mesh(monkeypatch):
    part = {}
    for number, shape in (
        (1, {"data": 4}), (2, {"data": 4}), (8, {"data": 4, "fsdp": 16, "tensor": 1}),
        (2, {"data": 1, "fsdp": 3, "tensor": 2}),
    ):  # fmt: skip
        monkeypatch.setattr(hosts, "count", lambda number=number: number)
        part[number, *shape.values()] = list(hosts.own_part(shape).values())
    assert part == {(1, 4): [4], (2, 4): [2], (8, 4, 16, 1): [1, 8, 1], (2, 1, 3, 2): [1, 3, 1]}


def test_shares_are_blocks_that_cover_everything(monkeypatch):
    monkeypatch.setattr(hosts, "count", lambda: 3)
    for number in (0, 1, 2, 7, 9):
        dealt = []
        for i in range(3):
            monkeypatch.setattr(hosts, "index", lambda i=i: i)
            dealt += range(number)[hosts.share(number)]
        assert dealt == list(range(number))


def test_alone_nothing_is_exchanged():
    assert hosts.exchange("x", b"mine") == hosts.to_first("x", b"mine") == [b"mine"]
    assert hosts.told(lambda: {"a": 1}) == {"a": 1} and hosts.first(lambda: "value") == "value"
    asked = threading.Event()
    sign = hosts.StopSign("loop", asked)
    assert not (sign.due(1) or sign.agreed() or sign.seen())
    asked.set()
    assert sign.due(1) and sign.agreed() and sign.seen()


def test_a_mistake_that_speaks_of_heartbeats_is_no_loss(monkeypatch):
    lost = jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: Connection reset by peer")
    mistake = ValueError("run.processes.heartbeat is -5; it must be at least 1")
    assert not hosts.is_loss_of_peer(lost)  # alone there is no peer to lose
    assert hosts.is_loss_of_peer(hosts.LostPeer("process 1 did not come"))
    monkeypatch.setattr(hosts, "several", lambda: True)
    assert hosts.is_loss_of_peer(lost) and not hosts.is_loss_of_peer(mistake)


# Process 1 comes once, and then no more.
PAIR = """
import sys, threading, time
from jaxreason.parallel import hosts
from jaxreason.parallel.launchers import Processes

index = int(sys.argv[1])
hosts.connect(Processes(sys.argv[2], 2, index), patience=60)
assert hosts.exchange("here", b"%d" % index) == [b"0", b"1"]
hosts.WAIT = 1.5
if index:
    time.sleep(60)
for name, wait in {
    "exchange": lambda: hosts.exchange("x", b""),
    "to_first": lambda: hosts.to_first("x", b""),
    "told": lambda: hosts.told(lambda: 1),
    "agreed": hosts.StopSign("loop", threading.Event()).agreed,
}.items():
    began = time.monotonic()
    try:
        wait()
    except hosts.LostPeer as error:
        print(name, time.monotonic() - began < 5, error)
hosts.os._exit(0)
"""


def test_a_process_that_does_not_come_is_waited_for_no_longer_than_the_limit():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    start = lambda i: subprocess.Popen(
        [sys.executable, "-c", PAIR, str(i), address], stdout=subprocess.PIPE, text=True
    )
    with start(1) as absent, start(0) as waits:
        said = waits.communicate()[0].splitlines()
        absent.kill()
    assert [line.split()[:2] for line in said] == [
        [name, "True"] for name in ("exchange", "to_first", "told", "agreed")
    ]
    assert all("process 0 waited for the others (" in line for line in said)


def test_completions_travel_unchanged():
    float32 = lambda *values: tuple(float(np.float32(value)) for value in values)
    rows = [
        [
            Completion("3 + 4 = 7", (1, 2, 150_000), float32(-0.1, -2.5, -1e-7), False),
            Completion("\ud800 half", (9,), float32(-3.0), True, (True,)),
        ],
        [],
        [Completion("", (), (), True)],
    ]
    assert unpack(pack(rows)) == rows
    assert unpack(pack([])) == []

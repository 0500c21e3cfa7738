"""How processes find each other before JAX: threads that are as far apart as processes here."""

import concurrent.futures
import socket
import time

import pytest

from jaxreason.parallel.launchers import Processes
from jaxreason.parallel.meeting import LostPeer, meet


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def come(address: str, number: int, indices, patience: float) -> list[str]:
    """What each of these processes says of having met; the later ones come a little later."""

    def one(index: int) -> str:
        time.sleep(0.2 * indices.index(index))
        try:
            meet(Processes(address, number, index), patience)
        except LostPeer as error:
            return str(error)
        return "met"

    with concurrent.futures.ThreadPoolExecutor(len(indices)) as threads:
        return list(threads.map(one, indices))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_all_meet_in_any_order(address, order):
    assert come(address, 3, order, patience=20) == ["met"] * 3


def test_each_that_came_says_who_did_not(address):
    said = come(address, 4, (0, 2), patience=2)
    for index, line in zip((0, 2), said, strict=True):
        assert f"process {index} of 4" in line and f"{address} within" in line
        assert line.endswith("2 of 4 came, missing is process 1, 3")


def test_without_process_0_nobody_answers(address):
    (said,) = come(address, 2, (1,), patience=0.5)
    assert said.endswith(f"{address} within run.processes.patience = 0.5 s: nobody answers there")


def test_who_has_left_is_missing_and_strangers_count_for_nothing(address):
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        first = thread.submit(come, address, 3, (0,), 3)
        time.sleep(0.5)
        for said in (b"process 1 of 3\n", b"process 2 of 5\n", b"GET / HTTP/1.1\r\n\r\n"):
            with socket.create_connection(address.split(":")) as other:
                other.sendall(said)
        assert first.result()[0].endswith("1 of 3 came, missing is process 1, 2")


def test_a_port_that_is_taken_is_named(address):
    port = int(address.split(":")[1])
    with (
        socket.create_server(("", port)),
        pytest.raises(ValueError, match=f"port {port}, .*in use"),
    ):
        meet(Processes(address, 2, 0), 5)

"""Before JAX: all processes meet at the coordinator's address, or each says who is missing.

Process 0 listens there; every other one connects and says its number. Each second process 0 tells
those that wait who is there, at last that all are, and leaves the port to JAX's coordinator.
"""

import contextlib
import re
import selectors
import socket
import time
from collections.abc import Collection

from jaxreason.parallel.launchers import Processes

_ALL = b"all are there\n"
_SILENCE = 5.0  # seconds after which one that says nothing is gone
_AGAIN = 0.3  # seconds until an address that does not answer is tried again


class LostPeer(RuntimeError):
    """Another process ended, or did not come in time."""


def meet(processes: Processes, patience: float) -> None:
    """Returns when all processes are there.

    Args:
      patience: seconds in which they must have come.
    Raises LostPeer where they have not, and ValueError where process 0 cannot listen.
    """
    host, port = processes.coordinator.rsplit(":", 1)
    deadline = time.monotonic() + patience
    if processes.index:
        hello = f"process {processes.index} of {processes.number}\n".encode()
        said = _wait_at((host.strip("[]"), int(port)), hello, deadline)
    else:
        said = _gather(int(port), processes.number, deadline)
    if said:
        raise LostPeer(
            f"process {processes.index} of {processes.number} ({processes.launcher}) did not meet "
            f"the others at {processes.coordinator} within run.processes.patience = {patience} s: "
            f"{said}"
        )


def _gather(port: int, number: int, deadline: float) -> str:
    """In process 0: waits for the others. Who is missing at last; empty where all have come."""
    there: dict[int, socket.socket] = {}
    told = 0.0  # when those that wait last heard
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listening(port, number))
        ready = stack.enter_context(selectors.DefaultSelector())
        ready.register(server, selectors.EVENT_READ)
        while len(there) < number - 1 and time.monotonic() < deadline:
            for key, _ in ready.select(timeout=1):
                if key.fileobj is not server:  # who waits says nothing more: it is gone
                    ready.unregister(key.fileobj)
                    there = {i: waits for i, waits in there.items() if waits is not key.fileobj}
                elif (found := _hello(server, number)) is not None:
                    index, waits = found
                    ready.register(stack.enter_context(waits), selectors.EVENT_READ)
                    there[index] = waits
            said = _who_is_missing(there, number)
            if said and time.monotonic() < told + 1:
                continue
            for waits in there.values():
                with contextlib.suppress(OSError):
                    waits.sendall(f"{said}\n".encode() if said else _ALL)
            told = time.monotonic()
    return said


def _listening(port: int, number: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=number, dualstack_ipv6=both)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port}, where the others are to meet it "
            f"({error.strerror}); set JAX_COORDINATOR_ADDRESS or run.processes.coordinator to "
            "another in all"
        ) from error


def _hello(server: socket.socket, number: int) -> tuple[int, socket.socket] | None:
    """The number of who has connected; None for a stranger."""
    waits, _ = server.accept()
    waits.settimeout(_SILENCE)
    with contextlib.suppress(OSError), waits.makefile("rb") as file:
        said = re.fullmatch(rb"process (\d+) of (\d+)\n", file.readline(100))
        if said and int(said[2]) == number and 0 < int(said[1]) < number:
            return int(said[1]), waits
    waits.close()
    return None


def _who_is_missing(there: Collection[int], number: int) -> str:
    missing = [str(i) for i in range(1, number) if i not in there]
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    come = f"{number - len(missing)} of {number} came, missing is process"
    return f"{come} {', '.join(missing[:8])}{more}" if missing else ""


def _wait_at(address: tuple[str, int], hello: bytes, deadline: float) -> str:
    """In the others: waits until all have come. What was heard last; empty where all have."""
    said = "nobody answers there"
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            left = max(deadline - time.monotonic(), _AGAIN)
            with socket.create_connection(address, min(_SILENCE, left)) as there:
                there.sendall(hello)
                for line in there.makefile("rb"):
                    if line == _ALL:
                        return ""
                    if not re.match(rb"\d+ of \d+ came", line):
                        break  # it is not process 0 that answers
                    said = line.decode().strip()
                    if time.monotonic() > deadline:
                        return said
        time.sleep(_AGAIN)
    return said

"""Several processes as one: meeting, agreeing, and whose rows are whose.

What processes tell each other here goes through the coordinator of jax.distributed, never through
the devices: it has time limits, wants no compilation, and may be called from any thread while the
devices compute. Every process makes the same calls in the same order on a channel.

A process that dies is missed by the coordinator after a heartbeat: JAX then ends all others, with
what happened on stderr. One that lives but never comes is waited for for WAIT seconds.
"""

import collections
import contextlib
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # its client is JAX's, and Orbax's, only way to wait with a limit
from jax.sharding import Mesh, NamedSharding

from jaxreason.parallel import meeting, rules
from jaxreason.parallel.launchers import Processes
from jaxreason.parallel.meeting import LostPeer

WAIT = 3600.0  # seconds: the longest that the slowest process may take over one thing
_LEAVING = 10.0  # seconds that a process which ends for a mistake waits for the others to see it
_PREFIX = "jaxreason"
_counts: dict[str, itertools.count] = collections.defaultdict(itertools.count)  # by channel

T = TypeVar("T")


def connect(processes: Processes, heartbeat: int = 30, patience: int = 300) -> None:
    """Joins the other processes; before any device is touched.

    Args:
      heartbeat: seconds of silence after which a process counts as dead and the others end.
      patience: seconds in which all must have started.
    Raises LostPeer where they have not, and ValueError where process 0 cannot listen.
    """
    handler = signal.getsignal(signal.SIGTERM)
    # JAX aborts the process, with a trace of its own, where one of the others does not come.
    meeting.meet(processes, patience)
    jax.distributed.initialize(
        processes.coordinator,
        processes.number,
        processes.index,
        local_device_ids=processes.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=patience,
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=heartbeat,
    )
    if threading.current_thread() is threading.main_thread():
        # JAX's preemption notice has taken SIGTERM over; the loops here agree by themselves.
        signal.signal(signal.SIGTERM, handler)
    if jax.default_backend() == "cpu":
        # Process 0 alone would find its programs there, and the others compile for longer than the
        # 30 s that Gloo waits for them.
        jax.config.update("jax_enable_compilation_cache", False)


def several() -> bool:
    """Whether there are other processes. Touches no device."""
    return distributed.global_state.client is not None


def is_first() -> bool:
    """Whether this process writes the files of the run."""
    return distributed.global_state.process_id == 0


def index() -> int:
    return distributed.global_state.process_id


def count() -> int:
    return distributed.global_state.num_processes if several() else 1


# --- telling each other ---------------------------------------------------------------------------


def first(action: Callable[[], T]) -> T | None:
    """What process 0 returns from `action` while the others wait; None in those.

    A ValueError of it is raised in all.
    """
    done: list[T] = []
    told(lambda: done.append(action()))
    return done[0] if done else None


def told(make: Callable[[], Any]) -> Any:
    """What `make` gives in process 0, in all; JSON. A ValueError of it is raised in all."""
    if not several():
        return make()
    said = {}
    if is_first():
        try:
            said = {"value": make()}
        except ValueError as error:
            said = {"mistake": str(error)}
    (payload,) = _gathered("told", json.dumps(said).encode(), senders=[0])
    said = json.loads(payload)
    if "mistake" in said:
        raise ValueError(said["mistake"])
    return said["value"]


def exchange(channel: str, payload: bytes) -> list[bytes]:
    """The payloads of all processes, in their order; in all of them."""
    if not several():
        return [payload]
    return _gathered(channel, payload, senders=range(count()))


def to_first(channel: str, payload: bytes) -> list[bytes]:
    """The payloads of all processes in process 0; in the others their own alone."""
    if not several():
        return [payload]
    return _gathered(channel, payload, senders=range(count()), readers=[0])


def _gathered(
    channel: str,
    payload: bytes,
    *,
    senders: Sequence[int],
    readers: Sequence[int] | None = None,
) -> list[bytes]:
    """What the senders sent, where `readers` (None: all) has this process; else its own."""
    key = f"{_PREFIX}/{channel}/{next(_counts[channel])}"
    client, limit = distributed.global_state.client, int(WAIT * 1000)
    try:
        if index() in senders:
            client.key_value_set_bytes(f"{key}/{index()}", payload)
        found = [payload]
        if readers is None or index() in readers:
            get = lambda i: client.blocking_key_value_get_bytes(f"{key}/{i}", limit)
            found = [payload if i == index() else get(i) for i in senders]
        client.wait_at_barrier(key, limit)  # all have read: what was sent can go
        if index() in senders:
            client.key_value_delete(f"{key}/{index()}")
    except jax.errors.JaxRuntimeError as error:
        raise LostPeer(
            f"process {index()} waited for the others ({channel}): {_gist(error)}"
        ) from error
    return found


def share(number: int) -> slice:
    """This process's part of so many things, which are dealt out in blocks."""
    bounds = [number * i // count() for i in range(count() + 1)]
    return slice(bounds[index()], bounds[index() + 1])


class StopSign:
    """One process that is asked to stop (SIGTERM) stops all, after the same step.

    Args:
      name: of the loop; no other has it.
      asked: set where this process was asked.
    """

    def __init__(self, name: str, asked: threading.Event):
        self._key, self._asked = f"{_PREFIX}/stop/{name}", asked
        self._looked = -math.inf  # when `seen` asked the coordinator last, in seconds

    def due(self, step: int) -> bool:
        """Whether all stop after `step`. To be asked after every step, in every process.

        And once the results of the step before are on the host. Then, when one process asked after
        step s, every other finds it after s + 2: the results of s + 1 needed the one that asked.
        """
        if not several():
            return self._asked.is_set()
        last = self._try_get(self._key)
        if last is None and self._asked.is_set():
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was faster
                distributed.global_state.client.key_value_set(self._key, str(step + 2))
            last = self._try_get(self._key)
        return last is not None and step >= int(last)

    def agreed(self) -> bool:
        """Whether any process is asked, found out together: for loops whose steps are long."""
        flags = exchange(self._key, b"1" if self._asked.is_set() else b"0")
        return b"1" in flags

    def seen(self) -> bool:
        """Whether any process is asked, found out by each for itself, a second later at most."""
        asked, key = self._asked.is_set(), f"{self._key}/seen"
        if asked and several():
            distributed.global_state.client.key_value_set(key, "1", allow_overwrite=True)
        if asked or not several() or time.monotonic() < self._looked + 1:
            return asked
        self._looked = time.monotonic()
        return self._try_get(key) is not None

    def _try_get(self, key: str) -> str | None:
        try:
            return distributed.global_state.client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise LostPeer(f"process {index()} lost the coordinator: {_gist(error)}") from error


# --- leaving --------------------------------------------------------------------------------------


def is_loss_of_peer(error: BaseException) -> bool:
    """Whether an error, of the devices' too, says that another process is gone."""
    if isinstance(error, LostPeer):
        return True
    signs = r"[Gg]loo|NCCL|Connection (reset|closed|refused)|Socket closed|heartbeat"
    found = isinstance(error, RuntimeError) and re.search(signs, str(error))
    return several() and bool(found)


def leave(code: int) -> None:
    """Ends this process for a mistake or a signal, without JAX's wait for the others at exit.

    They come here too where all found the same mistake; else they miss this one's heartbeat.
    """
    if not several():
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.wait_at_barrier(f"{_PREFIX}/leave", int(_LEAVING * 1000))
        jax.distributed.shutdown()  # together: who loses the coordinator before is aborted
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _gist(error: Exception) -> str:
    return str(error).splitlines()[0]


# --- devices --------------------------------------------------------------------------------------


def own_part(shape: Mapping[str, int]) -> dict[str, int]:
    """Of a mesh of all processes' devices, axes outermost first, the part of one process."""
    left, part = count(), {}
    for axis, size in shape.items():
        part[axis] = size // math.gcd(size, left)
        left //= math.gcd(size, left)
    return part


# --- rows -----------------------------------------------------------------------------------------


def own_shards(mesh: Mesh | None, rows: int, num_shards: int) -> tuple[int, ...]:
    """The data shards whose rows of the global batch lie on this process's devices.

    Processes that hold the same rows own the same shards. Raises ValueError as check_rows does.
    """
    if mesh is None or not several():
        return tuple(range(num_shards))
    return _shards(mesh, rows, num_shards)[index()]


def _shards(mesh: Mesh, rows: int, num_shards: int) -> dict[int, tuple[int, ...]]:
    """{process: its shards}."""
    held: dict[int, set[tuple[int, int]]] = collections.defaultdict(set)
    placed = NamedSharding(mesh, rules.spec(("batch",))).devices_indices_map((rows,))
    for device, (part,) in placed.items():
        held[device.process_index].add(part.indices(rows)[:2])
    size = rows // num_shards
    owned = {
        process: tuple(
            sorted({row // size for start, stop in blocks for row in range(start, stop)})
        )
        for process, blocks in held.items()
    }
    for process, blocks in held.items():
        has = sum(stop - start for start, stop in blocks)
        if len(owned[process]) * size != has:
            block = math.gcd(*(edge for blocks in _merged(held) for edge in blocks), rows)
            raise ValueError(
                f"data.num_shards is {num_shards}, but process {process} of {len(held)} holds "
                f"{has} of data.rows = {rows}; a shard must lie within one process: set "
                f"data.num_shards to a multiple of {rows // block}"
            )
    return owned


def _merged(held: dict[int, set[tuple[int, int]]]) -> list[tuple[int, int]]:
    """Runs of neighbouring rows that lie on one process."""
    runs: list[tuple[int, int]] = []
    for blocks in held.values():
        last = None
        for start, stop in sorted(blocks):
            if last is not None and start == last[1]:
                runs[-1] = last = (last[0], stop)
            else:
                runs.append(last := (start, stop))
    return runs


def to_global(mesh: Mesh, tree, shards: Sequence[int] = (0,), num_shards: int = 1):
    """Numpy rows held by this process ([rows, ...] leaves) as global arrays split over the batch.

    Args:
      tree: the rows of `shards` (own_shards) one after another; by default of all.
    """
    sharding = NamedSharding(mesh, rules.spec(("batch",)))
    place = {shard: i for i, shard in enumerate(shards)}

    def put(rows):
        rows = np.asarray(rows)
        size = len(rows) // len(shards)

        def block(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size * num_shards)
            here = place[start // size] * size + start % size
            return rows[(slice(here, here + stop - start), *index[1:])]

        shape = (size * num_shards, *rows.shape[1:])
        return jax.make_array_from_callback(shape, sharding, block)

    return jax.tree.map(put, tree)


def check_rows(mesh: Mesh | None, rows: int, microbatches: int, num_shards: int) -> None:
    """Raises ValueError, naming the keys and numbers, when a batch cannot be cut evenly."""
    if rows % (num_shards * microbatches):
        raise ValueError(
            f"data.rows = {rows} is not a multiple of data.num_shards * mesh.microbatches "
            f"= {num_shards} * {microbatches}"
        )
    ways = rules.axis_size(mesh, "batch") if mesh is not None else 1
    if (rows // microbatches) % ways:
        raise ValueError(
            f"data.rows / mesh.microbatches = {rows // microbatches} is not a multiple of "
            f"mesh axes {' x '.join(rules.BATCH_AXES)} = {ways}"
        )
    own_shards(mesh, rows, num_shards)

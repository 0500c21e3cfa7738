"""Completions drawn by several processes, brought together."""

import io
import json
from collections.abc import Callable, Sequence

import numpy as np

from jaxreason.parallel import hosts
from jaxreason.types import Completion

Rows = list[list[Completion]]  # [prompt][sample]


class Interrupted(Exception):
    """A rollout was asked to stop, here or in another process."""


def whole(channel: str, draw: Callable[[], Rows]) -> Rows:
    """The rows of all processes, in their order, from what each draws.

    Raises Interrupted in all processes where `draw` does in one.
    """
    if not hosts.several():
        return draw()
    try:
        drawn = pack(draw())
    except Interrupted:
        hosts.exchange(channel, b"")
        raise
    found = hosts.exchange(channel, drawn)
    if not all(found):
        raise Interrupted
    return [row for part in found for row in unpack(part)]


def pack(rows: Sequence[Sequence[Completion]]) -> bytes:
    """About 6 bytes a token. Log-probabilities are float32, as the sampler gave them."""
    flat = [completion for row in rows for completion in row]
    notes = [[c.text, len(c.ids), c.truncated, bool(c.forced)] for c in flat]
    forced = [flag for c in flat for flag in c.forced or [False] * len(c.ids)]
    packed = io.BytesIO()
    np.savez_compressed(
        packed,
        # Through JSON: a text may hold half of a surrogate pair, which has no UTF-8.
        notes=np.frombuffer(json.dumps([[len(row) for row in rows], notes]).encode(), np.uint8),
        ids=np.array([i for c in flat for i in c.ids], np.int32),
        logprobs=np.array([x for c in flat for x in c.logprobs], np.float32),
        forced=np.array(forced, bool),
    )
    return packed.getvalue()


def unpack(packed: bytes) -> Rows:
    """The inverse of `pack`."""
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        sizes, notes = json.loads(arrays["notes"].tobytes())
        ids, logprobs, forced = (arrays[name].tolist() for name in ("ids", "logprobs", "forced"))
    flat, at = [], 0
    for text, size, truncated, any_forced in notes:
        own, at = slice(at, at + size), at + size
        flags = tuple(forced[own]) if any_forced else ()
        flat.append(Completion(text, tuple(ids[own]), tuple(logprobs[own]), truncated, flags))
    waiting = iter(flat)
    return [[next(waiting) for _ in range(size)] for size in sizes]

"""Which tiles of kernels/flash.py are fastest on the GPU at hand, for each head dim.

From the tiles in force one field is changed at a time, as long as that helps. Each of the three
kernels is timed by itself, and a result that is off is never the best. The first and the best are
timed once more, in turn.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import bench_attention as attention
import jax
import jax.numpy as jnp
from bench_kernels import LIMITS, dtype, said, stop_if_lost
from bench_timing import Settings, Timed, compiled, seconds_in_turn

from jaxreason.kernels import flash
from jaxreason.kernels.flash import Config, Tiles

# Of each entry of flash.CONFIGS, by worth: what is trained most with such heads.
CASES = {128: "4k", 64: "4k-hd64", 256: "4k-window"}
_STEPS = {
    "queries": (16, 32, 64, 128, 256),
    "keys": (16, 32, 64, 128, 256),
    "num_warps": (2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5),
}
KERNELS = ("forward", "of_queries", "of_keys")
_ROUNDS, _ROUNDS_OF_BEST = 3, 7
_GAIN = 0.99  # of the seconds before: less is noise
Seconds = Callable[[Tiles], float]  # of one call; infinite where it does not run, or is wrong


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Of one head dim: what was best, and the milliseconds of each kernel before and after."""

    case: str
    head_dim: int
    config: Config
    milliseconds: dict[str, tuple[float | None, float | None]]  # None: does not run


def cases(asked: Sequence[str]) -> list[str]:
    """Those of CASES that were asked for, or all. Raises ValueError for another."""
    for case in asked:
        if case not in CASES.values():
            raise ValueError(f"--case has {case!r}; tiles are for {', '.join(CASES.values())}")
    return list(asked or CASES.values())


def tune(cases: Sequence[str], deadline: float, say: Callable[[str], None]) -> Iterator[Tuned]:
    """One case after the other; they share the time."""
    for number, case in enumerate(cases):
        share = (deadline - time.monotonic()) / (len(cases) - number)
        yield _tune(attention.ROWS_CASES[case], share, say)


def _tune(case: attention.RowsCase, share: float, say) -> Tuned:
    """Within about `share` seconds."""
    operands, deadline = attention.rows_operands(case), time.monotonic() + share
    truth, config, times = attention.rows_truth(operands), flash.CONFIGS[case.head_dim], {}
    for number, kernel in enumerate(KERNELS):
        until = time.monotonic() + (deadline - time.monotonic()) / (len(KERNELS) - number)
        tried: dict[Tiles, Timed] = {}
        first = getattr(config, kernel)
        measure = functools.partial(_seconds, operands, truth, config, kernel, tried, say)
        best = descend(first, measure, until)
        runs = {tiles: tried[tiles] for tiles in (first, best) if tiles in tried}
        found = seconds_in_turn(runs, Settings(_ROUNDS_OF_BEST, math.inf, False))
        medians = {tiles: 1e3 * statistics.median(seconds) for tiles, seconds in found.items()}
        best = min(medians, key=medians.get, default=first)
        times[kernel] = (medians.get(first), medians.get(best))
        config = dataclasses.replace(config, **{kernel: best})
        say(f"{case.name} {kernel}: first {first}, best {best}, ms {times[kernel]}")
    return Tuned(case.name, case.head_dim, config, times)


def descend(first: Tiles, seconds: Seconds, deadline: float) -> Tiles:
    """The best that single changes lead to; each is tried once."""
    known = {first: seconds(first)}
    best, before = first, None
    while best != before:
        before = best
        for field in _STEPS:
            for tiles in neighbours(best, field):
                if tiles not in known and time.monotonic() < deadline:
                    known[tiles] = seconds(tiles)
            near = [best, *(t for t in neighbours(best, field) if t in known)]
            fastest = min(near, key=known.get)
            best = fastest if known[fastest] < _GAIN * known[best] else best
    return best


def neighbours(tiles: Tiles, field: str) -> list[Tiles]:
    """The next smaller and the next larger."""
    values, value = _STEPS[field], getattr(tiles, field)
    near = [max((v for v in values if v < value), default=None)]
    near += [min((v for v in values if v > value), default=None)]
    return [dataclasses.replace(tiles, **{field: v}) for v in near if v is not None]


def _seconds(operands, truth, config: Config, kernel: str, tried: dict, say, tiles: Tiles) -> float:
    config = dataclasses.replace(config, **{kernel: tiles})
    try:
        run = build(operands, config, kernel)
        made = run.once()
    except Exception as failure:  # too much shared memory, or what a compiler says of it
        stop_if_lost(failure)
        say(f"  {kernel} {tiles}: {said(failure)}")
        return math.inf
    error = attention.rows_error(truth, made)
    if not error <= LIMITS[dtype().name]:
        say(f"  {kernel} {tiles}: wrong, off by {error:.2g}")
        return math.inf
    tried[tiles] = run
    return min(seconds_in_turn({"": run}, Settings(_ROUNDS, math.inf, False))[""])


def build(operands: attention.RowsOperands, config: Config, kernel: str) -> Timed:
    """One of the three kernels alone: XLA drops the others, whose results nobody takes."""
    if kernel == "forward":
        run = lambda q, k, v, mask: {"out": flash.attention(q, k, v, mask, config=config)[0]}
        return compiled(run, *operands.qkv, operands.mask)
    out_BTNH, lse_BTN = _forward(operands)
    dout_BTNH = operands.dout_BTNH
    delta_BTN = (dout_BTNH.astype(jnp.float32) * out_BTNH).sum(-1)

    def run(q, k, v, mask, lse_BTN, delta_BTN, dout_BTNH):
        found = flash.gradients(q, k, v, mask, lse_BTN, delta_BTN, dout_BTNH, config=config)
        named = dict(zip(("dq", "dk", "dv"), found))
        wanted = ("dq",) if kernel == "of_queries" else ("dk", "dv")
        return {name: named[name] for name in wanted}

    return compiled(run, *operands.qkv, operands.mask, lse_BTN, delta_BTN, dout_BTNH)


def _forward(operands: attention.RowsOperands) -> tuple[jax.Array, jax.Array]:
    """By the implementation that runs anywhere: what is tuned may be wrong."""
    from jaxreason.kernels import blockwise

    return jax.jit(blockwise.attention)(*operands.qkv, operands.mask)


def table(found: Sequence[dict]) -> str:
    """Of `Tuned`s as dicts: as it stands in kernels/flash.py."""
    lines = ["CONFIGS = {"]
    for one in sorted(found, key=lambda one: one["head_dim"]):
        each = (Tiles(**one["config"][kernel]) for kernel in KERNELS)
        tiles = (f"Tiles({t.queries}, {t.keys}, {t.num_warps}, {t.num_stages})" for t in each)
        lines.append(f"    {one['head_dim']}: Config({', '.join(tiles)}),")
    return "\n".join([*lines, "}"])

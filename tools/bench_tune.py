"""Which tiles of kernels/flash.py are fastest on the GPU at hand, for each head dim.

From the tiles in force one field is changed at a time, as long as that helps. Each of the three
kernels is timed by itself, and a result that is off is never the best. The first and the best are
timed once more, in turn.
"""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence

import bench_attention as attention
import jax
import jax.numpy as jnp
from bench_kernels import LIMITS, dtype, said, stop_if_lost
from bench_timing import Settings, Timed, compiled, machine, seconds_in_turn

from jaxreason.kernels import flash
from jaxreason.kernels.flash import Config, Tiles

# The case of each entry of CONFIGS: what is trained most with such heads.
CASES = {128: "4k", 64: "4k-hd64", 256: "4k-window"}
_STEPS = {
    "queries": (16, 32, 64, 128, 256),
    "keys": (16, 32, 64, 128, 256),
    "num_warps": (2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5),
}
_ROUNDS = 3  # of a candidate; seven of the best
_GAIN = 0.99  # of the seconds before: less is noise
Seconds = Callable[[Tiles], float]  # of one call; infinite where it does not run, or is wrong


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Of one head dim: what was best, and the milliseconds of each kernel before and after."""

    head_dim: int
    config: Config
    milliseconds: dict[str, tuple[float, float]]


def tune_all(cases: Sequence[str], deadline: float, say: Callable[[str], None]) -> list[Tuned]:
    """Of the head dims of those cases (all without any), as far as there is time."""
    chosen = {h: c for h, c in CASES.items() if not cases or c in cases}
    if not chosen:
        raise ValueError(f"--case is {','.join(cases)}; tiles are for {', '.join(CASES.values())}")
    found = []
    for head_dim, case in chosen.items():
        if time.monotonic() < deadline:
            found.append(_tune(head_dim, attention.ROWS_CASES[case], deadline, say))
    return found


def _tune(head_dim: int, case: attention.RowsCase, deadline: float, say) -> Tuned:
    operands = attention.rows_operands(case)
    truth, config, times = attention.rows_truth(operands), flash.CONFIGS[head_dim], {}
    for kernel in ("forward", "of_queries", "of_keys"):
        tried: dict[Tiles, Timed] = {}
        first = getattr(config, kernel)
        measure = functools.partial(_seconds, operands, truth, config, kernel, tried, say)
        best = descend(first, measure, deadline)
        runs = {name: tried[t] for name, t in (("first", first), ("best", best)) if t in tried}
        again = seconds_in_turn(runs, Settings(7, math.inf, False))
        both = [1e3 * min(again.get(name, [math.inf])) for name in ("first", "best")]
        best = best if both[1] < both[0] else first
        times[kernel] = (both[0], min(both))
        config = dataclasses.replace(config, **{kernel: best})
        say(f"{case.name} {kernel}: {both[0]:.3f} ms with {first}, {both[1]:.3f} with {best}")
    return Tuned(head_dim, config, times)


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


def table(found: Sequence[Tuned]) -> str:
    """As it stands in kernels/flash.py."""
    tiles = lambda t: f"Tiles({t.queries}, {t.keys}, {t.num_warps}, {t.num_stages})"
    lines = ["CONFIGS = {"]
    for one in sorted(found, key=lambda one: one.head_dim):
        each = (one.config.forward, one.config.of_queries, one.config.of_keys)
        lines.append(f"    {one.head_dim}: Config({', '.join(map(tiles, each))}),")
    return "\n".join([*lines, "}"])


def write(path: pathlib.Path, found: Sequence[Tuned]) -> None:
    content = {"machine": machine(), "tuned": [dataclasses.asdict(one) for one in found]}
    path.write_text(json.dumps(content, indent=1) + "\n")

"""Which tiles of a flash kernel are fastest on the GPU at hand, for each head dim.

From the tiles in force one field is changed at a time, as long as that helps. Each of the three
kernels is timed by itself, and a result that is off is never the best. The first and the best are
timed once more, in turn.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bench_attention as attention
import jax
import jax.numpy as jnp
from bench_kernels import LIMITS, dtype, said, stop_if_lost
from bench_timing import Settings, Timed, compiled, seconds_in_turn

from jaxreason.model.attention import IMPLEMENTATIONS, Use
from jaxreason.parallel.mesh import capability

MODULES = ("flash", "flash_sm90", "flash_sm100")  # of jaxreason.kernels; Tiles, Config, CONFIGS
Tiles = Config = Any  # of one of them
# Of each entry of CONFIGS, by worth: what is trained most with such heads.
CASES = {128: "4k", 64: "4k-hd64", 256: "4k-window"}
_STEPS = {
    "queries": (16, 32, 64, 128, 256),
    "keys": (16, 32, 64, 128, 256),
    "num_warps": (2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5),
    "stages": (1, 2, 3, 4, 5, 6),
    "value_stages": (1, 2, 3, 4, 5, 6),
}
KERNELS = ("forward", "of_queries", "of_keys")
_ROUNDS, _ROUNDS_OF_BEST = 3, 7
_GAIN = 0.99  # of the seconds before: less is noise
Seconds = Callable[[Tiles], float]  # of one call; infinite where it does not run, or is wrong


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Of one head dim: what was best, and the milliseconds of each kernel before and after."""

    module: str
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


def module_for(name: str | None) -> str:
    """The one asked for, or that of this GPU's generation, else flash.

    Raises ValueError for one that cannot run here.
    """
    use = Use(jax.default_backend(), dtype().name, 128, capability(None))
    able = [m for m in MODULES if not IMPLEMENTATIONS[m].reasons(use)]
    if name is None:
        return able[-1]
    if name not in able:
        raise ValueError(f"--kernel is {name!r}; tiles on this GPU are of {', '.join(able)}")
    return name


def tune(
    module: str, cases: Sequence[str], deadline: float, say: Callable[[str], None]
) -> Iterator[Tuned]:
    """One case after the other; they share the time."""
    for number, case in enumerate(cases):
        share = (deadline - time.monotonic()) / (len(cases) - number)
        yield _tune(module, attention.ROWS_CASES[case], share, say)


def _kernels(module: str):
    return importlib.import_module(f"jaxreason.kernels.{module}")


def _tune(module: str, case: attention.RowsCase, share: float, say) -> Tuned:
    """Within about `share` seconds."""
    operands, deadline = attention.rows_operands(case), time.monotonic() + share
    config, times = _kernels(module).CONFIGS[case.head_dim], {}
    truth = attention.rows_truth(operands)
    for number, kernel in enumerate(KERNELS):
        until = time.monotonic() + (deadline - time.monotonic()) / (len(KERNELS) - number)
        tried: dict[Tiles, Timed] = {}
        first = getattr(config, kernel)
        measure = functools.partial(_seconds, module, operands, truth, config, kernel, tried, say)
        best = descend(first, measure, until)
        runs = {tiles: tried[tiles] for tiles in (first, best) if tiles in tried}
        found = seconds_in_turn(runs, Settings(_ROUNDS_OF_BEST, math.inf, False))
        medians = {tiles: 1e3 * statistics.median(seconds) for tiles, seconds in found.items()}
        best = min(medians, key=medians.get, default=first)
        times[kernel] = (medians.get(first), medians.get(best))
        config = dataclasses.replace(config, **{kernel: best})
        say(f"{case.name} {kernel}: first {first}, best {best}, ms {times[kernel]}")
    return Tuned(module, case.name, case.head_dim, config, times)


def descend(first: Tiles, seconds: Seconds, deadline: float) -> Tiles:
    """The best that single changes lead to; each is tried once."""
    known = {first: seconds(first)}
    best, before = first, None
    while best != before:
        before = best
        for field in (f.name for f in dataclasses.fields(first)):
            for tiles in neighbours(best, field):
                if tiles not in known and time.monotonic() < deadline:
                    known[tiles] = seconds(tiles)
            near = [best, *(t for t in neighbours(best, field) if t in known)]
            fastest = min(near, key=known.get)
            best = fastest if known[fastest] < _GAIN * known[best] else best
    return best


def neighbours(tiles: Tiles, field: str) -> list[Tiles]:
    """The next smaller and the next larger that there may be."""
    values, value = _STEPS.get(field, ()), getattr(tiles, field)
    near = [max((v for v in values if v < value), default=None)]
    near += [min((v for v in values if v > value), default=None)]
    found = []
    for v in near:
        with contextlib.suppress(ValueError):  # tiles that are refused
            found += [] if v is None else [dataclasses.replace(tiles, **{field: v})]
    return found


def _seconds(
    module: str, operands, truth, config: Config, kernel: str, tried: dict, say, tiles: Tiles
) -> float:
    try:
        config = dataclasses.replace(config, **{kernel: tiles})
        run = build(module, operands, config, kernel)
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


def build(module: str, operands: attention.RowsOperands, config: Config, kernel: str) -> Timed:
    """One of the three kernels alone: XLA drops the others, whose results nobody takes."""
    flash = _kernels(module)
    if hasattr(config, "ordered"):  # else the gradient of the queries has no kernel of its own
        config = dataclasses.replace(config, ordered=kernel == "of_queries")
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
        if kernel == "of_keys" and getattr(config, "adds", False):
            wanted = ("dq", *wanted)
        return {name: named[name] for name in wanted}

    return compiled(run, *operands.qkv, operands.mask, lse_BTN, delta_BTN, dout_BTNH)


def _forward(operands: attention.RowsOperands) -> tuple[jax.Array, jax.Array]:
    """By the implementation that runs anywhere: what is tuned may be wrong."""
    from jaxreason.kernels import blockwise

    return jax.jit(blockwise.attention)(*operands.qkv, operands.mask)


def table(found: Sequence[dict]) -> str:
    """Of `Tuned`s of one module, as dicts: as it stands there."""
    lines = ["CONFIGS = {"]
    for one in sorted(found, key=lambda one: one["head_dim"]):
        fields = dataclasses.fields(_kernels(one["module"]).Config)
        each = (one["config"][f.name].values() for f in fields if f.name in KERNELS)
        tiles = (f"Tiles({', '.join(map(str, numbers))})" for numbers in each)
        lines.append(f"    {one['head_dim']}: Config({', '.join(tiles)}),")
    return "\n".join([*lines, "}"])

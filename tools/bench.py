"""Speed of kernels, of the start, of training, decoding, rollouts and the data, beside the peers.

  python tools/bench.py all --minutes=9 --json=bench.json     run again: goes on with what is left
  python tools/bench.py attention linear_xent decode_attention --case=tiny
  python tools/bench.py attention/4k train/0.6b
  python tools/bench.py attention --tune       the best tiles of this GPU's flash kernel

attention, linear_xent and decode_attention are kernels, each held against a reference in float32
before it is timed; startup is the first update, cold and warm; train, decode, rollout and data are
whole models. Ours and theirs run in turn (A B A B), on random normal data; tables give medians with
least and most. FLOP/s and GB/s stand beside what a large matmul and a large copy reach in the same
process. What cannot run a case has a row that says why. Without --case: what is meant for the
device at hand, tiny and 10m on CPU.

Exit codes: 0 done, 1 something computes the wrong thing or failed (the rest is measured), 2 a
mistake in what was asked (one line says which).
"""

import argparse
import dataclasses
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[0]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # no installation needed
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch is on the same device

import bench_attention
import bench_kernels
import bench_models
import bench_parts
import bench_startup
import bench_timing
import bench_tune
import jax
import rich.console
import rich.table
from bench_parts import Found, Part, Store, Suite

from jaxreason.parallel.allocator import keep_freed_memory


def _of_models(bench) -> Suite:
    def run(case, settings) -> Found:
        return bench_models.records(case, bench(case, settings)), []

    return Suite(bench_models.CASES, run)


SUITES = {
    "attention": Suite(bench_attention.ROWS_CASES, bench_attention.bench_rows),
    "linear_xent": Suite(bench_kernels.HEAD_CASES, bench_kernels.bench_head),
    "decode_attention": Suite(bench_attention.QUERY_CASES, bench_attention.bench_queries),
    "startup": Suite(bench_models.CASES, bench_startup.bench_startup),
    "train": _of_models(bench_models.bench_train),
    "decode": _of_models(bench_models.bench_decode),
    "rollout": _of_models(bench_models.bench_rollout),
    "data": _of_models(bench_models.bench_data),
}


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    console = rich.console.Console(highlight=False)
    console = console if console.is_terminal else rich.console.Console(width=160, highlight=False)
    try:
        _check(args)
        store = Store(args.json)
        if args.tune:
            return _tune(args, store, console)
        if "all" in args.suites and not args.here:
            return _slot(args, store, console)
        keep_freed_memory()
        store.check_device(jax.devices()[0].device_kind)
        parts = bench_parts.choose(args.suites, args.cases, SUITES, bench_timing.on_cpu())
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except bench_timing.DeviceLostError as error:  # by a candidate of --tune
        return _lost(error)
    deadline = time.monotonic() + 60 * args.minutes
    settings = bench_timing.Settings(args.rounds, deadline, not args.no_compile)
    show = lambda name, found: _show(console, name, found)
    say = lambda line: console.print(line, markup=False)
    try:
        bench_parts.measure(parts, SUITES, settings, store, show, say)
    except bench_timing.DeviceLostError as error:
        return _lost(error)
    return _summary(parts, store, console, quiet=args.here)


def _lost(error: Exception) -> int:
    print(f"error: the device is lost: {error}", file=sys.stderr)
    return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=__doc__, formatter_class=raw)
    names = f"all, {', '.join(SUITES)}, or one case of them: attention/4k"
    parser.add_argument("suites", nargs="*", default=["all"], metavar="SUITE", help=names)
    parser.add_argument("--case", default="", help="cases, as in tiny,10m; default: the device's")
    parser.add_argument("--rounds", type=int, default=7, help="of A B A B; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=60.0, help="no round begins after them")
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile")
    parser.add_argument("--tune", action="store_true", help="tiles of flash attention")
    parser.add_argument("--kernel", help=f"of --tune: {', '.join(bench_tune.MODULES)}")
    parser.add_argument(
        "--json", type=pathlib.Path, help="what is found; an old one is gone on with"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # a process of `all`
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be."""
    args.cases = [name for name in args.case.split(",") if name]
    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}; it must be at least 1")
    if not 0 < args.minutes < math.inf:
        raise ValueError(f"--minutes is {args.minutes:g}; it must be above 0 and finite")
    if args.kernel and not args.tune:
        raise ValueError(f"--kernel is {args.kernel!r}; it says which tiles --tune is for")
    if args.tune and args.suites != ["attention"]:
        raise ValueError(f"--tune is for attention alone, not {' '.join(args.suites)}")
    bench_parts.choose(args.suites, args.cases, SUITES, cpu=True)


def _tune(args: argparse.Namespace, store: Store, console: rich.console.Console) -> int:
    """Head dims that are in the file already are not tuned again."""
    if jax.default_backend() != "gpu":
        raise ValueError(f"--tune needs a GPU; JAX's devices here are {jax.default_backend()}")
    deadline = time.monotonic() + 60 * args.minutes
    say = lambda line: console.print(line, markup=False, soft_wrap=True)
    store.check_device(jax.devices()[0].device_kind)
    cases = bench_tune.cases(args.cases)
    module = bench_tune.module_for(args.kernel)
    part = lambda case: f"tune/{module}/{case}"
    left = [case for case in cases if store.state(part(case)) != "done"]
    store.begin_run(bench_timing.machine())
    for tuned in bench_tune.tune(module, left, deadline, say):
        run, found = len(store.content["runs"]) - 1, dataclasses.asdict(tuned)
        store.update(part(tuned.case), state="done", run=run, tuned=found)
    done = [store.part(part(case)).get("tuned") for case in cases]
    say(bench_tune.table([found for found in done if found]))
    return 0


def _slot(args: argparse.Namespace, store: Store, console: rich.console.Console) -> int:
    """All parts, in processes of their own; this one touches no device."""
    end = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    platform, kind = bench_parts.device()
    store.check_device(kind)
    parts = bench_parts.choose(args.suites, args.cases, SUITES, platform == "cpu")

    def start(batch: list[Part], seconds: float) -> subprocess.Popen:
        command = [sys.executable, __file__, "--here", *(part.name for part in batch)]
        command += [f"--json={store.path}", f"--minutes={seconds / 60}", f"--rounds={args.rounds}"]
        command += ["--no-compile"] * args.no_compile
        env = os.environ | {"PYTHONUNBUFFERED": "1"}  # it may be killed
        return subprocess.Popen(command, env=env, process_group=0)

    with tempfile.TemporaryDirectory() as folder:
        store.path = store.path or pathlib.Path(folder) / "bench.json"
        bench_parts.spend(parts, store, end, start)
    return _summary(parts, store, console)


# --------------------------------------------------------------------------------- report


def _summary(
    parts: list[Part], store: Store, console: rich.console.Console, quiet: bool = False
) -> int:
    """What is left, failed and wrong, a line each; 1 where something failed or is wrong."""
    say = lambda line: console.print(line, markup=False, soft_wrap=True)
    wrong = [e for part in parts for e in store.part(part.name).get("errors", [])]
    failed = [p for p in parts if store.state(p.name) == "failed"]
    left = [p.name for p in parts if store.state(p.name) in ("left", "running")]
    if quiet:
        return int(bool(wrong or failed))
    done = len(parts) - len(failed) - len(left)
    say(f"{done} of {len(parts)} parts done")
    if left:
        say(f"no time was left for {' '.join(left)}; the same command goes on with them")
    for part in failed:
        print(f"error: {part.name} failed: {store.part(part.name)['why']}", file=sys.stderr)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong or failed else 0


def _show(console: rich.console.Console, name: str, found: dict) -> None:
    rows, took = found["rows"], f"({found['seconds']:.0f} s)"
    for row in rows:
        if "left_out" in row:
            console.print(f"{name} {took}: left out: {row['left_out']}", markup=False)
    rows = [row for row in rows if "left_out" not in row]
    if rows and "name" in rows[0]:
        console.print(f"{name} {took}: {rows[0]['shape']}", markup=False)
        console.print(_kernels(rows))
        if rows[0]["unit"] in ("TFLOP/s", "GB/s"):
            console.print(_peak(rows[0]["unit"]), markup=False)
    elif rows:
        console.print(f"{name} {took}", markup=False)
        console.print(_whole_models(rows))


def _peak(unit: str) -> str:
    peaks = bench_timing.peaks()
    if unit == "GB/s":
        return f"copy, bytes read and written: {peaks.bandwidth / 1e9:,.4g} GB/s"
    sheet = peaks.datasheet_flops and f", data sheet {peaks.datasheet_flops / 1e12:g}"
    return f"matmul {peaks.matmul}: {peaks.flops / 1e12:,.3g} TFLOP/s{sheet or ''}"


def _kernels(rows: list[dict]) -> rich.table.Table:
    unit, seconds = rows[0]["unit"], rows[0]["unit"] == "s"
    columns = ["mode", "implementation", "s" if seconds else "ms"]
    if not seconds:
        columns += [unit, "% of peak", "x baseline", "error", "temp MB"]
    table = rich.table.Table(*columns, "")
    shown = lambda value, pattern: "" if value is None else format(value, pattern)
    for row in rows:
        cells = [row["mode"], row["name"], _spread(row["seconds"], 1 if seconds else 1e3, ".4g")]
        if not seconds:
            cells += [shown(row["rate"], ",.4g"), shown(row["percent"], ".1f")]
            cells += [shown(row["ratio"], ".2f"), shown(row["error"], ".1g")]
            cells += [shown(row["temporaries"] and row["temporaries"] / 1e6, ",.0f")]
        baseline = "baseline" if row["name"] == row["baseline"] else ""
        table.add_row(*cells, row["reason"] or baseline)
    return table


def _whole_models(rows: list[dict]) -> rich.table.Table:
    columns = ("suite", "case", "shape", "ours tok/s", "theirs tok/s", "ratio", "by CPU", "goal")
    table = rich.table.Table(*columns, "peer")
    number = lambda x: "" if x is None else f"{x:.2f}"
    for row in rows:
        r = bench_models.Result(
            **{f.name: row[f.name] for f in dataclasses.fields(bench_models.Result)}
        )
        table.add_row(
            r.suite, r.case, r.shape, _spread(r.ours), _spread(r.theirs), number(r.ratio),
            number(r.cpu_ratio), f"{r.goal:g}", r.peer,
        )  # fmt: skip
    return table


def _spread(values: list[float], scale: float = 1.0, pattern: str = ",.0f") -> str:
    """Median, least and most."""
    if not values:
        return ""
    ends = (f"{scale * x:{pattern}}" for x in (statistics.median(values), min(values), max(values)))
    return "{} ({}-{})".format(*ends)


if __name__ == "__main__":
    sys.exit(main())

"""Which mesh, batch cut and remat for a machine that may not be here yet, and how many hours.

  python tools/tune_mesh.py --chip=b200 --hosts=1 --model=qwen3-1.5b --sequence=4096 \\
      --tokens-per-step=2097152 --tokens=100e9

Every layout that the model divides over is weighed by arithmetic; the real train step of the best
is compiled for the chip, without one, for its memory and collectives. Speed is predicted
(parallel/step_time.py has the model, parallel/chips.py its constants). Compiled figures are kept:
run again to go on. --attention=NAME asks for an implementation, as mesh.attention does: a kernel's
time is that of published ones; its own is not known before it has run. --measure times the best on
the devices of this machine. The winner is written as a config for `launch`. Needs the compiler of
the chip: pip install .[cuda] or .[tpu]; --compile=0 needs none.

  python tools/tune_mesh.py --tables=docs/scaling.md     makes its tables, or goes on with them

Exit codes: 0 done, 2 a mistake in what was asked or nothing that fits (one line says which).
"""

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # no installation needed

import jax
import rich.console
import rich.progress
import rich.table

from jaxreason.model.attention import IMPLEMENTATIONS
from jaxreason.recipes import tune, tune_files, tune_request, tune_tables
from jaxreason.recipes.tune import Candidate
from jaxreason.recipes.tune_request import Request

_SHOWN = 12  # rows of the table
_MEASURED = 3


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    jax.config.update("jax_platforms", "cpu")  # the accelerator is for the processes that measure
    console = rich.console.Console(stderr=True, highlight=False)
    try:
        _check(args)
        compiler = tune.Compiler(args.cache.expanduser(), args.processes, args.limit)
        if args.tables:
            say = lambda line: console.print(line, markup=False)
            tune_tables.make(args.tables, compiler, args.compile, say)
            return 0
        request = _request(args)
        if args.measure:
            tune.check_devices(request, args.limit)
        with _progress(console, args.compile) as on_done:
            found, considered = tune.search(request, compiler, args.compile, on_done)
        measured = _measure(request, found, args, console) if args.measure else {}
        tune_files.write_config(request, found[0], args.out)
        taken = tune_files.check(args.out, request.num_devices)
        console.print(taken, markup=False, soft_wrap=True)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    width = None if sys.stdout.isatty() else 160
    rich.console.Console(width=width).print(_table(request, found, considered, measured))
    print(tune_files.command(request, args.out))
    if args.json:
        args.json.write_text(json.dumps(_record(request, found, considered, measured), indent=2))
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--chip", help=", ".join(tune_request.CHIPS))
    add("--hosts", type=int, default=1)
    add("--devices-per-host", type=int, help="default: as the chip is sold, 8 GPUs or 4 TPUs")
    add("--model", help="a preset or a Hugging Face directory")
    add("--sequence", type=int, help="tokens of a row")
    add("--tokens-per-step", type=int, help="of the global batch")
    add("--tokens", type=float, help="of the whole run, for its hours")
    add("--recipe", default="pretrain", help=", ".join(tune_request.RECIPES))
    add("--mesh", default="", metavar="AXIS=N,...", help="axes that are given")
    add("--attention", default="auto", metavar="NAME", help=f"auto, {', '.join(IMPLEMENTATIONS)}")
    add("--compile", type=int, default=12, help="layouts to compile; 0: arithmetic alone")
    add("--processes", type=int, default=2, help="that compile at a time")
    add("--limit", type=float, default=300.0, help="seconds for one layout")
    add("--measure", action="store_true", help=f"time the best {_MEASURED} on this machine")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/tuned.py"), help="the config")
    add("--json", type=pathlib.Path, help="file for the result")
    add("--tables", type=pathlib.Path, help="a page whose tables are made; all else is fixed")
    cache = pathlib.Path("~/.cache/jaxreason/tune")
    add("--cache", type=pathlib.Path, default=cache, help="folder of compiled figures")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for a number that cannot be, and where nothing can be written."""
    for flag, least in (("processes", 1), ("compile", 0)):
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag} is {getattr(args, flag)}; it must be at least {least}")
    if not 0 < args.limit < math.inf:
        raise ValueError(f"--limit is {args.limit:g}; it must be seconds, above 0 and finite")
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json={args.json}: {args.json.parent} is no folder")
    for flag in ("out", "json"):
        path = getattr(args, flag)
        if path and path.is_dir():
            raise ValueError(f"--{flag}={path} is a folder; give a file")
    if not args.tables:
        _make_folder("--out", args.out.parent)
    if args.compile:
        _make_folder("--cache", args.cache.expanduser())


def _make_folder(flag: str, folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{flag}: nothing can be written to {folder}: {error.strerror}") from error


def _request(args: argparse.Namespace) -> Request:
    """Raises ValueError."""
    for flag in ("chip", "model", "sequence", "tokens_per_step"):
        if getattr(args, flag) is None:
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} is missing; --chip, --model, --sequence and "
                             "--tokens-per-step say what is asked")  # fmt: skip
    return Request(
        args.chip, args.hosts, args.model, args.sequence, args.tokens_per_step, args.tokens,
        args.recipe, args.devices_per_host, _axes(args.mesh), args.attention,
    )  # fmt: skip


def _axes(text: str) -> tuple[tuple[str, int], ...]:
    """--mesh=AXIS=N,... Raises ValueError."""
    pairs = [pair.split("=") for pair in text.split(",") if pair]
    for pair in pairs:
        if len(pair) != 2 or not pair[1].isdigit():
            raise ValueError(f"--mesh={text}: write AXIS=N,... as in tensor=2,context=4")
    return tuple((axis, int(size)) for axis, size in pairs)


@contextlib.contextmanager
def _progress(console: rich.console.Console, total: int) -> Iterator[Callable]:
    """A bar of compiled layouts; away from a terminal a line each."""
    if not console.is_terminal:

        def say(candidate: Candidate, kept: bool) -> None:
            print(f"{candidate.label}: {_outcome(candidate, kept)}", file=sys.stderr, flush=True)

        yield say
        return
    columns = (
        rich.progress.TextColumn("compiling"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.description}"),
    )
    with rich.progress.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda candidate, kept: bar.update(
            task, advance=1, description=f"{candidate.label}: {_outcome(candidate, kept)}"
        )


def _outcome(candidate: Candidate, kept: bool) -> str:
    if not candidate.compiled:
        return candidate.figures["error"]
    seconds = "kept" if kept else f"{candidate.figures['compile_seconds']} s"
    return f"{candidate.bytes / 2**30:.1f} GiB, {seconds}"


def _measure(request: Request, found: list[Candidate], args, console) -> dict[str, dict]:
    """Label -> what the devices said, of the best that fit."""
    measured = {}
    for candidate in [c for c in found if tune.fits(request, c)][:_MEASURED]:
        measured[candidate.label] = tune.measure(request, candidate, args.limit)
        console.print(f"{candidate.label}: {measured[candidate.label]}", markup=False)
    return measured


def _table(request: Request, found, considered: int, measured: dict) -> rich.table.Table:
    title = tune_files.headline(request, found[0])
    table = rich.table.Table(title=title, caption=_caption(found, considered))
    columns = ["mesh", "microbatches", "remat", "fits", "GiB", "by arithmetic", "exchanged GiB",
               "tokens/s", "MFU", "binds", "hours"]  # fmt: skip
    for name in [*columns, *(["measured tokens/s"] if measured else [])]:
        table.add_column(name, overflow="fold")
    for candidate in found[:_SHOWN]:
        table.add_row(*_row(request, candidate, measured))
    return table


def _caption(found, considered: int) -> str:
    """How many, and where the arithmetic of memory is far from the compiler's."""
    compiled = [c for c in found if c.compiled]
    text = f"{considered} considered, {len(compiled)} compiled"
    if not compiled:
        return text
    misses = [f"{c.label}: {c.disagreement:+.0%}" for c in compiled if abs(c.disagreement) > 0.15]
    near = len(compiled) - len(misses)
    text += f"; memory by arithmetic within 15 % of the compiler's for {near}"
    return text + (f", not for {'; '.join(misses)}" if misses else "")


def _row(request: Request, candidate: Candidate, measured: dict) -> list[str]:
    estimate, hours = candidate.estimate, tune.hours(request, candidate)
    shape = candidate.layout.shape.items()
    row = [
        " ".join(f"{axis}={size}" for axis, size in shape if size > 1) or "one device",
        str(candidate.layout.microbatches),
        candidate.remat,
        "yes" if tune.fits(request, candidate) else "no",
        f"{candidate.bytes / 2**30:.1f}" if candidate.compiled else "",
        f"{estimate.total_bytes / 2**30:.1f}",
        f"{candidate.exchanged_bytes / 2**30:.1f}" if candidate.compiled else "",
        f"{estimate.tokens_per_second:,.0f}",
        f"{estimate.mfu:.1%}",
        estimate.binds,
        "" if hours is None else f"{hours:.1f}",
    ]
    if measured:
        said = measured.get(candidate.label, {})
        seconds = said.get("step_seconds")
        row.append(
            f"{request.tokens_per_step / seconds:,.0f}" if seconds else said.get("error", "")
        )
    return row


def _record(request: Request, found, considered: int, measured: dict) -> dict:
    rows = [
        {
            "mesh": dict(c.layout.shape),
            "microbatches": c.layout.microbatches,
            "remat": c.remat,
            "fits": tune.fits(request, c),
            "bytes": c.bytes,
            "arithmetic_bytes": c.estimate.memory,
            "seconds": c.estimate.seconds,
            "step_seconds": c.estimate.step_seconds,
            "tokens_per_second": c.estimate.tokens_per_second,
            "mfu": c.estimate.mfu,
            "binds": c.estimate.binds,
            "hours": tune.hours(request, c),
            "compiled": c.figures,
            "measured": measured.get(c.label),
        }
        for c in found
    ]
    return {"request": dataclasses.asdict(request), "considered": considered, "candidates": rows}


if __name__ == "__main__":
    sys.exit(main())

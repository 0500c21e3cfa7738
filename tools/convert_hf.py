"""Hugging Face checkpoints: in, out, and compared.

  python tools/convert_hf.py import HF OUT        HF: a directory or hf://ORG/NAME[@REV]
  python tools/convert_hf.py export CHECKPOINT OUT   CHECKPOINT: WORKDIR[@STAGE[@STEP]]
  python tools/convert_hf.py check A B            two Hugging Face directories

`import` makes a folder that `init.from` accepts; `export` a directory for transformers and vLLM. A
run needs neither: init.from reads Hugging Face itself, and every stage is exported to hf/STAGE.
Exit codes: 0 done, or equal; 1 different; 2 a mistake in what was asked (one line says which).
"""

import argparse
import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # no installation needed

import rich.console
import rich.progress
import rich.table

from jaxreason.checkpoint.compare import Comparison, compare
from jaxreason.checkpoint.hf import OnProgress
from jaxreason.checkpoint.hf_names import brief
from jaxreason.recipes.convert import STAGE, export_checkpoint, import_checkpoint

_SHOWN = 20  # rows of the table of differences
_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    console = rich.console.Console(stderr=True)
    try:
        with _progress(console, args.command) as on_progress:
            if args.command == "import":
                result = import_checkpoint(args.source, args.out, on_progress)
            elif args.command == "export":
                result = export_checkpoint(args.source, args.out, args.dtype, on_progress)
            else:
                compared = compare(args.a, args.b, on_progress)
                result = _described(compared)
    except (ValueError, OSError) as error:  # OSError: a path that may not be read or written
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    width = None if sys.stdout.isatty() else 160  # a file has room for whole names
    rich.console.Console(width=width).print(_table(args, result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if args.command == "check" and not compared.equal else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", type=pathlib.Path, help="file for the result")
    commands = parser.add_subparsers(dest="command", required=True)
    add = lambda name, text: commands.add_parser(name, help=text, parents=[shared])
    into = add("import", "a Hugging Face checkpoint as one of ours, each tensor in its dtype")
    into.add_argument("source", metavar="HF", help="a directory or hf://ORG/NAME[@REV]")
    out = add("export", "a checkpoint of ours as a Hugging Face directory")
    out.add_argument("source", metavar="CHECKPOINT", help="WORKDIR[@STAGE[@STEP]]")
    for command in (into, out):
        command.add_argument("out", metavar="OUT", type=pathlib.Path)
    out.add_argument("--dtype", choices=_DTYPES, help="of the weights; default: as they are stored")
    check = add("check", "two Hugging Face directories, tensor by tensor")
    for side in "ab":
        check.add_argument(side, metavar=side.upper(), type=pathlib.Path)
    return parser.parse_args(argv)


@contextlib.contextmanager
def _progress(console: rich.console.Console, command: str) -> Iterator[OnProgress]:
    """A bar of bytes with the tensor's name; away from a terminal, a line every tenth."""
    if not console.is_terminal:
        said = [0]

        def say(name: str, done: int, total: int) -> None:
            if 10 * done // total > said[0]:
                said[0] = 10 * done // total
                print(f"{command}: {10 * said[0]} %  {name}", file=sys.stderr, flush=True)

        yield say
        return
    columns = (
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.description}"),
    )
    with rich.progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(command)
        yield lambda name, done, total: bar.update(
            task, completed=done, total=total, description=name
        )


def _described(compared: Comparison) -> dict:
    return {
        "equal": compared.equal,
        "tensors": compared.num_tensors,
        "only_in_a": list(compared.only_a),
        "only_in_b": list(compared.only_b),
        "differences": [vars(d) for d in compared.differences],
    }


def _table(args: argparse.Namespace, result: dict) -> rich.table.Table:
    if args.command == "check":
        return _table_of_differences(result)
    table = rich.table.Table("checkpoint", "parameters", "GB", "left out")
    left = ", ".join(f"{part} ({n} tensors)" for part, n in result.get("left_out", {}).items())
    name = f"{args.out}@{STAGE}" if args.command == "import" else str(args.out)
    table.add_row(name, f"{result['parameters']:,}", f"{result['bytes'] / 1e9:.3f}", left or "none")
    return table


def _table_of_differences(result: dict) -> rich.table.Table:
    title = f"{result['tensors']} tensors in both: " + ("equal" if result["equal"] else "different")
    name = rich.table.Column("tensor", overflow="fold")
    table = rich.table.Table(name, "worst absolute", "worst relative", "A | B", title=title)
    for row in result["differences"][:_SHOWN]:
        numbers = (f"{row['absolute']:.3g}", f"{row['relative']:.3g}")
        table.add_row(row["name"], *numbers, row["kinds"])
    hidden = len(result["differences"]) - _SHOWN
    if hidden > 0:
        table.add_row(f"and {hidden} more, none further apart", "", "", "")
    for side in "ab":
        for name in brief(result[f"only_in_{side}"]):
            table.add_row(name, "", "", f"only in {side.upper()}")
    return table


if __name__ == "__main__":
    sys.exit(main())

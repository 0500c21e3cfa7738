"""What traces do: lengths, reflection, computations and mistakes, repetition and loops.

  python tools/inspect_cot.py runs/quickstart/samples.jsonl
  python tools/inspect_cot.py long_cot/amc23.jsonl.gz --field by=_model --steps=2 --plot=cot.svg

FILE is a workdir's samples.jsonl, or JSONL records (.jsonl or .jsonl.gz) with a trace each: fields
such as question, reasoning, response, score are found by their usual names, others are given with
--field NAME=FIELD, NAME one of trace, question, correct, tokens, operations, by (splits the table).
Lengths are what the records say, else tokens of --tokenizer, else words.
Exit codes: 0 done, 2 a mistake in what was asked (one line says which).
"""

import argparse
import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # no installation needed

import rich.console
import rich.markup
import rich.progress
import rich.table

from jaxreason.reasoning import reflect, segment
from jaxreason.recipes.read_traces import Found, read_traces
from jaxreason.report import plots
from jaxreason.report.summary import write_whole
from jaxreason.text.tokenizer import load_tokenizer

_SHOWN = 5  # malformed records that are named one by one


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    console = rich.console.Console(stderr=True)
    try:
        fields = dict(_pair(text) for text in args.field)
        rules = tuple(args.rules.split(","))
        segmentation = segment.Segmentation(rules=rules, min_chars=args.min_chars)
        if args.steps < 0:
            raise ValueError(f"--steps is {args.steps}; it must be 0 or more")
        if args.plot and args.plot.suffix != ".svg":
            raise ValueError(f"--plot is {args.plot}; it must end in .svg")
        count, unit = _length(args.tokenizer)
        found = read_traces(args.files, fields, count)
        summaries = _read(found, segmentation, console)
        units = {name: unit if s.counted else "tokens" for name, s in found.sets.items()}
        if args.json:
            write_whole(args.json, json.dumps(_as_json(summaries, units, found), indent=2) + "\n")
        if args.plot:
            write_whole(args.plot, plots.trace_summaries(summaries) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    width = None if sys.stdout.isatty() else 60 + 24 * len(summaries)
    out = rich.console.Console(width=width)
    out.print(_table(summaries, units))
    for name, summary in summaries.items():
        if summary.by_operations:
            out.print(_table_of_operations(name, summary))
    _print_steps(out, found, segmentation, args.steps)
    for line in found.skipped[:_SHOWN]:
        print(f"skipped: {line}", file=sys.stderr)
    if found.skipped:
        print(f"skipped: {len(found.skipped)} records without a trace", file=sys.stderr)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.add_argument("--field", action="append", default=[], metavar="NAME=FIELD")
    parser.add_argument("--tokenizer", metavar="DIR", help="a folder with a tokenizer, for lengths")
    rules = ",".join(segment.DEFAULT.rules)
    known = ", ".join(segment.RULES)
    parser.add_argument("--rules", default=rules, help=f"where steps begin: {known} ({rules})")
    chars = segment.DEFAULT.min_chars
    parser.add_argument("--min-chars", type=int, default=chars, help=f"of a step ({chars})")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="show N traces in steps")
    parser.add_argument("--json", type=pathlib.Path, help="file for the numbers")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.svg", help="file for a figure")
    return parser.parse_args(argv)


def _pair(text: str) -> tuple[str, str]:
    name, equals, field = text.partition("=")
    if not (name and equals and field):
        raise ValueError(f"--field is {text!r}; it must be NAME=FIELD, such as trace=solution")
    return name, field


def _length(tokenizer: str | None):
    """(text -> its length, the unit)."""
    if tokenizer is None:
        return (lambda text: len(text.split())), "words"
    encode = load_tokenizer(tokenizer).encode
    return (lambda text: len(encode(text))), "tokens"


def _read(
    found: Found, segmentation: segment.Segmentation, console: rich.console.Console
) -> dict[str, reflect.Summary]:
    total = sum(len(traces.traces) for traces in found.sets.values())
    summaries = {}
    with rich.progress.Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=total)

        def read(text: str) -> reflect.Reading:
            bar.advance(task)
            return reflect.read_trace(text, segmentation)

        for name, traces in found.sets.items():
            summaries[name], _ = reflect.summarize(traces.traces, read)
    return summaries


def _as_json(summaries: dict[str, reflect.Summary], units: dict[str, str], found: Found) -> dict:
    sets = {name: {"unit": units[name], **dataclasses.asdict(s)} for name, s in summaries.items()}
    return {"sets": sets, "skipped": len(found.skipped)}


# -------------------------------------------------------------------------------------- tables

_SHARE, _NUMBER = "{:.1%}", "{:,.1f}"


def _table(summaries: dict[str, reflect.Summary], units: dict[str, str]) -> rich.table.Table:
    """A column a set; a dash where there is nothing to tell."""
    names = (rich.markup.escape(name) for name in summaries)
    table = rich.table.Table("", *(rich.table.Column(name, overflow="fold") for name in names))
    rows = [
        ("traces", "{:,}", lambda s: s.num_traces),
        ("questions", "{:,}", lambda s: s.num_questions),
        ("accuracy, avg@k", "{}", lambda s: s.accuracy and f"{s.accuracy:.1%} (k = {s.avg_at})"),
        ("mean length", _NUMBER, lambda s: s.mean_tokens),
        ("  of correct", _NUMBER, lambda s: s.mean_tokens_correct),
        ("  of wrong", _NUMBER, lambda s: s.mean_tokens_wrong),
        ("accuracy / 1,000 of length", "{:.3f}",
         lambda s: None if s.token_efficiency is None else 1000 * s.token_efficiency),
        ("truncated", _SHARE, lambda s: s.truncated),
        ("steps a trace", _NUMBER, lambda s: s.mean_steps),
    ]  # fmt: skip
    for pool in reflect.POOLS:
        rows += [
            (f"reflective, {pool} pool", _SHARE, lambda s, p=pool: s.reflection_ratio[p]),
            ("  words a trace", _NUMBER, lambda s, p=pool: s.reflections[p]),
            ("  of the steps", _SHARE, lambda s, p=pool: s.reflective_steps[p]),
            ("  accuracy with", _SHARE, lambda s, p=pool: s.accuracy_reflective[p]),
            ("  accuracy without", _SHARE, lambda s, p=pool: s.accuracy_plain[p]),
            ("  length with", _NUMBER, lambda s, p=pool: s.tokens_reflective[p]),
            ("  length without", _NUMBER, lambda s, p=pool: s.tokens_plain[p]),
        ]
    rows += [
        ("computations a trace", _NUMBER, lambda s: s.mean_computations),
        ("  wrong", _SHARE, lambda s: s.wrong_computations),
        ("  of these corrected", _SHARE, lambda s: s.corrected),
        ("traces with a wrong one", _SHARE, lambda s: s.with_mistake),
        ("repeated 20-grams of words", _SHARE, lambda s: s.repeated),
        ("ends in a loop", _SHARE, lambda s: s.loops),
    ]
    for name, form, value in rows:
        table.add_row(name, *(_cell(form, value(summary)) for summary in summaries.values()))
    table.add_row("unit of length", *(units[name] for name in summaries))
    return table


def _table_of_operations(name: str, summary: reflect.Summary) -> rich.table.Table:
    """How mistakes accumulate; steps count from 1 as a reader counts them."""
    title = f"{rich.markup.escape(name)} by operations"
    columns = ("operations", "traces", "accuracy", "length", "computations", "no mistake stands",
               "first standing mistake in step: traces")  # fmt: skip
    table = rich.table.Table(*columns, title=title)
    for n, group in summary.by_operations.items():
        table.add_row(
            str(n), f"{group.num_traces:,}", _cell(_SHARE, group.accuracy),
            _cell(_NUMBER, group.mean_tokens), _cell(_NUMBER, group.mean_computations),
            _cell(_SHARE, group.no_mistake / group.num_traces),
            "  ".join(f"{step + 1}: {count}" for step, count in group.first_uncorrected.items()),
        )  # fmt: skip
    return table


def _cell(form: str, value) -> str:
    return "-" if value is None else form.format(value)


# --------------------------------------------------------------------------------------- steps


def _print_steps(
    out: rich.console.Console, found: Found, segmentation: segment.Segmentation, count: int
) -> None:
    """`count` traces, evenly spread over all, one step after the other."""
    numbered = [
        (name, i, trace)
        for name, traces in found.sets.items()
        for i, trace in enumerate(traces.traces)
    ]
    for k in range(min(count, len(numbered))):
        name, i, trace = numbered[k * len(numbered) // min(count, len(numbered))]
        steps = segment.segment(trace.text, segmentation)
        out.rule(f"{rich.markup.escape(name)} trace {i}: {len(steps)} steps")
        for number, step in enumerate(steps, 1):
            words = sum(reflect.count_words(step, reflect.WIDE).values())
            mark = "?" if words else " "
            lines = step.strip("\n").split("\n")
            out.print(f"{number:4}{mark} {lines[0]}", markup=False, highlight=False)
            for line in lines[1:]:
                out.print(f"      {line}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())

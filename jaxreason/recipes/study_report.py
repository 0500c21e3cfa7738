"""The report of a study: a table of arms with their spread over seeds, comparisons, one figure."""

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxreason.evals.accuracy import bootstrap_interval
from jaxreason.report import plots
from jaxreason.report.summary import write_whole

Found = Mapping[str, Any]  # what recipes/study.py keeps of a cell
_NONE = "-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What the cells' facts are in the report. Raises ValueError."""

    title: str
    metric: str = "avg@4"
    x: str = ""  # the fact along the figure's axis, a number; "": no figure
    panel: str = ""  # a panel of the figure each, and compared within
    line: str = "arm"
    compare: tuple[tuple[str, str], ...] = ()  # (arm, over arm), problem by problem

    def __post_init__(self):
        if not self.line:
            raise ValueError("study.layout.line is ''; it names the fact that tells arms apart")
        for pair in self.compare:
            if len(pair) != 2:
                raise ValueError(f"study.layout.compare has {pair!r}; it is (arm, over arm)")


# What a row of the table says of each of its cells, by the heading of the column.
_COLUMNS: dict[str, tuple[Callable[[Found, Layout], float | None], str]] = {
    "accuracy": (lambda one, layout: one["metrics"][layout.metric], ".3f"),
    "tokens": (lambda one, _: one["metrics"]["mean_tokens"], ".0f"),
    "cut off": (lambda one, _: one["metrics"]["truncated"], ".1%"),
    "reflective": (lambda one, _: one["traces"]["reflection_ratio"]["wide"], ".1%"),
    "computations": (lambda one, _: one["traces"]["mean_computations"], ".1f"),
    "redundant": (lambda one, _: redundant(one), ".1f"),
    "wrong": (lambda one, _: one["traces"]["wrong_computations"], ".1%"),
    "updates": (lambda one, _: one["updates"], ".0f"),
    "tokens learnt": (lambda one, _: one["tokens"], ",.0f"),
    "seconds": (lambda one, _: one["seconds"], ".0f"),
}


def redundant(one: Found) -> float | None:
    """Computations a trace beyond its expression's operations; None where those are unknown."""
    groups = one["traces"]["by_operations"]
    total = sum(group["num_traces"] for group in groups.values())
    if not total:
        return None
    beyond = (
        group["num_traces"] * (group["mean_computations"] - int(operations))
        for operations, group in groups.items()
    )
    return sum(beyond) / total


def write(folder: pathlib.Path, layout: Layout, found: Sequence[Found], wanted: int) -> None:
    """report.md, and accuracy.svg where there is an x, from the cells that are there."""
    text = [f"# {layout.title}", ""]
    seconds = sum(one["seconds"] for one in found)
    text += [f"{len(found)} of {wanted} cells, {seconds / 60:.0f} minutes in all. Written by the "
             "recipe `study` from the JSON files beside it; do not edit.", ""]  # fmt: skip
    if found:
        if layout.x:
            write_whole(folder / "accuracy.svg", _figure(layout, found) + "\n")
            text += ["![accuracy](accuracy.svg)", ""]
        for section in (_table, _compared, _on_the_way, _pruned, _by_operations):
            text += section(layout, found)
    write_whole(folder / "report.md", "\n".join(text).rstrip() + "\n")


def rows(layout: Layout, found: Sequence[Found]) -> list[tuple[dict[str, Any], list[Found]]]:
    """(facts, the cells of these facts, one a seed), by panel, line and x."""
    groups: dict[tuple, list[Found]] = {}
    for one in found:
        groups.setdefault(tuple(one["facts"].items()), []).append(one)
    of = lambda facts, name: str(facts.get(name, ""))

    def place(row: tuple[dict[str, Any], list[Found]]) -> tuple:
        facts, has_x = row[0], layout.x in row[0]
        return of(facts, layout.panel), has_x, of(facts, layout.line), facts.get(layout.x, 0)

    return sorted(((dict(facts), cells) for facts, cells in groups.items()), key=place)


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean and standard deviation (of a sample); - where a cell says nothing."""
    if not values or any(value is None for value in values):
        return _NONE
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def compare(ours: Sequence[Found], over: Sequence[Found]) -> tuple[float, list[float], int]:
    """(gain in accuracy, its 95 % interval, problems) of cells over others on the same problems.

    The seeds of each side are averaged first; the interval is by resampling problems.

    Raises:
      ValueError: they were asked different problems, or differently often.
    """
    samples = {cell["metrics_samples"] for cell in (*ours, *over)}
    sizes = {len(cell["correct"]) for cell in (*ours, *over)}
    if len(samples) != 1 or len(sizes) != 1:
        names = ", ".join(cell["name"] for cell in (*ours, *over))
        raise ValueError(
            f"study.layout.compare: {names} have {sorted(sizes)} problems and {sorted(samples)} "
            "samples of each; what is compared must be asked the same"
        )
    right = lambda cells: np.mean([[int(d, 36) for d in cell["correct"]] for cell in cells], axis=0)
    gain_Q = (right(ours) - right(over)) / samples.pop()
    return float(gain_Q.mean()), bootstrap_interval(gain_Q), len(gain_Q)


def _names(found: Sequence[Found]) -> list[str]:
    return list(dict.fromkeys(name for one in found for name in one["facts"]))


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] * len(head)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)] + [""]


def _table(layout: Layout, found: Sequence[Found]) -> list[str]:
    names = _names(found)
    lines = [
        [
            *(str(facts.get(name, _NONE)) for name in names),
            str(len(cells)),
            *(spread([get(c, layout) for c in cells], form) for get, form in _COLUMNS.values()),
        ]
        for facts, cells in rows(layout, found)
    ]
    text = (
        "Mean ± standard deviation over seeds. Redundant: computations beyond the expression's "
        "operations. Wrong: of the computations. Updates, tokens and seconds are a cell's own, "
        "without those of the cells it builds on."
    )
    return ["## Arms", "", text, "", *_markdown([*names, "seeds", *_COLUMNS], lines)]


def _by_operations(layout: Layout, found: Sequence[Found]) -> list[str]:
    """Accuracy, and the share of traces in which a mistake stands, by number of operations."""
    groups = lambda one: one["traces"]["by_operations"]
    numbers = sorted({int(n) for one in found for n in groups(one)})
    if not numbers:
        return []
    names, lines = _names(found), []
    for facts, cells in rows(layout, found):
        of = lambda n, cells=cells: [g for c in cells if (g := groups(c).get(str(n)))]
        accuracy = [spread([g["accuracy"] for g in of(n)], ".3f") for n in numbers]
        stands = [
            spread([statistics.fmean(values)] if values else [], ".3f")
            for n in numbers
            for values in [[1 - g["no_mistake"] / g["num_traces"] for g in of(n)]]
        ]
        both = [f"{a}; {s}" for a, s in zip(accuracy, stands, strict=True)]
        lines.append([*(str(facts.get(name, _NONE)) for name in names), *both])
    text = "Accuracy; share of the traces in which a wrong computation stands uncorrected."
    head = [*names, *(f"{n} operations" for n in numbers)]
    return ["## By number of operations", "", text, "", *_markdown(head, lines)]


def _compared(layout: Layout, found: Sequence[Found]) -> list[str]:
    """`compare` of arms that agree in every other fact."""
    if not layout.compare:
        return []
    grouped, lines = rows(layout, found), []
    for arm, base in layout.compare:
        for facts, cells in grouped:
            if facts.get(layout.line) != arm:
                continue
            other = {**facts, layout.line: base}
            over = next((group for given, group in grouped if given == other), None)
            if over is None:
                continue
            gain, (low, high), number = compare(cells, over)
            tokens = [
                statistics.fmean(c["metrics"]["mean_tokens"] for c in group)
                for group in (cells, over)
            ]
            rest = ", ".join(f"{k} {v}" for k, v in facts.items() if k != layout.line) or _NONE
            lines.append([arm, base, rest, f"{gain:+.3f}", f"{low:+.3f} to {high:+.3f}",
                          f"{tokens[0] / tokens[1] - 1:+.0%}", str(number)])  # fmt: skip
    head = ["arm", "over", "at", "gain in accuracy", "95 %", "tokens", "problems"]
    text = "On the same problems, the seeds of each side averaged; the interval is over problems."
    return ["## Compared", "", text, "", *_markdown(head, lines)]


def _on_the_way(layout: Layout, found: Sequence[Found]) -> list[str]:
    """The metric by updates, where `eval.every` asked for it."""
    points = lambda one: {round(x): y for x, y in one["curve"].get(layout.metric, [])}
    updates = sorted({x for one in found for x in points(one)})
    if not updates:
        return []
    names, lines = _names(found), []
    for facts, cells in rows(layout, found):
        at = [[points(one)[x] for one in cells if x in points(one)] for x in updates]
        if any(at):
            lines.append([*(str(facts.get(name, _NONE)) for name in names),
                          *(spread(values, ".3f") for values in at)])  # fmt: skip
    head = [*names, *(f"{x} updates" for x in updates)]
    return ["## On the way", "", "Accuracy of one evaluation.", "", *_markdown(head, lines)]


# What pruning says of its traces (reasoning.prune.Report), by the heading of the column.
_PRUNED = {
    "traces": ("num_traces", ".0f"), "kept": ("num_kept", ".0f"),
    "steps before": ("steps_before", ".2f"), "steps after": ("steps_after", ".2f"),
    "tokens before": ("tokens_before", ".1f"), "tokens after": ("tokens_after", ".1f"),
    "questions of one": ("max_questions", ".0f"), "not monotone": ("non_monotone", ".1%"),
    "binary agrees": ("binary_agrees", ".1%"),
}  # fmt: skip


def _pruned(layout: Layout, found: Sequence[Found]) -> list[str]:
    """Of every stage that pruned: what it kept, and what it asked."""
    names, lines = _names(found), []
    for facts, cells in rows(layout, found):
        stages = [name for name, said in cells[0]["stages"].items() if "kept_steps" in said]
        for stage in stages:
            values = [
                spread([one["stages"][stage].get(key) for one in cells], form)
                for key, form in _PRUNED.values()
            ]
            lines.append([*(str(facts.get(name, _NONE)) for name in names), stage, *values])
    if not lines:
        return []
    text = (
        "Means of the traces that were kept. Questions: the most that one trace took. Not "
        "monotone, where every prefix was asked: a longer one was worse. Of the others, how often "
        "binary search comes to the same cut."
    )
    head = [*names, "stage", *_PRUNED]
    return ["## Pruned traces", "", text, "", *_markdown(head, lines)]


def _figure(layout: Layout, found: Sequence[Found]) -> str:
    """Accuracy against x, a panel each; what has no x is a level line."""
    panels: dict[str, dict[str, list[tuple[float | None, list[float]]]]] = {}
    for facts, cells in rows(layout, found):
        panel = str(facts.get(layout.panel, "")) if layout.panel else ""
        line = panels.setdefault(panel, {}).setdefault(str(facts[layout.line]), [])
        line.append((facts.get(layout.x), [c["metrics"][layout.metric] for c in cells]))
    return plots.accuracy_by_scale(panels, layout.x, layout.metric)

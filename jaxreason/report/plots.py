"""The figures of the report as SVG text: numbers in, one <svg> element out, no files.

Each stage has one colour in every figure (`Palette`), from Okabe and Ito's set, which colour-blind
readers can tell apart; markers differ too.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from jaxreason.reasoning.reflect import Summary

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LABEL_SIZE = (24, 11)  # points of a short label, with room around it
_FEW_POINTS = 12  # so few are drawn as points and not smoothed
_INK, _GRID = "#3d4550", "#e4e7eb"
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "jaxreason",  # equal numbers give equal bytes
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": "#aab2bd",
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "legend.frameon": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # a date would change the bytes
Points = Sequence[tuple[float, float]]


class Palette:
    """Colour and marker of each stage, the same in all figures."""

    def __init__(self, stages: Sequence[str]):
        self._index = {stage: i for i, stage in enumerate(stages)}

    def color(self, stage: str) -> str:
        return _COLORS[self._index[stage] % len(_COLORS)]

    def marker(self, stage: str) -> str:
        return _MARKERS[self._index[stage] % len(_MARKERS)]


def loss_curves(
    train: Mapping[str, Points], validation: Mapping[str, Points], palette: Palette
) -> str:
    """One panel a stage: (step, loss) as logged, its moving average, and the validation points."""
    columns = min(3, len(train))
    rows = -(-len(train) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.9 * rows), layout="constrained")
        for i, (stage, points) in enumerate(train.items()):
            axes = figure.add_subplot(rows, columns, i + 1)
            steps, losses = np.array(points, float).T
            axes.plot(steps, losses, color=palette.color(stage), alpha=0.3, linewidth=1)
            axes.plot(steps, smooth(losses), color=palette.color(stage), linewidth=2)
            if validation.get(stage):
                axes.plot(*np.array(validation[stage]).T, "o", color=_INK, ms=4, label="validation")
                axes.legend(loc="upper right")
            axes.set_title(stage)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.set_ylim(bottom=0)
            if i % columns == 0:
                axes.set_ylabel("loss (nats a token)")
        return _svg(figure)


def learning_curves(panels: Mapping[str, tuple[str, Points]], color: str) -> str:
    """One panel a title: (what is measured, (step, value) as logged), and its moving average."""
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.9 * rows), layout="constrained")
        for i, (title, (measured, points)) in enumerate(panels.items()):
            axes = figure.add_subplot(rows, columns, i + 1)
            steps, values = np.array(points, float).T
            few = len(points) < _FEW_POINTS  # as of an evaluation every so many steps
            axes.plot(steps, values, "o-" if few else "-", color=color, linewidth=2 if few else 1,
                      alpha=1.0 if few else 0.3, markersize=5)  # fmt: skip
            if not few:
                axes.plot(steps, smooth(values), color=color, linewidth=2)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            bottom = min(0.0, float(values.min()))
            axes.set_ylim(bottom, bottom + 1.08 * max(float(values.max()) - bottom, 1e-9))
            axes.set_ylabel(measured)
        return _svg(figure)


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Centred moving average over `share` of the points; not-finite points are left out of it."""
    reach = max(1, round(len(values) * share / 2))
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    finite = [window[np.isfinite(window)] for window in windows]
    return np.array([window.mean() if window.size else np.nan for window in finite])


def accuracy_by_stage(
    values: Mapping[str, tuple[float, float, float]], metric: str, palette: Palette
) -> str:
    """values[stage] = (accuracy, low, high): a point and its interval, one line a stage."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 0.8 + 0.5 * len(values)), layout="constrained")
        axes = figure.add_subplot()
        for y, (stage, (value, low, high)) in enumerate(values.items()):
            color = palette.color(stage)
            axes.plot([0, value], [y, y], color=_GRID, linewidth=6, solid_capstyle="butt")
            axes.plot([low, high], [y, y], color=color, linewidth=2.5, alpha=0.6)
            axes.plot(value, y, palette.marker(stage), color=color, markersize=9)
            text = f"{value:.1%}"
            axes.annotate(
                text, (max(value, high), y), (10, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.set_xlim(0, 1.08)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(False, axis="y")
        axes.set_xlabel(metric)
        return _svg(figure)


def accuracy_by_group(
    values: Mapping[str, Mapping[str, float]], metric: str, palette: Palette
) -> str:
    """values[stage][group] = accuracy, the groups in the order of the first stage."""
    groups = list(next(iter(values.values())))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.7, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for stage, accuracy in values.items():
            line = [accuracy.get(group, np.nan) for group in groups]
            axes.plot(range(len(groups)), line, **_line(stage, palette))
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlim(-0.3, len(groups) - 0.7)
        axes.set_xlabel("operations")
        _percent_y(axes, metric)
        figure.legend(loc="outside lower center", ncols=min(3, len(values)))
        return _svg(figure)


def accuracy_by_tokens(
    values: Mapping[str, tuple[float, float]], metric: str, palette: Palette
) -> str:
    """values[stage] = (mean tokens of a completion, accuracy): what the tokens bought."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.7, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for stage, (tokens, accuracy) in values.items():
            style = _line(stage, palette)
            axes.plot(tokens, accuracy, **{**style, "linestyle": "none", "markersize": 10})
        axes.set_xlim(0, 1.12 * max(max(tokens for tokens, _ in values.values()), 1.0))
        axes.set_xlabel("mean tokens a completion")
        _percent_y(axes, metric)
        figure.legend(loc="outside lower center", ncols=min(3, len(values)))
        return _svg(figure)


def accuracy_by_scale(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float | None, Sequence[float]]]]],
    scale: str,
    metric: str,
) -> str:
    """panels[title][line] = [(x, accuracy of each seed)]: means, every seed a point.

    What has no x is a level line. The axis of x is logarithmic; all panels have one of y.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    palette = Palette(names)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.7 * len(panels), 4.4), layout="constrained")
        for axes, (title, lines) in zip(
            figure.subplots(1, len(panels), sharey=True, squeeze=False)[0],
            panels.items(),
            strict=True,
        ):
            for name, points in lines.items():
                style = _line(name, palette)
                for _, values in (point for point in points if point[0] is None):
                    axes.axhline(
                        np.mean(values), color=style["color"], linestyle="--", label=style["label"]
                    )
                placed = sorted((x, values) for x, values in points if x is not None)
                if placed:
                    axes.plot([x for x, _ in placed], [np.mean(v) for _, v in placed], **style)
                    every = [(x, value) for x, values in placed for value in values]
                    axes.plot(
                        *zip(*every, strict=True), style["marker"], color=style["color"],
                        alpha=0.35, markersize=4, linestyle="none",
                    )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.4g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(scale)
            axes.set_title(title)
            _percent_y(axes, metric)
        found: dict[str, Any] = {}
        for axes in figure.axes:
            handles, labels = axes.get_legend_handles_labels()
            found |= dict(zip(labels, handles, strict=True))
        figure.legend(
            list(found.values()), list(found), loc="outside lower center", ncols=min(4, len(found))
        )
        return _svg(figure)


@dataclasses.dataclass(frozen=True)
class Spending:
    """One way to spend tokens on a problem: a curve of accuracy against tokens."""

    name: str
    tokens: Sequence[float]  # mean tokens a problem, above 0
    accuracy: Sequence[float]
    interval: Sequence[tuple[float, float]]
    labels: Sequence[str]  # what was asked for at each point


def scaling_curves(curves: Sequence[Spending]) -> str:
    """Accuracy with its intervals against tokens, on an axis where a doubling is one length."""
    palette = Palette([curve.name for curve in curves])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.7, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for i, curve in enumerate(curves):
            low, high = np.array(curve.interval).T
            width = max(7 - 2.5 * i, 2)  # an interval at the same place is seen inside the other
            color = palette.color(curve.name)
            axes.vlines(curve.tokens, low, high, color=color, alpha=0.35, lw=width)
            order = np.argsort(curve.tokens, kind="stable")
            points = np.array(curve.tokens)[order], np.array(curve.accuracy)[order]
            axes.plot(*points, **_line(curve.name, palette))
        axes.set_xscale("log", base=2)
        axes.margins(x=0.12)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.4g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("mean tokens a problem")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))  # 97.5% is a tick too
        axes.set_ylabel("accuracy")
        bounds = np.concatenate([np.array(curve.interval).ravel() for curve in curves])
        room = max(0.15 * float(np.ptp(bounds)), 0.02)
        axes.set_ylim(max(bounds.min() - room, -0.05), min(bounds.max() + room, 1.05))
        _label_points(axes, curves, palette)
        figure.legend(loc="outside lower center", ncols=1 if len(curves) > 2 else 2)
        return _svg(figure)


def trace_summaries(summaries: Mapping[str, Summary]) -> str:
    """Sets of traces side by side: reflection, lengths, and by operations where those are known."""
    names = list(summaries)
    palette = Palette(names)
    known = {name: s.by_operations for name, s in summaries.items() if s.by_operations}
    with matplotlib.rc_context(_STYLE):
        height = 1.6 + 0.4 * len(names)
        rows = 2 if known else 1
        figure = Figure(figsize=(9.6, height + (3.2 if known else 0)), layout="constrained")
        grid = figure.add_gridspec(rows, 2, height_ratios=[height, 3.2][:rows])
        reflection, lengths = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
        pools = list(summaries[names[0]].reflection_ratio)
        shares = {p: [summaries[name].reflection_ratio[p] for name in names] for p in pools}
        _bars(reflection, names, {f"{pool} pool": row for pool, row in shares.items()})
        reflection.set_title("Traces with a word of reflection")
        reflection.set_xlim(0, 1.0)
        reflection.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        means = {
            "correct": [summaries[name].mean_tokens_correct or np.nan for name in names],
            "wrong": [summaries[name].mean_tokens_wrong or np.nan for name in names],
        }
        graded = np.isfinite(np.array(list(means.values()), float)).any()
        _bars(
            lengths,
            names,
            means if graded else {"all": [s.mean_tokens for s in summaries.values()]},
        )
        lengths.set_title("Mean length")
        lengths.set_yticklabels([])
        if known:
            accuracy = figure.add_subplot(grid[1, 0])
            mistakes = figure.add_subplot(grid[1, 1])
            for name, groups in known.items():
                line = [np.nan if g.accuracy is None else g.accuracy for g in groups.values()]
                accuracy.plot(list(groups), line, **_line(name, palette))
                stands = [1 - g.no_mistake / g.num_traces for g in groups.values()]
                mistakes.plot(list(groups), stands, **_line(name, palette))
            for axes, measured in (
                (accuracy, "accuracy"),
                (mistakes, "traces with a mistake left"),
            ):
                axes.set_xlabel("operations")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                _percent_y(axes, measured)
            figure.legend(
                *accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3
            )
        return _svg(figure)


def _bars(axes: Axes, names: Sequence[str], rows: Mapping[str, Sequence[float]]) -> None:
    """Horizontal bars, a group for each name and in it one for each row, the first on top."""
    thick = 0.8 / len(rows)
    for i, (label, values) in enumerate(rows.items()):
        at = np.arange(len(names)) + (i - (len(rows) - 1) / 2) * thick
        axes.barh(at, values, thick, label=label, color=_COLORS[i])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(rows))


def _label_points(axes: Axes, curves: Sequence[Spending], palette: Palette) -> None:
    """What was asked for, beside each point that has room for it.

    Curves rise: one is labelled above on the left, the next below on the right.
    """
    placed: list[np.ndarray] = []
    for i, curve in enumerate(curves):
        side, offset = ("right", (-5, 6)) if i % 2 == 0 else ("left", (5, -14))
        for x, y, label in zip(curve.tokens, curve.accuracy, curve.labels):
            here = axes.transData.transform((x, y)) * 72 / axes.figure.dpi + offset  # in points
            if all(np.any(abs(here - other) > _LABEL_SIZE) for other in placed):
                placed.append(here)
                axes.annotate(label, (x, y), offset, textcoords="offset points", fontsize=9.5,
                              ha=side, color=palette.color(curve.name))  # fmt: skip


def _line(stage: str, palette: Palette) -> dict:
    return {
        "label": stage,
        "color": palette.color(stage),
        "marker": palette.marker(stage),
        "linewidth": 2,
        "markersize": 7,
    }


def _percent_y(axes: Axes, metric: str) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel(metric)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML prologue, which HTML does not take

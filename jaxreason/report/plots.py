"""The figures of the report as SVG text: numbers in, one <svg> element out, no files.

Each stage has one colour in every figure (`Palette`), from Okabe and Ito's set, which colour-blind
readers can tell apart; markers differ too.
"""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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

"""report.html: what a run did, on one page that opens anywhere, made from the workdir's files."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from jaxreason.report import page, plots
from jaxreason.report.summary import read_lines, read_metrics, write_whole

_GOOD = ("ok", "done", "complete", "completed", "finished", "success")
_SHARES = ("avg@", "pass@", "maj@", "truncated")  # metrics that are shown in percent
_SAMPLES_A_KIND = 2  # right ones, and wrong ones, of each stage and set


@dataclasses.dataclass(frozen=True)
class Cell:
    text: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    columns: list[str]
    cells: list[list[Any]]  # of each row, its name and then Cells


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes WORKDIR/report.html from config.json, summary.json, metrics.jsonl and samples.jsonl.

    Raises:
      FileNotFoundError: there is no config.json or summary.json; the other two may be absent.
    """
    config = json.loads((workdir / "config.json").read_text())
    summary = json.loads((workdir / "summary.json").read_text())
    records = read_metrics(workdir)
    path = workdir / "report.html"
    samples = read_lines(workdir / "samples.jsonl")
    write_whole(path, render(workdir.resolve().name, config, summary, records, samples))
    return path


def render(
    title: str,
    config: dict[str, Any],
    summary: dict[str, Any],
    records: Sequence[dict[str, Any]],
    samples: Iterable[dict[str, Any]],
) -> str:
    """The page as text."""
    evals = summary["evals"]
    names = [*summary["stages"], *evals, *(stage for stage, _ in map(_stage_of, records))]
    palette = plots.Palette(list(dict.fromkeys(names)))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(page.TEMPLATE).render(
        title=title,
        style=markupsafe.Markup(page.STYLE),
        status=summary["status"],
        good=summary["status"] in _GOOD,
        facts=_facts(config, summary),
        sets=[_set(name, evals, palette) for name in _set_names(evals)],
        stages=_table("stage", summary["stages"]),
        losses=_losses(records, palette),
        samples=_pick(samples),
        config=list(_flatten(config)),
    )


def _facts(config: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    facts = [duration(summary["wall_seconds"]), f"{len(summary['stages'])} stages"]
    tokens = [stage["tokens"] for stage in summary["stages"].values() if stage.get("tokens")]
    if tokens:
        facts.append(f"{sum(tokens):,.0f} training tokens")
    if isinstance(config.get("parameters"), int):
        facts.append(f"{config['parameters']:,} parameters")
    return facts


def duration(seconds: float) -> str:
    """As `1 h 02 min`, `9 min 24 s` or `12.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


# ------------------------------------------------------------------------------------ tables


def _table(first: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row a name; the columns are all scalar values any row has, with intervals as notes."""
    columns = [
        name
        for name in dict.fromkeys(name for row in rows.values() for name in row)
        if not any(isinstance(row.get(name), dict | list) for row in rows.values())
    ]
    cells = [
        [name, *(Cell(_text(c, row.get(c)), _interval(row.get(f"{c}_ci"))) for c in columns)]
        for name, row in rows.items()
    ]
    return Table([first, *(column.replace("_", " ") for column in columns)], cells)


def _text(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str | bool):
        return str(value)
    if name.startswith(_SHARES):
        return f"{value:.1%}"
    if name.startswith("mean_"):
        return f"{value:,.1f}"
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.4f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}" if bounds else ""


# -------------------------------------------------------------------------------- evaluations


def _set_names(evals: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for sets in evals.values() for name in sets))


def _set(name: str, evals: Mapping[str, Mapping[str, Any]], palette: plots.Palette) -> dict:
    """What the page shows of one evaluation set; without sampled accuracy only its table."""
    stages = {stage: sets[name] for stage, sets in evals.items() if name in sets}
    shown: dict[str, Any] = {"name": name, "table": _table("stage", stages), "cards": []}
    metrics = [m for row in stages.values() for m in row if m.startswith("avg@") and "_" not in m]
    scored = {stage: row for stage, row in stages.items() if metrics and metrics[0] in row}
    if not scored:
        return shown
    metric = metrics[0]
    intervals = {s: (row[metric], *row[f"{metric}_ci"]) for s, row in scored.items()}
    tokens = {s: (row["mean_tokens"], row[metric]) for s, row in scored.items()}
    groups = {
        stage: {group: values[metric] for group, values in row.get("by_operations", {}).items()}
        for stage, row in scored.items()
    }
    several = len({group for by_group in groups.values() for group in by_group}) > 1
    shown["metric"] = metric
    shown["cards"] = [
        {
            "stage": stage,
            "color": palette.color(stage),
            "value": f"{value:.1%}",
            "note": f"{metric}, {_interval((low, high))}; {tokens[stage][0]:.1f} tokens",
        }
        for stage, (value, low, high) in intervals.items()
    ]
    shown["by_stage"] = markupsafe.Markup(plots.accuracy_by_stage(intervals, metric, palette))
    shown["by_tokens"] = markupsafe.Markup(plots.accuracy_by_tokens(tokens, metric, palette))
    shown["by_group"] = several and markupsafe.Markup(
        plots.accuracy_by_group(groups, metric, palette)
    )
    return shown


# ---------------------------------------------------------------------- curves, samples, config


def _stage_of(record: dict[str, Any]) -> tuple[str, bool]:
    """(stage, whether the record is a validation); the loop logs it under STAGE.validation."""
    stage = record["stage"]
    return stage.removesuffix(".validation"), stage.endswith(".validation")


def _losses(records: Iterable[dict[str, Any]], palette: plots.Palette) -> str:
    curves: tuple[dict[str, list], dict[str, list]] = ({}, {})
    for record in records:
        loss = record.get("loss")
        if loss is not None and math.isfinite(loss):
            stage, is_validation = _stage_of(record)
            curves[is_validation].setdefault(stage, []).append((record["step"], loss))
    train, validation = curves
    return markupsafe.Markup(plots.loss_curves(train, validation, palette)) if train else ""


def _pick(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first few right and wrong completions of each stage and set, one a problem and kind."""
    groups: dict[tuple[str, str], dict[bool, list]] = {}
    for sample in samples:
        kinds = groups.setdefault((sample["stage"], sample["set"]), {True: [], False: []})
        for correct, kept in kinds.items():
            found = next((c for c in sample["completions"] if c["correct"] is correct), None)
            if found is not None and len(kept) < _SAMPLES_A_KIND:
                kept.append({**found, "prompt": sample["prompt"], "answer": sample["answer"]})
    return [
        {"stage": stage, "set": name, "samples": kinds[True] + kinds[False]}
        for (stage, name), kinds in groups.items()
    ]


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted name, JSON of the value) of every leaf; a list is a leaf."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flatten(item, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

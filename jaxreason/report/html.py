"""report.html: what a run did, on one page that opens anywhere, made from the workdir's files."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from jaxreason.reasoning.scaling import s1_metrics
from jaxreason.report import page, plots
from jaxreason.report.summary import iterate_lines, read_metrics, write_whole

_GOOD = ("ok", "done", "complete", "completed", "finished", "success")
_SHARES = ("avg@", "pass@", "maj@", "truncated")  # metrics that are shown in percent
_SAMPLES_A_KIND = 2  # right ones, and wrong ones, of each stage and set
_ROLLOUT_STEPS = 3  # the last ones, of which groups are shown
_GROUPS_A_KIND = 2  # best ones, and worst ones, of those steps
_LEARNING = {  # metric of reinforcement learning -> title and unit of its panel
    "reward": ("reward", "mean of a rollout"),
    "completions/mean_length": ("response length", "tokens"),
    "entropy": ("entropy", "nats a token"),
}


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
    samples = iterate_lines(workdir / "samples.jsonl")
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
    evaluated, rollouts = _sort_samples(samples)
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
        learning=_learning(records, palette),
        scaling=_scaling(summary["scaling"]),
        samples=evaluated,
        rollouts=[_best_and_worst(stage, steps) for stage, steps in rollouts.items()],
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


# ------------------------------------------------------------------------- curves and samples


def _stage_of(record: dict[str, Any]) -> tuple[str, bool]:
    """(stage, whether the record is a validation); the loop logs it under STAGE.validation."""
    stage = record["stage"]
    return stage.removesuffix(".validation"), stage.endswith(".validation")


def _losses(records: Sequence[dict[str, Any]], palette: plots.Palette) -> str:
    """Of the stages that minimise it; a policy gradient's is no measure of anything."""
    curves: tuple[dict[str, list], dict[str, list]] = ({}, {})
    rewarded = {record["stage"] for record in records if "reward" in record}
    for record in records:
        loss = record.get("loss")
        if loss is not None and math.isfinite(loss) and record["stage"] not in rewarded:
            stage, is_validation = _stage_of(record)
            curves[is_validation].setdefault(stage, []).append((record["step"], loss))
    train, validation = curves
    return markupsafe.Markup(plots.loss_curves(train, validation, palette)) if train else ""


def _learning(records: Sequence[dict[str, Any]], palette: plots.Palette) -> list[dict[str, Any]]:
    """The figure of each stage that has rewards."""
    figures = []
    for stage in dict.fromkeys(record["stage"] for record in records if "reward" in record):
        own = [record for record in records if record["stage"] == stage]
        names = dict.fromkeys(name for record in own for name in record)
        shown = dict(_LEARNING)
        for name in names:
            if name.startswith("eval/") and name.split("/")[-1].startswith("avg@"):
                _, set_name, metric = name.split("/")
                if "_" not in metric:  # not its interval
                    shown[name] = (f"held-out {set_name}", metric)
        panels = {
            title: (measured, [(r["step"], r[name]) for r in own if _is_finite(r.get(name))])
            for name, (title, measured) in shown.items()
        }
        panels = {title: panel for title, panel in panels.items() if panel[1]}
        svg = plots.learning_curves(panels, palette.color(stage))
        figures.append({"stage": stage, "svg": markupsafe.Markup(svg)})
    return figures


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _sort_samples(
    samples: Iterable[dict[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, dict[int, list]]]:
    """What the page shows of samples.jsonl: evaluations, and {stage: {step: groups}} of rollouts.

    Of an evaluation the first few right and wrong completions of each stage and set, one a problem
    and kind; of reinforcement learning all groups of a stage's last steps.
    """
    sets: dict[tuple[str, str], dict[bool, list]] = {}
    rollouts: dict[str, dict[int, list]] = {}
    for sample in samples:
        if "set" not in sample:
            steps = rollouts.setdefault(sample["stage"], {})
            steps.setdefault(sample["step"], []).append(sample)
            if len(steps) > _ROLLOUT_STEPS:
                del steps[min(steps)]
            continue
        kinds = sets.setdefault((sample["stage"], sample["set"]), {True: [], False: []})
        for correct, kept in kinds.items():
            found = next((c for c in sample["completions"] if c["correct"] is correct), None)
            if found is not None and len(kept) < _SAMPLES_A_KIND:
                kept.append({**found, "prompt": sample["prompt"], "answer": sample["answer"]})
    evaluated = [
        {"stage": stage, "set": name, "samples": kinds[True] + kinds[False]}
        for (stage, name), kinds in sets.items()
    ]
    return evaluated, rollouts


def _best_and_worst(stage: str, steps: Mapping[int, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The groups with the highest and the lowest mean reward, best first."""
    groups = []
    for group in (group for step in sorted(steps, reverse=True) for group in steps[step]):
        rewards = [completion["reward"] for completion in group["completions"]]
        ranked = sorted(group["completions"], key=lambda c: c["reward"], reverse=True)
        mean = sum(rewards) / len(rewards)
        groups.append({**group, "completions": ranked, "mean": mean, "rewards": rewards})
    groups.sort(key=lambda group: group["mean"], reverse=True)  # stable: the latest of equals first
    worst = groups[_GROUPS_A_KIND:][-_GROUPS_A_KIND:]
    return {"stage": stage, "groups": groups[:_GROUPS_A_KIND] + worst}


# --------------------------------------------------------------------------- test-time scaling


def _scaling(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figure and tables of each stage and set whose scaling was measured."""
    benches: dict[tuple[str, str], dict[str, list]] = {}
    for record in records:
        curves = benches.setdefault((record["stage"], record["set"]), {})
        curves.setdefault(_spending(record), []).append(record)
    return [
        {
            "stage": stage,
            "set": name,
            "by_samples": _spending_figure(curves, ("majority", "best_of_n")),
            "by_thinking": _spending_figure(curves, ("budget", "waits")),
            "table": _scaling_table(curves),
            "s1": _s1_table(curves),
        }
        for (stage, name), curves in benches.items()
    ]


def _spending(record: dict[str, Any]) -> str:
    """The name of the curve a record belongs to."""
    names = {
        "majority": "vote of n samples",
        "best_of_n": "likeliest of n samples",
        "waits": "made to go on n times",
    }
    return names.get(record["method"]) or f"thinking budget ({record['wording']})"


def _asked(record: dict[str, Any]) -> str:
    if record["budget"] is not None:
        return f"≤{record['budget']}"
    return f"+{record['n']}" if record["method"] == "waits" else f"{record['n']}"


def _spending_figure(curves: Mapping[str, Sequence[dict[str, Any]]], methods: Sequence[str]) -> str:
    """The curves of these methods, "" where none was measured."""
    shown = [_curve(*curve) for curve in curves.items() if curve[1][0]["method"] in methods]
    return markupsafe.Markup(plots.scaling_curves(shown)) if shown else ""


def _curve(name: str, records: Sequence[dict[str, Any]]) -> plots.Spending:
    return plots.Spending(
        name,
        tokens=[max(record["mean_tokens"], 1.0) for record in records],
        accuracy=[record["accuracy"] for record in records],
        interval=[record["ci"] for record in records],
        labels=[_asked(record) for record in records],
    )


def _scaling_table(curves: Mapping[str, Sequence[dict[str, Any]]]) -> Table:
    columns = ["method", "n or budget", "accuracy", "mean tokens", "mean thinking", "truncated"]
    cells = [
        [
            name,
            Cell(_asked(record)),
            Cell(f"{record['accuracy']:.1%}", _interval(record["ci"])),
            Cell(f"{record['mean_tokens']:,.1f}"),
            Cell(f"{record['mean_thinking']:,.1f}"),
            Cell(f"{record['truncated']:.1%}"),
        ]
        for name, records in curves.items()
        for record in records
    ]
    return Table(columns, cells)


def _s1_table(curves: Mapping[str, Sequence[dict[str, Any]]]) -> Table:
    """s1's metrics of the methods that control the thinking of one sample."""
    cells = []
    for name, records in curves.items():
        if records[0]["method"] not in ("budget", "waits"):
            continue
        limits = [math.inf if r["budget"] is None else r["budget"] for r in records]
        metrics = s1_metrics(
            [r["mean_thinking"] for r in records], [r["accuracy"] for r in records], limits
        )
        slope = metrics["scaling"]
        cells.append(
            [
                name,
                Cell(f"{metrics['control']:.0%}"),
                Cell("–" if slope is None else f"{100 * slope:+.3g} points"),
                Cell(f"{metrics['performance']:.1%}"),
            ]
        )
    return Table(["s1's metrics", "control", "scaling, a token", "performance"], cells)


# -------------------------------------------------------------------------------------- config


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted name, JSON of the value) of every leaf; a list is a leaf."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flatten(item, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

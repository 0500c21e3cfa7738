"""summary.json, the machine-readable end of a run, and reading what a workdir has logged."""

import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

from jaxreason.data import files


def write_summary(
    workdir: pathlib.Path,
    status: str,
    wall_seconds: float,
    stages: dict[str, dict[str, Any]],
    evals: dict[str, dict[str, dict[str, Any]]],
    scaling: list[dict[str, Any]],
) -> dict[str, Any]:
    """Writes WORKDIR/summary.json whole or not at all, and returns what it holds.

    Args:
      stages: {stage: {"steps", "tokens", "final_loss", ...}}, in the order they ran.
      evals: {stage: {set: metrics of evals/}}.
      scaling: test-time scaling, [{"method", "n", "budget", "accuracy", "mean_tokens", ...}], as
        reasoning/scaling.py makes the records.

    Numbers that are not finite are written as null: JSON has no others.
    """
    summary = _finite(
        {
            "status": status,
            "wall_seconds": round(wall_seconds, 3),
            "stages": stages,
            "evals": evals,
            "scaling": scaling,
        }
    )
    write_whole(workdir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def write_whole(path: pathlib.Path, text: str) -> None:
    """Replaces a file by `text`, as files.write_whole does."""
    files.write_whole(path, lambda out: out.write(text.encode()))


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of WORKDIR/metrics.jsonl, {"stage", "step", "time", ...}; [] without the file."""
    return read_lines(workdir / "metrics.jsonl")


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """A file of one JSON object a line; a last line without its end was cut off and is dropped."""
    return list(iterate_lines(path))


def iterate_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """`read_lines` one by one: the samples of a long run do not fit into memory together."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from (json.loads(line) for line in file if line.endswith("\n"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

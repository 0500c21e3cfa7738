"""A grid of small runs and one report: which arm does what, at which scale, over seeds.

Every cell of `config.cells` is a run of the recipe `pipeline` in WORKDIR/NAME. It may start from,
or learn from, stages of other cells, as `init.from = "NAME@STAGE"` or the `path` "NAME@STAGE.PART"
of a source; those cells come first. What a cell found is one small file, FOLDER/NAME.json. A cell
whose file is there is not run again, unless its config, or that of a cell it builds on, is another
one than the file was made with. So the grid goes on where it stopped, on another machine too:
there, only what a missing cell builds on is run again. The same command started several times
shares the grid: each process takes cells that no other is at.
"""

import contextlib
import copy
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import operator
import pathlib
import re
import string
import time
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxreason.parallel import hosts
from jaxreason.reasoning import reflect
from jaxreason.recipes import checkpoints, pipeline, read_traces, study_report
from jaxreason.recipes.workdir import flatten
from jaxreason.report.summary import read_lines, read_metrics, write_whole
from jaxreason.train.metrics import Progress

_FROM = re.compile(
    r"stages\.[^.]+\.(init\.from|train\.teacher\.from|gate\.from|solvers|data\.teacher"
    r"|data\.sources\..+\.path)"
)
_UNASKED = re.compile(r"(run|log|mesh)\..*|name")  # how a cell is executed, not what it finds
_UNSET = (None, "", (), [], {})
_DIGITS = string.digits + string.ascii_lowercase
_NAME = re.compile(r"[\w-]+")
_PAUSE = 5.0  # seconds until cells are looked at again that other processes are at


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    name: str
    facts: dict[str, Any]  # what the report sorts by: arm, scale, size, ...
    config: ConfigDict  # of the pipeline; `init.from` may name other cells
    needs: tuple[str, ...]  # of these
    of: str  # the evaluation set that is reported

    @property
    def updates(self) -> dict[str, int]:
        """Of each stage that trains."""
        return {
            name: stage.train.steps * stage.train.get("updates", 1)
            * stage.train.get("num_iterations", 1)
            for name, stage in self.config.stages.items() if stage.kind in ("fit", "rl")
        }  # fmt: skip

    @property
    def judged(self) -> str:
        """The stage that is reported: the one that trains and that no other starts from."""
        starts = {
            value.lstrip("@") for key, value in flatten(self.config.to_dict()).items()
            if _FROM.fullmatch(key) and key.endswith("init.from")
            and self.config.stages[key.split(".")[1]].kind in ("fit", "rl")
        }  # fmt: skip
        last = [name for name in self.updates if name not in starts]
        if len(last) != 1:
            raise ValueError(
                f"cells.{self.name} ends in {', '.join(last) or 'no stage'}; one stage that trains "
                "must be the last, for it is what the report is of"
            )
        return last[0]


def plan(config: ConfigDict) -> dict[str, Cell]:
    """{name: cell}, each after those that it needs. Raises ValueError naming what is wrong."""
    if hosts.several():
        raise ValueError(
            f"recipe is 'study' and there are {hosts.count()} processes; a study is of one, and "
            "the same command started several times shares its cells"
        )
    _check_compared(config, study_report.Layout(**config.study.layout))
    cells = {}
    for name, entry in config.cells.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"cells has {name!r}; names are of letters, digits, '_' and '-'")
        if entry.config.recipe != "pipeline":
            raise ValueError(
                f"cells.{name}.config.recipe is {entry.config.recipe!r}; a cell is a pipeline"
            )
        _check_set(config, name)
        cells[name] = Cell(
            name, entry.facts.to_dict(), entry.config, _needs(config, name), config.study.set
        )
        cells[name].judged  # noqa: B018
        _check(cells[name])
    ordered = {}
    while len(ordered) < len(cells):
        ready = [
            c for c in cells.values() if c.name not in ordered and set(c.needs) <= set(ordered)
        ]
        if not ready:
            circle = next(name for name in cells if name not in ordered)
            raise ValueError(f"cells.{circle} needs {cells[circle].needs[0]!r}, which needs it")
        ordered |= {cell.name: cell for cell in ready}
    return ordered


def _check_compared(config: ConfigDict, layout: study_report.Layout) -> None:
    """Raises ValueError where `compare` has an arm that no cell is of."""
    known = sorted({str(entry.facts.get(layout.line)) for entry in config.cells.values()})
    for arm in itertools.chain.from_iterable(layout.compare):
        if arm not in known:
            raise ValueError(
                f"study.layout.compare has {arm!r}; as {layout.line!r} the cells have "
                f"{', '.join(known)}"
            )


def _check_set(config: ConfigDict, name: str) -> None:
    """Raises ValueError where a cell's evaluation would not have what is reported."""
    sets, wanted = config.cells[name].config.eval.sets, config.study.set
    sampled = [key for key, spec in sets.items() if spec.kind != "text"]
    if wanted not in sampled:
        raise ValueError(
            f"study.set is {wanted!r}; the sampled sets of cells.{name}.config.eval.sets: "
            f"{', '.join(sampled) or 'none'}"
        )
    n, metric = sets[wanted].num_samples, config.study.layout.metric
    if n >= len(_DIGITS):
        raise ValueError(
            f"cells.{name}.config.eval.sets.{wanted}.num_samples is {n}; a study keeps at most "
            f"{len(_DIGITS) - 1} of a problem"
        )
    k = 4 if n >= 4 else 1
    known = (f"avg@{k}", f"pass@{k}", f"maj@{n}")
    if metric not in known:
        raise ValueError(
            f"study.layout.metric is {metric!r}; of {n} samples a problem, as cells.{name} has, "
            f"there are {', '.join(known)}"
        )


def _needs(config: ConfigDict, name: str) -> tuple[str, ...]:
    """The cells that a cell starts or learns from. Raises ValueError for what there is not."""
    needs, own = [], config.cells[name].config.stages
    for key, value in flatten(config.cells[name].config.to_dict()).items():
        for text in _named(key, value):
            other, _, stage = text.partition("@")
            where = f"cells.{name}.config.{key}"
            if other in config.cells and other != name:
                known = config.cells[other].config.stages
                if stage.partition(".")[0] not in known:
                    raise ValueError(f"{where} is {text!r}; {other} has {', '.join(known)}")
                needs.append(other)
            elif not other and stage and stage.partition(".")[0] not in own:
                raise ValueError(f"{where} is {text!r}; the cell has {', '.join(own)}")
            elif key.endswith((".path", "data.teacher")):
                if "@" in text and _NAME.fullmatch(other):
                    known = ", ".join(config.cells)
                    raise ValueError(f"{where} is {text!r}; there is no such cell among {known}")
            elif other:
                try:
                    checkpoints.parse(text)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error
    return tuple(dict.fromkeys(needs))


def _named(key: str, value: Any) -> Sequence[str]:
    """What a key names that another cell's work may stand in."""
    if not _FROM.fullmatch(key):
        return ()
    return (value,) if isinstance(value, str) else value


def asked(cells: dict[str, Cell], name: str) -> str:
    """A digest of all that decides what the cell finds: its config and those it builds on.

    Keys that are not set are left out, so that a file outlives a key that is new and unset.
    """
    cell = cells[name]
    found = {
        key: value
        for key, value in flatten(cell.config.to_dict()).items()
        if not _UNASKED.fullmatch(key) and value not in _UNSET
    }
    below = [asked(cells, other) for other in cell.needs]
    text = json.dumps([found, below, cell.of], sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run(config: ConfigDict, folder: pathlib.Path) -> None:
    began, progress, cells = time.monotonic(), Progress(), plan(config)
    kept = pathlib.Path(config.study.folder)
    kept.mkdir(parents=True, exist_ok=True)
    missing = [name for name in cells if _kept(kept, cells, name) is None]
    progress.say(
        f"{config.name}: {len(cells)} cells, {len(cells) - len(missing)} of them in {kept}"
    )
    failed: dict[str, str | None] = {}  # None: what it needs failed
    done: set[str] = set()
    left, waits = missing, False
    while left:
        busy = []
        for name in left:
            if _kept(kept, cells, name) is not None:  # another process was at it
                continue
            if _run_cell(cells, name, folder, kept, done, failed, progress):
                _report(config, cells, kept)
            else:
                busy.append(name)
        if busy == left:
            if not waits:
                progress.say(f"{len(left)} cells are left, and others are at what comes first")
            time.sleep(_PAUSE)
        left, waits = busy, busy == left
    _report(config, cells, kept)
    if failed:  # the others are done, and the same command comes back to these
        own = {name: why for name, why in failed.items() if why is not None}
        others = len(failed) - len(own)
        needing = f"; {others} other cells need them" if others else ""
        raise ValueError("; ".join(f"cells.{name}: {own[name]}" for name in own) + needing)
    progress.say(f"done in {time.monotonic() - began:.0f} s: {kept / 'report.md'}")


def _run_cell(
    cells: dict[str, Cell],
    name: str,
    folder: pathlib.Path,
    kept: pathlib.Path,
    done: set[str],
    failed: dict[str, str | None],
    progress: Progress,
) -> bool:
    """Leaves the cell's file, after those of what it needs, or says in `failed` why there is none.

    Of what it needs, those that have a file but no finished workdir here are run, too. False where
    another process is at the cell, or at one that it needs.
    """
    if name in done or name in failed:
        return True
    cell, workdir = cells[name], folder / name
    for other in cell.needs:
        if not _run_cell(cells, other, folder, kept, done, failed, progress):
            return False
        if other in failed:
            failed[name] = None
            return True
    with _claimed(folder, name) as is_ours:
        if not is_ours:
            return False
        progress.say(f"cell {list(cells).index(name) + 1} of {len(cells)}: {name}")
        with _timed(workdir) as spent:
            try:
                pipeline.run(_resolved(cell, folder), workdir)
            except ValueError as error:
                failed[name] = str(error)
                return True
        jax.clear_caches()  # the next cell's programs are its own
        if _kept(kept, cells, name) is None:
            facts = {"name": name, "facts": cell.facts, "seed": cell.config.seed,
                     "asked": asked(cells, name), "jax": jax.__version__, **spent}  # fmt: skip
            found = facts | findings(cell, workdir)
            write_whole(kept / f"{name}.json", json.dumps(found, indent=1) + "\n")
    done.add(name)
    return True


@contextlib.contextmanager
def _claimed(folder: pathlib.Path, name: str):
    """Whether no other process is at this cell; within it none can be.

    However the process ends, the claim ends with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def _timed(workdir: pathlib.Path):
    """{"seconds", "cpu_seconds"}, filled at the end, of all times that a cell was run."""
    path, total = workdir / "study.json", {}
    wall, used = time.monotonic(), time.process_time()
    try:
        yield total
    finally:
        before = json.loads(path.read_text()) if path.exists() else {}
        now = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - used}
        total |= {name: round(before.get(name, 0.0) + now[name], 1) for name in now}
        if (workdir / "config.json").exists():  # a cell that never began leaves nothing
            write_whole(path, json.dumps(total) + "\n")


def _check(cell: Cell) -> None:
    """Raises ValueError, before any cell is run, for a stage that could not be."""
    config = _resolved(cell, None)
    if cell.needs and config.chat.template == "checkpoint":
        config.chat.template = "plain"  # that of another cell, which is not there yet
    for name, section in config.stages.items():
        try:
            pipeline.plan_stage(config, name, section)
        except ValueError as error:
            raise ValueError(f"cells.{cell.name}.config.stages.{name}: {error}") from error


def _resolved(cell: Cell, folder: pathlib.Path | None) -> ConfigDict:
    """The cell's config with paths into the workdirs of other cells in the place of their names.

    Args:
      folder: of the workdirs; None: there are none yet, other cells' work is as the cell's own.
    """
    config = copy.deepcopy(cell.config)

    def resolved(key: str, text: str) -> str:
        other, _, rest = text.partition("@")
        if other not in cell.needs:
            return text
        if folder is None:
            return f"@{rest}"
        below = folder.absolute() / other
        if key.endswith("data.teacher"):
            return str(below / "data" / rest)
        return f"{below / 'data' / rest}.jsonl" if key.endswith(".path") else f"{below}@{rest}"

    for key, value in flatten(cell.config.to_dict()).items():
        if any(text.partition("@")[0] in cell.needs for text in _named(key, value)):
            *sections, last = key.split(".")
            section = functools.reduce(operator.getitem, sections, config)
            made = [resolved(key, text) for text in _named(key, value)]
            section[last] = made[0] if isinstance(value, str) else type(value)(made)
    return config


def findings(cell: Cell, workdir: pathlib.Path) -> dict[str, Any]:
    """What a finished run found on an evaluation set: metrics, traces, cost.

    `correct` has a character a problem, to the base 36 the number of its samples that are right, so
    that cells can be compared problem by problem. `curve` has what `eval.every` found on the way:
    [[updates, value]] of each metric.
    """
    summary = json.loads((workdir / "summary.json").read_text())
    samples = [
        line
        for line in read_lines(workdir / "samples.jsonl")
        if line["stage"] == cell.judged and line.get("set") == cell.of
    ]
    traces = [trace for line in samples for trace in read_traces.traces_of(line)]
    trained = {k: v for k, v in summary["stages"].items() if k in cell.updates}
    return {
        "parameters": json.loads((workdir / "config.json").read_text())["parameters"],
        "stages": summary["stages"],
        "updates": sum(cell.updates.values()),
        "tokens": sum(stage["tokens"] for stage in trained.values()),
        "metrics": summary["evals"][cell.judged][cell.of],
        "metrics_samples": len(samples[0]["completions"]),
        "curve": _curve(cell, workdir),
        "traces": dataclasses.asdict(reflect.summarize(traces)[0]),
        "correct": "".join(
            _DIGITS[sum(c["correct"] for c in line["completions"])] for line in samples
        ),
    }


def _curve(cell: Cell, workdir: pathlib.Path) -> dict[str, list[list[float]]]:
    prefix, curve = f"eval/{cell.of}/", {}
    a_step = cell.updates[cell.judged] / cell.config.stages[cell.judged].train.steps
    for record in read_metrics(workdir):
        for name, value in record.items():
            if record["stage"] == cell.judged and name.startswith(prefix):
                point = [record["step"] * a_step, value]
                curve.setdefault(name.removeprefix(prefix), []).append(point)
    return curve


def _kept(kept: pathlib.Path, cells: dict[str, Cell], name: str) -> dict[str, Any] | None:
    """What the cell's file says, where it was made by the same config."""
    path = kept / f"{name}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found if found["asked"] == asked(cells, name) else None


def _report(config: ConfigDict, cells: dict[str, Cell], kept: pathlib.Path) -> None:
    found = [one for name in cells if (one := _kept(kept, cells, name)) is not None]
    study_report.write(kept, study_report.Layout(**config.study.layout), found, len(cells))

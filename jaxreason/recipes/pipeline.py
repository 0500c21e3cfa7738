"""Stages in order: data, training, evaluation of every stage, export, report.

The recipes `pipeline` (a config with `stages`) and `fit` (a config that is one stage itself).
Each part leaves a marker when it is done, so the same command goes on where it stopped.
"""

import contextlib
import dataclasses
import pathlib
import time

from ml_collections import ConfigDict

from jaxreason.checkpoint.store import restore_params
from jaxreason.data import pipeline as pipeline_lib
from jaxreason.data.arithmetic import ArithmeticConfig, prepare_arithmetic
from jaxreason.model.decoder import LanguageModel
from jaxreason.parallel.mesh import AXES
from jaxreason.recipes import assemble, evaluation
from jaxreason.recipes.fit import Stage, flops_per_token, plan, run_stage
from jaxreason.recipes.workdir import Workdir
from jaxreason.report.html import write_report
from jaxreason.report.summary import write_summary
from jaxreason.train.metrics import MetricsWriter, Progress


def stages_of(config: ConfigDict) -> list[Stage]:
    """Raises ValueError for whatever is wrong with any stage, before the first one runs."""
    if config.recipe == "fit":
        return [plan(config, config.name, config)]
    stages = []
    for name, section in config.stages.items():
        with _naming(config, name):
            stages.append(plan(config, name, section))
    return stages


@contextlib.contextmanager
def _naming(config: ConfigDict, stage: str):
    """Where there are several stages, says which one a mistake is in."""
    try:
        yield
    except ValueError as error:
        where = "" if config.recipe == "fit" else f"stages.{stage}: "
        raise ValueError(f"{where}{error}") from error


def run(config: ConfigDict, folder: pathlib.Path) -> None:
    began, progress = time.monotonic(), Progress()

    # --- everything that can be wrong is found before anything is expensive -----------------------
    stages = stages_of(config)
    shape = assemble.architecture(config, stages[0].start)
    _check_order(stages)
    workdir = Workdir(folder)
    workdir.open(config)
    tokenizer = assemble.tokenizer(config, workdir, stages[0].start)
    model = assemble.language_model(config, shape, tokenizer)
    prepare_data(config, workdir, progress)
    for stage in stages:
        with _naming(config, stage.name):
            pipeline_lib.build(stage.data, tokenizer, workdir.data).close()
    evaluate = evaluation.build(config, workdir, tokenizer, model)
    describe(config, workdir, model, stages[0].data.length)
    progress.say(f"{config.name}: {model.num_params:,} parameters, workdir {workdir.path}")

    # --- training ---------------------------------------------------------------------------------
    writer = MetricsWriter(workdir.path)
    for stage in stages:
        run_stage(config, stage, model, tokenizer, workdir, writer, progress, evaluate)
    writer.close()

    # --- evaluation and export of every stage -----------------------------------------------------
    evals = {}
    for stage in stages:
        load = lambda name=stage.name: restore_params(workdir.checkpoints(name), model.abstract())
        evals[stage.name] = evaluate_once(
            config, workdir, evaluate, stage.name, load, stage.fit.steps, progress
        )
        export = {"steps": stage.fit.steps, "dtype": config.run.export_dtype}
        if config.run.export and workdir.marker(f"{stage.name}.export") != export:
            assemble.export(config, model, load(), tokenizer, workdir.path / "hf" / stage.name)
            workdir.mark(f"{stage.name}.export", export)

    # --- report -----------------------------------------------------------------------------------
    done = {stage.name: workdir.marker(stage.name) for stage in stages}
    finish(workdir, done, evals, time.monotonic() - began, progress)


def prepare_data(config: ConfigDict, workdir: Workdir, progress: Progress) -> None:
    """The generated benchmark, where the config has one."""
    if "arithmetic" in config:
        target = workdir.data / "arithmetic"
        if not target.exists():
            progress.say("preparing arithmetic expressions")
        prepare_arithmetic(ArithmeticConfig(**config.arithmetic.to_dict()), target)


def describe(config: ConfigDict, workdir: Workdir, model: LanguageModel, length: int) -> None:
    """config.json: what is known once the model stands."""
    mesh = dict(model.mesh.shape) if model.mesh is not None else dict.fromkeys(AXES, 1)
    workdir.describe(
        architecture=dataclasses.asdict(model.config),
        chat_template=assemble.template_name(config),
        parameters=model.num_params,
        flops_per_token=flops_per_token(model, length),
        mesh=mesh,
        execution=dataclasses.asdict(model.execution),
    )


def evaluate_once(config, workdir, evaluate, name, load, steps, progress) -> dict[str, dict]:
    """The stage's metrics, from its marker where the same sets scored the same step before."""
    asked = {"sets": config.eval.sets.to_dict(), "steps": steps}
    marker = workdir.marker(f"{name}.eval")
    if marker is None or marker["asked"] != asked:
        progress.say(f"{name}: evaluating")
        key = assemble.stage_key(config.seed, f"{name}.eval")
        marker = {"asked": asked, "metrics": evaluate.run(name, load(), key)}
        workdir.mark(f"{name}.eval", marker)
    for set_name, metrics in marker["metrics"].items():
        shown = {k: v for k, v in metrics.items() if isinstance(v, float)}
        line = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        progress.say(f"{name} on {set_name}: {line}")
    return marker["metrics"]


def finish(workdir: Workdir, stages: dict, evals: dict, seconds: float, progress: Progress) -> None:
    write_summary(workdir.path, "done", round(seconds, 1), stages, evals, [])
    write_report(workdir.path)
    progress.say(f"done in {seconds:.0f} s: {workdir.path / 'report.html'}")


def _check_order(stages: list[Stage]) -> None:
    """Raises ValueError when a stage starts from one that does not come before it."""
    seen: set[str] = set()
    for stage in stages:
        own = stage.start.kind == "run" and stage.start.directory is None
        if own and stage.start.stage not in seen:
            raise ValueError(
                f"stages.{stage.name}.init.from is {stage.start.text!r}; stages before it: "
                f"{', '.join(sorted(seen)) or 'none'}"
            )
        seen.add(stage.name)

"""Stages in order: training and the data it makes, then evaluation, export, scaling, report.

The recipes `pipeline` (a config with `stages`), `fit` and `rl` (a config that is one stage itself).
Each part leaves a marker when it is done, so the same command goes on where it stopped.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time

from ml_collections import ConfigDict

from jaxreason.data.arithmetic import ArithmeticConfig, prepare_arithmetic
from jaxreason.evals import accuracy
from jaxreason.model import attention
from jaxreason.model.decoder import LanguageModel
from jaxreason.parallel import hosts
from jaxreason.parallel.mesh import AXES
from jaxreason.recipes import (
    assemble,
    checkpoints,
    curate,
    evaluation,
    fit,
    lora,
    prune,
    rl,
    scaling,
    topk,
    traces,
    weights,
)
from jaxreason.recipes.checkpoints import Checkpoint
from jaxreason.recipes.run import Run
from jaxreason.recipes.workdir import Workdir
from jaxreason.report.html import write_report
from jaxreason.report.summary import read_lines, write_summary
from jaxreason.rollout.sync import place
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.train.metrics import MetricsWriter, Progress
from jaxreason.types import Params

# Kinds of a stage: modules of plan, check_data and run_stage.
_TRAINING = {"fit": fit, "rl": rl}
# data/STAGE.jsonl, read later as "@STAGE"
_WRITING = {"traces": traces, "prune": prune, "curate": curate}
_SCORING = {"topk": topk}  # data/STAGE, read later by data.teacher = "@STAGE"
_MAKING = {**_WRITING, **_SCORING}
_RUNNING = {**_TRAINING, **_MAKING}  # mixed, each after those whose work it wants
Stage = (
    fit.Stage
    | rl.RLStage
    | traces.TracesStage
    | prune.PruneStage
    | topk.TopKStage
    | curate.CurateStage
    | scaling.ScalingStage
)


def stages_of(config: ConfigDict) -> list[Stage]:
    """Raises ValueError for whatever is wrong with any stage, before the first one runs."""
    if "stages" not in config:
        return [plan_stage(config, config.name, config)]
    if not config.stages:
        raise ValueError("stages is empty; it must have one at least")
    for name, section in config.stages.items():  # any may ask for the first one's template
        with _naming(config, name):
            if "train" in section:
                checkpoints.parse(section.init["from"])
    stages = []
    for name, section in config.stages.items():
        with _naming(config, name):
            stages.append(plan_stage(config, name, section))
    ordered = _in_order(stages)
    _check_stores(ordered)
    return ordered


def plan_stage(config: ConfigDict, name: str, section: ConfigDict) -> Stage:
    """Raises ValueError for whatever can be seen to be wrong with a stage by itself."""
    kinds = {**_RUNNING, "scaling": scaling}
    if section.kind not in kinds:
        raise ValueError(f"kind is {section.kind!r}; it must be one of {', '.join(kinds)}")
    return kinds[section.kind].plan(config, name, section)


@contextlib.contextmanager
def _naming(config: ConfigDict, stage: str):
    """Where there are several stages, says which one a mistake is in."""
    try:
        yield
    except ValueError as error:
        where = f"stages.{stage}: " if "stages" in config else ""
        raise ValueError(f"{where}{error}") from error


def run(config: ConfigDict, folder: pathlib.Path) -> None:
    began, progress = time.monotonic(), Progress()

    # --- everything that can be wrong is found before anything is expensive -----------------------
    stages = stages_of(config)
    assemble.check_xla_options(config.mesh)
    running = [stage for stage in stages if stage.section.kind in _RUNNING]
    trained = [stage for stage in running if stage.section.kind in _TRAINING]
    first = (trained or running or stages)[0]
    shape = assemble.architecture(config, first.start)
    workdir = Workdir(folder)
    workdir.open(config)
    tokenizer = assemble.tokenizer(config, workdir, first.start)
    model = assemble.language_model(config, shape, tokenizer)
    models = {}
    for stage in trained:
        with _naming(config, stage.name):
            models[stage.name] = _TRAINING[stage.section.kind].model_of(model, stage)
    prepare_data(config, workdir, progress)
    late = {stage.name for stage in running if not _has_data(stage, workdir)}
    for stage in running:
        if stage.name not in late:
            _check_data(config, stage, tokenizer, workdir)
    evaluate = evaluation.build(config, workdir, tokenizer, model)
    describe(config, workdir, model, tokenizer, first.length)
    workdir.describe(trained_parameters={name: m.num_params for name, m in models.items()})
    progress.say(f"{config.name}: {model.num_params:,} parameters, workdir {workdir.path}")
    progress.say(attention.said(model.attention, model.attention_use))
    for stage in trained:
        if stage.lora is not None:
            number, rank = models[stage.name].num_params, stage.lora.rank
            progress.say(f"{stage.name}: {number:,} parameters of adapters of rank {rank}")

    # --- training, and the making of data for it --------------------------------------------------
    writer = MetricsWriter(workdir.path)
    this_run = Run(config, workdir, tokenizer, model, evaluate, writer, progress)
    for stage in running:
        if stage.name in late:  # it is there now
            _check_data(config, stage, tokenizer, workdir)
        with _naming(config, stage.name):
            _RUNNING[stage.section.kind].run_stage(this_run, stage)
    writer.close()

    # --- evaluation and export of every stage, then the curves of test-time scaling ---------------
    evals = {}
    for stage in trained:
        load = lambda stage=stage: stage_params(this_run, stage)
        evals[stage.name] = evaluate_once(
            config, workdir, evaluate, stage.name, load, stage.steps, progress
        )
        export = {"steps": stage.steps, "dtype": config.run.export_dtype}
        if config.run.export and workdir.marker(f"{stage.name}.export") != export:
            _export(this_run, stage, load())
            if stage.lora is not None:
                _export_adapters(this_run, stage, models[stage.name])
            workdir.mark(f"{stage.name}.export", lambda export=export: export)
    for stage in trained:
        hosts.first(functools.partial(_add_gains, this_run, stage, evals))
    curves = [
        record
        for stage in stages
        if stage.section.kind == "scaling"
        for record in _scaling_once(this_run, stage)
    ]

    # --- report -----------------------------------------------------------------------------------
    done = {stage.name: workdir.marker(stage.name) for stage in running}
    finish(workdir, done, evals, time.monotonic() - began, progress, curves)


def _check_data(config: ConfigDict, stage: Stage, tokenizer: Tokenizer, workdir: Workdir) -> None:
    """Opens what the stage reads; what the first process prepares, the others find."""
    kind = stage.section.kind
    check = functools.partial(_RUNNING[kind].check_data, config, stage, tokenizer, workdir)
    with _naming(config, stage.name):
        hosts.first(check) if kind in _TRAINING else check()


def stage_params(run: Run, stage: Stage) -> Params:
    """What a trained stage ended with, without a critic's head; adapters are merged."""
    ended = Checkpoint(f"@{stage.name}", "run", stage=stage.name)
    return weights.load(ended, run.model, run.workdir.checkpoints)


def _export(run: Run, stage: Stage, params: Params) -> None:
    """hf/STAGE: the first process writes what each has on its own devices."""
    params = place(params, assemble.sampling_model(run.model))
    target = run.workdir.path / "hf" / stage.name
    hosts.first(lambda: assemble.export(run.config, run.model, params, run.tokenizer, target))


def _export_adapters(run: Run, stage: Stage, model: LanguageModel) -> None:
    """adapters/STAGE, beside hf/STAGE; says so where it names no base."""
    template = assemble.chat_template(run.config, run.tokenizer).jinja
    save = lambda folder: run.tokenizer.save(folder, chat_template=template)
    if lora.export(model, run.workdir, stage.name, stage.start, save) is None:
        run.progress.say(
            f"{stage.name}: the base of adapters/{stage.name}, {stage.start.text}, has no Hugging "
            f"Face folder of its own; use hf/{stage.name}"
        )


def _add_gains(run: Run, stage: Stage, evals: dict) -> None:
    """`gain` of every sampled set: over the stage of this run that the parameters came from."""
    before = stage.start.stage
    if stage.start.directory is not None or before not in evals:
        return
    samples = [line for line in read_lines(run.workdir.samples) if "set" in line]
    for sampled in run.evaluation.sampled:
        of = lambda name, set_name=sampled.name: [
            line for line in samples if (line["stage"], line["set"]) == (name, set_name)
        ]
        gain = accuracy.paired_gain(of(before), of(stage.name))
        evals[stage.name][sampled.name]["gain"] = {"over": before, **gain}
        low, high = gain["ci"]
        run.progress.say(
            f"{stage.name} on {sampled.name}: {gain['mean']:+.3f} over {before} "
            f"(95 % {low:+.3f} to {high:+.3f})"
        )


def _scaling_once(run: Run, stage: scaling.ScalingStage) -> list[dict]:
    """The stage's records, from its marker where the same was asked before."""
    source = run.workdir.marker(stage.start.stage) or {}
    asked = {
        "section": stage.section.to_dict(),
        "sets": run.config.eval.sets.to_dict(),
        "steps": source.get("steps"),
    }
    marker = run.workdir.marker(stage.name)
    if marker is None or marker["asked"] != _jsonable(asked):
        run.progress.say(f"{stage.name}: test-time scaling of {stage.start.text}")
        key = assemble.stage_key(run.config.seed, stage.name)
        params = weights.load(stage.start, run.model, run.workdir.checkpoints)
        records = scaling.run(stage, run.evaluation, run.tokenizer, params, key, run.progress)
        marker = {"asked": _jsonable(asked), "records": records}
        run.workdir.mark(stage.name, lambda: marker)
    return marker["records"]


def prepare_data(config: ConfigDict, workdir: Workdir, progress: Progress) -> None:
    """The generated benchmark, where the config has one."""
    if "arithmetic" in config:
        target = workdir.data / "arithmetic"
        if not target.exists():
            progress.say("preparing arithmetic expressions")
        made = ArithmeticConfig(**config.arithmetic.to_dict())
        hosts.first(lambda: prepare_arithmetic(made, target))


def describe(
    config: ConfigDict, workdir: Workdir, model: LanguageModel, tokenizer: Tokenizer, length: int
) -> None:
    """config.json: what is known once the model stands."""
    mesh = dict(model.mesh.shape) if model.mesh is not None else dict.fromkeys(AXES, 1)
    workdir.describe(
        architecture=dataclasses.asdict(model.config),
        chat_template=assemble.template_name(config),
        generation=assemble.generation(config, tokenizer),
        parameters=model.num_params,
        flops_per_token=fit.flops_per_token(model, length),
        mesh=mesh,
        execution=dataclasses.asdict(model.execution),
        kernels={
            "attention": model.attention,
            "decode_attention": model.decode_attention,
            "experts": model.expert_product,
            "passed_over": attention.passed_over(model.attention_use),
        },
        xla_options=assemble.xla_options(config.mesh),
    )


def evaluate_once(config, workdir, evaluate, name, load, steps, progress) -> dict[str, dict]:
    """The stage's metrics, from its marker where the same sets scored the same step before."""
    asked = {"sets": config.eval.sets.to_dict(), "steps": steps}
    marker = workdir.marker(f"{name}.eval")
    if marker is None or marker["asked"] != asked:
        progress.say(f"{name}: evaluating")
        key = assemble.stage_key(config.seed, f"{name}.eval")
        marker = {"asked": asked, "metrics": evaluate.run(name, load(), key)}
        workdir.mark(f"{name}.eval", lambda: marker)
    for set_name, metrics in marker["metrics"].items():
        shown = {k: v for k, v in metrics.items() if isinstance(v, float)}
        line = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        progress.say(f"{name} on {set_name}: {line}")
    return marker["metrics"]


def finish(
    workdir: Workdir,
    stages: dict,
    evals: dict,
    seconds: float,
    progress: Progress,
    curves: list[dict] = (),
) -> None:
    def write() -> None:
        write_summary(workdir.path, "done", round(seconds, 1), stages, evals, list(curves))
        write_report(workdir.path)

    hosts.first(write)
    progress.say(f"done in {seconds:.0f} s: {workdir.path / 'report.html'}")


def _check_stores(stages: list[Stage]) -> None:
    """Raises ValueError where a stage reads a store of this run that is of something else.

    A store of another run is looked at when it is opened.
    """
    named = {stage.name: stage for stage in stages}
    for stage in stages:
        for key, name in _data_of(stage):
            if key != "data.teacher":
                continue
            theirs, where = named[name], f"stages.{stage.name}"
            own = stage.objective.fields["temperature"]
            if own != theirs.section.temperature:
                raise ValueError(
                    f"{where}.train.distill.temperature is {own}, and stages.{name}.temperature "
                    f"{theirs.section.temperature}: the log-probs that it reads are at that one"
                )
            for field in ("sources", "truncation", "limit"):
                mine, stored = getattr(stage.data, field), getattr(theirs.data, field)
                if mine != stored:
                    key = {"limit": "max_tokens, or length where that is unset,"}.get(field, field)
                    said = "differ" if field == "sources" else f"is {mine!r}, not {stored!r}"
                    raise ValueError(
                        f"{where}.data.{key} {said}: stages.{name}, whose store it reads, must "
                        "have the same documents"
                    )


def _in_order(stages: list[Stage]) -> list[Stage]:
    """Each after those whose parameters or data it wants; else as the config gives them, by name.

    Raises ValueError when a stage wants one that there is not, or that wants it.
    """
    waiting, ordered = list(stages), []
    while waiting:
        lacking = [_lacking(stage, ordered) for stage in waiting]
        if all(lacking):
            others = lambda stage: [other for other in stages if other is not stage]
            never = [_lacking(stage, others(stage)) for stage in waiting]
            # Of a name that there is not; else of a circle, anywhere in it.
            at = next((i for i, lack in enumerate(never) if lack), 0)
            key, value, fitting = never[at] or lacking[at]
            raise ValueError(
                f"stages.{waiting[at].name}.{key} is {value!r}; stages that can come before it: "
                f"{', '.join(fitting) or 'none'}"
            )
        ordered.append(waiting.pop(lacking.index(None)))
    return ordered


def _lacking(stage: Stage, done: list[Stage]) -> tuple[str, str, list[str]] | None:
    """The first key whose stage is not among `done`, its value, and which of them would do."""
    named = lambda kinds: [other.name for other in done if other.section.kind in kinds]
    starts = getattr(stage, "starts", {"init.from": stage.start})
    wanted = [
        (key, start.text, start.stage, named(_TRAINING))
        for key, start in starts.items()
        if start.kind == "run" and start.directory is None
    ]
    wanted += [
        (key, f"@{name}", name, named(_SCORING if key == "data.teacher" else _WRITING))
        for key, name in _data_of(stage)
    ]
    return next(((k, text, names) for k, text, name, names in wanted if name not in names), None)


def _data_of(stage: Stage) -> list[tuple[str, str]]:
    """(key, STAGE) of every path "@STAGE" or "@STAGE.PART" among the stage's sources, and of a
    store of logits "@STAGE"."""
    data = stage.section.get("data", {})
    sources, store = data.get("sources", {}), data.get("teacher", "")
    found = [("data.teacher", store[1:])] if store.startswith("@") else []
    for name, source in sources.items():
        paths = [source.path] if isinstance(source.path, str) else source.path
        made = [path[1:].partition(".")[0] for path in paths if path.startswith("@")]
        found += [(f"data.sources.{name}.path", stage_name) for stage_name in made]
    return found


def _has_data(stage: Stage, workdir: Workdir) -> bool:
    """Whether all that it reads of other stages is made."""
    return all(workdir.marker(name) is not None for _, name in _data_of(stage))


def _jsonable(content: dict) -> dict:
    """As it comes back from a marker: tuples are lists there."""
    return json.loads(json.dumps(content))

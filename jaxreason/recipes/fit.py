"""One stage of training: from its section of the configuration to a done marker."""

import dataclasses
import time

import jax
from ml_collections import ConfigDict

from jaxreason.checkpoint.store import Store
from jaxreason.data import documents
from jaxreason.data import pipeline as pipeline_lib
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.lora import LoraConfig
from jaxreason.objectives.distill import check_teacher
from jaxreason.parallel import chips, cost, hosts
from jaxreason.recipes import assemble, checkpoints, lora, objectives, teacher, weights
from jaxreason.recipes.run import Run
from jaxreason.recipes.workdir import Workdir
from jaxreason.report.summary import read_metrics
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.train import optim
from jaxreason.train.fit import Fit, FitConfig, fit, whole_state
from jaxreason.train.step import make_train_step
from jaxreason.types import Frozen


@dataclasses.dataclass(frozen=True)
class Stage:
    """What can be checked of a stage before anything is built."""

    name: str
    section: ConfigDict  # its `init`, `data` and `train`
    data: pipeline_lib.DataConfig
    optimizer: optim.OptimizerConfig
    fit: FitConfig
    start: checkpoints.Checkpoint
    lora: LoraConfig | None
    objective: objectives.Plan

    @property
    def starts(self) -> dict[str, checkpoints.Checkpoint]:
        """The checkpoints that must be there before, by the keys that name them."""
        other = self.objective.start
        return {"init.from": self.start} | ({"train.teacher.from": other} if other else {})

    @property
    def steps(self) -> int:
        return self.fit.steps

    @property
    def length(self) -> int:
        return self.data.length


def plan(config: ConfigDict, name: str, section: ConfigDict) -> Stage:
    """Raises ValueError, naming key, value and what would be right, for whatever cannot run."""
    data = assemble.data_config(config, section)
    optimizer = assemble.from_section(optim.OptimizerConfig, section.train.optimizer)
    fit_config = FitConfig(
        steps=section.train.steps,
        log_every=config.log.every,
        save_every=config.run.save_every,
        validate_every=config.eval.every,
        max_nonfinite=config.run.max_nonfinite,
        profile=tuple(config.run.profile.steps),
    )
    optim.make_schedule(optimizer, fit_config.steps)
    hosts.check_rows(
        assemble.device_mesh(config.mesh), data.rows, config.mesh.microbatches, data.num_shards
    )
    start = checkpoints.parse(section.init["from"])
    adapters, objective = lora.plan(section, start), objectives.plan(section.train, start)
    objectives.check_data(objective, data)
    return Stage(name, section, data, optimizer, fit_config, start, adapters, objective)


def check_data(config: ConfigDict, stage: Stage, tokenizer: Tokenizer, workdir: Workdir) -> None:
    """Opens the data, of all processes. Raises ValueError for whatever is wrong with it."""
    other = stage.objective.start
    if other is not None and other != stage.start:  # its own start is checked with the tokenizer
        teacher.check_tokens(other, tokenizer)
    if stage.data.teacher:
        temperature = stage.objective.fields["temperature"]
        documents.check_temperature(stage.data, workdir.data, temperature)
    pipeline_lib.build(stage.data, tokenizer, workdir.data).close()


def model_of(model: LanguageModel, stage: Stage) -> LanguageModel:
    """What the stage trains of the run's model. Raises ValueError where it cannot."""
    return model.adapted(stage.lora)


def run_stage(run: Run, stage: Stage) -> None:
    """Trains, resuming where it was, and leaves the stage's done marker."""
    config, workdir = run.config, run.workdir
    done = workdir.marker(stage.name)
    if done and done["steps"] >= stage.steps:
        return
    began = time.monotonic()
    model = model_of(run.model, stage)
    optimizer = optim.make_optimizer(stage.optimizer, model.axes)
    schedule = optim.make_schedule(stage.optimizer, stage.fit.steps)
    read = {}  # name: the model that the objective compares with
    if name := stage.objective.reads:
        read[name] = teacher.build(stage.objective.start, run.model, run.tokenizer)
        check_teacher(run.model, read[name].model)
    train_step = make_train_step(
        model,
        stage.objective.build(read["teacher"].model if "teacher" in read else None),
        optimizer,
        schedule,
        clip_norm=stage.optimizer.clip_norm,
        microbatches=config.mesh.microbatches,
        num_shards=stage.data.num_shards,
        xla_options=assemble.xla_options(config.mesh),
    )
    owned = hosts.own_shards(model.mesh, stage.data.rows, stage.data.num_shards)
    batches = pipeline_lib.build(stage.data, run.tokenizer, workdir.data, shards=owned)
    with Store(workdir.checkpoints(stage.name), keep=config.run.keep) as store:
        job = Fit(
            stage=stage.name,
            config=stage.fit,
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            train_step=train_step,
            pipeline=batches,
            store=store,
            writer=run.writer,
            progress=run.progress,
            validate=run.evaluation.validate if run.evaluation.texts else None,
            flops_per_token=flops_per_token(model, stage.data.length),
            peak_flops=_peak_flops(),
            trace_dir=str(workdir.path / "profile" / stage.name),
        )
        key = assemble.stage_key(config.seed, stage.name)
        base = None
        if stage.lora:
            base = lora.frozen_base(workdir, stage.name, stage.start, run.model)
        # Adapters' own start, rounded as their base is: the policy is its reference at first.
        same = base is not None and stage.objective.start == stage.start
        load_read = lambda one: base if same else one.load(workdir.checkpoints)
        frozen = Frozen(base=base, read={name: load_read(one) for name, one in read.items()})
        load = lambda: weights.load(stage.start, model, workdir.checkpoints)
        first = (lambda: None) if stage.lora else load
        _, tokens = fit(job, key, first, frozen)
    stats = batches.stats(whole_state(batches))
    batches.close()

    def outcome() -> dict:
        records = [r for r in read_metrics(workdir.path) if r["stage"] == stage.name]
        return {
            "steps": stage.fit.steps,
            "tokens": int(tokens),
            "final_loss": records[-1]["loss"],
            "seconds": round(time.monotonic() - began, 1) + (done or {}).get("seconds", 0.0),
            "examples": stats.examples,
            "quarantined": stats.quarantined,
            "filtered": stats.filtered,
            "dropped": stats.dropped,
            "fill": round(stats.fill, 4),
        }

    workdir.mark(stage.name, outcome)


def flops_per_token(model: LanguageModel, length: int) -> float:
    """Training FLOPs of a token in causal rows of this length."""
    c = model.config
    windows = [c.window if sliding else None for sliding in c.sliding]
    return cost.flops_per_token(
        body_params=model.body_params,
        head_params=c.vocab_size * c.embed_dim,
        attention_dim=c.num_heads * c.head_dim,
        keys_per_query=sum(cost.causal_keys(length, window) for window in windows),
        frozen=model.lora is not None,
    )


def _peak_flops() -> float | None:
    chip = chips.detect(jax.devices()[0])
    return chip.flops * jax.device_count() if chip else None

"""One stage of reinforcement learning: from its section of the configuration to a done marker."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
from ml_collections import ConfigDict

from jaxreason.checkpoint import hf
from jaxreason.checkpoint.store import Store
from jaxreason.data import prompts as prompts_lib
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.lora import LoraConfig
from jaxreason.objectives.advantage import GROUPED, TeacherAdvantage
from jaxreason.objectives.distill import DistillConfig, check_teacher
from jaxreason.objectives.on_policy import objective_of
from jaxreason.objectives.policy import CORRECTIONS, KLS, PRESETS, Algorithm, PolicyGradient
from jaxreason.parallel import hosts, rules
from jaxreason.parallel.mesh import AXES, make_mesh
from jaxreason.recipes import assemble, checkpoints, evaluation, lora, teacher, weights
from jaxreason.recipes.run import Run
from jaxreason.recipes.workdir import Workdir
from jaxreason.report.summary import read_metrics
from jaxreason.rewards import mix
from jaxreason.rollout.sync import place
from jaxreason.text import chat
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.train import optim
from jaxreason.train.collect import CollectConfig, Collector
from jaxreason.train.groups import RowsConfig
from jaxreason.train.rl import RL, Kept, RLConfig, make_score, train
from jaxreason.train.step import make_train_step
from jaxreason.types import Params, Prompt, Sampling

# Numbers of PolicyGradient that only some choices of a switch read.
_READ_BY = {
    "delta": ("clip", ("dual",)),
    "cap": ("clip", ("cispo",)),
    "beta": ("kl", KLS[1:]),
    "is_min": ("correction", CORRECTIONS[1:]),
    "is_max": ("correction", CORRECTIONS[1:]),
}


@dataclasses.dataclass(frozen=True)
class RLStage:
    """What can be checked of a stage before anything is built."""

    name: str
    section: ConfigDict  # its `init`, `data`, `rewards`, `rollout` and `train`
    prompts: prompts_lib.PromptConfig
    rewards: dict[str, mix.RewardConfig]
    collect: CollectConfig
    sampling: Sampling
    loop: RLConfig
    algorithm: Algorithm
    optimizer: optim.OptimizerConfig
    start: checkpoints.Checkpoint
    lora: LoraConfig | None
    teacher: checkpoints.Checkpoint | None

    @property
    def starts(self) -> dict[str, checkpoints.Checkpoint]:
        """The checkpoints that must be there before, by the keys that name them."""
        taught = {"train.teacher.from": self.teacher} if self.teacher else {}
        return {"init.from": self.start} | taught

    @property
    def steps(self) -> int:
        return self.loop.steps

    @property
    def length(self) -> int:
        return self.section.train.length


def plan(config: ConfigDict, name: str, section: ConfigDict) -> RLStage:
    """Raises ValueError, naming key, value and what would be right, for whatever cannot run."""
    rollout, training = section.rollout, section.train
    fields = section.data.to_dict()
    prompts = prompts_lib.PromptConfig(
        **{**fields, "band": fields["band"] or None, "seed": config.seed}
    )
    sampling = Sampling(
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
        num_samples=rollout.num_generations,
    )
    if sampling.temperature == 0:
        raise ValueError("rollout.temperature is 0; a policy is learnt from samples: above 0")
    algorithm = _algorithm(training, rollout)
    collect = assemble.from_section(CollectConfig, {**rollout.to_dict(), "lmbda": algorithm.lmbda})
    _check_rollout(section, algorithm)
    _check_answers(prompts, algorithm)
    loop = RLConfig(
        steps=training.steps,
        updates=training.updates,
        num_iterations=training.num_iterations,
        asynchronous=rollout.asynchronous,
        entropy_coef=training.entropy_coef,
        entropy_target=training.entropy_target,
        log_every=config.log.every,
        save_every=config.run.save_every,
        evaluate_every=config.eval.every,
        samples_every=rollout.samples_every,
        max_nonfinite=config.run.max_nonfinite,
        max_mult_prob_error=rollout.max_mult_prob_error,
        profile=tuple(config.run.profile.steps),
    )
    _check_numbers(config, section, loop)
    if loop.has_entropy_bonus and not (algorithm.has_policy and algorithm.lmbda == 1):
        raise ValueError(
            f"train.entropy_coef is {loop.entropy_coef} and train.entropy_target "
            f"{loop.entropy_target}; a bonus needs rollout.lmbda = 1 and an estimator other than "
            "none"
        )
    if loop.asynchronous and algorithm.has_policy and algorithm.policy.correction == "none":
        raise ValueError(
            "rollout.asynchronous is true and train.policy.correction none: samples are one step "
            "old; set a correction, as token_truncate"
        )
    optimizer = assemble.from_section(optim.OptimizerConfig, training.optimizer)
    optim.make_schedule(optimizer, loop.num_updates)
    rewards = {
        reward: assemble.from_section(mix.RewardConfig, spec)
        for reward, spec in section.rewards.items()
    }
    if rollout.solved_by not in rewards:
        raise ValueError(
            f"rollout.solved_by is {rollout.solved_by!r}; it must be one of rewards: "
            f"{', '.join(rewards)}"
        )
    start = checkpoints.parse(section.init["from"])
    return RLStage(
        name, section, prompts, rewards, collect, sampling, loop, algorithm, optimizer, start,
        lora.plan(section, start), teacher.parse(training.teacher["from"]),
    )  # fmt: skip


def _algorithm(training: ConfigDict, rollout: ConfigDict) -> Algorithm:
    """The preset, with every switch that the config sets itself.

    A number of the preset that the chosen switches do not read is dropped.
    """
    if training.algorithm not in PRESETS:
        raise ValueError(f"train.algorithm is {training.algorithm!r}; known: {', '.join(PRESETS)}")
    preset = PRESETS[training.algorithm]
    given = lambda section: {key: value for key, value in section.items() if value is not None}
    own, plain = given(training.policy), PolicyGradient()
    advantage = dataclasses.replace(preset.advantage, **given(training.advantage))
    for switch, value in own.items() if advantage.estimator == "none" else ():
        raise ValueError(
            f"train.policy.{switch} is {value!r}, and train.advantage.estimator none, as of gkd, "
            "leaves no policy gradient to read it: leave it out"
        )
    dropped = {
        number: getattr(plain, number)
        for number, (switch, choices) in _READ_BY.items()
        if own.get(switch, getattr(preset.policy, switch)) not in choices
    }
    limits = {"temperature": rollout.temperature, "max_length": rollout.max_tokens}
    distill = _distilled(preset, given(training.distill), rollout.temperature)
    return Algorithm(
        policy=dataclasses.replace(preset.policy, **dropped | own | limits),
        advantage=advantage,
        teacher=_taught(training, preset, distill, given(training.teacher)),
        distill=distill,
        lmbda=preset.lmbda if rollout.lmbda is None else rollout.lmbda,
    )


def _distilled(preset: Algorithm, given: dict, temperature: float) -> DistillConfig | None:
    """The divergence from the teacher, where the preset has one or a switch of it is set."""
    if preset.distill is None and not given:
        return None
    # At the rollout's temperature, as its log-probs are, unless another is set.
    own = {"temperature": temperature} | given
    return dataclasses.replace(preset.distill or DistillConfig(), **own)


def _taught(
    training: ConfigDict, preset: Algorithm, distill: DistillConfig | None, given: dict
) -> TeacherAdvantage | None:
    """What a teacher says of each sampled token, as advantages. Raises ValueError.

    A teacher whose divergence is learnt gives them only where they are asked for.
    """
    name = given.pop("from")
    if not name and (preset.teacher or distill) is not None:
        raise ValueError(
            f"train.teacher.from is empty, and train.algorithm = {training.algorithm}"
            f"{'' if preset.teacher or preset.distill else ' with train.distill'} learns from a "
            "teacher; give a checkpoint as in init.from"
        )
    if not name:
        for field, value in given.items():
            raise ValueError(f"train.teacher.{field} is {value}, but train.teacher.from is empty")
        return None
    if preset.teacher is None and distill is not None and not given:
        return None
    return dataclasses.replace(preset.teacher or TeacherAdvantage(), **given)


def _check_rollout(section: ConfigDict, algorithm: Algorithm) -> None:
    """Whether there can be groups to learn from."""
    rollout, estimator = section.rollout, algorithm.advantage.estimator
    if estimator in ("external", "none") and rollout.filter_zero_std:
        raise ValueError(
            f"rollout.filter_zero_std is true and train.advantage.estimator {estimator}: what a "
            "teacher says needs no rewards that differ; set it to false"
        )
    grouped = rollout.filter_zero_std or estimator in GROUPED
    if rollout.num_generations < (2 if grouped else 1):
        raise ValueError(
            f"rollout.num_generations is {rollout.num_generations}; the completions of a prompt "
            "are compared: at least 2 (1 is for train.algorithm = reinforce_pp, ppo, opd, gkd or "
            "minillm with rollout.filter_zero_std = false)"
        )
    for name in ("num_prompts", "max_tokens", "slots"):
        if rollout[name] < 1:
            raise ValueError(f"rollout.{name} is {rollout[name]}; it must be at least 1")
    if section.train.rows_multiple < 1:
        raise ValueError(f"train.rows_multiple is {section.train.rows_multiple}; at least 1")
    _sampler_mesh(section)


def _check_answers(prompts: prompts_lib.PromptConfig, algorithm: Algorithm) -> None:
    """Whether there is what the steps learn from that do not sample."""
    for source in prompts.sources.values():
        if algorithm.lmbda < 1 and not source.has_target:
            key = "response_field" if source.kind == "jsonl" else "rendering"
            raise ValueError(
                f"rollout.lmbda is {algorithm.lmbda} and data.sources.{source.name}.{key} is "
                "empty; the steps that do not sample learn from the answers there: set it, or "
                "rollout.lmbda to 1"
            )


def _check_numbers(config: ConfigDict, section: ConfigDict, loop: RLConfig) -> None:
    """Whether the groups divide over the updates, and the rows over microbatches and mesh."""
    if section.rollout.num_prompts % loop.updates:
        raise ValueError(
            f"rollout.num_prompts is {section.rollout.num_prompts}; it must be a multiple of "
            f"train.updates = {loop.updates}"
        )
    mesh = assemble.device_mesh(config.mesh)
    ways = (rules.axis_size(mesh, "batch") if mesh is not None else 1) * config.mesh.microbatches
    if section.train.rows_multiple % ways:
        raise ValueError(
            f"train.rows_multiple is {section.train.rows_multiple}; it must be a multiple of "
            f"mesh.microbatches x mesh axes {' x '.join(rules.BATCH_AXES)} = {ways}"
        )
    if section.train.length <= section.rollout.max_tokens:
        raise ValueError(
            f"train.length is {section.train.length}; it must hold a prompt and "
            f"rollout.max_tokens = {section.rollout.max_tokens}"
        )


def check_data(config: ConfigDict, stage: RLStage, tokenizer: Tokenizer, workdir: Workdir) -> None:
    """Opens the prompts, reads every gold answer, and sees that prompts fit into a row.

    Raises ValueError naming the first that is wrong.
    """
    if stage.teacher is not None:
        teacher.check_tokens(stage.teacher, tokenizer)
    encode = evaluation.prompt_encoder(config, tokenizer)
    room, frame = stage.length - stage.sampling.max_tokens, len(encode(""))
    encode_answer = _answer_encoder(config, tokenizer)

    def check(prompts: Sequence[Prompt]) -> None:
        reward.check(prompts)
        for prompt in prompts if stage.algorithm.lmbda < 1 else ():
            ids = [token for part in encode_answer(prompt) for token in part]
            if len(ids) > stage.length:
                raise ValueError(
                    f"{prompt.id} has {len(ids)} tokens with its own answer; train.length is "
                    f"{stage.length}"
                )
        for prompt in prompts:
            if len(prompt.text.encode()) + frame <= room:
                continue  # a token is a byte at least: it need not be encoded
            if len(encode(prompt.text)) > room:
                raise ValueError(
                    f"{prompt.id} has {len(encode(prompt.text))} tokens; train.length = "
                    f"{stage.length} leaves {room} beside rollout.max_tokens = "
                    f"{stage.sampling.max_tokens}"
                )

    with assemble.rewards(config, stage.rewards) as reward:
        prompts_lib.build(stage.prompts, workdir.data, say=lambda line: None, check=check)


def _answer_encoder(
    config: ConfigDict, tokenizer: Tokenizer
) -> Callable[[Prompt], tuple[list[int], list[int]]]:
    """(ids before, ids learnt) of a prompt with its data set's answer, as fine-tuning has them."""
    template = assemble.chat_template(config, tokenizer)

    def encode(prompt: Prompt) -> tuple[list[int], list[int]]:
        answer = chat.Message("assistant", prompt.response, reasoning=prompt.reasoning)
        turns = [chat.Message("user", prompt.text), answer]
        ids_T, weights_T = chat.encode_conversation(tokenizer, template, turns)
        first, *_, last = weights_T.nonzero()[0].tolist()
        return ids_T[:first].tolist(), ids_T[first : last + 1].tolist()

    return encode


def model_of(model: LanguageModel, stage: RLStage) -> LanguageModel:
    """What the stage trains of the run's model, with a value head where there is a critic.

    Raises ValueError where it cannot.
    """
    return model.adapted(stage.lora, stage.algorithm.needs_values)


def sampler_of(model: LanguageModel, stage: RLStage) -> LanguageModel:
    """The run's model as it samples: the trainer's, or the same on `rollout.mesh`."""
    return assemble.sampling_model(model, _sampler_mesh(stage.section))


def _sampler_mesh(section: ConfigDict) -> jax.sharding.Mesh | None:
    """None: the trainer's."""
    shape = {axis: size for axis, size in section.rollout.mesh.items() if size is not None}
    if not shape:
        return None
    try:
        devices = jax.local_devices() if hosts.several() else None
        return make_mesh({axis: shape.get(axis, 1) for axis in AXES}, devices)
    except ValueError as error:
        raise ValueError(f"rollout.mesh: {error}") from error


def run_stage(run: Run, stage: RLStage) -> None:
    """Learns, resuming where it was, and leaves the stage's done marker."""
    config, workdir = run.config, run.workdir
    done = workdir.marker(stage.name)
    if done and done["steps"] >= stage.steps:
        return
    began = time.monotonic()
    model = model_of(run.model, stage)
    optimizer = optim.make_optimizer(stage.optimizer, model.axes)
    taught_by = stage.teacher and teacher.build(stage.teacher, run.model, run.tokenizer)
    taught_model = taught_by and taught_by.model
    if taught_by is not None:
        check_teacher(run.model, taught_model)
    train_step = make_train_step(
        model,
        objective_of(stage.algorithm, taught_model),
        optimizer,
        optim.make_schedule(stage.optimizer, stage.loop.num_updates),
        clip_norm=stage.optimizer.clip_norm,
        microbatches=config.mesh.microbatches,
        xla_options=assemble.xla_options(config.mesh),
    )
    encode = evaluation.prompt_encoder(config, run.tokenizer)
    sampler = sampler_of(run.model, stage)
    scored_by = taught_model if stage.algorithm.teacher is not None else None
    key = assemble.stage_key(config.seed, stage.name)

    prompts = prompts_lib.build(stage.prompts, workdir.data, say=run.progress.say)
    store = Store(workdir.checkpoints(stage.name), keep=config.run.keep)
    with store, assemble.rewards(config, stage.rewards) as reward:
        collector = Collector(
            config=stage.collect,
            sampling=stage.sampling,
            prompts=prompts,
            encode=encode,
            generate=evaluation.generator(
                config,
                run.tokenizer,
                sampler,
                stage.section.rollout.slots,
            ),
            reward=reward,
            solved_by=stage.section.rollout.solved_by,
            key=assemble.stage_key(config.seed, f"{stage.name}.rollout"),
            encode_answer=_answer_encoder(config, run.tokenizer),
            seed=config.seed,
        )
        job = RL(
            stage=stage.name,
            config=stage.loop,
            algorithm=stage.algorithm,
            rows=RowsConfig(
                length=stage.length,
                multiple=stage.section.train.rows_multiple,
                pad_id=run.tokenizer.pad_id,
                mask_truncated=stage.section.train.mask_truncated_completions,
            ),
            model=model,
            optimizer=optimizer,
            train_step=train_step,
            score=make_score(model, stage.algorithm.policy, scored_by),
            collector=collector,
            store=store,
            writer=run.writer,
            progress=run.progress,
            samples=workdir.samples,
            seed=config.seed,
            to_sampler=functools.partial(place, model=sampler),
            evaluate=lambda params: run.evaluation.sampled_metrics(hf.policy_of(params), key),
            trace_dir=str(workdir.path / "profile" / stage.name),
        )
        params, kept = _begins(run, stage, model, key)
        if taught_by is not None:
            load = lambda: taught_by.load(workdir.checkpoints)
            kept = dataclasses.replace(kept, teacher=load)
        _, tokens = train(job, key, params, kept)
    seconds = round(time.monotonic() - began, 1) + (done or {}).get("seconds", 0.0)

    def outcome() -> dict:
        records = [r for r in read_metrics(workdir.path) if r["stage"] == stage.name]
        content = {"steps": stage.steps, "tokens": int(tokens), **_outcome(records)}
        return content | {"seconds": seconds, "quarantined": prompts.num_quarantined}

    workdir.mark(stage.name, outcome)


def _begins(
    run: Run, stage: RLStage, model: LanguageModel, key: jax.Array
) -> tuple[Callable[[], Params | None], Kept]:
    """What makes the first parameters, and what is read beside them, as train.rl.train takes it."""
    checkpoints = run.workdir.checkpoints
    if stage.lora is not None:
        load = lambda: lora.frozen_base(run.workdir, stage.name, stage.start, run.model)
        base = functools.cache(load)  # it is the reference too
        return lambda: None, Kept(base if stage.algorithm.needs_reference else None, base)

    def params() -> Params | None:
        loaded = weights.load(stage.start, model, checkpoints)
        return None if loaded is None else model.with_value_head(loaded)

    def reference() -> Params:
        loaded = weights.load(stage.start, run.model, checkpoints)
        return assemble.random_params(run.model, key) if loaded is None else loaded

    return params, Kept(reference if stage.algorithm.needs_reference else None)


def _outcome(records: Sequence[dict]) -> dict:
    """What summary.json says of a stage's log."""
    learnt = [record for record in records if "loss" in record]
    rewards = [record["reward"] for record in records if "reward" in record] or [None]
    return {
        "final_loss": learnt[-1]["loss"] if learnt else None,
        "first_reward": rewards[0],
        "final_reward": rewards[-1],
        "skipped": records[-1]["rollout/skipped"],
    }

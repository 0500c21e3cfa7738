"""`config.eval`: the evaluation sets, built once and run on any parameters of the run's model."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxreason.data import sources
from jaxreason.data.arithmetic import open_arithmetic
from jaxreason.data.pipeline import DataConfig, evaluation_batches
from jaxreason.data.prompts import PromptSource, open_prompts
from jaxreason.evals import perplexity, suite
from jaxreason.evals.accuracy import Grader, Problem
from jaxreason.model.decoder import LanguageModel
from jaxreason.parallel import hosts
from jaxreason.recipes import assemble
from jaxreason.recipes.workdir import Workdir
from jaxreason.report.summary import read_lines, write_whole
from jaxreason.rewards import math, mix
from jaxreason.rollout.engine import EngineConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.text import chat
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.types import Batch, Completion, Params, Sampling


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sampled sets, and sets of held-out text."""

    sampled: tuple[suite.EvalSet, ...]
    texts: dict[str, Callable[[Params], dict[str, float]]]
    generate: Callable
    samples_path: object

    def run(self, stage: str, params: Params, key: jax.Array) -> dict[str, dict]:
        """All sets on these parameters; the samples replace the stage's lines of samples.jsonl."""
        metrics, samples = suite.run(self.sampled, self.generate, params, key)
        for name, score in self.texts.items():
            metrics[name] = score(params)
        self._keep_samples(stage, samples)
        return metrics

    def sampled_metrics(self, params: Params, key: jax.Array) -> dict[str, float]:
        """The sampled sets' numbers, named as in metrics.jsonl; no sample is kept."""
        metrics, _ = suite.run(self.sampled, self.generate, params, key)
        return {
            f"eval/{name}/{metric}": value
            for name, found in metrics.items()
            for metric, value in found.items()
            if isinstance(value, float)
        }

    def validate(self, params: Params) -> dict[str, float]:
        """The text sets alone, named as in metrics.jsonl: cheap enough for a training loop."""
        return {
            f"eval/{name}/{metric}": value
            for name, score in self.texts.items()
            for metric, value in score(params).items()
        }

    def _keep_samples(self, stage: str, samples: list[dict]) -> None:
        if not hosts.is_first():
            return
        ours = lambda line: line["stage"] == stage and "set" in line  # not a rollout's
        kept = [line for line in read_lines(self.samples_path) if not ours(line)]
        lines = kept + [{"stage": stage, **sample} for sample in samples]
        write_whole(self.samples_path, "".join(json.dumps(line) + "\n" for line in lines))


def build(
    config: ConfigDict, workdir: Workdir, tokenizer: Tokenizer, model: LanguageModel
) -> Evaluation:
    """Raises ValueError naming the set for a missing file, an unknown kind or a bad number."""
    if config.eval.rows < 1:
        raise ValueError(f"eval.rows is {config.eval.rows}; it must be at least 1")
    sampled, texts, split = [], {}, assemble.split_reasoning(config)
    grade = lambda text, answer: math.grade(text, answer, split)
    for name, spec in config.eval.sets.items():
        if spec.kind == "text":
            texts[name] = _text_set(config, name, workdir, tokenizer, model)
        elif spec.kind in ("arithmetic", "jsonl", "prompts"):
            if spec.kind == "prompts":
                problems, grader = _prompt_problems(name, spec, workdir, config)
            else:
                problems, grader = _problems(name, spec, workdir), grade
            ks = tuple(k for k in (1, 4) if k <= spec.num_samples)[-1:]
            sampled.append(suite.EvalSet(name, problems, _sampling(spec), grader, ks))
        else:
            raise ValueError(
                f"eval.sets.{name}.kind is {spec.kind!r}; it must be arithmetic, jsonl, prompts "
                "or text"
            )
    generate = generator(config, tokenizer, model, config.eval.rows)
    return Evaluation(tuple(sampled), texts, generate, workdir.samples)


def prompt_encoder(config: ConfigDict, tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """A user's turn -> the ids that the completion follows."""
    template = assemble.chat_template(config, tokenizer)

    def encode(prompt: str) -> list[int]:
        message = chat.Message("user", prompt)
        return chat.encode_prompt(tokenizer, template, [message], config.chat.thinking)

    return encode


def generator(
    config: ConfigDict,
    tokenizer: Tokenizer,
    model: LanguageModel,
    rows: int,
    encode: Callable[[Any], list[int]] | None = None,
):
    """`generate` of the rollout engine with `rows` slots.

    Args:
      model: the run's, or one that assemble.sampling_model made of it.
      encode: of a prompt to ids; None: prompts are as users write them.
    """
    if hosts.several() and model.mesh.size == jax.device_count():
        model = assemble.sampling_model(model)
    return build_generate(
        model,
        encode or prompt_encoder(config, tokenizer),
        tokenizer.decode,
        tokenizer.eos_id,
        EngineConfig(slots=rows),
        chat.thinking_ids(tokenizer, assemble.think_tags(config), config.chat.wait),
        tokenizer.stop_ids,
    )


def _sampling(spec: ConfigDict) -> Sampling:
    return Sampling(
        max_tokens=spec.max_tokens,
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        num_samples=spec.num_samples,
    )


def _problems(name: str, spec: ConfigDict, workdir: Workdir) -> tuple[Problem, ...]:
    key = f"eval.sets.{name}.prompt_template"
    asked = sources.template_fields(spec.prompt_template, key)
    if spec.kind == "arithmetic":
        records = open_arithmetic(workdir.data / spec.path, "test")
        if unknown := [field for field in asked if field not in records[0]]:
            raise ValueError(
                f"{key} is {spec.prompt_template!r}; an expression has no {unknown[0]!r}, but "
                f"{', '.join(records[0])}"
            )
        answer = lambda record: record["answer"]
        group = lambda record: str(record["num_operations"])
    else:
        records = sources.JsonlSource(
            spec.path,
            fields=dict.fromkeys((*asked, spec.answer_field), ""),
            data_dir=workdir.data,
            key=f"eval.sets.{name}.path",
        )
        answer = lambda record: math.extract_answer(record[spec.answer_field])
        group = lambda record: ""
    rows = [records[i] for i in range(min(spec.limit or len(records), len(records)))]
    problems = [
        Problem(spec.prompt_template.format(**row), answer(row), group(row)) for row in rows
    ]
    unreadable = [i for i, problem in enumerate(problems) if problem.answer is None]
    if unreadable:
        raise ValueError(
            f"eval.sets.{name}: record {unreadable[0]} has no answer in field {spec.answer_field!r}"
        )
    return tuple(problems)


def _prompt_problems(
    name: str, spec: ConfigDict, workdir: Workdir, config: ConfigDict
) -> tuple[tuple[Problem, ...], Grader]:
    """Prompts as reinforcement learning has them, right where their reward is its highest, 1."""
    source = PromptSource(**{**spec.prompts.to_dict(), "name": name})
    term = assemble.from_section(mix.RewardConfig, spec.reward)
    reward, split = assemble.rewards(config, {name: term}), assemble.split_reasoning(config)
    prompts = open_prompts(source, workdir.data)
    chosen = [prompts[i] for i in range(min(spec.limit or len(prompts), len(prompts)))]
    reward.check(chosen)

    def grade_by_reward(text: str, answer: str) -> math.Grade:
        completion = Completion(text=text, ids=(), logprobs=(), truncated=False)
        (value,), _ = reward([completion], [answer])
        return math.Grade(split(text)[1].strip() or None, value >= 1)

    return tuple(Problem(p.text, p.answer) for p in chosen), grade_by_reward


def _text_set(
    config: ConfigDict, name: str, workdir: Workdir, tokenizer: Tokenizer, model: LanguageModel
) -> Callable[[Params], dict[str, float]]:
    spec = config.eval.sets[name]
    data = DataConfig(
        sources={name: {"kind": "jsonl", "path": spec.path, "text_field": spec.text_field}},
        rows=spec.rows,
        length=spec.length,
        packing="concat",
        shuffle=False,
        **assemble.chat_fields(config),
    )

    @jax.jit
    def nll(params: Params, batch: Batch):
        h_BTD = model.hidden(params, batch.tokens_BT, batch.segments_BT, batch.positions_BT)
        _, sums = model.xent(params, h_BTD, batch.targets_BT, batch.weights_BT)
        return sums.nll, batch.weights_BT.sum()

    def score(params: Params) -> dict[str, float]:
        held_out = evaluation_batches(data, tokenizer, workdir.data, max_batches=spec.max_batches)
        return perplexity.evaluate_text(nll, params, held_out.batches, held_out.num_bytes)

    return score

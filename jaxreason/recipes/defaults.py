"""Every configuration key with its default; a file of configs/ says what differs."""

import dataclasses
import difflib
import math
import types
import typing

from ml_collections import ConfigDict, config_dict

from jaxreason.data.arithmetic import ArithmeticConfig
from jaxreason.data.prompts import PromptSource
from jaxreason.data.sources import SourceConfig
from jaxreason.model.config import DecoderConfig
from jaxreason.model.lora import LoraConfig
from jaxreason.model.rope import RopeScaling
from jaxreason.objectives.advantage import Advantage, TeacherAdvantage
from jaxreason.objectives.distill import DistillConfig, TopKDistillation
from jaxreason.objectives.policy import PolicyGradient
from jaxreason.objectives.preference import Preference
from jaxreason.parallel.mesh import AXES
from jaxreason.reasoning.segment import Segmentation
from jaxreason.recipes.study_report import Layout
from jaxreason.rollout.remote import ServerConfig
from jaxreason.train.optim import OptimizerConfig
from jaxreason.types import Sampling


def default_config(name: str, recipe: str) -> ConfigDict:
    """The keys that every recipe shares."""
    return ConfigDict(
        {
            "name": name,  # the workdir is runs/NAME unless --workdir says otherwise
            "recipe": recipe,
            "seed": 0,
            "tokenizer": {
                # bytes | sentencepiece (trained on `path`) | hf (read from `path`) | checkpoint
                # (that of init.from)
                "kind": "bytes",
                "path": "",
                "text_field": "text",  # sentencepiece: the field of each JSONL record
                "vocab_size": 8192,  # sentencepiece only
                "max_bytes": 20_000_000,  # sentencepiece: of training text
            },
            "chat": {
                # qwen3 | plain | checkpoint (that of init.from) | a .jinja file
                "template": "qwen3",
                "thinking": True,
                "think_open": "<think>",
                "think_close": "</think>",
                # What templates that tell the day say (Llama 3's own default); "": today, on which
                # the tokens of a run then depend.
                "date": "2024-07-26",
                "wait": "Wait",  # what a thinking budget writes where the model would stop
            },
            "model": model_config(),
            "mesh": {
                # How many ways; -1: the devices that are left. docs/scaling.md, tools/tune_mesh.py.
                "shape": {"data": -1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1},
                "microbatches": 1,
                # What the backward pass recomputes of a layer: none | full | all but attention
                # (save_attention) or but the products too (save_projections) | names to keep, as
                # in qkv+attention+attention_projection+gate_up
                "remat": "none",
                "offload": (),  # of those names, what is kept in the host's memory
                "context": "ring",  # ring | gather: how keys and values meet over shape.context
                "attention": "auto",  # auto | or a name of model/attention.py: flash, splash, ...
                # Of sampling, one query a row: auto | xla | pallas (NVIDIA GPUs)
                "decode_attention": "auto",
                # Of keys and values while sampling: auto (mesh.dtype) | fp8_e4m3 (pallas alone)
                "kv_cache_dtype": "auto",
                "experts": "auto",  # auto | loop | megablox | pallas: see kernels/grouped.py
                "dtype": "auto",  # auto: float32 on CPU, bfloat16 on accelerators
                # true | false | auto: unrolled on CPU, scanned on accelerators
                "scan_layers": "auto",
                "xla_options": {},
            },
            "run": {
                "save_every": 200,
                "keep": 2,
                "max_nonfinite": 5,
                "deterministic": False,
                "compilation_cache": "~/.cache/jaxreason/xla",  # "": none
                "profile": {"steps": ()},  # (first, last) step of each stage
                "export": True,  # write hf/STAGE after each stage
                "export_dtype": "float32",
                # Several processes; unset: what the launcher says (parallel/launchers.py).
                "processes": {
                    "coordinator": config_dict.placeholder(str),  # HOST:PORT of process 0
                    "number": config_dict.placeholder(int),  # 1: this one alone, whatever it says
                    "index": config_dict.placeholder(int),  # of this process, from 0
                    "heartbeat": 30,  # seconds of silence after which one counts as dead
                    "patience": 300,  # seconds in which all must have started
                },
            },
            "log": {"every": 20},
            "eval": {"every": 0, "rows": 256, "sets": {}},
        },
    )


def updates(num_examples: int, epochs: float, batch: int) -> int:
    """`train.steps` that show so many examples so often, `batch` of them an update; rounded up.

    Raises ValueError for a number that is not above 0.
    """
    for name, value in (("num_examples", num_examples), ("epochs", epochs), ("batch", batch)):
        if value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    return math.ceil(num_examples * epochs / batch)


def arithmetic_config(**fields) -> dict:
    """`config.arithmetic`: the benchmark that the run generates into its data folder."""
    return dataclasses.asdict(ArithmeticConfig(**fields))


def model_config(preset: str = "qwen3-tiny", **changes) -> ConfigDict:
    """`config.model`: a preset, and each field of DecoderConfig, None where the preset decides."""
    model = ConfigDict({"preset": preset})
    unset = lambda fields: {f.name: config_dict.placeholder(_plain_type(f.type)) for f in fields}
    fields = [f for f in dataclasses.fields(DecoderConfig) if f.name != "rope_scaling"]
    model.update(unset(fields), rope_scaling=unset(dataclasses.fields(RopeScaling)))
    model.update(changes)
    return model


def stage_config() -> dict:
    """The keys of one stage: at the top of a `fit` config, under `stages.NAME` otherwise."""
    return {
        "kind": "fit",
        # random | @STAGE | WORKDIR[@STAGE[@STEP]] | Hugging Face directory | hf://ORG/NAME[@REV]
        "init": {"from": "random"},
        "data": {
            "sources": {},  # entries of source()
            "weights": {},
            "num_shards": 1,
            "rows": 32,
            "length": 256,
            "packing": "first_fit",
            "examples_per_batch": config_dict.placeholder(int),
            "truncation": "error",  # of a document too long: error | keep_start | drop (counted)
            "max_tokens": config_dict.placeholder(int),  # of a document; None: data.length
            "train_roles": ("assistant",),
            "reasoning_weight": 1.0,  # of its tokens in the loss, both think tags among them
            "answer_weight": 1.0,  # ... the end of the turn among them
            "teacher": "",  # a folder, or @NAME in the run's data, of stores of top-k logits
            "shuffle": True,
        },
        "train": {
            "steps": 100,
            # lm | step_by_step (two tasks) | distill | distill_topk (from data.teacher) |
            # dpo | ipo | orpo | simpo | pruning (DPO with an SFT term)
            "objective": "lm",
            "z_loss": 0.0,
            "alpha": 0.5,  # step_by_step: of the labels' loss; 1 - alpha of the rationales'
            "distill": {f.name: _value(f) for f in dataclasses.fields(TopKDistillation)},
            "preference": switches(Preference, "loss_type"),  # over those of the objective
            # A checkpoint, as init.from, with this run's tokens: of distill the teacher, of dpo and
            # ipo the reference ("": where the stage starts from).
            "teacher": {"from": ""},
            "lora": dataclasses.asdict(LoraConfig()),  # rank 0: the weights themselves
            "optimizer": dataclasses.asdict(OptimizerConfig()),
        },
    }


def rl_config() -> dict:
    """The keys of a stage of reinforcement learning, as `stage_config` for training on data."""
    return {
        "kind": "rl",
        "init": {"from": "random"},
        "data": {
            "sources": {},  # entries of prompts()
            "shuffle": True,
            "band": (),  # (lowest, highest) solve rate of the prompts to draw, as (0.2, 0.8)
            "band_min_samples": 8,
            "revisit_epochs": 4,
        },
        "rewards": {"accuracy": reward("math")},
        "rollout": {
            "num_prompts": 32,
            "num_generations": 8,  # completions a prompt
            "max_tokens": 256,
            "temperature": 1.0,
            "filter_zero_std": True,
            "max_gen_batches": 10,
            # Share of the steps on samples, the rest on the sources' own answers (response_field,
            # rendering); unset: the algorithm's, 0.5 of gkd and else 1
            "lmbda": config_dict.placeholder(float),
            "solved_by": "accuracy",  # the reward whose mean is a prompt's solve rate
            "asynchronous": False,  # step n + 1 is sampled while step n is learnt from
            "max_mult_prob_error": 1.05,
            "slots": 256,
            "mesh": {  # the sampler's, where it is not the trainer's: an axis left out is 1
                axis: config_dict.placeholder(int) for axis in AXES
            },
            "samples_every": 10,
        },
        "train": {
            "steps": 100,
            "algorithm": "grpo",  # a preset of objectives/policy.py; switches set below override it
            "policy": switches(PolicyGradient, "temperature", "max_length"),
            "advantage": switches(Advantage),
            # A checkpoint, as init.from, with this run's tokens; what it says of each sampled
            # token is added to the advantages (algorithm opd: is all that is learnt). Beside a
            # divergence from it (`distill`) only where the algorithm or a switch here asks for it.
            "teacher": {"from": "", **switches(TeacherAdvantage)},
            # A term of the loss over the whole vocabulary, where the algorithm (gkd, minillm) or a
            # switch here asks for it; temperature unset: the rollout's.
            "distill": switches(DistillConfig, "nll_coef"),
            "entropy_coef": 0.0,
            "entropy_target": config_dict.placeholder(float),  # nats a token: adaptive entropy
            "updates": 4,  # a rollout is split into so many
            "num_iterations": 1,
            "mask_truncated_completions": True,
            "length": 512,
            "rows_multiple": 8,
            "lora": dataclasses.asdict(LoraConfig()),
            "optimizer": dataclasses.asdict(
                OptimizerConfig(learning_rate=1e-6, schedule="constant", weight_decay=0.0)
            ),
        },
    }


def scaling_config(**changes) -> dict:
    """One entry of `stages`: which parameters answer which set, and what is tried on it."""
    return {
        "kind": "scaling",
        "init": {"from": ""},  # as in a stage that trains
        "set": "arithmetic",  # a sampled set of eval.sets
        "limit": 0,  # problems of it; 0: all
        "votes": (1, 2, 4, 8, 16),  # sizes of the vote, all from one set of samples
        "rank_by": "logprob",  # best of n by mean log-probability, from the same; "": not
        "budgets": (),  # thinking tokens
        "wordings": ("s1",),  # how the end of thinking is forced, a curve each: s1, qwen3, tag
        "waits": (),  # ends of thinking that become "Wait"
        "num_samples": 1,  # a problem, for budgets and waits
        # The set's own where nothing is said:
        "max_tokens": config_dict.placeholder(int),
        "temperature": config_dict.placeholder(float),
        **changes,
    }


def traces_config(**changes) -> dict:
    """One entry of `stages`: a teacher writes, what is right is kept in data/STAGE.jsonl.

    A later stage reads it by `path="@STAGE"`, with `prompt_field="question"`,
    `reasoning_field="reasoning"`, `response_field="response"`.
    """
    server = {field.name: field.default for field in dataclasses.fields(ServerConfig)}
    return {
        "kind": "traces",
        "init": {"from": ""},  # the teacher, as in a stage that trains; "" where a server answers
        "template": "",  # of the teacher's chat, as chat.template; "": its own
        "server": {**server, "url": "", "model_name": "", "extra": {}},
        # A student that each token of the teacher's must be likely to; "": none
        "gate": {"from": "", "threshold": 0.01},
        "data": {
            "sources": {},  # entries of prompts()
            "shuffle": False,
            "num_questions": 0,  # the first in that order; 0: all
        },
        "rewards": {"accuracy": reward("math")},
        "solved_by": "accuracy",  # the reward that is 1 where a trace is correct
        "sampling": _sampling(Sampling(max_tokens=1024, num_samples=30)),  # a question: SCoTD's 30
        "keep": "correct",  # all | correct | first_correct | shortest_correct
        "per_question": 0,  # kept traces; 0: 1 of first_ and shortest_correct, else no limit
        "save_every": 64,  # questions
        "rows": 256,  # slots of the engine
        **changes,
    }


def prune_config(**changes) -> dict:
    """One entry of `stages`: long traces are cut to what the student still answers from.

    A later stage reads data/STAGE.jsonl by `path="@STAGE"`, with `prompt_field="question"`,
    `reasoning_field="reasoning"`, `response_field="response"`; data/STAGE.pairs.jsonl, of the
    pruned over the full traces, by `path="@STAGE.pairs"`, with `prompt_field="prompt"`,
    `chosen_field="chosen"`, `rejected_field="rejected"`.
    """
    return {
        "kind": "prune",
        "init": {"from": ""},  # the student, which has learnt from such traces
        "data": {
            "sources": {},  # entries of source(): question, reasoning, answer
            "limit": 0,  # traces, the first of the sources in order; 0: all
        },
        "answer_field": "",  # of a record, the gold answer; "": the trace's own
        "rewards": {"accuracy": reward("math")},
        "solved_by": "accuracy",  # the reward that is 1 where the student's answer is right
        "segment": dataclasses.asdict(Segmentation()) | {"max_chars": config_dict.placeholder(int)},
        # binary: by the student's answers | guided: the same, asked first after the step that
        # first comes to the answer | exhaustive: every prefix asked | first_correct: after that
        # step, nobody asked | random
        "method": "guided",
        "max_tokens": 64,  # of an answer
        "batch": 1024,  # traces in flight, and what a kill can lose
        "rows": 256,  # slots of the engine
        **changes,
    }


# What is set before the first device is touched (launch.set_up_jax).
_OF_THE_PROCESS = ("deterministic", "compilation_cache", "processes")


def study_config(name: str, folder: str, **layout) -> ConfigDict:
    """A whole config of the recipe `study`; `layout` as study_report.Layout takes it."""
    shared = default_config(name, "study")
    fields = {f.name: f.default for f in dataclasses.fields(Layout)}
    return ConfigDict(
        {
            "name": name,
            "recipe": "study",
            "run": {key: shared.run[key] for key in _OF_THE_PROCESS},  # for all cells
            "study": {
                "folder": folder,  # a JSON file for each finished cell, report.md
                "set": "arithmetic",  # of eval.sets, what is reported
                "layout": {**fields, "title": name, **layout},
            },
            "cells": {},  # entries of cell()
        }
    )


def cell(config: ConfigDict, **facts) -> dict:
    """An entry of `cells`: a config of the recipe `pipeline`, and what the report sorts it by.

    Where it says `from`, it may name a stage of another cell, as "CELL@STAGE".
    """
    return {"facts": facts, "config": config}


def topk_config(**changes) -> dict:
    """One entry of `stages`: a teacher's k likeliest tokens at every place of the sources.

    A later stage of train.objective = distill_topk reads data/STAGE by `data.teacher="@STAGE"`. Its
    `data` must make the same documents: the same sources, length, max_tokens and truncation.
    """
    return {
        "kind": "topk",
        "init": {"from": ""},  # the teacher, with this run's tokens
        "data": stage_config()["data"],  # as the stage that reads it has, but for `teacher`
        "k": 64,
        "temperature": 1.0,  # of the log-probs; train.distill.temperature must be the same
        "part_documents": 128,  # a file has so many, and a kill loses one file at most
        "rows": 8,  # rows of data.length that the teacher reads at a time
        **changes,
    }


def curate_config(**changes) -> dict:
    """One entry of `stages`: of many traces those to train on, chosen as s1 chose its thousand.

    A later stage reads data/STAGE.jsonl by `path="@STAGE"`, with `prompt_field="question"`,
    `reasoning_field="reasoning"`, `response_field="response"`.
    """
    return {
        "kind": "curate",
        "method": "s1k",  # s1k: difficulty and diversity | random: a draw of the same size
        "data": {
            "sources": {},  # entries of source(): question, reasoning, answer
            "limit": 0,  # traces that are read, the first of the sources in order; 0: all
        },
        "limit": 0,  # traces that are kept; 0: all that no filter drops
        "num_samples": 0,  # traces of a question that are looked at, the first; 0: all
        "quality": {
            "needs_reasoning": True,
            "min_tokens": 0,  # of the reasoning
            "max_tokens": config_dict.placeholder(int),
            "without": (),  # texts that may be nowhere, as ("[asy]", "![")
            "loops": False,  # drop those that end in a loop; of long traces a second for a dozen
        },
        "keep": "all",  # all | correct | first_correct | shortest_correct
        # Of a record: true, or 1, where it is correct; "": by the reward, against answer_field
        "correct_field": "",
        "answer_field": "",  # of a record, the gold answer; "": the trace's own
        "held_out": {"path": "", "field": "question", "n": 8},  # n words in a row
        "deduplicate": {"n": 3, "threshold": 0.0},  # similarity of questions' n-grams; 0: not
        "domain_field": "",  # of a record; "": all are of one domain
        # The first num_uniform of `limit` are of every domain equally often, the rest as the
        # weights say, {"aime": 30, ...}, as s1's code draws its last 300; unset: all the first way
        "diversity": {"num_uniform": config_dict.placeholder(int), "histogram": {}},
        "trusted_field": "",  # of a record: true where its trace is in however easy it is
        # Checkpoints, as init.from: what one of them solves is too easy
        "solvers": (),
        "template": "",  # of the solvers' chat, as chat.template; "": their own
        "prompt_template": "{question}",  # what a solver is asked
        "max_tokens": 1024,  # of a solver's answer
        "rewards": {"accuracy": reward("math")},
        "solved_by": "accuracy",  # the reward that is 1 where an answer is right
        "batch": 256,  # questions in flight, and what a kill can lose
        "rows": 256,  # slots of the engine
        **changes,
    }


def generate_config() -> dict:
    """The keys of the recipe `generate`, beside the shared ones."""
    return {
        "init": {"from": ""},
        "sampling": _sampling(Sampling(max_tokens=4096, temperature=0.6, top_p=0.95, top_k=20)),
        "prompt_template": "{prompt}",
        # true | false | auto: later questions follow the earlier ones where the template can say so
        "remember": "auto",
        "prompts": "",  # a file of questions; "": the terminal, or a pipe
        "output": "completions.jsonl",
        "save_every": 256,  # questions
        "rows": 256,  # slots of the engine
    }


def _sampling(sampling: Sampling) -> dict:
    return {
        **dataclasses.asdict(sampling),
        "thinking": {
            "max_tokens": config_dict.placeholder(int),  # thinking tokens; None: no limit
            "wording": "s1",  # how the end is forced: s1 | qwen3 | tag
            "waits": 0,  # ends of thinking that become "Wait"
        },
    }


def reward(kind: str, weight: float = 1.0, **options) -> dict:
    """An entry of `rewards`: a kind of rewards/mix.py or the user's own `module:function`."""
    return {"kind": kind, "weight": weight, "options": options}


def switches(cls: type, *own: str) -> dict:
    """The fields of a dataclass but `own`, not set: its presets say what they are."""
    return {
        field.name: config_dict.placeholder(_plain_type(field.type))
        for field in dataclasses.fields(cls)
        if field.name not in own
    }


def _value(field: dataclasses.Field):
    """A default as a key has it: None of a number stands for one that is not set."""
    unset = field.default is None
    return config_dict.placeholder(_plain_type(field.type)) if unset else field.default


def _plain_type(annotation) -> type:
    """The type of a key: `float | None` is a number, `tuple[int, ...]` a tuple."""
    if isinstance(annotation, types.UnionType):
        annotation = next(t for t in typing.get_args(annotation) if t is not type(None))
    return typing.get_origin(annotation) or annotation


def prompts(**fields) -> dict:
    """One entry of `data.sources` of a stage of reinforcement learning."""
    return dataclasses.asdict(PromptSource(**fields))


def source(**fields) -> dict:
    """One entry of `data.sources`, every field present so that each can be set by flag."""
    return dataclasses.asdict(SourceConfig(**fields))


def kept_source(name: str, stage: str) -> dict:
    """One entry of `data.sources`: what a stage of kind traces, prune or curate kept."""
    return source(
        name=name,
        path=f"@{stage}",
        prompt_field="question",
        reasoning_field="reasoning",
        response_field="response",
    )


def arithmetic_eval(**changes) -> dict:
    """An entry of `eval.sets`: held-out expressions, sampled and graded."""
    return {
        "kind": "arithmetic",
        "path": "arithmetic",
        "prompt_template": "Compute the answer to this arithmetic expression: {expression}",
        "limit": 400,
        "num_samples": 8,
        "max_tokens": 1024,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 0,
        **changes,
    }


def jsonl_eval(path: str, **changes) -> dict:
    """An entry of `eval.sets`: question and answer records, sampled and graded."""
    fields = {"prompt_template": "{question}", "answer_field": "answer", "limit": 200}
    return {**arithmetic_eval(), "kind": "jsonl", "path": path, **fields, **changes}


def prompts_eval(source: dict, graded_by: dict, **changes) -> dict:
    """An entry of `eval.sets`: an entry of `prompts()`, graded by one of `reward()`."""
    fields = {"kind": "prompts", "prompts": source, "reward": graded_by, "limit": 200}
    return {**arithmetic_eval(), **fields, **changes}


def text_eval(path: str, **changes) -> dict:
    """An entry of `eval.sets`: bits per byte of held-out text."""
    return {
        "kind": "text",
        "path": path,
        "text_field": "text",
        "max_batches": 32,
        "rows": 16,
        "length": 512,
        **changes,
    }


def check_keys(config: ConfigDict) -> None:
    """Raises ValueError for a key of a config file that no recipe would read."""
    if config.recipe == "study":
        known = study_config("", "").to_dict() | {"cells": lambda _: {"facts": {}, "config": {}}}
        _check_keys(config.to_dict(), known, "config")
        for entry in config.cells.values():
            check_keys(entry.config)
        return
    own = {
        "pipeline": {"stages": _stage_keys},
        "fit": _stage_keys({"kind": "fit"}),
        "rl": _stage_keys({"kind": "rl"}),
        "evaluate": {"init": {"from": ""}},
        "generate": generate_config(),
    }[config.recipe]
    known = default_config("", config.recipe).to_dict() | own
    known["arithmetic"] = _fields(ArithmeticConfig)
    known["eval"]["sets"] = _set_keys
    _check_keys(config.to_dict(), known, "config")


def _stage_keys(stage: dict) -> dict:
    if stage["kind"] == "fit":
        known = stage_config()
        known["data"]["sources"] = lambda _: _fields(SourceConfig)
    elif stage["kind"] == "rl":
        known = rl_config() | {"rewards": lambda _: reward("")}
        known["data"]["sources"] = lambda _: _fields(PromptSource)
    elif stage["kind"] == "scaling":
        known = scaling_config()
    elif stage["kind"] == "traces":
        known = traces_config() | {"rewards": lambda _: reward("")}
        known["data"]["sources"] = lambda _: _fields(PromptSource)
    elif stage["kind"] == "curate":
        known = curate_config() | {"rewards": lambda _: reward("")}
        known["data"]["sources"] = lambda _: _fields(SourceConfig)
    elif stage["kind"] == "prune":
        known = prune_config() | {"rewards": lambda _: reward("")}
        known["data"]["sources"] = lambda _: _fields(SourceConfig)
    elif stage["kind"] == "topk":
        known = topk_config()
        known["data"]["sources"] = lambda _: _fields(SourceConfig)
    else:  # refused by name where stages are planned
        known = stage
    return known


def _set_keys(entry: dict) -> dict:
    if entry["kind"] == "text":
        return text_eval("")
    return jsonl_eval("") | {"prompts": _fields(PromptSource), "reward": reward("")}


def _fields(cls: type) -> dict:
    return dict.fromkeys(field.name for field in dataclasses.fields(cls))


def _check_keys(found: dict, known: dict, where: str) -> None:
    """In `known`, {} allows any key, and a function gives the keys of an entry of any name."""
    for key, value in found.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{where} has a key {key!r} that nothing reads; {hint}")
        inner = known[key]
        if callable(inner):
            for name, entry in value.items():
                _check_keys(entry, inner(entry), f"{where}.{key}.{name}")
        elif isinstance(inner, dict) and inner and isinstance(value, dict):
            _check_keys(value, inner, f"{where}.{key}")

"""The stage of test-time scaling: what it refuses, what it asks the sampler for, what it counts."""

import io
import json

import pytest
import rich.console
from ml_collections import ConfigDict

from jaxreason import launch
from jaxreason.evals.accuracy import Problem
from jaxreason.evals.suite import EvalSet
from jaxreason.recipes import defaults, pipeline, scaling
from jaxreason.recipes.evaluation import Evaluation
from jaxreason.text.tokenizer import ByteTokenizer
from jaxreason.train.metrics import Progress
from jaxreason.types import Completion, Sampling, ThinkingBudget

BYTES = ByteTokenizer()
MODEL = defaults.model_config()  # a checkpoint has its own shape


def example(**changes) -> tuple[ConfigDict, ConfigDict]:
    """A config with one sampled set and a text, and a stage's section."""
    config = defaults.default_config("example", "pipeline")
    config.eval.sets = {
        "arithmetic": defaults.arithmetic_eval(max_tokens=64, top_p=0.9),
        "books": defaults.text_eval("books.jsonl"),
    }
    fields = {"budgets": (0, 16), "waits": (0, 1), "init": {"from": "@rl"}, **changes}
    section = defaults.scaling_config(**fields)
    return config, ConfigDict(section)


def completion(text: str, forced: str = "") -> Completion:
    ids = tuple(BYTES.encode(text))
    start = text.index(forced) if forced else 0
    begin, end = len(BYTES.encode(text[:start])), len(BYTES.encode(text[: start + len(forced)]))
    flags = tuple(begin <= i < end for i in range(len(ids))) if forced else ()
    return Completion(text, ids, (-0.5,) * len(ids), False, flags)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"set": "books"}, r"set is 'books'; the sampled sets of eval\.sets: arithmetic"),
        ({"votes": ()}, r"votes is \(\); it must hold at least one"),
        ({"votes": (0, 2)}, r"votes is \(0, 2\); it must hold whole numbers from 1 on"),
        ({"budgets": (8, 8)}, r"budgets is \(8, 8\); it holds one of them twice"),
        ({"budgets": (16, 64)}, r"budgets holds 64; it must be below max_tokens 64"),
        ({"waits": (-1,)}, r"waits is \(-1,\); it must hold whole numbers from 0 on"),
        ({"wordings": ("s2",)}, r"wording is 's2'; it must be one of s1, qwen3, tag"),
        ({"rank_by": "luck"}, r"rank_by is 'luck'; it must be logprob or empty"),
        ({"num_samples": 0}, r"num_samples is 0; it must be 1 or more"),
        ({"temperature": 0.0}, r"votes is \(1, 2, 4, 8, 16\) at temperature 0"),
        ({"max_tokens": 0}, r"max_tokens is 0; it must be at least 1"),
        ({"init": {"from": "random"}}, r"init\.from is 'random'; test-time scaling is of a model"),
    ],
)
def test_what_cannot_run_is_named_before_anything_is_built(changes, says):
    config, section = example(**changes)
    with pytest.raises(ValueError, match=says):
        scaling.plan(config, "scaling", section)


def test_the_stage_samples_as_its_set_does_unless_told_otherwise():
    stage = scaling.plan(*swap(example()))
    assert stage.sampling == Sampling(max_tokens=64, temperature=0.6, top_p=0.9)
    stage = scaling.plan(*swap(example(max_tokens=256, temperature=1.0)))
    assert stage.sampling == Sampling(max_tokens=256, temperature=1.0, top_p=0.9)


def swap(pair: tuple[ConfigDict, ConfigDict]) -> tuple[ConfigDict, str, ConfigDict]:
    return pair[0], "scaling", pair[1]


def test_a_stage_makes_one_record_a_point_and_draws_each_set_of_samples_once():
    stage = scaling.plan(*swap(example(votes=(1, 4), wordings=("s1", "qwen3"), limit=2)))
    asked = []

    def generate(params, prompts, sampling, key):
        asked.append((params, tuple(prompts), sampling, key))
        return [[completion("<think>7</think>7")] * sampling.num_samples for _ in prompts]

    problems = tuple(Problem(f"{i}+{i}", str(2 * i)) for i in range(3, 7))
    grade = lambda text, answer: (text[-1], text[-1] == answer)
    sampled = EvalSet("arithmetic", problems, Sampling(max_tokens=64), grade)
    evaluation = Evaluation((sampled,), {}, generate, None)
    shown = io.StringIO()
    progress = Progress(rich.console.Console(file=shown, highlight=False))
    records = scaling.run(stage, evaluation, BYTES, "params", "key", progress)

    budgets = [ThinkingBudget(max_tokens=b, wording=w) for w in ("s1", "qwen3") for b in (0, 16)]
    waits = [ThinkingBudget(waits=n) for n in (0, 1)]
    assert [s.thinking for _, _, s, _ in asked] == [None, *budgets, *waits]
    assert [s.num_samples for _, _, s, _ in asked] == [4] + [1] * 6
    assert {call[:2] + call[3:] for call in asked} == {("params", ("3+3", "4+4"), "key")}
    assert len(asked) == stage.num_points == len(shown.getvalue().splitlines())
    points = [(r["method"], r["n"], r["budget"], r.get("wording")) for r in records]
    assert points == [
        ("majority", 1, None, None),
        ("majority", 4, None, None),
        ("best_of_n", 1, None, None),
        ("best_of_n", 4, None, None),
        *(("budget", 1, b, w) for w in ("s1", "qwen3") for b in (0, 16)),
        ("waits", 0, None, None),
        ("waits", 1, None, None),
    ]
    assert all(
        (r["stage"], r["set"], r["mean_thinking"]) == ("rl", "arithmetic", 1) for r in records
    )
    assert [r["mean_tokens"] for r in records[:2]] == [4.0, 16.0]


@pytest.mark.parametrize(
    "text, forced, thinking",
    [
        ("<think>1+2=3</think>3", "", 5),
        ("1+2=3</think>3", "", 5),  # the prompt ended with the opening tag
        ("<think>1+2", "", 3),  # cut off
        ("12", "", 2),
        ("<think>1+2</think>\nFinal Answer:3", "</think>\nFinal Answer:", 3),
        ("<think>1+2Wait3</think>3", "Wait", 4),
        ("<think>1\nEnough.\n</think>3", "\nEnough.\n</think>", 1),
        ("<think></think>3", "</think>", 0),
    ],
)
def test_thinking_is_what_the_model_chose_between_the_tags(text, forced, thinking):
    assert scaling.thinking_counter(BYTES.decode)(completion(text, forced)) == thinking


@pytest.mark.slow
def test_a_pipeline_may_have_this_stage_alone(tmp_path):
    config = launch.load_config("quickstart:smoke")
    config.arithmetic.update(num_train=20, num_test=4)
    config.model.num_layers, config.run.export, config.eval.rows = 1, False, 8
    scaling, training = config.stages.scaling.to_dict(), config.stages.pretrain
    training.train.steps, training.train.optimizer.warmup_steps = 1, 0
    training.data.update(rows=8, examples_per_batch=8)
    config.stages, sets, config.eval.sets = {"base": training}, config.eval.sets, {}
    pipeline.run(config, tmp_path / "base")

    scaling.update(votes=(1, 2), num_samples=2, budgets=(), waits=(), limit=2, max_tokens=4)
    scaling["init"]["from"] = f"{tmp_path}/base@base"
    config.stages, config.eval.sets, config.model = {"scaling": scaling}, sets, MODEL
    pipeline.run(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "done" and summary["stages"] == {}
    assert {one["n"] for one in summary["scaling"]} == {1, 2}

"""The stage of kind prune: what it refuses, and a run that prunes, trains and prefers."""

import json
import re

import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from jaxreason import launch
from jaxreason.recipes import defaults, pipeline, prune
from jaxreason.report.summary import read_lines
from jaxreason.types import Completion

TRACES = dict(
    name="arithmetic", kind="arithmetic", rendering="long_cot", split="train",
    prompt_template="{expression}=",
)  # fmt: skip
TEXTS = defaults.source(name="a", path="a.jsonl", text_field="text")


def stage(**changes) -> ConfigDict:
    section = defaults.prune_config(max_tokens=8, batch=16)
    section["init"]["from"] = "@pretrain"
    section["data"].update(sources={"arithmetic": defaults.source(**TRACES)}, limit=40)
    section["segment"].update(rules=("line",), min_chars=0)
    return ConfigDict(section | changes)


def alone(prune_stage, checkpoint) -> ConfigDict:
    """Of a student that has learnt nothing; nothing learns from what is pruned."""
    c = config_of(prune_stage)
    c.stages = {"prune": prune_stage}
    c.stages.prune.init["from"] = str(checkpoint)
    c.model = defaults.model_config()  # the checkpoint's shape
    return c


def config_of(prune_stage) -> ConfigDict:
    """A base that has learnt next to nothing, and two stages that learn from what is pruned."""
    c = launch.load_config("quickstart:smoke")
    c.model.num_layers = 1
    c.arithmetic.update(num_train=60, num_test=4, review_share=0.7, max_reviews=2)
    base = c.stages.pretrain.copy_and_resolve_references()
    base.train.steps, base.data.examples_per_batch = 2, 32
    base.train.optimizer.warmup_steps = 1

    def learner(path, objective, **fields):
        made = base.copy_and_resolve_references()
        made.init["from"] = "@pretrain"
        made.data.update(rows=8, length=600, packing="first_fit", examples_per_batch=None)
        made.data.sources = {"pruned": defaults.source(name="pruned", path=path, **fields)}
        made.train.objective = objective
        return made

    c.stages = {
        "pretrain": base,
        "prune": prune_stage,
        "sft": learner("@prune", "lm", prompt_field="question", reasoning_field="reasoning",
                       response_field="response"),
        "dpo": learner("@prune.pairs", "pruning", prompt_field="prompt", chosen_field="chosen",
                       rejected_field="rejected"),
    }  # fmt: skip
    c.eval.sets = {}
    c.run.export, c.run.save_every, c.log.every = False, 2, 1
    return c


class Oracle:
    """A student that answers right as soon as a step comes to the answer."""

    asked = 0
    dies_at = None  # the call, counted from 1, that is the end of its process

    def __init__(self, run, stage, reward):
        pass

    def is_valid(self, chains, questions):
        if Oracle.dies_at is not None:
            Oracle.dies_at -= 1
            if not Oracle.dies_at:
                raise KeyboardInterrupt
        Oracle.asked += len(questions)
        return [
            any(step.strip().endswith(f"={chains[i].answer}") for step in chains[i].steps[:kept])
            for i, kept in questions
        ]


@pytest.fixture(autouse=True)
def scene(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("jaxreason.recipes.assemble.device_mesh", lambda mesh: None)


@pytest.mark.parametrize("learners", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_traces_are_pruned_then_learnt_then_preferred(learners, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(prune, "Student", Oracle)
    config = config_of(stage()) if learners else alone(stage(), checkpoint)
    # Killed in its second batch of 16: what the first was asked is kept.
    monkeypatch.setattr(Oracle, "dies_at", 8)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, tmp_path)
    first = read_lines(tmp_path / "data" / "prune.all.jsonl")
    assert len(first) == 16 and not (tmp_path / "data" / "prune.jsonl").exists()
    monkeypatch.setattr(Oracle, "dies_at", None)
    monkeypatch.setattr(Oracle, "asked", 0)
    pipeline.run(config, tmp_path)
    every = read_lines(tmp_path / "data" / "prune.all.jsonl")
    assert every[:16] == first and Oracle.asked == sum(len(one["asked"]) for one in every[16:])
    student = "@pretrain@2" if learners else str(checkpoint)
    pruned, whole = check_pruned(tmp_path, student), {one["id"]: one for one in every}
    assert len(pruned) == len(whole) == 40
    for one in pruned:
        steps = whole[one["id"]]["steps"]
        reached = [s.strip().endswith(f"={one['answer']}") for s in steps].index(True) + 1
        assert one["kept_steps"] == reached and one["num_steps"] == len(steps)
        assert one["reasoning"] == "".join(steps[:reached]).strip("\n")
        assert one["kept_tokens"] <= one["num_tokens"]
    if learners:
        # The policy is its own reference at first: no margin, and log 2 beside 0.3 times the NLL.
        records = read_lines(tmp_path / "metrics.jsonl")
        first = next(r for r in records if r["stage"] == "dpo")
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
        assert first["loss"] > 0.693

    # The same command again asks nothing; nor does one that was stopped before the files.
    asked = Oracle.asked
    (tmp_path / "data" / "prune.jsonl").unlink()
    (tmp_path / "stages" / "prune.json").unlink()
    pipeline.run(config, tmp_path)
    assert Oracle.asked == asked
    assert read_lines(tmp_path / "data" / "prune.jsonl") == pruned


def check_pruned(workdir, student):
    """What the marker and the pairs say of the pruned traces, which are returned."""
    pruned = read_lines(workdir / "data" / "prune.jsonl")
    marker = json.loads((workdir / "stages" / "prune.json").read_text())
    assert marker["num_kept"] == 40 and marker["student"] == student
    assert 0.3 < marker["kept_tokens"] < 0.8  # reviews are about half of such a trace
    assert marker["max_questions"] <= 1 + 6  # of at most 60 steps
    pairs = read_lines(workdir / "data" / "prune.pairs.jsonl")
    assert len(pairs) == marker["pairs"] == sum(o["kept_steps"] < o["num_steps"] for o in pruned)
    assert all(len(p["chosen"][0]["content"]) < len(p["rejected"][0]["content"]) for p in pairs)
    return pruned


def test_a_student_that_cannot_answer_keeps_nothing(checkpoint, tmp_path):
    """The real one, through the engine: a model that has learnt nothing is never right."""
    with pytest.raises(ValueError, match=r"not one trace is kept: .*full trace not valid"):
        pipeline.run(alone(stage(), checkpoint), tmp_path)
    asked = [one["asked"] for one in read_lines(tmp_path / "data" / "prune.all.jsonl")]
    assert len(asked) == 40 and all(len(a) == 1 and a[0][1] is False for a in asked)


def test_the_student_is_asked_from_the_first_steps_and_graded(checkpoint, tmp_path, monkeypatch):
    """The real one with a model that repeats the last number of its prompt."""
    prompts = []

    def generator(config, tokenizer, model, rows, encode=None):
        def generate(params, asked, sampling, key):
            assert sampling.temperature == 0 and sampling.max_tokens == 8
            found = [tokenizer.decode(encode(one)) for one in asked]
            prompts.extend(found)
            said = [re.findall(r"-?\d+", prompt)[-1] for prompt in found]
            return [[Completion(f"{text}", (), (), False)] for text in said]

        return generate

    monkeypatch.setattr(prune.evaluation, "generator", generator)
    thought = "<think>\n2*3=6\nagain 1+2=3\nso 2*3=6\n</think>\n\n6"
    one = turns("Be brief.", "2*3", thought)
    section = stage(answer_field="answer", method="exhaustive", **records(tmp_path, one))
    config = alone(section, checkpoint)
    pipeline.run(config, tmp_path / "run")
    (every,) = read_lines(tmp_path / "run/data/prune.all.jsonl")
    assert every["asked"] == [[3, True], [2, False], [1, True]] and every["kept"] == 1
    assert all("Be brief." in prompt and "2*3<think>" in prompt for prompt in prompts)
    assert [prompt.count("=") for prompt in prompts] == [3, 2, 1]
    assert all(prompt.rstrip().endswith("</think>") for prompt in prompts)
    marker = json.loads((tmp_path / "run/stages/prune.json").read_text())
    assert (marker["non_monotone"], marker["questions"]) == (1.0, 3)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(method="halves"), r"method is 'halves'; it must be one of binary, guided, exhaus"),
        (dict(batch=0), r"batch is 0; it must be 1 or more"),
        (dict(init={"from": ""}), r"init\.from is ''; traces are pruned for a student"),
        (dict(solved_by="format"), r"solved_by is 'format'; it must be one of rewards: accuracy"),
        (dict(data=dict(limit=0, sources={})), r"data\.sources is empty; it must name at least"),
        (dict(data=dict(limit=0, sources=dict(a=TEXTS))), r"data\.sources\.a holds pairs or texts"),
    ],
)
def test_what_cannot_run_is_named(changes, says):
    with pytest.raises(ValueError, match=says) as error:
        prune.plan(config_of(stage()), "prune", stage(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "answer, step, comes",
    [
        ("-5", "6-11=-5", True), ("-5", "x is -5.", True), ("-5", "-55", False),
        ("-5", "3-5=-2", False), ("-5", "-5+3=-2", False),  # an operand is no result
        ("5", "so = 5,000", False), ("1234", "= 1,234 euros", True),
        ("1/2", r"p = \frac{1}{2}", True), ("5", r"=7, or \boxed{5}", True),
        ("5", r"=5, or \boxed{7}", False), ("x+1", "y = x+1.", True), ("x+1", "y = x+12", False),
        (r"The answer is \boxed{6}.", "2*3=6", True),  # a whole response
    ],
)  # fmt: skip
def test_what_a_step_comes_to(answer, step, comes):
    assert prune._has(answer)(step) == comes


def records(tmp_path, *content) -> dict:
    (tmp_path / "chains.jsonl").write_text("".join(json.dumps(one) + "\n" for one in content))
    return {"data": {"limit": 0, "sources": {"chains": defaults.source(
        name="chains", path=str(tmp_path / "chains.jsonl"), messages_field="messages"
    )}}}  # fmt: skip


def turns(*contents, answer="6") -> dict:
    roles = ("system", "user", "assistant", "user", "assistant")[len(contents) == 2 :]
    made = [{"role": role, "content": text} for role, text in zip(roles, contents)]
    return {"messages": made, "answer": answer}


def test_what_cannot_be_pruned_is_dropped_and_counted(checkpoint, tmp_path, monkeypatch):
    """A system turn goes along; records of several turns or without the field do not end a run."""
    monkeypatch.setattr(prune, "Student", Oracle)
    thought = "<think>\n2+3=5\n3+3=6\nsure 5+1=6\n</think>\n\n6"
    good = turns("Be brief.", "3+3", thought)
    several = turns("s", "2+2", "4", "3+3", thought)
    without = {"messages": turns("3+3", thought)["messages"]}
    found = records(tmp_path, good, several, without, turns("3+3", "6"), {"messages": []})
    config = alone(stage(answer_field="answer", **found), checkpoint)
    pipeline.run(config, tmp_path / "run")
    (one,) = read_lines(tmp_path / "run/data/prune.jsonl")
    assert (one["system"], one["question"], one["reasoning"]) == (
        "Be brief.",
        "3+3",
        "2+3=5\n3+3=6",
    )
    (pair,) = read_lines(tmp_path / "run/data/prune.pairs.jsonl")
    assert [turn["role"] for turn in pair["prompt"]] == ["system", "user"]
    marker = json.loads((tmp_path / "run/stages/prune.json").read_text())
    assert marker["dropped"] == {
        "several turns": 1, "no reasoning": 1,
        "answer_field is 'answer'; the record has messages": 1,
    }  # fmt: skip
    assert (marker["num_kept"], marker["quarantined"]) == (1, 1)

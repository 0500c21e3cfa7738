"""The stage of kind curate: what it refuses, keeps and drops, and a run that learns its choice."""

import collections
import json
from typing import ClassVar

import pytest
from conftest import ROOT
from ml_collections import ConfigDict
from traces_config import MODEL

from jaxreason import launch
from jaxreason.recipes import curate, defaults, pipeline
from jaxreason.report.summary import read_lines

READ = dict(prompt_field="question", reasoning_field="reasoning", response_field="response")


def record(question, length=4, **fields) -> dict:
    """A trace of so many words; byte tokens, so the more words the more tokens."""
    made = {"question": question, "reasoning": "so " * length, "response": "7", "answer": "7"}
    return made | {"correct": True, "field": "sums"} | fields


def stage(tmp_path, records, **changes) -> ConfigDict:
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    section = defaults.curate_config(max_tokens=8, batch=3)
    source = defaults.source(name="mine", path=str(tmp_path / "mine.jsonl"), **READ)
    section["data"]["sources"] = {"mine": source}
    section = ConfigDict(section)
    with section.ignore_type():
        section.update(changes)
    return section


def config_of(curate_stage=None, learns: bool = False) -> ConfigDict:
    """A base that has learnt next to nothing, a choice, and a stage that learns what is chosen."""
    c = defaults.default_config("curated", "pipeline")
    c.chat.template = "plain"
    c.model = defaults.model_config("qwen3-tiny", **MODEL)
    c.arithmetic = defaults.arithmetic_config(
        min_operations=1, max_operations=2, max_operand=9, num_train=24, num_test=2
    )
    sums = dict(name="a", kind="arithmetic", split="train", rendering="answer")
    c.stages = {"base": training(defaults.source(**sums, prompt_template="{expression}="))}
    if curate_stage is not None:
        c.stages["chosen"] = curate_stage
    if learns:
        c.stages["student"] = training(defaults.source(name="chosen", path="@chosen", **READ))
        c.stages.student.init["from"] = "@base"
    c.run.export, c.log.every = False, 1
    return c


def training(source: dict) -> dict:
    made = defaults.stage_config()
    made["data"].update(sources={source["name"]: source}, rows=8, length=300)
    made["train"]["steps"] = 2
    return made


def alone(curate_stage) -> ConfigDict:
    """Without the base: a stage that asks nobody, or another run's stage, needs none."""
    c = config_of(curate_stage)
    c.stages = {"chosen": c.stages.chosen}
    if curate_stage.solvers:
        c.model = defaults.model_config()  # the first solver's shape comes along
    return c


class Oracle:
    """A solver that solves what its question says, and may be stopped."""

    asked: ClassVar = collections.Counter()
    patience = 1_000

    def __init__(self, run, stage, key, reward):
        self.key = key

    def answer(self, traces):
        if sum(Oracle.asked.values()) >= Oracle.patience:
            raise KeyboardInterrupt
        Oracle.asked.update((self.key, one.question) for one in traces)
        return ["?"] * len(traces), ["easy" in one.question for one in traces]


@pytest.fixture(autouse=True)
def scene(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("jaxreason.recipes.assemble.device_mesh", lambda mesh: None)
    Oracle.asked, Oracle.patience = collections.Counter(), 1_000


@pytest.fixture
def base(checkpoint) -> str:
    """A model that has learnt nothing."""
    return str(checkpoint)


def outcome(workdir):
    kept, dropped = (
        read_lines(workdir / "data" / f"chosen{end}.jsonl") for end in ("", ".dropped")
    )
    return kept, dropped, json.loads((workdir / "stages" / "chosen.json").read_text())


# ------------------------------------------------------------------------------- the filters


def test_each_filter_drops_what_it_is_for_and_says_so(tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    secret = "one two three four five six seven eight"
    held_out.write_text(json.dumps({"problem": f"What of {secret}?"}) + "\n")
    records = [
        record("a", 9), record("a", 5), record("a", 2, correct=False),
        record("b", correct=False),
        record("c", reasoning=""), record("d", response=" "), record("e", truncated=True),
        record("f", refused="too long"), record("g", 1), record("h", 40),
        record("i", reasoning="see [asy] here and there"), record(f"It is {secret}."),
        record("Add the two numbers 3 and 4 please"),
        record("add the two numbers 3 and 4 please!"),
        record("j", 8),
    ]  # fmt: skip
    section = stage(
        tmp_path, records, num_samples=2, keep="shortest_correct", correct_field="correct",
        quality=dict(min_tokens=6, max_tokens=60, without=("[asy]",)),
        held_out=dict(path=str(held_out), field="problem"), deduplicate=dict(threshold=0.9),
    )  # fmt: skip
    pipeline.run(alone(section), tmp_path / "run")
    kept, dropped, marker = outcome(tmp_path / "run")
    assert [one["id"] for one in kept] == ["mine/1", "mine/12", "mine/14"]
    assert {one["id"]: one["reason"] for one in dropped} == {
        "mine/0": "another trace of its question is kept",
        "mine/2": "beyond the samples of a question",
        "mine/3": "question without a correct trace",
        "mine/4": "no reasoning", "mine/5": "no_answer", "mine/6": "truncated",
        "mine/7": "refused", "mine/8": "too short", "mine/9": "too long", "mine/10": "has '[asy]'",
        "mine/11": "shares an n-gram with a held-out text",
        "mine/13": "near-duplicate of an earlier one",
    }  # fmt: skip
    assert kept[0] == {
        "id": "mine/1", "question": "a", "reasoning": "so " * 5, "response": "7", "answer": "7",
        "num_tokens": 15, "domain": "",
    }  # fmt: skip
    assert (marker["traces"], marker["questions"], marker["kept"]) == (15, 13, 3)
    assert marker["dropped"] == collections.Counter(one["reason"] for one in dropped)
    assert marker["kept_tokens"] == sum(one["num_tokens"] for one in kept)


def test_without_a_field_that_says_so_the_reward_says_what_is_correct(tmp_path):
    records = [record("a", response="8"), record("a"), record("a"), record("b", answer="9")]
    section = stage(tmp_path, records, keep="correct", answer_field="answer")
    pipeline.run(alone(section), tmp_path / "run")
    kept, dropped, _ = outcome(tmp_path / "run")
    assert [one["id"] for one in kept] == ["mine/1", "mine/2"]
    assert [one["reason"] for one in dropped] == ["not correct", "question without a correct trace"]


def test_malformed_records_are_quarantined_and_counted(tmp_path):
    section = stage(tmp_path, [record("a"), {"question": "b"}, record("c")])
    with open(tmp_path / "mine.jsonl", "a") as file:
        file.write("{not json\n")
    pipeline.run(alone(section), tmp_path / "run")
    kept, _, marker = outcome(tmp_path / "run")
    assert len(kept) == 2 and marker["quarantined"] == 2
    assert [q["line"] for q in read_lines(tmp_path / "run/data/quarantine.jsonl")] == [2, 4]


def test_a_record_without_a_field_that_is_read_is_dropped_and_says_so(tmp_path):
    without = {key: value for key, value in record("b").items() if key != "field"}
    section = stage(tmp_path, [record("a"), without], domain_field="field")
    pipeline.run(alone(section), tmp_path / "run")
    kept, dropped, _ = outcome(tmp_path / "run")
    assert [one["question"] for one in kept] == ["a"]
    (reason,) = {one["reason"] for one in dropped}
    assert reason.startswith("domain_field is 'field'; the record has question, reasoning")


def test_each_trace_of_a_record_has_its_own_grade(tmp_path):
    both = {"problem": "p", "generations": ["<think>\na\n</think>9", "<think>\nb\n</think>7"]}
    rows = [both | {"problem": f"p{i}", "correctness_math_verify": grades}
            for i, grades in enumerate(([False, True], [True, False]))]  # fmt: skip
    section = stage(tmp_path, rows, keep="correct", correct_field="correctness_math_verify")
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    graded = defaults.source(
        name="mine", kind="openr1", path=str(tmp_path / "mine.jsonl"), choose="all",
        keep_wrong=True, complete_field="",
    )  # fmt: skip
    section.data.sources = ConfigDict({"mine": graded})
    pipeline.run(alone(section), tmp_path / "run")
    kept, dropped, _ = outcome(tmp_path / "run")
    assert [(one["question"], one["response"]) for one in kept] == [("p0", "7"), ("p1", "9")]
    assert [one["reason"] for one in dropped] == ["not correct"] * 2


def test_a_trace_without_tags_stays_one(tmp_path):
    section = stage(tmp_path, [record("a", reasoning=None)], quality=dict(needs_reasoning=False))
    pipeline.run(alone(section), tmp_path / "run")
    (kept,), _, _ = outcome(tmp_path / "run")
    assert kept["reasoning"] is None


def test_trusted_traces_are_in_and_the_last_are_drawn_by_the_histogram(tmp_path):
    records = [record(f"q{i}", 3 + i, field="ab"[i % 2], sure=i == 3) for i in range(20)]
    section = stage(
        tmp_path, records, limit=6, domain_field="field", trusted_field="sure",
        diversity=dict(num_uniform=1, histogram={"a": 1.0}),
    )  # fmt: skip
    pipeline.run(alone(section), tmp_path / "run")
    kept, _, _ = outcome(tmp_path / "run")
    assert {"mine/3": "b"}.items() <= {one["id"]: one["domain"] for one in kept}.items()
    assert [one["domain"] for one in kept].count("a") == 5


def test_random_is_a_draw_of_the_same_size(tmp_path):
    records = [record(f"question {i}", 3 + i) for i in range(30)]
    section = stage(tmp_path, records, method="random", limit=10)
    longest = []
    for seed in (0, 1):
        config = alone(section)
        config.seed = seed
        pipeline.run(config, tmp_path / str(seed))
        kept, dropped, _ = outcome(tmp_path / str(seed))
        assert len(kept) == 10 and {one["reason"] for one in dropped} == {"not drawn"}
        longest.append([one["id"] for one in kept])
    assert longest[0] != longest[1]


# ------------------------------------------------------------------------------- difficulty


@pytest.mark.slow
def test_what_is_easy_goes_and_of_the_rest_each_domain_gives_its_long_traces(tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "Solver", Oracle)
    records = [
        record(f"{'easy' if i % 3 == 0 else 'hard'} {i}", 3 + i, field=f"domain {i % 2}")
        for i in range(60)
    ]  # fmt: skip
    section = stage(tmp_path, records, limit=12, domain_field="field", solvers=("@base", "@base@2"))
    pipeline.run(config_of(section, learns=True), tmp_path / "run")
    kept, dropped, marker = outcome(tmp_path / "run")
    assert len(kept) == 12 and not any("easy" in one["question"] for one in kept)
    easy = [one for one in dropped if one["reason"] == "solved by @base and @base@2"]
    assert len(easy) == 20 and marker["dropped"]["not drawn"] == 60 - 20 - 12
    assert marker["solved"] == {"@base": 20, "@base@2": 20} and marker["domains"] == 2
    assert collections.Counter(one["domain"] for one in kept)["domain 0"] in range(2, 11)
    mean = lambda some: sum(one["num_tokens"] for one in some) / len(some)
    assert mean(kept) > 1.3 * mean(dropped)  # 2^-rank
    assert set(Oracle.asked.values()) == {1}  # each solver, each question once
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert list(summary["stages"]) == ["base", "chosen", "student"]
    assert summary["stages"]["student"]["steps"] == 2


def test_a_killed_run_goes_on_after_its_last_batch(base, tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "Solver", Oracle)
    records = [record(f"{'easy' if i % 2 else 'hard'} {i}") for i in range(10)]
    config = alone(stage(tmp_path, records, solvers=(base,)))
    Oracle.patience = 6
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, tmp_path / "run")
    file = tmp_path / "run/data/chosen.solver0.all.jsonl"
    assert len(read_lines(file)) == 6 and not (tmp_path / "run/data/chosen.jsonl").exists()
    with file.open("a") as half:
        half.write('{"id": "mine/6", "quest')
    Oracle.patience = 1_000
    pipeline.run(config, tmp_path / "run")
    assert len(Oracle.asked) == 10 and set(Oracle.asked.values()) == {1}
    kept, _, _ = outcome(tmp_path / "run")
    assert [one["id"] for one in kept] == [f"mine/{i}" for i in range(0, 10, 2)]
    # Done: nothing is asked or written again; without its files the choice is made again.
    (tmp_path / "run/data/chosen.jsonl").unlink()
    pipeline.run(config, tmp_path / "run")
    assert len(Oracle.asked) == 10 and outcome(tmp_path / "run")[0] == kept


def test_a_real_solver_is_asked_through_the_engine(base, tmp_path):
    """One that has learnt nothing solves nothing; what it wrote is on the disk."""
    section = stage(tmp_path, [record("3+4="), record("2+5=")], solvers=(base,), rows=8)
    pipeline.run(alone(section), tmp_path / "run")
    said = read_lines(tmp_path / "run/data/chosen.solver0.all.jsonl")
    assert [(one["question"], one["solved"]) for one in said] == [("3+4=", False), ("2+5=", False)]
    assert all(one["text"] and one["teacher"] == base for one in said)
    assert outcome(tmp_path / "run")[2]["solved"] == {base: 0}


# ------------------------------------------------------------------------------- refusals


def test_nothing_left_is_one_line_with_the_counts(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(curate, "Solver", Oracle)
    section = stage(tmp_path, [record("easy"), record("a", 1), record("b", 1)], solvers=(base,),
                    quality=dict(min_tokens=6))  # fmt: skip
    with pytest.raises(ValueError) as error:
        pipeline.run(alone(section), tmp_path / "run")
    assert str(error.value) == (
        f"stages.chosen: 0 of 3 traces left (2 too short, 1 solved by {base} dropped)"
    )
    # As a user meets it: exit 2 and one line.
    (tmp_path / "empty.py").write_text(
        "from jaxreason.recipes import defaults\n"
        "def get_config(arg=''):\n"
        "    c = defaults.default_config('empty', 'pipeline')\n"
        "    c.model = defaults.model_config(vocab_size=261)\n"
        f"    s = defaults.curate_config(quality={{**defaults.curate_config()['quality'], "
        f"'min_tokens': 99}})\n"
        f"    s['data']['sources'] = {{'mine': defaults.source(name='mine', "
        f"path={str(tmp_path / 'mine.jsonl')!r}, **{READ!r})}}\n"
        "    c.stages = {'chosen': s}\n"
        "    return c\n"
    )
    capsys.readouterr()
    flags = [f"--config={tmp_path / 'empty.py'}", f"--workdir={tmp_path / 'cli'}"]
    assert launch.main(flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "none of the first 3 records is a trace to learn from" in said


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(limit=9), r"limit is 9; 3 of 3 traces left \(none dropped\)"),
        (dict(limit=2), r"limit is 2, and 3 traces are of 2 questions; s1k draws questions"),
        (dict(domain_field="msc"), r"none of the first 3 .*domain_field is 'msc'; the record has"),
        (dict(held_out=dict(path="gone.jsonl")), r"held_out\.path is 'gone\.jsonl'; no such file"),
    ],
)
def test_what_the_data_cannot_give_is_named(tmp_path, changes, says):
    records = [record("a"), record("a"), record("b")]
    with pytest.raises(ValueError, match=says) as error:
        pipeline.run(alone(stage(tmp_path, records, **changes)), tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(method="longest"), r"method is 'longest'; it must be one of s1k, random"),
        (dict(method="random"), r"method is 'random', limit 0 and solvers \(\); it draws as many"),
        (dict(method="random", limit=3, solvers=("@base",)), r"limit 3 and solvers \('@base',\)"),
        (dict(keep="best"), r"keep is 'best'; it must be one of all, correct"),
        (dict(keep="correct"), r"keep is 'correct'; say what is correct: correct_field, or answer"),
        (dict(solvers=("@base", "@base")), r"solvers is .*; it must name checkpoints, each once"),
        (dict(solvers=("random",)), r"solvers is 'random'; a teacher is a model that was trained"),
        (dict(solved_by="format"), r"solved_by is 'format'; it must be one of rewards: accuracy"),
        (dict(prompt_template="Q: "), r"prompt_template is 'Q: '; it must have \{question\}"),
        (dict(limit=-1), r"limit is -1; it must be 0 or more"),
        (dict(trusted_field="sure"), r"trusted_field 'sure'; only method s1k with a limit above 0"),
        (
            dict(limit=3, diversity=dict(num_uniform=2)),
            r"diversity\.num_uniform is 2 .*both or nei",
        ),
        (dict(batch=0), r"batch is 0; it must be 1 or more"),
        (dict(quality=dict(min_tokens=9, max_tokens=8)), r"quality\.max_tokens is 8; it must be"),
        (dict(deduplicate=dict(threshold=1.5)), r"deduplicate\.threshold is 1\.5; it must be abov"),
        (dict(held_out=dict(n=0)), r"held_out\.n is 0; it must be 1 or more"),
    ],
)
def test_what_cannot_run_is_named(tmp_path, changes, says):
    section = stage(tmp_path, [record("a")], **changes)
    with pytest.raises(ValueError, match=says) as error:
        curate.plan(config_of(section), "chosen", section)
    assert "\n" not in str(error.value)


def test_a_solver_that_there_is_not_is_named_before_anything_runs(tmp_path):
    section = stage(tmp_path, [record("a")], solvers=("@gone",))
    with pytest.raises(ValueError, match=r"stages\.chosen\.solvers\.0 is '@gone'; .*: base"):
        pipeline.stages_of(config_of(section))


def test_a_source_of_texts_is_refused(tmp_path):
    section = stage(tmp_path, [record("a")])
    section.data.sources["mine"].update(
        text_field="question", prompt_field="", reasoning_field="", response_field=""
    )
    with pytest.raises(ValueError, match=r"data\.sources\.mine holds pairs or texts; traces are"):
        curate.plan(config_of(section), "chosen", section)

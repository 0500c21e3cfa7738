"""The stage of traces: what it refuses, keeps and resumes, and a pipeline that trains on it."""

import collections
import json
import pathlib
import signal
import subprocess
import sys
import time

import openai_server
import pytest
from conftest import ROOT, launch_env
from ml_collections import ConfigDict
from openai_server import MODEL, choice, serving

from jaxreason import launch
from jaxreason.recipes import defaults, trace_files, traces
from jaxreason.recipes.pipeline import stages_of
from jaxreason.recipes.trace_files import Keep, TraceFiles
from jaxreason.report.summary import read_lines
from jaxreason.rollout.remote import Answer
from jaxreason.text.chat import DEFAULT_TAGS, split_reasoning

CONFIG = pathlib.Path(__file__).with_name("traces_config.py")


def plan(**changes) -> traces.TracesStage:
    """Of the smoke config's stage, with some keys set."""
    config = launch.load_config("traces:smoke")
    for key, value in changes.items():
        node, (*parts, last) = config.stages.traces, key.split(".")
        for part in parts:
            node = node[part]
        node[last] = value
    return traces.plan(config, "traces", config.stages.traces)


def set_the_scene(patch: pytest.MonkeyPatch) -> None:
    """One device, as in the processes that are started here."""
    patch.chdir(ROOT)
    patch.setattr("jaxreason.recipes.assemble.device_mesh", lambda mesh: None)


@pytest.fixture(autouse=True)
def scene(monkeypatch):
    set_the_scene(monkeypatch)


# --------------------------------------------------------------------------------------- the plan

SERVER = {"init.from": "", "server.url": "http://localhost:1/v1", "server.model_name": "m"}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"init.from": ""}, r"init\.from is ''; a teacher is a checkpoint that was trained, or a"),
        ({"init.from": "random"}, r"init\.from is 'random'; a teacher"),
        ({"server.url": "http://x/v1"}, r"init\.from is '@teacher' and server\.url 'http://x/v1'"),
        (SERVER | {"server.model_name": ""}, r"server\.model_name is empty"),
        (SERVER | {"sampling.thinking.max_tokens": 9}, r"sampling\.thinking is set; a server has"),
        (SERVER | {"gate.from": "@student"}, r"gate\.from is '@student' and server\.url"),
        ({"gate.from": "random"}, r"gate is .*; its student is a checkpoint"),
        ({"gate.from": "nowhere"}, r"gate\.from is 'nowhere'; nowhere holds no config\.json"),
        ({"gate.from": "@student", "sampling.stop": ("x",)}, r"sampling\.stop is \('x',\)"),
        ({"keep": "best"}, r"keep is 'best'; it must be one of all, correct, first_correct"),
        ({"per_question": 9}, r"per_question is 9; it must be 0 to sampling\.num_samples = 8"),
        ({"solved_by": "format"}, r"solved_by is 'format'; it must be one of rewards: accuracy"),
        ({"save_every": 0}, r"save_every is 0; it must be 1 or more"),
        ({"data.num_questions": -1}, r"data\.num_questions is -1; it must be 0 or more"),
        ({"sampling.max_tokens": 0}, r"sampling\.max_tokens is 0"),
    ],
)
def test_what_cannot_run_is_named_before_anything_is_built(changes, says):
    with pytest.raises(ValueError, match=says) as error:
        plan(**changes)
    assert "\n" not in str(error.value)


def test_a_teacher_is_asked_thirty_times_unless_told_otherwise():
    section = ConfigDict(defaults.traces_config())
    assert (section.sampling.num_samples, section.sampling.temperature) == (30, 1.0)
    assert plan().sampling.num_samples == 8


# ------------------------------------------------------------------------------------- the order


def test_stages_come_after_the_data_that_they_read():
    """By name `student` is first; it starts from random weights, so only its data orders it."""
    names = [stage.name for stage in stages_of(launch.load_config("traces:smoke"))]
    assert names == ["teacher", "traces", "student"]


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("student.data.sources.traces.path", "@trace",
         r"stages\.student\.data\.sources\.traces\.path is '@trace'; .* before it: traces"),
        ("student.data.sources.traces.path", ("@traces", "@teacher"), r"'@teacher'; .*: traces"),
        ("student.init.from", "@traces", r"stages\.student\.init\.from is '@traces'; .*: teacher"),
        ("traces.init.from", "@student", r"stages\.(student|traces)\..* is '@(traces|student)'"),
        ("traces.gate.from", "@nobody", r"stages\.traces\.gate\.from is '@nobody'"),
        ("teacher.data.sources.arithmetic", dict(
            kind="jsonl", path="@traces", rendering="", split="", prompt_template="",
            prompt_field="question", response_field="response"), r"is '@t\w+'; .*: none"),
    ],
)  # fmt: skip
def test_a_circle_or_a_name_that_there_is_not_is_refused(key, value, says):
    config = launch.load_config("traces:smoke")
    node, (*parts, last) = config.stages, key.split(".")
    with config.ignore_type():
        for part in parts:
            node = node[part]
        if isinstance(value, dict):
            node[last].update(value)
        else:
            node[last] = value
    with pytest.raises(ValueError, match=says):
        stages_of(config)


# ------------------------------------------------------------------------------- what is kept


def trace(sample: int, correct=True, tokens=5, **fields) -> dict:
    made = {"id": "a/0", "sample": sample, "correct": correct, "num_tokens": tokens}
    return made | {"response": "7", "truncated": False, "teacher": "t"} | fields


TRACES = [
    trace(0, correct=False),
    trace(1, tokens=9),
    trace(2, tokens=4),
    trace(3, tokens=4),
    trace(4, truncated=True),
    trace(5, correct=False, response=" \n"),  # thinking that never ended has no answer
    trace(6, correct=False, response="", refused="status 400: too long"),
]


@pytest.mark.parametrize(
    "rule, limit, samples, wrong, surplus",
    [
        ("all", 0, [0, 1, 2, 3], 0, 0),
        ("all", 2, [0, 1], 0, 2),
        ("correct", 0, [1, 2, 3], 1, 0),
        ("correct", 2, [1, 2], 1, 1),
        ("first_correct", 0, [1], 1, 2),
        ("first_correct", 2, [1, 2], 1, 1),
        ("shortest_correct", 0, [2], 1, 2),
        ("shortest_correct", 3, [2, 3, 1], 1, 0),
    ],
)
def test_what_is_kept_of_a_question_and_why_the_rest_is_not(rule, limit, samples, wrong, surplus):
    kept, dropped = Keep(rule, limit, 7).choose(TRACES)
    assert [t["sample"] for t in kept] == samples
    why = dict(refused=1, truncated=1, no_answer=1, wrong=wrong, surplus=surplus)
    assert dropped == collections.Counter(why)
    assert sum(dropped.values()) + len(kept) == len(TRACES)


def test_counts_are_of_all_that_was_written(tmp_path):
    files = TraceFiles(tmp_path, "t", 7)
    files.append(TRACES)
    files.append([{**t, "id": "a/1", "correct": False} for t in TRACES])
    counts = files.select(Keep("correct", 0, 7))
    assert read_lines(files.kept) == TRACES[1:4]
    assert counts == {
        "questions": 2, "solved": 1, "samples": 14, "correct": 4, "kept": 3,
        "sampled_tokens": 74, "kept_tokens": 17,
        "dropped_refused": 2, "dropped_truncated": 2, "dropped_no_answer": 2,
        "dropped_wrong": 5, "dropped_surplus": 0,
    }  # fmt: skip
    assert counts["kept"] + sum(n for k, n in counts.items() if k.startswith("dropped")) == 14


def test_where_nothing_is_kept_one_line_says_why(tmp_path):
    files = TraceFiles(tmp_path, "t", 7)
    files.append({**t, "correct": False} for t in TRACES)
    with pytest.raises(ValueError, match=r"not one trace is kept: 0 of 7 .*1 refused.*4 wrong"):
        files.select(Keep("correct", 0, 7))
    assert not files.kept.exists() and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------- resuming


def written(folder, questions=3, samples=2) -> tuple[TraceFiles, list[str]]:
    files, ids = TraceFiles(folder, "t", samples), [f"a/{q}" for q in range(5)]
    files.append({**trace(s), "id": ids[q]} for q in range(questions) for s in range(samples))
    return files, ids


@pytest.mark.parametrize("torn", range(1, 60, 7))
def test_a_torn_end_is_cut_back_to_whole_questions(tmp_path, torn):
    files, ids = written(tmp_path)
    whole = files.every.read_bytes()
    files.every.write_bytes(whole[:-torn])
    assert files.resume(ids, "t", pytest.fail) == 2
    lines = whole.splitlines(keepends=True)
    assert files.every.read_bytes() == b"".join(lines[:4])
    assert files.resume(ids, "t", pytest.fail) == 2


def test_what_is_no_record_ends_what_counts(tmp_path):
    """As a machine that lost power may leave: blocks of zeros where lines were."""
    files, ids = written(tmp_path)
    whole = files.every.read_bytes()
    files.every.write_bytes(whole + b"\0" * 100 + b"\n")
    assert files.resume(ids, "t", pytest.fail) == 3
    assert files.every.read_bytes() == whole


def test_a_file_of_other_questions_is_refused_and_of_another_teacher_begun_anew(tmp_path):
    files, ids = written(tmp_path)
    with pytest.raises(ValueError, match=r"holds traces of other questions .*\(a/0 in line 1\)"):
        files.resume(["b/0", *ids[1:]], "t", pytest.fail)
    said = []
    assert files.resume(ids, "u", said.append) == 0
    assert len(said) == 1 and "is of t; it begins anew with u" in said[0]
    assert files.every.read_bytes() == b""
    assert TraceFiles(tmp_path, "absent", 2).resume(ids, "t", pytest.fail) == 0


# ------------------------------------------------------------------------------------ the texts


@pytest.mark.parametrize(
    "answer, reasoning, response",
    [
        (Answer("4", "2+2"), "2+2", "4"),
        (Answer("4", "\n2+2\n"), "2+2", "4"),
        (Answer("<think>\n2+2\n</think>\n\n4"), "2+2", "4"),
        (Answer("2+2</think>4"), "2+2", "4"),  # the server's template opened the thinking
        (Answer("4"), None, "4"),
        (Answer("", "2+2+", truncated=True), "2+2+", ""),
        (Answer("4 and", "2+2", truncated=True), "2+2", "4 and"),
    ],
)
def test_a_servers_answer_is_read_as_a_models_text(answer, reasoning, response):
    assert split_reasoning(traces.as_text(answer, DEFAULT_TAGS)) == (reasoning, response)


# ------------------------------------------------------------------------------ a whole pipeline


def run(workdir, *flags: str, arg: str = "") -> int:
    before = signal.getsignal(signal.SIGTERM)
    try:
        return launch.main([f"--config={CONFIG}:{arg}", f"--workdir={workdir}", *flags])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """The workdir of teacher -> traces -> student, with sums that the teacher knows by heart."""
    with pytest.MonkeyPatch.context() as patch:
        set_the_scene(patch)
        workdir = tmp_path_factory.mktemp("traces") / "run"
        assert run(workdir) == 0
    return workdir


def test_a_student_learns_what_its_teacher_wrote(learnt):
    every, kept = (read_lines(learnt / "data" / f"traces{end}.jsonl") for end in (".all", ""))
    marker = json.loads((learnt / "stages/traces.json").read_text())
    summary = json.loads((learnt / "summary.json").read_text())
    assert list(summary["stages"]) == ["teacher", "traces", "student"]
    assert summary["stages"]["traces"] == marker
    assert len(every) == marker["samples"] == 24 * 4 and marker["teacher"] == "@teacher@80"
    assert kept == [t for t in every if t["correct"] and not t["truncated"]]
    assert len(kept) == marker["kept"] > 60  # a teacher that knows its sums
    assert len({t["id"] for t in every}) == 24
    for t in kept:
        left, right = map(int, t["question"].removesuffix("=").split("+"))
        assert t["response"] == t["answer"] == str(left + right) and t["reward"] == 1
        assert t["num_tokens"] > 0 and t["logprob"] <= 0 and t["sample"] in range(4)
    # The student read these and nothing else, some forty times.
    assert summary["stages"]["student"]["quarantined"] == 0
    assert summary["stages"]["student"]["final_loss"] < 0.3
    assert list(summary["evals"]) == ["teacher", "student"]
    assert "traces" in (learnt / "report.html").read_text()


def test_a_finished_run_asks_nothing_again(learnt, monkeypatch, capsys):
    monkeypatch.setattr(traces, "_asking", lambda *_: pytest.fail("asked again"))
    before = (learnt / "data/traces.jsonl").read_bytes()
    assert run(learnt) == 0
    assert (learnt / "data/traces.jsonl").read_bytes() == before


def again(learnt, tmp_path, *, keep_lines: int, extra: bytes = b"", flags=()):
    """The traces of a new run from the same teacher, which found so many lines of them."""
    teacher = [f"--config.stages.traces.init.from={learnt}@teacher", *flags]
    every = tmp_path / "run/data/traces.all.jsonl"
    if keep_lines:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TraceFiles, "append", stop_after(keep_lines, extra))
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "run", *teacher, arg="traces")
        assert len(every.read_bytes().splitlines()) == keep_lines + bool(extra)
    assert run(tmp_path / "run", *teacher, arg="traces") == 0
    return tmp_path / "run/data"


def stop_after(lines: int, extra: bytes):
    append = TraceFiles.append

    def appended(self, records):
        append(self, records)
        if len(self.every.read_bytes().splitlines()) >= lines:
            with self.every.open("ab") as file:
                file.write(extra)
            raise KeyboardInterrupt

    return appended


def without_teacher(path) -> list[dict]:
    return [{k: v for k, v in t.items() if k != "teacher"} for t in read_lines(path)]


def test_a_resumed_run_and_other_batches_give_the_same_traces(learnt, tmp_path):
    """A teacher of another workdir, 8 questions a batch in place of 5, cut in the second."""
    flags = ["--config.stages.traces.save_every=8"]
    half = b'{"id": "a/9", "question": "1'
    data = again(learnt, tmp_path, keep_lines=32, extra=half, flags=flags)
    for name in ("traces.all.jsonl", "traces.jsonl"):
        # log-probabilities are of other batches of rows: sums in another order
        found, wanted = (without_teacher(folder / name) for folder in (data, learnt / "data"))
        assert [{**t, "logprob": 0} for t in found] == [{**t, "logprob": 0} for t in wanted]
        for a, b in zip(found, wanted, strict=True):
            assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-2)


def test_a_gate_takes_the_teachers_tokens_that_the_student_accepts(learnt, tmp_path):
    """One that is open gives the teacher's samples; both models are of another workdir."""
    flags = [
        f"--config.stages.traces.gate.from={learnt}@student",
        "--config.stages.traces.gate.threshold=0.0",
    ]
    data = again(learnt, tmp_path, keep_lines=0, flags=flags)
    found, wanted = (read_lines(d / "traces.all.jsonl") for d in (data, learnt / "data"))
    assert [(t["id"], t["response"]) for t in found] == [(t["id"], t["response"]) for t in wanted]
    assert all(t["accepted"] == t["num_tokens"] for t in found)
    assert json.loads((tmp_path / "run/stages/traces.json").read_text())["accepted_share"] == 1


# ---------------------------------------------------------------------------------- of a server


def sums(body):
    left, right = map(int, body["messages"][0]["content"].removesuffix("=").split("+"))
    return [choice(str(left + right), f"{left} and {right}")]


def asked(url: str, *more: str) -> list[str]:
    keys = {"server.url": url, "server.model_name": MODEL, "server.backoff": "0.01"}
    return [*(f"--config.stages.traces.{key}={value}" for key, value in keys.items()), *more]


def test_a_server_teaches_with_its_faults_and_no_key_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    with serving(sums) as server:
        server.key = "sk-secret"
        server.script = [
            openai_server.status(429, Retry_After="0.1"),
            openai_server.reset,
            lambda handler, body: handler.send(
                200, {"choices": [choice(None, "1 and", finish="length")]}
            ),
            openai_server.status(400, "the prompt is too long"),
        ]
        flags = asked(server.url, "--config.stages.traces.server.key_variable=TEACHER_KEY")
        flags += ["--config.stages.traces.server.concurrency=1"]
        assert run(tmp_path / "run", *flags, arg="traces") == 0
        counts = json.loads((tmp_path / "run/stages/traces.json").read_text())
        assert (counts["samples"], counts["kept"], counts["teacher"]) == (96, 94, MODEL)
        assert (counts["dropped_truncated"], counts["dropped_refused"]) == (1, 1)
        assert len(server.bodies) == 98
        every = read_lines(tmp_path / "run/data/traces.all.jsonl")
        assert every[1]["refused"] == "status 400: the prompt is too long"
        assert (every[2]["reasoning"].split()[1], every[2]["logprob"]) == ("and", None)
        server.bodies.clear()
        assert run(tmp_path / "run", *flags, arg="traces") == 0
        assert not server.bodies  # done: not even looked for
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"sk-secret" not in path.read_bytes(), path


def test_no_trace_at_all_is_one_line(tmp_path, capsys):
    with serving(lambda body: [choice("-1")]) as server:
        assert run(tmp_path / "run", *asked(server.url), arg="traces") == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("error: stages.traces: keep is 'correct'")
        assert "not one trace is kept: 0 of 96" in said and "96 wrong" in said
        server.bodies.clear()
        assert run(tmp_path / "run", *asked(server.url), arg="traces") == 2
        assert not server.bodies  # all is there: the same line again, at once


def test_a_server_that_dies_costs_the_batch_in_flight(tmp_path, capsys):
    with serving(sums) as server:
        server.script = [None] * 30 + [openai_server.status(500)] * 1000
        flags = asked(server.url, "--config.stages.traces.server.max_retries=1")
        assert run(tmp_path / "run", *flags, arg="traces") == 2
        assert "failed 2 times (status 500" in capsys.readouterr().err
        # 5 questions of 4 samples a batch: one batch is whole, the second was in flight.
        every = tmp_path / "run/data/traces.all.jsonl"
        first = every.read_bytes()
        assert len(first.splitlines()) == 20
    with serving(sums) as server:  # elsewhere; how a server is asked may change too
        # All of the last batch, of 4 questions, is refused: counted, and no end of the run.
        server.script = [None] * 60 + [openai_server.status(400, "too long")] * 16
        flags = asked(server.url, "--config.stages.traces.server.concurrency=2")
        assert run(tmp_path / "run", *flags, arg="traces") == 0
        assert len(server.bodies) == 76 and every.read_bytes().startswith(first)
        assert len(read_lines(every)) == 96


@pytest.mark.parametrize("name", ["dead", "key", "model", "refuses"])
def test_a_server_that_cannot_teach_is_one_line_before_the_training(tmp_path, capsys, name):
    with serving(sums) as server:
        flags, url = [], server.url
        if name == "dead":
            url = "http://127.0.0.1:9/v1"  # the discard port: nobody listens
        elif name == "key":
            server.key = "sk-other"
        elif name == "model":
            server.models = ["teacher-70b"]
            flags = ["--config.stages.traces.server.model_name=gpt-9"]
        else:
            server.script = [openai_server.status(422, "unknown field top_k")] * 20
        assert run(tmp_path / "run", *asked(url, *flags), arg="traces") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "stages.traces: " in said
    assert {
        "dead": "no server answers there",
        "key": "a request without a key",
        "model": "it lists teacher-70b",
        "refuses": "it refused every one of 5 questions: status 422: unknown field top_k",
    }[name] in said
    if name != "refuses":
        assert not (tmp_path / "run/metrics.jsonl").exists()  # nothing was begun


# ---------------------------------------------------------------------------------- killed


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_files(learnt, tmp_path):
    """kill -9 in a batch, three times; then to the end. About 40 s."""
    command = [sys.executable, "-m", "jaxreason.launch", f"--config={CONFIG}:traces",
               f"--workdir={tmp_path / 'run'}",
               f"--config.stages.traces.init.from={learnt}@teacher"]  # fmt: skip
    every = tmp_path / "run/data/traces.all.jsonl"
    lines = lambda: len(every.read_bytes().splitlines()) if every.exists() else 0
    start = lambda: subprocess.Popen(command, cwd=ROOT, env=launch_env(), stdout=subprocess.DEVNULL)
    for least in (1, 30, 60):
        process = start()
        while process.poll() is None and lines() < least:
            time.sleep(0.001)
        process.kill()
        process.wait()
        if lines():
            with every.open("ab") as file:
                file.write(b'{"id": "a/9", "quest')  # as a kill inside a write may leave it
    assert start().wait() == 0
    strip = lambda path: [{**t, "logprob": 0} for t in without_teacher(path)]
    for name in ("traces.all.jsonl", "traces.jsonl"):
        assert strip(tmp_path / "run/data" / name) == strip(learnt / "data" / name)


def test_the_reasons_are_those_that_are_counted():
    assert set(trace_files.REASONS) == {"refused", "truncated", "no_answer", "wrong", "surplus"}

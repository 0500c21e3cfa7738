"""tools/inspect_cot.py: what it reads of workdirs and data sets, and what it says of mistakes."""

import gzip
import importlib.util
import json
import pathlib

import pyarrow as pa
import pytest
from pyarrow import parquet

from jaxreason.data.arithmetic import ArithmeticConfig, records
from jaxreason.reasoning.reflect import summarize
from jaxreason.recipes.read_traces import read_traces
from jaxreason.text.tokenizer import ByteTokenizer

ROOT = pathlib.Path(__file__).parents[2]
WORDS = lambda text: len(text.split())


@pytest.fixture(scope="module")
def inspect_cot():
    spec = importlib.util.spec_from_file_location("inspect_cot", ROOT / "tools/inspect_cot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def completion(text, tokens, **rest):
    return {"text": text, "num_tokens": tokens, "truncated": False, **rest}


# As evals/accuracy.py (recipes/evaluation.py adds the stage) and train/rl.py write them.
SAMPLES = [
    {"stage": "sft", "set": "arithmetic", "prompt": "2+3", "answer": "5", "group": "1",
     "completions": [completion("<think>2+3=5</think>5", 9, correct=True),
                     completion("<think>2+3=6\nwait 2+3=7</think>7", 20, correct=False)]},
    {"stage": "sft", "set": "arithmetic", "prompt": "2+3*4", "answer": "14", "group": "2",
     "completions": [completion("<think>3*4=12\n2+12=15</think>15", 16, correct=False),
                     {**completion("<think>3*4", 7, correct=False), "truncated": True}]},
    {"stage": "rl", "step": 1, "prompt": "1+1", "answer": "2", "completions": [
        completion("2", 1, reward=1.1, rewards={"accuracy": 1.0, "format": 0.5}),
        completion("3", 1, reward=0.1, rewards={"accuracy": 0.0, "format": 0.5})]},
]  # fmt: skip


def test_samples_of_a_workdir(inspect_cot, tmp_path, capsys):
    file, said, figure = write(tmp_path / "samples.jsonl", SAMPLES), *(
        tmp_path / name for name in ("said.json", "figure.svg")
    )  # fmt: skip
    options = ["--rules=line", "--min-chars=0", f"--json={said}", f"--plot={figure}", "--steps=2"]
    assert inspect_cot([file, *options]) == 0
    shown = capsys.readouterr()
    assert "sft/arithmetic by operations" in shown.out and "25.0% (k = 2)" in shown.out
    assert "sft/arithmetic trace 0: 1 steps" in shown.out and not shown.err
    result = json.loads(said.read_text())
    assert list(result["sets"]) == ["sft/arithmetic", "rl rollouts"] and result["skipped"] == 0
    sft, rl = result["sets"].values()
    assert (sft["num_traces"], sft["num_questions"], sft["accuracy"]) == (4, 2, 0.25)
    assert sft["mean_tokens"] == 13 and sft["truncated"] == 0.25 and sft["unit"] == "tokens"
    assert sft["mean_tokens_correct"] == 9 and sft["mean_tokens_wrong"] == 43 / 3
    assert sft["reflection_ratio"] == {"paper": 0.0, "wide": 0.25}
    assert (sft["mean_computations"], sft["wrong_computations"]) == (5 / 4, 3 / 5)
    assert sft["by_operations"]["2"]["first_wrong"] == {"1": 1}
    assert sft["by_operations"]["1"]["no_mistake"] == 1
    assert rl["accuracy"] == 0.5 and rl["by_operations"] == {}
    svg = figure.read_text()
    assert svg.startswith("<svg") and "sft/arithmetic" in svg and "operations" in svg


def test_chains_of_the_arithmetic_data(tmp_path):
    """Told apart by the field that holds the trace; its own fields are found."""
    config = ArithmeticConfig(min_operations=3, max_operations=5, num_train=1, num_test=30)
    file = write(tmp_path / "made.jsonl", records(config)["test"])
    long = read_traces([file], {}, WORDS).sets["made.jsonl"]
    short = read_traces([file], {"trace": "short_cot"}, WORDS).sets["made.jsonl"]
    assert long.counted and short.counted
    a, b = summarize(long.traces)[0], summarize(short.traces)[0]
    assert a.accuracy is None and b.reflection_ratio["wide"] == 0 < a.reflection_ratio["wide"]
    assert b.wrong_computations == 0 < a.wrong_computations and a.corrected == 1
    assert {n: group.mean_computations for n, group in b.by_operations.items()} == {
        3: 3,
        4: 4,
        5: 5,
    }


def test_records_of_other_data_sets(inspect_cot, tmp_path, capsys):
    rows = [
        {"question": "q", "reasoning": "Wait, 1+1=2", "response": "2", "score": 1.0, "kind": "a"},
        {"question": "q", "reasoning": "1+1=3", "response": "3", "score": 0.99, "kind": "b"},
        {"problem": "p", "generations": ["<think>so\n</think>1", "<|begin_of_thought|>\nhmm"],
         "correctness": [True, False], "kind": "b"},
    ]  # fmt: skip
    path = tmp_path / "set.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    found = read_traces([str(path)], {"by": "kind"}, WORDS)
    assert not found.skipped and list(found.sets) == ["a", "b"]
    a, b = (traces.traces for traces in found.sets.values())
    assert [(t.text, t.correct, t.question, t.num_tokens) for t in (*a, *b)] == [
        ("Wait, 1+1=2", True, "q", 2), ("1+1=3", False, "q", 1), ("so", True, "p", 1),
        ("hmm", False, "p", 1),
    ]  # fmt: skip
    assert all(t.truncated is None and t.num_operations is None for t in (*a, *b))
    ByteTokenizer().save(tmp_path / "bytes")
    said = tmp_path / "said.json"
    options = [f"--tokenizer={tmp_path / 'bytes'}", f"--json={said}", f"--plot={tmp_path}/f.svg"]
    assert inspect_cot([str(path), "--field=trace=reasoning", *options]) == 0
    (only,) = json.loads(said.read_text())["sets"].values()
    assert only["mean_tokens"] == 8 and only["unit"] == "tokens"  # 11 and 5 bytes
    assert "skipped: 1 records without a trace" in capsys.readouterr().err
    assert "first standing" not in (tmp_path / "f.svg").read_text()


def test_published_data_sets_and_the_projects_own_files(tmp_path):
    s1k = {"question": "Q", "solution": "the reference", "attempt": "7", "cot": None,
           "thinking_trajectories": ["Wait, 3+4=7"]}  # fmt: skip
    openr1 = {"problem": "P", "solution": "S", "generations": ["<think>\na\n</think>\n7", "b"],
              "correctness_math_verify": [True, False]}  # fmt: skip
    open_thoughts = {"system": "s", "conversations": [
        {"from": "user", "value": "U"},
        {"from": "assistant",
         "value": "<|begin_of_thought|>\nhmm\n<|end_of_thought|>\n\n7"}]}  # fmt: skip
    sampled = {"id": "x/0", "question": "Q", "answer": "7", "reasoning": None, "response": "so 7",
               "num_tokens": 3, "truncated": True, "correct": False}  # fmt: skip
    want = {
        "s1k": (s1k, [("Q", "Wait, 3+4=7", None, None)]),
        "openr1": (openr1, [("P", "a", True, None), ("P", "b", False, None)]),
        "open_thoughts": (open_thoughts, [("U", "hmm", None, None)]),
        "traces.all": (sampled, [("Q", "so 7", False, True)]),
    }
    for name, (row, found) in want.items():
        table = tmp_path / f"{name}.parquet"
        parquet.write_table(pa.Table.from_pylist([row]), table)
        for path in (str(table), write(tmp_path / f"{name}.jsonl", [row])):
            (only,) = read_traces([path], {}, WORDS).sets.values()
            assert [(t.question, t.text, t.correct, t.truncated) for t in only.traces] == found
    pruned = {"question": "Q", "reasoning": "3+4=7", "num_tokens": 47, "kept_tokens": 5}
    path = write(tmp_path / "pruned.jsonl", [pruned])
    (only,) = read_traces([path], {}, WORDS).sets.values()
    assert [t.num_tokens for t in only.traces] == [5]  # of the text that is read


def test_what_is_malformed_is_counted_and_named(inspect_cot, tmp_path, capsys):
    good = {"question": "q", "response": "1+1=2"}
    bad = [{"question": "q"}, {"response": 5}, {"response": "a", "score": "yes"},
           {"response": ["a", "b"], "score": [True]}, {"response": "a", "num_tokens": -1},
           {"completions": [{"text": None}]}, {"completions": [{"text": "a", "num_tokens": "9"}]},
           {"response": []}]  # fmt: skip
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [good, *bad]) + "{broken\n[1]\n")
    found = read_traces([str(path)], {}, WORDS)
    assert [len(s.traces) for s in found.sets.values()] == [1] and len(found.skipped) == 10
    whole = "\n".join(found.skipped)
    for text in ("line 10: not JSON", "line 11: not a JSON object", "line 2: no trace (fields: ",
                 "line 3: the trace is int", "line 4: the grade is 'yes'", "2 traces have 1 grades",
                 "line 6: the number of tokens is -1", "line 7: a completion has no text",
                 "line 8: num_tokens is '9'", "line 9: the trace is list"):  # fmt: skip
        assert text in whole
    assert inspect_cot([str(path)]) == 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 6 and said[-1] == "skipped: 10 records without a trace"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent.jsonl"], "FILE is 'absent.jsonl'; no such file"),
        (["notes.txt"], "it must be .jsonl, .jsonl.gz, .parquet files"),
        (["empty.jsonl"], "it holds no valid record (0 malformed"),
        (["other.jsonl"], "FILE is 'other.jsonl'; it holds no trace: "),
        (["broken.jsonl.gz"], "no complete gzip file"),
        (["good.jsonl", "--field=trace"], "--field is 'trace'; it must be NAME=FIELD"),
        (["good.jsonl", "--field=traces=a"], "--field traces is unknown; known: trace, question"),
        (["good.jsonl", "--rules=words"], "segment.rules is ('words',); it must be"),
        (["good.jsonl", "--min-chars=-1"], "segment.min_chars is -1"),
        (["good.jsonl", "--steps=-1"], "--steps is -1"),
        (["good.jsonl", "--plot=a.png"], "--plot is a.png; it must end in .svg"),
        (["good.jsonl", "--json=absent/a.json"], "absent"),
        (["good.jsonl", "--tokenizer=absent"], "absent"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    inspect_cot, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAXREASON_DATA", raising=False)
    write(tmp_path / "good.jsonl", [{"response": "a"}])
    write(tmp_path / "other.jsonl", [{"a": 1}])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("a")
    with gzip.open(tmp_path / "whole.gz", "wt") as file:
        file.write('{"response": "a"}\n' * 1000)
    (tmp_path / "broken.jsonl.gz").write_bytes((tmp_path / "whole.gz").read_bytes()[:-10])
    assert inspect_cot(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert message in shown.err


def test_real_files(inspect_cot, shared_data, tmp_path, capsys):
    """Every third of the 3,600 teacher rationales, of which 38 % have the score 1."""
    source = shared_data / "teacher_rationales/mistral_small31_arithmetic.jsonl.gz"
    with gzip.open(source, "rt") as lines:
        file = write(tmp_path / "third.jsonl", [json.loads(line) for line in lines][::3])
    said = tmp_path / "said.json"
    assert inspect_cot([file, "--field=by=difficulty", f"--json={said}", "--steps=2"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count(" steps") > 2 and not shown.err
    sets = json.loads(said.read_text())["sets"]
    assert {name: s["num_traces"] for name, s in sets.items()} == {"easy": 900, "hard": 300}
    assert sets["easy"]["num_graded"] == 900
    right = sum(s["num_traces"] * s["accuracy"] for s in sets.values())
    assert 0.35 < right / 1200 < 0.42 and sets["easy"]["accuracy"] > sets["hard"]["accuracy"]

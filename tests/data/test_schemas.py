"""Published schemas: made here in small, in Parquet and in JSONL, as their pages describe them."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from jaxreason.data import sources
from jaxreason.data.schemas import ChatExample, PairExample
from jaxreason.data.sources import SourceConfig, open_source, to_example
from jaxreason.text.chat import Message


def think(reasoning, answer):
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def openr1(number, generations, verified, llama=None, complete=None):
    return {
        "problem": f"P{number}",
        "solution": "S",
        "answer": "7",
        "generations": generations,
        "correctness_math_verify": verified,
        "correctness_llama": llama,
        "is_reasoning_complete": complete or [True] * len(generations),
        "messages": [
            {"content": f"P{number}", "role": "user"},
            {"content": generations[0], "role": "assistant"},
        ],
    }


OPENR1 = [
    openr1(0, [think("wrong", "6"), think("a", "7"), think("b", "7")], [False, True, True]),
    openr1(1, [think("c", "7"), "<think>\nno end"], [True, True]),
    openr1(2, [think("d", "7"), think("e", "7")], [False, False], [True, False]),
    openr1(3, [think("cut", "7")], [True], complete=[False]),
    openr1(4, [think("wrong", "8")], [False]),
    openr1(5, ["f</think>7", think("short list", "7")], [True]),
]
S1K = [
    {"question": "Q", "solution": "S", "thinking_trajectories": ["t\n\nu"], "attempt": "A"},
    {"question": "R", "solution": "S", "thinking_trajectories": ["v"], "attempt": "B"},
]
S1K_1_1 = [
    {
        "question": "Q",
        "gemini_thinking_trajectory": "g",
        "gemini_attempt": "h",
        "deepseek_thinking_trajectory": "t",
        "deepseek_attempt": "A",
        "deepseek_grade": grade,
    }
    for grade in ("Yes", "No")
]
SKY = (
    "<|begin_of_thought|>\n\nt\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nA"
    "\n\n<|end_of_solution|>"
)
OPENTHOUGHTS = [
    {
        "system": "Be thorough.",
        "conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": SKY}],
    },
    {
        "system": "Be thorough.",
        "conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": SKY[:30]}],
    },
]
METADATA = [
    {
        "problem": "Q",
        "deepseek_reasoning": "t",
        "deepseek_solution": "A",
        "ground_truth_solution": "A",
        "domain": "math",
        "source": "numina",
        "test_cases": None,
        "starter_code": None,
    }
]
MESSAGES = [
    {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": think("t", "A")},
            {"role": "user", "content": "R"},
            {"role": "assistant", "content": "B"},
        ]
    },
    {"messages": [{"role": "user", "content": "Q"}]},
    {"messages": [{"role": "critic", "content": "Q"}]},
    {"messages": []},
]


def chat(*turns, system=None):
    names = {"u": "user", "a": "assistant"}
    made = [Message(names[role], *rest) for role, *rest in turns]
    return ChatExample((*([Message("system", system)] if system else []), *made))


@pytest.fixture(params=["jsonl", "parquet"])
def made(request, tmp_path):
    """Opens records of a kind, written in either format: (config, source)."""

    def make(kind, records, seed=0, **fields):
        path = tmp_path / f"a.{request.param}"
        if request.param == "parquet":
            parquet.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
        else:
            path.write_text("\n".join(map(json.dumps, records)))
        config = SourceConfig(name="x", kind=kind, path=str(path), **fields)
        return config, open_source(config, tmp_path / "d", seed)

    return make


def examples(opened):
    config, source = opened
    return [to_example(config, source[i]) for i in range(len(source))]


def reasons(folder):
    path = folder / "d" / "quarantine.jsonl"
    return [json.loads(line)["reason"] for line in path.open()] if path.exists() else []


def test_openr1_gives_the_first_correct_trace_that_ends(made, tmp_path):
    opened = made("openr1", OPENR1)
    expected = [("P0", "a"), ("P1", "c"), ("P2", "d"), ("P5", "f")]
    assert examples(opened) == [chat(("u", p), ("a", "7", r)) for p, r in expected]
    # P0's and P2's wrong trace, P3, P4, and P5's second, of which nothing says that it is right.
    assert opened[1].num_filtered == 5
    assert opened[1].num_quarantined == 1
    assert reasons(tmp_path) == ["trace 1: no end of thinking: <think> without </think>"]


def test_openr1_all_or_one_at_random(made):
    everything = [
        example.messages[1].reasoning for example in examples(made("openr1", OPENR1, choose="all"))
    ]
    assert everything == ["a", "b", "c", "d", "f"]
    many = [openr1(n, [think("a", "7"), think("b", "7")], [True, True]) for n in range(100)]
    chosen = lambda seed: [
        e.messages[1].reasoning for e in examples(made("openr1", many, seed, choose="random"))
    ]
    first = chosen(0)
    assert first == chosen(0) != chosen(1)
    # Binomial(100, 1/2): outside 30..70 once in 30,000 seeds; this one is fixed.
    assert 30 < first.count("a") < 70
    wrong_too = examples(made("openr1", OPENR1, keep_wrong=True))
    assert [e.messages[1].reasoning for e in wrong_too] == ["wrong", "c", "d", "cut", "wrong", "f"]


def test_s1k(made):
    assert examples(made("s1k", S1K)) == [
        chat(("u", "Q"), ("a", "A", "t\n\nu")),
        chat(("u", "R"), ("a", "B", "v")),
    ]


def test_s1k_1_1_with_and_without_its_grades(made):
    whole = chat(("u", "Q"), ("a", "A", "t"))
    assert examples(made("s1k-1.1", S1K_1_1)) == [whole, whole]  # as its authors train on it
    graded = made("s1k-1.1", S1K_1_1, correct_fields=("deepseek_grade",))
    assert examples(graded) == [whole] and graded[1].num_filtered == 1


def test_openthoughts(made, tmp_path):
    expected = chat(("u", "Q"), ("a", "A", "t"), system="Be thorough.")
    assert examples(made("openthoughts", OPENTHOUGHTS)) == [expected]
    assert reasons(tmp_path) == [
        "no end of thinking: <|begin_of_thought|> without <|end_of_thought|>"
    ]
    without = examples(made("openthoughts", OPENTHOUGHTS, drop_system=True))
    assert without == [chat(("u", "Q"), ("a", "A", "t"))]
    assert examples(made("openthoughts-metadata", METADATA)) == without


def test_messages(made, tmp_path):
    whole = chat(("u", "Q"), ("a", "A", "t"), ("u", "R"), ("a", "B"), system="S")
    assert examples(made("messages", MESSAGES)) == [whole]
    found = reasons(tmp_path)
    assert found[0] == "no message is the assistant's"
    assert "role is 'critic'" in found[1] and "or an empty one" in found[2]


def test_plain_prompt_rationale_answer(made):
    fields = dict(prompt_field="prompt", reasoning_field="rationale", response_field="answer")
    record = {"prompt": "Q", "rationale": "t", "answer": 7}
    assert examples(made("jsonl", [record], **fields)) == [chat(("u", "Q"), ("a", "7", "t"))]


PROMPT = [{"role": "user", "content": "Q"}]
GOOD = [{"role": "assistant", "content": think("t", "A")}]
POOR = [{"role": "assistant", "content": "B"}]
TEXTS = [{"prompt": "Q", "chosen": think("t", "A"), "rejected": "B"}]


@pytest.mark.parametrize(
    "records",
    [
        TEXTS,
        [{"prompt": PROMPT, "chosen": GOOD, "rejected": POOR}],
        [{"prompt": "Q", "chosen": PROMPT + GOOD, "rejected": PROMPT + POOR}],
        [{"chosen": PROMPT + GOOD, "rejected": PROMPT + POOR}],
    ],
    ids=["texts", "messages", "with the prompt again", "implicit prompt"],
)
def test_preference_pairs_in_trl_s_formats(made, records):
    user = Message("user", "Q")
    pair = PairExample((user, Message("assistant", "A", "t")), (user, Message("assistant", "B")), 1)
    assert examples(made("preference", records)) == [pair]


def test_pairs_that_are_none(made, tmp_path):
    bad = [
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        {"prompt": "Q", "chosen": "<think>cut", "rejected": "A"},
        {"prompt": "Q", "chosen": "A", "rejected": None},
    ]
    assert len(made("preference", TEXTS + bad)[1]) == 1
    for reason, says in zip(reasons(tmp_path), ("are the same", "no end of thinking", "NoneType")):
        assert says in reason


def test_real_traces_that_were_scored(shared_data, tmp_path):
    """INDEX.md: score is a list of bools there and a number in [0, 1] here."""
    fields = dict(prompt_field="question", correct_fields=("score",))
    long_cot = dict(response_field="code", reasoning="split_tags", choose="first")
    config = SourceConfig(
        name="x", path=str(shared_data / "long_cot" / "amc23.jsonl.gz"), **fields, **long_cot
    )
    source = open_source(config, tmp_path)
    assert len(source) + source.num_filtered + source.num_quarantined == 560
    assert all(record["score"] is True and "<|" in record["code"] for record in source)
    config = SourceConfig(
        name="y",
        path=str(shared_data / "teacher_rationales" / "mistral_small31_arithmetic.jsonl.gz"),
        response_field="full_model_response",
        **fields,
    )
    source = open_source(config, tmp_path)
    assert len(source) + source.num_filtered == 3600 and source.num_filtered > 0
    assert {record["score"] for record in source} == {1.0}


@pytest.mark.parametrize(
    ("kind", "records", "says"),
    [
        ("openr1", S1K, "'problem'"),
        ("s1k", OPENR1, "'question'"),
        ("openthoughts", MESSAGES, "'conversations'"),
        ("preference", S1K, "'chosen'"),
    ],
)
def test_another_schema_is_one_line(made, kind, records, says):
    with pytest.raises(ValueError) as error:
        made(kind, records)
    text = str(error.value)
    assert f"no column {says}" in text or f"no field {says}" in text
    assert all(name in text for name in records[0]) and "a." in text  # the columns that there are
    assert "data.sources.x.path" in text and "\n" not in text


def test_a_set_of_which_nothing_is_left_is_one_line(made):
    with pytest.raises(ValueError) as error:
        made("openr1", OPENR1[3:5])
    assert "no valid record" in str(error.value) and "\n" not in str(error.value)
    assert "2 are marked wrong or unfinished" in str(error.value)


def test_no_reasoning_is_none_unless_the_schema_has_one(made):
    rows = [{"question": "Q", "reasoning": None, "response": "A"},
            {"question": "Q", "reasoning": "", "response": "A"}]  # fmt: skip
    fields = dict(prompt_field="question", reasoning_field="reasoning", response_field="response")
    config, source = made("jsonl", rows, **fields)
    found = [to_example(config, record).messages[-1].reasoning for record in source]
    assert found == [None, ""]
    _, source = made("jsonl", rows, needs_reasoning=True, **fields)
    assert (len(source), source.num_quarantined) == (1, 1)
    published = [{**S1K_1_1[0], "deepseek_thinking_trajectory": None}, S1K_1_1[0]]
    assert len(made("s1k-1.1", published)[1]) == 1
    assert len(made("s1k-1.1", published, needs_reasoning=False)[1]) == 2


def test_a_schema_s_fields_may_be_set_otherwise():
    templated = SourceConfig(
        name="x", kind="openr1", path="a.parquet", prompt_template="Solve: {problem}", choose="all"
    ).fields
    assert (templated.kind, templated.prompt_field, templated.choose) == ("jsonl", "", "all")
    assert templated.response_field == "generations"
    with pytest.raises(ValueError, match=r"data.sources.x.rendering is 'text'"):
        SourceConfig(name="x", kind="openr1", path="a.parquet", rendering="text")


def test_the_choice_needs_no_new_index(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, OPENR1)))
    config = lambda choose: SourceConfig(name="x", kind="openr1", path=str(path), choose=choose)
    open_source(config("first"), tmp_path)
    monkeypatch.setattr(sources.SourceConfig, "examine", None)
    assert len(open_source(config("all"), tmp_path)) == 5
    picked = open_source(config("random"), tmp_path, 1)
    assert np.array_equal([r["problem"] for r in picked], ["P0", "P1", "P2", "P5"])

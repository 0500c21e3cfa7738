"""Answers are found where they are meant, compared exactly, and never run."""

import gzip
import json

import pytest

from jaxreason import types
from jaxreason.rewards import math as rewards


def split(text):
    """As text/chat.py's: (reasoning, answer) at the last closing tag."""
    reasoning, tag, answer = text.rpartition("</think>")
    return (reasoning, answer) if tag else (None, "" if "<think>" in text else text)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("the result is \\boxed{42}.", "42"),
        ("\\boxed{1} and then \\boxed{2}", "2"),
        ("\\boxed{\\text{a}{b}}", "\\text{a}{b}"),
        ("\\boxed{7} but now \\boxed{8", "7"),  # cut off
        ("\\boxed{5} so 6 or #### 7", "5"),
        ("3+4=7\n#### 72", "72"),
        ("#### 1\n#### $1,234.50 dollars\n99", "2469/2"),
        ("#### none", "none"),
        ("84-7=77", "77"),
        ("it is 84-7", "7"),
        ("it is (84)-7", "7"),
        ("it is -7.", "-7"),
        ("x=-7", "-7"),
        ("3-(-4)", "-4"),
        ("about 12.5%", "25/2"),
        ("costs $1,200.", "1200"),
        ("costs -$5", "-5"),
        ("a half is 1/2", "1/2"),
        ("1,2 and 3,4567", "4567"),
        ("−3", "-3"),
        (".5", "1/2"),
        ("nothing", None),
        ("", None),
        ("\\boxed{}", None),
    ],
)
def test_extract_answer(text, answer):
    assert rewards.extract_answer(text) == answer


@pytest.mark.parametrize(
    "a, b",
    [
        ("72", "72.0"),
        ("1,234", "1234"),
        ("$5", "5"),
        ("50%", "50"),
        ("0.5", "1/2"),
        ("2/4", "1/2"),
        ("-0", "0"),
        ("+3", "3"),
        ("007", "7"),
        ("3.", "3"),
        ("0.1", "1/10"),
        (" x ", "x"),
        ("100000000000000000001", "100000000000000000001.0"),
    ],
)
def test_equal_answers(a, b):
    assert rewards.answers_equal(a, b) and rewards.answers_equal(b, a)


@pytest.mark.parametrize(
    "a, b",
    [
        ("1", "2"),
        ("1/3", "0.3333333333333333"),
        ("100000000000000000001", "100000000000000000000"),  # equal as floats
        ("1/0", "1"),
        ("2+2", "4"),
        ("1e3", "1001"),
        ("1,2", "12"),
        ("", "0"),
        ("٣", "3"),
        ("__import__('os').getpid()", "1"),
    ],
)
def test_unequal_answers(a, b):
    assert not rewards.answers_equal(a, b)


def test_digits_without_end_are_graded_fast():
    text = "9" * 200_000
    assert rewards.answers_equal(rewards.extract_answer(text), text)
    assert rewards.extract_answer("\\boxed{" * 50_000 + "1") == "1"
    assert rewards.extract_answer("1" + ",111" * 10_000 + "1") == "1111"


def completion(text):
    return types.Completion(text=text, ids=(1,), logprobs=(0.0,), truncated=False)


def test_reward_reads_only_what_follows_the_reasoning():
    texts = ["3+4=7</think>8", "3+4=8</think>7", "<think>3+4=7", "7", "</think>"]
    values, breakdown = rewards.Exact(split)([completion(t) for t in texts], ["7"] * 5)
    assert values == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert breakdown["answered"] == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_reward_needs_an_answer_for_every_completion():
    with pytest.raises(ValueError):
        rewards.Exact(split)([completion("1")], ["1", "2"])


def test_grade_is_canonical():
    assert rewards.grade("</think>#### 1,000.0", "1000", split) == ("1000", True)


def test_gsm8k_answers_are_read_from_their_worked_solutions(shared_data):
    with gzip.open(shared_data / "gsm8k" / "test.jsonl.gz", "rt") as file:
        solutions = [json.loads(line)["answer"] for line in file]
    for solution in solutions:
        final = solution.split("#### ")[1].strip()
        assert rewards.answers_equal(rewards.extract_answer(solution), final)
        int(rewards.extract_answer(solution))  # every GSM8K answer is an integer


def test_all_labels_of_gsm8ks_model_solutions_are_agreed_with(shared_data):
    """Four models' solutions of all 1,319 test questions, labelled by the data set's authors."""
    path = shared_data / "gsm8k" / "example_model_solutions.jsonl.gz"
    with gzip.open(path, "rt") as file:
        records = [json.loads(line) for line in file]
    count, disagreements = 0, []
    for record in records:
        gold = record["ground_truth"].rpartition("A: ")[2]
        for model, solution in record.items():
            if model in ("question", "ground_truth"):
                continue
            count += 1
            correct = rewards.grade(solution["solution"], gold, split).correct
            if correct != solution["is_correct"]:
                disagreements.append((gold, solution["solution"][-80:]))
    assert count == 5276 and not disagreements

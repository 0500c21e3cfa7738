"""Expressions are parsed, never evaluated, and counted exactly."""

import gzip
import json
import random
from fractions import Fraction

import pytest

from jaxreason import types
from jaxreason.rewards import countdown
from jaxreason.rewards.countdown import Countdown
from jaxreason.text.chat import split_reasoning

GOLD = json.dumps({"target": 98, "numbers": [44, 19, 35]})


def score(texts, gold=GOLD, **options):
    rows = [types.Completion(text, ids=(1,), logprobs=(), truncated=False) for text in texts]
    return Countdown(split_reasoning, **options)(rows, [gold] * len(rows))


@pytest.mark.parametrize(
    "text, value, valid",
    [
        ("<answer>44 + 19 + 35</answer>", 1, 1),
        ("<answer> (44+19)+35 = 98 </answer>", 1, 1),
        ("<answer>(44+19)+35 = 97</answer>", 0, 0),
        ("<answer>44 + 19 - 35</answer>", 0, 1),
        ("<answer>98</answer>", 0, 0),
        ("<answer>44+19+35+0</answer>", 0, 0),
        ("<answer>44+44+35-25</answer>", 0, 0),
        ("<answer>44+19+35+44-44</answer>", 0, 0),
        ("<answer>1</answer> then <answer>35--44+19</answer>", 1, 1),
        ("<answer>44+19+35</answer><answer>44</answer>", 0, 0),
        ("\\boxed{44 + 19 + 35}", 1, 1),
        ("so\n44+19+35 = 98", 1, 1),
        ("<think><answer>44+19+35</answer></think>", 0, 0),
        ("<think><answer>44+19+35</answer>", 0, 0),
        ("", 0, 0),
        ("<answer>44+19+35.0</answer>", 0, 0),
        ("<answer>44+19+(35</answer>", 0, 0),
        ("<answer>44 19 35</answer>", 0, 0),
        ("<answer>44**19+35</answer>", 0, 0),
        ("<answer>44//19+35</answer>", 0, 0),
        ("<answer>44/(19-19)+35</answer>", 0, 0),
        ("<answer>__import__('os')</answer>", 0, 0),
        ("<answer>" + "(" * 5000 + "44+19+35" + ")" * 5000 + "</answer>", 0, 0),
        ("<answer>" + "9" * 100_000 + "</answer>", 0, 0),
        ("<answer>" + "-" * 90 + "44+19+35</answer>", 1, 1),
    ],
)
def test_expressions(text, value, valid):
    assert score([text]) == ([value], {"valid": [valid]})


def test_values_are_exact_fractions():
    texts = [r"\boxed{8 \div (3 - 8 \div 3)}", r"\boxed{\frac{8}{3-\frac{8}{3}}}", "8/(3-8/3)*1"]
    assert score(texts, json.dumps({"target": 24, "numbers": [3, 3, 8, 8]}))[0] == [1, 1, 0]
    assert score(["8 / 3 * 3"], json.dumps({"target": 8, "numbers": [3, 3, 8]}))[0] == [1]


def test_each_number_at_most_once_where_not_all_are_wanted():
    gold = json.dumps({"target": 79, "numbers": [44, 19, 35]})
    texts = ["44+35", "44+35+19-19", "44+35+19*0"]
    assert score(texts, gold, use_all=False)[0] == [1, 0, 0]
    assert score(texts, gold)[0] == [0, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_random_expressions_agree_with_fractions_own_arithmetic(seed):
    """A random tree is built with its value, written with random brackets and read back."""
    rng = random.Random(seed)

    def tree(depth):
        if depth == 0:
            number = rng.randrange(1, 100)
            return str(number), Fraction(number)
        (a, x), (b, y) = tree(depth - 1), tree(rng.randrange(depth))
        operator = rng.choice("+-*/")
        if operator == "/" and y == 0:
            operator = "+"
        value = {"+": x + y, "-": x - y, "*": x * y, "/": x / (y or 1)}[operator]
        return f"({a}) {operator} ({b})", value

    text, value = tree(4)
    assert countdown.evaluate(countdown.tokenize(text)) == value


def test_gold_answers_that_are_no_task_are_named():
    bad = ["98", "", "{}", '{"target": "98", "numbers": [1]}', '{"target": 1.5, "numbers": [1]}']
    complaints = Countdown(split_reasoning).complaints([GOLD, *bad])
    assert complaints[0] is None and all("must be JSON as" in each for each in complaints[1:])


def test_real_tasks_are_read(shared_data):
    with gzip.open(shared_data / "countdown" / "train.jsonl.gz", "rt") as file:
        tasks = [json.loads(line)["reward_model"]["ground_truth"] for line in file]
    assert not any(Countdown(split_reasoning).complaints([json.dumps(task) for task in tasks]))

"""Countdown: an exact solver, traces that are right line by line, splits that never overlap."""

import ast
import itertools
import json
import operator
import random
import re
from fractions import Fraction

import pytest

from jaxreason.data import countdown, prompts, sources
from jaxreason.data.countdown import CountdownConfig, search_trace, solve
from jaxreason.data.prompts import PromptConfig, PromptSource
from jaxreason.data.sources import SourceConfig
from jaxreason.rewards.countdown import Countdown
from jaxreason.text.chat import split_reasoning
from jaxreason.types import Completion

FILE = "countdown/train.jsonl.gz"
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv
}  # fmt: skip


def read(text):
    """(exact value, numbers used) of an expression, by Python's own grammar."""

    def walk(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value), [node.value]
        if isinstance(node, ast.UnaryOp):
            value, used = walk(node.operand)
            return -value, used
        (left, some), (right, others) = walk(node.left), walk(node.right)
        return OPERATORS[type(node.op)](left, right), some + others

    return walk(ast.parse(text, mode="eval").body)


def reachable(numbers):
    """Every value that can be made of all the numbers: by splitting them in two in all ways."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    found = set()
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            left = reachable([numbers[i] for i in chosen])
            right = reachable([n for i, n in enumerate(numbers) if i not in chosen])
            for a, b in itertools.product(left, right):
                found |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return found


def test_solver_agrees_with_brute_force():
    rng = random.Random(0)
    unsolvable = 0
    for size in [2] * 50 + [3] * 120 + [4] * 30:
        numbers = [rng.randint(1, 20) for _ in range(size)]
        values = reachable(numbers)
        target = rng.randint(-20, 100)
        solution = solve(numbers, target)
        assert (solution is not None) == (target in values), (numbers, target)
        unsolvable += solution is None
        if solution is not None:
            assert read(str(solution)) == (target, sorted_like(read(str(solution))[1], numbers))
        value = rng.choice(sorted(v for v in values if v.denominator == 1))
        solution = solve(numbers, int(value), rng)
        assert read(str(solution))[0] == value
        assert sorted(read(str(solution))[1]) == sorted(numbers)
    assert 60 < unsolvable < 180
    # Only through a fraction, and only through a negative number.
    for numbers, target in (([3, 3, 7, 7], 24), ([1, 5, 5, 5], 24), ([3, 8], -5), ([2, 3, 9], -12)):
        assert read(str(solve(numbers, target)))[0] == target
    assert solve([5, 5, 0], 1) is not None  # a division by zero is no step, and no crash
    assert solve([7], 7).value == 7


def sorted_like(used, numbers):
    """`used` if it holds exactly the numbers, else the numbers."""
    return used if sorted(used) == sorted(numbers) else numbers


def test_solver_is_deterministic_and_draws_by_seed():
    numbers, target = [44, 19, 35, 10], 88
    assert str(solve(numbers, target)) == str(solve(numbers, target))
    drawn = [str(solve(numbers, target, random.Random(seed))) for seed in range(30)]
    assert drawn == [str(solve(numbers, target, random.Random(seed))) for seed in range(30)]
    assert len(set(drawn)) > 3


def test_the_cap_bounds_every_intermediate_result():
    assert solve([20, 9, 97], 83, cap=179) is None
    assert str(solve([20, 9, 97], 83, cap=180)) == "20*9-97"
    assert solve([3, 3, 7, 7], 24, cap=10**6) is None  # needs 3/7


def check_trace(numbers, target, reasoning, answer, cap=None):
    """Follows a trace step by step with exact arithmetic; returns the number of attempts."""
    lines = reasoning.split("\n")
    for i, line in enumerate(lines):
        *steps, verdict = line.split(" ")
        left = sorted(map(Fraction, numbers))
        for step in steps:
            operation, _, result = step.partition("=")
            value, _ = read(operation)
            assert value == Fraction(result.strip("()")), step
            assert cap is None or 0 <= value <= cap
            a, b = re.fullmatch(
                r"(\(.+?\)|\d+)[-+*/](\(.+?\)|\d+)", operation
            ).groups()  # each is one of what is left
            left.remove(read(a)[0])
            left.remove(read(b)[0])
            left.append(value)
        assert len(left) == 1
        assert (left[0] == target) == (i == len(lines) - 1)
        assert verdict == ("yes" if i == len(lines) - 1 else "no")
    assert len(set(lines)) == len(lines)
    assert read(answer) == (target, sorted_like(read(answer)[1], numbers))
    return len(lines)


@pytest.mark.parametrize(("num_numbers", "num_traces"), [(3, 500), (4, 100)])
def test_traces_are_right_line_by_line_and_end_in_a_correct_expression(num_numbers, num_traces):
    config = CountdownConfig(num_numbers=num_numbers, num_test=0)
    source = countdown.generated(config, "train")
    attempts = []
    for i in range(num_traces):
        numbers, target = countdown.problem_of(source[i])
        answer, reasoning = countdown.completion(source[i], "search_cot", config)
        assert countdown.completion(source[i], "search_cot", config) == (answer, reasoning)
        attempts.append(check_trace(numbers, target, reasoning, answer, config.cap))
    counts = [attempts.count(n) / num_traces for n in range(1, config.max_attempts + 1)]
    assert sum(counts) == 1
    # 0.2 each; with 100 traces 0.04 is one standard deviation
    assert all(0.08 < count < 0.32 for count in counts)


def test_a_problem_that_needs_more_than_the_cap_still_has_a_trace():
    rng = random.Random(0)
    for numbers, target in (([3, 3, 7, 7], 24), ([63, 20, 6], 210), ([2, 3, 9], -12)):
        config = CountdownConfig(num_numbers=len(numbers))
        check_trace(numbers, target, *search_trace(numbers, target, rng, config))
    with pytest.raises(ValueError, match=r"countdown: 99 cannot be made from \[1, 1, 1\]"):
        search_trace([1, 1, 1], 99, rng, CountdownConfig())


def keys(source):
    return [countdown.problem_of(source[i]).key for i in range(len(source))]


def test_splits_never_overlap():
    # So few problems that train would draw most of test's if nothing kept it from that.
    config = CountdownConfig(
        num_numbers=2, max_number=9, min_target=1, max_target=20, num_test=30, num_train=2_000
    )
    test, train = (keys(countdown.generated(config, split)) for split in ("test", "train"))
    assert len(set(test)) == len(test) == 30
    assert not set(test) & set(train)
    assert len(train) == 2_000
    assert keys(countdown.generated(config, "train")) == train
    # From files: the same problem with its numbers in another order is the same problem.
    rng = random.Random(0)
    records = [
        {"nums": rng.sample([n, n + 1], 2), "target": 2 * n + 1} for n in [*range(1, 41)] * 5
    ]
    config = CountdownConfig(num_numbers=2, num_test=10)
    test, train = (
        keys(countdown.from_records(records, config, split, str)) for split in ("test", "train")
    )
    assert test == [((n, n + 1), 2 * n + 1) for n in range(1, 11)]
    assert not set(test) & set(train)
    assert len(train) == 5 * 30


def test_real_problems(shared_data, tmp_path):
    made = {}
    for split in ("train", "test"):
        fields = {"kind": "countdown", "path": str(shared_data / FILE), "split": split}
        config = PromptConfig(sources={"c": fields}, shuffle=False)
        made[split] = prompts.build(config, tmp_path, say=print).next(300)
    config = PromptSource(name="c", **{**fields, "split": "train"})
    opened = prompts.open_prompts(config, tmp_path)
    assert len(opened) == 3926 - 400 - num_duplicates(shared_data, tmp_path)
    first = made["test"][0]
    assert first.text == countdown.PROMPT.format(numbers="44 19 35", target=98)
    assert json.loads(first.answer) == {"target": 98, "numbers": [44, 19, 35]}
    assert not {p.answer for p in made["train"]} & {p.answer for p in made["test"]}


def num_duplicates(shared_data, tmp_path):
    """Problems of the test split that come again later in the file."""
    file = sources.JsonlSource(str(shared_data / FILE), fields={"target": ""}, data_dir=tmp_path)
    problems = [(tuple(sorted(r["nums"])), r["target"]) for r in map(file.__getitem__, range(8000))]
    problems = [problem for problem in problems if len(problem[0]) == 3]
    test = set(list(dict.fromkeys(problems))[:400])
    return sum(problem in test for problem in problems) - 400


def test_examples_for_fine_tuning():
    fields = {"name": "c", "kind": "countdown", "split": "train"}
    config = SourceConfig(
        **fields, rendering="search_cot", prompt_template="{numbers}->{target}:",
        countdown={"num_numbers": 3, "num_train": 5},
    )  # fmt: skip
    source = sources.open_source(config, "unused")
    assert len(source) == 5
    user, assistant = sources.to_example(config, source[2]).messages
    numbers, target = countdown.problem_of(source[2])
    assert user.content == f"{' '.join(map(str, numbers))}->{target}:"
    check_trace(numbers, target, assistant.reasoning, assistant.content, 200)
    plain = SourceConfig(**fields, rendering="answer", countdown={"num_train": 5})
    user, bare = sources.to_example(plain, source[2]).messages
    assert (bare.content, bare.reasoning) == (assistant.content, None)
    assert user.content == countdown.PROMPT.format(**source[2])


def test_what_a_trace_answers_earns_the_reward(tmp_path):
    fields = {"kind": "countdown", "split": "train", "countdown": {"num_numbers": 4}}
    stream = prompts.build(PromptConfig(sources={"c": fields}), tmp_path, say=print)
    train = SourceConfig(name="c", rendering="search_cot", **fields)
    source = sources.open_source(train, tmp_path)
    found = stream.next(40)
    texts = []
    for prompt in found:
        example = sources.to_example(train, source[int(prompt.id.removeprefix("c/"))])
        assert prompt.text == example.messages[0].content
        texts.append(f"<think>{example.messages[1].reasoning}</think>{example.messages[1].content}")
    completions = [Completion(text=t, ids=(1,), logprobs=(0.0,), truncated=False) for t in texts]
    reward = Countdown(split_reasoning)
    answers = [prompt.answer for prompt in found]
    assert reward.complaints(answers) == [None] * 40
    assert reward(completions, answers)[0] == [1.0] * 40
    assert sum(reward(completions, answers[1:] + answers[:1])[0]) == 0  # of another problem


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"countdown": {"num": 3}}, "data.sources.c.countdown.num is unknown; known: num_numbers"),
        ({"countdown": {"num_numbers": 1}}, "countdown.num_numbers is 1; it must be 2 or more"),
        ({"countdown": {"num_numbers": 7}}, "countdown.num_numbers is 7; it must be 2 to 6"),
        ({"countdown": {"max_attempts": 0}}, "countdown.max_attempts is 0; it must be 1 or more"),
        ({"countdown": {"cap": 50}}, "countdown.cap is 50; it must be at least max_number 99"),
        ({"countdown": {"min_target": 101}}, "they must be min_target <= max_target"),
        ({"rendering": "long_cot"}, "data.sources.c.rendering is 'long_cot'; it must be one of"),
        ({"split": ""}, "data.sources.c.split is ''; it must be train or test"),
        ({"prompt_field": "q"}, "data.sources.c.prompt_field is 'q'; kind 'countdown' has no use"),
        ({"kind": "arithmetic", "rendering": "answer", "countdown": {"seed": 1}}, "has no use"),
    ],
)
def test_mistakes_are_named(fields, says):
    right = {"name": "c", "kind": "countdown", "rendering": "search_cot", "split": "train"}
    with pytest.raises(ValueError) as error:
        SourceConfig(**{**right, **fields})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"target": 5}, "nums None and target 5; they must be a list of whole numbers above 0"),
        ({"nums": [1, "2"], "target": 5}, "nums [1, '2']"),
        ({"nums": [1, 0], "target": 5}, "nums [1, 0]"),
        ({"nums": [1, 2], "target": 5.5}, "target 5.5"),
        ({"nums": [1, 2], "target": 3}, "countdown.num_numbers 3; the files hold 0 and 0 problems"),
    ],
)
def test_files_that_hold_no_problems_are_refused(tmp_path, line, says):
    (tmp_path / "c.jsonl").write_text(json.dumps(line) + "\n")
    config = SourceConfig(
        name="c",
        kind="countdown",
        path=str(tmp_path / "c.jsonl"),
        rendering="answer",
        split="train",
    )
    with pytest.raises(ValueError) as error:
        sources.open_source(config, tmp_path / "data")
    assert says in str(error.value)


def test_too_few_different_problems_are_an_error():
    config = CountdownConfig(num_numbers=2, max_number=3, min_target=1, max_target=6, num_test=50)
    with pytest.raises(ValueError, match=r"countdown.num_test is 50; there are not that many"):
        countdown.generated(config, "test")

"""The arithmetic benchmark: exact answers, balanced items, sound chains, disjoint splits."""

import ast
import collections
import dataclasses
import json
import random
import re
import sys
from fractions import Fraction

import numpy as np
import pytest

from jaxreason.data import arithmetic, expressions

SMALL = arithmetic.ArithmeticConfig(
    min_operations=2, max_operations=4, max_operand=12, num_train=2_000, num_test=300
)
PAPER = arithmetic.ArithmeticConfig(
    min_operations=5, max_operations=15, max_operand=100, num_train=1_100, num_test=110
)


def draw(config, count):
    rng = random.Random(7)
    span = config.max_operations - config.min_operations + 1
    return [
        arithmetic.generate(rng, config.min_operations + i % span, config) for i in range(count)
    ]


@pytest.fixture(scope="module", params=[SMALL, PAPER], ids=["small", "paper"])
def drawn(request):
    return request.param, draw(request.param, 10_000)


def operations(tree):
    if tree.op:
        yield from operations(tree.left)
        yield from operations(tree.right)
        yield tree


def leaves(tree):
    return leaves(tree.left) + leaves(tree.right) if tree.op else [tree.value]


def fraction_value(node) -> Fraction:
    """Python's own reading of the printed text, in exact fractions."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return -fraction_value(node.operand)
    a, b = fraction_value(node.left), fraction_value(node.right)
    match node.op:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
    return a / b


def python_value(text):
    return fraction_value(ast.parse(text, mode="eval").body)


def test_answers_equal_two_independent_evaluators(drawn):
    _, trees = drawn
    for tree in trees:
        text = expressions.show(tree)
        assert expressions.evaluate(text) == tree.value == python_value(text), text


def test_operators_are_balanced(drawn):
    config, trees = drawn
    for n in (None, config.min_operations, config.max_operations):
        counts = collections.Counter(
            node.op for t in trees for node in operations(t) if n in (None, len(leaves(t)) - 1)
        )
        for op in "+-*/":  # 2,000 operators or more: a share's standard deviation is under 0.01
            assert 0.20 <= counts[op] / counts.total() <= 0.30, (n, counts)


def test_every_intermediate_is_an_integer_within_the_cap():
    config = dataclasses.replace(PAPER, cap=2_000)
    for tree in draw(config, 1_000):
        assert all(1 <= leaf <= config.max_operand for leaf in leaves(tree))
        for node in operations(tree):
            assert abs(node.value) <= config.cap
            if node.op == "/":
                assert node.left.value == node.value * node.right.value != node.right.value * 0.5


def test_number_of_operations_is_as_asked_and_operands_cover_their_range(drawn):
    config, trees = drawn
    span = config.max_operations - config.min_operations + 1
    asked = [config.min_operations + i % span for i in range(len(trees))]
    assert [len(leaves(tree)) - 1 for tree in trees] == asked
    assert {leaf for tree in trees for leaf in leaves(tree)} == set(
        range(1, config.max_operand + 1)
    )


def test_divisions_are_seldom_trivial(drawn):
    divisors = [n.right.value for t in drawn[1] for n in operations(t) if n.op == "/"]
    assert sum(abs(divisor) == 1 for divisor in divisors) < 0.1 * len(divisors)


def test_a_subset_of_the_operators():
    trees = draw(dataclasses.replace(PAPER, operators="-*"), 200)
    assert {node.op for tree in trees for node in operations(tree)} == {"-", "*"}


def test_impossible_items_are_reported():
    config = dataclasses.replace(SMALL, operators="+", cap=12, max_operations=12)
    with pytest.raises(ValueError, match=r"no expression of 12 operations .* cap 12"):
        arithmetic.generate(random.Random(0), 12, config)  # 13 ones are the least sum


def test_short_cot_steps_are_true_and_use_the_operands_in_order(drawn):
    for tree in drawn[1][:1_000]:
        lines = arithmetic.short_cot(tree).split("\n")
        assert len(lines) == len(leaves(tree)) - 1
        for line, node in zip(lines, operations(tree), strict=True):
            left, right = line.split("=")
            assert expressions.evaluate(left) == int(right) == node.value


def test_long_cot_is_the_steps_with_checks_and_corrected_mistakes():
    config = dataclasses.replace(PAPER, recheck_share=0.4, mistake_share=0.2)
    steps = checks = mistakes = 0
    for seed, tree in enumerate(draw(config, 1_000)):
        lines = arithmetic.long_cot(tree, random.Random(seed), config).split("\n")
        assert lines[-1].endswith(f"={tree.value}")
        right = []
        for previous, line in zip(["", *lines], [*lines, "wait"]):
            if line.startswith("wait") and previous:
                if line != "wait":  # the corrected step follows a wrong one of the same operands
                    right.pop()
                    wrong = previous.split("=")
                    assert line.removeprefix("wait ").split("=")[0] == wrong[0]
                    assert 1 <= abs(expressions.evaluate(wrong[0]) - int(wrong[1])) <= 10
                    right.append(line.removeprefix("wait "))
                    mistakes += 1
            elif line.startswith("check "):
                left, value = line.removeprefix("check ").split("=")
                assert expressions.evaluate(left) == int(value)
                checks += 1
            elif not line.startswith("="):
                right.append(line)
        assert "\n".join(right) == arithmetic.short_cot(tree)
        steps += len(right)
    # 10,000 steps: three standard deviations of a share of 0.4 are 0.015
    assert checks / steps == pytest.approx(0.4, abs=0.015)
    assert mistakes / steps == pytest.approx(0.2, abs=0.012)


def test_long_cot_without_shares_is_the_short_one():
    config = dataclasses.replace(SMALL, recheck_share=0, mistake_share=0)
    for tree in draw(config, 50):
        assert arithmetic.long_cot(tree, random.Random(0), config) == arithmetic.short_cot(tree)


def test_a_review_is_all_steps_once_more_before_the_answer():
    config = dataclasses.replace(
        PAPER, recheck_share=0, mistake_share=0, review_share=0.6, max_reviews=3
    )
    counts = []
    for seed, tree in enumerate(draw(config, 1_000)):
        steps = arithmetic.short_cot(tree).split("\n")
        lines = arithmetic.long_cot(tree, random.Random(seed), config).split("\n")
        assert lines[: len(steps)] == steps
        count, rest = divmod(len(lines) - len(steps), len(steps))
        again = [f"again {step}" for step in steps] * count
        assert lines[len(steps) :] == again + [f"={tree.value}"] * (count > 0)
        assert rest == (count > 0)
        counts.append(count)
    # 1,000 chains: three standard deviations of a share of 0.6 are 0.046
    assert np.mean(np.array(counts) > 0) == pytest.approx(0.6, abs=0.05)
    assert set(counts) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "op, a, b, c, check",
    [
        ("+", 3, 4, 7, "7-4=3"),
        ("-", 3, -4, 7, "7+(-4)=3"),
        ("*", -3, 4, -12, "-12/4=-3"),
        ("/", 12, -4, -3, "-3*(-4)=12"),
        ("*", 5, 0, 0, "0/5=0"),
        ("*", 0, 0, 0, "0*0=0"),
    ],
)
def test_checks_undo_the_step(op, a, b, c, check):
    assert arithmetic._inverse(op, a, b, c) == check


def test_splits_are_disjoint_balanced_and_repeatable():
    config = dataclasses.replace(
        SMALL, min_operations=1, max_operations=2, num_test=400, num_train=20_000
    )
    first, second = arithmetic.records(config), arithmetic.records(config)
    train = list(first["train"])
    assert first["test"] == second["test"] and train == list(second["train"])
    test = {record["expression"] for record in first["test"]}
    assert len(test) == config.num_test
    assert not test & {record["expression"] for record in train}
    for split in (first["test"], train, train[:101], train[::2]):
        one, two = collections.Counter(r["num_operations"] for r in split).values()
        assert abs(one - two) <= 1
    other = arithmetic.records(dataclasses.replace(config, seed=1))
    assert other["test"] != first["test"]


def test_too_many_test_items_are_reported():
    config = dataclasses.replace(SMALL, min_operations=1, max_operations=1, num_test=1_000)
    with pytest.raises(ValueError, match=r"num_test is 1000; .* 1 operations over operands to 12"):
        arithmetic.records(config)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("workdir") / "data"
    assert arithmetic.prepare_arithmetic(SMALL, directory) == directory
    return directory


def test_prepared_directory_reads_back_in_order_without_tensorflow(prepared):
    for split, wanted in arithmetic.records(SMALL).items():
        source = arithmetic.open_arithmetic(prepared, split)
        wanted = list(wanted)
        assert len(source) == len(wanted)
        assert [source[i] for i in range(len(source))] == wanted
    assert type(source[0]["num_operations"]) is int and type(source[0]["text"]) is str
    assert "tensorflow" not in sys.modules
    assert [path.name for path in prepared.parent.iterdir()] == ["data"]  # nothing half-written


def test_prepared_directory_is_used_again_but_not_for_another_config(prepared):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    arithmetic.prepare_arithmetic(SMALL, prepared)
    assert before == {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    with pytest.raises(ValueError, match=r"arithmetic.seed 0, not 5"):
        arithmetic.prepare_arithmetic(dataclasses.replace(SMALL, seed=5), prepared)


def test_a_directory_from_before_a_setting_had_its_default(tmp_path):
    arithmetic.prepare_arithmetic(SMALL, tmp_path / "made")
    file = tmp_path / "made" / "arithmetic.json"
    older = json.loads(file.read_text())
    del older["review_share"], older["max_reviews"]
    file.write_text(json.dumps(older))
    arithmetic.prepare_arithmetic(SMALL, tmp_path / "made")
    with pytest.raises(ValueError, match=r"arithmetic.review_share 0.0, not 0.5"):
        arithmetic.prepare_arithmetic(
            dataclasses.replace(SMALL, review_share=0.5), tmp_path / "made"
        )


def test_reasoning_by_rendering(prepared):
    record = arithmetic.open_arithmetic(prepared, "train")[0]
    assert arithmetic.reasoning(record, "answer") is None
    assert arithmetic.reasoning(record, "short_cot") == record["short_cot"]
    with pytest.raises(ValueError, match="rendering is 'cot'; it must be one of"):
        arithmetic.reasoning(record, "cot")


@pytest.mark.parametrize(
    "field, value",
    [
        ("min_operations", 0),
        ("min_operations", 5),
        ("max_operand", 1),
        ("cap", 5),
        ("operators", "+^"),
        ("operators", "++"),
        ("num_train", 0),
        ("recheck_share", 1.5),
        ("mistake_share", -0.1),
        ("review_share", 2.0),
        ("max_reviews", 0),
    ],
)
def test_config_names_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{re.escape(str(value))}") as error:
        dataclasses.replace(SMALL, **{field: value})
    assert "\n" not in str(error.value)

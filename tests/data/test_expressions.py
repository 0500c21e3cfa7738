"""Expressions as text: minimal parentheses, and a reader that refuses everything else."""

import ast
import random

import pytest

from jaxreason.data.arithmetic import ArithmeticConfig, generate
from jaxreason.data.expressions import Expression, evaluate

CONFIG = ArithmeticConfig(min_operations=3, max_operations=6, num_train=1, num_test=1)


def test_parentheses_are_minimal_and_negative_leaves_are_unambiguous():
    leaf = Expression
    assert str(leaf(77, "-", leaf(84, "*", leaf(7, "+", leaf(3), leaf(4)), leaf(12)), leaf(7))) == (
        "(3+4)*12-7"
    )
    assert str(leaf(7, "-", leaf(3), leaf(-4))) == "3-(-4)"
    assert str(leaf(5, "+", leaf(-1), leaf(6, "*", leaf(-2), leaf(-3)))) == "-1+(-2)*(-3)"
    assert str(leaf(3, "-", leaf(2), leaf(-1, "+", leaf(-3), leaf(2)))) == "2-(-3+2)"
    rng = random.Random(0)
    for n in [3, 6] * 150:  # taking any pair of parentheses away changes the tree
        text = str(generate(rng, n, CONFIG))
        for i in [i for i, c in enumerate(text) if c == "("]:
            depth, j = 1, i
            while depth:
                j += 1
                depth += {"(": 1, ")": -1}.get(text[j], 0)
            bare = text[:i] + text[i + 1 : j] + text[j + 1 :]
            assert ast.dump(ast.parse(bare)) != ast.dump(ast.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        *"|3+|3 + 4|(3+4|3+4)|3++4|7/2|7/0|2**3|3--4|x|1.5|٣+1|__import__('os')|()".split("|"),
        "(" * 5_000 + "1" + ")" * 5_000,
    ],
)
def test_evaluate_refuses_everything_else(text):
    with pytest.raises(ValueError):
        evaluate(text)


def test_evaluate_follows_precedence_and_association():
    assert evaluate("93/3+77+(12-32)-11+61*78+44*39+55") == 6606  # the study's examples
    assert evaluate("(14*21*38+32+23+31+3)-11+59+71+60") == 11440
    assert evaluate("12/2/3*5") == 10
    assert evaluate("-3-(-4)") == 1

"""Equations of integers are found where they are, judged exactly, and left alone where in doubt."""

import random

import pytest

from jaxreason.data.arithmetic import ArithmeticConfig, records
from jaxreason.data.expressions import evaluate
from jaxreason.reasoning.equations import Equation, find_equations


def read(text):
    return [f"{e.left}={e.right}" + "!" * (not e.correct) for e in find_equations(text)]


@pytest.mark.parametrize(
    "text, want",
    [
        ("3*4=13", ["3*4=13!"]),
        ("wait 3*4=12", ["3*4=12"]),
        ("-3+5=2", ["-3+5=2"]),
        ("get -3+4=1", ["-3+4=1"]),
        ("3*(-4)=-12", ["3*(-4)=-12"]),
        ("-5-(-8)=3", ["-5-(-8)=3"]),
        ("12-(3+4)=5", ["12-(3+4)=5"]),
        ("12-3-4*2/4=7", ["12-3-4*2/4=7"]),  # left to right, products first
        ("12/4 = 3 = 2+2", ["12/4=3", "3=2+2!"]),  # a chain
        ("x = 3 + 4 = 7", ["3+4=7"]),
        ("10 / 4 = 5/2, 10/4 = 2", ["10/4=5/2", "10/4=2!"]),  # rational
        (r"\( 18 \times 3 = 54 \)", ["18*3=54"]),
        (r"\left(3 \cdot 4\right) \div 2 = 6", ["(3*4)/2=6"]),
        ("8 ÷ 2 × 3 − 1 = 11, 7 x 3 = 21, 2·3=6", ["8/2*3-1=11", "7*3=21", "2*3=6"]),
        (r"\frac{18}{3} = 6", [r"\frac{18}{3}=6"]),
        (r"1,234 + 5 = 1,239 and 1{,}000\!+\!1 = 1{,}001", ["1234+5=1239", "1000+1=1001"]),
        ("$18 + $12 = $30", ["18+12=30"]),
        ("$18 + 12 = 30$ miles", ["18+12=30"]),
        ("we get 18 + 12 = 30 mph.", ["18+12=30"]),
        ("**12 + 3 = 15**", ["12+3=15"]),
        ("- 18 + 12 = 30", ["18+12=30"]),  # a list's mark
        ("1. 3 + 4 = 8", ["3+4=8!"]),
        ("(3 + 4 = 7), 2 + 3 = 5 (since two)", ["3+4=7", "2+3=5"]),
        ("48/2 = <<48/2=24>>24", ["48/2=24"]),  # GSM8K's calculator
        ("2+2=4\n+3=7", ["2+2=4"]),  # lines are read one by one
    ],
)
def test_what_is_read(text, want):
    assert read(text) == want


@pytest.mark.parametrize(
    "text",
    [
        "=42", "3 = 3", "2x + 3 = 7", "x + 3 + 4 = 7", "x - 3 + 5 = 7", "a -3+5=7",
        "area - 3 + 5 = 7", "3 + 4 = 8x",
        "3 + 4 = 8 x", "3 + 4 = 8 + x", "f(3 + 4) = 8", "gcd(12, 18 - 6) = 7", "5(2+3) = 26",
        "2^3 + 1 = 10", "x_{3} + 4 + 5 = 9", r"\sqrt{9} + 1 + 1 = 4", "√9 + 1 + 1 = 4",
        r"3+4=8\pi", "5! + 3 + 1 = 4", "3 + 1 = 4!", "1.5 * 18 = 28", "45 / 30 = 1.5",
        "3.5 + 1 + 1 = 4", "x.5 + 3 + 1 = 5", "20 * 50% = 11", "17 * 3 = 3 mod 12",
        "17 * 3 = 3 (mod 12)", r"17 * 3 = 3 \pmod{12}", "19 / 2 = 9 remainder 1", "1/0 = 5",
        "1 + 2 + ... + 10 = 56", "3 + = 4", "3 4 + 1 = 5", "(3 + 4)) = 8", "3 + 4 == 8 - = 1",
        r"$x$+3+1=5", "1000 + 234 = 1,234.5", "7" * 51 + " + 1 = 2",
    ],
)  # fmt: skip
def test_what_is_not_judged(text):
    assert read(text) == []


@pytest.mark.parametrize("seed", range(4))
def test_values_equal_the_evaluator_of_the_data(seed):
    """Every expression that data/arithmetic.py writes, against data/expressions.py."""
    config = ArithmeticConfig(
        min_operations=2, max_operations=9, num_train=1, num_test=80, seed=seed
    )
    rng = random.Random(seed)
    for record in records(config)["test"]:
        off = rng.choice([0, 0, 1, -7])
        text = f"{record['expression']}={evaluate(record['expression']) + off}"
        assert [e.correct for e in find_equations(text)] == [off == 0], text
        (spaced,) = find_equations(text.replace("*", " × ").replace("+", " + "))
        assert spaced.correct == (off == 0)


def test_adversarial_lines_take_linear_time():
    """Together 0.5 s of CPU, and minutes where the reader was quadratic."""
    for text in (
        "(" * 20_000 + "3+4=7", "3+4=7" + ")" * 20_000, "0" * 20_000 + ".5=3", "1." * 10_000 + "=1",
        "1,111" * 4_000 + "=", "1+" * 10_000 + "1=3", "-" * 20_000 + "1+1=2",
    ):  # fmt: skip
        assert find_equations(text) == []
    assert len(find_equations("1=0+1" + "=1" * 20_000)) == 2


def test_any_characters_are_read_without_an_error():
    rng = random.Random(0)
    alphabet = [*"0123456789+-*/()= x.,$\\{}%^\n", "\\times", "\\frac{1}{2}", " = ", "**", "mod"]
    found = []
    for _ in range(4000):
        found += find_equations("".join(rng.choices(alphabet, k=rng.randint(0, 25))))
    assert found and all(isinstance(equation, Equation) for equation in found)

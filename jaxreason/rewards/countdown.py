"""Reward of the Countdown game: an equation of given numbers that reaches a target, exactly."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from jaxreason import types
from jaxreason.rewards.format import last_tagged
from jaxreason.rewards.math import Split, last_boxed

_MAX_TOKENS = 100  # of an expression; keeps brackets far from Python's recursion limit
_TOKEN = re.compile(r"\s*(?:([0-9]{1,18})(?![0-9])|(\\frac|[-+*/(){}]))")
_SPELLINGS = (
    ("\\left", ""), ("\\right", ""), ("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"),
    ("×", "*"), ("·", "*"), ("÷", "/"), ("−", "-"), ("[", "("), ("]", ")"), ("\\dfrac", "\\frac"),
    ("\\(", ""), ("\\)", ""), ("$", ""),
)  # fmt: skip


class Task(NamedTuple):
    target: int
    numbers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Countdown:
    """1 for an expression of + - * / and brackets that equals the target, 0 otherwise.

    The gold answer is JSON: {"target": 98, "numbers": [44, 19, 35]}. With `use_all` (TinyZero's
    rule) every given number is used exactly once, without it at most once. The expression is the
    last <answer>, else the last \\boxed{}, else the last line after the reasoning; `= 98` may
    follow it. Values are exact fractions, and a sign before a number is allowed.
    """

    split: Split
    use_all: bool = True

    def __call__(
        self, completions: Sequence[types.Completion], answers: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The breakdown has `valid`: 1 where an expression of allowed numbers was written."""
        tasks = [read_task(answer) for answer in answers]
        texts = [expression_text(self.split(c.text)[1]) for c in completions]
        values = [self._value(*pair) for pair in zip(texts, tasks, strict=True)]
        right = [float(v == task.target) for v, task in zip(values, tasks, strict=True)]
        return right, {"valid": [float(value is not None) for value in values]}

    def complaints(self, answers: Sequence[str]) -> list[str | None]:
        """For each gold answer what is wrong with it, None where it is a task."""
        return [_complaint(answer) for answer in answers]

    def _value(self, text: str, task: Task) -> Fraction | None:
        """The value of an expression that keeps the rules, else None."""
        text, equals, claimed = text.partition("=")
        if equals and claimed.strip() != str(task.target):
            return None
        tokens = tokenize(text)
        if tokens is None:
            return None
        used, given = Counter(t for t in tokens if isinstance(t, int)), Counter(task.numbers)
        if not (used == given if self.use_all else used <= given):
            return None
        return evaluate(tokens)


def read_task(answer: str) -> Task:
    """Raises ValueError, KeyError or TypeError where the gold answer is no task."""
    record = json.loads(answer)
    target, numbers = record["target"], record["numbers"]
    if not all(type(number) is int for number in (target, *numbers)):
        raise TypeError("target and numbers must be integers")
    return Task(target, tuple(numbers))


def _complaint(answer: str) -> str | None:
    try:
        read_task(answer)
    except (ValueError, KeyError, TypeError):
        return f'is {answer!r}; it must be JSON as {{"target": 98, "numbers": [44, 19, 35]}}'
    return None


def expression_text(text: str) -> str:
    """The part of an answer that is the expression; see Countdown."""
    place = last_tagged(text)
    place = last_boxed(text) if place is None else place
    if place is None:
        place = text.strip().rpartition("\n")[2]
    for spelling, plain in _SPELLINGS:
        place = place.replace(spelling, plain)
    return place.strip()


def tokenize(text: str) -> list[int | str] | None:
    """Integers and signs; None where a text holds anything else, or too much."""
    tokens: list[int | str] = []
    position, text = 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) == _MAX_TOKENS:
            return None
        tokens.append(match[2] or int(match[1]))
        position = match.end()
    return tokens


def evaluate(tokens: Sequence[int | str]) -> Fraction | None:
    """The exact value of an expression, None where it is malformed or divides by zero.

    sum     := product (("+" | "-") product)*
    product := atom (("*" | "/") atom)*
    atom    := integer | "-" atom | "(" sum ")" | "\\frac" "{" sum "}" "{" sum "}"
    """
    try:
        value, position = _sum(tokens, 0)
    except (_Malformed, ZeroDivisionError):
        return None
    return value if position == len(tokens) else None


class _Malformed(Exception):
    """An expression breaks the grammar."""


def _sum(tokens: Sequence[int | str], position: int) -> tuple[Fraction, int]:
    value, position = _product(tokens, position)
    while position < len(tokens) and tokens[position] in ("+", "-"):
        sign = tokens[position]
        term, position = _product(tokens, position + 1)
        value = value + term if sign == "+" else value - term
    return value, position


def _product(tokens: Sequence[int | str], position: int) -> tuple[Fraction, int]:
    value, position = _atom(tokens, position)
    while position < len(tokens) and tokens[position] in ("*", "/"):
        sign = tokens[position]
        factor, position = _atom(tokens, position + 1)
        value = value * factor if sign == "*" else value / factor
    return value, position


def _atom(tokens: Sequence[int | str], position: int) -> tuple[Fraction, int]:
    token = tokens[position] if position < len(tokens) else None
    if isinstance(token, int):
        return Fraction(token), position + 1
    if token == "-":
        value, position = _atom(tokens, position + 1)
        return -value, position
    if token == "\\frac":
        top, position = _bracketed(tokens, position + 1, "{", "}")
        bottom, position = _bracketed(tokens, position, "{", "}")
        return top / bottom, position
    return _bracketed(tokens, position, "(", ")")


def _bracketed(
    tokens: Sequence[int | str], position: int, opening: str, closing: str
) -> tuple[Fraction, int]:
    if tokens[position : position + 1] != [opening]:
        raise _Malformed
    value, position = _sum(tokens, position + 1)
    if tokens[position : position + 1] != [closing]:
        raise _Malformed
    return value, position + 1

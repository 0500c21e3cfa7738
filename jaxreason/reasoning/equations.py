"""Equations of integers in running text, found and checked exactly; nothing is evaluated as code.

A chain `12/4 = 3 = 2+1` is so many equations as it has equals signs. Read are + - * /, as × ÷ · −
\\times \\cdot \\div too, parentheses, \\frac{a}{b} of integers, thousands separators, and dollar
signs of prices; values are rational, so 10/4 = 5/2 is right and 10/4 = 2 is wrong. A side that is
no such expression (a variable, a decimal, a power, a percentage) is not judged, nor is one that may
be the rest of a longer expression, as `+ 3` in `x + 3 = 7`, nor a line that speaks of a remainder.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

_MAX_DIGITS = 50  # longer numbers are a sampler that prints digits without end
_MAX_TOKENS = 200  # of one side; a loop of a model can open brackets without end
_TOKEN = re.compile(
    r"(?P<space>(?:\s|\\[,;! ]|\\(?:left|right)\b|~)+)"
    r"|(?P<fraction>\\[dt]?frac\{\s*\d+\s*\}\{\s*\d+\s*\})"
    r"|(?P<number>(?:\\?\$)?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d++)(?!\.?\d|,\d{3}(?!\d)))"
    r"|(?P<op>[-+*/×÷·−]|\\(?:times|cdot|div)\b|(?<=\d )x(?= \d))"
    r"|(?P<open>\()|(?P<close>\))|(?P<equals>=)"
    r"|(?P<other>\\?[A-Za-z]+|\d[\d.,]*|\\.|.)"
)
_OPS = {"×": "*", "·": "*", "x": "*", "÷": "/", "−": "-",
        "\\times": "*", "\\cdot": "*", "\\div": "/"}  # fmt: skip
_RANK = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "negative": 3}
# What stands right before an expression where it begins, and right after it where it ends.
_LINE_END = "\n"
_MARKS = {_LINE_END, *":;\"'`|<>→⇒?&", "\\\\"}
_MARKS |= {"\\implies", "\\Rightarrow", "\\rightarrow", "\\quad", "\\qquad"}
_BEFORE = _MARKS | {*".,[{$“‘—!", "\\(", "\\[", "\\therefore"}
_AFTER = _MARKS | {*".,]}$”’—–", "\\)", "\\]", "\\text", "\\mathrm"}
_NOT_AROUND = {"mod", "modulo", "sqrt", "root", "squared", "cubed", "factorial", "percent"}


class Equation(NamedTuple):
    """`left` = `right` as it was written; at least one of the sides has an operation."""

    left: str  # normalised: no spaces, ASCII operators
    right: str
    correct: bool


class _Token(NamedTuple):
    kind: str
    text: str
    spaced: bool  # white space before it


class _Side(NamedTuple):
    text: str
    value: Fraction
    num_operations: int


def find_equations(text: str) -> list[Equation]:
    """All equations of a text, in their order."""
    found = []
    for run, before, after in _runs(text):
        sides = _sides(run, before, after)
        for left, right in itertools.pairwise(sides):
            if left and right and left.num_operations + right.num_operations:
                found.append(Equation(left.text, right.text, left.value == right.value))
    return found


# ------------------------------------------------------------------------------ where they are


_OUTSIDE = _Token("other", _LINE_END, False)


def _runs(text: str) -> Iterator[tuple[list[_Token], _Token, _Token]]:
    """Stretches of a line that could be a chain, with the tokens right before and after."""
    for line in text.split("\n"):
        if "=" not in line or "remainder" in line:
            continue
        line = line.replace("\\!", "").replace("{,}", ",")  # typeset thousands
        run: list[_Token] = []
        before, spaced = _OUTSIDE, False
        for match in _TOKEN.finditer(line):
            token = _Token(match.lastgroup, match[0], spaced)
            spaced = token.kind == "space"
            if token.kind == "other":
                yield run, before, token
                run, before = [], token
            elif not spaced:
                run.append(token)
        yield run, before, _OUTSIDE


def _sides(run: list[_Token], before: _Token, after: _Token) -> list[_Side | None]:
    """The sides of a chain; None for one that is no expression or not all of one."""
    parts: list[list[_Token]] = [[]]
    for token in run:
        if token.kind == "equals":
            parts.append([])
        else:
            parts[-1].append(token)
    if len(parts) == 1:
        return []
    parts = [part if len(part) <= _MAX_TOKENS else [] for part in parts]
    parts[0] = _without_lead(parts[0], before)
    parts[-1] = _without_rest(parts[-1], after)
    return [_read(part) for part in parts]


def _without_lead(part: list[_Token], before: _Token) -> list[_Token]:
    """The first side without a list's mark, bold and brackets; [] where it does not begin there."""
    free = before.text == _LINE_END  # whether anything can begin here
    if free and len(part) > 1 and part[0].text in ("-", "*") and part[1].spaced:
        part = part[1:]  # a list's mark; a sign stands close to its number
    elif [t.text for t in part[:2]] == ["*", "*"] and (free or part[0].spaced):
        part, free = part[2:], True
    while part and part[0].kind == "open" and _balance(part) > 0:
        part, free = part[1:], free or part[0].spaced or before.text in _BEFORE
    if free or not part:
        return part
    spaced, sign, word = part[0].spaced, part[0].kind == "op", before.text
    if sign and (len(part) == 1 or part[1].spaced):
        return []  # as in `x - 3`
    if word in _BEFORE:  # `.5`, `$x$+3` and `}-3` are the rests of something
        return part if spaced or not ((sign and word == "$") or word in (".", ",")) else []
    begins = spaced and word.isalpha() and word.lower() not in _NOT_AROUND
    return part if begins and (not sign or len(word) > 2) else []  # `get -3+4=1`, not `a -3+4=1`


def _without_rest(part: list[_Token], after: _Token) -> list[_Token]:
    """The last side without bold and brackets; [] where more of it follows."""
    word, spaced = after.text, after.spaced
    if [t.text for t in part[-2:]] == ["*", "*"]:
        part, word = part[:-2], _LINE_END
    if part and part[-1].kind == "open" and part[-1].spaced:
        part, spaced = part[:-1], True  # a remark
    while part and part[-1].kind == "close" and _balance(part) < 0:
        part, word = part[:-1], _LINE_END
    if word.isalpha():  # a unit or a sentence that goes on, but no variable
        return part if spaced and len(word) > 1 and word.lower() not in _NOT_AROUND else []
    return part if word in _AFTER else []


def _balance(part: Sequence[_Token]) -> int:
    return sum((t.kind == "open") - (t.kind == "close") for t in part)


# ------------------------------------------------------------------------------------- their values


def _read(part: list[_Token]) -> _Side | None:
    """The value of an expression by precedence, iteratively; None where it is none."""
    if not part or any(len(t.text) > _MAX_DIGITS for t in part):
        return None
    values: list[Fraction] = []
    pending: list[str] = []  # operators and open parentheses
    operand, num_operations, texts = True, 0, []  # operand: one is expected next
    for token in part:
        text = _OPS.get(token.text, token.text)
        texts.append(text.replace(",", "").lstrip("\\$") if token.kind == "number" else text)
        if token.kind in ("number", "fraction") and operand:
            values.append(_value(token))
            num_operations += token.kind == "fraction"
            operand = False
        elif token.kind == "open" and operand:
            pending.append("(")
        elif token.kind == "op" and operand and text == "-":
            pending.append("negative")
        elif token.kind == "op" and not operand:
            _reduce(values, pending, _RANK[text])
            pending.append(text)
            num_operations += 1
            operand = True
        elif token.kind == "close" and not operand:
            _reduce(values, pending, 1)
            if not pending:
                return None
            pending.pop()
        else:
            return None
        if None in values[-1:]:
            return None
    if operand:
        return None
    _reduce(values, pending, 1)
    if pending or values[-1] is None:
        return None
    return _Side("".join(texts).replace(" ", ""), values[-1], num_operations)


def _reduce(values: list[Fraction | None], pending: list[str], rank: int) -> None:
    """Applies the pending operators that bind at least so strongly; None: divided by zero."""
    while pending and _RANK[pending[-1]] >= rank:
        op = pending.pop()
        right = values.pop()
        left = Fraction(0) if op == "negative" else values.pop()
        if left is None or right is None or (op == "/" and right == 0):
            values.append(None)
        elif op in ("-", "negative"):
            values.append(left - right)
        else:
            values.append(
                left + right if op == "+" else left * right if op == "*" else left / right
            )


def _value(token: _Token) -> Fraction | None:
    digits = [int(d) for d in re.findall(r"\d+", token.text.replace(",", ""))]
    if token.kind == "number":
        return Fraction(digits[0])
    return Fraction(*digits) if digits[1] else None

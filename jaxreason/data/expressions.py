"""Trees of integer arithmetic: how they are written, and an evaluator that reads only the text."""

import dataclasses
import re

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


@dataclasses.dataclass(frozen=True, slots=True)
class Expression:
    """A tree of operations; a leaf has no operator and no children."""

    value: int
    op: str = ""  # one of + - * /, or empty for a leaf
    left: "Expression | None" = None
    right: "Expression | None" = None

    def __str__(self) -> str:
        return show(self)


def show(tree: Expression) -> str:
    """The expression with as few parentheses as its meaning needs, e.g. `(3+4)*12-7`.

    Negative leaves, which a partly evaluated tree has, stand in parentheses except in front.
    """
    return _show(tree, 0, first=True)


def _show(tree: Expression, outer: int, first: bool) -> str:
    """`outer`: the precedence below which the text is parenthesised; `first`: nothing before it."""
    if not tree.op:
        return str(tree.value) if tree.value >= 0 or first else f"({tree.value})"
    inner = _PRECEDENCE[tree.op]
    inside = inner < outer
    left = _show(tree.left, inner, first or inside)
    text = left + tree.op + _show(tree.right, inner + 1, first=False)
    return f"({text})" if inside else text


_MAX_PARENTHESES = 100  # the reader recurses into them
_TOKEN = re.compile(r"\d+|[-+*/()]")


def evaluate(text: str) -> int:
    """The value of a printed expression, computed from its text alone, exactly.

    Grammar: sums of products of numbers and parentheses; a minus may open a sum (`(-4)`).

    Raises:
      ValueError: the text is not such an expression, or a division is not exact.
    """
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text or not text.isascii() or text.count("(") > _MAX_PARENTHESES:
        raise ValueError(f"{text!r} is not an arithmetic expression")
    value, end = _read_sum(text, tokens, 0)
    if end != len(tokens):
        raise ValueError(f"{text!r} does not end where its expression ends")
    return value


def _read_sum(text: str, tokens: list[str], at: int) -> tuple[int, int]:
    negative = tokens[at : at + 1] == ["-"]
    value, at = _read_product(text, tokens, at + negative)
    value = -value if negative else value
    while at < len(tokens) and tokens[at] in "+-":
        sign = 1 if tokens[at] == "+" else -1
        term, at = _read_product(text, tokens, at + 1)
        value += sign * term
    return value, at


def _read_product(text: str, tokens: list[str], at: int) -> tuple[int, int]:
    value, at = _read_operand(text, tokens, at)
    while at < len(tokens) and tokens[at] in "*/":
        op = tokens[at]
        factor, at = _read_operand(text, tokens, at + 1)
        if op == "*":
            value *= factor
        elif factor == 0 or value % factor:
            raise ValueError(f"{text!r} divides {value} by {factor}, which is not exact")
        else:
            value //= factor
    return value, at


def _read_operand(text: str, tokens: list[str], at: int) -> tuple[int, int]:
    token = tokens[at] if at < len(tokens) else "its end"
    if token.isdigit():
        return int(token), at + 1
    if token != "(":
        raise ValueError(f"{text!r} has {token!r} where an operand should be")
    value, at = _read_sum(text, tokens, at + 1)
    if tokens[at : at + 1] != [")"]:
        raise ValueError(f"{text!r} has an unclosed parenthesis")
    return value, at + 1

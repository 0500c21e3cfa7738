"""Grading of final answers that are numbers: text in, numbers out, exact, and never evaluated.

An answer is read from the text after the reasoning; which part that is says the caller's `split`
(text/chat.py's `split_reasoning`), because only that shelf knows the think tags.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from jaxreason import types

Split = Callable[[str], tuple[str | None, str]]  # completion text -> (reasoning, answer text)

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_MAGNITUDE = rf"\$?(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
# A minus right after an operand or a closing bracket is a subtraction: "84-7" ends in 7.
_NUMBER = re.compile(rf"(?:(?<![\w)\].])[-−])?{_MAGNITUDE}(?:/{_DIGITS})?")
_VALUE = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:/([0-9]+))?")
_MAX_DIGITS = 1_000  # longer ones are compared as text: a sampler can print digits without end
_HASHES = "#### "
_BOXED = "\\boxed{"


def extract_answer(text: str) -> str | None:
    """The final answer of a text in canonical form, None where there is none.

    The last `\\boxed{...}` whose braces balance; else the number, or all, that follows the last
    `#### ` on its line; else the last number.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return canonical(boxed) or None
    _, hashes, rest = text.rpartition(_HASHES)
    if hashes:
        line = rest.split("\n", 1)[0]
        number = _NUMBER.search(line)
        return canonical(number[0] if number else line) or None
    numbers = _NUMBER.findall(text)
    return canonical(numbers[-1]) if numbers else None


def _last_boxed(text: str) -> str | None:
    """What the last balanced `\\boxed{}` holds; a box cut off by the token limit does not count."""
    opened, last = [], None
    for brace in re.finditer(r"[{}]", text):  # one pass: a loop of a model can open many boxes
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened:
            begin = opened.pop()
            if text.endswith(_BOXED, 0, begin) and (last is None or begin > last[0]):
                last = begin, brace.start()
    return text[slice(*last)] if last else None


def canonical(answer: str) -> str:
    """One spelling for equal numbers: `$1,200.50.` -> `2401/2`, `72.0` -> `72`; others stripped."""
    text = answer.strip().replace("\\$", "").replace("$", "").replace("\\%", "").replace("%", "")
    text = text.replace("\\!", "").replace("−", "-").strip().removesuffix(".")
    bare = re.sub(rf"{_DIGITS}", lambda match: match[0].replace(",", ""), text).replace(" ", "")
    value = _value(bare)
    return text if value is None else str(value)


def _value(text: str) -> Fraction | None:
    """An integer, a decimal or a fraction of integers as an exact number, else None."""
    match = _VALUE.fullmatch(text)
    if match is None or len(text) > _MAX_DIGITS:
        return None
    numerator, denominator = Fraction(match[1]), int(match[2] or 1)
    return numerator / denominator if denominator else None


def answers_equal(a: str, b: str) -> bool:
    """Whether two answers are the same number, or the same text where they are no numbers."""
    return canonical(a) == canonical(b)


class Grade(NamedTuple):
    """What one completion said, in canonical form (None: nothing), and whether that is right."""

    extracted: str | None
    correct: bool


def grade(text: str, answer: str, split: Split) -> Grade:
    """Grades one completion by the answer after its reasoning; unclosed reasoning has none."""
    extracted = extract_answer(split(text)[1])
    return Grade(extracted, extracted is not None and answers_equal(extracted, answer))


def accuracy_reward(
    completions: Sequence[types.Completion], answers: Sequence[str], split: Split
) -> tuple[list[float], dict[str, list[float]]]:
    """1 for a right final answer and 0 otherwise, one for each completion and its answer.

    The breakdown has `accuracy` and `answered` (an answer could be read), in the same order.
    """
    grades = [grade(c.text, answer, split) for c, answer in zip(completions, answers, strict=True)]
    rewards = [float(g.correct) for g in grades]
    answered = [float(g.extracted is not None) for g in grades]
    return rewards, {"accuracy": rewards, "answered": answered}

"""Grading of final answers that are numbers: text in, numbers out, exact, and never evaluated.

An answer is read from the text after the reasoning; which part that is says the caller's `split`
(text/chat.py's `split_reasoning`), because only that shelf knows the think tags.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxreason import types
from jaxreason.rewards import numerals

Split = Callable[[str], tuple[str | None, str]]  # completion text -> (reasoning, answer text)

HASHES = "#### "
_BOXED = "\\boxed{"


def extract_answer(text: str) -> str | None:
    """The final answer of a text in canonical form, None where there is none."""
    answer = written_answer(text)
    return None if answer is None else canonical(answer)


def written_answer(text: str) -> str | None:
    """The final answer as it was written, None where there is none.

    The last `\\boxed{...}` whose braces balance; else the number, or all, that follows the last
    `#### ` on its line; else the last number.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed if canonical(boxed) else None
    _, hashes, rest = text.rpartition(HASHES)
    if not hashes:
        return next(reversed(list(numerals.find(text))), None)
    line = rest.split("\n", 1)[0]
    answer = line if numerals.read(line) else next(numerals.find(line), line)
    return answer if canonical(answer) else None


def last_boxed(text: str) -> str | None:
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
    number = numerals.read(answer)
    return numerals.plain(answer) if number is None else str(number.value)


def answers_equal(a: str, b: str) -> bool:
    """Whether two answers are the same number, or the same text where they are no numbers.

    A percent sign is a unit like any other (50 % is 50), and where only one of the two has it also
    a hundredth (50 % is 1/2).
    """
    x, y = numerals.read(a), numerals.read(b)
    if x is None or y is None:
        return x is y is None and numerals.plain(a) == numerals.plain(b)
    if x.value == y.value:
        return True
    return (
        x.percent != y.percent
        and (x.value * 100, y.value * 100)[x.percent] == ((y.value, x.value)[x.percent])
    )


class Grade(NamedTuple):
    """What one completion said, in canonical form (None: nothing), and whether that is right."""

    extracted: str | None
    correct: bool


def grade(text: str, answer: str, split: Split) -> Grade:
    """Grades one completion by the answer after its reasoning; unclosed reasoning has none."""
    written = written_answer(split(text)[1])
    if written is None:
        return Grade(None, False)
    return Grade(canonical(written), answers_equal(written, answer))


@dataclasses.dataclass(frozen=True)
class Exact:
    """1 for the right number and 0 otherwise; equal are exact rationals, whatever their spelling.

    Units, currencies and percent signs are ignored: rewards/numerals.py says what a number is.
    """

    split: Split

    def __call__(
        self, completions: Sequence[types.Completion], answers: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The breakdown has `answered`: 1 where an answer could be read."""
        pairs = zip(completions, answers, strict=True)
        grades = [grade(completion.text, answer, self.split) for completion, answer in pairs]
        answered = [float(g.extracted is not None) for g in grades]
        return [float(g.correct) for g in grades], {"answered": answered}

    def complaints(self, answers: Sequence[str]) -> list[str | None]:
        """For each gold answer what is wrong with it, None where it is a number."""
        numbers = (numerals.read(answer) for answer in answers)
        return [
            None if number else f"is {answer!r}; it must be a number such as 72, 1/2 or 0.5"
            for number, answer in zip(numbers, answers, strict=True)
        ]

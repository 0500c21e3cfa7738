"""Reward of multiple choice: one letter, read from where answers are given."""

import dataclasses
import re
from collections.abc import Sequence

from jaxreason import types
from jaxreason.rewards.format import last_tagged
from jaxreason.rewards.math import Split, last_boxed


@dataclasses.dataclass(frozen=True)
class Choice:
    """1 for the right letter and 0 otherwise. `letters` are the choices, upper case.

    The letter is read from the last \\boxed{}, else the last <answer>, else the last `#### ` line;
    where there is none of them from the last "answer is B" or "Answer: (B)", else from a text that
    is nothing but the letter, else from the last letter in round brackets. "A or B" is no answer.
    """

    split: Split
    letters: str = "ABCDE"

    def __post_init__(self):
        if not re.fullmatch(r"[A-Z]{2,26}", self.letters):
            raise ValueError(f"letters is {self.letters!r}; it must be capital letters, as ABCDE")

    def __call__(
        self, completions: Sequence[types.Completion], answers: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The breakdown has `answered`: 1 where a letter could be read."""
        read = [self.extract(self.split(c.text)[1]) for c in completions]
        golds = [self._letter(answer) for answer in answers]
        values = [float(a is not None and a == b) for a, b in zip(read, golds, strict=True)]
        return values, {"answered": [float(letter is not None) for letter in read]}

    def complaints(self, answers: Sequence[str]) -> list[str | None]:
        """For each gold answer what is wrong with it, None where it is one of the letters."""
        return [
            None if self._letter(answer) else f"is {answer!r}; it must be one of {self.letters}"
            for answer in answers
        ]

    def extract(self, text: str) -> str | None:
        """The letter that a text chooses, None where it chooses none."""
        _, hashes, line = text.rpartition("#### ")
        hashed = line.split("\n", 1)[0] if hashes else None
        for place in (last_boxed(text), last_tagged(text), hashed):
            if place is not None:
                return self._letter(place)
        letter = rf"\**\(?([{self.letters}])(?![\w'])\)?"
        stated = re.findall(
            rf"(?i:answer)(?:\W+(?i:is|option|choice))*\W*\s{letter}(\W+(?:or|and)\W+{letter})?",
            text,
        )
        if stated:
            first, second, _ = stated[-1]
            return None if second else first
        bracketed = re.findall(rf"\(([{self.letters}])\)", text)
        return self._letter(text) or (bracketed[-1] if bracketed else None)

    def _letter(self, text: str) -> str | None:
        """The letter of `B`, `(B)`, `b.`, `\\text{B}`, `**B**`, `B) because`; None of all else."""
        text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", r"\1", text)
        text = text.strip().strip("*$ ")
        letter = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?|\(?([A-Z])(?:\)|[.:](?=\s))[^\n]*", text)
        found = letter and (letter[1] or letter[2]).upper()
        return found if found and found in self.letters else None

"""Reward of the form alone: one think block where it belongs, and an answer after it."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from jaxreason import types
from jaxreason.rewards.math import Split, last_boxed
from jaxreason.text import chat

_OPEN, _CLOSE = "<answer>", "</answer>"


def last_tagged(text: str) -> str | None:
    """What the last <answer></answer> holds, None where there is none."""
    before, close, _ = text.rpartition(_CLOSE)
    _, opened, inside = before.rpartition(_OPEN)
    return inside if close and opened else None


def _tagged_once(text: str) -> bool:
    return text.count(_OPEN) == text.count(_CLOSE) == 1 and bool((last_tagged(text) or "").strip())


_PRESENT: dict[str, Callable[[str], bool]] = {
    "any": lambda text: bool(text.strip()),
    "boxed": lambda text: bool((last_boxed(text) or "").strip()),
    "tags": _tagged_once,
    "hashes": lambda text: re.search(r"^#### *\S", text, re.MULTILINE) is not None,
}


@dataclasses.dataclass(frozen=True)
class Format:
    """In [0, 1]: half for a well-formed think block, half for an answer after it.

    Well formed is: the closing tag exactly once, after some reasoning, and the opening tag at most
    once and first of all (none where the prompt ended with it). With `thinking` false: no tag at
    all. `answer` says what counts as one, after the reasoning: `any` text; a non-empty `boxed`;
    exactly one <answer></answer> pair (`tags`); a `#### ` line (`hashes`).
    """

    split: Split
    tags: chat.ThinkTags = chat.DEFAULT_TAGS
    answer: str = "any"
    thinking: bool = True

    def __post_init__(self):
        if self.answer not in _PRESENT:
            raise ValueError(f"answer is {self.answer!r}; it must be one of {', '.join(_PRESENT)}")

    def __call__(
        self, completions: Sequence[types.Completion], answers: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The breakdown has `thinking` and `answer`, 0 or 1 each."""
        thinking = [float(self._thinks(c.text)) for c in completions]
        answer = [float(_PRESENT[self.answer](self.split(c.text)[1])) for c in completions]
        values = [(a + b) / 2 for a, b in zip(thinking, answer, strict=True)]
        return values, {"thinking": thinking, "answer": answer}

    def _thinks(self, text: str) -> bool:
        opened, closed = text.count(self.tags.open), text.count(self.tags.close)
        if not self.thinking:
            return opened == closed == 0
        reasoning = text.strip().removeprefix(self.tags.open).partition(self.tags.close)[0]
        return (
            closed == 1
            and self.tags.open not in reasoning
            and opened <= 1
            and bool(reasoning.strip())
        )

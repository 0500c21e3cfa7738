"""Rewards of a completion's own tokens: how long it is and how often it repeats itself.

Every length is a number of sampled tokens; a character is never counted. None of these reads the
gold answer, except to tell right from wrong where `applies_to` asks for it.
"""

import dataclasses
import math
from collections.abc import Sequence

from jaxreason import types
from jaxreason.rewards import math as numbers

_SHAPES = ("overlong", "cosine", "linear")
_APPLIES_TO = ("all", "right", "wrong")


@dataclasses.dataclass(frozen=True)
class Length:
    """A value that falls, or rises, with the number of tokens. Units: tokens.

    `overlong` (DAPO, arXiv 2503.14476, soft overlong punishment): 0 up to max_tokens -
    buffer_tokens, then a straight line down to -1 at max_tokens, -1 beyond.
    `cosine` (arXiv 2502.03373) and `linear`: from `shortest` at 0 tokens to `longest` at
    max_tokens and beyond, along half a cosine or a straight line. The paper's reward is two of
    these: applies_to "right" with 1 -> 0.5 and "wrong" with -1 -> -0.5.
    Where `applies_to` does not hold (by `rewards.math`) the value is 0.
    """

    split: numbers.Split
    max_tokens: int
    shape: str = "overlong"
    buffer_tokens: int = 0
    shortest: float = 1.0
    longest: float = 0.0
    applies_to: str = "all"

    def __post_init__(self):
        if self.shape not in _SHAPES:
            raise ValueError(f"shape is {self.shape!r}; it must be one of {', '.join(_SHAPES)}")
        if self.applies_to not in _APPLIES_TO:
            raise ValueError(
                f"applies_to is {self.applies_to!r}; it must be one of {', '.join(_APPLIES_TO)}"
            )
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.buffer_tokens <= self.max_tokens:
            raise ValueError(
                f"buffer_tokens is {self.buffer_tokens}; it must be 0 to max_tokens "
                f"{self.max_tokens}"
            )

    def __call__(
        self, completions: Sequence[types.Completion], answers: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        pairs = list(zip(completions, answers, strict=True))
        return [self.value(c.num_tokens) if self._applies(c, a) else 0.0 for c, a in pairs], {}

    def value(self, num_tokens: int) -> float:
        """The value of a completion of so many tokens, whatever it says."""
        if self.shape == "overlong":
            over = num_tokens - (self.max_tokens - self.buffer_tokens)
            if over <= 0:
                return 0.0
            return max(-1.0, -over / self.buffer_tokens) if self.buffer_tokens else -1.0
        progress = min(num_tokens / self.max_tokens, 1.0)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.shortest + (self.longest - self.shortest) * progress

    def _applies(self, completion: types.Completion, answer: str) -> bool:
        if self.applies_to == "all":
            return True
        right = numbers.grade(completion.text, answer, self.split).correct
        return right == (self.applies_to == "right")


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Minus the share of n-grams of tokens that were there before: 0 (none) to almost -1.

    As in arXiv 2502.03373 (n = 40), on token ids. A completion shorter than n has value 0.
    """

    ngram: int = 40

    def __post_init__(self):
        if self.ngram < 1:
            raise ValueError(f"ngram is {self.ngram}; it must be at least 1 token")

    def __call__(
        self, completions: Sequence[types.Completion], answers: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        return [self.value(c.ids) for c in completions], {}

    def value(self, ids: Sequence[int]) -> float:
        count = len(ids) - self.ngram + 1
        if count < 1:
            return 0.0
        distinct = {tuple(ids[i : i + self.ngram]) for i in range(count)}
        return len(distinct) / count - 1.0

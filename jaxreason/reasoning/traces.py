"""A sampled trace with what is known of it: what reflect.py reads and curate.py chooses from."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """One chain of thought of one question.

    Raises:
      ValueError: a length below 0.
    """

    question: str  # its id or its text: what the samples of one question have in common
    text: str
    num_tokens: int
    correct: bool | None = None  # None: not graded
    truncated: bool | None = None  # whether the token limit cut it off; None: not known
    domain: str = ""
    num_operations: int | None = None  # of an arithmetic expression

    def __post_init__(self):
        if self.num_tokens < 0:
            raise ValueError(f"trace.num_tokens is {self.num_tokens}; it must be 0 or more")

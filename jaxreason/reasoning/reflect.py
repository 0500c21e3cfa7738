"""What a trace does: reflection, computations and their mistakes, repetition; and a set of traces.

Reflection is counted under two pools of words, because the paper's has no "wait" (methods of Luo et
al., EMNLP 2025, after Liu et al. 2025, arXiv 2503.20783): see `PAPER` and `WIDE`. The judgement of
a language model, which the papers combine with the words, is not part of it.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence

from jaxreason.reasoning.equations import find_equations
from jaxreason.reasoning.segment import LINES, Segmentation, segment
from jaxreason.reasoning.traces import Trace

# As understand-r1-zero's keyword_count.py has them. It looks for them inside of longer words too,
# here they are whole words: of the 560 answers in AMC23 that changes 1 ("double-checked").
PAPER = (
    "recheck", "rethink", "reassess", "reevaluate", "re-evaluate", "reevaluation", "re-examine",
    "reexamine", "reconsider", "reanalyze", "double-check", "check again", "think again",
    "verify again", "go over the steps",
)  # fmt: skip
# What small models say instead, and what the arithmetic traces of data/arithmetic.py say.
WIDE = (
    *PAPER, "wait", "hmm", "alternatively", "hold on", "actually", "on second thought", "check",
    "double check", "rechecking", "double-checking", "reconsidering", "let me verify",
    "let me think", "let's verify", "to verify", "to confirm", "another way", "another approach",
    "try again", "start over", "going back", "go back", "made a mistake", "made an error",
    "that's not right", "that doesn't seem right", "is that right",
)  # fmt: skip
POOLS = {"paper": PAPER, "wide": WIDE}


# ------------------------------------------------------------------------------------- reflection


def count_words(text: str, pool: Sequence[str]) -> dict[str, int]:
    """{word: occurrences} of those that occur, whole words in any case.

    Where words overlap, as `check again` and `check`, the longest counts and the others do not.
    """
    found = collections.Counter(
        re.sub(r"\s+", " ", match[0].lower().replace("’", "'"))
        for match in _pool_pattern(tuple(pool)).finditer(text)
    )
    return dict(found)


@functools.cache
def _pool_pattern(pool: tuple[str, ...]) -> re.Pattern:
    longest_first = sorted(pool, key=lambda word: (-len(word), word))
    words = (re.escape(word).replace(r"\ ", r"\s+").replace("'", "['’]") for word in longest_first)
    return re.compile(rf"(?<![\w-])(?:{'|'.join(words)})(?![\w-])", re.IGNORECASE)


def count_reflections(text: str) -> dict[str, int]:
    """{pool: occurrences of its words} for `POOLS`."""
    return {name: sum(count_words(text, pool).values()) for name, pool in POOLS.items()}


# ----------------------------------------------------------------------------------- computations


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The equations of a trace (see equations.py). Steps count from 0.

    A wrong one is corrected when an equation after it has the same left side and is right.
    """

    num_computations: int = 0
    num_wrong: int = 0
    num_corrected: int = 0  # of the wrong ones
    first_wrong: int | None = None  # the first step with a wrong equation
    first_uncorrected: int | None = None  # the first step whose mistake stands


def read_arithmetic(steps: Sequence[str]) -> Arithmetic:
    """Of the steps of one trace."""
    found = [(i, equation) for i, step in enumerate(steps) for equation in find_equations(step)]
    wrong: list[tuple[int, bool]] = []  # (step, whether corrected), last first
    right_later: set[str] = set()
    for step, equation in reversed(found):
        if equation.correct:
            right_later.add(equation.left)
        else:
            wrong.append((step, equation.left in right_later))
    return Arithmetic(
        num_computations=len(found),
        num_wrong=len(wrong),
        num_corrected=sum(corrected for _, corrected in wrong),
        first_wrong=min((step for step, _ in wrong), default=None),
        first_uncorrected=min((step for step, corrected in wrong if not corrected), default=None),
    )


# ------------------------------------------------------------------------------------- repetition


def repeated_share(tokens: Sequence[Hashable], n: int) -> float:
    """The share of n-grams that were there before: 0 (none) to almost 1; 0 for fewer than n tokens.

    The reward of rewards/shaping.py is minus this number of a completion's ids.
    """
    count = len(tokens) - n + 1
    if count < 1:
        return 0.0
    return 1.0 - len({tuple(tokens[i : i + n]) for i in range(count)}) / count


@dataclasses.dataclass(frozen=True)
class Loop:
    """A block that a text repeats up to its end."""

    begin: int  # character at which the first of the blocks begins
    period: int  # characters of the block
    repeats: float  # periods from `begin` to the end; the last may be cut off


def find_loop(text: str, min_repeats: int = 3, min_chars: int = 100) -> Loop | None:
    """The tail loop with the shortest block, None where the end of the text does not repeat.

    Args:
      min_repeats: blocks that there must be, the first one counted.
      min_chars: characters that they have together, so that `...` or `1000000` is no loop.

    Time is linear in the length: the Z function of the reversed text tells for each period how far
    back from the end the text has it. White space at the end does not hide a loop.

    Raises:
      ValueError: min_repeats below 2.
    """
    if min_repeats < 2:
        raise ValueError(f"loop.min_repeats is {min_repeats}; it must be at least 2")
    text = text.rstrip()
    matches = _z_function(text[::-1])
    for period in range(1, len(text) // min_repeats + 1):
        length = period + matches[period]
        if length >= min_repeats * period and length >= min_chars:
            return Loop(len(text) - length, period, length / period)
    return None


def _z_function(text: str) -> list[int]:
    """For each i > 0 how many characters from i on are those from 0 on; z[0] is 0."""
    n = len(text)
    z = [0] * n
    left = right = 0  # the match that reaches furthest: text[left:right] == text[: right - left]
    for i in range(1, n):
        length = min(right - i, z[i - left]) if i < right else 0
        while i + length < n and text[i + length] == text[length]:
            length += 1
        z[i] = length
        if i + length > right:
            left, right = i, i + length
    return z


# -------------------------------------------------------------------------------------- one trace


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one trace does."""

    num_steps: int
    reflections: dict[str, int]  # pool -> occurrences in the whole trace
    step_reflections: dict[str, tuple[int, ...]]  # pool -> occurrences in each step
    arithmetic: Arithmetic
    repeated: float  # share of repeated n-grams of words
    loop: Loop | None


def read_trace(text: str, segmentation: Segmentation = LINES, ngram: int = 20) -> Reading:
    """Reads one trace, by steps of this segmentation.

    Args:
      ngram: words of an n-gram whose repetition counts.
    """
    steps = segment(text, segmentation)
    by_step = [count_reflections(step) for step in steps]
    return Reading(
        num_steps=len(steps),
        reflections=count_reflections(text),
        step_reflections={pool: tuple(counts[pool] for counts in by_step) for pool in POOLS},
        arithmetic=read_arithmetic(steps),
        repeated=repeated_share(text.split(), ngram),
        loop=find_loop(text),
    )


# ------------------------------------------------------------------------------------ many traces


@dataclasses.dataclass(frozen=True)
class Group:
    """Traces of equally many operations: how mistakes accumulate."""

    num_traces: int
    accuracy: float | None
    mean_tokens: float
    mean_computations: float
    first_wrong: dict[int, int]  # step -> traces whose first wrong equation is there
    first_uncorrected: dict[int, int]  # step -> traces whose first standing mistake is there
    no_mistake: int  # traces in which no mistake stands


@dataclasses.dataclass(frozen=True)
class Summary:
    """A set of traces. Means are over traces; None where there is nothing to average."""

    num_traces: int
    num_questions: int
    num_graded: int
    avg_at: int | None  # the k of `accuracy`: the first k graded samples of each question
    accuracy: float | None  # avg@k
    mean_tokens: float
    mean_tokens_correct: float | None
    mean_tokens_wrong: float | None
    token_efficiency: float | None  # accuracy over mean tokens
    truncated: float | None  # share of those of which it is known
    mean_steps: float
    reflection_ratio: dict[str, float]  # pool -> share of traces with at least one of its words
    reflections: dict[str, float]  # pool -> words a trace
    reflective_steps: dict[str, float | None]  # pool -> share of the steps with a word
    accuracy_reflective: dict[str, float | None]  # pool -> of the traces with a word
    accuracy_plain: dict[str, float | None]  # pool -> of the others
    tokens_reflective: dict[str, float | None]  # pool -> mean length of the traces with a word
    tokens_plain: dict[str, float | None]
    mean_computations: float
    wrong_computations: float | None  # share of the computations
    with_mistake: float  # share of traces with a wrong computation
    corrected: float | None  # share of the wrong computations
    repeated: float  # mean share of repeated n-grams
    loops: float  # share of traces that end in a loop
    by_operations: dict[int, Group]  # number of operations -> its traces; {} where unknown


def summarize(
    traces: Sequence[Trace], read: Callable[[str], Reading] = read_trace
) -> tuple[Summary, list[Reading]]:
    """Reads every trace and sums up: (summary, the reading of each).

    Raises:
      ValueError: no traces.
    """
    if not traces:
        raise ValueError("there are no traces to read")
    readings = [read(trace.text) for trace in traces]
    pairs = list(zip(traces, readings))
    graded = [trace for trace in traces if trace.correct is not None]
    k, accuracy = _avg_at_k(graded)
    tokens = _mean([trace.num_tokens for trace in traces])
    arithmetic = [reading.arithmetic for reading in readings]
    computations = sum(a.num_computations for a in arithmetic)
    wrong = sum(a.num_wrong for a in arithmetic)
    summary = Summary(
        num_traces=len(traces),
        num_questions=len({trace.question for trace in traces}),
        num_graded=len(graded),
        avg_at=k,
        accuracy=accuracy,
        mean_tokens=tokens,
        mean_tokens_correct=_mean([trace.num_tokens for trace in graded if trace.correct]),
        mean_tokens_wrong=_mean([trace.num_tokens for trace in graded if not trace.correct]),
        token_efficiency=None if accuracy is None else accuracy / max(tokens, 1.0),
        truncated=_mean([t.truncated for t in traces if t.truncated is not None]),
        mean_steps=_mean([reading.num_steps for reading in readings]),
        **_reflection(pairs),
        mean_computations=computations / len(traces),
        wrong_computations=wrong / computations if computations else None,
        with_mistake=_mean([a.num_wrong > 0 for a in arithmetic]),
        corrected=sum(a.num_corrected for a in arithmetic) / wrong if wrong else None,
        repeated=_mean([reading.repeated for reading in readings]),
        loops=_mean([reading.loop is not None for reading in readings]),
        by_operations=_by_operations(pairs),
    )
    return summary, readings


def _avg_at_k(graded: Sequence[Trace]) -> tuple[int | None, float | None]:
    """(k, avg@k): k is the fewest graded samples that a question has; the first k of each count."""
    by_question: dict[str, list[bool]] = collections.defaultdict(list)
    for trace in graded:
        by_question[trace.question].append(trace.correct)
    if not by_question:
        return None, None
    k = min(map(len, by_question.values()))
    return k, _mean([right for samples in by_question.values() for right in samples[:k]])


def _reflection(pairs: Sequence[tuple[Trace, Reading]]) -> dict[str, Mapping[str, float | None]]:
    """The fields of a Summary that hold something of each pool."""
    found: dict[str, dict[str, float | None]] = collections.defaultdict(dict)
    for pool in POOLS:
        with_word = [trace for trace, reading in pairs if reading.reflections[pool]]
        without = [trace for trace, reading in pairs if not reading.reflections[pool]]
        steps = [n > 0 for _, reading in pairs for n in reading.step_reflections[pool]]
        found["reflection_ratio"][pool] = len(with_word) / len(pairs)
        found["reflections"][pool] = _mean([r.reflections[pool] for _, r in pairs])
        found["reflective_steps"][pool] = _mean(steps)
        for name, part in (("reflective", with_word), ("plain", without)):
            right = [trace.correct for trace in part if trace.correct is not None]
            found[f"accuracy_{name}"][pool] = _mean(right)
            found[f"tokens_{name}"][pool] = _mean([trace.num_tokens for trace in part])
    return dict(found)


def _by_operations(pairs: Sequence[tuple[Trace, Reading]]) -> dict[int, Group]:
    groups: dict[int, list[tuple[Trace, Arithmetic]]] = collections.defaultdict(list)
    for trace, reading in pairs:
        if trace.num_operations is not None:
            groups[trace.num_operations].append((trace, reading.arithmetic))
    histogram = lambda steps: dict(
        sorted(collections.Counter(step for step in steps if step is not None).items())
    )
    return {
        n: Group(
            num_traces=len(group),
            accuracy=_mean([trace.correct for trace, _ in group if trace.correct is not None]),
            mean_tokens=_mean([trace.num_tokens for trace, _ in group]),
            mean_computations=_mean([a.num_computations for _, a in group]),
            first_wrong=histogram(a.first_wrong for _, a in group),
            first_uncorrected=histogram(a.first_uncorrected for _, a in group),
            no_mistake=sum(a.first_uncorrected is None for _, a in group),
        )
        for n, group in sorted(groups.items())
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

"""Pruning of long chains of thought to the shortest prefix that the student still answers from.

Efficient Long CoT (Wang et al. 2025, arXiv 2505.18440). V(k) asks the student itself for the answer
from the question and the first k steps alone. `binary` assumes that once there is enough in the
prefix, more does not hurt (monotone validity): it halves the prefix while the student still answers
right and backtracks upward where it does not. `guided`, ours, does the same and asks a guess first,
the prefix that ends with the first correct solution: a student that is led astray by what follows
it (a half-done review) is not asked there, and binary search, once told no, looks only above.
`exhaustive` asks every prefix: it knows the smallest valid one and whether validity is monotone.

All traces are in flight at once, so that one round is one large batch for the student. Beside it
the baselines: the first correct solution and a random cut (the third, the shortest correct sample
of several, is a choice: curate.keep).
"""

import collections
import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

Question = tuple[int, int]  # (number of the trace, how many of its steps the student sees)
IsValid = Callable[[list[Question]], Sequence[bool]]  # one answer a question, in order

METHODS = ("binary", "guided", "exhaustive")
NO_STEPS = "no steps"
FULL_NOT_VALID = "full trace not valid"
NO_SOLUTION = "no step has the answer"


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What became of one trace: `steps[:kept]`, or why it was dropped (exactly one of the two)."""

    num_steps: int
    kept: int | None
    dropped: str | None = None
    asked: tuple[tuple[int, bool], ...] = ()  # (steps kept, whether valid), in the order asked

    @property
    def monotone(self) -> bool | None:
        """Whether no valid prefix has an invalid longer one; None where not all were asked.

        What a binary search asked is monotone whatever the trace is.
        """
        valid = [answer for _, answer in sorted(self.asked)]
        return valid == sorted(valid) if len(valid) == self.num_steps else None


class Search:
    """The questions of all traces and their answers.

    Args:
      num_steps: how many steps each trace has.
      method: `binary` asks V(n), then one halving a round, at most ceil(log2 n) + 1 questions a
        trace; `guided` asks V(n), the guess, and then as `binary`, at most one question more;
        `exhaustive` asks all n prefixes, in one round.
      guesses: of each trace how many of its steps may be enough, None where nothing is known; of
        `guided` alone.

    Raises:
      ValueError: an unknown method, or guesses that it does not read.
    """

    def __init__(
        self,
        num_steps: Sequence[int],
        method: str = "binary",
        guesses: Sequence[int | None] | None = None,
    ):
        if method not in METHODS:
            raise ValueError(f"prune.method is {method!r}; it must be one of {', '.join(METHODS)}")
        if (guesses is not None) != (method == "guided"):
            raise ValueError(
                f"prune.method is {method!r}; guesses are for guided, which needs them"
            )
        self._guesses = guesses
        self.method = method
        self.num_steps = tuple(num_steps)
        self._asked: list[dict[int, bool]] = [{} for _ in self.num_steps]
        self._open = [self._first(n) for n in self.num_steps]  # of each trace

    def questions(self) -> list[Question]:
        """What is to be asked now: of `binary` one question of every trace that goes on."""
        return [(trace, kept) for trace, wanted in enumerate(self._open) for kept in wanted]

    def answer(self, trace: int, kept: int, valid: bool) -> None:
        """Takes one answer; answers of a round may come in any order, and partly.

        Raises ValueError for a question that is not open.
        """
        if not 0 <= trace < len(self._open) or kept not in self._open[trace]:
            raise ValueError(f"prune: ({trace}, {kept}) is no open question of this search")
        self._asked[trace][kept] = bool(valid)
        self._open[trace].remove(kept)
        if self.method != "exhaustive" and self._asked[trace][self.num_steps[trace]]:
            low, high = _bounds(self._asked[trace])
            guess = self._guesses[trace] if self._guesses and len(self._asked[trace]) == 1 else None
            wanted = (low + high) // 2 if guess is None or guess >= high else guess
            self._open[trace] = [wanted] if low < high else []

    def results(self) -> list[Pruned]:
        """Of every trace. Raises ValueError while questions are open."""
        if count := sum(map(bool, self._open)):
            raise ValueError(f"prune: {count} traces still have open questions")
        return [self._result(i) for i in range(len(self.num_steps))]

    def _first(self, n: int) -> list[int]:
        return list(range(n, 0, -1)) if self.method == "exhaustive" else [n] if n else []

    def _result(self, trace: int) -> Pruned:
        n, answers = self.num_steps[trace], self._asked[trace]
        asked = tuple(answers.items())
        if n == 0:
            return Pruned(n, None, NO_STEPS)
        if not answers[n]:
            return Pruned(n, None, FULL_NOT_VALID, asked)
        return Pruned(n, min(kept for kept, valid in asked if valid), None, asked)


def _bounds(asked: Mapping[int, bool]) -> tuple[int, int]:
    """Where the cut is looked for: above every invalid prefix, up to the shortest valid one.

    Every question lies between the bounds of its time, so with monotone validity or without, an
    answer moves exactly one of them and the upper one was itself answered valid.
    """
    low = 1 + max((kept for kept, valid in asked.items() if not valid), default=0)
    return low, min(kept for kept, valid in asked.items() if valid)


def prune(
    traces: Sequence[Sequence[str]],
    is_valid: IsValid,
    *,
    method: str = "binary",
    guesses: Sequence[int | None] | None = None,
) -> list[Pruned]:
    """Prunes all traces, each a list of steps, with one call of `is_valid` a round.

    Args:
      is_valid: whether the student answers right from the first `kept` steps of a trace; it gets
        the questions of a round, [(trace, kept)], and returns one answer each.
      guesses: as Search takes them.

    Raises:
      ValueError: is_valid returned another number of answers.
    """
    search = Search([len(steps) for steps in traces], method, guesses)
    while questions := search.questions():
        answers = list(is_valid(questions))
        if len(answers) != len(questions):
            raise ValueError(
                f"prune: is_valid returned {len(answers)} answers to {len(questions)} questions"
            )
        for (trace, kept), valid in zip(questions, answers):
            search.answer(trace, kept, valid)
    return search.results()


# ---------------------------------------------------------------------------------- baselines


def first_correct_solution(steps: Sequence[str], has_answer: Callable[[str], bool]) -> Pruned:
    """Cut after the first step that has the answer (FCS); dropped where none has it."""
    if not steps:
        return Pruned(0, None, NO_STEPS)
    kept = next((k for k, step in enumerate(steps, 1) if has_answer(step)), None)
    return Pruned(len(steps), kept, NO_SOLUTION if kept is None else None)


def random_cut(num_steps: int, seed: int, trace: int) -> Pruned:
    """1 to num_steps steps kept, equally often; a function of the seed and the trace's number."""
    if num_steps == 0:
        return Pruned(0, None, NO_STEPS)
    return Pruned(num_steps, random.Random(f"{seed} {trace}").randint(1, num_steps))


# ------------------------------------------------------------------------------------- report


@dataclasses.dataclass(frozen=True)
class Report:
    """What a pruning did. Shares are in [0, 1]; None where there is nothing to divide by."""

    num_traces: int
    num_kept: int
    dropped: dict[str, int]  # reason -> traces
    kept_steps: float | None  # share of the steps of the kept traces that are left
    steps_before: float | None  # mean of the kept traces, full
    steps_after: float | None  # the same traces, pruned
    kept_tokens: float | None  # share of their tokens
    tokens_before: float | None  # mean of the kept traces, full
    tokens_after: float | None  # the same traces, pruned
    halved: float | None  # share of the kept traces that lost more than half of their tokens
    questions: int  # asked of the student, all traces together
    max_questions: int  # of one trace
    # Of each tenth of a trace: (questions that kept that much of it, share answered valid). The
    # binary search asks where it expects the cut: only `exhaustive` gives all positions alike.
    by_position: tuple[tuple[int, float | None], ...]
    # Of `exhaustive` alone: a binary search asks nothing that could contradict it. The share of the
    # traces in which a longer prefix is worse; of the others, the share that the binary search,
    # given the same answers, cuts at the same step.
    non_monotone: float | None
    binary_agrees: float | None


def report(results: Sequence[Pruned], step_tokens: Sequence[Sequence[int]], method: str) -> Report:
    """Sums up a pruning or a baseline.

    Args:
      method: that the results are of.
      step_tokens: the number of tokens of every step of every trace.

    Raises:
      ValueError: `step_tokens` is not of these traces.
    """
    lengths = [len(tokens) for tokens in step_tokens]
    if lengths != [result.num_steps for result in results]:
        raise ValueError("prune: step_tokens has other numbers of steps than the results")
    kept = [(r, t) for r, t in zip(results, step_tokens) if r.kept is not None]
    before = [sum(tokens) for _, tokens in kept]
    after = [sum(tokens[: result.kept]) for result, tokens in kept]
    asked: list[list[bool]] = [[] for _ in range(10)]
    for result in results:
        for k, valid in result.asked:
            asked[(10 * k - 1) // result.num_steps].append(valid)
    known = [result for result in results if method == "exhaustive" and result.asked]
    monotone = [result for result in known if result.monotone]
    return Report(
        num_traces=len(results),
        num_kept=len(kept),
        dropped=dict(collections.Counter(r.dropped for r in results if r.dropped is not None)),
        kept_steps=_ratio(sum(r.kept for r, _ in kept), sum(r.num_steps for r, _ in kept)),
        steps_before=_ratio(sum(r.num_steps for r, _ in kept), len(kept)),
        steps_after=_ratio(sum(r.kept for r, _ in kept), len(kept)),
        kept_tokens=_ratio(sum(after), sum(before)),
        tokens_before=_ratio(sum(before), len(kept)),
        tokens_after=_ratio(sum(after), len(kept)),
        halved=_ratio(sum(2 * b < a for a, b in zip(before, after)), len(kept)),
        questions=sum(len(result.asked) for result in results),
        max_questions=max((len(result.asked) for result in results), default=0),
        by_position=tuple((len(row), _ratio(sum(row), len(row))) for row in asked),
        non_monotone=_ratio(len(known) - len(monotone), len(known)),
        binary_agrees=_ratio(sum(_binary_agrees(r) for r in monotone), len(monotone)),
    )


def _binary_agrees(result: Pruned) -> bool:
    """Whether the binary search cuts where a result with every prefix asked does."""
    answers = dict(result.asked)
    (found,) = prune(
        [("",) * result.num_steps], lambda questions: [answers[kept] for _, kept in questions]
    )
    return (found.kept, found.dropped) == (result.kept, result.dropped)


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None

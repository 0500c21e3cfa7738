"""Test-time scaling: what accuracy the tokens of an answer buy.

Three ways to spend more on a problem, each a curve of accuracy against tokens:
  majority  the vote of n samples (self-consistency, Wang et al. 2022, arXiv 2203.11171)
  budget    the thinking is ended after so many tokens (s1, arXiv 2501.19393; Qwen3's report)
  waits     the end of the thinking is replaced by "Wait" so many times (s1)
and best_of_n, which a scorer chooses (Cobbe et al. 2021, arXiv 2110.14168).

A curve is a list of records, as summary.json holds them under `scaling`:
  method, n       of majority and best_of_n the samples, of waits the waits, of budget 1
  budget          tokens of thinking, None where they are not limited
  accuracy, ci    mean over the problems, and its 95 % interval
  mean_tokens     tokens sampled for one problem's answer: of n samples together
  mean_thinking   thinking tokens of one sample, without those that were forced
  truncated       share of the samples that the token limit cut off
and `wording` where an end of thinking was forced.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxreason.types import Completion, Sampling, ThinkingBudget

Grade = tuple[str | None, bool]  # (extracted answer, whether it is right)
Score = Callable[[str, Completion], float]  # (prompt, completion) -> higher is better


@dataclasses.dataclass(frozen=True)
class Bench:
    """Problems, and the functions that answer and judge them.

    generate: (prompts, sampling) -> completions[prompt][sample]. With one key for every call the
      points of a curve share their random numbers, so their differences are less noisy.
    grade: (text, answer) -> (extracted, correct).
    interval: values_Q -> [low, high] of their mean.
    thinking_tokens: how many ids of a completion the model chose before the end of its thinking.
    """

    prompts: Sequence[str]
    answers: Sequence[str]
    generate: Callable[[Sequence[str], Sampling], list[list[Completion]]]
    grade: Callable[[str, str], Grade]
    interval: Callable[[np.ndarray], Sequence[float]]
    thinking_tokens: Callable[[Completion], int]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The samples of a bench under one sampling, all judged; [problem][sample] everywhere."""

    completions: Sequence[Sequence[Completion]]
    grades: Sequence[Sequence[Grade]]
    tokens_QR: np.ndarray
    thinking_QR: np.ndarray

    @property
    def correct_QR(self) -> np.ndarray:
        return np.array([[right for _, right in row] for row in self.grades], np.float64)


def draw(bench: Bench, sampling: Sampling) -> Drawn:
    completions = bench.generate(bench.prompts, sampling)
    grades = [
        [bench.grade(completion.text, answer) for completion in row]
        for answer, row in zip(bench.answers, completions, strict=True)
    ]
    return Drawn(
        completions,
        grades,
        tokens_QR=np.array([[c.num_tokens for c in row] for row in completions], np.float64),
        thinking_QR=np.array(
            [[bench.thinking_tokens(c) for c in row] for row in completions], np.float64
        ),
    )


# ------------------------------------------------------------------------------- more samples


def majority_curve(bench: Bench, drawn: Drawn, votes: Sequence[int]) -> list[dict[str, Any]]:
    """The vote over n samples for each n, all from one set of samples.

    Raises ValueError for an n that is more than there are samples.
    """
    _check_sizes(votes, drawn)
    accuracy_QN = np.array([vote_accuracies(row, votes) for row in drawn.grades])
    return [
        _record(bench, drawn, "majority", accuracy_Q, n=n)
        for n, accuracy_Q in zip(votes, accuracy_QN.T)
    ]


def vote_accuracies(grades: Sequence[Grade], votes: Sequence[int]) -> list[float]:
    """The chance that the vote of n of these samples, drawn in random order, is right; for each n.

    The mean over every ordered choice of n samples, counted and not simulated: unbiased as pass@k's
    estimator is, with no noise of its own. A sample without an answer casts no vote; a tie goes to
    the answer seen first, which in random order is each of the tied answers equally often.
    """
    counts = collections.Counter(answer for answer, _ in grades if answer is not None)
    right = {answer for answer, correct in grades if correct and answer is not None}
    silent = len(grades) - counts.total()
    wins = dict.fromkeys(votes, 0.0)
    for winner in right:
        others = [count for answer, count in counts.items() if answer != winner]
        for k in range(1, counts[winner] + 1):
            rest = _choices_that_lose(others, silent, k)
            for n in votes:
                wins[n] += math.comb(counts[winner], k) * rest.get(n - k, 0.0)
    return [wins[n] / math.comb(len(grades), n) for n in votes]


def _choices_that_lose(others: Iterable[int], silent: int, k: int) -> dict[int, float]:
    """{size: ways to choose so many samples of which no answer has more than k votes}.

    Args:
      others: how many samples each other answer has.
      silent: samples without an answer.

    A way in which t answers have k votes too counts 1 / (1 + t): the tie is lost as often.
    """
    ways = {(size, 0): math.comb(silent, size) for size in range(silent + 1)}  # (size, ties)
    for count in others:
        longer: dict[tuple[int, int], int] = collections.defaultdict(int)
        for (size, ties), number in ways.items():
            for i in range(min(count, k) + 1):
                longer[size + i, ties + (i == k)] += number * math.comb(count, i)
        ways = longer
    total: dict[int, float] = collections.defaultdict(float)
    for (size, ties), number in ways.items():
        total[size] += number / (1 + ties)
    return total


def best_of_n_curve(
    bench: Bench, drawn: Drawn, sizes: Sequence[int], score: Score
) -> list[dict[str, Any]]:
    """The sample that `score` likes best of n, for each n, all from one set of samples.

    Raises ValueError for an n that is more than there are samples.
    """
    _check_sizes(sizes, drawn)
    scores_QR = np.array(
        [[score(p, c) for c in row] for p, row in zip(bench.prompts, drawn.completions)]
    )
    curve = []
    for n in sizes:
        pairs = zip(drawn.correct_QR, scores_QR)
        accuracy_Q = np.array([best_of_n(correct_R, scores_R, n) for correct_R, scores_R in pairs])
        curve.append(_record(bench, drawn, "best_of_n", accuracy_Q, n=n))
    return curve


def best_of_n(correct_R: np.ndarray, scores_R: np.ndarray, n: int) -> float:
    """The chance that the best scored of n of the samples is right, over every choice of n.

    Equal scores win equally often. Of R samples the one with r better ones wins in
    C(R - r - 1, n - 1) of the C(R, n) choices.
    """
    order = np.argsort(-scores_R, kind="stable")
    R, expected = len(order), 0.0
    tied = itertools.groupby(enumerate(order), key=lambda ranked: scores_R[ranked[1]])
    for _, group in tied:
        ranks, members = zip(*group)
        chance = sum(math.comb(R - rank - 1, n - 1) for rank in ranks) / math.comb(R, n)
        expected += chance * float(correct_R[list(members)].mean())
    return expected


# ------------------------------------------------------------------------------- more thinking


def budget_point(
    bench: Bench, sampling: Sampling, max_thinking: int, wording: str
) -> dict[str, Any]:
    """Accuracy where the thinking is ended after `max_thinking` tokens with this wording."""
    budget = ThinkingBudget(max_tokens=max_thinking, wording=wording)
    drawn = draw(bench, dataclasses.replace(sampling, thinking=budget))
    point = _record(bench, drawn, "budget", drawn.correct_QR.mean(axis=1), n=1, budget=max_thinking)
    return {**point, "wording": wording}


def waits_point(bench: Bench, sampling: Sampling, waits: int) -> dict[str, Any]:
    """Accuracy where the thinking is made to go on `waits` times."""
    drawn = draw(bench, dataclasses.replace(sampling, thinking=ThinkingBudget(waits=waits)))
    return _record(bench, drawn, "waits", drawn.correct_QR.mean(axis=1), n=waits)


def s1_metrics(
    tokens: Sequence[float], accuracy: Sequence[float], limits: Sequence[float]
) -> dict[str, float | None]:
    """How well a method turns thinking into accuracy, over its runs (s1, arXiv 2501.19393, 3.2).

    Args:
      tokens: mean thinking tokens of each run.
      accuracy: of each run.
      limits: the most thinking tokens each run was asked for; math.inf where it was not limited.

    Returns:
      control, the share of runs that kept to their limit; scaling, the mean slope of the accuracy
      over all pairs of runs, a token (None where no two runs differ in tokens); performance, the
      best accuracy.
    """
    runs = sorted(zip(tokens, accuracy, strict=True))
    slopes = [
        (high[1] - low[1]) / (high[0] - low[0])
        for low, high in itertools.combinations(runs, 2)
        if high[0] > low[0]
    ]
    kept = [used <= limit for used, limit in zip(tokens, limits, strict=True)]
    return {
        "control": sum(kept) / len(kept),
        "scaling": sum(slopes) / len(slopes) if slopes else None,
        "performance": max(accuracy),
    }


# ------------------------------------------------------------------------------------- records


def _check_sizes(sizes: Sequence[int], drawn: Drawn) -> None:
    R = drawn.tokens_QR.shape[1]
    if not all(1 <= n <= R for n in sizes):
        raise ValueError(f"sizes are {tuple(sizes)}; each must be 1 to the {R} samples drawn")


def _record(
    bench: Bench,
    drawn: Drawn,
    method: str,
    accuracy_Q: np.ndarray,
    n: int,
    budget: int | None = None,
) -> dict[str, Any]:
    samples = n if method in ("majority", "best_of_n") else 1
    truncated = [c.truncated for row in drawn.completions for c in row]
    return {
        "method": method,
        "n": n,
        "budget": budget,
        "accuracy": float(accuracy_Q.mean()),
        "ci": list(bench.interval(accuracy_Q)),
        "mean_tokens": samples * float(drawn.tokens_QR.mean()),
        "mean_thinking": float(drawn.thinking_QR.mean()),
        "truncated": float(np.mean(truncated)),
    }

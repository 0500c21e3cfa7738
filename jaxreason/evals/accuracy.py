"""Sampled accuracy: avg@k, pass@k, maj@n, tokens and truncation, with a bootstrap interval.

Definitions over a problem's n samples, averaged over the problems:
  avg@k   mean accuracy of the first k samples
  pass@k  chance that k of the n samples hold a right one, unbiased (Chen et al. 2021, HumanEval)
  maj@n   whether the most frequent answer is right (self-consistency, Wang et al. 2022); a sample
          without an answer casts no vote, a tie goes to the answer seen first
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxreason import types

Generate = Callable[
    [types.Params, list[str], types.Sampling, jax.Array], list[list[types.Completion]]
]
Grader = Callable[[str, str], tuple[str | None, bool]]  # text, answer -> (extracted, correct)


@dataclasses.dataclass(frozen=True)
class Problem:
    prompt: str  # as `generate` reads it
    answer: str
    group: str = ""  # e.g. the number of operations


@dataclasses.dataclass(frozen=True)
class Result:
    metrics: dict[str, Any]
    samples: list[dict[str, Any]]  # one a problem, as samples.jsonl holds it


def evaluate(
    generate: Generate,
    params: types.Params,
    problems: Sequence[Problem],
    sampling: types.Sampling,
    key: jax.Array,
    grade: Grader,
    ks: Sequence[int] = (4,),
) -> Result:
    """Samples `sampling.num_samples` completions a problem and scores them.

    Metrics, with k of `ks` and n samples: `avg@k`, `avg@k_ci` (95 %, over problems), `pass@k`,
    `maj@n`, `mean_tokens` and `truncated` (over all samples), `token_efficiency` (avg@k of the
    first k over mean_tokens), and where problems have groups `by_operations` {group: {avg@k of the
    first k, count, mean_tokens}}.

    Raises:
      ValueError: no problems, or a k larger than the number of samples.
    """
    if not problems:
        raise ValueError("evaluation has no problems")
    if not ks or not 1 <= min(ks) <= max(ks) <= sampling.num_samples:
        raise ValueError(
            f"evaluation's ks are {tuple(ks)}; each must be 1 to num_samples {sampling.num_samples}"
        )
    completions = generate(params, [problem.prompt for problem in problems], sampling, key)
    grades = [
        [grade(c.text, problem.answer) for c in row]
        for problem, row in zip(problems, completions, strict=True)
    ]
    correct_QR = np.array([[right for _, right in row] for row in grades], np.float64)
    tokens_QR = np.array([[c.num_tokens for c in row] for row in completions], np.float64)
    truncated_QR = np.array([[c.truncated for c in row] for row in completions], np.float64)
    metrics: dict[str, Any] = {}
    for k in ks:
        avg_Q = correct_QR[:, :k].mean(axis=1)
        metrics[f"avg@{k}"] = float(avg_Q.mean())
        metrics[f"avg@{k}_ci"] = bootstrap_interval(avg_Q)
        metrics[f"pass@{k}"] = float(
            np.mean([pass_at_k(row.size, int(row.sum()), k) for row in correct_QR])
        )
    metrics[f"maj@{sampling.num_samples}"] = float(np.mean([majority(row) for row in grades]))
    metrics["mean_tokens"] = float(tokens_QR.mean())
    metrics["truncated"] = float(truncated_QR.mean())
    metrics["token_efficiency"] = metrics[f"avg@{ks[0]}"] / max(metrics["mean_tokens"], 1.0)
    if any(problem.group for problem in problems):
        metrics["by_operations"] = _by_group(problems, correct_QR, tokens_QR, ks[0])
    samples = [_sample(*row) for row in zip(problems, completions, grades, strict=True)]
    return Result(metrics, samples)


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k) in a form that does not overflow; c of n samples are right."""
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def majority(grades: Sequence[tuple[str | None, bool]]) -> bool:
    """Whether the most frequent extracted answer is right; False where nothing was extracted."""
    votes = collections.Counter(extracted for extracted, _ in grades if extracted is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # equal counts come in the order first seen
    return next(right for extracted, right in grades if extracted == winner)


def bootstrap_interval(values_Q: np.ndarray, seed: int = 0, resamples: int = 1000) -> list[float]:
    """[lo, hi]: the 2.5 % and 97.5 % percentiles of the mean over resampled problems."""
    indices = np.random.default_rng(seed).integers(values_Q.size, size=(resamples, values_Q.size))
    return np.percentile(values_Q[indices].mean(axis=1), [2.5, 97.5]).tolist()


def paired_gain(before: Sequence[dict], after: Sequence[dict]) -> dict[str, Any]:
    """How much more is right in `after` than in `before`, samples of the same problems in order.

    The mean over problems of the difference in accuracy over all samples of each, and its 95 %
    interval by resampling problems: what is hard for both does not widen it.

    Raises:
      ValueError: the problems differ.
    """
    if [sample["prompt"] for sample in before] != [sample["prompt"] for sample in after]:
        raise ValueError("the two evaluations are of different problems; nothing can be paired")
    accuracy = lambda samples: np.array(
        [np.mean([c["correct"] for c in sample["completions"]]) for sample in samples]
    )
    gain_Q = accuracy(after) - accuracy(before)
    return {"mean": float(gain_Q.mean()), "ci": bootstrap_interval(gain_Q)}


def _by_group(
    problems: Sequence[Problem], correct_QR: np.ndarray, tokens_QR: np.ndarray, k: int
) -> dict[str, dict[str, float]]:
    groups = np.array([problem.group for problem in problems])
    return {
        str(group): {
            f"avg@{k}": float(correct_QR[groups == group, :k].mean()),
            "count": int((groups == group).sum()),
            "mean_tokens": float(tokens_QR[groups == group].mean()),
        }
        for group in sorted(set(groups), key=lambda name: (len(name), name))  # 9 before 10
    }


def _sample(
    problem: Problem, completions: Sequence[types.Completion], grades: Sequence
) -> dict[str, Any]:
    return {
        **dataclasses.asdict(problem),
        "completions": [
            {
                "text": completion.text,
                "num_tokens": completion.num_tokens,
                "truncated": bool(completion.truncated),
                "correct": bool(right),
            }
            for completion, (_, right) in zip(completions, grades, strict=True)
        ],
    }

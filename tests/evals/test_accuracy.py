"""Sampled metrics against brute force and the papers' numbers."""

import itertools
import json

import jax
import numpy as np
import pytest

from jaxreason import types
from jaxreason.evals import accuracy

KEY = jax.random.key(0)


def grade(text, answer):
    extracted = text if text != "?" else None
    return extracted, extracted == answer


def evaluate(rows, num_samples, problems=None, **kwargs):
    """Scores the given texts; a completion has as many tokens as characters, "!" is cut off."""

    def generate(params, prompts, sampling, key):
        assert sampling.num_samples == num_samples and len(prompts) == len(rows)
        return [
            [types.Completion(t, tuple(range(len(t))), (0.0,) * len(t), t == "!") for t in row]
            for row in rows
        ]

    problems = problems or [accuracy.Problem(f"q{i}", "a") for i in range(len(rows))]
    sampling = types.Sampling(max_tokens=8, num_samples=num_samples)
    return accuracy.evaluate(generate, {}, problems, sampling, KEY, grade, **kwargs)


@pytest.mark.parametrize(
    "n, c, k, value", [(10, 3, 5, 0.916667), (64, 1, 8, 0.125), (8, 8, 4, 1.0), (8, 0, 4, 0.0)]
)
def test_pass_at_k_golden(n, c, k, value):
    assert accuracy.pass_at_k(n, c, k) == pytest.approx(value, abs=1e-6)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            share = sum(map(any, subsets)) / len(subsets)
            assert accuracy.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(
    "answers, right",
    [
        ("aab", True),
        ("abb", False),
        ("abab", True),  # a tie: first seen
        ("baba", False),
        ("???a", True),  # no vote is cast for nothing
        ("????", False),
    ],
)
def test_majority(answers, right):
    assert accuracy.majority([grade(text, "a") for text in answers]) is right


def test_metrics_by_hand():
    rows = [list("aaabbbbb"), list("?baaaaaa"), ["!"] * 8]
    problems = [accuracy.Problem("q", "a", group) for group in ("10", "9", "9")]
    result = evaluate(rows, 8, problems)
    m = result.metrics
    assert m["avg@4"] == pytest.approx((3 / 4 + 2 / 4 + 0) / 3)  # the first four only
    assert m["pass@4"] == pytest.approx((1 - 5 / 70 + 1 + 0) / 3)  # all eight: C(5,4) / C(8,4)
    assert m["maj@8"] == pytest.approx(1 / 3)
    assert m["mean_tokens"] == 1.0 and m["truncated"] == pytest.approx(1 / 3)
    assert m["token_efficiency"] == m["avg@4"]
    assert list(m["by_operations"]) == ["9", "10"]
    assert m["by_operations"]["9"] == {"avg@4": 0.25, "count": 2, "mean_tokens": 1.0}
    assert m["avg@4_ci"][0] <= m["avg@4"] <= m["avg@4_ci"][1]
    assert set(m) == {
        *("avg@4", "avg@4_ci", "pass@4", "maj@8", "mean_tokens", "truncated"),
        *("token_efficiency", "by_operations"),
    }
    assert json.loads(json.dumps(result.samples[0])) == {
        "prompt": "q",
        "answer": "a",
        "group": "10",
        "completions": [
            {"text": t, "num_tokens": 1, "truncated": False, "correct": t == "a"} for t in rows[0]
        ],
    }
    json.dumps(m)


def test_other_ks():
    m = evaluate([list("ab"), list("bb")], 2, ks=(1, 2)).metrics
    assert (m["avg@1"], m["avg@2"], m["pass@1"], m["pass@2"]) == (0.5, 0.25, 0.25, 0.5)
    assert "maj@2" in m and "by_operations" not in m  # problems without groups


def test_unanswerable_requests():
    with pytest.raises(ValueError, match=r"ks are \(4,\); each must be 1 to num_samples 2"):
        evaluate([list("ab")], 2)
    with pytest.raises(ValueError, match="no problems"):
        accuracy.evaluate(None, {}, [], types.Sampling(max_tokens=1), KEY, grade)


def test_bootstrap_interval_covers_and_repeats():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        lo, hi = accuracy.bootstrap_interval(rng.binomial(4, 0.7, size=100) / 4, resamples=300)
        covered += lo <= 0.7 <= hi
    # 95 % of 200 within four standard deviations (0.015 each), and an edge of the bootstrap's own
    assert 0.88 <= covered / 200 <= 0.99
    values = rng.random(50)
    assert accuracy.bootstrap_interval(values) == accuracy.bootstrap_interval(values)
    assert accuracy.bootstrap_interval(values) != accuracy.bootstrap_interval(values, seed=1)
    assert accuracy.bootstrap_interval(np.ones(5)) == [1.0, 1.0]


def test_paired_gain_is_of_the_same_problems():
    sample = lambda prompt, *right: {
        "prompt": prompt,
        "completions": [{"correct": r} for r in right],
    }
    before = [sample("a", True, False), sample("b", False, False), sample("c", True, True)]
    after = [sample("a", True, True), sample("b", False, True), sample("c", True, True)]
    gain = accuracy.paired_gain(before, after)
    assert gain["mean"] == pytest.approx(1 / 3)
    assert 0 <= gain["ci"][0] <= gain["mean"] <= gain["ci"][1] <= 0.5
    assert accuracy.paired_gain(after, before)["mean"] == pytest.approx(-1 / 3)
    with pytest.raises(ValueError, match="different problems"):
        accuracy.paired_gain(before, after[:2])

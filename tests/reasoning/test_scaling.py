"""Votes equal brute force over every order, budgets reach the sampler, s1's metrics by hand."""

import collections
import itertools
import math

import numpy as np
import pytest

from jaxreason.evals.accuracy import majority
from jaxreason.reasoning import scaling
from jaxreason.types import Completion, Sampling, ThinkingBudget

SAMPLING = Sampling(max_tokens=64, temperature=0.6, num_samples=5)


def completion(text, tokens=3, truncated=False):
    return Completion(text, tuple(range(tokens)), (0.0,) * tokens, truncated)


def grade(text, answer):
    return text or None, text == answer


def bench(texts, asked=None, tokens=3):
    """Problems whose right answer is "r"; every call gives these texts[problem][sample]."""

    def generate(prompts, sampling):
        if asked is not None:
            asked.append(sampling)
        return [[completion(text, tokens) for text in row] for row in texts]

    return scaling.Bench(
        prompts=[f"q{i}" for i in range(len(texts))],
        answers=["r"] * len(texts),
        generate=generate,
        grade=grade,
        interval=lambda values_Q: (values_Q.min(), values_Q.max()),
        thinking_tokens=lambda c: c.num_tokens - 1,
    )


def every_order(values, n):
    orders = list(itertools.permutations(values, n))
    return np.mean([majority(order) for order in orders])


@pytest.mark.parametrize("seed", range(12))
def test_the_vote_is_the_mean_of_evals_majority_over_every_order(seed):
    random = np.random.default_rng(seed)
    texts = random.choice(["r", "r", "a", "b", "c", ""], size=6)
    grades = [grade(text, "r") for text in texts]
    votes = (1, 2, 3, 4, 5, 6)
    # Equal up to the rounding of a few divisions.
    assert scaling.vote_accuracies(grades, votes) == pytest.approx(
        [every_order(grades, n) for n in votes], abs=1e-12
    )


def test_two_spellings_of_a_right_answer_are_two_candidates():
    grades = [("1/2", True), ("0.5", True), ("0.5", True), ("7", False), ("7", False)]
    for n in (1, 2, 3, 5):
        (got,) = scaling.vote_accuracies(grades, [n])
        assert got == pytest.approx(every_order(grades, n), abs=1e-12)


@pytest.mark.parametrize(
    "texts, n, want",
    [
        ("ra", 2, 1 / 2),  # a tie goes to the first seen: half of the orders
        ("rab", 3, 1 / 3),
        ("rrabb", 5, 1 / 2),
        ("", 1, 0.0),
    ],
)
def test_ties_go_to_the_answer_seen_first(texts, n, want):
    grades = [grade(text, "r") for text in texts] or [(None, False)]
    assert scaling.vote_accuracies(grades, [n]) == pytest.approx([want])


def test_sixteen_votes_of_sixteen_different_samples_are_counted_in_time():
    grades = [(str(i), i < 8) for i in range(16)]
    assert scaling.vote_accuracies(grades, (1, 2, 4, 8, 16)) == pytest.approx([0.5] * 5)
    grades = [("r", True)] * 9 + [("a", False)] * 7
    got = scaling.vote_accuracies(grades, (1, 3, 16))
    three = (math.comb(9, 3) + math.comb(9, 2) * 7) / math.comb(16, 3)
    assert got == pytest.approx([9 / 16, three, 1.0])


def test_majority_curve_has_the_records_of_the_contract():
    b = bench([list("rraab"), ["r", "", "", "", ""]])
    drawn = scaling.draw(b, SAMPLING)
    curve = scaling.majority_curve(b, drawn, (1, 5))
    want = [(2 / 5 + 1 / 5) / 2, (1 / 2 + 1) / 2]
    assert [record["accuracy"] for record in curve] == pytest.approx(want)
    assert curve[1]["ci"] == pytest.approx([0.5, 1.0])
    assert [record["mean_tokens"] for record in curve] == [3.0, 15.0]
    assert curve[0] | {"accuracy": 0, "ci": 0} == {
        "method": "majority", "n": 1, "budget": None, "accuracy": 0, "ci": 0,
        "mean_tokens": 3.0, "mean_thinking": 2.0, "truncated": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"sizes are \(1, 8\); each must be 1 to the 5 samples"):
        scaling.majority_curve(b, drawn, (1, 8))


def test_best_of_n_is_the_mean_over_every_choice():
    random = np.random.default_rng(3)
    correct_R, scores_R = random.integers(0, 2, 7), random.integers(0, 4, 7)  # ties abound
    for n in range(1, 8):
        best = []
        for chosen in itertools.combinations(range(7), n):
            top = max(scores_R[i] for i in chosen)
            best.append(np.mean([correct_R[i] for i in chosen if scores_R[i] == top]))
        got = scaling.best_of_n(correct_R.astype(float), scores_R, n)
        assert got == pytest.approx(np.mean(best), abs=1e-12)


def test_a_scorer_ranks_and_the_best_counts():
    b = bench([list("raaaa"), list("aaaar")])
    drawn = scaling.draw(b, SAMPLING)
    seen = collections.Counter()

    def score(prompt, found):
        seen[prompt] += 1
        return float(found.text == "r")

    curve = scaling.best_of_n_curve(b, drawn, (1, 5), score)
    assert [record["accuracy"] for record in curve] == pytest.approx([0.2, 1.0])
    assert curve[1]["method"] == "best_of_n" and curve[1]["mean_tokens"] == 15.0
    assert seen == {"q0": 5, "q1": 5}


@pytest.mark.parametrize("wording", ["s1", "qwen3"])
def test_a_budget_reaches_the_sampler_and_the_record(wording):
    asked = []
    record = scaling.budget_point(bench([list("rraab")], asked), SAMPLING, 32, wording)
    assert [s.thinking for s in asked] == [ThinkingBudget(max_tokens=32, wording=wording)]
    assert (asked[0].max_tokens, asked[0].num_samples, asked[0].temperature) == (64, 5, 0.6)
    shown = {name: record[name] for name in ("method", "n", "budget", "wording", "mean_tokens")}
    assert shown == {
        "method": "budget", "n": 1, "budget": 32, "wording": wording, "mean_tokens": 3.0,
    }  # fmt: skip
    assert record["accuracy"] == pytest.approx(0.4)


def test_waits_reach_the_sampler_and_the_record():
    asked = []
    record = scaling.waits_point(bench([list("rraab")], asked), SAMPLING, 2)
    assert [s.thinking for s in asked] == [ThinkingBudget(waits=2)]
    assert (record["method"], record["n"], record["budget"]) == ("waits", 2, None)


@pytest.mark.parametrize(
    "tokens, accuracy, limits, want",
    [
        # Slopes 0.1/100, 0.3/300, 0.2/200.
        ((100, 200, 400), (0.2, 0.3, 0.5), (128, 256, 512), (1.0, 0.001, 0.5)),
        # Slopes 0.5/10, 0.1/20 and -0.4/10: in the order of the tokens, not of the runs.
        ((10, 30, 20), (0.1, 0.2, 0.6), (10, 25, math.inf), (2 / 3, 0.005, 0.6)),
        ((50, 50), (0.4, 0.6), (40, 60), (0.5, None, 0.6)),
    ],
)
def test_s1_metrics_by_hand(tokens, accuracy, limits, want):
    metrics = scaling.s1_metrics(tokens, accuracy, limits)
    assert list(metrics) == ["control", "scaling", "performance"]
    for got, value in zip(metrics.values(), want):
        assert got == (value if value is None else pytest.approx(value))

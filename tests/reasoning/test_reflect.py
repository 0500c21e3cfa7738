"""Reflection, computations, repetition and loops of traces by hand, and the sums over many."""

import dataclasses
import gzip
import json
import random

import pytest

from jaxreason.data.arithmetic import ArithmeticConfig, records
from jaxreason.reasoning import reflect
from jaxreason.reasoning.reflect import Arithmetic, Loop, find_loop
from jaxreason.reasoning.segment import DEFAULT, LINES, segment
from jaxreason.reasoning.traces import Trace
from jaxreason.rewards.shaping import Repetition

# --- reflection -----------------------------------------------------------------------------------


def test_words_are_whole_and_of_any_case():
    text = "WAIT, waiter. Let me Double-Check and check\n again; rechecks. Hmm-mm. Cross-check."
    assert reflect.count_words(text, reflect.PAPER) == {"double-check": 1, "check again": 1}
    assert reflect.count_words(text, reflect.WIDE) == {
        "wait": 1, "double-check": 1, "check again": 1
    }  # fmt: skip
    assert reflect.count_words("That’s not right. Check: check.", reflect.WIDE) == {
        "that's not right": 1, "check": 2
    }  # fmt: skip
    assert reflect.count_reflections("Wait. Rethink!") == {"paper": 1, "wide": 2}
    assert reflect.count_reflections("") == {"paper": 0, "wide": 0}


def test_the_pools():
    """The paper's is the list of its code; the other one holds it, and what it lacks."""
    assert len(reflect.PAPER) == len(set(reflect.PAPER)) == 15
    assert set(reflect.PAPER) < set(reflect.WIDE) and len(set(reflect.WIDE)) == len(reflect.WIDE)
    assert not {"wait", "hmm", "alternatively"} & set(reflect.PAPER)
    for word in reflect.WIDE:
        assert reflect.count_words(f"a {word.upper()}, b", reflect.WIDE) == {word: 1}


# --- computations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trace, want",
    [
        ("3*4=12\n12+1=13", Arithmetic(2)),
        ("3*4=13\nwait 3*4=12\n12+1=13", Arithmetic(3, 1, 1, 0, None)),
        ("3*4=12\n12+1=14\n14-2=11\nwait 14-2=12", Arithmetic(4, 2, 1, 1, 1)),
        ("3*4=13\n13+1=15\nwait 3*4=12", Arithmetic(3, 2, 1, 0, 1)),
        ("wait 3*4=12\n3*4=13", Arithmetic(2, 1, 0, 1, 1)),  # right before it is no correction
        ("nothing", Arithmetic()),
    ],
)
def test_mistakes_and_corrections(trace, want):
    assert reflect.read_arithmetic(segment(trace, LINES)) == want


def test_the_long_chains_of_the_data():
    """data/arithmetic.py corrects every mistake it makes; a spoilt step is found where it is."""
    config = ArithmeticConfig(min_operations=5, max_operations=9, num_train=1, num_test=60,
                              mistake_share=0.3)  # fmt: skip
    rng, wrong = random.Random(0), 0
    for record in records(config)["test"]:
        steps = segment(record["long_cot"], LINES)
        found = reflect.read_arithmetic(steps)
        equations = [step for step in steps if not step.startswith("=")]
        mistakes = sum(step.startswith("wait ") for step in steps)
        wrong += mistakes
        assert (found.num_computations, found.num_wrong) == (len(equations), mistakes)
        assert found.num_corrected == mistakes and found.first_uncorrected is None
        short = segment(record["short_cot"], LINES)
        at = rng.randrange(len(short))
        spoilt = [*short[:at], short[at].rstrip() + "7\n", *short[at + 1 :]]
        assert reflect.read_arithmetic(spoilt).first_uncorrected == at
        assert reflect.read_arithmetic(short) == Arithmetic(record["num_operations"])
    assert wrong > 50


# --- repetition -----------------------------------------------------------------------------------


def test_repetition_is_minus_the_reward():
    rng = random.Random(0)
    for n in (1, 2, 5):
        for length in (0, 1, 4, 30, 90):
            ids = rng.choices(range(3), k=length)
            # A difference of two roundings of the same quotient.
            want = pytest.approx(-Repetition(n).value(ids), abs=1e-12)
            assert reflect.repeated_share(ids, n) == want
    assert reflect.repeated_share("abcabc", 3) == 0.25


def naive_loop(text, min_repeats, min_chars):
    """The smallest period by comparing character by character."""
    text = text.rstrip()
    for period in range(1, len(text) // min_repeats + 1):
        length = period
        while length < len(text) and text[-length - 1] == text[len(text) - length - 1 + period]:
            length += 1
        if length >= min_repeats * period and length >= min_chars:
            return Loop(len(text) - length, period, length / period)
    return None


def test_the_loop_equals_the_naive_search():
    rng = random.Random(1)
    found = 0
    for _ in range(1500):
        block = "".join(rng.choices("ab ", k=rng.randint(1, 9)))
        text = "".join(rng.choices("ab", k=rng.randint(0, 8))) + block * rng.randint(1, 6)
        text = text[: len(text) - rng.randint(0, 3)] + " \n" * rng.randint(0, 1)
        repeats, chars = rng.randint(2, 4), rng.choice([1, 8, 15])
        got = find_loop(text, repeats, chars)
        assert got == naive_loop(text, repeats, chars)
        found += got is not None
    assert 500 < found < 1450


def test_a_loop_by_hand():
    start = "First x is 1; "
    block = "Wait, maybe I should consider the sum.\n\nAlternatively, perhaps not.\n\n"
    got = find_loop(start + block * 4 + block[:20])
    assert (got.begin, got.period) == (len(start), len(block))
    assert got.repeats == pytest.approx(4 + 20 / len(block))
    assert find_loop(start + block * 4 + "So the answer is 7.") is None  # it came out of it
    assert find_loop(start + block * 2) is None
    assert find_loop("x is 1" + "0" * 50 + "...") is None  # too short to be a loop
    assert find_loop("") is find_loop("   ") is None
    with pytest.raises(ValueError, match=r"loop\.min_repeats is 1; it must be at least 2"):
        find_loop("a", min_repeats=1)


def test_loops_are_found_in_linear_time():
    """300k characters; together 0.4 s of CPU, and minutes where the search was quadratic."""
    noise = "".join(random.Random(0).choices("abcdefgh ", k=50_000))
    assert find_loop(noise * 6).period == 50_000
    assert find_loop("a" * 300_000) == Loop(0, 1, 300_000.0)
    assert find_loop(noise * 5 + noise[::-1]) is None


# --- many traces ----------------------------------------------------------------------------------


def test_a_summary_by_hand():
    make = lambda question, text, tokens, **rest: Trace(
        question=question, text=text, num_tokens=tokens, **rest
    )
    traces = [
        make("a", "2+3=5", 4, correct=True, num_operations=1),
        make("a", "2+3=6\nwait 2+3=5", 10, correct=True, num_operations=1),
        make("a", "2+3=7", 4, correct=False, num_operations=1),
        make("b", "1+1=2\n2*4=9", 8, correct=False, num_operations=2, truncated=True),
        make("b", "1+1=2\n2*4=8\nrecheck 1+1=2", 14, correct=True, num_operations=2),
        make("c", "so " * 100, 100),  # not graded, number of operations unknown
    ]
    summary, readings = reflect.summarize(traces)
    # avg@2: of a the first two right, of b one of two.
    assert (summary.avg_at, summary.accuracy) == (2, 0.75)
    assert (summary.num_traces, summary.num_questions, summary.num_graded) == (6, 3, 5)
    assert summary.mean_tokens == 140 / 6
    assert summary.mean_tokens_correct == 28 / 3 and summary.mean_tokens_wrong == 6
    assert summary.token_efficiency == pytest.approx(0.75 / (140 / 6))
    assert summary.truncated == 1.0  # of one it is known
    assert summary.reflection_ratio == {"paper": 1 / 6, "wide": 2 / 6}
    assert summary.reflective_steps == {"paper": 1 / 10, "wide": 2 / 10}
    assert summary.accuracy_reflective == {"paper": 1.0, "wide": 1.0}
    assert summary.accuracy_plain == {"paper": 0.5, "wide": 1 / 3}
    assert summary.tokens_reflective == {"paper": 14, "wide": 12}
    assert summary.mean_computations == 9 / 6
    assert summary.wrong_computations == 3 / 9 and summary.corrected == 1 / 3
    assert summary.with_mistake == 3 / 6 and summary.loops == 1 / 6
    assert summary.repeated == pytest.approx((80 / 81) / 6)
    one, two = summary.by_operations[1], summary.by_operations[2]
    assert list(summary.by_operations) == [1, 2]
    assert (one.num_traces, one.accuracy, one.mean_tokens) == (3, 2 / 3, 6)
    assert one.first_wrong == {0: 2} and one.first_uncorrected == {0: 1} and one.no_mistake == 2
    assert two.first_wrong == two.first_uncorrected == {1: 1} and two.mean_computations == 2.5
    assert readings[4].step_reflections == {"paper": (0, 0, 1), "wide": (0, 0, 1)}
    assert json.loads(json.dumps(dataclasses.asdict(summary)))["accuracy"] == 0.75

    ungraded, _ = reflect.summarize(traces[5:])
    assert ungraded.accuracy is ungraded.token_efficiency is ungraded.avg_at is None
    assert ungraded.accuracy_plain == {"paper": None, "wide": None}
    with pytest.raises(ValueError, match="there are no traces to read"):
        reflect.summarize([])
    with pytest.raises(ValueError, match=r"trace\.num_tokens is -1"):
        make("a", "", -1)


def test_real_models(shared_data):
    """Long chains reflect and loop, short ones of the same family do not (AMC23)."""
    with gzip.open(shared_data / "long_cot/amc23.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    by_kind = {}
    for name in ("Sky-T1-math-wrong-5K-27B", "icml_models/Sky-T1-math-correct-5K-32B-short-ckpts"):
        traces = [
            Trace(question=row["idx"], text=row["code"][0], correct=row["score"][0],
                  num_tokens=len(row["code"][0].split()))
            for row in rows if row["_model"] == name
        ]  # fmt: skip
        by_kind[name[:4]], _ = reflect.summarize(
            traces[:40], lambda text: reflect.read_trace(text, DEFAULT)
        )
    long, short = by_kind["Sky-"], by_kind["icml"]
    # Read once: 1.00 and 0.53 of the long ones, 0.05 and 0 of the short ones; 12 and 0 loops.
    assert long.reflection_ratio["wide"] > 0.9 and short.reflection_ratio["wide"] < 0.15
    assert 0.3 < long.reflection_ratio["paper"] < 0.8 and short.reflection_ratio["paper"] == 0
    assert 10 / 40 <= long.loops <= 14 / 40 and short.loops == 0
    assert long.mean_steps > 5 * short.mean_steps and long.repeated > 0.1 > short.repeated

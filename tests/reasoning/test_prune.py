"""Binary cutting equals exhaustive search and asks few questions."""

import math
import random

import pytest

from jaxreason.reasoning import prune
from jaxreason.reasoning.prune import Pruned, Search


def steps(n):
    return [f"step {i}\n" for i in range(n)]


def student(patterns, asked=None):
    """Answers by patterns[trace][kept - 1] and remembers the rounds."""

    def is_valid(questions):
        if asked is not None:
            asked.append(list(questions))
        return [patterns[trace][kept - 1] for trace, kept in questions]

    return is_valid


def monotone(n):
    """Every monotone pattern of n steps, the one that is never valid among them."""
    return [[False] * invalid + [True] * (n - invalid) for invalid in range(n + 1)]


def run(patterns, method="binary", **options):
    traces = [steps(len(pattern)) for pattern in patterns]
    return prune.prune(traces, student(patterns), method=method, **options)


def test_binary_equals_exhaustive_on_every_monotone_pattern():
    patterns = [pattern for n in range(1, 65) for pattern in monotone(n)]
    exhaustive = run(patterns, "exhaustive")
    for pattern, binary, whole in zip(patterns, run(patterns), exhaustive, strict=True):
        want = pattern.index(True) + 1 if any(pattern) else None
        assert binary.kept == whole.kept == want
        assert binary.dropped == whole.dropped == (None if want else prune.FULL_NOT_VALID)
        assert whole.monotone is True and len(whole.asked) == len(pattern)


def test_guided_equals_exhaustive_on_every_monotone_pattern_whatever_the_guess():
    for n in range(1, 20):
        for guess in (None, *range(1, n + 1)):
            patterns = monotone(n)
            found = run(patterns, "guided", guesses=[guess] * len(patterns))
            assert [one.kept for one in found] == [one.kept for one in run(patterns, "exhaustive")]
            assert max(len(one.asked) for one in found) <= math.ceil(math.log2(n)) + 2


def test_a_guess_spares_what_leads_the_student_astray():
    """Right after step 2 of 8, led astray by the review that follows, right again at its end."""
    pattern = [False, True, True, False, False, False, False, True]
    (binary,), (guided,) = run([pattern]), run([pattern], "guided", guesses=[2])
    assert (binary.kept, guided.kept) == (8, 2)
    assert [kept for kept, _ in guided.asked] == [8, 2, 1]


@pytest.mark.parametrize("block", range(10))
def test_the_bound_of_questions(block):
    """ceil(log2 n) + 2 at most, whatever the answers are; V(n) is the first."""
    rng = random.Random(block)
    patterns = []
    for n in range(1 + 100 * block, 101 + 100 * block):
        for valid_share in (0.0, 0.5, 1.0):
            patterns.append([rng.random() < valid_share for _ in range(n - 1)] + [True])
    for pattern, result in zip(patterns, run(patterns), strict=True):
        n = len(pattern)
        assert len(result.asked) <= math.ceil(math.log2(n)) + 2
        assert result.asked[0] == (n, True)
        assert len(set(result.asked)) == len(result.asked)  # nothing is asked twice


def test_what_is_kept_was_itself_answered_valid():
    """Also where validity is not monotone: 300 random patterns of up to 80 steps."""
    rng = random.Random(0)
    patterns = [[rng.random() < 0.5 for _ in range(rng.randint(1, 80))] for _ in range(300)]
    results = run(patterns)
    for pattern, result in zip(patterns, results, strict=True):
        if result.kept is None:
            assert not pattern[-1] and result.asked == ((len(pattern), False),)
        else:
            assert (result.kept, True) in result.asked and pattern[result.kept - 1]
    assert {result.kept is None for result in results} == {True, False}


def test_every_live_trace_is_in_every_round():
    rounds = []
    patterns = [monotone(100)[40], [False] * 100, monotone(3)[0], [True]]
    prune.prune([steps(len(p)) for p in patterns], student(patterns, rounds))
    assert rounds[0] == [(0, 100), (1, 100), (2, 3), (3, 1)]
    assert rounds[1] == [(0, 50), (2, 2)]  # 1 is dropped, 3 has nothing left to cut
    assert rounds[2] == [(0, 25), (2, 1)]
    assert len(rounds) == 7 and all(len(row) == 1 for row in rounds[3:])


def test_an_exhaustive_search_is_one_round():
    rounds = []
    patterns = [[True, False, True], [False, True]]
    traces = [steps(3), steps(2)]
    got = prune.prune(traces, student(patterns, rounds), method="exhaustive")
    assert [sorted(row) for row in rounds] == [[(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]]
    assert [r.kept for r in got] == [1, 2]
    assert [r.monotone for r in got] == [False, True]


def test_an_answer_to_no_question_is_refused():
    search = Search([4, 5])
    search.answer(0, 4, True)
    with pytest.raises(ValueError, match=r"\(1, 3\) is no open question"):
        search.answer(1, 3, True)  # V(5) comes first
    search.answer(1, 5, False)
    with pytest.raises(ValueError, match=r"\(1, 5\) is no open question"):
        search.answer(1, 5, True)
    with pytest.raises(ValueError, match="1 traces still have open questions"):
        search.results()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"prune\.method is 'linear'; it must be one of binary"):
        Search([1], "linear")
    for method, guesses in (("binary", [1]), ("guided", None)):
        with pytest.raises(ValueError, match="guesses are for guided, which needs them"):
            Search([1], method, guesses)
    with pytest.raises(ValueError, match="returned 1 answers to 2 questions"):
        prune.prune([steps(2), steps(2)], lambda questions: [True])


# ---------------------------------------------------------------------------------- baselines


def test_the_first_correct_solution():
    trace = ["3*4=13", "wait 3*4=12", "12+1=13", "=13"]
    cut = lambda answer: prune.first_correct_solution(trace, lambda s: s.endswith(f"={answer}"))
    assert cut("12") == Pruned(4, 2)
    assert cut("13") == Pruned(4, 1)  # right by accident counts too: that is this baseline's flaw
    assert cut("14") == Pruned(4, None, prune.NO_SOLUTION)
    assert prune.first_correct_solution([], bool) == Pruned(0, None, prune.NO_STEPS)


def test_a_random_cut_is_uniform_and_seeded():
    cuts = [prune.random_cut(4, seed=0, trace=i).kept for i in range(4000)]
    again = [prune.random_cut(4, seed=0, trace=i).kept for i in range(4000)]
    assert cuts == again != [prune.random_cut(4, seed=1, trace=i).kept for i in range(4000)]
    # 1,000 expected of each, standard deviation 27: five of them.
    assert all(abs(cuts.count(kept) - 1000) < 140 for kept in (1, 2, 3, 4))
    assert set(cuts) == {1, 2, 3, 4}
    assert prune.random_cut(0, 0, 0).dropped == prune.NO_STEPS


# ------------------------------------------------------------------------------------- report


def test_the_report_by_hand():
    patterns = [
        [False, True, True, True],  # keeps 2 of 4
        [True, False, True, True],  # not monotone: keeps 1
        [False] * 5,  # dropped
        [],  # dropped
    ]
    tokens = [[10, 10, 20, 40], [1, 1, 1, 1], [7] * 5, []]
    whole = prune.report(run(patterns, "exhaustive"), tokens, "exhaustive")
    assert whole == prune.Report(
        num_traces=4, num_kept=2, dropped={prune.FULL_NOT_VALID: 1, prune.NO_STEPS: 1},
        kept_steps=3 / 8, steps_before=4.0, steps_after=1.5, kept_tokens=21 / 84,
        tokens_before=42.0, tokens_after=10.5, halved=1.0,
        questions=13, max_questions=5,
        # 1/5 and 1/4 of a trace are in its second and third tenths, and so on.
        by_position=((0, None), (1, 0.0), (2, 0.5), (1, 0.0), (2, 0.5), (1, 0.0), (0, None),
                     (3, 2 / 3), (0, None), (3, 2 / 3)),
        non_monotone=1 / 3, binary_agrees=1.0,
    )  # fmt: skip
    binary = prune.report(run(patterns), tokens, "binary")
    assert (binary.questions, binary.max_questions, binary.num_kept) == (7, 3, 2)
    assert binary.non_monotone is None and binary.kept_tokens == pytest.approx(23 / 84)
    # All that binary search asks of two steps is every prefix, and tells nothing of monotony.
    short = prune.report(run([[True, True], [False, True], [True]]), [[1, 1]] * 2 + [[1]], "binary")
    assert short.questions == 5 and short.non_monotone is short.binary_agrees is None
    nothing = prune.report([], [], "exhaustive")
    assert nothing.kept_tokens is nothing.non_monotone is None and nothing.questions == 0
    with pytest.raises(ValueError, match="other numbers of steps"):
        prune.report(run(patterns), [*tokens[:3], [1]], "binary")

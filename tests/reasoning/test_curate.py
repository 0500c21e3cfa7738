"""Choices over sampled traces: what is kept, what is dropped and why, and how draws are spread."""

import collections
import itertools
import random

import pytest

from jaxreason.reasoning import curate
from jaxreason.reasoning.curate import Diversity
from jaxreason.reasoning.traces import Trace


def trace(question, correct=None, num_tokens=10, domain="", text="t"):
    return Trace(
        question=question, text=text, num_tokens=num_tokens, correct=correct, domain=domain
    )


SAMPLED = [
    trace("a", False, 5), trace("b", True, 9), trace("a", True, 8), trace("a", True, 7),
    trace("c", False, 3), trace("c", None, 2), trace("b", True, 9), trace("a", True, 7),
]  # fmt: skip


@pytest.mark.parametrize(
    "which, num_samples, kept",
    [
        ("all", None, range(8)),
        ("all", 1, (0, 1, 4)),
        ("all", 2, (0, 1, 2, 4, 5, 6)),
        ("correct", None, (1, 2, 3, 6, 7)),
        ("correct", 2, (1, 2, 6)),
        ("first_correct", None, (1, 2)),
        ("first_correct", 1, (1,)),
        ("shortest_correct", None, (1, 3)),
        ("shortest_correct", 2, (1, 2)),
    ],
)
def test_keep(which, num_samples, kept):
    selection = curate.keep(SAMPLED, which, num_samples)
    assert selection.kept == tuple(kept)
    assert set(selection.dropped) == set(range(8)) - set(kept)
    assert sum(selection.reasons.values()) == 8 - len(kept)


def test_keep_says_why():
    assert curate.keep(SAMPLED, "shortest_correct", 3).dropped == {
        0: curate.NOT_CORRECT, 2: curate.ANOTHER, 4: curate.NO_CORRECT, 5: curate.NO_CORRECT,
        6: curate.ANOTHER, 7: curate.BEYOND,
    }  # fmt: skip
    assert curate.keep(SAMPLED, "all", 3).reasons == {curate.BEYOND: 1}
    with pytest.raises(ValueError, match="keep is 'best'; it must be one of all, correct"):
        curate.keep(SAMPLED, "best")
    with pytest.raises(ValueError, match="num_samples is 0; it must be at least 1"):
        curate.keep(SAMPLED, "all", 0)


def test_difficulty():
    solved = {"7b": [True, False, False, True], "32b": [False, True, False, True]}
    selection = curate.difficulty(4, solved)
    assert selection.kept == (2,)
    assert selection.reasons == {
        "solved by 7b": 1, "solved by 32b": 1, "solved by 7b and 32b": 1
    }  # fmt: skip
    with pytest.raises(ValueError, match="7b has 4 answers to 3 questions"):
        curate.difficulty(3, solved)


def draws(traces, config, count):
    for seed in range(count):
        yield curate.diversity(traces, Diversity(**config, seed=seed)).kept


def test_a_domain_uniformly_then_by_two_to_the_minus_rank():
    sizes = {"algebra": 3, "geometry": 30, "logic": 1}
    traces = [
        trace(f"{d}{i}", num_tokens=10 * i, domain=d) for d, n in sizes.items() for i in range(n)
    ]
    first = [traces[kept[0]] for kept in draws(traces, {"num": 1}, 3000)]
    by_domain = collections.Counter(t.domain for t in first)
    # 1,000 expected of each, standard deviation 26: five of them. By size it were 88, 882, 29.
    assert all(abs(n - 1000) < 130 for n in by_domain.values()) and len(by_domain) == 3
    ranks = collections.Counter(29 - int(t.question[8:]) for t in first if t.domain == "geometry")
    for rank in range(4):
        expected = by_domain["geometry"] * 2.0 ** -(rank + 1)
        assert abs(ranks[rank] - expected) < 5 * expected**0.5
    shares = collections.Counter(t.num_tokens for t in first if t.domain == "algebra")
    # Three ranks: 4/7, 2/7, 1/7.
    for tokens, share in ((20, 4 / 7), (10, 2 / 7), (0, 1 / 7)):
        assert abs(shares[tokens] / by_domain["algebra"] - share) < 0.08


def test_a_draw_is_a_function_of_the_seed_and_not_of_the_order():
    rng = random.Random(0)
    # No two of a domain are equally long, but the longest of all three are.
    traces = [trace(f"q{i}", num_tokens=i // 3, domain="abc"[i % 3]) for i in range(60)]
    order = rng.sample(range(60), 60)
    one = curate.diversity(traces, Diversity(num=40, seed=3))
    assert one == curate.diversity(traces, Diversity(num=40, seed=3))
    assert one != curate.diversity(traces, Diversity(num=40, seed=4))
    other = curate.diversity([traces[i] for i in order], Diversity(num=40, seed=3))
    assert [traces[i] for i in one.kept] == [traces[order[i]] for i in other.kept]
    assert len(set(one.kept)) == 40 and one.reasons == {curate.NOT_DRAWN: 20}
    assert sorted((*one.kept, *one.dropped)) == list(range(60))


def test_the_last_part_from_a_histogram():
    domains = ("aime", "gpqa", "other")
    traces = [trace(f"{d}{i}", num_tokens=i, domain=d) for d in domains for i in range(60)]
    config = {"num": 90, "num_uniform": 60, "histogram": {"aime": 2.0, "gpqa": 1.0}}
    drawn = [[traces[i].domain for i in kept] for kept in draws(traces, config, 40)]
    uniform = collections.Counter(itertools.chain(*(row[:60] for row in drawn)))
    rest = collections.Counter(itertools.chain(*(row[60:] for row in drawn)))
    assert all(abs(uniform[d] - 800) < 120 for d in domains)  # of 2,400; standard deviation 23
    assert rest["other"] == 0 and abs(rest["aime"] - 800) < 82  # of 1,200; standard deviation 16
    few = [*traces[:3], traces[130]]
    with pytest.raises(ValueError, match="its domains have no more traces after"):
        curate.diversity(few, Diversity(num=4, num_uniform=0, histogram={"aime": 1.0}))


def test_diversity_names_mistakes():
    traces = [trace("a"), trace("b")]
    with pytest.raises(ValueError, match=r"diversity\.num is 3; there are 2 traces left"):
        curate.diversity(traces, Diversity(num=3))
    with pytest.raises(ValueError, match="1 questions have several traces, 'a' among them"):
        curate.diversity([*traces, trace("a")], Diversity(num=1))
    with pytest.raises(ValueError, match="2 are chosen beforehand"):
        curate.diversity(traces, Diversity(num=1), chosen=(0, 1))
    for fields, message in (
        ({"num": 0}, r"diversity\.num is 0; it must be at least 1"),
        ({"num": 2, "num_uniform": 1}, "give both or neither"),
        ({"num": 2, "num_uniform": 3, "histogram": {"a": 1}}, "num_uniform is 3; it must be 0 to"),
        ({"num": 2, "num_uniform": 1, "histogram": {"a": 0}}, "each with a weight above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Diversity(**fields)


def test_s1k_is_its_parts_one_after_the_other():
    traces = [trace(f"q{i}", num_tokens=i, domain="xy"[i % 2]) for i in range(40)]
    solved = {"7b": [i % 3 == 0 for i in range(40)], "32b": [i < 4 for i in range(40)]}
    trusted = lambda t: t.question == "q6"
    config = Diversity(num=12, seed=1)
    got = curate.s1k(traces, solved=solved, config=config, trusted=trusted)
    assert got.kept[0] == 6 and len(got.kept) == 12 == len(set(got.kept))
    assert sorted((*got.kept, *got.dropped)) == list(range(40))
    assert got.dropped[9] == "solved by 7b"
    assert got.dropped[3] == "solved by 7b and 32b"
    assert all(i >= 4 and (i % 3 or i == 6) for i in got.kept)
    hard = [i for i in range(40) if not (solved["7b"][i] or solved["32b"][i])]
    assert got.reasons[curate.NOT_DRAWN] == len(hard) - 11


# ----------------------------------------------------------------- contamination and duplicates


def test_decontamination_by_8_grams():
    held_out = ["What is the sum of the first ten odd primes, please?", "What is 3 + 4?"]
    texts = [
        "Tell me: what is the sum of the FIRST (ten) odd numbers.",  # 8 words in a row
        "What is the sum of the first nine odd primes",  # only 7
        "what is 3 + 4",  # a short one, whole
        "what is 3 - 4",
        "",
    ]
    got = curate.decontaminate(texts, held_out)
    assert got.kept == (1, 3, 4) and got.reasons == {curate.CONTAMINATED: 2}
    assert curate.decontaminate(texts, []).kept == (0, 1, 2, 3, 4)
    assert curate.decontaminate(texts[1:2], held_out, n=7).kept == ()
    with pytest.raises(ValueError, match="n is 0; an n-gram has at least 1 word"):
        curate.decontaminate(texts, held_out, n=0)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_the_filtered_search_for_duplicates_is_exact(threshold):
    """Equals comparing every pair, on texts of few words."""
    rng = random.Random(0)
    texts = []
    for _ in range(150):
        words = rng.choices("abcdef", k=rng.randint(0, 12))
        texts.append(" ".join(words))
        if rng.random() < 0.5:
            words[len(words) // 2 :] = rng.choices("abcdef", k=1)
            texts.append(" ".join(words))
    kept: list[int] = []
    for i, text in enumerate(texts):
        mine = curate.grams(text, 2)
        others = (curate.grams(texts[j], 2) for j in kept)
        if not any(mine and len(mine & o) / len(mine | o) >= threshold for o in others):
            kept.append(i)
    got = curate.deduplicate(texts, n=2, threshold=threshold)
    assert got.kept == tuple(kept) and 0 < len(got.dropped) < len(texts)


def test_near_duplicates():
    text = "Find the number of ways to tile a two by ten board with dominoes, in how many ways"
    got = curate.deduplicate([text, text.upper() + "?", text + " then", "Find x.", "find X", ""])
    assert got.kept == (0, 3, 5) and got.reasons == {curate.DUPLICATE: 3}
    with pytest.raises(ValueError, match=r"deduplicate\.threshold is 0; it must be in"):
        curate.deduplicate([text], threshold=0)

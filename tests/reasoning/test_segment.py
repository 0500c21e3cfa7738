"""Steps are lossless on every text, never cut a formula, and are what a reader would call steps."""

import gzip
import json
import random

import pytest

from jaxreason.reasoning import segment as seg
from jaxreason.reasoning.segment import LINES, RULES, Segmentation, segment

SENTENCES = Segmentation(rules=("sentence",), min_chars=0)
MARKED = Segmentation(rules=("marker",), min_chars=0)
PARAGRAPHS = Segmentation(rules=("paragraph",), min_chars=0)


def cut(text, config):
    steps = segment(text, config)
    assert "".join(steps) == text
    return [step.strip() for step in steps]


@pytest.mark.parametrize("seed", range(8))
def test_lossless_on_any_text(seed):
    """Random strings of all that the rules look at, under every combination of rules and limits."""
    rng = random.Random(seed)
    alphabet = [
        *" \n\t.!?:$(){}*-`é。1a", "\n\n", "\r\n", "\\(", "\\)", "\\[", "\\]", "$$", "```\n",
        "Wait, ", "so ", "e.g. ", "3.14", "\\begin{align}", "\\end{align}", "Hmm. ",
    ]  # fmt: skip
    for _ in range(150):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 40)))
        rules = tuple(rng.sample(RULES, rng.randint(1, 4)))
        low = rng.choice([0, 0, 5, 30])
        limits = {"min_chars": low, "max_chars": rng.choice([None, low + 1, 3 * low + 20])}
        steps = segment(text, Segmentation(rules=rules, **limits))
        assert "".join(steps) == text
        assert (steps == []) == (text == "")
        assert all(step.strip() for step in steps) or len(steps) == 1


def test_one_operation_a_line():
    trace = "3*4=13\nwait 3*4=12\ncheck 12/4=3\n=12"
    assert segment(trace, LINES) == ["3*4=13\n", "wait 3*4=12\n", "check 12/4=3\n", "=12"]
    assert cut(trace, MARKED) == ["3*4=13", "wait 3*4=12", "check 12/4=3\n=12"]


def test_white_space_belongs_to_the_step_before():
    assert segment("\n\na\n \n  b\n", PARAGRAPHS) == ["\n\na\n \n", "  b\n"]
    assert segment(" \n\n ", PARAGRAPHS) == [" \n\n "] and segment("", PARAGRAPHS) == []
    assert segment("a\r\n\r\nb", PARAGRAPHS) == ["a\r\n\r\n", "b"]


def test_paragraphs_that_go_on():
    text = "I use the formula:\n\nt = d / v\n\nSo t = 2."
    assert cut(text, PARAGRAPHS) == ["I use the formula:\n\nt = d / v", "So t = 2."]
    chain = "s = s(1) + 2\n\n= 1 + 2\n\n  ≈ 3"
    assert cut(chain + "\n\nDone", PARAGRAPHS) == [chain, "Done"]
    assert len(cut(chain, LINES)) == 3


@pytest.mark.parametrize(
    "text, want",
    [
        ("Pi is 3.14. It is known.", ["Pi is 3.14.", "It is known."]),
        ("Take primes, e.g. Two or i.e. That one.", ["Take primes, e.g. Two or i.e. That one."]),
        ("By Eq. (3) and Fig. 2 it holds. Done!", ["By Eq. (3) and Fig. 2 it holds.", "Done!"]),
        ("See Dr. Smith of the U.S. Army.", ["See Dr. Smith of the U.S. Army."]),
        ("It is No. 5 of them.", ["It is No. 5 of them."]),
        ("The angle at A. Then B.", ["The angle at A.", "Then B."]),
        ("There are 5! Ways, or n! Ways.", ["There are 5! Ways, or n! Ways."]),
        ("Great! It fits.", ["Great!", "It fits."]),
        ("1. Find x. 2 is left.", ["1. Find x.", "2 is left."]),
        ("**2. Solve** it. Next.", ["**2. Solve** it.", "Next."]),
        ("Step 3. Check it.", ["Step 3. Check it."]),
        ("Hmm... Let me think. what is x?", ["Hmm...", "Let me think. what is x?"]),
        ('He said "no." Then (yes.) Fine.', ['He said "no."', "Then (yes.)", "Fine."]),
        ("得到七。所以是七。", ["得到七。", "所以是七。"]),
        ("- one\n- two\nthree\nfour.\nfive", ["- one", "- two\nthree\nfour.", "five"]),
        ("a list:\n- one", ["a list:\n- one"]),
        (r"So \(x. Y\) and $a. B$ hold. Yes.", [r"So \(x. Y\) and $a. B$ hold.", "Yes."]),
        ("\\[ a.\n\n- B. C \\] Then.", ["\\[ a.\n\n- B. C \\] Then."]),
        ("$$ a. B\n. C $$\n\nD.", ["$$ a. B\n. C $$", "D."]),
        ("It costs $5. He has $7 left.", ["It costs $5.", "He has $7 left."]),
        ("\\begin{align} a. B\n- C \\end{align} D. E.",
         ["\\begin{align} a. B\n- C \\end{align} D.", "E."]),
        ("```python\nx. Y\n\nz = 1\n```\nThen.", ["```python\nx. Y\n\nz = 1\n```\nThen."]),
    ],
)  # fmt: skip
def test_sentences(text, want):
    assert cut(text, SENTENCES) == want


@pytest.mark.parametrize("opener", ["\\(", "\\[", "$$", "$", "```python\n", "\\begin{align}"])
def test_an_unclosed_delimiter_protects_nothing(opener):
    text = f"Open {opener}x. One.\n\nTwo. Three."
    assert cut(text, SENTENCES)[-2:] == ["Two.", "Three."]
    closed = {"\\(": "\\)", "\\[": "\\]", "$$": "$$", "$": "$", "\\begin{align}": "\\end{align}"}
    if opener in ("\\(", "$$", "\\begin{align}"):  # hold no blank line: another one closed there
        text = f"Open {opener}x.\n\nTwo. Three. {closed[opener]} end."
        assert len(cut(text, SENTENCES)) == 4


def test_markers_begin_steps_where_sentences_begin():
    text = (
        "We get 7. Wait, is it? But no: so be it. **Alternatively**, use x. Waiting is no marker."
    )
    assert cut(text, MARKED) == [
        "We get 7.", "Wait, is it?", "But no: so be it.",
        "**Alternatively**, use x. Waiting is no marker.",
    ]  # fmt: skip
    assert cut("It is 2. Let’s go. Let me see.", MARKED) == ["It is 2.", "Let’s go.", "Let me see."]
    own = Segmentation(rules=("marker",), markers=("use it",), min_chars=0)
    assert cut("So a. Use  it.\nuse it", own) == ["So a.", "Use  it.", "use it"]


def test_short_steps_are_joined_and_none_is_cut():
    text = "\n\n".join(["Okay.", "a" * 30, "b" * 30, "c" * 8])
    steps = lambda **limits: cut(text, Segmentation(rules=("paragraph",), **limits))
    assert steps(min_chars=0) == ["Okay.", "a" * 30, "b" * 30, "c" * 8]
    assert steps(min_chars=10) == ["Okay.\n\n" + "a" * 30, "b" * 30 + "\n\n" + "c" * 8]
    # The first pair would have 5 + 2 + 30 + 2 = 39 characters, the last 30 + 2 + 8 = 40.
    assert steps(min_chars=10, max_chars=40) == steps(min_chars=10)
    assert steps(min_chars=10, max_chars=38) == steps(min_chars=0)
    assert steps(min_chars=10, max_chars=39)[0] == steps(min_chars=10)[0]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rules": ("word",)}, r"segment\.rules is \('word',\); it must be a tuple of one or more"),
        ({"rules": ()}, r"segment\.rules is \(\)"),
        ({"rules": ("line", "line")}, "each once"),
        ({"rules": "line"}, r"segment\.rules is 'line'"),
        ({"markers": ("wait.*",)}, r"segment\.markers is \('wait\.\*',\); it must be a tuple of"),
        ({"markers": ()}, "the rule marker needs at least one"),
        ({"min_chars": -1}, r"segment\.min_chars is -1; it must be 0 or more"),
        ({"min_chars": 9, "max_chars": 8}, r"segment\.max_chars is 8; it must be at least 1 and"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Segmentation(**fields)


def test_adversarial_texts_take_linear_time():
    """50k characters each; together 0.2 s of CPU, and minutes where a rule was quadratic."""
    everything = Segmentation(rules=RULES)
    for text in (
        "." * 50_000, ". " * 25_000, " " * 50_000 + "x", "\n " * 25_000 + "x", "\\(" * 25_000,
        "\\[" * 25_000, "$" * 50_000, "$a " * 17_000, "\\begin{align}" * 4_000, "```a\n" * 10_000,
        '."""' * 12_000, "a." * 25_000, "word " * 10_000, "*" * 50_000,
    ):  # fmt: skip
        assert "".join(segment(text, everything)) == text


# ------------------------------------------------------------------------------- real traces


@pytest.fixture(scope="module")
def long_cot(shared_data):
    with gzip.open(shared_data / "long_cot/amc23.jsonl.gz", "rt") as lines:
        return [json.loads(line)["code"][0] for line in lines]


def test_real_traces(long_cot):
    """Lossless on all 560; as many steps as paragraphs at least, less what joining takes away."""
    assert len(long_cot) == 560
    whole = Segmentation(min_chars=0)
    for i, trace in enumerate(long_cot):
        steps = segment(trace)
        assert "".join(steps) == trace
        assert all(step.strip() for step in steps)
        if i % 5:
            continue
        unjoined = segment(trace, whole)
        paragraphs = len(segment(trace, PARAGRAPHS))
        assert len(unjoined) >= paragraphs
        # Joined steps begin where unjoined ones do.
        starts = lambda found: {sum(map(len, found[:i])) for i in range(len(found))}
        if len(unjoined) < 200:  # the sums are quadratic
            assert starts(steps) <= starts(unjoined)
        assert len(steps) <= len(unjoined)
        short = sum(len(step.strip()) < seg.DEFAULT.min_chars for step in unjoined)
        assert len(steps) >= len(unjoined) - short
        assert all(len(s.strip()) >= seg.DEFAULT.min_chars for s in steps) or len(steps) == 1
        for opener, closer in (("\\(", "\\)"), ("\\[", "\\]")):
            if trace.count(opener) == trace.count(closer):
                assert all(step.count(opener) == step.count(closer) for step in steps)

"""One letter is a choice; two, or none, or a word, is not."""

import pytest

from jaxreason import types
from jaxreason.rewards.choice import Choice
from jaxreason.text.chat import split_reasoning


@pytest.mark.parametrize(
    "text, letter",
    [
        ("\\boxed{B}", "B"),
        ("\\boxed{(B)}", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("\\boxed{\\textbf{(B) } 12}", "B"),
        ("\\boxed{b}", "B"),
        ("\\boxed{A} or rather \\boxed{B}", "B"),
        ("The answer is A. \\boxed{B}", "B"),
        ("The answer is B.", "B"),
        ("the final answer is: **(B)**", "B"),
        ("Answer: B", "B"),
        ("Answer is option B because A is wrong", "B"),
        ("The correct choice, (A), is no. (B)", "B"),
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("B) 12 apples", "B"),
        ("#### B", "B"),
        ("<answer>A</answer><answer> B </answer>", "B"),
        ("<think>\\boxed{A}</think>B", "B"),
        ("<think>B", None),
        ("\\boxed{A or B}", None),
        ("\\boxed{AB}", None),
        ("\\boxed{}", None),
        ("\\boxed{F}", None),
        ("the answer is A or B", None),
        ("the answer is (A) and (B)", None),
        ("the answer is Apple", None),
        ("A horse and a dog", None),
        ("", None),
        ("Be brave", None),
        ("42", None),
    ],
)
def test_letter_that_a_text_chooses(text, letter):
    assert Choice(split_reasoning).extract(split_reasoning(text)[1]) == letter


def test_values_breakdown_and_gold_answers():
    rows = [
        types.Completion(text, ids=(1,), logprobs=(0.0,), truncated=False)
        for text in ("(B)", "\\boxed{A}", "?")
    ]
    reward = Choice(split_reasoning)
    assert reward(rows, ["B", "(B)", "b"]) == ([1.0, 0.0, 0.0], {"answered": [1.0, 1.0, 0.0]})
    complaints = reward.complaints(["A", "(e)", "F", "", "12"])
    assert complaints[:2] == [None, None] and all("one of ABCDE" in c for c in complaints[2:])
    with pytest.raises(ValueError, match=r"^letters is 'abc'"):
        Choice(split_reasoning, letters="abc")

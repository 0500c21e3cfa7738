"""Length and repetition count tokens, the format counts tags; characters count for nothing."""

import pytest

from jaxreason import types
from jaxreason.rewards.format import Format
from jaxreason.rewards.shaping import Length, Repetition
from jaxreason.text.chat import split_reasoning


def completion(text="", ids=(1,)):
    return types.Completion(text, tuple(ids), logprobs=(0.0,) * len(ids), truncated=False)


def of_length(num_tokens, text=""):
    return completion(text, range(num_tokens))


def test_overlong_punishment_is_dapos():
    """The vectors of arXiv 2503.14476: Lmax 20480, Lc 4096."""
    length = Length(split_reasoning, max_tokens=20480, buffer_tokens=4096)
    sizes = [0, 16384, 18432, 20480, 30000]
    values, _ = length([of_length(size) for size in sizes], [""] * 5)
    assert values == [0.0, 0.0, -0.5, -1.0, -1.0]
    sudden = Length(split_reasoning, max_tokens=10)
    assert [sudden.value(n) for n in (10, 11)] == [0.0, -1.0]


def test_fault_06_characters_do_not_count():
    """Of two texts of the same tokens the longer one is worth the same, for every shape."""
    for shape in ("overlong", "cosine", "linear"):
        length = Length(split_reasoning, max_tokens=100, buffer_tokens=50, shape=shape)
        short, long = length([of_length(75, "a"), of_length(75, "a" * 10_000)], ["", ""])[0]
        assert short == long and -1 < short < 1


def test_cosine_and_linear_are_clamped_past_the_limit():
    cosine = Length(split_reasoning, max_tokens=100, shape="cosine", shortest=1.0, longest=0.5)
    linear = Length(split_reasoning, max_tokens=100, shape="linear", shortest=1.0, longest=0.5)
    for shape in (cosine, linear):
        assert [shape.value(n) for n in (0, 50, 100, 1000)] == pytest.approx([1, 0.75, 0.5, 0.5])
    assert cosine.value(25) == pytest.approx(0.5 + 0.5 * 0.853553, abs=1e-6)  # (1+cos(pi/4))/2
    assert linear.value(25) == pytest.approx(0.875)


def test_length_of_right_and_of_wrong_answers():
    rows = [of_length(10, "5"), of_length(10, "6")]
    for applies_to, expected in (("all", [0.5, 0.5]), ("right", [0.5, 0]), ("wrong", [0, 0.5])):
        length = Length(split_reasoning, 20, "linear", applies_to=applies_to)
        assert length(rows, ["5", "5"])[0] == expected


@pytest.mark.parametrize(
    "options, name",
    [
        ({"shape": "steep"}, "shape"),
        ({"applies_to": "some"}, "applies_to"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"buffer_tokens": 11}, "buffer_tokens"),
    ],
)
def test_impossible_lengths_are_named(options, name):
    with pytest.raises(ValueError, match=f"^{name} is"):
        Length(split_reasoning, **({"max_tokens": 10} | options))


def test_repetition_is_the_share_of_repeated_ngrams():
    penalty = Repetition(ngram=2)
    rows = [completion(ids=ids) for ids in ([1, 2, 3, 4], [1, 1, 1, 1, 1], [1, 2, 1, 2], [1], [])]
    assert penalty(rows, [""] * 5)[0] == pytest.approx([0, -0.75, -1 / 3, 0, 0])
    with pytest.raises(ValueError, match=r"^ngram is 0"):
        Repetition(ngram=0)


@pytest.mark.parametrize(
    "text, thinking, answer",
    [
        ("<think>a</think>b", 1, 1),
        ("\n<think>\na\n</think>\n\nb", 1, 1),
        ("a</think>b", 1, 1),  # the prompt ended with the opening tag
        ("b", 0, 1),
        ("", 0, 0),
        ("<think></think>b", 0, 1),
        ("<think>a</think>", 1, 0),
        ("<think>a", 0, 0),
        ("<think>a</think>b</think>c", 0, 1),
        ("<think><think>a</think>b", 0, 1),
        ("<think>a</think>b<think>c", 0, 1),
        ("first<think>a</think>b", 0, 1),
        ("<think>a</think>b<think>c</think>d", 0, 1),
    ],
)
def test_format_wants_one_think_block_and_an_answer(text, thinking, answer):
    values, breakdown = Format(split_reasoning)([completion(text)], [""])
    assert breakdown == {"thinking": [thinking], "answer": [answer]}
    assert values == [(thinking + answer) / 2]


@pytest.mark.parametrize(
    "where, good, bad",
    [
        ("boxed", "so \\boxed{5}", "so 5 \\boxed{}"),
        ("tags", "<answer>5</answer>", "<answer>5</answer><answer>6</answer>"),
        ("hashes", "so\n#### 5", "so #### \n"),
    ],
)
def test_format_wants_the_answer_where_it_belongs(where, good, bad):
    reward = Format(split_reasoning, answer=where)
    texts = [f"<think>a</think>{text}" for text in (good, bad)] + [f"<think>{good}</think>none"]
    assert reward([completion(text) for text in texts], [""] * 3)[0] == [1.0, 0.5, 0.5]


def test_format_without_thinking():
    reward = Format(split_reasoning, thinking=False)
    assert reward([completion("5"), completion("<think>a</think>5")], ["", ""])[0] == [1.0, 0.5]
    with pytest.raises(ValueError, match=r"^answer is 'x'"):
        Format(split_reasoning, answer="x")

"""Tags of published traces, on texts of each style and on real ones."""

import collections
import gzip
import json

import pytest

from jaxreason.text.traces import TraceFault, read_trace

SKY = "<|begin_of_thought|>\n\nA\n\nB\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nC\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nA\n\nB\n</think>\n\nC \n", ("A\n\nB", "C \n")),
        ("A\n</think>\n\nC", ("A", "C")),  # the template opened the thinking
        ("\n <think>A</think>C", ("A", "C")),
        ("<think>\n\n</think>\n\nC", ("", "C")),
        (SKY + "\n<|end_of_solution|> \n", ("A\n\nB", "C")),
        ("<|begin_of_thought|>A<|end_of_thought|>\nC", ("A", "C")),
        ("<|im_start|>think\nA\nB\n<|im_start|>answer\nAnswer: C", ("A\nB", "Answer: C")),
    ],
)
def test_each_style(text, expected):
    assert read_trace(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<think>\nA\nWait", "no end of thinking: <think> without </think>"),
        ("A\nWait", "no end of thinking: the text has no tag"),
        ("<|begin_of_thought|>A", "no end of thinking: <|begin_of_thought|> without"),
        ("<|im_start|>think\nA", "no end of thinking: <|im_start|>think without"),
        (SKY, "no end of the answer: <|begin_of_solution|> without <|end_of_solution|>"),
        (SKY + "<|end_of_solution|>And?", "text after <|end_of_solution|>"),
        ("<think>A</think>\n\n ", "no answer after </think>"),
        ("Well.\n<think>A</think>C", "text before <think>"),
    ],
)
def test_what_cannot_be_learnt_is_said(text, says):
    with pytest.raises(TraceFault) as error:
        read_trace(text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_text_without_tags_may_be_an_answer():
    assert read_trace("C", needs_thinking=False) == (None, "C")
    with pytest.raises(TraceFault):  # but one that is cut off may not
        read_trace("<think>\nA", needs_thinking=False)


def test_real_traces(shared_data):
    """Counts by `zgrep`: of 560, 388 open a thought, 289 of them end it, 283 end the solution."""
    found = collections.Counter()
    with gzip.open(shared_data / "long_cot" / "amc23.jsonl.gz") as lines:
        for line in lines:
            text = json.loads(line)["code"][0]
            try:
                reasoning, answer = read_trace(text)
            except TraceFault as fault:
                found[str(fault).split(":")[0], "begin_of_thought" in text] += 1
            else:
                found["read"] += 1
                assert reasoning in text and answer in text and "<|" not in reasoning + answer
    assert found == {
        "read": 283,
        ("no end of the answer", True): 6,
        ("no end of thinking", True): 99,
        ("no end of thinking", False): 172,
    }

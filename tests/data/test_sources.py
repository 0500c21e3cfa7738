"""From a config to records, and from records to texts and conversations."""

import pytest

from jaxreason.data import sources
from jaxreason.data.schemas import ChatExample, TextExample
from jaxreason.data.sources import SourceConfig, to_example
from jaxreason.text.chat import Message

CHAT = dict(path="a.jsonl", prompt_field="q", response_field="a")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(kind="tfds"), "data.sources.x.kind is 'tfds'"),
        (dict(text_field="text"), "data.sources.x.path is empty"),
        (dict(path="a.jsonl"), "either text_field, or response_field"),
        (dict(path="a.jsonl", prompt_field="q"), "either text_field, or response_field"),
        (dict(CHAT, text_field="t"), "either text_field, or response_field"),
        (dict(CHAT, prompt_template="{q}"), "prompt_template is '{q}'; set one of them"),
        (dict(CHAT, prompt_field="", prompt_template="{q.__class__}"), "in braces"),
        (dict(CHAT, prompt_field="", prompt_template="{q[0]}"), "in braces"),
        (dict(CHAT, prompt_field="", prompt_template="{"), "in braces"),
        (dict(CHAT, prompt_field="", prompt_template="no field"), "in braces"),
        (dict(CHAT, prompt_field="", prompt_template="{q!r}"), "in braces"),
        (dict(CHAT, reasoning="hashes"), "reasoning is 'hashes'"),
        (dict(CHAT, reasoning="split_hashes", reasoning_field="r"), "set one of them"),
        (dict(path="a.jsonl", text_field="t", reasoning_field="r"), "has no reasoning apart"),
        (dict(CHAT, rendering="answer"), "rendering is 'answer'; kind 'jsonl' has no use for it"),
        (dict(kind="arithmetic", rendering="cot", split="train"), "rendering is 'cot'"),
        (dict(kind="arithmetic", rendering="text", split="val"), "split is 'val'"),
        (
            dict(kind="arithmetic", rendering="text", split="test", text_field="t"),
            "text_field is 't'; kind 'arithmetic' has no use for it",
        ),
    ],
)
def test_mistakes_in_configs_are_one_line(fields, says):
    with pytest.raises(ValueError) as error:
        SourceConfig(name="x", **fields)
    assert says in str(error.value)
    assert "data.sources.x" in str(error.value)
    assert "\n" not in str(error.value)


def test_records_become_texts_and_conversations():
    text = SourceConfig(name="x", path="a.jsonl", text_field="t", strip_calculator=True)
    assert to_example(text, {"t": "1+1=<<1+1=2>>2 a<<b"}) == TextExample("1+1=2 a<<b")

    record = {"q": "1+1?", "n": 7, "a": 2, "r": "one and one"}
    chat = SourceConfig(name="x", **CHAT)
    expected = (Message("user", "1+1?"), Message("assistant", "2"))
    assert to_example(chat, record) == ChatExample(expected)
    fields = dict(prompt_field="", prompt_template="{n}. {q} {{}}", reasoning_field="r")
    templated = SourceConfig(name="x", **{**CHAT, **fields})
    expected = (Message("user", "7. 1+1? {}"), Message("assistant", "2", "one and one"))
    assert to_example(templated, record) == ChatExample(expected)


def test_arithmetic_renderings():
    record = dict(expression="1+2", answer="3", text="1+2=3", short_cot="s", long_cot="l")

    def example(rendering, **fields):
        config = SourceConfig(
            name="x", kind="arithmetic", rendering=rendering, split="train", **fields
        )
        return to_example(config, record)

    assert example("text") == TextExample("1+2=3")
    for rendering, reasoning in (("answer", None), ("short_cot", "s"), ("long_cot", "l")):
        expected = (Message("user", "1+2"), Message("assistant", "3", reasoning))
        assert example(rendering) == ChatExample(expected)
    asked = example("answer", prompt_template="{expression}=")
    assert asked.messages[0].content == "1+2="


def test_gsm8k_splits_into_solution_and_answer(shared_data, tmp_path):
    config = SourceConfig(
        name="gsm8k",
        path=str(shared_data / "gsm8k" / "train.jsonl.gz"),
        prompt_field="question",
        response_field="answer",
        reasoning="split_hashes",
        strip_calculator=True,
    )
    source = sources.open_source(config, tmp_path)
    assert (len(source), source.num_quarantined) == (7473, 0)  # INDEX.md
    _, assistant = to_example(config, source[0]).messages
    assert assistant.content == "#### 72"
    assert assistant.reasoning == (
        "Natalia sold 48/2 = 24 clips in May.\n"
        "Natalia sold 48+24 = 72 clips altogether in April and May."
    )
    for record in source:
        answer = to_example(config, record).messages[1]
        assert answer.content.startswith("#### ")
        assert answer.reasoning and "<<" not in answer.reasoning and "####" not in answer.reasoning


def test_a_response_without_hashes_is_quarantined(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "x", "a": "5"}\n{"q": "x", "a": "so #### 5"}\n')
    fields = dict(CHAT, path=str(tmp_path / "a.jsonl"), reasoning="split_hashes")
    source = sources.open_source(SourceConfig(name="x", **fields), tmp_path)
    assert (len(source), source.num_quarantined) == (1, 1)

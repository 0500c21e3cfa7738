"""Records by number: what is read, what is quarantined, what a user is told."""

import gzip
import json
import os
import pickle

import pytest

from jaxreason.data import sources
from jaxreason.data.sources import ChatExample, JsonlSource, SourceConfig, TextExample, to_example
from jaxreason.text.chat import Message

GOOD = [{"q": "one é", "a": "1"}, {"q": "two", "a": 2}, {"q": "three", "a": 3.5, "more": [1]}]
BAD = [
    (b'{"q": "cut', "not JSON"),
    (b'["q", "a"]', "not a JSON object but list"),
    (b'{"q": "no answer"}', "field 'a' is missing"),
    (b'{"q": "x", "a": ["1"]}', "field 'a' is list"),
    (b'{"q": "x", "a": true}', "field 'a' is bool"),
    (b'{"q": "x", "a": null}', "field 'a' is NoneType"),
    (b'{"q": "\\ud800", "a": "1"}', "half of a surrogate pair"),
    (b'{"q": "\xff", "a": "1"}', "not JSON"),
    (b'{"a":' * 100_000, "not JSON"),
]
FIELDS = {"q": "", "a": ""}


def mixed_lines():
    """Good, bad, good, bad, ... with a blank line, and the 1-based numbers of the good ones."""
    lines, good_at = [b"   "], []
    good = [json.dumps(record, ensure_ascii=False).encode() for record in GOOD]
    for number, (line, _) in enumerate(BAD):
        lines.append(line)
        if number < len(good):
            lines.append(good[number])
            good_at.append(len(lines))
    return lines, good_at


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_malformed_lines_are_quarantined_counted_and_skipped(tmp_path, suffix):
    lines, good_at = mixed_lines()
    path, data_dir = tmp_path / f"a{suffix}", tmp_path / "data"
    with (gzip.open if suffix.endswith("gz") else open)(path, "wb") as out:
        out.write(b"\n".join(lines))  # without a last line break
    for _ in range(2):  # the second time from the cached index, and nothing is listed twice
        source = JsonlSource(str(path), fields=FIELDS, data_dir=data_dir)
        assert [source[i] for i in range(len(source))] == GOOD
        assert [source.line(i) for i in range(3)] == [f"{path} line {n}" for n in good_at]
        assert source.num_quarantined == len(BAD)
        entries = [json.loads(line) for line in open(data_dir / "quarantine.jsonl")]
        assert len(entries) == len(BAD)
        for entry, (line, reason) in zip(entries, BAD):
            assert entry["file"] == str(path)
            assert lines[entry["line"] - 1] == line
            assert reason in entry["reason"]
            assert entry["text"] == line.decode(errors="replace")[:200]
    assert source[-1] == GOOD[-1]
    with pytest.raises(IndexError):
        source[3]


def test_index_is_read_again_only_when_the_file_or_the_fields_change(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "one", "a": "1"}\n')
    read = []
    find = sources._find_fault
    monkeypatch.setattr(sources, "_find_fault", lambda *a: read.append(a) or find(*a))

    def num_read(fields):
        read.clear()
        JsonlSource(str(path), fields=fields, data_dir=tmp_path)
        return len(read)

    assert num_read(FIELDS) == 1
    assert num_read(FIELDS) == 0
    assert num_read({"q": ""}) == 1
    path.write_text('{"q": "one", "a": "1"}\n{"q": "two", "a": "2"}\n')
    assert num_read(FIELDS) == 2
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert num_read(FIELDS) == 2


def test_several_files_patterns_and_pickle(tmp_path, monkeypatch):
    for name, values in (("a-1", [0, 1]), ("a-2", [2]), ("b", [3, 4])):
        text = "".join(json.dumps({"q": n}) + "\n" for n in values)
        (tmp_path / f"{name}.jsonl").write_text(text)
    paths = [str(tmp_path / "b.jsonl"), str(tmp_path / "a-*.jsonl")]
    source = JsonlSource(paths, fields={"q": ""}, data_dir=tmp_path / "data")
    values = [source[i]["q"] for i in range(len(source))]
    assert values == [3, 4, 0, 1, 2]
    copy = pickle.loads(pickle.dumps(source))
    assert [record["q"] for record in copy] == values
    # A relative path is looked for here first, then in the data root.
    monkeypatch.setenv("JAXREASON_DATA", str(tmp_path))
    assert len(JsonlSource("a-*.jsonl", fields={"q": ""}, data_dir=tmp_path / "data")) == 3
    elsewhere = tmp_path / "here"
    elsewhere.mkdir()
    (elsewhere / "b.jsonl").write_text('{"q": "here"}\n')
    monkeypatch.chdir(elsewhere)
    assert JsonlSource("b.jsonl", fields={"q": ""}, data_dir=tmp_path / "data")[0]["q"] == "here"


def write(path, content):
    path.write_bytes(content)
    return path.name


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: "missing.jsonl", "data.sources.x.path is 'missing.jsonl'; no such file"),
        (lambda d: write(d / "a.json", b"{}"), "it must be .jsonl or .jsonl.gz"),
        (lambda d: write(d / "bad.jsonl", b"{\n[1]\n"), "no valid record (2 malformed"),
        (lambda d: write(d / "z.jsonl.gz", b"no gzip"), "no complete gzip file"),
        (
            lambda d: write(d / "y.jsonl.gz", gzip.compress(b'{"q": 1}\n' * 9)[:-9]),
            "no complete gzip file",
        ),
    ],
)
def test_mistakes_in_files_are_one_line(tmp_path, monkeypatch, make, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        JsonlSource(make(tmp_path), fields={}, data_dir=tmp_path / "d", key="data.sources.x.path")
    assert says in str(error.value)
    assert "data.sources.x.path" in str(error.value)
    assert "\n" not in str(error.value)


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

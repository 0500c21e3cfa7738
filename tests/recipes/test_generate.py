"""Chat and a file of questions, in process, on a tiny random checkpoint; and how text is shown."""

import io
import json

import jax
import pytest

from jaxreason import launch
from jaxreason.recipes import assemble, terminal
from jaxreason.text import chat
from jaxreason.text.tokenizer import ByteTokenizer
from jaxreason.types import Completion, Sampling, ThinkingBudget
from tests.conftest import ROOT

BYTES = ByteTokenizer()
TAGS = chat.DEFAULT_TAGS
PLAIN = chat.template_for("plain", BYTES)
QWEN3 = chat.template_for("qwen3", BYTES)


@pytest.fixture
def one_device(monkeypatch):
    """Compiles in a tenth of the time for the suite's eight."""
    monkeypatch.setattr(assemble, "device_mesh", lambda mesh: None)


def command(checkpoint, tmp_path, *overrides) -> list[str]:
    said = {"init.from": checkpoint, "sampling.max_tokens": 8, "rows": 4}
    flags = [f"--config.{key}={value}" for key, value in said.items()]
    flags += ["--config.run.compilation_cache=", f"--workdir={tmp_path}/never"]
    return [f"--config={ROOT}/configs/generate.py", *flags, *overrides]


# ------------------------------------------------------------------------------- the whole recipe


def test_a_pipe_gets_an_answer_for_each_line_and_nothing_is_left_behind(
    checkpoint, one_device, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n/reset\nWhy?\n/quit\nNo\n"))
    assert launch.main(command(checkpoint, tmp_path)) == 0
    answers = capsys.readouterr().out
    assert answers.endswith("\n") and answers.count("\n") >= 2
    assert "\x1b" not in answers and "forgotten" not in answers and "parameters" not in answers
    assert not list(tmp_path.iterdir())


def test_a_file_of_questions_becomes_a_file_of_answers_and_goes_on_after_a_kill(
    checkpoint, one_device, tmp_path, capsys
):
    questions = [{"question": f"{i}+{i}?", "answer": "x"} for i in range(5)]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps(q) + "\n" for q in questions))
    output = tmp_path / "deep" / "answers.jsonl"
    run = command(
        checkpoint, tmp_path, f"--config.prompts={asked}", f"--config.output={output}",
        "--config.prompt_template=Q: {question}", "--config.save_every=2",
        "--config.sampling.num_samples=2",
    )  # fmt: skip
    assert launch.main(run) == 0
    whole = output.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["prompt"] for line in lines] == [f"Q: {q['question']}" for q in questions]
    assert all(len(line["completions"]) == 2 for line in lines)
    for completion in lines[0]["completions"]:
        assert set(completion) == {"text", "answer", "num_tokens", "truncated"}
        assert 1 <= completion["num_tokens"] <= 8
    assert lines[0]["made_by"]["from"] == str(checkpoint)
    assert "5/5" in capsys.readouterr().out

    cut = whole.splitlines(keepends=True)
    output.write_text("".join(cut[:3]) + cut[3][:20])  # killed inside the second part
    assert launch.main(run) == 0
    assert output.read_text() == whole
    for other in ("sampling.temperature=1.5", "save_every=3"):  # both change what is drawn
        assert launch.main([*run, f"--config.{other}"]) == 2
        assert "something else than answers to these questions" in capsys.readouterr().err
    assert output.read_text() == whole


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["--config.init.from=@sft"], "init.from is '@sft'; there is no run to take it from"),
        (["--config.sampling.top_p=2.0"], "sampling.top_p is 2.0; it must be in (0, 1]"),
        (["--config.sampling.stop=('',)"], "sampling.stop is ('',); it must be a tuple of texts"),
        (["--config.sampling.stop_ids=(-1,)"], "sampling.stop_ids is (-1,); it must be a tuple"),
        (
            ["--config.sampling.thinking.wording=s2"],
            "thinking.wording is 's2'; it must be one of s1, qwen3, tag",
        ),
        (["--config.sampling.thinking.waits=-1"], "thinking.waits is -1; it must be 0 or more"),
        (["--config.remember=maybe"], "remember is 'maybe'; it must be auto, true or false"),
        (["--config.prompt_template=none"], "prompt_template is 'none'; it must be text with"),
        (["--config.prompt_template={a} {"], "prompt_template is '{a} {'; it must be text with"),
        (["--config.prompt_template={a}"], "in a conversation its one field is {prompt}"),
        (["--config.prompts=gone.txt"], "prompts is 'gone.txt'; no such file"),
        (["--config.prompts=gone.jsonl"], "prompts is 'gone.jsonl'; no such file"),
        (["--config.prompts=empty.txt"], "a text of 0 questions"),
        (["--config.prompts=bad.jsonl"], "bad.jsonl line 2: field 'prompt' is missing"),
        (["--config.prompts=good.txt", "--config.output="], "output is ''; it must name a file"),
        (["--config.prompts=good.txt", "--config.output=good.txt"], "something else than answers"),
        (["--config.prompts=good.txt", "--config.output=list.json"], "something else than answers"),
        (["--config.prompts=good.txt", "--config.save_every=0"], "save_every is 0; it must be"),
    ],
)
def test_a_mistake_is_one_line(checkpoint, tmp_path, monkeypatch, capsys, overrides, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "good.txt").write_text("Why?\n")
    (tmp_path / "list.json").write_text("[]\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1"}\n{"question": "2"}\n')
    assert launch.main(command(checkpoint, tmp_path, *overrides)) == 2
    shown = capsys.readouterr()
    assert says in shown.err and shown.err.count("\n") == 1 and not shown.out


# --------------------------------------------------------------------------------- a conversation


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


def fake_speaker(texts, asked=None, template=QWEN3):
    """Says these texts in turn, a byte at a time; an Exception is raised in its middle."""
    left = iter(texts)

    def answer(conversations, sampling, key, on_tokens):
        text = next(left)
        if asked is not None:
            asked.append((conversations[0], sampling, key))
        if isinstance(text, BaseException):
            on_tokens(0, 0, [ord("a")])
            raise text
        ids = [*BYTES.encode(text), BYTES.eos_id]
        for i in ids:
            on_tokens(0, 0, [i])
        return [[Completion(text, tuple(ids), (0.0,) * len(ids), False)]]

    return terminal.Speaker(answer, template, BYTES, jax.random.key(0))


def talk(speaker, lines, out, remember=True, sampling=Sampling(max_tokens=9)):
    screen = terminal.Screen(out, TAGS)
    terminal.converse(speaker, sampling, "Q {}".format, remember, iter(lines), screen)
    return out.getvalue()


def test_earlier_turns_are_remembered_until_a_reset():
    asked = []
    texts = ["<think>\nhm\n</think>\n\n4", "5", "6"]
    out = talk(
        fake_speaker(texts, asked), ["a", "", "b", "/reset", "c", "/quit", "d"], io.StringIO()
    )
    assert out == "<think>\nhm\n</think>\n\n4\n5\n6\n"
    user = lambda text: chat.Message("user", f"Q {text}")
    first = chat.Message("assistant", "4", "hm")
    assert [turns for turns, _, _ in asked] == [
        (user("a"),),
        (user("a"), first, user("b")),
        (user("c"),),
    ]
    keys = {jax.random.key_data(key).tobytes() for _, _, key in asked}
    assert len(keys) == 3  # a question asked again may be answered otherwise


def test_a_template_for_one_question_forgets():
    asked = []
    talk(fake_speaker(["1", "2"], asked, PLAIN), ["a", "b"], io.StringIO(), remember=False)
    assert [len(turns) for turns, _, _ in asked] == [1, 1]


def test_think_sets_the_budget_and_keeps_the_rest_of_it():
    asked = []
    waiting = Sampling(max_tokens=9, thinking=ThinkingBudget(wording="qwen3", waits=2))
    lines = ["/think 64", "a", "/think off", "b"]
    talk(fake_speaker("12", asked), lines, io.StringIO(), sampling=waiting)
    assert [s.thinking for _, s, _ in asked] == [
        ThinkingBudget(max_tokens=64, wording="qwen3", waits=2),
        waiting.thinking,
    ]
    asked.clear()
    talk(fake_speaker("12", asked), lines, io.StringIO())
    assert [s.thinking for _, s, _ in asked] == [ThinkingBudget(max_tokens=64), None]


@pytest.mark.parametrize("line", ["/thing", "/think", "/think -3", "/think 1 2", "/reset now"])
def test_an_unknown_command_ends_a_pipe_and_not_a_terminal(line):
    with pytest.raises(ValueError, match=f"'{line}' is no command: /reset"):
        talk(fake_speaker("1"), [line, "a"], io.StringIO())
    out = talk(fake_speaker("1"), [line, "a"], FakeTerminal())
    assert "is no command" in out and out.endswith("1\x1b[0m\n")


def test_an_answer_that_is_stopped_or_too_long_was_never_asked_for():
    for error in (KeyboardInterrupt(), ValueError("the prompt has 9 tokens")):
        asked = []
        out = talk(fake_speaker([error, "5"], asked), ["a", "b"], FakeTerminal())
        assert [len(turns) for turns, _, _ in asked] == [1, 1]
        assert ("stopped" if isinstance(error, KeyboardInterrupt) else "9 tokens") in out
        with pytest.raises(type(error)):
            talk(fake_speaker([error]), ["a"], io.StringIO())


def test_thinking_is_dim_on_a_terminal_however_it_arrives():
    out = talk(fake_speaker(["<think>hm</think>4"]), ["a"], FakeTerminal())
    assert out == "\x1b[2m<think>hm</think>\x1b[0m4\x1b[0m\n"


# ------------------------------------------------------------------------------- growing text


def stream(stop=()):
    return terminal.Stream(BYTES.decode, (BYTES.eos_id,), (TAGS.open, TAGS.close), stop)


@pytest.mark.parametrize("text", ["é", "数学 → 42", "a🙂b🙂", "naïve"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_part_of_a_character_is_ever_shown(text, size):
    s, ids = stream(), [*text.encode(), BYTES.eos_id]
    pieces = [s.feed(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text and s.finish(text) == ""
    shown = ""
    for i, piece in enumerate(pieces):  # and a character is shown as soon as it is whole
        shown += piece
        assert shown == bytes(ids[: (i + 1) * size][: len(text.encode())]).decode(errors="ignore")


def test_bytes_that_are_no_character_are_shown_at_the_end():
    s = stream()
    assert s.feed([ord("a"), 0xF0, 0x9F]) == "a"
    assert s.finish(BYTES.decode([ord("a"), 0xF0, 0x9F])) == "\ufffd"


def test_tags_are_shown_whole_and_stop_texts_not_at_all():
    s = stream(stop=("\nQ:",))
    pieces = [s.feed([byte]) for byte in b"a<think>b<b\nQ: more"]
    assert "<think>" in pieces and pieces[:2] == ["a", ""]
    assert "".join(pieces) == "a<think>b<b"
    assert s.finish("a<think>b<b") == ""


def test_a_half_tag_at_the_end_is_shown_in_the_end():
    s = stream()
    assert s.feed(b"1 < 2 <") == "1 < 2 "
    assert s.finish("1 < 2 <") == "<"

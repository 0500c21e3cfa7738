"""Chat templates: the role mask, exact prefixes, the same text as transformers."""

import itertools
import json
import pickle

import numpy as np
import pytest

from jaxreason.text import chat
from jaxreason.text.chat import Message
from jaxreason.text.tokenizer import ByteTokenizer, load_tokenizer

CONVERSATIONS = {
    "single": [
        Message("user", "What is 17 + 25?"),
        Message("assistant", "42", "17 + 25 = 42.\nYes."),
    ],
    "several turns": [
        Message("system", "You are careful."),
        Message("user", "Add 3 and 4."),
        Message("assistant", "The answer is 7.", "3 + 4 = 7"),
        Message("user", "Now double it, 日本語 😀"),
        Message("assistant", "**14**\n\nDone.  "),
        Message("user", "And again?"),
        Message("assistant", "28", "\n\n14 * 2\n = 28\n"),
    ],
    "tools": [
        Message("user", "Look it up."),
        Message("assistant", "I shall.", "I need both."),
        Message("tool", "first"),
        Message("tool", '{"second": 2}'),
        Message("assistant", "Found: first and 2."),
        Message("user", "Thanks"),
    ],
    # Encoded whole, the plain template's "What is four" would be other ids than its two parts.
    "words across a cut": [
        Message("user", "What is fo"),
        Message("assistant", "urteen"),
        Message("user", "And twen"),
        Message("assistant", "ty\n", "\n\n two tens"),
    ],
    "think block inside the content": [
        Message("user", "2 * 3?"),
        Message("assistant", "<think>\ntwo threes\n</think>\n\n6"),
    ],
}
CASES = pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
TEMPLATES = pytest.mark.parametrize("name", chat.TEMPLATES)
ANGLES = chat.ThinkTags("<<reason>>", "<</reason>>")


@pytest.fixture(scope="module")
def qwen3(shared_data):
    return load_tokenizer(shared_data / "tokenizer_qwen3")


@pytest.fixture(scope="module")
def pad_is_eos(tmp_path_factory):
    """A Hugging Face directory whose padding token is its end token, as many published ones."""
    folder = tmp_path_factory.mktemp("pad_is_eos")
    ByteTokenizer().save(folder)
    (folder / "jaxreason_tokenizer.json").unlink()
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


@CASES
@TEMPLATES
def test_training_ids_are_the_prompt_then_the_completion(messages, name, qwen3):
    """Peer fault 17, at every assistant turn: what the sampler saw and drew is what is trained."""
    for tokenizer in (ByteTokenizer(), qwen3):
        template = chat.template_for(name, tokenizer)
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            ids, weights = chat.encode_conversation(tokenizer, template, messages[: i + 1])
            prompt = chat.encode_prompt(tokenizer, template, messages[:i])
            completion = tokenizer.encode(template.render_completion(message))
            assert ids.tolist() == prompt + completion
            whole, _ = chat.encode_conversation(tokenizer, template, messages)
            assert whole[: len(ids)].tolist() == ids.tolist()
            # The think blocks of earlier turns stay; the stock template drops them.
            thoughts = [m.reasoning.strip("\n") for m in messages[: i + 1] if m.reasoning]
            text = tokenizer.decode(ids.tolist())
            assert all(thought in text for thought in thoughts)
            assert weights[len(prompt)] == 1


@TEMPLATES
def test_an_answer_is_asked_for_right_after_a_whole_reasoning(name):
    """Every word of a prefix of the thinking, its end, and nothing of the answer."""
    tokenizer = ByteTokenizer()
    template = chat.template_for(name, tokenizer)
    user, thought = Message("user", "20 * 1?"), "two tens\nANSWER: 20"
    asked = chat.encode_to_answer(tokenizer, template, [user], thought)
    whole, _ = chat.encode_conversation(
        tokenizer, template, [user, Message("assistant", "20", reasoning=thought)]
    )
    rest = tokenizer.encode("20" + template.eos)
    assert asked + rest == whole[: len(asked) + len(rest)].tolist()


@CASES
@TEMPLATES
def test_only_completions_are_learnt_and_all_of_them_with_their_end(messages, name, qwen3):
    for tokenizer in (ByteTokenizer(), qwen3):
        template = chat.template_for(name, tokenizer)
        ids, weights = chat.encode_conversation(tokenizer, template, messages)
        assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
        assert ids.shape == weights.shape
        learnt = tokenizer.decode(ids[weights == 1].tolist())
        completions = [template.render_completion(m) for m in messages if m.role == "assistant"]
        # The line break after the end token is written by the format, not drawn by the sampler.
        assert learnt == "".join(text.removesuffix("\n") for text in completions)


@CASES
@TEMPLATES
def test_reasoning_and_answer_weigh_apart(messages, name, qwen3):
    """Tags are the reasoning's, the end of the turn is the answer's, and no id is another."""
    for tokenizer in (ByteTokenizer(), qwen3):
        template = chat.template_for(name, tokenizer)
        ids, learnt = chat.encode_conversation(tokenizer, template, messages)
        weighed, weights = chat.encode_conversation(
            tokenizer, template, messages, reasoning_weight=0.25, answer_weight=3
        )
        assert np.array_equal(ids, weighed)
        assert np.array_equal(weights > 0, learnt > 0)
        expected = []
        for message in messages:
            if message.role != "assistant":
                continue
            text = template.render_completion(message)
            end = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
            drawn = text[: text.index("<|im_end|>") + len("<|im_end|>")]
            expected.append((drawn[:end], drawn[end:]))
        # Neighbours of one weight are one span: those of each turn, in order.
        bounds = np.flatnonzero(np.diff(weights, prepend=0, append=0))
        spans = [
            (weights[a], tokenizer.decode(ids[a:b].tolist())) for a, b in itertools.pairwise(bounds)
        ]
        spans = [(weight, text) for weight, text in spans if weight]
        flat = [pair for both in expected for pair in zip((0.25, 3), both) if pair[1]]
        assert spans == flat
        assert all(text.endswith("<|im_end|>") for weight, text in spans if weight == 3)


def test_weights_of_zero_and_templates_without_the_tag(tmp_path):
    tokenizer = ByteTokenizer()
    template = chat.template_for("qwen3", tokenizer)
    messages = CONVERSATIONS["single"]
    ids, weights = chat.encode_conversation(tokenizer, template, messages, reasoning_weight=0)
    assert tokenizer.decode(ids[weights > 0].tolist()) == "\n\n42<|im_end|>"
    ids, weights = chat.encode_conversation(tokenizer, template, messages, answer_weight=0)
    learnt = tokenizer.decode(ids[weights > 0].tolist())
    assert learnt == "<think>\n17 + 25 = 42.\nYes.\n</think>"
    jinja = tmp_path / "tagless.jinja"
    jinja.write_text(
        "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.reasoning_content }}"
        "{{ m.content }}<|im_end|>\n{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
    )
    tagless = chat.template_for(str(jinja), tokenizer)
    assert chat.encode_conversation(tokenizer, tagless, messages)[1].any()
    with pytest.raises(ValueError, match="without </think>, so that it cannot be weighed apart"):
        chat.encode_conversation(tokenizer, tagless, messages, answer_weight=0)


@TEMPLATES
def test_end_is_learnt_where_padding_is_the_same_id(name, pad_is_eos):
    """Peer fault 5: a mask made from `ids != pad_id` would leave the end out of the loss."""
    assert pad_is_eos.pad_id == pad_is_eos.eos_id
    template = chat.template_for(name, pad_is_eos)
    messages = CONVERSATIONS["several turns"]
    ids, weights = chat.encode_conversation(pad_is_eos, template, messages)
    assert weights[ids == pad_is_eos.eos_id].sum() == 3  # one for each assistant turn
    last = np.flatnonzero(weights)[-1]
    assert ids[last] == pad_is_eos.eos_id


def test_any_role_can_be_trained():
    tokenizer = ByteTokenizer()
    messages = CONVERSATIONS["single"]
    plain, qwen3 = (chat.template_for(name, tokenizer) for name in ("plain", "qwen3"))
    _, weights = chat.encode_conversation(tokenizer, plain, messages, ("user", "assistant"))
    assert weights.all()
    ids, weights = chat.encode_conversation(tokenizer, qwen3, messages, ("user",))
    learnt = tokenizer.decode(ids[weights == 1].tolist())
    assert learnt == "<|im_start|>user\nWhat is 17 + 25?<|im_end|>"
    _, weights = chat.encode_conversation(tokenizer, qwen3, messages, ())
    assert not weights.any()


def test_the_texts_of_both_templates():
    user, answer = CONVERSATIONS["single"]
    qwen3, plain = (chat.template_for(name, ByteTokenizer()) for name in ("qwen3", "plain"))
    prompt = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
    assert qwen3.render_prompt([user]) == prompt
    assert qwen3.render_prompt([user], thinking=False) == prompt + "<think>\n\n</think>\n\n"
    thought = "<think>\n17 + 25 = 42.\nYes.\n</think>\n\n42<|im_end|>\n"
    assert qwen3.render_completion(answer) == thought
    bare = Message("assistant", "42")
    assert qwen3.render_completion(bare) == "<think>\n\n</think>\n\n42<|im_end|>\n"
    assert plain.render_prompt([user]) == "What is 17 + 25?"
    assert plain.render_completion(bare) == "42<|im_end|>"
    assert plain.render_completion(answer) == "<think>17 + 25 = 42.\nYes.</think>42<|im_end|>"


def _as_dicts(messages):
    return [
        {"role": m.role, "content": m.content}
        | ({} if m.reasoning is None else {"reasoning_content": m.reasoning})
        for m in messages
    ]


@CASES
def test_qwen3_is_the_published_training_template(messages, qwen3, shared_data):
    """The same ids for ordinary content, although transformers encodes the whole text at once."""
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "tokenizer_qwen3"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    training = (folder / "chat_template_training.jinja").read_text()
    template = chat.template_for("qwen3", qwen3)
    options = {"chat_template": training, "return_dict": False}
    dicts = _as_dicts(messages)
    whole = theirs.apply_chat_template(dicts, **options)
    assert chat.encode_conversation(qwen3, template, messages)[0].tolist() == whole
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        for thinking in (True, False):
            prompt = theirs.apply_chat_template(
                dicts[:i], add_generation_prompt=True, enable_thinking=thinking, **options
            )
            assert chat.encode_prompt(qwen3, template, messages[:i], thinking) == prompt


@CASES
@TEMPLATES
@pytest.mark.parametrize("tags", [chat.DEFAULT_TAGS, ANGLES], ids=["default", "own"])
def test_exported_jinja_renders_what_we_render(messages, name, tags, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = ByteTokenizer()
    template = chat.template_for(name, tokenizer, tags)
    tokenizer.save(tmp_path, chat_template=template.jinja)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)

    def render(messages, **options):
        return theirs.apply_chat_template(_as_dicts(messages), tokenize=False, **options)

    ids, _ = chat.encode_conversation(tokenizer, template, messages)
    assert render(messages) == tokenizer.decode(ids.tolist())
    for thinking in (True, False):
        prompt = template.render_prompt(messages[:1], thinking)
        options = {"add_generation_prompt": True, "enable_thinking": thinking}
        assert render(messages[:1], **options) == prompt


@pytest.mark.parametrize(
    "text, expected",
    [
        ("42", (None, "42")),
        ("<think>\na\nb\n</think>\n\n42", ("a\nb", "42")),
        ("<think>a</think>42\n", ("a", "42\n")),
        ("<think>\n\n</think>\n\n42", ("", "42")),
        ("the prompt opened it</think>42", ("the prompt opened it", "42")),
        ("<think>a</think>b<think>c</think>d", ("a</think>b<think>c", "d")),
        ("<think>\nnever closed", ("never closed", "")),
        ("", (None, "")),
    ],
)
def test_split_reasoning(text, expected):
    assert chat.split_reasoning(text) == expected
    own = text.replace("<think>", ANGLES.open).replace("</think>", ANGLES.close)
    moved = tuple(
        part and part.replace("<think>", ANGLES.open).replace("</think>", ANGLES.close)
        for part in expected
    )
    assert chat.split_reasoning(own, ANGLES) == moved


@TEMPLATES
def test_split_reasoning_undoes_a_completion(name):
    template = chat.template_for(name, ByteTokenizer())
    for message in (m for c in CONVERSATIONS.values() for m in c if m.reasoning):
        text = template.render_completion(message).removesuffix("\n").removesuffix(template.eos)
        assert chat.split_reasoning(text) == (message.reasoning.strip("\n"), message.content)


def test_mistakes_are_one_line(tmp_path):
    tokenizer = ByteTokenizer()
    messages = CONVERSATIONS["single"]
    with pytest.raises(
        ValueError, match="chat template is 'alpaca'; known templates: qwen3, plain"
    ):
        chat.template_for("alpaca", tokenizer)
    with pytest.raises(ValueError, match="message role is 'bot'; known roles: system, user"):
        Message("bot", "x")
    with pytest.raises(ValueError, match="a user message has a reasoning"):
        Message("user", "x", "y")
    with pytest.raises(ValueError, match="train_roles holds 'assistent'"):
        chat.encode_conversation(
            tokenizer, chat.template_for("qwen3", tokenizer), messages, ("assistent",)
        )
    tokenizer.save(tmp_path)
    (tmp_path / "jaxreason_tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    other = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"qwen3 ends turns with '<\|im_end\|>', the tokenizer"):
        chat.template_for("qwen3", other)
    with pytest.raises(ValueError, match=r"plain does not teach the end .* '<\|endoftext\|>'"):
        chat.encode_conversation(other, chat.template_for("plain", tokenizer), messages)
    plain = chat.template_for("plain", other)
    assert plain.render_completion(messages[1]).endswith("42<|endoftext|>")


@TEMPLATES
def test_templates_travel_to_data_workers(name):
    template = chat.template_for(name, ByteTokenizer())
    assert pickle.loads(pickle.dumps(template)) == template

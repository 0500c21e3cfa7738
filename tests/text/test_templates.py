"""Templates of published folders: transformers' text, its mask, and what cannot be trained on."""

import datetime
import json

import family_folders as families
import jinja2
import numpy as np
import pytest

from jaxreason.text import chat, jinja
from jaxreason.text.chat import Message
from jaxreason.text.tokenizer import load_tokenizer

TURNS = [
    ("user", "What is 17 + 25?"),
    ("assistant", "42", "17 + 25 = 42.\nYes."),
    ("user", "日本語で😀 \u202eabc <|im_start|>{{ 7 * 7 }}\n"),
    ("assistant", "  **四十二**\n\nDone.  ", "\n\nfirst\n second \n"),
    ("user", ""),
    ("assistant", "<think>\ntwo threes\n</think>\n\n6"),
    ("user", "  and e\u0301 then?  "),
    ("assistant", ""),
]
SYSTEM = ("system", "You are careful.\n\t")
TOOLS = [("tool", "first"), ("tool", '{"second": [2, "é<"]}')]
CONVERSATIONS = [
    tuple(Message(*turn) for turn in turns)
    for length in range(1, len(TURNS) + 1)
    for turns in (TURNS[:length], [SYSTEM, *TURNS[:length]], TURNS[length - 1 : length])
] + [
    tuple(Message(*turn) for turn in [*before, *turns])
    for before in ([], [SYSTEM])
    for turns in (
        [*TURNS[:2], *TOOLS],
        [*TURNS[:1], ("assistant", "I shall look.", "I need both."), *TOOLS, *TURNS[1:4]],
        [*TURNS[:1], ("assistant", "<think>a</think>b"), TOOLS[0], ("assistant", "c", "d")],
    )
]
TEMPLATES = (*families.FAMILIES, "training")
NAMES = pytest.mark.parametrize("name", TEMPLATES)


@pytest.fixture(scope="module")
def known(shared_data, tmp_path_factory):
    """name -> (folder or file, our tokenizer that ends turns as it does, transformers')."""
    reason = "the reference for templates is transformers' apply_chat_template"
    transformers = pytest.importorskip("transformers", reason=reason)
    base, found = tmp_path_factory.mktemp("templates"), {}
    for name in families.FAMILIES:
        folder = families.make(name, base / name, shared_data)
        ours = chat.fitted(load_tokenizer(folder), str(folder))
        found[name] = (str(folder), ours, transformers.AutoTokenizer.from_pretrained(folder))
    training = shared_data / "tokenizer_qwen3" / "chat_template_training.jinja"
    theirs = transformers.AutoTokenizer.from_pretrained(base / "qwen3")
    theirs.chat_template = training.read_text()
    return found | {"training": (str(training), found["qwen3"][1], theirs)}


def outcome(render) -> str:
    """The text, or that there is none: what a template refuses, both refuse."""
    try:
        return render()
    except (ValueError, jinja2.TemplateError) as error:
        return f"refused: {' '.join(str(error).split())}"


@NAMES
def test_thirty_conversations_render_as_in_transformers(known, name):
    path, ours, theirs = known[name]
    template = chat.template_for(path, ours)
    assert len(CONVERSATIONS) == 30
    refused, texts = 0, set()
    for messages in CONVERSATIONS:
        dicts = template.as_dicts(messages)
        for prompt in (True, False):
            for thinking in (True, False):
                options = {"add_generation_prompt": prompt, "enable_thinking": thinking}
                text = outcome(lambda: template.render(messages, **options).text)
                want = lambda: theirs.apply_chat_template(dicts, tokenize=False, **options)
                expected = outcome(want)
                text = text.replace(f"refused: chat template {path}: ", "refused: ")
                assert text == expected
                refused += expected.startswith("refused")
                texts.add(text)
    # Gemma's form has no tools and begins with the user; Qwen's cannot take a lone system turn.
    assert refused == {"gemma3": 4 * (4 + 6)}.get(name, 0)
    # Thinking off shows in the prompts of Qwen3 only.
    assert len(texts) > (80 if name in ("qwen3", "training") else 30)


@NAMES
def test_prompt_ids_are_those_of_transformers(known, name):
    """Prompts of ordinary conversations, encoded by them whole and by us in pieces."""
    path, ours, theirs = known[name]
    template = chat.template_for(path, ours)
    asked = [Message(*turn) for turn in TURNS[:3]]
    for messages in (asked[:1], asked, [Message(*SYSTEM), *asked]):
        for thinking in (True, False):
            options = {"add_generation_prompt": True, "enable_thinking": thinking}
            dicts = template.as_dicts(messages)
            expected = theirs.apply_chat_template(dicts, return_dict=False, **options)
            assert chat.encode_prompt(ours, template, messages, thinking) == expected


def test_more_variables_and_filters_are_as_in_transformers(known):
    """Tools, documents, tojson, loop controls, namespaces, dates and any other variable."""
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m | tojson(indent=2) }}{% endfor %}{% set ns = namespace(n=1, self=2) %}"
        "{% set ns.n = ns.n + 1 %}{{ ns.n }}\n  {% if tools %}\n{{ tools | tojson }}\n  {% endif %}"
        "{{ documents | tojson(ensure_ascii=true, sort_keys=true) }} {{ effort }} "
        "{{ dict(a=1) | tojson }} {{ missing is defined }} {{ strftime_now('%Y') }} {{ eos_token }}"
    )
    _, _, theirs = known["llama3"]
    messages = [{"role": "user", "content": "<é & 日本>"}, {"role": "assistant", "content": "x"}]
    given = {"tools": [{"type": "function", "function": {"name": "f"}}], "effort": "high",
             "documents": [{"title": "T", "text": "日"}]}  # fmt: skip
    expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False, **given)
    specials = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    assert jinja.render(source, messages, **given, **specials).text == expected


def test_the_day_can_be_fixed(known):
    """Llama's template tells the day; the tokens of a run must not follow the calendar."""
    path, ours, _ = known["llama3"]
    fixed = chat.template_for(path, ours, today=datetime.date(2024, 7, 26))
    assert "Today: 26 Jul 2024\n" in fixed.render_prompt([Message("user", "?")])
    today = chat.template_for(path, ours).render_prompt([Message("user", "?")])
    assert "Today: 26 Jul 2024\n" not in today


# ------------------------------------------------------------------------------------- role masks

PLAIN_TURNS = [Message(*turn) for turn in (*TURNS[:2], ("user", "And 3 + 3?"))]
PLAIN_TURNS += [Message("assistant", "6", "3 + 3 = 6")]


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "gemma3", "training"])
def test_what_is_learnt_is_what_is_sampled(known, name):
    """At every turn: prompt ids + completion ids = trained ids, and the end is learnt, no more."""
    path, ours, _ = known[name]
    template = chat.template_for(path, ours)
    for messages in (PLAIN_TURNS, [Message(*SYSTEM), *PLAIN_TURNS]):
        ids, weights = chat.encode_conversation(ours, template, messages)
        expected = np.zeros(len(ids), np.float32)
        for i, message in enumerate(messages):
            if message.role == "assistant":
                prompt = chat.encode_prompt(ours, template, messages[:i])
                completion = ours.encode(template.render_completion(message))
                drawn = completion[: completion.index(ours.eos_id) + 1]
                assert ids[: len(prompt) + len(drawn)].tolist() == prompt + drawn
                expected[len(prompt) : len(prompt) + len(drawn)] = 1
        assert weights.tolist() == expected.tolist()
        learnt = ours.decode(ids[weights == 1].tolist())
        thoughts = [m.reasoning for m in messages if m.reasoning]
        assert len(thoughts) == 2 and all(thought in learnt for thought in thoughts)


@pytest.mark.parametrize("name", ["llama3", "training"])
def test_generation_blocks_give_the_mask_of_transformers(known, name, tmp_path):
    """Save what stands after the end of a turn inside a block, which no sampler draws."""
    path, ours, theirs = known[name]
    if name == "llama3":
        marked = (
            "{% generation %}{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endgeneration %}"
        )
        body = "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}"
        source = f"{body}{{% else %}}A: {marked}{{% endif %}}{{% endfor %}}"
        (tmp_path / "marked.jinja").write_text(
            source + "{% if add_generation_prompt %}A: {% endif %}"
        )
        path = str(tmp_path / "marked.jinja")
        theirs.chat_template = (tmp_path / "marked.jinja").read_text()
    template = chat.template_for(path, ours)
    ids, weights = chat.encode_conversation(ours, template, PLAIN_TURNS)
    found = theirs.apply_chat_template(
        template.as_dicts(PLAIN_TURNS), return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids.tolist() == found["input_ids"]
    mask = np.array(found["assistant_masks"])
    after_end = np.concatenate([[False], ids[:-1] == ours.eos_id])
    assert weights.tolist() == np.where(after_end, 0, mask).tolist()
    assert mask.sum() - weights.sum() == (2 if name == "training" else 0)  # the line breaks
    _, none = chat.encode_conversation(ours, template, PLAIN_TURNS, ("user",))
    assert none[mask == 1].sum() == 0


def test_a_mask_without_the_end_is_refused(known, tmp_path):
    _, ours, _ = known["llama3"]
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|eot_id|>"
    (tmp_path / "no_end.jinja").write_text(source + "{% endfor %}")
    template = chat.template_for(str(tmp_path / "no_end.jinja"), ours)
    with pytest.raises(ValueError, match=r"does not teach the end .* no '<\|eot_id\|>'"):
        chat.encode_conversation(ours, template, PLAIN_TURNS)


def test_fault_17_the_stock_template_that_drops_thoughts_is_refused_for_training(known):
    """It samples as ever, and single questions can be learnt with it."""
    path, ours, theirs = known["qwen3"]
    template = chat.template_for(path, ours)
    with pytest.raises(ValueError, match=r"renders the first 2 messages .* set chat.template to"):
        chat.encode_conversation(ours, template, PLAIN_TURNS)
    ids, weights = chat.encode_conversation(ours, template, PLAIN_TURNS[:2])
    assert ours.decode(ids[weights == 1].tolist()) == (
        "<think>\n17 + 25 = 42.\nYes.\n</think>\n\n42<|im_end|>"
    )
    prompt = theirs.apply_chat_template(
        template.as_dicts(PLAIN_TURNS[:3]), add_generation_prompt=True, return_dict=False
    )
    assert chat.encode_prompt(ours, template, PLAIN_TURNS[:3]) == prompt
    assert "Yes." not in ours.decode(prompt)


def test_a_reasoning_is_written_where_the_template_has_no_place_for_it(known):
    """transformers would drop it without a word; with tags of one's own, those are plain text."""
    tags = chat.ThinkTags("[[think]]", "[[/think]]")
    for name in ("qwen2.5", "llama3", "gemma3"):
        path, ours, _ = known[name]
        template = chat.template_for(path, ours, tags)
        completion = template.render_completion(Message("assistant", "42", "Yes."))
        assert completion.startswith(f"{tags.open}\nYes.\n{tags.close}\n\n42{template.eos}")
        text = completion.partition(template.eos)[0]
        assert chat.split_reasoning(text, tags) == ("Yes.", "42")
        ids = chat.thinking_ids(ours, tags)
        assert len(ids.close) > 1 and ours.decode(ids.close) == tags.close
        assert ours.decode(ids.ends["tag"]) == tags.close


def test_a_template_that_drops_a_reasoning_is_refused(known, tmp_path):
    _, ours, _ = known["llama3"]
    source = "{% for m in messages %}{% if m.reasoning_content is string and false %}x{% endif %}"
    (tmp_path / "drops.jinja").write_text(source + "{{ m.content }}<|eot_id|>{% endfor %}")
    template = chat.template_for(str(tmp_path / "drops.jinja"), ours)
    with pytest.raises(ValueError, match=r"drops\.jinja leaves out a message's reasoning"):
        chat.encode_conversation(ours, template, PLAIN_TURNS)


# ------------------------------------------------------------------------- where templates are read


def test_every_place_of_a_template_is_read(known, tmp_path):
    _, ours, _ = known["llama3"]
    body = "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
    (tmp_path / "own.jinja").write_text(body)
    config, beside = tmp_path / "tokenizer_config.json", tmp_path / "chat_template.jinja"
    read = lambda path: chat.template_for(str(path), ours).jinja
    assert read(tmp_path / "own.jinja") == body
    config.write_text(json.dumps({"chat_template": body}))
    assert read(tmp_path) == body
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": body}]
    config.write_text(json.dumps({"chat_template": several}))
    assert read(tmp_path) == body
    beside.write_text("first: " + body)  # transformers too takes the file before the configuration
    assert read(tmp_path) == "first: " + body


def test_a_base_model_has_no_template(known, tmp_path):
    _, ours, _ = known["llama3"]
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"which has none, .* set chat\.template to qwen3, plain or"
    ):
        chat.template_for(str(tmp_path), ours)


@pytest.mark.parametrize(
    "source, mistake",
    [
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{{ raise_exception('only\n  users') }}", r"refuses\.jinja: only users$"),
        ("{{ messages[7].content.x }}", "has no element 7"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{% set ns = namespace(_x=1) %}", "a namespace may not have a field '_x'"),
    ],
)
def test_a_bad_template_is_one_line(known, tmp_path, source, mistake):
    _, ours, _ = known["llama3"]
    (tmp_path / "refuses.jinja").write_text(source)
    with pytest.raises(ValueError, match=mistake) as error:
        chat.template_for(str(tmp_path / "refuses.jinja"), ours)
    assert "\n" not in str(error.value) and str(error.value).startswith("chat template ")


def test_tags_are_two_texts():
    for pair in (("", "</think>"), ("<x>", "<x>")):
        with pytest.raises(ValueError, match=r"the think tags are .* must be two texts"):
            chat.ThinkTags(*pair)

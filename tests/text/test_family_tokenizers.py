"""Tokenizers of every family: the ids of transformers, what ends a turn, folders as they were read.

All comparisons are with AutoTokenizer on the same folder, without the tokens it would add.
"""

import gzip
import json

import family_folders as families
import pytest

from jaxreason.text import chat
from jaxreason.text.tokenizer import ByteTokenizer, load_tokenizer

FAMILIES = pytest.mark.parametrize("family", families.FAMILIES)
AWKWARD = [
    "日本語の文章。한국어 문장, 中文；繁體字",
    "👩🏽‍🚀👨‍👩‍👧‍👦 🇩🇪🏴󠁧󠁢󠁳󠁣󠁴󠁿 ❤️‍🔥 #️⃣ 😀😀",
    "العربية ١٢٣ مع עברית \u202eabc\u202c and \u200fright\u200e to left",
    "e\u0301 n\u0303 Z\u0351\u036b\u0343\u036a a\u0308\u0323 \u1e9b\u0323 क्षि ക്ഷ ស្រី",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[0m\x7f\x80\x9f\u0085\u2028\u2029\ufeff\ufffd\U000e0001",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <think>\nno</think> <tool_call>{}</tool_call>",
    "x<|eot_id|><|begin_of_text|> <|start_header_id|>user<|end_header_id|>\n\n <|python_tag|>1",
    "<bos><start_of_turn>model\nhi<end_of_turn>\n<eos><pad> <table> <mask>ed <0x41> <unk>",
    "<|im_end| > <|im_end|<|im_end|>> <<think>> <end_of_turn <END_OF_TURN>",
    "a▁b ▁▁▁▁ \u00a0\u3000\u2009 \t\t  \n\n\n \r\n\r\n   \n    x",
    "1234567890 3.14159e-10 １２３ ⅷ ½ x²+y₂ ∑∫√ don't DON'T I'll we'VE 'Tis",
    "ﬁ ﬂ Å Å Ω Ω ſ ß ẞ İ ı ŉ ǆ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 🀄 \U0010ffff",
    "def f(x):\n\treturn {k: v for k, v in x.items()}  # " + "=" * 200 + "\n\n\n",
    "", " ", "  ", "\n", "\n\n", "\n\n\n\n", "▁", "a", "\u0301",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(shared_data, tmp_path_factory):
    pytest.importorskip("tokenizers")
    base = tmp_path_factory.mktemp("families")
    return {name: families.make(name, base / name, shared_data) for name in families.FAMILIES}


@pytest.fixture(scope="module")
def pairs(folders):
    """family -> (ours, transformers')."""
    reason = "the reference for ids is transformers' AutoTokenizer"
    transformers = pytest.importorskip("transformers", reason=reason)
    theirs = transformers.AutoTokenizer.from_pretrained
    return {name: (load_tokenizer(folder), theirs(folder)) for name, folder in folders.items()}


def gsm8k(shared_data) -> list[str]:
    texts = []
    for name in ("train", "test"):
        path = shared_data / "gsm8k" / f"{name}.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                texts += [record["question"], record["answer"]]
    assert len(texts) == 2 * (7473 + 1319)
    return texts


def book_lines(shared_data, count: int) -> list[str]:
    with open(shared_data / "text_books" / "val.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    # Every sixth, so that all kinds of book are among them.
    lines = [line for text in texts for line in text.split("\n") if line.strip()][::6]
    assert len(lines) >= count
    return lines[:count]


def assert_same_ids(ours, theirs, texts: list[str]) -> None:
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text) == ids, text


@FAMILIES
def test_ids_are_those_of_transformers(pairs, shared_data, family):
    """A fifth of GSM8K here, all of it in the slow test; lines of books; the awkward strings."""
    texts = gsm8k(shared_data)[::5] + book_lines(shared_data, 2000) + AWKWARD
    texts += [" ".join(AWKWARD), "".join(AWKWARD), "\n".join(AWKWARD)]
    ours, theirs = pairs[family]
    assert_same_ids(ours, theirs, texts)
    assert len(theirs) == ours.vocab_size
    assert ours.encode("x") != theirs.encode("x") or family.startswith("qwen")  # no <bos> of ours
    for text in AWKWARD:
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))


@pytest.mark.slow
@FAMILIES
def test_ids_are_those_of_transformers_on_all_of_gsm8k(pairs, shared_data, family):
    assert_same_ids(*pairs[family], gsm8k(shared_data))


def test_qwen25_knows_no_thinking_tokens(pairs):
    qwen25, qwen3 = pairs["qwen2.5"][0], pairs["qwen3"][0]
    assert (qwen25.vocab_size, qwen3.vocab_size) == (151_665, 151_669)
    assert qwen25.id_of("<think>") is None and qwen3.id_of("<think>") == 151_667
    text = "Tom has 17 + 25 apples.\n\n#### 42"
    assert qwen25.encode(text) == qwen3.encode(text)


# -------------------------------------------------------------------------------- the end of a turn


@FAMILIES
def test_a_turn_ends_as_its_template_says_and_the_other_ends_stop_too(pairs, folders, family):
    """Gemma's eos_token is <eos>, its turns end with <end_of_turn>: transformers stops at both."""
    ours, _ = pairs[family]
    fitted = chat.fitted(ours, str(folders[family]))
    ends = {"gemma3": "<end_of_turn>", "llama3": "<|eot_id|>"}
    assert fitted.decode([fitted.eos_id]) == ends.get(family, "<|im_end|>")
    listed = json.loads((folders[family] / "generation_config.json").read_text())["eos_token_id"]
    assert sorted([fitted.eos_id, *fitted.stop_ids]) == sorted(listed)
    assert fitted.pad_id == ours.pad_id
    template = chat.template_for(str(folders[family]), fitted)
    messages = [chat.Message("user", "?"), chat.Message("assistant", "Yes.", "Why not?")]
    ids, weights = chat.encode_conversation(fitted, template, messages)
    assert ids[weights == 1][-1] == fitted.eos_id


def test_a_base_models_tokenizer_learns_to_end_turns(folders, tmp_path):
    """Qwen3-Base ends documents, with <|endoftext|>; fine-tuned on turns it ends those."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["qwen3"] / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["eos_token"] = "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"eos_token_id": 151643}')
    base = load_tokenizer(tmp_path)
    assert (base.eos_id, base.stop_ids) == (151_643, ())
    with pytest.raises(ValueError, match=r"qwen3 ends turns with '<\|im_end\|>', the tokenizer"):
        chat.template_for("qwen3", base)
    fitted = chat.fitted(base, "qwen3")
    assert (fitted.eos_id, fitted.stop_ids, fitted.pad_id) == (151_645, (151_643,), 151_643)
    fitted.save(tmp_path / "saved", chat.template_for("qwen3", fitted).jinja)
    again = load_tokenizer(tmp_path / "saved")
    assert (again.eos_id, again.stop_ids) == (fitted.eos_id, fitted.stop_ids)
    assert chat.fitted(again, "plain").eos_id == 151_643  # which ends with the eos_token


def test_a_tokenizer_that_cannot_end_the_templates_turns_is_one_line(pairs, tmp_path):
    llama = pairs["llama3"][0]
    with pytest.raises(ValueError, match=r"qwen3 ends turns with '<\|im_end\|>\\n', .* no special"):
        chat.fitted(llama, "qwen3")
    (tmp_path / "ends.jinja").write_text("{{ messages[-1].content }}<|endoftext|>")
    with pytest.raises(
        ValueError, match=r"turns cannot end with '<\|endoftext\|>'; this tokenizer"
    ):
        chat.fitted(ByteTokenizer(), str(tmp_path / "ends.jinja"))


# ------------------------------------------------------------------------------------- a document

OWN_END = {"gemma3": "<eos>", "llama3": "<|eot_id|>"}


@FAMILIES
def test_a_document_is_what_transformers_makes_of_a_text_and_its_own_end(
    pairs, folders, family, tmp_path
):
    """Also where turns end otherwise, and where the run's tokenizer was saved and read again."""
    ours, theirs = pairs[family]
    template = str(folders[family])
    fitted = chat.fitted(ours, template)
    fitted.save(tmp_path, chat.template_for(template, fitted).jinja)
    assert theirs.eos_token == OWN_END.get(family, "<|im_end|>")
    read_again = load_tokenizer(tmp_path)
    for text in AWKWARD:
        expected = [*theirs(text, add_special_tokens=True)["input_ids"], theirs.eos_token_id]
        for tokenizer in (ours, fitted, read_again):
            assert tokenizer.document_ids(text) == expected
    begins = {"gemma3": "<bos>", "llama3": "<|begin_of_text|>"}
    assert ours.document_start == begins.get(family, "")


def test_a_base_models_documents_end_as_it_was_trained(folders, tmp_path):
    """Qwen3-Base on ChatML, Llama 3 base on plain: <|endoftext|> and <|end_of_text|>."""
    for family, template, end in (
        ("qwen3", "qwen3", "<|endoftext|>"),
        ("llama3", "plain", "<|end_of_text|>"),
    ):
        base = tmp_path / family
        base.mkdir()
        config = json.loads((folders[family] / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": end}))
        (base / "tokenizer.json").write_bytes((folders[family] / "tokenizer.json").read_bytes())
        fitted = chat.fitted(load_tokenizer(base), template)
        assert fitted.decode(fitted.document_ids("x")[-1:]) == end
    assert fitted.eos_id == fitted.document_ids("x")[-1]


def test_our_own_documents_have_no_start():
    ours = ByteTokenizer()
    assert ours.document_ids("ab<|im_end|>") == [97, 98, 258, 258]
    assert chat.template_for("plain", ours).render_prompt([chat.Message("user", "?")]) == "?"


@FAMILIES
def test_the_plain_template_begins_as_a_document(pairs, family):
    """Once, in prompt and completion alike, and it still tells no turns."""
    transformers_ids = lambda text: pairs[family][1](text)["input_ids"]
    ours = chat.fitted(pairs[family][0], "plain")
    plain = chat.template_for("plain", ours)
    turns = [chat.Message("user", "Why?"), chat.Message("assistant", " So.")]
    assert chat.encode_prompt(ours, plain, turns[:1]) == transformers_ids("Why?")
    ids, weights = chat.encode_conversation(ours, plain, turns)
    assert ids.tolist() == [*transformers_ids("Why?"), *ours.encode(" So."), ours.eos_id]
    assert weights.sum() == len(ours.encode(" So.")) + 1
    assert plain.render_completion(turns[1]) == " So." + ours.decode([ours.eos_id])
    assert not plain.parts_turns


# ------------------------------------------------------------------------ a table with fewer rows


def test_an_added_token_without_a_row_is_refused_in_texts_alone(pairs, folders, tmp_path):
    whole = chat.fitted(pairs["gemma3"][0], str(folders["gemma3"]))
    rows = whole.vocab_size - 1
    limited = whole.limited_to(rows)
    assert whole.id_of(families.IMAGE) == rows == limited.vocab_size
    limited.save(tmp_path)
    for tokenizer in (limited, load_tokenizer(tmp_path)):
        assert tokenizer.encode("a <table>") == whole.encode("a <table>")
        assert tokenizer.limited_to(rows + 1).encode(families.IMAGE) == [rows]
        says = (
            rf"'{families.IMAGE}', which is token {rows}, and the embedding table has {rows} rows"
        )
        for encode in (tokenizer.encode, tokenizer.document_ids):
            with pytest.raises(ValueError, match=says):
                encode(f"see {families.IMAGE}")
    with pytest.raises(
        ValueError, match=rf"has {rows + 1} entries, the embedding table {rows - 1}"
    ):
        limited.limited_to(rows - 1)  # there a word of the base vocabulary would be beyond


def test_what_ends_or_pads_needs_a_row(pairs):
    """Llama 3's special tokens are all added ones, after every word."""
    llama = pairs["llama3"][0]
    kept = 1 + max(llama.eos_id, *llama.stop_ids)
    assert llama.limited_to(kept).vocab_size == kept < llama.vocab_size
    with pytest.raises(ValueError, match="entries, the embedding table"):
        llama.limited_to(kept - 1)


# --------------------------------------------------------------------------------------- the folder


@FAMILIES
def test_a_saved_folder_reads_as_it_did(pairs, folders, family, tmp_path):
    """The same ids, special tokens and templates, for transformers and for us."""
    transformers = pytest.importorskip("transformers")
    ours, theirs = pairs[family]
    template = chat.template_for(str(folders[family]), chat.fitted(ours, str(folders[family])))
    ours.save(tmp_path, template.jinja)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same_ids(load_tokenizer(tmp_path), saved, AWKWARD)
    assert_same_ids(ours, saved, AWKWARD)
    assert saved.special_tokens_map == theirs.special_tokens_map
    assert saved.chat_template == theirs.chat_template
    assert load_tokenizer(tmp_path).stop_ids == ours.stop_ids
    dicts = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    render = lambda tokenizer: tokenizer.apply_chat_template(dicts, tokenize=False)
    assert render(saved) == render(theirs)
    # And once more, without a template given: what was read is written back.
    load_tokenizer(tmp_path).save(tmp_path / "again")
    for path in sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.j*") if p.is_file()):
        if path.parts[0] != "again":
            assert (tmp_path / "again" / path).read_bytes() == (tmp_path / path).read_bytes()


FORMS = {
    "old": {"eos_token": {"__type": "AddedToken", "content": "<|eot_id|>", "lstrip": False},
            "additional_special_tokens": ["<|mine|>", "<|python_tag|>"]},
    "transformers 5": {"eos_token": "<|eot_id|>", "extra_special_tokens": ["<|mine|>"],
                       "backend": "tokenizers", "is_local": True},
    "by name": {"eos_token": "<|eot_id|>", "extra_special_tokens": {"mine_token": "<|mine|>"}},
    "a map": {},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_special_tokens_in_every_form(folders, form, tmp_path):
    """Of the configuration, old and new, and of the special_tokens_map.json beside an old one."""
    transformers = pytest.importorskip("transformers")
    definition = (folders["llama3"] / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(definition)
    config = FORMS[form] | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if form == "a map":
        content = {"eos_token": families._fields("<|eot_id|>"), "bos_token": "<|begin_of_text|>"}
        content["additional_special_tokens"] = ["<|mine|>"]
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(content))
    ours = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.decode([ours.eos_id]) == theirs.eos_token == "<|eot_id|>"
    assert theirs.special_tokens_map.items() <= ours.special_tokens.items()
    assert (len(theirs), ours.id_of("<|mine|>")) == (ours.vocab_size, 3256)
    assert_same_ids(ours, theirs, [*AWKWARD, "a <|mine|> b<|mine|>"])
    ours.save(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.special_tokens_map == theirs.special_tokens_map
    assert_same_ids(ours, saved, [*AWKWARD, "a <|mine|> b<|mine|>"])


def test_a_template_whose_name_is_a_path_is_refused(folders, tmp_path):
    config = json.loads((folders["gemma3"] / "tokenizer_config.json").read_text())
    config["chat_template"][1]["name"] = "../../out"
    for name, content in {
        "tokenizer_config.json": json.dumps(config),
        "tokenizer.json": "{}",
    }.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"a chat template is named '\.\./\.\./out'"):
        load_tokenizer(tmp_path).save(tmp_path / "saved", "{{ 1 }}")

"""Tokenizers: lossless on real strings, the same ids and texts as transformers, told apart."""

import gzip
import json
import pathlib
import pickle
import random
import subprocess
import sys
import unicodedata

import pytest

from jaxreason.text import tokenizer as tk

KINDS = ("bytes", "sentencepiece", "qwen3")
HARD_STRINGS = [
    "",
    " ",
    "   leading, trailing   ",
    "a\n\n\nb\r\n\tc \n",
    "日本語の文章と한국어, русский текст, العربية, हिन्दी",
    "👩🏽‍🚀 🇩🇪 😀😀😀",
    "é e\u0301 ﬁ ½ \u00a0\u200b\ufeff",
    "U+2581 ▁▁ a▁b ▅ \x00\x01\x7f \ufffd",
    "<|im_start|>user\n1 + 1?<|im_end|>\n<think>\n2\n</think>\n\n2<|im_end|><|endoftext|>",
    "<unk> <0x41> <think <|im_end| < think >",
    "def f(x):\n        return   x  # " + "=" * 300,
]


@pytest.fixture(scope="module")
def strings(shared_data) -> list[str]:
    """2,000 strings: hard ones, book paragraphs, GSM8K questions and answers, random mixtures."""
    rng = random.Random(0)
    with open(shared_data / "text_books" / "val.jsonl", encoding="utf-8") as lines:
        books = [p for line in lines for p in json.loads(line)["text"].split("\n\n") if p]
    with gzip.open(shared_data / "gsm8k" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        sums = [r["question"] + "\n" + r["answer"] for r in map(json.loads, lines)]
    atoms = [*" \n\t\r-=.aAh0129<|/▁é漢😀", "  ", "the", *tk.ByteTokenizer.specials, "\u0301"]
    mixtures = ["".join(rng.choices(atoms, k=rng.randrange(80))) for _ in range(300)]
    real = rng.sample(books, 1000) + rng.sample(sums, 2000 - 1300 - len(HARD_STRINGS))
    return HARD_STRINGS + real + mixtures


@pytest.fixture(scope="module")
def tokenizers(shared_data, strings, tmp_path_factory) -> dict[str, tk.Tokenizer]:
    path = tmp_path_factory.mktemp("sentencepiece") / "m.model"
    return {
        "bytes": tk.ByteTokenizer(),
        "sentencepiece": tk.train_sentencepiece(strings, path, vocab_size=1500),
        "qwen3": tk.load_tokenizer(shared_data / "tokenizer_qwen3"),
    }


@pytest.fixture(scope="module")
def reloaded(tokenizers, tmp_path_factory):
    """name -> (the tokenizer, its saved directory)."""
    folders = {}
    for name, tokenizer in tokenizers.items():
        folder = tmp_path_factory.mktemp("saved") / name
        tokenizer.save(folder, chat_template="{{ messages[0].content }}")
        # A model's export lies in the same directory; transformers must not pick Qwen's own class.
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
        folders[name] = (tokenizer, folder)
    return folders


@pytest.mark.parametrize("name", KINDS)
def test_round_trip_is_lossless(tokenizers, strings, name):
    tokenizer = tokenizers[name]
    assert len(strings) == 2000
    for text in strings:
        # Qwen's own normalizer is NFC; the other two keep every code point.
        expected = unicodedata.normalize("NFC", text) if name == "qwen3" else text
        assert tokenizer.decode(tokenizer.encode(text)) == expected


@pytest.mark.parametrize("name", KINDS)
def test_auto_tokenizer_has_the_same_ids_and_texts(reloaded, strings, name):
    transformers = pytest.importorskip("transformers")
    tokenizer, folder = reloaded[name]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert set(theirs.all_special_ids) == tokenizer.special_ids
    assert theirs.chat_template == "{{ messages[0].content }}"
    for text in strings:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, True)


@pytest.mark.parametrize("name", KINDS)
def test_auto_tokenizer_decodes_what_an_untrained_model_draws_as_we_do(reloaded, name):
    """Random ids hold broken UTF-8; both sides put U+FFFD at the same places."""
    transformers = pytest.importorskip("transformers")
    tokenizer, folder = reloaded[name]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    for _ in range(300):
        # The first 300 ids are mostly single bytes in all three.
        ids = [rng.randrange(rng.choice((300, tokenizer.vocab_size))) for _ in range(20)]
        ids = [min(i, tokenizer.vocab_size - 1) for i in ids]
        assert theirs.decode(ids) == tokenizer.decode(ids)


def test_qwen3_ids_are_those_of_its_published_directory(tokenizers, shared_data, strings):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizer_qwen3")
    ours = tokenizers["qwen3"]
    assert (ours.vocab_size, ours.eos_id, ours.pad_id) == (151_669, 151_645, 151_643)
    assert (ours.id_of("<think>"), ours.id_of("</think>")) == (151_667, 151_668)
    assert all(theirs(text)["input_ids"] == ours.encode(text) for text in strings)


@pytest.mark.parametrize("name", KINDS)
def test_specials_are_one_id_and_think_tags_are_text(tokenizers, name):
    tokenizer = tokenizers[name]
    assert tokenizer.eos_id == tokenizer.id_of("<|im_end|>")
    assert tokenizer.pad_id == tokenizer.id_of("<|endoftext|>")
    assert tokenizer.special_ids >= {tokenizer.id_of(token) for token in tk.CONTROL}
    assert tokenizer.id_of("no single token 123") is None
    assert tokenizer.special_ids.isdisjoint(map(tokenizer.id_of, ("<think>", "</think>", "\n")))
    ids = tokenizer.encode("<|im_start|>a<think>\nb</think>c<|im_end|>")
    assert tokenizer.decode(ids, skip_special=True) == "a<think>\nb</think>c"


@pytest.mark.parametrize("name", KINDS)
def test_saved_pickled_and_loaded_are_the_same_tokenizer(reloaded, tokenizers, name):
    tokenizer, folder = reloaded[name]
    loaded = tk.load_tokenizer(folder)
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    text = HARD_STRINGS[3]
    # A data worker receives the tokenizer by pickle, after its first use.
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == loaded.encode(text)
    others = {t.fingerprint() for other, t in tokenizers.items() if other != name}
    assert tokenizer.fingerprint() not in others


@pytest.mark.parametrize("name", KINDS)
def test_a_lone_surrogate_is_a_value_error(tokenizers, name):
    with pytest.raises(ValueError, match="surrogates"):
        tokenizers[name].encode("a\ud800b")


def test_padding_falls_to_the_end_token_where_none_is_named(tmp_path):
    tk.ByteTokenizer().save(tmp_path)
    (tmp_path / tk.MARKER).unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = tk.load_tokenizer(tmp_path)
    assert tokenizer.pad_id == tokenizer.eos_id == 258
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    with pytest.raises(ValueError, match="eos_token is '<eos>'"):
        _ = tk.load_tokenizer(tmp_path).eos_id


def test_sentencepiece_training_repeats_in_another_process(tmp_path):
    """Also when lines are drawn: the library's own drawing differs from process to process."""
    texts = [f"{i} plus {i * i % 97} is {i + i * i % 97}.\nDone {i % 7}" for i in range(2000)]
    ours = tk.train_sentencepiece(texts, tmp_path / "a", 290, max_lines=500, seed=1)
    other_seed = tk.train_sentencepiece(texts, tmp_path / "a", 290, max_lines=500, seed=2)
    code = (
        "import json, sys; from jaxreason.text.tokenizer import train_sentencepiece as train;"
        "print(train(json.load(sys.stdin), sys.argv[1], 290, max_lines=500, seed=1).fingerprint())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "b")]
    run = subprocess.run(
        command,
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        cwd=pathlib.Path(tk.__file__).parents[2],
    )
    assert run.stdout.strip() == ours.fingerprint(), run.stderr
    assert (tmp_path / "b").read_bytes() == ours.model
    assert other_seed.fingerprint() != ours.fingerprint()


def test_sentencepiece_training_reads_every_part_of_a_long_document(tmp_path):
    """The trainer alone skips lines over 4,192 bytes and lines with a tab, NUL or U+2581."""
    texts = ["zebra " * 5000, "quokka\tquokka " * 50, "lemur\0lemur▁lemur ▅" * 50]
    tokenizer = tk.train_sentencepiece(texts, tmp_path / "m", 290)
    for word in ("zebra", "quokka", "lemur"):
        assert len(tokenizer.encode(word)) < len(word)


def test_sentencepiece_that_cannot_be_trained_says_what_would_be_right(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size is 5000, .* a value <= \d+"):
        tk.train_sentencepiece(["a few words"], tmp_path / "m", 5000)
    with pytest.raises(ValueError, match=r"vocab_size is 100, .* smaller than required_chars"):
        tk.train_sentencepiece(["a few words"], tmp_path / "m", 100)


def test_missing_and_foreign_directories_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/tokenizer\.json is not a file"):
        tk.load_tokenizer(tmp_path / "nowhere")
    (tmp_path / tk.MARKER).write_text('{"kind": "sentencepiece"}')
    with pytest.raises(ValueError, match=r"sentencepiece\.model is not a file"):
        tk.load_tokenizer(tmp_path)
    (tmp_path / tk.MARKER).write_text('{"kind": "words"}')
    with pytest.raises(ValueError, match="kind is 'words'; known: bytes, sentencepiece"):
        tk.load_tokenizer(tmp_path)

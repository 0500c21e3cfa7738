"""Text to ids and back: bytes, SentencePiece trained here, Hugging Face tokenizer.json.

One protocol, three lossless implementations. Every one of them saves a directory that both
`load_tokenizer` and `transformers.AutoTokenizer.from_pretrained` read, with the same ids. No
tokenizer adds a begin or end token by itself, and special tokens written in a text are recognised.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import pathlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Protocol

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
# Control tokens disappear under skip_special; think tags do not, because they are read as text.
CONTROL = (PAD, TURN_START, TURN_END)
MARKER = "jaxreason_tokenizer.json"
SENTENCEPIECE_FILE = "sentencepiece.model"  # not tokenizer.model: transformers would convert that


class Tokenizer(Protocol):
    """What the rest of the house knows of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of entries: one more than the largest id. A model's table may be larger."""

    @property
    def pad_id(self) -> int:
        """Fills rows; may equal eos_id."""

    @property
    def eos_id(self) -> int:
        """Ends an assistant's turn: the sampler stops at it and training learns it."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode(skip_special=True)` leaves out."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises ValueError where it holds what UTF-8 cannot (a lone surrogate)."""

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids; bytes that are no valid UTF-8 become U+FFFD."""

    def id_of(self, token: str) -> int | None:
        """The id when `token` is exactly one id, else None."""

    def save(self, directory: str | pathlib.Path, chat_template: str | None = None) -> None:
        """Writes the directory, with `chat_template` (Jinja) as chat_template.jinja."""

    def fingerprint(self) -> str:
        """SHA-256 in hex of the definition; equal tokenizers agree on every machine."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """The 256 bytes as ids 0 to 255, then five special tokens. Source: ByT5, arXiv 2105.13626."""

    specials = (PAD, TURN_START, TURN_END, THINK_OPEN, THINK_CLOSE)
    vocab_size = 256 + len(specials)
    pad_id = 256 + specials.index(PAD)
    eos_id = 256 + specials.index(TURN_END)
    special_ids = frozenset(256 + i for i, token in enumerate(specials) if token in CONTROL)

    _bytes_of = (*(bytes([b]) for b in range(256)), *(token.encode() for token in specials))
    _id_of_special: ClassVar[dict[bytes, int]] = {
        token.encode(): 256 + i for i, token in enumerate(specials)
    }
    _split = re.compile(b"(" + b"|".join(re.escape(token.encode()) for token in specials) + b")")

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        if b"<" not in data:  # every special token starts with it; list() runs at 100M ids/s
            return list(data)
        plain, *rest = self._split.split(data)  # plain, special, plain, special, ..., plain
        ids = list(plain)
        for special, plain in zip(rest[::2], rest[1::2]):
            ids.append(self._id_of_special[special])
            ids.extend(plain)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        kept = [i for i in ids if i not in self.special_ids] if skip_special else ids
        return b"".join(map(self._bytes_of.__getitem__, kept)).decode(errors="replace")

    def id_of(self, token: str) -> int | None:
        return _only(self.encode(token))

    def save(self, directory: str | pathlib.Path, chat_template: str | None = None) -> None:
        folder = _made(directory)
        _write_export(folder, "bytes", _byte_level_json(self.specials), _config(), chat_template)

    def fingerprint(self) -> str:
        return _digest(b"bytes", *map(str.encode, self.specials))


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """A SentencePiece BPE model as `train_sentencepiece` makes them.

    SentencePiece writes a space as U+2581 and would turn a U+2581 of the text into a space; here
    that character goes through its three bytes, so it survives.
    """

    model: bytes = dataclasses.field(repr=False)  # the serialised ModelProto

    @functools.cached_property
    def _processor(self):
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @functools.cached_property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    @functools.cached_property
    def pad_id(self) -> int:
        return self._processor.piece_to_id(PAD)

    @functools.cached_property
    def eos_id(self) -> int:
        return self._processor.piece_to_id(TURN_END)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(map(self._processor.piece_to_id, CONTROL))

    @functools.cached_property
    def _byte_ids(self) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{b:02X}>") for b in range(256)]

    @functools.cached_property
    def _byte_of(self) -> dict[int, int]:
        return {i: b for b, i in enumerate(self._byte_ids)}

    def encode(self, text: str) -> list[int]:
        first, *rest = text.split("▁")
        ids = self._processor.encode(first.encode())  # str.encode refuses surrogates as ValueError
        for part in rest:
            ids += [self._byte_ids[b] for b in "▁".encode()]
            ids += self._processor.encode(part.encode())
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        hidden = self.special_ids if skip_special else ()
        kept = [int(i) for i in ids if i not in hidden]
        runs = itertools.groupby(kept, key=self._byte_of.__contains__)
        return "".join(
            self._decode_bytes(run) if is_byte else self._processor.decode(list(run))
            for is_byte, run in runs
        )

    def _decode_bytes(self, ids: Iterable[int]) -> str:
        """One run of byte pieces, as the export decodes it: one bad byte spoils the whole run."""
        data = bytes(self._byte_of[i] for i in ids)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(data)

    def id_of(self, token: str) -> int | None:
        return _only(self.encode(token))

    def save(self, directory: str | pathlib.Path, chat_template: str | None = None) -> None:
        folder = _made(directory)
        (folder / SENTENCEPIECE_FILE).write_bytes(self.model)
        definition = _sentencepiece_json(self._processor)
        _write_export(folder, "sentencepiece", definition, _config(), chat_template)

    def fingerprint(self) -> str:
        return _digest(b"sentencepiece", self.model)


@dataclasses.dataclass(frozen=True)
class HFTokenizer:
    """A published tokenizer.json; tokenizer_config.json names its end and padding tokens.

    Where no padding token is named, the end token pads. Lossless up to the tokenizer's own
    normalizer (Qwen: Unicode NFC).
    """

    definition: str = dataclasses.field(repr=False)  # the text of tokenizer.json
    config: str = dataclasses.field(repr=False)  # the text of tokenizer_config.json

    @functools.cached_property
    def _tokenizer(self):
        import tokenizers

        return tokenizers.Tokenizer.from_str(self.definition)

    @functools.cached_property
    def _settings(self) -> dict:
        return json.loads(self.config)

    @functools.cached_property
    def vocab_size(self) -> int:
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def eos_id(self) -> int:
        return self._named("eos_token")

    @functools.cached_property
    def pad_id(self) -> int:
        return self._named("pad_token") if self._settings.get("pad_token") else self.eos_id

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    def _named(self, key: str) -> int:
        token = self._settings.get(key)
        text = token["content"] if isinstance(token, dict) else token
        token_id = self._tokenizer.token_to_id(text) if text else None
        if token_id is None:
            raise ValueError(
                f"tokenizer_config.json: {key} is {text!r}; it must be a token of tokenizer.json"
            )
        return token_id

    def encode(self, text: str) -> list[int]:
        text.encode()  # refuses lone surrogates as ValueError; tokenizers would raise TypeError
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int | None:
        return _only(self.encode(token))

    def save(self, directory: str | pathlib.Path, chat_template: str | None = None) -> None:
        config = _config() | self._settings
        if chat_template is not None:
            config.pop("chat_template", None)  # the published one; the argument replaces it
        _write_export(_made(directory), "huggingface", self.definition, config, chat_template)

    def fingerprint(self) -> str:
        names = f"{self.eos_id} {self.pad_id}"
        return _digest(b"huggingface", names.encode(), self.definition.encode())


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
    """The tokenizer that `save` wrote, or a Hugging Face directory's. Raises ValueError."""
    folder = pathlib.Path(directory)
    marker = folder / MARKER
    kind = json.loads(_read(marker))["kind"] if marker.is_file() else "huggingface"
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "sentencepiece":
        return SentencePieceTokenizer(_read(folder / SENTENCEPIECE_FILE))
    if kind == "huggingface":
        files = ("tokenizer.json", "tokenizer_config.json")
        return HFTokenizer(*(_read(folder / name).decode() for name in files))
    raise ValueError(f"{marker}: kind is {kind!r}; known: bytes, sentencepiece, huggingface")


def train_sentencepiece(
    texts: Iterable[str],
    path: str | pathlib.Path,
    vocab_size: int,
    *,
    max_lines: int = 1_000_000,
    seed: int = 0,
) -> SentencePieceTokenizer:
    """Trains a lossless BPE with byte fallback and writes the model file to `path`.

    The same texts, sizes and seed give the same bytes on every machine. At most `max_lines` lines,
    drawn evenly, are kept in memory (a million lines of books are about 150 MB). Raises ValueError
    where the texts cannot fill `vocab_size` or need more.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(_training_lines(texts), max_lines, seed)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            input_sentence_size=0,  # its own sampling draws other lines in every process
            num_threads=1,  # written into the model file, so it must not follow the machine
            minloglevel=2,
            # Lossless: nothing normalised, no space added or removed, unknown characters as bytes.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            # PAD is listed too: SentencePiece recognises only user-defined symbols in a text.
            user_defined_symbols=[*CONTROL, THINK_OPEN, THINK_CLOSE, "\n"],
            pad_id=0,
            pad_piece=PAD,
            unk_id=1,
            unk_surface="<unk>",  # as the tokenizer.json export decodes it
            bos_id=-1,
            eos_id=-1,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1] or error
        raise ValueError(
            f"vocab_size is {vocab_size}, which these texts cannot train: {reason}"
        ) from error
    pathlib.Path(path).write_bytes(model.getvalue())
    return SentencePieceTokenizer(model.getvalue())


# A tab, NUL, U+2581 or U+2585 makes the trainer drop the whole line, so texts are cut there too.
_LINE_ENDS = re.compile("[\n\t\0▁▅]+")
# Below the trainer's limit of 4,192 bytes at four bytes a character; cut before a space if any.
_LINE_PARTS = re.compile(r".{1,1000}(?=\s|$)|.{1,1000}", re.DOTALL)


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in _LINE_ENDS.split(text):
            yield from _LINE_PARTS.findall(line)


def _sample(lines: Iterable[str], count: int, seed: int) -> list[str]:
    """At most `count` of the lines, each with the same chance (reservoir sampling)."""
    rng, kept = random.Random(seed), []
    for seen, line in enumerate(lines):
        if seen < count:
            kept.append(line)
        elif (slot := rng.randrange(seen + 1)) < count:
            kept[slot] = line
    return kept


def _byte_level_json(specials: Sequence[str]) -> str:
    """tokenizer.json: byte-level BPE without merges, so that a token is a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's printable alphabet: printable Latin-1 stands for itself, the rest from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocab = {letters[b]: b for b in range(256)}
    vocab |= {token: 256 + i for i, token in enumerate(specials)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added_tokens(tokenizer, specials)


def _sentencepiece_json(processor) -> str:
    """tokenizer.json with the same ids: BPE with byte fallback, spaces written as spaces.

    SentencePiece merges any two neighbours whose union is a piece, best score first; so every split
    of a piece into two pieces is a merge, in the order of the scores of the unions.
    """
    from tokenizers import Tokenizer, decoders, models

    vocab, scores, symbols = {}, {}, []
    for i in range(processor.get_piece_size()):
        piece = processor.id_to_piece(i)
        if processor.is_byte(i) or processor.is_unknown(i):
            vocab[piece] = i
            continue
        text = processor.decode([i])
        vocab[text] = i
        if text in (*CONTROL, THINK_OPEN, THINK_CLOSE, "\n"):
            symbols.append(text)
        else:
            scores[text] = processor.get_score(i)
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _with_added_tokens(tokenizer, symbols)


def _with_added_tokens(tokenizer, tokens: Sequence[str]) -> str:
    """tokenizer.json in which `tokens` are found before anything else; CONTROL ones are special."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t in CONTROL) for t in tokens])
    return tokenizer.to_str()


def _config() -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": PAD,
        "additional_special_tokens": [TURN_START],
        "clean_up_tokenization_spaces": False,
    }


def _write_export(
    folder: pathlib.Path, kind: str, definition: str, config: dict, chat_template: str | None
) -> None:
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    (folder / MARKER).write_text(json.dumps({"kind": kind}) + "\n")


def _made(directory: str | pathlib.Path) -> pathlib.Path:
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read(path: pathlib.Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{path} is not a file; a tokenizer directory must hold it")
    return path.read_bytes()


def _only(ids: list[int]) -> int | None:
    return ids[0] if len(ids) == 1 else None


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(
            len(part).to_bytes(8, "big") + part
        )  # lengths keep ("ab", "c") from ("a", "bc")
    return total.hexdigest()

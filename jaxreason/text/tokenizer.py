"""Text to ids and back: bytes, SentencePiece trained here, Hugging Face tokenizer.json.

One protocol, three lossless implementations. Every one of them saves a directory that both
`load_tokenizer` and `transformers.AutoTokenizer.from_pretrained` read, with the same ids. No
tokenizer adds a begin or end token by itself, and special tokens written in a text are recognised.
"""

import dataclasses
import functools
import io
import itertools
import json
import pathlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Protocol

from jaxreason.text.hf_tokenizer import (
    MARKER,
    config_file,
    digest,
    load_hf_tokenizer,
    read_file,
    write_tokenizer,
)

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
# Control tokens disappear under skip_special; think tags do not, because they are read as text.
CONTROL = (PAD, TURN_START, TURN_END)
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

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a generation beside eos_id, as where a published model ends its documents."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and others by the names that chat templates have for them."""

    @property
    def document_start(self) -> str:
        """The token that begins every document, as where a published model has one; or empty."""

    def ending_with(self, token: str) -> "Tokenizer":
        """The same with `token` as the end of a turn. Raises ValueError where that cannot be."""

    def limited_to(self, rows: int) -> "Tokenizer":
        """The same for an embedding table of so many rows: it refuses texts with a token beyond.

        Gemma 3 is published so, with an added token for images and no row for it. Raises ValueError
        where anything else is beyond: an entry that is not an added token, an end or padding.
        """

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises ValueError where it holds what UTF-8 cannot (a lone surrogate)."""

    def document_ids(self, text: str) -> list[int]:
        """Ids of a text that stands alone, with what the tokenizer begins and ends documents by.

        A published tokenizer's own end of text, however turns end. Raises ValueError as `encode`.
        """

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
    stop_ids = ()
    document_start = ""
    special_tokens: ClassVar[dict[str, str]] = {"eos_token": TURN_END, "pad_token": PAD}

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

    def document_ids(self, text: str) -> list[int]:
        return [*self.encode(text), self.eos_id]

    def ending_with(self, token: str) -> "ByteTokenizer":
        return _as_it_ends(self, token)

    def limited_to(self, rows: int) -> "ByteTokenizer":
        return _as_it_fits(self, rows)

    def save(self, directory: str | pathlib.Path, chat_template: str | None = None) -> None:
        files = {"tokenizer.json": _byte_level_json(self.specials).encode()}
        write_tokenizer(directory, {"kind": "bytes"}, files | config_file(_config()), chat_template)

    def fingerprint(self) -> str:
        return digest(b"bytes", *map(str.encode, self.specials))


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """A SentencePiece BPE model as `train_sentencepiece` makes them.

    SentencePiece writes a space as U+2581 and would turn a U+2581 of the text into a space; here
    that character goes through its three bytes, so it survives.
    """

    model: bytes = dataclasses.field(repr=False)  # the serialised ModelProto

    stop_ids = ()
    document_start = ""
    special_tokens: ClassVar[dict[str, str]] = {"eos_token": TURN_END, "pad_token": PAD}

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

    def document_ids(self, text: str) -> list[int]:
        return [*self.encode(text), self.eos_id]

    def ending_with(self, token: str) -> "SentencePieceTokenizer":
        return _as_it_ends(self, token)

    def limited_to(self, rows: int) -> "SentencePieceTokenizer":
        return _as_it_fits(self, rows)

    def save(self, directory: str | pathlib.Path, chat_template: str | None = None) -> None:
        definition = _sentencepiece_json(self._processor).encode()
        files = {SENTENCEPIECE_FILE: self.model, "tokenizer.json": definition}
        files |= config_file(_config())
        write_tokenizer(directory, {"kind": "sentencepiece"}, files, chat_template)

    def fingerprint(self) -> str:
        return digest(b"sentencepiece", self.model)


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
    """The tokenizer that `save` wrote, or a Hugging Face directory's. Raises ValueError."""
    folder = pathlib.Path(directory)
    path = folder / MARKER
    marker = json.loads(read_file(path)) if path.is_file() else {"kind": "huggingface"}
    if marker["kind"] == "bytes":
        return ByteTokenizer()
    if marker["kind"] == "sentencepiece":
        return SentencePieceTokenizer(read_file(folder / SENTENCEPIECE_FILE))
    if marker["kind"] == "huggingface":
        return load_hf_tokenizer(folder, marker)
    raise ValueError(
        f"{path}: kind is {marker['kind']!r}; known: bytes, sentencepiece, huggingface"
    )


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


def _only(ids: list[int]) -> int | None:
    return ids[0] if len(ids) == 1 else None


def _as_it_ends(tokenizer: Tokenizer, token: str) -> Tokenizer:
    if tokenizer.id_of(token) != tokenizer.eos_id:
        raise ValueError(f"turns cannot end with {token!r}; this tokenizer has {TURN_END!r} for it")
    return tokenizer


def _as_it_fits(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the embedding table {rows} rows"
        )
    return tokenizer

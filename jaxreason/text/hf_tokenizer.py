"""A published tokenizer.json with what lies beside it, and how a tokenizer's folder is written."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

MARKER = "jaxreason_tokenizer.json"
_MAP = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja


@dataclasses.dataclass(frozen=True)
class HFTokenizer:
    """A published tokenizer.json; tokenizer_config.json names its special tokens.

    Where no padding token is named, the end token pads. Lossless up to the tokenizer's own
    normalizer (Qwen: Unicode NFC; Gemma: U+2581 and a space are one).
    """

    definition: str = dataclasses.field(repr=False)  # the text of tokenizer.json
    config: str = dataclasses.field(repr=False)  # the text of tokenizer_config.json
    # (name, content) of the folder's other files that `save` writes back
    files: tuple[tuple[str, bytes], ...] = dataclasses.field(default=(), repr=False)
    turn_end: str | None = None  # where that is not the eos_token of the configuration
    generation_ends: tuple[int, ...] = ()  # ids that end a generation, of generation_config.json
    rows: int | None = None  # of an embedding table without one for every added token

    @functools.cached_property
    def _tokenizer(self):
        """With the tokens that only the configuration adds, as transformers loads it."""
        import tokenizers

        made = tokenizers.Tokenizer.from_str(self.definition)
        made.no_truncation()
        made.no_padding()
        known = {token.content for token in made.get_added_tokens_decoder().values()}
        listed = self._settings.get("added_tokens_decoder", {})
        added = [listed[number] for number in sorted(listed, key=int)]
        for token in [*added, *({"special": True, "normalized": False} | t for t in self._extra)]:
            if token["content"] not in known:
                made.add_tokens([tokenizers.AddedToken(**token)])
                known.add(token["content"])
        return made

    @functools.cached_property
    def _settings(self) -> dict[str, Any]:
        """tokenizer_config.json, and special_tokens_map.json where transformers still reads it."""
        settings, older = json.loads(self.config), dict(self.files).get(_MAP)
        if older is not None and "added_tokens_decoder" not in settings:
            settings |= json.loads(older)
        return settings

    @functools.cached_property
    def _extra(self) -> list[dict[str, Any]]:
        """Special tokens without a role: a list of texts or fields, or texts by name."""
        keys = ("extra_special_tokens", "additional_special_tokens")  # transformers 5's, the older
        found = next((self._settings[key] for key in keys if self._settings.get(key)), [])
        found = found.values() if isinstance(found, dict) else found
        return [token if isinstance(token, dict) else {"content": token} for token in found]

    @functools.cached_property
    def special_tokens(self) -> dict[str, str]:
        named, extra = self._settings, self._settings.get("extra_special_tokens")
        named = named | extra if isinstance(extra, dict) else named
        text = lambda token: token["content"] if isinstance(token, dict) else token
        texts = {key: text(token) for key, token in named.items() if key.endswith("_token")}
        return {key: value for key, value in texts.items() if isinstance(value, str)}

    @functools.cached_property
    def vocab_size(self) -> int:
        entries = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        return entries if self.rows is None else min(entries, self.rows)

    @functools.cached_property
    def eos_id(self) -> int:
        if self.turn_end is not None:
            return self._tokenizer.token_to_id(self.turn_end)
        return self._named("eos_token")

    @functools.cached_property
    def pad_id(self) -> int:
        named = [key for key in ("pad_token", "eos_token") if key in self.special_tokens]
        return self._named(named[0]) if named else self.eos_id

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        own = [self._named("eos_token")] if "eos_token" in self.special_tokens else []
        return tuple(sorted({*self.generation_ends, *own} - {self.eos_id}))

    def ending_with(self, token: str) -> "HFTokenizer":
        if self._tokenizer.token_to_id(token) is None:
            raise ValueError(f"turns cannot end with {token!r}: tokenizer.json has no such token")
        return dataclasses.replace(self, turn_end=token)

    def limited_to(self, rows: int) -> "HFTokenizer":
        if self.rows is not None:
            return dataclasses.replace(self, rows=None).limited_to(rows)
        if self.vocab_size <= rows:
            return self
        needed = {self.eos_id, self.pad_id, *self.stop_ids}
        needed |= {self._named("bos_token")} if "bos_token" in self.special_tokens else set()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        needed |= {*vocab.values()} - {*self._tokenizer.get_added_tokens_decoder()}
        if max(needed) >= rows:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} entries, the embedding table {rows} rows"
            )
        return dataclasses.replace(self, rows=rows)

    @functools.cached_property
    def document_start(self) -> str:
        bos = self.special_tokens.get("bos_token", "")
        first = self._tokenizer.encode("x", add_special_tokens=True).ids[:1]
        by_itself = first == [self._tokenizer.token_to_id(bos)]
        return bos if by_itself or self._settings.get("add_bos_token") else ""

    def document_ids(self, text: str) -> list[int]:
        start = [self._named("bos_token")] if self.document_start else []
        end = self._named("eos_token") if "eos_token" in self.special_tokens else self.eos_id
        return [*start, *self.encode(text), end]

    def _named(self, key: str) -> int:
        text = self.special_tokens.get(key)
        token_id = self._tokenizer.token_to_id(text) if text else None
        if token_id is None:
            raise ValueError(
                f"tokenizer_config.json: {key} is {text!r}; it must be a token of tokenizer.json"
            )
        return token_id

    def encode(self, text: str) -> list[int]:
        text.encode()  # refuses lone surrogates as ValueError; tokenizers would raise TypeError
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self.rows is not None and ids and max(ids) >= self.rows:
            raise ValueError(
                f"a text holds {self._tokenizer.id_to_token(max(ids))!r}, which is token "
                f"{max(ids)}, and the embedding table has {self.rows} rows: leave it out, or set "
                f"model.vocab_size to {max(ids) + 1} or more"
            )
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int | None:
        ids = self.encode(token)
        return ids[0] if len(ids) == 1 else None

    def save(self, directory: str | pathlib.Path, chat_template: str | None = None) -> None:
        """What was read, with `chat_template` in place of the folder's own default one."""
        # Without a class, transformers may take the model's own and rebuild tokenizer.json by it.
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | json.loads(self.config)
        files = dict(self.files)
        if chat_template is not None:
            files |= _named_templates(config.pop("chat_template", None))
        marker = {"turn_end": self.turn_end, "ends": self.generation_ends, "rows": self.rows}
        write_tokenizer(
            directory,
            {"kind": "huggingface", **marker},
            {**files, "tokenizer.json": self.definition.encode(), **config_file(config)},
            chat_template,
        )

    def fingerprint(self) -> str:
        names = f"{self.eos_id} {self.pad_id}"
        return digest(b"huggingface", names.encode(), self.definition.encode())


def load_hf_tokenizer(folder: pathlib.Path, marker: Mapping[str, Any]) -> HFTokenizer:
    """Of a published folder, or one that `save` wrote with its `marker`. Raises ValueError."""
    definition, config = (
        read_file(folder / name).decode() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    # tokenizer.model is read by llama.cpp's converter and by nothing here.
    names = [_MAP, "added_tokens.json", "tokenizer.model", _TEMPLATE]
    names += [f"{_TEMPLATES}/{path.name}" for path in sorted(folder.glob(f"{_TEMPLATES}/*.jinja"))]
    files = {name: folder / name for name in names if (folder / name).is_file()}
    return HFTokenizer(
        definition,
        config,
        tuple((name, path.read_bytes()) for name, path in files.items()),
        marker.get("turn_end"),
        tuple(marker["ends"] if "ends" in marker else _generation_ends(folder)),
        marker.get("rows"),
    )


def _generation_ends(folder: pathlib.Path) -> list[int]:
    """Where transformers' `generate` stops: generation_config.json, or config.json without one."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        if path.is_file():
            ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            return ends if isinstance(ends, list) else [] if ends is None else [ends]
    return []


def _named_templates(found: str | list[dict[str, str]] | None) -> dict[str, bytes]:
    """Files for the templates beside the default one that a tokenizer_config.json held."""
    others = {t["name"]: t["template"] for t in found} if isinstance(found, list) else {}
    others.pop("default", None)
    for name in others:
        if not re.fullmatch(r"[\w-]+", name):  # it becomes a file's
            raise ValueError(f"tokenizer_config.json: a chat template is named {name!r}; one word")
    return {f"{_TEMPLATES}/{name}.jinja": text.encode() for name, text in others.items()}


def write_tokenizer(
    directory: str | pathlib.Path,
    marker: Mapping[str, Any],
    files: Mapping[str, bytes],
    chat_template: str | None,
) -> None:
    """The folder of a tokenizer; `marker` is what `load_tokenizer` knows it by."""
    template = {} if chat_template is None else {_TEMPLATE: chat_template.encode()}
    marks = {MARKER: (json.dumps(marker) + "\n").encode()}
    for name, content in {**files, **template, **marks}.items():
        path = pathlib.Path(directory) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def config_file(content: Mapping[str, Any]) -> dict[str, bytes]:
    return {"tokenizer_config.json": (json.dumps(content, indent=2) + "\n").encode()}


def read_file(path: pathlib.Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{path} is not a file; a tokenizer directory must hold it")
    return path.read_bytes()


def digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:  # lengths keep ("ab", "c") from ("a", "bc")
        total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()

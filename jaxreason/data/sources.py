"""Where examples come from: records by number, and how a record becomes text or a conversation.

A `JsonlSource` reads .jsonl and .jsonl.gz files by byte offset. Its first opening reads every line
once; a malformed one is written to quarantine.jsonl in the data folder, counted and left out, and
everything else goes on. The index is kept beside it for the next opening.
"""

import dataclasses
import glob
import gzip
import hashlib
import json
import os
import pathlib
import re
import shutil
import string
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from jaxreason.data import arithmetic, countdown
from jaxreason.data.countdown import CountdownConfig
from jaxreason.text.chat import Message

_JSONL_ONLY = (
    "text_field", "prompt_field", "response_field", "reasoning_field", "reasoning",
    "strip_calculator",
)  # fmt: skip
_PROMPTS = {"arithmetic": "{expression}", "countdown": countdown.PROMPT}  # by default
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_HASHES = "####"


class Source(Protocol):
    """Records by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class TextExample:
    """A document, all of which is trained on."""

    text: str


@dataclasses.dataclass(frozen=True)
class ChatExample:
    """A conversation; which roles are trained on is for the pipeline to say."""

    messages: tuple[Message, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source and how its records become examples.

    kind "jsonl" makes texts of `text_field`, or else a question and an answer: the user's turn is
    `prompt_field`, or `prompt_template` with record fields in braces; the assistant's is
    `response_field`, after the reasoning of `reasoning_field`. With `reasoning="split_hashes"` the
    response is GSM8K's: what stands before `#### N` is the reasoning, `#### N` the answer.
    kind "arithmetic" is a prepared benchmark: `rendering` "text" makes texts, "answer", "short_cot"
    and "long_cot" make conversations.

    Raises:
      ValueError: a field is missing, unknown or of no use to the kind.
    """

    name: str
    kind: str = "jsonl"
    path: str | Sequence[str] = ""  # files or patterns; arithmetic: a folder in the data folder
    text_field: str = ""
    prompt_field: str = ""
    prompt_template: str = ""  # e.g. "{question}"; the kind's own when empty
    response_field: str = ""
    reasoning_field: str = ""
    reasoning: str = ""  # "" or "split_hashes"
    strip_calculator: bool = False  # drop GSM8K's <<48/2=24>> spans
    rendering: str = ""  # arithmetic: text, answer, short_cot, long_cot; countdown: see above
    split: str = ""  # arithmetic and countdown: train or test
    countdown: Mapping[str, Any] | CountdownConfig = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.kind == "jsonl":
            self._check_jsonl()
        elif self.kind == "arithmetic":
            self._check_made(("countdown", *_JSONL_ONLY), arithmetic.RENDERINGS)
            if self.rendering == "text" and self.prompt_template:
                raise ValueError(f"{self.key}.prompt_template is set, and a text has no prompt")
            if not isinstance(self.path, str):
                raise ValueError(f"{self.key}.path is {self.path!r}; it must be one folder")
        elif self.kind == "countdown":
            self._check_made(_JSONL_ONLY, countdown.RENDERINGS)
            if not isinstance(self.countdown, CountdownConfig):
                fields = countdown.parse_config(self.countdown, f"{self.key}.countdown")
                object.__setattr__(self, "countdown", fields)
        else:
            raise ValueError(
                f"{self.key}.kind is {self.kind!r}; known kinds: jsonl, arithmetic, countdown"
            )
        self.prompt_names()

    @property
    def key(self) -> str:
        """The key of this source as a user writes it."""
        return f"data.sources.{self.name}"

    def prompt_names(self) -> list[str]:
        """The record fields that make the prompt.

        Raises:
          ValueError: the template is not text with plain field names in braces.
        """
        if not self.prompt_template:
            return [self.prompt_field] if self.prompt_field else []
        wrong = ValueError(
            f"{self.key}.prompt_template is {self.prompt_template!r}; it must be text with one or "
            "more record fields in braces, as in '{question}'"
        )
        try:
            parts = list(string.Formatter().parse(self.prompt_template))
        except ValueError as error:
            raise wrong from error
        names = [name for _, name, _, _ in parts if name is not None]
        plain = all(name.isidentifier() for name in names)
        if not names or not plain or any(spec or conversion for _, _, spec, conversion in parts):
            raise wrong
        return names

    def _check_jsonl(self) -> None:
        self._check_unused(("rendering", "split", "countdown"))
        if not self.path:
            raise ValueError(f"{self.key}.path is empty; it must name .jsonl or .jsonl.gz files")
        if self.prompt_field and self.prompt_template:
            raise ValueError(
                f"{self.key}.prompt_field is {self.prompt_field!r} and prompt_template is "
                f"{self.prompt_template!r}; set one of them"
            )
        chat = bool(self.prompt_field or self.prompt_template)
        if bool(self.text_field) == chat or chat != bool(self.response_field):
            raise ValueError(
                f"{self.key} must set either text_field, or response_field with prompt_field or "
                "prompt_template"
            )
        if self.reasoning not in ("", "split_hashes"):
            raise ValueError(f"{self.key}.reasoning is {self.reasoning!r}; known: split_hashes")
        if self.text_field and (self.reasoning or self.reasoning_field):
            raise ValueError(f"{self.key}.text_field is set, and a text has no reasoning apart")
        if self.reasoning and self.reasoning_field:
            raise ValueError(
                f"{self.key}.reasoning is {self.reasoning!r} and reasoning_field is "
                f"{self.reasoning_field!r}; set one of them"
            )

    def _check_made(self, unused: Sequence[str], renderings: Sequence[str]) -> None:
        self._check_unused(unused)
        if self.rendering not in renderings:
            raise ValueError(
                f"{self.key}.rendering is {self.rendering!r}; it must be one of "
                f"{', '.join(renderings)}"
            )
        if self.split not in ("train", "test"):
            raise ValueError(f"{self.key}.split is {self.split!r}; it must be train or test")

    def _check_unused(self, names: Sequence[str]) -> None:
        for name in names:
            if getattr(self, name):
                raise ValueError(
                    f"{self.key}.{name} is {getattr(self, name)!r}; kind {self.kind!r} has no use "
                    "for it"
                )


# ----------------------------------------------------------------- from a config to examples


def open_source(config: SourceConfig, data_dir: str | os.PathLike) -> Source:
    """The records of a source; prepared files go into `data_dir`.

    Raises:
      ValueError: files are missing, are not what they should be, or hold no valid record.
    """
    data_dir, key = pathlib.Path(data_dir), f"{config.key}.path"
    if config.kind == "jsonl":
        return JsonlSource(config.path, fields=_needed(config), data_dir=data_dir, key=key)
    if config.kind == "countdown":
        if not config.path:
            return countdown.generated(config.countdown, config.split)
        records = JsonlSource(config.path, fields={"target": ""}, data_dir=data_dir, key=key)
        return countdown.from_records(records, config.countdown, config.split, records.line)
    directory = data_dir / (config.path or "arithmetic")
    if not directory.is_dir():
        raise ValueError(f"{key}: no folder {directory}; it must be one made by prepare_arithmetic")
    return arithmetic.open_arithmetic(directory, config.split)


def _needed(config: SourceConfig) -> dict[str, str]:
    """The fields a JSONL record must have, each with a text that must occur in it."""
    if config.text_field:
        return {config.text_field: ""}
    needed = dict.fromkeys(config.prompt_names(), "")
    if config.reasoning_field:
        needed[config.reasoning_field] = ""
    needed[config.response_field] = _HASHES if config.reasoning == "split_hashes" else ""
    return needed


def to_prompt(config: SourceConfig, record: Mapping[str, Any]) -> str:
    """The user's turn of a record. Numbers among its fields are written out."""
    if config.prompt_field:
        return str(record[config.prompt_field])
    return (config.prompt_template or _PROMPTS[config.kind]).format_map(record)


def to_example(config: SourceConfig, record: Mapping[str, Any]) -> TextExample | ChatExample:
    """A record as what it trains. Numbers among its fields are written out."""
    if config.kind == "arithmetic":
        return _arithmetic_example(config, record)
    if config.kind == "countdown":
        pair = countdown.completion(record, config.rendering, config.countdown)
        return _question(to_prompt(config, record), *pair)
    clean: Callable[[Any], str] = _strip_calculator if config.strip_calculator else str
    if config.text_field:
        return TextExample(clean(record[config.text_field]))
    answer, reasoning = clean(record[config.response_field]), None
    if config.reasoning_field:
        reasoning = clean(record[config.reasoning_field])
    if config.reasoning == "split_hashes":
        solution, _, number = answer.rpartition(_HASHES)
        answer, reasoning = f"{_HASHES} {number.strip()}", solution.strip()
    return _question(to_prompt(config, record), answer, reasoning)


def _arithmetic_example(
    config: SourceConfig, record: Mapping[str, Any]
) -> TextExample | ChatExample:
    if config.rendering == "text":
        return TextExample(record["text"])
    reasoning = arithmetic.reasoning(record, config.rendering)
    return _question(to_prompt(config, record), record["answer"], reasoning)


def _question(prompt: str, answer: str, reasoning: str | None) -> ChatExample:
    user = Message(role="user", content=prompt)
    return ChatExample((user, Message(role="assistant", content=answer, reasoning=reasoning)))


def _strip_calculator(value: Any) -> str:
    return _CALCULATOR.sub("", str(value))


def place(source: Source, index: int) -> str:
    """Where a record stands, for messages: its number and, of a file, its line."""
    if isinstance(source, JsonlSource):
        return f"record {index} ({source.line(index)})"
    return f"record {index}"


# ------------------------------------------------------------------------------- JSONL files


def data_root() -> pathlib.Path:
    """The folder of shared data: the environment's JAXREASON_DATA, or else ../shared/data."""
    return pathlib.Path(os.environ.get("JAXREASON_DATA", "../shared/data"))


def find_files(path: str | Sequence[str], key: str) -> list[pathlib.Path]:
    """The files of paths or patterns, each looked for in the current folder and in `data_root()`.

    Raises:
      ValueError: a path or pattern matches nothing, or matches what is not JSONL.
    """
    files = []
    for pattern in [path] if isinstance(path, str) else path:
        places = [pathlib.Path.cwd() / pattern, data_root().resolve() / pattern]
        found = next(filter(None, (sorted(glob.glob(str(place))) for place in places)), [])
        if not found:
            looked = " or ".join(dict.fromkeys(map(str, places)))
            raise ValueError(
                f"{key} is {str(pattern)!r}; no such file ({looked}): give a .jsonl or .jsonl.gz "
                "file, a pattern, or set JAXREASON_DATA to the folder it is in"
            )
        files += map(pathlib.Path, found)
    for file in files:
        if not file.is_file() or not file.name.endswith((".jsonl", ".jsonl.gz")):
            raise ValueError(f"{key} matches {file}; it must be .jsonl or .jsonl.gz files")
    return files


class _Index(NamedTuple):
    """The valid lines of one file, and what was wrong with the others."""

    plain: pathlib.Path  # the file, decompressed
    starts: np.ndarray  # int64, byte offsets
    sizes: np.ndarray  # int64, bytes
    lines: np.ndarray  # int64, counted from 1
    quarantined: list[dict[str, Any]]


class JsonlSource:
    """Random access to the valid records of JSONL files, in order; may be pickled.

    Args:
      path: files or patterns, .jsonl or .jsonl.gz (decompressed once, into `data_dir`).
      fields: the fields a record must have, as text or a number, each with a text that must occur
        in it ("" for any). A line that is not such a JSON object is quarantined.
      data_dir: takes the decompressed files, the indices and quarantine.jsonl.
      key: the config's key of the path, for messages.

    Raises:
      ValueError: a file is missing or broken, or no line is valid.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        fields: Mapping[str, str],
        data_dir: str | os.PathLike,
        key: str = "data.path",
    ):
        self._files = find_files(path, key)
        data_dir = pathlib.Path(data_dir)
        data_dir.mkdir(parents=True, exist_ok=True)
        indices = [_open_index(file, dict(fields), data_dir, key) for file in self._files]
        self._plain = [index.plain for index in indices]
        self._open: dict[int, BinaryIO] = {}
        self._starts = np.concatenate([index.starts for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self._lines = np.concatenate([index.lines for index in indices])
        self._ends = np.cumsum(
            [len(index.starts) for index in indices]
        )  # first record after a file
        quarantined = [entry for index in indices for entry in index.quarantined]
        self.num_quarantined = len(quarantined)
        _quarantine(quarantined, data_dir / "quarantine.jsonl")
        if not len(self):
            raise ValueError(
                f"{key} is {path!r}; it holds no valid record ({self.num_quarantined} malformed "
                f"lines are listed in {data_dir / 'quarantine.jsonl'})"
            )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        number = int(np.searchsorted(self._ends, index, side="right"))
        if number not in self._open:
            self._open[number] = open(self._plain[number], "rb", buffering=0)
        file = self._open[number].fileno()
        return json.loads(os.pread(file, int(self._sizes[index]), int(self._starts[index])))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def line(self, index: int) -> str:
        """The file and line of a record, for messages."""
        file = self._files[int(np.searchsorted(self._ends, index, side="right"))]
        return f"{file} line {self._lines[index]}"


def _open_index(file: pathlib.Path, fields: dict[str, str], data_dir: pathlib.Path, key: str):
    """The index of a file, from the data folder if it is there and the file is unchanged."""
    stat = file.stat()
    version = [str(file.resolve()), stat.st_size, stat.st_mtime_ns]
    stem = file.name.removesuffix(".gz").removesuffix(".jsonl")
    plain = file
    if file.name.endswith(".gz"):
        plain = data_dir / f"{stem}-{_digest(version)}.jsonl"
        if not plain.exists():
            _decompress(file, plain, key)
    cached = data_dir / f"{stem}-{_digest([*version, fields])}.index.npz"
    if not cached.exists():
        index = _read_index(file, plain, fields)
        arrays = {"starts": index.starts, "sizes": index.sizes, "lines": index.lines}
        text = np.array(json.dumps(index.quarantined))
        _write(cached, lambda out: np.savez(out, **arrays, quarantined=text))
    with np.load(cached, allow_pickle=False) as arrays:
        quarantined = json.loads(str(arrays["quarantined"]))
        return _Index(plain, arrays["starts"], arrays["sizes"], arrays["lines"], quarantined)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _decompress(file: pathlib.Path, plain: pathlib.Path, key: str) -> None:
    with gzip.open(file) as text:
        try:
            _write(plain, lambda out: shutil.copyfileobj(text, out, 1 << 20))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{key} matches {file}; it is no complete gzip file: {error}"
            ) from error


def _write(path: pathlib.Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that appears complete or not at all, whoever else writes the same one."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # pids repeat between hosts
    try:
        with open(unfinished, "wb") as out:
            fill(out)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_index(file: pathlib.Path, plain: pathlib.Path, fields: dict[str, str]) -> _Index:
    """Reads every line once. Blank lines are no records."""
    valid, quarantined, start = [], [], 0
    with open(plain, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                fault = _find_fault(line, fields)
                if fault is None:
                    valid.append((start, len(line), number))
                else:
                    text = line.decode(errors="replace").rstrip("\n")[:200]
                    quarantined.append(
                        {"file": str(file), "line": number, "reason": fault, "text": text}
                    )
            start += len(line)
    columns = np.array(valid, np.int64).reshape(-1, 3).T
    return _Index(plain, *columns, quarantined)


def _find_fault(line: bytes, fields: dict[str, str]) -> str | None:
    """What makes a line useless as a record; None if nothing does."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(record, dict):
        return f"not a JSON object but {type(record).__name__}"
    for field, part in fields.items():
        if field not in record:
            return f"field {field!r} is missing"
        value = record[field]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return f"field {field!r} is {type(value).__name__}, not text or a number"
        if part not in str(value):
            return f"field {field!r} has no {part!r}"
        try:
            str(value).encode()
        except UnicodeEncodeError:  # "\ud800": valid JSON, but no tokenizer can read it
            return f"field {field!r} has half of a surrogate pair"
    return None


def _quarantine(entries: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Adds the entries that are not there yet."""
    known = path.read_text().splitlines() if path.exists() else []
    lines = list(dict.fromkeys([*known, *(json.dumps(entry) for entry in entries)]))
    if len(lines) > len(known):
        _write(path, lambda out: out.write("".join(line + "\n" for line in lines).encode()))

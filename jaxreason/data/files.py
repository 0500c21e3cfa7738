"""Files of records: any record by number, whatever the format; malformed ones are quarantined.

.jsonl files are read by byte offset. A .jsonl.gz file is decompressed once, and of a .parquet file
the columns that are needed are written once, as .jsonl into the data folder, a batch of rows at a
time: of Parquet only whole row groups can be decoded (1,000 records in what Hugging Face writes;
0.1 s for 39 MB of traces), so a shuffled read straight from it would take that long a record.
The first opening reads every line once; a malformed one is written to quarantine.jsonl in the data
folder, counted and left out, and everything else goes on. The index is kept for the next opening.
"""

import dataclasses
import datetime
import decimal
import glob
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
CHOICES = ("first", "random", "all")
_FORMAT = 2  # of the kept indices; another number makes all of them anew
_BATCH = 256  # rows of Parquet in memory at once


class Found(NamedTuple):
    """What a rule makes of one record."""

    parts: tuple[int, ...]  # the parts of it to use: of a record with several traces, their numbers
    faults: tuple[str, ...] = ()  # why the others cannot be used
    filtered: int = 0  # parts that could be used and are not wanted


class Rule(Protocol):
    """Which records of a file are good for something. May be pickled."""

    def identity(self) -> Any:
        """JSON that differs where another rule may find something else."""

    def columns(self) -> tuple[list[str], list[str]]:
        """The fields that a record must have, and others that are read where it has them."""

    def examine(self, record: dict[str, Any]) -> Found: ...

    def take(self, record: dict[str, Any], part: int) -> dict[str, Any]:
        """The record as it is with one of its parts only."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """Records with these fields, as text or a number; each text must hold the one beside it."""

    fields: tuple[tuple[str, str], ...]
    optional: tuple[str, ...] = ()  # what else is read of Parquet, where it is there

    def identity(self) -> Any:
        return self.fields

    def columns(self) -> tuple[list[str], list[str]]:
        return [name for name, _ in self.fields], list(self.optional)

    def examine(self, record: dict[str, Any]) -> Found:
        fault = field_fault(record, dict(self.fields))
        return Found((0,)) if fault is None else Found((), (fault,))

    def take(self, record: dict[str, Any], part: int) -> dict[str, Any]:
        return record


def field_fault(record: Mapping[str, Any], fields: Mapping[str, str]) -> str | None:
    """What is wrong with fields that must be text or a number and hold a text; None if nothing."""
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


def data_root() -> pathlib.Path:
    """The folder of shared data: the environment's JAXREASON_DATA, or else ../shared/data."""
    return pathlib.Path(os.environ.get("JAXREASON_DATA", "../shared/data"))


def find_files(
    path: str | Sequence[str], key: str, data_dir: str | os.PathLike
) -> list[pathlib.Path]:
    """The files of paths or patterns, each looked for in the current folder and in `data_root()`.

    "@NAME" is NAME.jsonl in `data_dir`, which an earlier stage of the run wrote there.

    Raises:
      ValueError: a path or pattern matches nothing, or matches what is no file of records.
    """
    files = []
    for pattern in [path] if isinstance(path, str) else path:
        if pattern.startswith("@"):
            files.append(_of_stage(pattern, key, pathlib.Path(data_dir)))
            continue
        places = [pathlib.Path.cwd() / pattern, data_root().resolve() / pattern]
        found = next(filter(None, (sorted(glob.glob(str(place))) for place in places)), [])
        if not found:
            looked = " or ".join(dict.fromkeys(map(str, places)))
            raise ValueError(
                f"{key} is {str(pattern)!r}; no such file ({looked}): give a .jsonl, .jsonl.gz or "
                ".parquet file, a pattern, or set JAXREASON_DATA to the folder it is in"
            )
        files += map(pathlib.Path, found)
    for file in files:
        if not file.is_file() or not file.name.endswith(ENDINGS):
            raise ValueError(f"{key} matches {file}; it must be {', '.join(ENDINGS)} files")
    return files


def _of_stage(pattern: str, key: str, data_dir: pathlib.Path) -> pathlib.Path:
    file = data_dir / f"{pattern[1:]}.jsonl"
    if not file.is_file():
        raise ValueError(
            f"{key} is {pattern!r}; no file {file}: an earlier stage of this run has to write it"
        )
    return file


class _Index(NamedTuple):
    """The valid records of one file, and what was wrong with the others."""

    plain: pathlib.Path  # the file as .jsonl
    starts: np.ndarray  # int64, byte offsets
    sizes: np.ndarray  # int64, bytes
    lines: np.ndarray  # int64, counted from 1
    parts: np.ndarray  # int64; a record with several has as many entries
    filtered: int
    quarantined: list[dict[str, Any]]


class JsonlSource:
    """Random access to the valid records of files, in order; may be pickled.

    Args:
      path: files or patterns, as `find_files` takes them.
      fields: the fields a record must have, as text or a number, each with a text that must occur
        in it ("" for any); or a rule of its own. What breaks it is quarantined.
      data_dir: takes the decompressed files, the indices and quarantine.jsonl.
      key: the config's key of the path, for messages.
      choose: of the parts that a rule finds in a record, the first, one at random or all; with all,
        each counts as a record.
      seed: of that choice.

    Raises:
      ValueError: a file is missing or broken, lacks a field altogether, or no record is valid.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        fields: Mapping[str, str] | Rule,
        data_dir: str | os.PathLike,
        key: str = "data.path",
        choose: str = "first",
        seed: int = 0,
    ):
        self._rule = Fields(tuple(fields.items())) if isinstance(fields, Mapping) else fields
        data_dir = pathlib.Path(data_dir)
        data_dir.mkdir(parents=True, exist_ok=True)
        self._files = find_files(path, key, data_dir)
        indices = [_open_index(file, self._rule, data_dir, key) for file in self._files]
        indices = [
            _chosen(index, choose, np.random.default_rng([seed, number]))
            for number, index in enumerate(indices)
        ]
        self._plain = [index.plain for index in indices]
        self._open: dict[int, BinaryIO] = {}
        join = lambda name: np.concatenate([getattr(index, name) for index in indices])
        self._starts, self._sizes = join("starts"), join("sizes")
        self._lines, self._parts = join("lines"), join("parts")
        self._ends = np.cumsum([len(index.starts) for index in indices])  # first after a file
        quarantined = [entry for index in indices for entry in index.quarantined]
        self.num_quarantined = len(quarantined)
        self.num_filtered = sum(index.filtered for index in indices)
        _quarantine(quarantined, data_dir / "quarantine.jsonl")
        if not len(self):
            left_out = f"; {self.num_filtered} are marked wrong or unfinished"
            raise ValueError(
                f"{key} is {path!r}; it holds no valid record ({self.num_quarantined} malformed "
                f"ones are listed in {data_dir / 'quarantine.jsonl'}"
                f"{left_out if self.num_filtered else ''})"
            )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        number = int(np.searchsorted(self._ends, index, side="right"))
        if number not in self._open:
            self._open[number] = open(self._plain[number], "rb", buffering=0)
        file = self._open[number].fileno()
        record = json.loads(os.pread(file, int(self._sizes[index]), int(self._starts[index])))
        return self._rule.take(record, int(self._parts[index]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def line(self, index: int) -> str:
        """The file and line of a record (of Parquet the row, from 1), for messages."""
        file = self._files[int(np.searchsorted(self._ends, index, side="right"))]
        return f"{file} {_unit(file)} {self._lines[index]}"


def _unit(file: pathlib.Path) -> str:
    return "row" if file.suffix == ".parquet" else "line"


def _chosen(index: _Index, choose: str, random: np.random.Generator) -> _Index:
    """The index with as many entries of a record as `choose` says."""
    assert choose in CHOICES, choose
    if choose == "all":
        return index
    _, first, count = np.unique(index.lines, return_index=True, return_counts=True)
    taken = first if choose == "first" else first + random.integers(0, count)
    columns = ("starts", "sizes", "lines", "parts")
    return index._replace(**{name: getattr(index, name)[taken] for name in columns})


# ---------------------------------------------------------------------------------- one file


def _open_index(file: pathlib.Path, rule: Rule, data_dir: pathlib.Path, key: str) -> _Index:
    """The index of a file, from the data folder if it is there and the file is unchanged."""
    stat = file.stat()
    version = [_FORMAT, str(file.resolve()), stat.st_size, stat.st_mtime_ns]
    ending = next(e for e in ENDINGS if file.name.endswith(e))
    stem, plain = file.name.removesuffix(ending), file
    if ending == ".jsonl.gz":
        plain = data_dir / f"{stem}-{_digest(version)}.jsonl"
        if not plain.exists():
            _decompress(file, plain, key)
    elif ending == ".parquet":
        plain = data_dir / f"{stem}-{_digest([*version, rule.columns()])}.jsonl"
        if not plain.exists():
            _convert(file, plain, rule, key)
    cached = data_dir / f"{stem}-{_digest([*version, rule.identity()])}.index.npz"
    columns = ("starts", "sizes", "lines", "parts")
    if not cached.exists():
        index = _read_index(file, plain, rule)
        if not len(index.starts):
            _check_fields(file, plain, rule, key)
        arrays = {name: getattr(index, name) for name in columns}
        text = np.array(json.dumps([index.filtered, index.quarantined]))
        write_whole(cached, lambda out: np.savez(out, **arrays, others=text))
    with np.load(cached, allow_pickle=False) as arrays:
        return _Index(plain, *(arrays[n] for n in columns), *json.loads(str(arrays["others"])))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _decompress(file: pathlib.Path, plain: pathlib.Path, key: str) -> None:
    with gzip.open(file) as text:
        try:
            write_whole(plain, lambda out: shutil.copyfileobj(text, out, 1 << 20))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{key} matches {file}; it is no complete gzip file: {error}"
            ) from error


def _convert(file: pathlib.Path, plain: pathlib.Path, rule: Rule, key: str) -> None:
    """Writes the columns that `rule` reads as .jsonl, a line a row."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{key} matches {file}; Parquet needs pyarrow, which is not installed: pip install "
            "pyarrow"
        ) from error
    try:
        with parquet.ParquetFile(file) as opened:
            there = opened.schema_arrow.names
            needed, optional = rule.columns()
            missing = [name for name in needed if name not in there]
            if missing:
                raise ValueError(
                    f"{key} matches {file}; it has no column {missing[0]!r}, its columns are "
                    f"{', '.join(there)}"
                )
            columns = [*needed, *(name for name in optional if name in there)]

            def fill(out: BinaryIO) -> None:
                for batch in opened.iter_batches(_BATCH, columns=list(dict.fromkeys(columns))):
                    for record in batch.to_pylist():
                        line = json.dumps(record, ensure_ascii=False, default=_written_out)
                        out.write(line.encode() + b"\n")

            write_whole(plain, fill)
    except (pyarrow.ArrowException, OSError, TypeError) as error:
        raise ValueError(
            f"{key} matches {file}; it cannot be read as Parquet: {' '.join(str(error).split())}"
        ) from error


def _written_out(value: Any) -> str:
    """Parquet's values that JSON has not. Raises TypeError for one that is no text either."""
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal):
        return str(value)
    raise TypeError(f"a needed column holds {type(value).__name__}")


def write_whole(path: pathlib.Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that appears complete, once it is on the disk, or not at all.

    Several may write the same one.
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # pids repeat between hosts
    try:
        with open(unfinished, "wb") as out:
            fill(out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_index(file: pathlib.Path, plain: pathlib.Path, rule: Rule) -> _Index:
    """Reads every line once. Blank lines are no records."""
    valid, quarantined, filtered, start = [], [], 0, 0
    with open(plain, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                found = _examine(line, rule)
                filtered += found.filtered
                valid += [(start, len(line), number, part) for part in found.parts]
                text = line.decode(errors="replace").rstrip("\n")[:200] if found.faults else ""
                quarantined += [
                    {"file": str(file), _unit(file): number, "reason": fault, "text": text}
                    for fault in found.faults
                ]
            start += len(line)
    columns = np.array(valid, np.int64).reshape(-1, 4).T
    return _Index(plain, *columns, filtered, quarantined)


def _examine(line: bytes, rule: Rule) -> Found:
    """What a line is good for."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Found((), (f"not JSON: {error}",))
    if not isinstance(record, dict):
        return Found((), (f"not a JSON object but {type(record).__name__}",))
    return rule.examine(record)


def _check_fields(file: pathlib.Path, plain: pathlib.Path, rule: Rule, key: str) -> None:
    """Raises ValueError where a file without a valid record has another schema altogether."""
    with open(plain, "rb") as lines:
        first = next(filter(bytes.strip, lines), b"{")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return
    needed, _ = rule.columns()
    missing = [name for name in needed if isinstance(record, dict) and name not in record]
    if missing:
        raise ValueError(
            f"{key} matches {file}; its records have no field {missing[0]!r}, the first has "
            f"{', '.join(map(str, record)) or 'none at all'}"
        )


def _quarantine(entries: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Adds the entries that are not there yet."""
    known = path.read_text().splitlines() if path.exists() else []
    lines = list(dict.fromkeys([*known, *(json.dumps(entry) for entry in entries)]))
    if len(lines) > len(known):
        write_whole(path, lambda out: out.write("".join(line + "\n" for line in lines).encode()))

"""The top-k store: a teacher's k likeliest next tokens for every place of a data set.

Written once, before the student trains, so that the teacher need not be in memory beside it. With
Qwen3's 151,936 tokens a place has 600 kB of logits; with k = 64 it has 384 bytes here.

A folder holds header.json and, of every `part_documents` documents, two files:
  part-N.npz           the number of places of each document, and a fingerprint of its ids
  part-N.array_record  the places of those documents one after another, `chunk` of them a record:
                       ids int32 [chunk, k], then log-probs bfloat16 [chunk, k]; the last is filled
                       up with zeros. Uncompressed: log-probs are noise to a compressor.
A document of n ids has n - 1 places; row t of it is about ids[t + 1], given those before.

Part N is written by process N mod the number of processes, to a hidden file that is renamed when it
is whole: what is there is right, and a run that was killed goes on with the parts that are not.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxreason.data.files import write_whole

# ids_T of some documents -> ids_TK, logprobs_TK of each
Score = Callable[[Sequence[np.ndarray]], Iterable[tuple[np.ndarray, np.ndarray]]]

_BLOCK = 1 << 16  # ArrayRecord files are whole blocks, each with 24 bytes of its own
_RECORD = 64  # bytes around a record, as measured with array_record 0.8.6
_OPEN = 64  # parts held open by a reader


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """header.json: what a store holds, and of what.

    Raises:
      ValueError: a number is out of its range.
    """

    vocabulary: str  # Tokenizer.fingerprint()
    source: str  # what the documents are, in words: for messages, and so that none is mixed up
    k: int
    temperature: float = 1.0  # the log-probs are those of logits / it
    chunk: int = 256  # places of a record
    part_documents: int = 128
    documents: int = 0
    tokens: int = 0  # places of all documents

    def __post_init__(self):
        for name in ("k", "chunk", "part_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")

    @property
    def record_bytes(self) -> int:
        return self.chunk * self.k * 6

    @property
    def num_parts(self) -> int:
        return -(-self.documents // self.part_documents)

    def documents_of(self, part: int) -> range:
        first = part * self.part_documents
        return range(first, min(first + self.part_documents, self.documents))


def estimate_bytes(header: Header, num_places: Sequence[int]) -> int:
    """Bytes of the files of a store whose documents have so many places, within 5 %."""
    total = 0
    for part in range(header.num_parts):
        own = header.documents_of(part)
        records = -(-sum(num_places[i] for i in own) // header.chunk)
        data = records * (header.record_bytes + _RECORD) * (1 + 24 / _BLOCK)
        total += _BLOCK * (-(-int(data) // _BLOCK) + 1)  # the last block is the file's footer
        total += 600 + 12 * len(own)  # the .npz
    return total


def fingerprint(ids_T: np.ndarray) -> int:
    """64 bits that tell one document from another."""
    data = np.ascontiguousarray(ids_T, np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# ----------------------------------------------------------------------------------- writing


def write(
    directory: str | pathlib.Path,
    documents: Sequence[np.ndarray],
    score: Score,
    header: Header,
    *,
    process: int = 0,
    processes: int = 1,
    say: Callable[[str], Any] = lambda text: None,
    progress: Callable[[int, int], Any] = lambda done, own: None,
) -> Header:
    """Writes this process's parts of a store; those that are there already are kept.

    Args:
      documents: ids of each, in the order of the source; an empty one has no places.
      score: takes the ids_T of a part's documents that have places, and gives (ids_TK,
        logprobs_TK) of each in that order, one row for each id but the last.
      header: what the store shall be; its counts of documents and tokens are filled in.
      say: takes the estimate of the size, in one line, before anything is written.
      progress: takes how many of this process's documents are done, and their number.

    Raises:
      ValueError: the disk has not the room, the folder holds another store, or `score` gives
        something else than it should.
    """
    directory = pathlib.Path(directory)
    num_places = [max(len(documents[i]) - 1, 0) for i in range(len(documents))]
    header = dataclasses.replace(header, documents=len(documents), tokens=sum(num_places))
    directory.mkdir(parents=True, exist_ok=True)
    _agree(directory, header)
    _check_room(directory, header, num_places, say)
    own = range(process, header.num_parts, processes)
    count = sum(len(header.documents_of(part)) for part in own)
    done = 0
    for part in own:
        if not _data_file(directory, part).exists():
            _write_part(directory, part, documents, score, header)
        done += len(header.documents_of(part))
        progress(done, count)
    return header


def _data_file(directory: pathlib.Path, part: int) -> pathlib.Path:
    return directory / f"part-{part:05d}.array_record"


def _agree(directory: pathlib.Path, header: Header) -> None:
    """Leaves the header, or finds that the one there is the same."""
    path, wanted = directory / "header.json", dataclasses.asdict(header)
    if not path.exists():
        text = json.dumps(wanted, indent=2) + "\n"
        write_whole(path, lambda out: out.write(text.encode()))
    found = json.loads(path.read_text())
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{directory} holds a store whose {name} is {found.get(name)!r}, not {value!r}; "
                "use another folder or remove it"
            )


def _check_room(
    directory: pathlib.Path, header: Header, num_places: Sequence[int], say: Callable[[str], Any]
) -> None:
    size = estimate_bytes(header, num_places)
    there = sum(path.stat().st_size for path in directory.glob("part-*"))
    free = shutil.disk_usage(directory).free
    say(
        f"teacher's top {header.k} for {header.documents:,} documents, {header.tokens:,} tokens of "
        f"{header.source}: {size / 1e9:,.3f} GB in {directory} ({there / 1e9:,.3f} GB are there)"
    )
    if size - there > free:
        raise ValueError(
            f"{directory} needs {(size - there) / 1e9:,.3f} GB and the disk has {free / 1e9:,.3f} "
            "GB; lower k, take fewer documents or another workdir"
        )


def _write_part(
    directory: pathlib.Path,
    part: int,
    documents: Sequence[np.ndarray],
    score: Score,
    header: Header,
) -> None:
    from array_record.python import array_record_module

    final = _data_file(directory, part)
    for left in directory.glob(f".part-{part:05d}.*"):  # by a process that was killed
        left.unlink()
    unfinished = final.with_name(f".{final.name}")
    own = {index: documents[index] for index in header.documents_of(part)}
    num_places = [max(len(ids_T) - 1, 0) for ids_T in own.values()]
    prints = [fingerprint(ids_T) for ids_T in own.values()]

    def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        asked = {index: ids_T for index, ids_T in own.items() if len(ids_T) > 1}
        found = score(list(asked.values())) if asked else ()
        for (index, ids_T), scores in zip(asked.items(), found, strict=True):
            yield _checked(scores, ids_T, index, header)

    writer = array_record_module.ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
    for record in _records(rows(), header):
        writer.write(record)
    writer.close()
    index = final.with_suffix(".npz")
    arrays = {"places": np.array(num_places, np.int32), "prints": np.array(prints, np.uint64)}
    write_whole(index, lambda out: np.savez(out, **arrays))
    unfinished.rename(final)  # last: a part is there when this file is


def _checked(
    scores: tuple[np.ndarray, np.ndarray], ids_T: np.ndarray, index: int, header: Header
) -> tuple[np.ndarray, np.ndarray]:
    ids_TK, logprobs_TK = map(np.asarray, scores)
    shape = (len(ids_T) - 1, header.k)
    if ids_TK.shape != shape or logprobs_TK.shape != shape:
        raise ValueError(
            f"the teacher's scores of document {index} have shapes {ids_TK.shape} and "
            f"{logprobs_TK.shape}; both must be {shape}"
        )
    if not (logprobs_TK <= 0).all():  # NaN too
        raise ValueError(
            f"the teacher's log-probs of document {index} are not all 0 or less (the largest is "
            f"{np.max(logprobs_TK)})"
        )
    return ids_TK.astype(np.int32), logprobs_TK.astype(ml_dtypes.bfloat16)


def _records(rows: Iterator[tuple[np.ndarray, np.ndarray]], header: Header) -> Iterator[bytes]:
    """Documents' rows in records of `chunk` rows; the last is filled up."""
    ids = np.zeros((0, header.k), np.int32)
    logprobs = np.zeros((0, header.k), ml_dtypes.bfloat16)
    encode = lambda a, b: a.tobytes() + b.tobytes()
    for ids_TK, logprobs_TK in rows:
        ids, logprobs = np.concatenate([ids, ids_TK]), np.concatenate([logprobs, logprobs_TK])
        whole = len(ids) - len(ids) % header.chunk
        for at in range(0, whole, header.chunk):
            yield encode(ids[at : at + header.chunk], logprobs[at : at + header.chunk])
        ids, logprobs = ids[whole:], logprobs[whole:]
    if len(ids):
        missing = [(0, header.chunk - len(ids)), (0, 0)]
        yield encode(np.pad(ids, missing), np.pad(logprobs, missing))


# ----------------------------------------------------------------------------------- reading


def read_header(directory: str | pathlib.Path, key: str = "data.teacher") -> Header:
    """Raises ValueError, naming `key`, where there is no store."""
    path = pathlib.Path(directory) / "header.json"
    if not path.is_file():
        raise ValueError(f"{key}: no store in {directory}; it must be written before")
    return Header(**json.loads(path.read_text()))


class Store:
    """A finished store: any document's rows by its number.

    Args:
      vocabulary: fingerprint of the student's tokenizer.
      num_documents: records of the source that is trained on.
      num_tokens: of the vocabulary; None: ids are taken as they are.
      key: the config's key of the folder, for messages.

    Raises:
      ValueError: there is no store, a part is missing, or it is of another vocabulary or source.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        *,
        vocabulary: str,
        num_documents: int,
        num_tokens: int | None = None,
        key: str = "data.teacher",
    ):
        self._directory, self._key = pathlib.Path(directory), key
        self._num_tokens = num_tokens
        self.header = read_header(self._directory, key)
        if self.header.vocabulary != vocabulary:
            raise ValueError(
                f"{key}: the store in {self._directory} is of another vocabulary (fingerprint "
                f"{self.header.vocabulary[:12]}, the student's tokenizer has {vocabulary[:12]}); a "
                "teacher's logits are of use only to a student with its tokens"
            )
        if self.header.documents != num_documents:
            raise ValueError(
                f"{key}: the store in {self._directory} is of {self.header.documents} documents "
                f"({self.header.source}), the source has {num_documents}"
            )
        parts = range(self.header.num_parts)
        missing = [part for part in parts if not _data_file(self._directory, part).exists()]
        if missing:
            raise ValueError(
                f"{key}: the store in {self._directory} lacks {len(missing)} of {len(parts)} parts "
                f"(part {missing[0]} is the first); run its writer again"
            )
        self._places, prints, self._first = [], [], []
        for part in parts:
            with np.load(_data_file(self._directory, part).with_suffix(".npz")) as arrays:
                self._places.append(arrays["places"])
                self._first.append(np.cumsum(arrays["places"]) - arrays["places"])
                prints.append(arrays["prints"])
        self._prints = np.concatenate(prints) if prints else np.zeros(0, np.uint64)
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __len__(self) -> int:
        return self.header.documents

    def check(self, index: int, ids_T: np.ndarray) -> None:
        """Raises ValueError where the document has other ids than the teacher scored."""
        if fingerprint(ids_T) != int(self._prints[index]):
            raise ValueError(
                f"{self._key}: document {index} has other tokens than those scored in "
                f"{self._directory} ({self.header.source}); data and chat must be as they were "
                "then, or the store written anew"
            )

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids_TK int32, logprobs_TK bfloat16) of a document.

        Raises ValueError where an id is none of the vocabulary.
        """
        part, number = divmod(range(len(self))[index], self.header.part_documents)
        first, places = int(self._first[part][number]), int(self._places[part][number])
        chunk, k = self.header.chunk, self.header.k
        if not places:
            return np.zeros((0, k), np.int32), np.zeros((0, k), ml_dtypes.bfloat16)
        begin, end = first // chunk, -(-(first + places) // chunk)
        records = self._reader(part).read(list(range(begin, end)))
        split = chunk * k * 4
        ids = b"".join(record[:split] for record in records)
        logprobs = b"".join(record[split:] for record in records)
        own = slice(first - begin * chunk, first - begin * chunk + places)
        ids_TK = np.frombuffer(ids, np.int32).reshape(-1, k)[own]
        wrong = ids_TK.min() < 0 or (self._num_tokens and ids_TK.max() >= self._num_tokens)
        if wrong:
            raise ValueError(
                f"{self._key}: document {index} of the store in {self._directory} has ids from "
                f"{ids_TK.min()} to {ids_TK.max()}; the vocabulary has {self._num_tokens} tokens"
            )
        return ids_TK, np.frombuffer(logprobs, ml_dtypes.bfloat16).reshape(-1, k)[own]

    def _reader(self, part: int):
        from array_record.python import array_record_module

        if part not in self._readers:
            if len(self._readers) == _OPEN:
                self._readers.popitem(last=False)[1].close()
            path = str(_data_file(self._directory, part))
            # Read-ahead and threads are for reading in order: without them opening takes 0.3 ms
            # and not 1.8, three records 0.3 and not 1.6.
            self._readers[part] = array_record_module.ArrayRecordReader(
                path, "readahead_buffer_size:0,max_parallelism:0"
            )
        self._readers.move_to_end(part)
        return self._readers[part]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": collections.OrderedDict()}

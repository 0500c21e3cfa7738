"""Laying documents into rows of a fixed length, in numpy and without a token at a time in Python.

A document of n ids takes n places of a row. Input i of a document has id i + 1 as its target, under
that id's weight; the document's last input has the padding id and weight 0. Inside a row documents
lie one after another, numbered 1, 2, ... by `segments_BT`, and positions restart at 0 with each.

A pair of documents (a better and a worse answer) lies in one row, one right after the other: where
all are pairs, the better ones are the odd segments and each worse one is the next even segment.

Four ways to choose the row of a document, each with a small JSON state:
  first_fit  Several rows are open at a time; a document goes into the first with room for it.
  best_fit   As many documents as so many rows can hold are placed by best-fit decreasing. Rows are
             fuller, most of all with long documents; those of a window are dealt out to its batches
             in turn, so that no batch has the long ones alone.
  concat     For pretraining text. Rows are filled to the last place; a document is cut at the row's
             end and goes on as a new segment of the next row. The last input before a cut still has
             the next id as its target, so only the first id of a document is never a target.
  per_batch  Every batch holds exactly so many documents, placed by best-fit decreasing. Two runs
             over the same records see the same ones in each update, however long their texts are.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxreason.types import Batch, DistillBatch, TaskBatch

# Rows of a window. Of first_fit, windows of 16, 64 and 256 rows are filled to 93.0, 95.7 and 96.8 %
# by documents of 20 to 140 ids in rows of 256, and to 96.2, 97.0 and 97.3 % by GSM8K in rows of
# 1,024. Windows of 64 rows, first_fit and best_fit, with Qwen3's tokens: GSM8K in rows of 1,024
# 96.2 and 98.1 %; shared/data/long_cot (median 2,288, a tenth over 32,000) in rows of 8,192 97.0
# and 99.1 %, of 16,384 98.8 and 99.4 %, longer ones left out.
OPEN_ROWS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A tokenized document. `weights_T` holds the weight of each id as something to predict."""

    ids_T: np.ndarray  # int32
    weights_T: np.ndarray  # float32
    task: int = 0  # 1 + the place in types.TASKS; 0: none
    # (ids_TK, logprobs_TK) of a teacher about each id but the first, read when they are laid out.
    teacher: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None
    rejected: "Example | None" = None  # the worse of a pair; this is the better

    @property
    def size(self) -> int:
        """Places of a row that it takes."""
        return len(self.ids_T) + (len(self.rejected.ids_T) if self.rejected else 0)


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a batch holds beside the five arrays of types.Batch."""

    tasks: bool = False  # types.TaskBatch
    top_k: int = 0  # above 0: types.DistillBatch, with so many tokens of the teacher

    def __post_init__(self):
        assert not (self.tasks and self.top_k), "a batch has tasks or a teacher"


PLAIN = Extras()


class Stream(Protocol):
    """The documents to pack, in order. `peek` is None at the end; the state is JSON.

    A packer calls `renew` where it holds no part of what it took: from there on, and only there, a
    resumed stream may choose its documents by other weights than the run that was interrupted.
    """

    def peek(self) -> Example | None: ...
    def advance(self) -> None: ...
    def renew(self) -> None: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """The ids [start, stop) of an example, laid into a row; of a pair, both documents' ids."""

    example: Example
    row: int
    start: int
    stop: int


def lay_out(
    pieces: Sequence[Piece], num_rows: int, length: int, pad_id: int, extras: Extras = PLAIN
) -> Batch:
    """The pieces as `num_rows` rows of `length` places; within a row in the order given."""
    batch = _empty(num_rows, length, pad_id, extras)
    pieces = [document for piece in pieces for document in _documents(piece)]
    if not pieces:
        return batch
    pieces = sorted(pieces, key=lambda piece: piece.row)  # stable
    # Below, N counts the places of all pieces one after another and P the pieces.
    row_P = np.array([p.row for p in pieces])
    size_P = np.array([p.stop - p.start for p in pieces])
    end_P = np.cumsum(size_P)
    first_P = end_P - size_P
    used_B = np.bincount(row_P, size_P, minlength=num_rows).astype(np.int64)
    assert used_B.max() <= length, f"{used_B.max()} ids in a row of {length}"
    row_first_B = np.cumsum(used_B) - used_B
    row_piece_B = np.searchsorted(row_P, np.arange(num_rows))
    segment_P = np.arange(len(pieces)) - row_piece_B[row_P] + 1

    place_N = np.arange(end_P[-1])
    to_N = place_N + np.repeat(row_P * length - row_first_B[row_P], size_P)
    tokens_N = np.concatenate([p.example.ids_T[p.start : p.stop] for p in pieces])
    weights_N = np.concatenate([p.example.weights_T[p.start : p.stop] for p in pieces])
    batch.tokens_BT.flat[to_N] = tokens_N
    batch.targets_BT.flat[to_N] = _shift(tokens_N, end_P, [_after(p, pad_id)[0] for p in pieces])
    batch.weights_BT.flat[to_N] = _shift(weights_N, end_P, [_after(p, pad_id)[1] for p in pieces])
    batch.segments_BT.flat[to_N] = np.repeat(segment_P, size_P)
    batch.positions_BT.flat[to_N] = place_N - np.repeat(first_P, size_P)
    if extras.tasks:
        batch.tasks_BT.flat[to_N] = np.repeat([p.example.task for p in pieces], size_P)
    if extras.top_k:
        for piece, first in zip(pieces, to_N[first_P]):
            _lay_teacher(batch, piece, first)
    return batch


def _empty(num_rows: int, length: int, pad_id: int, extras: Extras) -> Batch:
    """Rows of padding."""
    zeros = lambda dtype, *dims: np.zeros((num_rows, length, *dims), dtype)
    fields = {
        "tokens_BT": np.full((num_rows, length), pad_id, np.int32),
        "targets_BT": np.full((num_rows, length), pad_id, np.int32),
        "weights_BT": zeros(np.float32),
        "segments_BT": zeros(np.int32),
        "positions_BT": zeros(np.int32),
    }
    if extras.tasks:
        return TaskBatch(**fields, tasks_BT=zeros(np.int32))
    if extras.top_k:
        return DistillBatch(
            **fields,
            teacher_ids_BTK=zeros(np.int32, extras.top_k),
            teacher_logprobs_BTK=zeros(ml_dtypes.bfloat16, extras.top_k),
        )
    return Batch(**fields)


def _documents(piece: Piece) -> list[Piece]:
    """Of a pair its two documents, otherwise the piece."""
    example = piece.example
    if example.rejected is None:
        return [piece]
    assert (piece.start, piece.stop) == (0, example.size), "a pair is never cut"
    both = (example, example.rejected)
    return [Piece(document, piece.row, 0, len(document.ids_T)) for document in both]


def _lay_teacher(batch: DistillBatch, piece: Piece, first: int) -> None:
    """Input i of a document has what the teacher says of id i + 1; its last input has nothing."""
    size = min(piece.stop, len(piece.example.ids_T) - 1) - piece.start
    for rows_BTK, values_TK in zip(
        (batch.teacher_ids_BTK, batch.teacher_logprobs_BTK), piece.example.teacher()
    ):
        rows_NK = rows_BTK.reshape(-1, rows_BTK.shape[-1])  # a view
        rows_NK[first : first + size] = values_TK[piece.start : piece.start + size]


def _after(piece: Piece, pad_id: int) -> tuple[int, float]:
    """What the last input of a piece predicts, and its weight."""
    example = piece.example
    if piece.stop == len(example.ids_T):
        return pad_id, 0.0
    return example.ids_T[piece.stop], example.weights_T[piece.stop]


def _shift(values_N: np.ndarray, end_P: np.ndarray, last_P: Sequence) -> np.ndarray:
    """Each value's successor; of the last value of a piece, the one given."""
    shifted_N = np.empty_like(values_N)
    shifted_N[:-1] = values_N[1:]
    shifted_N[end_P - 1] = last_P
    return shifted_N


def fill_first_fit(stream: Stream, num_rows: int, length: int) -> list[Piece]:
    """Takes documents until one fits into no row; that one stays in the stream."""
    free_B = np.full(num_rows, length)
    pieces = []
    while (example := stream.peek()) is not None:
        size = example.size
        assert size <= length, f"a document of {size} ids for rows of {length}"
        row = int(np.argmax(free_B >= size))
        if free_B[row] < size:
            break
        pieces.append(Piece(example, row, 0, size))
        free_B[row] -= size
        stream.advance()
    return pieces


def fill_best_fit(stream: Stream, num_rows: int, length: int) -> list[Piece]:
    """Takes as many documents as best-fit decreasing lays into the rows; the next stays."""
    examples, states, total = [], [], 0
    while (example := stream.peek()) is not None and total + example.size <= num_rows * length:
        assert example.size <= length, f"a document of {example.size} ids for rows of {length}"
        states.append(stream.get_state())
        examples.append(example)
        total += example.size
        stream.advance()
    sizes, count = [example.size for example in examples], len(examples)
    rows = best_fit_decreasing(sizes, length)
    while count and max(rows) >= num_rows:
        count -= 1
        rows = best_fit_decreasing(sizes[:count], length)
    if count < len(examples):
        stream.set_state(states[count])
    return [Piece(e, row, 0, e.size) for e, row in zip(examples, rows)]


def fill_concat(stream: Stream, offset: int, num_rows: int, length: int) -> tuple[list[Piece], int]:
    """Fills rows to the last place, from id `offset` of the next document; and the offset after."""
    pieces = []
    for row in range(num_rows):
        free = length
        while free:
            if offset == 0:
                stream.renew()
            example = stream.peek()
            if example is None:
                break
            stop = min(len(example.ids_T), offset + free)
            pieces.append(Piece(example, row, offset, stop))
            free -= stop - offset
            offset = stop
            if stop == len(example.ids_T):
                stream.advance()
                offset = 0
    return pieces, offset


def best_fit_decreasing(sizes: Sequence[int], length: int) -> list[int]:
    """The row of each document: longest first, into the fullest row that has room for it."""
    rows = [0] * len(sizes)
    free: list[int] = []
    for index in sorted(
        range(len(sizes)), key=lambda i: -sizes[i]
    ):  # stable: ties keep their order
        size = sizes[index]
        row = min(
            (row for row, room in enumerate(free) if room >= size), key=free.__getitem__, default=-1
        )
        if row < 0:
            row = len(free)
            free.append(length)
        free[row] -= size
        rows[index] = row
    return rows


class _Packer:
    """What every packer has."""

    def __init__(
        self, stream: Stream, num_rows: int, length: int, pad_id: int, *, extras: Extras = PLAIN
    ):
        self._stream, self._rows, self._length = stream, num_rows, length
        self._pad_id, self._extras = pad_id, extras

    def _lay_out(self, pieces: Sequence[Piece]) -> Batch:
        return lay_out(pieces, self._rows, self._length, self._pad_id, self._extras)


class FirstFit(_Packer):
    """Rows from windows of at least OPEN_ROWS rows; the state is the window's start and a count."""

    def __init__(self, stream: Stream, *shape: int, extras: Extras = PLAIN):
        super().__init__(stream, *shape, extras=extras)
        self._window_start = stream.get_state()
        self._window: list[list[Piece]] = []  # the pieces of each batch
        self._given = 0  # batches of this window handed out

    def next_rows(self) -> Batch | None:
        """The next rows; None at the end of the stream."""
        if self._given and self._given == len(self._window):
            self._window, self._given = [], 0
        if not self._window:
            self._stream.renew()
            self._window_start = self._stream.get_state()
            self._window = self._read_window()
        if not self._window:
            return None
        self._given += 1
        return self._lay_out(self._window[self._given - 1])

    def _read_window(self) -> list[list[Piece]]:
        num_rows = math.ceil(OPEN_ROWS / self._rows) * self._rows
        pieces = self._fill(num_rows)
        used_rows = max((piece.row + 1 for piece in pieces), default=0)
        batches = [[] for _ in range(math.ceil(used_rows / self._rows))]
        for piece in pieces:
            batch, row = self._place(piece.row, len(batches))
            batches[batch].append(dataclasses.replace(piece, row=row))
        return batches

    def _fill(self, num_rows: int) -> list[Piece]:
        return fill_first_fit(self._stream, num_rows, self._length)

    def _place(self, row: int, num_batches: int) -> tuple[int, int]:
        """The batch that has a row of the window, and the row's number in it."""
        return divmod(row, self._rows)

    def get_state(self) -> dict[str, Any]:
        return {"stream": self._window_start, "given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(state["stream"])
        self._window, self._given = [], 0
        if state["given"]:
            self._window_start = self._stream.get_state()
            self._window = self._read_window()
            self._given = state["given"]


class BestFit(FirstFit):
    """As FirstFit, the rows of a window filled by best-fit decreasing and dealt out in turn."""

    def _fill(self, num_rows: int) -> list[Piece]:
        return fill_best_fit(self._stream, num_rows, self._length)

    def _place(self, row: int, num_batches: int) -> tuple[int, int]:
        # To and fro: rows of long documents come first, and each round's first batch is another.
        turn, at = divmod(row, num_batches)
        return (num_batches - 1 - at if turn % 2 else at), turn


class Concat(_Packer):
    """Rows filled to the last place; the state is the stream's and the offset in its document."""

    def __init__(self, stream: Stream, *shape: int, extras: Extras = PLAIN):
        super().__init__(stream, *shape, extras=extras)
        self._offset = 0

    def next_rows(self) -> Batch | None:
        """The next rows; None at the end of the stream."""
        pieces, self._offset = fill_concat(self._stream, self._offset, self._rows, self._length)
        return self._lay_out(pieces) if pieces else None

    def get_state(self) -> dict[str, Any]:
        return {"stream": self._stream.get_state(), "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(state["stream"])
        self._offset = state["offset"]


class PerBatch(_Packer):
    """Exactly `num_examples` documents a batch; the state is the stream's and a count."""

    def __init__(self, stream: Stream, *shape: int, extras: Extras = PLAIN, num_examples: int):
        super().__init__(stream, *shape, extras=extras)
        self._num_examples = num_examples
        self._batch = 0

    def next_rows(self) -> Batch | None:
        """The next rows; None at the end of the stream.

        Raises:
          ValueError: the documents need more rows than there are.
        """
        self._stream.renew()
        examples = []
        while len(examples) < self._num_examples and (example := self._stream.peek()) is not None:
            examples.append(example)
            self._stream.advance()
        if not examples:
            return None
        sizes = [example.size for example in examples]
        rows = best_fit_decreasing(sizes, self._length)
        if max(rows) >= self._rows:
            raise ValueError(
                f"data.examples_per_batch: batch {self._batch} needs {max(rows) + 1} rows of "
                f"data.length = {self._length} for {len(examples)} examples of a shard and is "
                f"given {self._rows} (data.rows / data.num_shards); raise data.rows"
            )
        self._batch += 1
        pieces = [Piece(e, row, 0, n) for e, row, n in zip(examples, rows, sizes)]
        return self._lay_out(pieces)

    def get_state(self) -> dict[str, Any]:
        return {"stream": self._stream.get_state(), "batch": self._batch}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(state["stream"])
        self._batch = state["batch"]


PACKINGS = {
    "first_fit": FirstFit,
    "best_fit": BestFit,
    "concat": Concat,
    "per_batch": PerBatch,
}

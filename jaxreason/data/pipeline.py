"""From records to batches: read, shuffle, mix, tokenize, pack, prefetch; and where it all stands.

The global batch is made by `num_shards` logical shards. Shard s owns the records s, s + num_shards
and so on of every source, its place among them and its packer, and makes rows / num_shards rows.
Which host runs which shards changes nothing in the rows, their order or the state.

    pipeline = build(config, tokenizer, data_dir)
    batch = next(pipeline)                       # types.Batch of numpy
    state = pipeline.get_state()                 # JSON; set_state(state) continues after that batch
"""

import contextlib
import copy
import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxreason.data.documents import DataConfig, RecordEncoder, extras_of, open_encoders
from jaxreason.data.packing import PACKINGS, Concat, Example, FirstFit, PerBatch, lay_out
from jaxreason.data.sources import left_out
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.types import Batch

PREFETCH = 2  # batches made ahead of the train step
NUM_CHECKED = 10_000  # records of each source whose length is checked before training


def check_lengths(config: DataConfig, encoders: Mapping[str, RecordEncoder]) -> None:
    """Tokenizes the first records of each source, if one that is too long would be an error.

    Raises:
      ValueError: one of them is too long, or all are and truncation is "drop".
    """
    if config.limit is None or config.truncation == "keep_start":
        return
    for encoder in encoders.values():
        made = (encoder(index) for index in range(len(encoder.source)))
        if config.truncation == "error":
            for _ in itertools.islice(made, NUM_CHECKED):
                pass
        elif all(example is None for example in made):
            raise _all_dropped(encoder.source_config.key, len(encoder.source), config)


def _all_dropped(key: str, number: int, config: DataConfig) -> ValueError:
    return ValueError(
        f"{key}: all {number} records have more than {config.limit} tokens and data.truncation is "
        "'drop', so that none is left; raise data.max_tokens or data.length"
    )


# ------------------------------------------------------------------------- one logical shard


class _Mixture:
    """The examples of one shard: of all sources, the one furthest behind its share comes next.

    Unlike a fixed interleaving (grain.MapDataset.mix), the state is a cursor for each source, so
    that data.weights may change between two runs without a record being skipped or repeated.
    """

    def __init__(
        self, config: DataConfig, datasets: Mapping[str, tuple[Any, int]], sizes: Mapping[str, int]
    ):
        weights = config.weights or sizes
        total = sum(weights.values())
        self._config = config
        self._datasets = datasets  # name -> grain.MapDataset of Example or None, size of an epoch
        self._in_a_row = dict.fromkeys(datasets, 0)  # records without a document
        self.dropped = 0
        self._wanted = {name: weights[name] / total for name in datasets}
        self._weights = self._wanted  # in force
        self._next = dict.fromkeys(datasets, 0)
        self._drawn = dict.fromkeys(datasets, 0)  # since these weights are in force
        self._peeked: tuple[str, Example] | None = None

    def peek(self) -> Example | None:
        while self._peeked is None:
            name = self._pick()
            if name is None:
                return None
            dataset, epoch = self._datasets[name]
            example = dataset[self._next[name]]
            if example is not None:
                self._peeked, self._in_a_row[name] = (name, example), 0
                continue
            self._next[name] += 1
            self.dropped += 1
            self._in_a_row[name] += 1
            if self._in_a_row[name] >= epoch:
                raise _all_dropped(f"data.sources.{name}, a shard of it", epoch, self._config)
        return self._peeked[1]

    def advance(self) -> None:
        name, _ = self._peeked
        self._next[name] += 1
        self._drawn[name] += 1
        self._peeked = None

    def _pick(self) -> str | None:
        total = sum(self._drawn.values()) + 1
        live = (
            name
            for name, weight in self._weights.items()
            if weight > 0 and self._next[name] < len(self._datasets[name][0])
        )
        return max(live, key=lambda n: self._weights[n] * total - self._drawn[n], default=None)

    def get_state(self) -> dict[str, Any]:
        counts = {"next": dict(self._next), "drawn": dict(self._drawn), "dropped": self.dropped}
        return {**counts, "weights": self._weights}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next, self._drawn = dict(state["next"]), dict(state["drawn"])
        self.dropped, self._weights = state["dropped"], state["weights"]
        self._peeked = None

    def renew(self) -> None:
        """Brings this run's weights into force, if the resumed state had others."""
        if self._weights != self._wanted:
            self._weights = self._wanted
            self._drawn = dict.fromkeys(self._drawn, 0)
            self._peeked = None


def _mixture(
    config: DataConfig, shard: int, encoders: Mapping[str, RecordEncoder], num_epochs: int | None
) -> _Mixture:
    """The records of a shard, sliced before they are shuffled (anew in every epoch)."""
    import grain

    datasets = {}
    for number, (name, encoder) in enumerate(encoders.items()):
        dataset = grain.MapDataset.range(len(encoder.source))[shard :: config.num_shards]
        if config.shuffle:
            # Of the seed and the place, not of the name: two runs whose sources differ in name or
            # rendering see the same records in the same order.
            seed = np.random.SeedSequence([config.seed, shard, number]).generate_state(1)
            dataset = dataset.shuffle(seed=int(seed[0]))
        datasets[name] = dataset.repeat(num_epochs).map(encoder), len(dataset)
    sizes = {name: len(encoder.source) for name, encoder in encoders.items()}
    return _Mixture(config, datasets, sizes)


class _Shard:
    """A packer, and counts of what it has given."""

    def __init__(self, packer: FirstFit | Concat | PerBatch, stream: _Mixture):
        self._packer, self._stream = packer, stream
        self._counts = np.zeros(4, np.int64)

    def next_rows(self) -> Batch | None:
        rows = self._packer.next_rows()
        if rows is not None:
            filled_BT = rows.segments_BT > 0
            starts = np.count_nonzero(filled_BT & (rows.positions_BT == 0))
            self._counts[:3] += (starts, np.count_nonzero(filled_BT), filled_BT.size)
        self._counts[3] = self._stream.dropped  # of what the packer has read, given or not
        return rows

    def get_state(self) -> dict[str, Any]:
        return {"packer": self._packer.get_state(), "counts": self._counts.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._packer.set_state(state["packer"])
        self._counts = np.array(state["counts"], np.int64)


@dataclasses.dataclass(frozen=True)
class Stats:
    """What shards have given so far, resumed runs included."""

    examples: int  # a document cut in pieces by packing "concat" counts once a piece, a pair twice
    tokens: int  # padding excluded
    quarantined: int  # malformed records left out
    filtered: int  # traces left out because their records call them wrong or unfinished
    dropped: int  # documents passed over for their length, once an epoch each
    fill: float  # the share of places that are not padding


# ------------------------------------------------------------------------------- the pipeline


class Pipeline(Iterator[Batch]):
    """The batches of some logical shards, one block of rows each. Made by `build`."""

    def __init__(
        self, shards: dict[int, _Shard], empty: Batch, lacking: dict[str, int], num_shards: int
    ):
        self._shards, self.owned, self.num_shards = shards, tuple(shards), num_shards
        self._empty = empty  # the rows of a shard that has come to its end before others
        self._lacking = lacking  # records quarantined and filtered
        self._state = self._capture()  # after the batch returned last
        self._prefetcher: _Prefetcher | None = None

    def __next__(self) -> Batch:
        """The next batch; what goes wrong while it is made is raised here."""
        if self._prefetcher is None:
            for index, shard in self._shards.items():
                shard.set_state(self._state["shards"][str(index)])
            self._prefetcher = _Prefetcher(self._make)
        batch, self._state = self._prefetcher.get()
        return batch

    def _make(self) -> tuple[Batch, dict[str, Any]]:
        blocks = [shard.next_rows() for shard in self._shards.values()]
        if all(block is None for block in blocks):
            raise StopIteration
        blocks = [self._empty if block is None else block for block in blocks]
        return _concatenate(blocks), self._capture()

    def _capture(self) -> dict[str, Any]:
        return {"shards": {str(index): shard.get_state() for index, shard in self._shards.items()}}

    def get_state(self) -> dict[str, Any]:
        """JSON: where every shard here stands after the batch returned last."""
        return copy.deepcopy(self._state)

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch that was the last when `state` was taken.

        `state["shards"]` may hold other processes' shards too.

        Raises:
          ValueError: a shard of this pipeline is not in it.
        """
        missing = [index for index in self._shards if str(index) not in state["shards"]]
        if missing:
            raise ValueError(
                f"the data state holds shards {', '.join(state['shards'])}, but not {missing}; "
                "data.num_shards may not change between runs"
            )
        self.close()
        self._state = {
            "shards": {str(i): copy.deepcopy(state["shards"][str(i)]) for i in self._shards}
        }

    def stats(self, state: dict[str, Any] | None = None) -> Stats:
        """Counts up to the batch returned last, or of all shards of a state."""
        shards = (state or self._state)["shards"].values()
        counts = np.sum([shard["counts"] for shard in shards], axis=0)
        examples, tokens, places, dropped = (int(count) for count in counts)
        return Stats(
            examples, tokens, dropped=dropped, fill=tokens / max(places, 1), **self._lacking
        )

    def close(self) -> None:
        """Stops the thread; the next batch starts another one where this one was."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None


def _concatenate(blocks: Sequence[Batch]) -> Batch:
    if len(blocks) == 1:
        return blocks[0]
    kind = type(blocks[0])
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{n: np.concatenate([getattr(block, n) for block in blocks]) for n in names})


class _Prefetcher:
    """A daemon thread that calls `make` ahead of time; what it raises, `get` raises."""

    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self._made: queue.Queue = queue.Queue(maxsize=PREFETCH)
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        self._thread.start()

    def get(self) -> Any:
        if self._failure is not None:
            raise self._failure
        item, self._failure = self._made.get()
        if self._failure is not None:
            raise self._failure
        return item

    def _run(self) -> None:
        failure = None
        while failure is None and not self._closing.is_set():
            item = None
            try:
                item = self._make()
            except Exception as error:  # whatever it is, it belongs to the caller of `get`
                failure = error
            self._put((item, failure))

    def _put(self, pair: tuple[Any, Exception | None]) -> None:
        while not self._closing.is_set():
            try:
                return self._made.put(pair, timeout=0.05)
            except queue.Full:
                continue

    def close(self) -> None:
        self._closing.set()
        self._thread.join()


# ---------------------------------------------------------------------------------- assembly


def build(
    config: DataConfig,
    tokenizer: Tokenizer,
    data_dir,
    *,
    shards: tuple[int, ...] | None = None,
    num_epochs: int | None = None,
) -> Pipeline:
    """The batches of the global batch's rows that `shards` make; None: of all of them.

    Args:
      data_dir: the workdir's data folder, for indices, decompressed files and quarantine.jsonl.
      num_epochs: the pipeline ends when every source was read so often; None: it never ends. The
        last rows are filled up with padding.

    Raises:
      ValueError: a source cannot be opened, a record is too long, or shards are not what they
        should be.
    """
    owned = tuple(range(config.num_shards)) if shards is None else tuple(shards)
    if not owned or not set(owned) <= set(range(config.num_shards)):
        raise ValueError(f"shards are {owned}; data.num_shards is {config.num_shards}")
    if num_epochs is not None and len(owned) < config.num_shards:
        raise ValueError("num_epochs needs all shards: they end at different batches")
    encoders = open_encoders(config, tokenizer, data_dir)
    check_lengths(config, encoders)
    rows, pad_id = config.rows // config.num_shards, tokenizer.pad_id
    extra: dict[str, Any] = {"extras": extras_of(config, encoders)}
    if config.packing == "per_batch":
        extra["num_examples"] = config.examples_per_batch // config.num_shards
    made = {}
    for shard in owned:
        stream = _mixture(config, shard, encoders, num_epochs)
        packer = PACKINGS[config.packing](stream, rows, config.length, pad_id, **extra)
        made[shard] = _Shard(packer, stream)
    empty = lay_out([], rows, config.length, pad_id, extra["extras"])
    lacking = left_out(encoder.source for encoder in encoders.values())
    return Pipeline(made, empty, lacking, config.num_shards)


# -------------------------------------------------------------------------------- evaluation


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Batches to evaluate a loss on, and the UTF-8 bytes of the text that their targets spell."""

    batches: tuple[Batch, ...]
    num_bytes: int


def evaluation_batches(
    config: DataConfig, tokenizer: Tokenizer, data_dir, *, max_batches: int | None = None
) -> EvaluationSet:
    """One epoch in order, or its first batches; the last batch is filled up with empty rows.

    Bits per byte are the summed loss of these batches over ln 2 and over `num_bytes`. As the loss,
    the bytes leave out the first token of each document, which nothing predicts: of its text, or
    the token that begins documents where there is one. Ends of documents have a loss and no bytes.
    A character cut in two counts to within 2 bytes.
    """
    ordered = dataclasses.replace(config, shuffle=False)
    with contextlib.closing(build(ordered, tokenizer, data_dir, num_epochs=1)) as pipeline:
        batches = tuple(itertools.islice(pipeline, max_batches))
    num_bytes = 0
    for batch in batches:
        targets = batch.targets_BT[batch.weights_BT > 0].tolist()
        num_bytes += len(tokenizer.decode(targets, skip_special=True).encode())
    return EvaluationSet(batches, num_bytes)

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
import datetime
import itertools
import pathlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxreason.data import sources as sources_lib
from jaxreason.data.packing import PACKINGS, Concat, Example, FirstFit, PerBatch, lay_out
from jaxreason.data.sources import Source, SourceConfig
from jaxreason.text import chat
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.types import Batch

PREFETCH = 2  # batches made ahead of the train step
NUM_CHECKED = 10_000  # records of each source whose length is checked before training


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a batch is made of. `sources` maps a name to the fields of a SourceConfig.

    Raises:
      ValueError: a field is out of its range or does not fit another.
    """

    sources: Mapping[str, Any]
    rows: int  # of the global batch
    length: int  # places of a row
    # How often each source is drawn from, relative to the others; empty: as its number of records.
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    num_shards: int = 1
    packing: str = "first_fit"
    examples_per_batch: int | None = None  # of the global batch; packing "per_batch" only
    truncation: str = "error"  # or keep_start; nothing is too long for packing "concat"
    train_roles: Sequence[str] = ("assistant",)
    chat_template: str = "qwen3"  # as chat.template_for takes it
    think_tags: chat.ThinkTags = chat.DEFAULT_TAGS
    today: datetime.date | None = None  # the day that templates tell; None: the clock's
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "sources", _source_configs(self.sources))
        self._check_shape()
        self._check_weights()
        for name, known in (
            ("packing", tuple(PACKINGS)),
            ("truncation", ("error", "keep_start")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"data.{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}"
                )
        if (
            self.chat_template not in chat.TEMPLATES
            and not pathlib.Path(self.chat_template).exists()
        ):
            raise ValueError(
                f"data.chat_template is {self.chat_template!r}; it must be one of "
                f"{', '.join(chat.TEMPLATES)}, a .jinja file or a folder with one"
            )
        if (self.packing == "per_batch") != (self.examples_per_batch is not None):
            raise ValueError(
                f"data.examples_per_batch is {self.examples_per_batch} and data.packing is "
                f"{self.packing!r}; it is set for per_batch and for nothing else"
            )
        if not self.train_roles or not set(self.train_roles) <= set(chat.ROLES):
            raise ValueError(
                f"data.train_roles is {tuple(self.train_roles)}; one or more of "
                f"{', '.join(chat.ROLES)}"
            )
        if self.seed < 0:
            raise ValueError(f"data.seed is {self.seed}; it must be 0 or more")

    def _check_shape(self) -> None:
        for name, least in (("num_shards", 1), ("rows", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"data.{name} is {getattr(self, name)}; it must be {least} or more"
                )
        for name in ("rows", "examples_per_batch"):
            value = getattr(self, name)
            if value is not None and (value < 1 or value % self.num_shards):
                raise ValueError(
                    f"data.{name} = {value} is not a multiple of data.num_shards = "
                    f"{self.num_shards}"
                )

    def _check_weights(self) -> None:
        if not self.weights:
            return
        if set(self.weights) != set(self.sources):
            raise ValueError(
                f"data.weights names {', '.join(sorted(self.weights))} and data.sources "
                f"{', '.join(sorted(self.sources))}; they must be the same names"
            )
        if min(self.weights.values()) < 0 or not sum(self.weights.values()) > 0:
            raise ValueError(f"data.weights is {dict(self.weights)}; 0 or more, and not all 0")


def _source_configs(sources: Mapping[str, Any]) -> dict[str, SourceConfig]:
    if not sources:
        raise ValueError("data.sources is empty; it must name at least one source")
    configs = {}
    known = [field.name for field in dataclasses.fields(SourceConfig)]
    for name, fields in sorted(sources.items()):
        if not isinstance(fields, SourceConfig):
            for field in fields:
                if field not in known:
                    raise ValueError(
                        f"data.sources.{name}.{field} is unknown; known: {', '.join(known)}"
                    )
            fields = SourceConfig(**{**fields, "name": name})
        configs[name] = fields
    return configs


# --------------------------------------------------------------- records to tokenized examples


@dataclasses.dataclass(frozen=True)
class RecordEncoder:
    """Record numbers of one source to ids and weights."""

    config: DataConfig
    source_config: SourceConfig
    source: Source
    tokenizer: Tokenizer
    template: chat.ChatTemplate

    def __call__(self, index: int) -> Example:
        """The record as a document; a text begins and ends as the tokenizer's documents do.

        Raises:
          ValueError: it is longer than a row, and truncation is "error".
        """
        example = sources_lib.to_example(self.source_config, self.source[index])
        if isinstance(example, sources_lib.TextExample):
            ids = self.tokenizer.document_ids(example.text)
            ids_T, weights_T = np.array(ids, np.int32), np.ones(len(ids), np.float32)
        else:
            ids_T, weights_T = chat.encode_conversation(
                self.tokenizer, self.template, example.messages, self.config.train_roles
            )
        length = self.config.length
        if len(ids_T) <= length or self.config.packing == "concat":
            return Example(ids_T, weights_T)
        if self.config.truncation == "error":
            raise ValueError(
                f"{self.source_config.key}: {sources_lib.place(self.source, index)} has "
                f"{len(ids_T)} tokens and data.length is {length}; raise it or set "
                "data.truncation to keep_start"
            )
        return Example(ids_T[:length], weights_T[:length])


def check_lengths(config: DataConfig, encoders: Mapping[str, RecordEncoder]) -> None:
    """Tokenizes the first records of each source, if one that is too long would be an error.

    Raises:
      ValueError: one of them is longer than a row.
    """
    if config.packing == "concat" or config.truncation != "error":
        return
    for encoder in encoders.values():
        for index in range(min(len(encoder.source), NUM_CHECKED)):
            encoder(index)


# ------------------------------------------------------------------------- one logical shard


class _Mixture:
    """The examples of one shard: of all sources, the one furthest behind its share comes next.

    Unlike a fixed interleaving (grain.MapDataset.mix), the state is a cursor for each source, so
    that data.weights may change between two runs without a record being skipped or repeated.
    """

    def __init__(self, datasets: Mapping[str, Any], weights: Mapping[str, float]):
        total = sum(weights.values())
        self._datasets = datasets  # name -> grain.MapDataset of Example
        self._wanted = {name: weights[name] / total for name in datasets}
        self._weights = self._wanted  # in force
        self._next = dict.fromkeys(datasets, 0)
        self._drawn = dict.fromkeys(datasets, 0)  # since these weights are in force
        self._peeked: tuple[str, Example] | None = None

    def peek(self) -> Example | None:
        if self._peeked is None:
            name = self._pick()
            if name is None:
                return None
            self._peeked = name, self._datasets[name][self._next[name]]
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
            if weight > 0 and self._next[name] < len(self._datasets[name])
        )
        return max(live, key=lambda n: self._weights[n] * total - self._drawn[n], default=None)

    def get_state(self) -> dict[str, Any]:
        return {"next": dict(self._next), "drawn": dict(self._drawn), "weights": self._weights}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next, self._drawn = dict(state["next"]), dict(state["drawn"])
        self._weights = state["weights"]
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
        datasets[name] = dataset.repeat(num_epochs).map(encoder)
    sizes = {name: len(encoder.source) for name, encoder in encoders.items()}
    return _Mixture(datasets, config.weights or sizes)


class _Shard:
    """A packer, and counts of what it has given."""

    def __init__(self, packer: FirstFit | Concat | PerBatch):
        self._packer = packer
        self._counts = np.zeros(3, np.int64)

    def next_rows(self) -> Batch | None:
        rows = self._packer.next_rows()
        if rows is not None:
            filled_BT = rows.segments_BT > 0
            starts = np.count_nonzero(filled_BT & (rows.positions_BT == 0))
            self._counts += (starts, np.count_nonzero(filled_BT), filled_BT.size)
        return rows

    def get_state(self) -> dict[str, Any]:
        return {"packer": self._packer.get_state(), "counts": self._counts.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._packer.set_state(state["packer"])
        self._counts = np.array(state["counts"], np.int64)


@dataclasses.dataclass(frozen=True)
class Stats:
    """What shards have given so far, resumed runs included."""

    examples: int  # a document cut in pieces by packing "concat" counts once a piece
    tokens: int  # padding excluded
    quarantined: int  # malformed records left out
    fill: float  # the share of places that are not padding


# ------------------------------------------------------------------------------- the pipeline


class Pipeline(Iterator[Batch]):
    """The batches of some logical shards, one block of rows each. Made by `build`."""

    def __init__(self, shards: dict[int, _Shard], empty: Batch, quarantined: int, num_shards: int):
        self._shards, self.owned, self.num_shards = shards, tuple(shards), num_shards
        self._empty = empty  # the rows of a shard that has come to its end before others
        self._quarantined = quarantined
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
        examples, tokens, places = (int(count) for count in counts)
        return Stats(examples, tokens, self._quarantined, tokens / max(places, 1))

    def close(self) -> None:
        """Stops the thread; the next batch starts another one where this one was."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None


def _concatenate(blocks: Sequence[Batch]) -> Batch:
    if len(blocks) == 1:
        return blocks[0]
    names = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{n: np.concatenate([getattr(block, n) for block in blocks]) for n in names})


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


def _encoders(config: DataConfig, tokenizer: Tokenizer, data_dir) -> dict[str, RecordEncoder]:
    """Opens the sources."""
    template = chat.template_for(config.chat_template, tokenizer, config.think_tags, config.today)
    encoders = {}
    for name, source_config in config.sources.items():
        source = sources_lib.open_source(source_config, data_dir)
        if len(source) < config.num_shards:
            raise ValueError(
                f"data.sources.{name} has {len(source)} records, fewer than data.num_shards = "
                f"{config.num_shards}"
            )
        encoders[name] = RecordEncoder(config, source_config, source, tokenizer, template)
    return encoders


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
    encoders = _encoders(config, tokenizer, data_dir)
    check_lengths(config, encoders)
    rows, pad_id = config.rows // config.num_shards, tokenizer.pad_id
    extra = {}
    if config.packing == "per_batch":
        extra["num_examples"] = config.examples_per_batch // config.num_shards
    made = {}
    for shard in owned:
        stream = _mixture(config, shard, encoders, num_epochs)
        made[shard] = _Shard(PACKINGS[config.packing](stream, rows, config.length, pad_id, **extra))
    quarantined = sum(getattr(e.source, "num_quarantined", 0) for e in encoders.values())
    return Pipeline(made, lay_out([], rows, config.length, pad_id), quarantined, config.num_shards)


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

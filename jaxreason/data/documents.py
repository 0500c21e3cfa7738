"""Records to tokenized documents, by number: what the pipeline packs and a teacher scores."""

import dataclasses
import datetime
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxreason.data import logits
from jaxreason.data import sources as sources_lib
from jaxreason.data.packing import PACKINGS, Example, Extras
from jaxreason.data.schemas import PairExample, TextExample
from jaxreason.data.sources import Source, SourceConfig
from jaxreason.text import chat
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.types import TASKS

TRUNCATIONS = ("error", "keep_start", "drop")


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
    # What becomes of a document of too many tokens: error, keep_start or drop, which is counted.
    truncation: str = "error"
    # Tokens of a document, prompt and all; None: as many as a row has places, in packing "concat"
    # any number.
    max_tokens: int | None = None
    train_roles: Sequence[str] = ("assistant",)
    # Loss weights of an assistant's tokens, as chat.encode_conversation tells the two apart.
    reasoning_weight: float = 1.0
    answer_weight: float = 1.0
    # A folder, or @NAME in the data folder, with a store of data/logits.py for each source.
    teacher: str = ""
    chat_template: str = "qwen3"  # as chat.template_for takes it
    think_tags: chat.ThinkTags = chat.DEFAULT_TAGS
    today: datetime.date | None = None  # the day that templates tell; None: the clock's
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "sources", sources_lib.named_sources(self.sources, SourceConfig))
        self._check_shape()
        self._check_weights()
        for name, known in (("packing", tuple(PACKINGS)), ("truncation", TRUNCATIONS)):
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
        self._check_kinds()

    @property
    def has_pairs(self) -> bool:
        return any(source.has_pairs for source in self.sources.values())

    @property
    def has_tasks(self) -> bool:
        return any(source.task for source in self.sources.values())

    @property
    def limit(self) -> int | None:
        """The most tokens of a document; None: any number."""
        if self.max_tokens is None and self.packing != "concat":
            return self.length
        return self.max_tokens

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
        most = self.max_tokens
        if most is not None and not (2 <= most <= self.length or self.packing == "concat"):
            raise ValueError(
                f"data.max_tokens is {most}; it must be 2 to data.length = {self.length}, or unset"
            )

    def _check_weights(self) -> None:
        both = {n: getattr(self, n) for n in ("reasoning_weight", "answer_weight")}
        for name, weight in both.items():
            if weight < 0 or not any(both.values()):
                raise ValueError(
                    f"data.{name} is {weight}; it must be 0 or more, and not 0 with the other"
                )
        if not self.weights:
            return
        if set(self.weights) != set(self.sources):
            raise ValueError(
                f"data.weights names {', '.join(sorted(self.weights))} and data.sources "
                f"{', '.join(sorted(self.sources))}; they must be the same names"
            )
        if min(self.weights.values()) < 0 or not sum(self.weights.values()) > 0:
            raise ValueError(f"data.weights is {dict(self.weights)}; 0 or more, and not all 0")

    def _check_kinds(self) -> None:
        """Pairs, tasks and a teacher's logits are each another kind of batch."""
        for what, has in (("pairs", "has_pairs"), ("a task", "task")):
            without = [name for name, s in self.sources.items() if not getattr(s, has)]
            if without and len(without) < len(self.sources):
                raise ValueError(
                    f"data.sources.{without[0]} has not {what}, as others of data.sources have; "
                    "all must have or none"
                )
        kinds = {"pairs": self.has_pairs, "tasks": self.has_tasks, "data.teacher": self.teacher}
        found = [name for name, has in kinds.items() if has]
        if len(found) > 1:
            raise ValueError(f"data has {' and '.join(found)}; a batch can have one of them")
        if not self.has_pairs:
            return
        if self.packing == "concat":
            raise ValueError(
                "data.packing is 'concat', which cuts documents; pairs need one of "
                f"{', '.join(name for name in PACKINGS if name != 'concat')}"
            )
        if (self.reasoning_weight, self.answer_weight) != (1, 1):
            raise ValueError(
                f"data.reasoning_weight is {self.reasoning_weight} and answer_weight "
                f"{self.answer_weight}; the tokens of pairs all weigh 1"
            )


# --------------------------------------------------------------------------------- documents


@dataclasses.dataclass(frozen=True)
class RecordEncoder:
    """Record numbers of one source to ids and weights."""

    config: DataConfig
    source_config: SourceConfig
    source: Source
    tokenizer: Tokenizer
    template: chat.ChatTemplate
    store: logits.Store | None = None  # of a teacher's top k

    def __call__(self, index: int) -> Example | None:
        """The record as a document, or as a pair; a text begins and ends as the tokenizer's
        documents do. None where it is too long and truncation is "drop".

        Raises:
          ValueError: it is too long and truncation is "error", or nothing of an answer of a pair is
            left, or the teacher's store holds other tokens.
        """
        example = sources_lib.to_example(self.source_config, self.source[index])
        if isinstance(example, PairExample):
            made = self._pair(example, index)
        elif isinstance(example, TextExample):
            ids = self.tokenizer.document_ids(example.text)
            made = Example(np.array(ids, np.int32), np.ones(len(ids), np.float32))
        else:
            config = self.config
            weights = {n: getattr(config, n) for n in ("reasoning_weight", "answer_weight")}
            made = self._conversation(example.messages, **weights)
        if not isinstance(example, PairExample):
            made = self._fitted(made, index)
        if made is None:
            return None
        if self.source_config.task:
            made = dataclasses.replace(made, task=1 + TASKS.index(self.source_config.task))
        if self.store is not None:
            self.store.check(index, made.ids_T)
            made = dataclasses.replace(made, teacher=functools.partial(self.store.read, index))
        return made

    def _conversation(self, messages: Sequence[chat.Message], **weights: float) -> Example:
        roles = self.config.train_roles
        return Example(
            *chat.encode_conversation(self.tokenizer, self.template, messages, roles, **weights)
        )

    def _fitted(self, example: Example, index: int) -> Example | None:
        size, limit = len(example.ids_T), self.config.limit
        if limit is None or size <= limit:
            return example
        if self.config.truncation == "error":
            key = "length" if self.config.max_tokens is None else "max_tokens"
            raise self._too_long(index, f"{size} tokens", f"data.{key} is {limit}")
        return _cut(example, limit) if self.config.truncation == "keep_start" else None

    def _pair(self, example: PairExample, index: int) -> Example | None:
        """Both answers, each after the prompt; nothing but the answers is learnt."""
        prompt = example.chosen[: example.num_prompt]
        start = len(chat.encode_prompt(self.tokenizer, self.template, prompt))
        both = [self._conversation(side) for side in (example.chosen, example.rejected)]
        for document in both:
            document.weights_T[:start] = 0
        sizes, length = [len(document.ids_T) for document in both], self.config.length
        most = self.config.limit
        if sum(sizes) > length or max(sizes) > most:
            if self.config.truncation == "drop":
                return None
            if self.config.truncation == "error":
                row = f"data.length is {length} and the most of each {most}"
                raise self._too_long(index, f"a pair of {sizes[0]} and {sizes[1]} tokens", row)
            # The shorter keeps what it has up to half a row, the longer what that leaves.
            most = min(most, max(length - min(sizes), length // 2))
            both = [_cut(document, most) for document in both]
        if not all(document.weights_T[1:].any() for document in both):
            raise self._too_long(index, f"a prompt of {start} tokens", "it leaves no answer")
        return dataclasses.replace(both[0], rejected=both[1])

    def _too_long(self, index: int, what: str, limit: str) -> ValueError:
        return ValueError(
            f"{self.source_config.key}: {sources_lib.place(self.source, index)} has {what} and "
            f"{limit}; raise it or set data.truncation to keep_start or drop"
        )


def _cut(example: Example, size: int) -> Example:
    return Example(example.ids_T[:size], example.weights_T[:size])


class Documents(Sequence[np.ndarray]):
    """The ids of each document of a source, in the order of its records; empty where dropped."""

    def __init__(self, encoder: RecordEncoder):
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._encoder.source)

    def __getitem__(self, index: int) -> np.ndarray:
        example = self._encoder(range(len(self))[index])
        return np.zeros(0, np.int32) if example is None else example.ids_T


def open_documents(config: DataConfig, tokenizer: Tokenizer, data_dir) -> dict[str, Documents]:
    """What a teacher scores for `config.teacher`: the documents of each source, as trained on.

    Raises:
      ValueError: a source cannot be opened, or holds pairs.
    """
    if config.has_pairs:
        raise ValueError("data.sources hold pairs; a teacher's logits are of single documents")
    encoders = open_encoders(dataclasses.replace(config, teacher=""), tokenizer, data_dir)
    return {name: Documents(encoder) for name, encoder in encoders.items()}


def open_encoders(config: DataConfig, tokenizer: Tokenizer, data_dir) -> dict[str, RecordEncoder]:
    """Opens the sources, and their stores of a teacher's logits if there is one."""
    template = chat.template_for(config.chat_template, tokenizer, config.think_tags, config.today)
    encoders = {}
    for name, source_config in config.sources.items():
        source = sources_lib.open_source(source_config, data_dir, config.seed)
        if len(source) < config.num_shards:
            raise ValueError(
                f"data.sources.{name} has {len(source)} records, fewer than data.num_shards = "
                f"{config.num_shards}"
            )
        store = None
        if config.teacher:
            store = logits.Store(
                _teacher_folder(config.teacher, data_dir) / name,
                vocabulary=tokenizer.fingerprint(),
                num_documents=len(source),
                num_tokens=tokenizer.vocab_size,
                key="data.teacher",
            )
        encoders[name] = RecordEncoder(config, source_config, source, tokenizer, template, store)
    return encoders


def check_temperature(config: DataConfig, data_dir, temperature: float) -> None:
    """Raises ValueError where a store of the teacher's has log-probs at another temperature."""
    for name in config.sources:
        found = logits.read_header(_teacher_folder(config.teacher, data_dir) / name).temperature
        if found != temperature:
            raise ValueError(
                f"train.distill.temperature is {temperature} and data.teacher = "
                f"{config.teacher!r} holds log-probs of {name} at {found}, from which those at "
                f"another cannot be made; set it to {found}, or write the store anew"
            )


def extras_of(config: DataConfig, encoders: Mapping[str, RecordEncoder]) -> Extras:
    """What the batches hold beside tokens.

    Raises:
      ValueError: the stores of the teacher differ in k or temperature.
    """
    stores = [encoder.store.header for encoder in encoders.values() if encoder.store]
    for name in ("k", "temperature"):
        found = {getattr(header, name) for header in stores}
        if len(found) > 1:
            raise ValueError(
                f"data.teacher is {config.teacher!r}; its stores differ in {name}: {sorted(found)}"
            )
    return Extras(tasks=config.has_tasks, top_k=stores[0].k if stores else 0)


def _teacher_folder(teacher: str, data_dir) -> pathlib.Path:
    if teacher.startswith("@"):
        return pathlib.Path(data_dir) / teacher[1:]
    return pathlib.Path(teacher).expanduser()

"""Where examples come from: records by number, and how a record becomes text or a conversation."""

import dataclasses
import functools
import itertools
import os
import pathlib
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from jaxreason.data import arithmetic, countdown
from jaxreason.data.countdown import CountdownConfig
from jaxreason.data.files import CHOICES, Found, JsonlSource
from jaxreason.data.files import data_root as data_root
from jaxreason.data.schemas import (
    SCHEMAS,
    ChatExample,
    PairExample,
    TextExample,
    conversation,
    is_true,
    pair,
    system_turn,
    text_of,
)
from jaxreason.text.chat import Message
from jaxreason.text.traces import TraceFault, read_trace
from jaxreason.types import TASKS

_FILES_ONLY = (
    "text_field", "prompt_field", "response_field", "reasoning_field", "reasoning",
    "strip_calculator", "messages_field", "system_field", "drop_system", "chosen_field",
    "rejected_field", "correct_fields", "complete_field", "keep_wrong", "choose", "extra_fields",
    "needs_reasoning",
)  # fmt: skip
_PROMPTS = {"arithmetic": "{expression}", "countdown": countdown.PROMPT}  # by default
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_HASHES = "####"


Named = TypeVar("Named")


class Source(Protocol):
    """Records by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source and how its records become examples.

    kind "jsonl" reads files of records, Parquet too. It makes texts of `text_field`; or a question
    and an answer: the user's turn is `prompt_field`, or `prompt_template` with record fields in
    braces, the assistant's is `response_field` after the reasoning of `reasoning_field`; or
    conversations of `messages_field`; or pairs of `chosen_field` and `rejected_field`, texts or
    lists of messages. `reasoning` says that the response holds it: "split_tags" reads the published
    tags (text/traces.py), and what has none is quarantined; with "split_hashes" the response is
    GSM8K's: what stands before `#### N` is the reasoning, `#### N` the answer. Messages and pairs
    are read for tags in any case. With `choose` the response and the reasoning may be lists, one
    entry a trace: the first, a random or all of those that are right make examples.
    The kinds of schemas.SCHEMAS are such fields by a published data set's name; what is set beside
    them holds instead.
    kind "arithmetic" is a prepared benchmark: `rendering` "text" makes texts, "answer", "short_cot"
    and "long_cot" make conversations.

    Raises:
      ValueError: a field is missing, unknown or of no use to the kind.
    """

    name: str
    kind: str = "jsonl"
    # Files or patterns, or @NAME, which an earlier stage wrote; arithmetic: a folder in the data
    # folder.
    path: str | Sequence[str] = ""
    text_field: str = ""
    prompt_field: str = ""
    prompt_template: str = ""  # e.g. "{question}"; the kind's own when empty
    response_field: str = ""
    reasoning_field: str = ""  # null in a record: its trace has no reasoning, as of a plain teacher
    needs_reasoning: bool | None = None  # ... or null there is a fault, as in the schemas
    reasoning: str = ""  # "", split_tags or split_hashes
    strip_calculator: bool = False  # drop GSM8K's <<48/2=24>> spans
    messages_field: str = ""
    system_field: str = ""  # a system prompt, where a record has it
    drop_system: bool = False  # OpenThoughts' asks for tags that are not those learnt here
    chosen_field: str = ""
    rejected_field: str = ""
    correct_fields: Sequence[str] = ()  # a trace is right where one of them says so
    complete_field: str = ""  # ... and this too, if it is set
    keep_wrong: bool = False  # whatever they say
    choose: str = ""  # of the right traces of a record: first, random, all; "": there is but one
    extra_fields: Sequence[str] = ()  # what else is read of a record, where it has it (of Parquet)
    task: str = ""  # of types.TASKS, for an objective that weighs tasks apart
    rendering: str = ""  # arithmetic: text, answer, short_cot, long_cot; countdown: see above
    split: str = ""  # arithmetic and countdown: train or test
    countdown: Mapping[str, Any] | CountdownConfig = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.task and self.task not in TASKS:
            raise ValueError(f"{self.key}.task is {self.task!r}; known: {', '.join(TASKS)}")
        if self.kind == "jsonl":
            self._check_files()
        elif self.kind in SCHEMAS:
            _ = self.fields  # checked as it is made
        elif self.kind == "arithmetic":
            self._check_made(("countdown", *_FILES_ONLY), arithmetic.RENDERINGS)
            if self.rendering == "text" and self.prompt_template:
                raise ValueError(f"{self.key}.prompt_template is set, and a text has no prompt")
            if not isinstance(self.path, str):
                raise ValueError(f"{self.key}.path is {self.path!r}; it must be one folder")
        elif self.kind == "countdown":
            self._check_made(_FILES_ONLY, countdown.RENDERINGS)
            if not isinstance(self.countdown, CountdownConfig):
                fields = countdown.parse_config(self.countdown, f"{self.key}.countdown")
                object.__setattr__(self, "countdown", fields)
        else:
            known = ", ".join(("jsonl", "arithmetic", "countdown", *SCHEMAS))
            raise ValueError(f"{self.key}.kind is {self.kind!r}; known kinds: {known}")
        self.prompt_names()

    @functools.cached_property
    def fields(self) -> "SourceConfig":
        """The same source by its fields: kind "jsonl" in place of a schema's name."""
        if self.kind not in SCHEMAS:
            return self
        given = {
            name: value
            for name, value in SCHEMAS[self.kind].items()
            if getattr(self, name) in (None, "", ())
        }
        if self.prompt_template:
            given.pop("prompt_field", None)
        return dataclasses.replace(self, kind="jsonl", **given)

    @property
    def has_pairs(self) -> bool:
        return bool(self.fields.chosen_field)

    def reading(self, *names: str) -> "SourceConfig":
        """The same source with these fields among what is read of its records; "" is none."""
        if self.kind in ("arithmetic", "countdown"):  # made, with every field
            return self
        return dataclasses.replace(self, extra_fields=(*self.extra_fields, *filter(None, names)))

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
        return template_fields(self.prompt_template, f"{self.key}.prompt_template")

    def _check_files(self) -> None:
        self._check_unused(("rendering", "split", "countdown"))
        if not self.path:
            raise ValueError(f"{self.key}.path is empty; it must name .jsonl or .parquet files")
        if self.prompt_field and self.prompt_template:
            raise ValueError(
                f"{self.key}.prompt_field is {self.prompt_field!r} and prompt_template is "
                f"{self.prompt_template!r}; set one of them"
            )
        prompted = bool(self.prompt_field or self.prompt_template)
        kinds = (self.text_field, self.response_field, self.messages_field, self.chosen_field)
        if (
            sum(map(bool, kinds)) != 1
            or bool(self.chosen_field) != bool(self.rejected_field)
            or (prompted != bool(self.response_field) and not self.chosen_field)
        ):
            raise ValueError(
                f"{self.key} must set either text_field, or response_field with prompt_field or "
                "prompt_template, or messages_field, or chosen_field with rejected_field"
            )
        if self.reasoning not in ("", "split_tags", "split_hashes"):
            raise ValueError(
                f"{self.key}.reasoning is {self.reasoning!r}; known: split_tags, split_hashes"
            )
        if self.text_field and (self.reasoning or self.reasoning_field):
            raise ValueError(f"{self.key}.text_field is set, and a text has no reasoning apart")
        if self.reasoning and self.reasoning_field:
            raise ValueError(
                f"{self.key}.reasoning is {self.reasoning!r} and reasoning_field is "
                f"{self.reasoning_field!r}; set one of them"
            )
        if self.choose not in ("", *CHOICES):
            raise ValueError(
                f"{self.key}.choose is {self.choose!r}; it must be one of {', '.join(CHOICES)}"
            )
        if not self.response_field:
            self._check_unused(("reasoning_field", "choose"), "a source without response_field")
            if self.reasoning == "split_hashes":
                raise ValueError(f"{self.key}.reasoning is 'split_hashes'; that is of a response")

    def _check_made(self, unused: Sequence[str], renderings: Sequence[str]) -> None:
        self._check_unused(unused)
        if self.rendering not in renderings:
            raise ValueError(
                f"{self.key}.rendering is {self.rendering!r}; it must be one of "
                f"{', '.join(renderings)}"
            )
        if self.split not in ("train", "test"):
            raise ValueError(f"{self.key}.split is {self.split!r}; it must be train or test")

    def _check_unused(self, names: Sequence[str], who: str = "") -> None:
        for name in names:
            if getattr(self, name):
                raise ValueError(
                    f"{self.key}.{name} is {getattr(self, name)!r}; "
                    f"{who or f'kind {self.kind!r}'} has no use for it"
                )

    # The rule of files.JsonlSource, of kind "jsonl".

    def identity(self) -> Any:
        own = ("name", "path", "choose", "task", "countdown")  # change nothing in what is found
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if name not in own} | {
            "listed": bool(self.choose)
        }

    def columns(self) -> tuple[list[str], list[str]]:
        prompt, correct = self.prompt_names(), tuple(self.correct_fields)
        named = [self.text_field, self.response_field, self.reasoning_field, self.messages_field]
        named += [self.chosen_field, self.rejected_field]
        optional = [self.system_field, *prompt] if self.chosen_field else [self.system_field]
        if not self.keep_wrong:
            named += [*correct[:1], self.complete_field]
            optional += correct[1:]
        optional += self.extra_fields
        needed = [*([] if self.chosen_field else prompt), *filter(None, named)]
        return needed, list(filter(None, optional))

    def examine(self, record: dict[str, Any]) -> Found:
        needed, _ = self.columns()
        missing = [name for name in needed if name not in record]
        if missing:
            return Found((), (f"field {missing[0]!r} is missing",))
        sizes = {len(record[field]) for field in self._listed(record)}
        if len(sizes) > 1 or 0 in sizes:
            return Found((), (f"its lists of traces have {sorted(sizes)} entries",))
        parts, faults, filtered = [], [], 0
        for part in range(max(sizes, default=1)):
            if not self._is_wanted(record, part):
                filtered += 1
                continue
            try:
                to_example(self, self.take(record, part))
                parts.append(part)
            except TraceFault as fault:
                faults.append(f"trace {part}: {fault}" if sizes else str(fault))
        return Found(tuple(parts), tuple(faults), filtered)

    def take(self, record: dict[str, Any], part: int) -> dict[str, Any]:
        """The record of one of its traces, and of lists beside them (grades) its own entry."""
        listed = self._listed(record)
        if not listed:
            return record
        size = len(record[listed[0]])
        beside = (*self.correct_fields, self.complete_field, *self.extra_fields)
        listed += [f for f in beside if isinstance(record.get(f), list) and len(record[f]) == size]
        return record | {field: record[field][part] for field in listed}

    def _listed(self, record: Mapping[str, Any]) -> list[str]:
        fields = (self.response_field, self.reasoning_field) if self.choose else ()
        return [field for field in fields if isinstance(record.get(field), list)]

    def _is_wanted(self, record: Mapping[str, Any], part: int) -> bool:
        if self.keep_wrong:
            return True
        groups = filter(
            None, (self.correct_fields, [self.complete_field] * bool(self.complete_field))
        )
        return all(is_true(record, group, part) for group in groups)


# ----------------------------------------------------------------- from a config to examples


def open_source(config: SourceConfig, data_dir: str | os.PathLike, seed: int = 0) -> Source:
    """The records of a source; prepared files go into `data_dir`.

    Args:
      seed: of what is chosen at random among the traces of a record.

    Raises:
      ValueError: files are missing, are not what they should be, or hold no valid record.
    """
    data_dir, key = pathlib.Path(data_dir), f"{config.key}.path"
    config = config.fields
    if config.kind == "jsonl":
        choice = {"choose": config.choose or "first", "seed": seed}
        return JsonlSource(config.path, fields=config, data_dir=data_dir, key=key, **choice)
    if config.kind == "countdown":
        if not config.path:
            return countdown.generated(config.countdown, config.split)
        records = JsonlSource(config.path, fields={"target": ""}, data_dir=data_dir, key=key)
        return countdown.from_records(records, config.countdown, config.split, records.line)
    directory = data_dir / (config.path or "arithmetic")
    if not directory.is_dir():
        raise ValueError(f"{key}: no folder {directory}; it must be one made by prepare_arithmetic")
    return arithmetic.open_arithmetic(directory, config.split)


def template_fields(template: str, key: str) -> list[str]:
    """The fields in the braces of a template of prompts.

    Raises ValueError, naming `key`, where it is not text with plain field names in braces.
    """
    wrong = ValueError(
        f"{key} is {template!r}; it must be text with one or more record fields in braces, as in "
        "'{question}'"
    )
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise wrong from error
    names = [name for _, name, _, _ in parts if name is not None]
    plain = all(name.isidentifier() for name in names)
    if not names or not plain or any(spec or conversion for _, _, spec, conversion in parts):
        raise wrong
    return names


def left_out(opened: Iterable[Source]) -> dict[str, int]:
    """What opening the sources left out: malformed records, and traces that are marked wrong."""
    sources = list(opened)
    count = lambda name: sum(getattr(one, name, 0) for one in sources)
    return {"quarantined": count("num_quarantined"), "filtered": count("num_filtered")}


def named_sources(sources: Mapping[str, Any], kind: type[Named]) -> dict[str, Named]:
    """`data.sources` by name: `kind` of each section, or what is one already.

    Raises ValueError where there is none, and for a field that `kind` has not or refuses.
    """
    if not sources:
        raise ValueError("data.sources is empty; it must name at least one source")
    made = {}
    known = [field.name for field in dataclasses.fields(kind)]
    for name, fields in sorted(sources.items()):
        if not isinstance(fields, kind):
            for field in fields:
                if field not in known:
                    raise ValueError(
                        f"data.sources.{name}.{field} is unknown; known: {', '.join(known)}"
                    )
            fields = kind(**{**fields, "name": name})
        made[name] = fields
    return made


def trace_sources(sources: Mapping[str, Any], *reading: str) -> dict[str, SourceConfig]:
    """Sources of questions with a reasoning and an answer, and these further fields of records.

    Raises ValueError as `named_sources` does, and for a source of pairs or texts.
    """
    made = named_sources(sources, SourceConfig)
    for source in made.values():
        if source.has_pairs or source.fields.text_field or source.rendering == "text":
            raise ValueError(
                f"{source.key} holds pairs or texts; traces are questions with a reasoning and an "
                "answer"
            )
    return {name: source.reading(*reading) for name, source in made.items()}


class Records:
    """The records of several sources in their order, by ids "SOURCE/NUMBER".

    Args:
      limit: only so many, the first; 0: all.

    Raises ValueError as open_source does.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceConfig],
        data_dir: str | os.PathLike,
        seed: int = 0,
        limit: int = 0,
    ):
        self._configs = dict(sources)
        self._opened = {name: open_source(one, data_dir, seed) for name, one in sources.items()}
        self._limit = limit or None
        self.left_out = left_out(self._opened.values())

    def __iter__(self) -> Iterator[str]:
        """The ids."""
        every = (f"{name}/{i}" for name, source in self._opened.items() for i in range(len(source)))
        return itertools.islice(every, self._limit)

    def __getitem__(self, record_id: str) -> tuple[dict[str, Any], tuple[Message, ...]]:
        """A record, and what it says as a conversation; () where it is none."""
        name, _, index = record_id.rpartition("/")
        record = self._opened[name][int(index)]
        return record, getattr(to_example(self._configs[name], record), "messages", ())


def to_prompt(config: SourceConfig, record: Mapping[str, Any]) -> str:
    """The user's turn of a record. Numbers among its fields are written out."""
    if config.prompt_field:
        return str(record[config.prompt_field])
    return (config.prompt_template or _PROMPTS[config.kind]).format_map(record)


def to_example(
    config: SourceConfig, record: Mapping[str, Any]
) -> TextExample | ChatExample | PairExample:
    """A record as what it trains. Numbers among its fields are written out.

    Raises:
      TraceFault: it cannot be learnt from; records of an opened source all can.
    """
    config = config.fields
    if config.kind == "arithmetic":
        return _arithmetic_example(config, record)
    if config.kind == "countdown":
        pair_of = countdown.completion(record, config.rendering, config.countdown)
        return _question(to_prompt(config, record), *pair_of)
    if config.chosen_field:
        return _pair_example(config, record)
    system = () if config.drop_system else system_turn(record, config.system_field)
    if config.messages_field:
        needs_thinking = config.reasoning == "split_tags"
        turns = conversation(record[config.messages_field], needs_thinking)
        if all(turn.role != "assistant" for turn in turns):
            raise TraceFault("no message is the assistant's")
        own = [turn for turn in turns if turn.role != "system" or not config.drop_system]
        return ChatExample((*system, *own))
    clean: Callable[[Any], str] = _strip_calculator if config.strip_calculator else str
    if config.text_field:
        return TextExample(clean(text_of(record, config.text_field)))
    for name in config.prompt_names():
        text_of(record, name)
    hashes = _HASHES if config.reasoning == "split_hashes" else ""
    answer, reasoning = clean(text_of(record, config.response_field, hashes)), None
    if config.reasoning_field and (
        config.needs_reasoning or record[config.reasoning_field] is not None
    ):
        reasoning = clean(text_of(record, config.reasoning_field))
    if config.reasoning == "split_tags":
        reasoning, answer = read_trace(answer)
    if hashes:
        solution, _, number = answer.rpartition(_HASHES)
        answer, reasoning = f"{_HASHES} {number.strip()}", solution.strip()
    return _question(to_prompt(config, record), answer, reasoning, system)


def _pair_example(config: SourceConfig, record: Mapping[str, Any]) -> PairExample:
    names, prompt = config.prompt_names(), None
    if config.prompt_field and isinstance(record.get(config.prompt_field), list):
        prompt = record[config.prompt_field]
    elif names and all(record.get(name) is not None for name in names):
        for name in names:
            text_of(record, name)
        prompt = to_prompt(config, record)
    fields = (config.chosen_field, config.rejected_field)
    for name in fields:
        if not isinstance(record[name], list):
            text_of(record, name)
    chosen, rejected = (record[name] for name in fields)
    return pair(prompt, chosen, rejected, config.reasoning == "split_tags")


def _arithmetic_example(
    config: SourceConfig, record: Mapping[str, Any]
) -> TextExample | ChatExample:
    if config.rendering == "text":
        return TextExample(record["text"])
    reasoning = arithmetic.reasoning(record, config.rendering)
    return _question(to_prompt(config, record), record["answer"], reasoning)


def _question(
    prompt: str, answer: str, reasoning: str | None, system: tuple[Message, ...] = ()
) -> ChatExample:
    user = Message(role="user", content=prompt)
    assistant = Message(role="assistant", content=answer, reasoning=reasoning)
    return ChatExample((*system, user, assistant))


def _strip_calculator(value: Any) -> str:
    return _CALCULATOR.sub("", str(value))


def place(source: Source, index: int) -> str:
    """Where a record stands, for messages: its number and, of a file, its line."""
    if isinstance(source, JsonlSource):
        return f"record {index} ({source.line(index)})"
    return f"record {index}"

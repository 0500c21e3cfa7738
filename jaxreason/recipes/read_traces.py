"""Traces of a workdir's samples.jsonl or of a data set, to be read: tools/inspect_cot.py."""

import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxreason.data.files import Fields, JsonlSource
from jaxreason.data.schemas import conversation
from jaxreason.reasoning.traces import Trace
from jaxreason.report.summary import read_lines
from jaxreason.text import chat

# The fields of a record, each under the first of these names that it has.
NAMES = {
    "trace": ("reasoning", "long_cot", "short_cot", "thinking_trajectories",
              "deepseek_thinking_trajectory", "deepseek_reasoning", "full_model_response",
              "response", "completion", "generation", "generations", "conversations", "messages",
              "rationale", "solution", "code", "text"),
    "question": ("question", "prompt", "problem", "expression", "id", "idx"),
    "correct": ("correct", "is_correct", "correctness", "correctness_math_verify", "score"),
    "truncated": ("truncated",),
    "tokens": ("kept_tokens", "num_tokens"),  # of a pruned trace what is left
    "operations": ("num_operations", "group"),
    "by": (),
}  # fmt: skip
TAGS = (chat.DEFAULT_TAGS, chat.ThinkTags("<|begin_of_thought|>", "<|end_of_thought|>"))
_ACCURACY = "accuracy"  # of the rewards of a rollout: 1 where the answer is right


@dataclasses.dataclass
class TraceSet:
    """Traces that are summed up together."""

    traces: list[Trace] = dataclasses.field(default_factory=list)
    counted: bool = False  # whether a length was counted here and not read from its record


@dataclasses.dataclass(frozen=True)
class Found:
    """What files hold."""

    sets: dict[str, TraceSet]  # by stage and set of a workdir, by `by` or file of a data set
    skipped: list[str]  # one line for each record, or line of a file, without a trace


def read_traces(
    files: Sequence[str], fields: Mapping[str, str], count_tokens: Callable[[str], int]
) -> Found:
    """Every trace of the files; what cannot be read is counted and named, not dropped in silence.

    A line with `completions` is a workdir's: an evaluation's, or a rollout's, whose traces are
    right where the reward `accuracy` is 1. Any other is a data set's record, whose trace may be a
    list of several, or a conversation, of which it is the assistant's last turn. Of a text with
    think tags the trace is what they enclose.

    Args:
      fields: {one of NAMES: the name it has in the records}, where it is not found by itself.
      count_tokens: the length of a trace whose record does not tell it.

    Raises:
      ValueError: an unknown field, a missing or broken file, or one without any trace.
    """
    for name in fields:
        if name not in NAMES:
            raise ValueError(f"--field {name} is unknown; known: {', '.join(NAMES)}")
    names = {**NAMES, **{name: (own,) for name, own in fields.items()}}
    found = Found({}, [])
    for file in files:
        before, skipped = sum(len(s.traces) for s in found.sets.values()), len(found.skipped)
        with tempfile.TemporaryDirectory() as folder:
            rule = Fields((), tuple(itertools.chain(*names.values())))
            source = JsonlSource(file, fields=rule, data_dir=folder, key="FILE")
            entries = read_lines(pathlib.Path(folder) / "quarantine.jsonl")
            found.skipped.extend(f"{e['file']} line {e['line']}: {e['reason']}" for e in entries)
            for i in range(len(source)):
                try:
                    _add(source[i], names, count_tokens, found.sets, pathlib.Path(file).name, i)
                except ValueError as error:
                    found.skipped.append(f"{source.line(i)}: {error}")
        if sum(len(s.traces) for s in found.sets.values()) == before:
            raise ValueError(f"FILE is {file!r}; it holds no trace: {found.skipped[skipped]}")
    return found


def _add(
    record: dict[str, Any],
    names: Mapping[str, Sequence[str]],
    count_tokens: Callable[[str], int],
    sets: dict[str, TraceSet],
    file: str,
    number: int,
) -> None:
    """Adds the traces of one record to their set. Raises ValueError for a malformed record."""
    if isinstance(record.get("completions"), list):
        name = "/".join(str(record[k]) for k in ("stage", "set") if k in record) or file
        if "step" in record:
            name += " rollouts"
        samples = [_sample(record, completion) for completion in record["completions"]]
    else:
        by = _field(record, names["by"])
        name = file if by is None else str(by)
        samples = _samples(record, names, number)
    made, counted = [], False
    for sample in samples:
        if sample["num_tokens"] is None:
            sample["num_tokens"], counted = count_tokens(sample["text"]), True
        made.append(Trace(**sample))
    if made:
        found = sets.setdefault(name, TraceSet())
        found.traces += made
        found.counted |= counted


def traces_of(record: dict[str, Any]) -> list[Trace]:
    """Of a line of samples.jsonl, whose completions tell their lengths."""
    return [Trace(**_sample(record, completion)) for completion in record["completions"]]


def _sample(record: dict[str, Any], completion: Any) -> dict[str, Any]:
    """A completion of samples.jsonl, as evals/accuracy.py and train/rl.py write it."""
    if not isinstance(completion, dict) or not isinstance(completion.get("text"), str):
        raise ValueError("a completion has no text")
    correct = completion.get("correct")
    if correct is None:
        reward = completion.get("rewards", {}).get(_ACCURACY)
        correct = None if reward is None else reward >= 1
    return {
        "question": str(record.get("prompt", "")),
        "text": _reasoning(completion["text"]),
        "num_tokens": _whole(completion.get("num_tokens"), "num_tokens"),
        "correct": _graded(correct),
        "truncated": _graded(completion.get("truncated")),
        "num_operations": _operations(record.get("group")),
    }


def _samples(
    record: dict[str, Any], names: Mapping[str, Sequence[str]], number: int
) -> list[dict[str, Any]]:
    """The traces of a data set's record: one, or a list with a list of grades."""
    value = _field(record, names["trace"])
    if value is None:
        has = ", ".join(record) or "none"
        raise ValueError(f"no trace (fields: {has}); name its field with --field trace=NAME")
    question, several = _field(record, names["question"]), isinstance(value, list)
    if several and value and isinstance(value[0], dict):
        turns = conversation(value)
        if turns[-1].role != "assistant":
            raise ValueError("the conversation does not end with the assistant")
        asked = next((turn.content for turn in turns if turn.role == "user"), None)
        question, several = (asked if question is None else question), False
        value = turns[-1].reasoning or turns[-1].content
    texts = value if several else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the trace is {type(value).__name__}, not text or a list of texts")
    grades = _field(record, names["correct"])
    grades = grades if isinstance(grades, list) else [grades] * len(texts)
    if len(grades) != len(texts):
        raise ValueError(f"{len(texts)} traces have {len(grades)} grades")
    tokens = None if several else _whole(_field(record, names["tokens"]), "the number of tokens")
    return [
        {
            "question": f"record {number}" if question is None else str(question),
            "text": _reasoning(text),
            "num_tokens": tokens,
            "correct": _graded(grade),
            "truncated": _graded(_field(record, names["truncated"])),
            "num_operations": _operations(_field(record, names["operations"])),
        }
        for text, grade in zip(texts, grades)
    ]


def _field(record: dict[str, Any], names: Sequence[str]) -> Any:
    """The first that is there, not null and not an empty text; None without one."""
    return next((record[name] for name in names if record.get(name) not in (None, "")), None)


def _reasoning(text: str) -> str:
    """What think tags of any kind enclose; the whole text where there are none."""
    for tags in TAGS:
        reasoning, _ = chat.split_reasoning(text, tags)
        if reasoning is not None:
            return reasoning
    return text


def _graded(value: Any) -> bool | None:
    """A flag as it is; a score from 0 to 1 is right at 1."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value >= 1
    raise ValueError(f"the grade is {value!r}; it must be true, false or a number")


def _whole(value: Any, name: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError(f"{name} is {value!r}; it must be a whole number from 0")


def _operations(value: Any) -> int | None:
    """A number of operations; an evaluation's groups may be of another kind."""
    return int(value) if str(value).isdecimal() else None

"""Records as published data sets write them, made into texts, conversations and pairs.

Column names are those of the data sets' own pages on Hugging Face: open-r1/OpenR1-Math-220k,
simplescaling/s1K and s1K-1.1, open-thoughts/OpenThoughts-114k (its two configurations), and the
preference format of TRL.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxreason.data.files import field_fault
from jaxreason.text.chat import Message
from jaxreason.text.traces import TraceFault, read_trace

# kind -> the fields of a SourceConfig of kind "jsonl" that it stands for, where they are not set.
SCHEMAS: dict[str, dict[str, Any]] = {
    "openr1": {
        "prompt_field": "problem",
        "response_field": "generations",
        "reasoning": "split_tags",
        # math-verify's verdict, and Llama's where it was asked: math-verify misreads some answers.
        "correct_fields": ("correctness_math_verify", "correctness_llama"),
        "complete_field": "is_reasoning_complete",
        "choose": "first",
    },
    "s1k": {
        "prompt_field": "question",
        "reasoning_field": "thinking_trajectories",
        "needs_reasoning": True,
        "response_field": "attempt",
        "choose": "first",
    },
    "s1k-1.1": {
        "prompt_field": "question",
        "reasoning_field": "deepseek_thinking_trajectory",
        "needs_reasoning": True,
        "response_field": "deepseek_attempt",
    },
    "openthoughts": {
        "messages_field": "conversations",
        "system_field": "system",
        "reasoning": "split_tags",
    },
    "openthoughts-metadata": {
        "prompt_field": "problem",
        "reasoning_field": "deepseek_reasoning",
        "needs_reasoning": True,
        "response_field": "deepseek_solution",
    },
    "messages": {"messages_field": "messages"},
    "preference": {
        "prompt_field": "prompt",
        "chosen_field": "chosen",
        "rejected_field": "rejected",
    },
}
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


@dataclasses.dataclass(frozen=True)
class TextExample:
    """A document, all of which is trained on."""

    text: str


@dataclasses.dataclass(frozen=True)
class ChatExample:
    """A conversation; which roles are trained on is for the pipeline to say."""

    messages: tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class PairExample:
    """Two conversations that begin with the same `num_prompt` messages, the better one first."""

    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    num_prompt: int


def text_of(record: Mapping[str, Any], field: str, part: str = "") -> str:
    """A field that is text or a number, as text. Raises TraceFault where it is not."""
    fault = field_fault(record, {field: part})
    if fault is not None:
        raise TraceFault(fault)
    return str(record[field])


def is_true(record: Mapping[str, Any], fields: Sequence[str], part: int) -> bool:
    """Whether any of the fields, or its entry for this part, says yes: true, 1 or more, "Yes"."""
    for field in fields:
        value = record.get(field)
        if isinstance(value, list):
            value = value[part] if part < len(value) else None
        if isinstance(value, str):
            value = value.strip().lower() in ("yes", "true")
        if isinstance(value, bool | int | float) and value >= 1:
            return True
    return False


def system_turn(record: Mapping[str, Any], field: str) -> tuple[Message, ...]:
    """The system's turn, where the record has one."""
    if not field or record.get(field) in (None, ""):
        return ()
    return (Message("system", text_of(record, field)),)


def conversation(value: Any, needs_thinking: bool = False) -> tuple[Message, ...]:
    """Messages of a list of {role, content} or {from, value}, their tags read.

    Args:
      needs_thinking: the last of the assistant's turns must have a reasoning.

    Raises:
      TraceFault: the list is no conversation, or `read_trace` refuses a turn.
    """
    if not isinstance(value, list) or not value:
        raise TraceFault("the messages are no list of messages, or an empty one")
    last = max((i for i, turn in enumerate(value) if _role(turn) == "assistant"), default=-1)
    return tuple(_message(turn, needs_thinking and i == last) for i, turn in enumerate(value))


def _role(turn: Any) -> str:
    if not isinstance(turn, Mapping):
        raise TraceFault(f"a message is {type(turn).__name__}, not an object")
    role = turn.get("role") or turn.get("from")
    return _ROLES.get(role, role)


def _message(turn: Mapping[str, Any], needs_thinking: bool) -> Message:
    role, field = _role(turn), "value" if turn.get("value") is not None else "content"
    content = text_of(turn, field)
    if role != "assistant":
        return _checked(role, content, None)
    for name in ("reasoning_content", "thinking"):  # Qwen's, gpt-oss's
        if turn.get(name):
            return _checked(role, content, text_of(turn, name))
    reasoning, answer = read_trace(content, needs_thinking)
    return _checked(role, answer, reasoning)


def _checked(role: Any, content: str, reasoning: str | None) -> Message:
    try:
        return Message(role, content, reasoning)
    except ValueError as error:  # an unknown role
        raise TraceFault(str(error)) from error


def pair(prompt: Any, chosen: Any, rejected: Any, needs_thinking: bool) -> PairExample:
    """A pair of texts after a prompt, or of lists of messages that may begin with the prompt.

    Args:
      prompt: a text or messages; None where the two lists hold it.

    Raises:
      TraceFault: they share no prompt, are the same, or end otherwise than with the assistant.
    """
    before: tuple[Message, ...] = ()
    if prompt is not None:
        is_text = not isinstance(prompt, list)
        before = (Message("user", str(prompt)),) if is_text else conversation(prompt)
    sides = []
    for side in (chosen, rejected):
        if isinstance(side, list):
            turns = conversation(side, needs_thinking)
            sides.append(turns if turns[: len(before)] == before else (*before, *turns))
        else:
            turn = {"role": "assistant", "content": side}
            sides.append((*before, _message(turn, needs_thinking)))
    if sides[0] == sides[1]:
        raise TraceFault("chosen and rejected are the same")
    shared = itertools.takewhile(lambda both: both[0] == both[1], zip(*sides))
    num_prompt = len(list(shared))
    if not num_prompt or min(map(len, sides)) == num_prompt:
        raise TraceFault("chosen and rejected are not two answers to one prompt")
    if any(side[num_prompt].role != "assistant" for side in sides):
        raise TraceFault("chosen and rejected do not part at an assistant's turn")
    if any(side[-1].role != "assistant" for side in sides):
        raise TraceFault("chosen or rejected does not end with the assistant's turn")
    return PairExample(*sides, num_prompt)

"""Messages to ids and a role mask: the one file that knows chat templates and think tags.

Every turn is encoded by itself, so the ids of a conversation are exactly the ids a sampler was
given plus the ids it should have drawn, whatever the tokenizer merges across turns; and earlier
think blocks stay, so this holds for every turn of a conversation and not only for the last.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxreason.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class ThinkTags:
    """What encloses a reasoning."""

    open: str = "<think>"
    close: str = "</think>"


DEFAULT_TAGS = ThinkTags()


@dataclasses.dataclass(frozen=True)
class ThinkingIds:
    """What a sampler writes and looks for to control a reasoning (types.ThinkingBudget)."""

    close: tuple[int, ...]  # the closing tag
    ends: dict[str, tuple[int, ...]]  # wording -> what ends a reasoning by force, the tag included
    wait: tuple[int, ...]  # what stands where an end is not yet wanted


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. `reasoning` belongs to an assistant's turn; None where there is none."""

    role: str
    content: str
    reasoning: str | None = None

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"message role is {self.role!r}; known roles: {', '.join(ROLES)}")
        if self.reasoning is not None and self.role != "assistant":
            raise ValueError(f"a {self.role} message has a reasoning; only an assistant's can")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A format of conversations; `template_for` fits one of TEMPLATES to a tokenizer and tags."""

    name: str
    header: str  # opens an assistant's turn: the last part of every prompt
    any_eos: bool  # True: turns end with the tokenizer's own end token; False: `eos` is the format
    turn: Callable[[Sequence[Message], int], str]  # text of messages[i], not an assistant's
    completion: Callable[[Message, ThinkTags, str], str]  # text of an assistant's turn after header
    empty_think: str  # what a prompt adds to ask for no reasoning, with {open} and {close}
    jinja_source: str
    eos: str = "<|im_end|>"
    tags: ThinkTags = DEFAULT_TAGS

    def render_prompt(self, messages: Sequence[Message], thinking: bool = True) -> str:
        """All turns, then what opens the assistant's; without `thinking` an empty think block."""
        return "".join(self.prompt_parts(messages, thinking))

    def render_completion(self, message: Message) -> str:
        """What follows the prompt: reasoning, answer, end of sequence and the format's rest."""
        return self.completion(message, self.tags, self.eos)

    def prompt_parts(self, messages: Sequence[Message], thinking: bool = True) -> Iterator[str]:
        """The prompt in the pieces that are encoded one by one."""
        for _, header, body in self.turns(messages):
            yield from (header, body)
        yield self.header
        if not thinking:
            yield self.empty_think.format(open=self.tags.open, close=self.tags.close)

    def turns(self, messages: Sequence[Message]) -> Iterator[tuple[str, str, str]]:
        """(role, header, body) of every message; only an assistant's header is not empty."""
        for i, message in enumerate(messages):
            if message.role == "assistant":
                yield message.role, self.header, self.render_completion(message)
            else:
                yield message.role, "", self.turn(messages, i)

    @property
    def jinja(self) -> str:
        """The same format for transformers: `apply_chat_template` renders what this class does."""
        values = {"OPEN_TAG": self.tags.open, "CLOSE_TAG": self.tags.close, "EOS": self.eos}
        settings = (f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items())
        return "\n".join([*settings, self.jinja_source])


def template_for(name: str, tokenizer: Tokenizer, tags: ThinkTags = DEFAULT_TAGS) -> ChatTemplate:
    """The named template with these tags and the tokenizer's end token. Raises ValueError."""
    if name not in TEMPLATES:
        raise ValueError(f"chat template is {name!r}; known templates: {', '.join(TEMPLATES)}")
    template = dataclasses.replace(TEMPLATES[name], tags=tags)
    eos = tokenizer.decode([tokenizer.eos_id])
    if template.any_eos:
        return dataclasses.replace(template, eos=eos)
    if eos != template.eos:
        raise ValueError(
            f"chat template {name} ends turns with {template.eos!r}, the tokenizer with {eos!r}"
        )
    return template


def encode_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    thinking: bool = True,
) -> list[int]:
    """Ids of `render_prompt`, turn by turn."""
    parts = template.prompt_parts(messages, thinking)
    return [token for part in parts for token in tokenizer.encode(part)]


def encode_conversation(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    train_roles: Sequence[str] = ("assistant",),
) -> tuple[np.ndarray, np.ndarray]:
    """ids_T int32 and weights_T float32: 1 where ids_T[t] is to be learnt, 0 elsewhere.

    An assistant's turn is learnt after its header, up to and including the end of sequence (also
    where that is the padding id) and no further: the sampler stops there. Any other trained role is
    learnt from the first token of its turn. Raises ValueError for an unknown role, and where the
    completion does not hold the tokenizer's end token, so that stopping could not be learnt.
    """
    unknown = [role for role in train_roles if role not in ROLES]
    if unknown:
        raise ValueError(f"train_roles holds {unknown[0]!r}; known roles: {', '.join(ROLES)}")
    ids, weights = [], []
    for role, header, body in template.turns(messages):
        header_ids, body_ids = tokenizer.encode(header), tokenizer.encode(body)
        ids += header_ids + body_ids
        end = _after_last(body_ids, tokenizer.eos_id)
        if end is None and role == "assistant":
            raise ValueError(
                f"chat template {template.name} ends turns with {template.eos!r}, which is not "
                f"the tokenizer's end token {tokenizer.decode([tokenizer.eos_id])!r}"
            )
        learnt = (len(body_ids) if end is None else end) if role in train_roles else 0
        weights += [0.0] * len(header_ids) + [1.0] * learnt + [0.0] * (len(body_ids) - learnt)
    return np.array(ids, np.int32), np.array(weights, np.float32)


def split_reasoning(text: str, tags: ThinkTags = DEFAULT_TAGS) -> tuple[str | None, str]:
    """(reasoning, answer) of a completion, without the line breaks at the tags.

    Splits at the last closing tag; the opening tag may be missing, as where the prompt ended with
    it. An unclosed reasoning has the answer "", no tag at all the reasoning None. Text before the
    first opening tag belongs to neither.
    """
    before, close, answer = text.rpartition(tags.close)
    if close:
        return before.split(tags.open, 1)[-1].strip("\n"), answer.lstrip("\n")
    _, opened, reasoning = text.partition(tags.open)
    if opened:
        return reasoning.strip("\n"), ""
    return None, text


def thinking_ids(
    tokenizer: Tokenizer, tags: ThinkTags = DEFAULT_TAGS, wait: str = "Wait"
) -> ThinkingIds:
    """The wordings of a forced end (arXiv 2501.19393, 2505.09388), and what goes on instead."""

    def ids(*parts: str) -> tuple[int, ...]:
        return tuple(token for part in parts for token in tokenizer.encode(part))

    return ThinkingIds(
        close=ids(tags.close),
        ends={
            "s1": ids(tags.close, "\nFinal Answer:"),
            "qwen3": ids(_QWEN3_STOP_PHRASE, tags.close, "\n\n"),
            "tag": ids(tags.close),
        },
        wait=ids(wait),
    )


_QWEN3_STOP_PHRASE = (
    "Considering the limited time by the user, I have to give the solution based on the thinking "
    "directly now.\n"
)


def _after_last(ids: Sequence[int], token: int) -> int | None:
    """The index after the last `token`, None where there is none."""
    return len(ids) - ids[::-1].index(token) if token in ids else None


def _qwen3_turn(messages: Sequence[Message], i: int) -> str:
    """A ChatML turn; neighbouring tool messages share one user turn, as Qwen3 was trained."""
    role, content = messages[i].role, messages[i].content
    if role != "tool":
        return f"<|im_start|>{role}\n{content}<|im_end|>\n"
    opening = "" if i and messages[i - 1].role == "tool" else "<|im_start|>user"
    closing = "" if i + 1 < len(messages) and messages[i + 1].role == "tool" else "<|im_end|>\n"
    return f"{opening}\n<tool_response>\n{content}\n</tool_response>{closing}"


def _qwen3_completion(message: Message, tags: ThinkTags, eos: str) -> str:
    """Always a think block, an empty one without reasoning; one inside `content` counts."""
    reasoning, content = message.reasoning, message.content
    if reasoning is None and tags.close in content:
        reasoning, content = split_reasoning(content, tags)
    thought = (reasoning or "").strip("\n")
    return f"{tags.open}\n{thought}\n{tags.close}\n\n" + content.lstrip("\n") + f"{eos}\n"


def _plain_turn(messages: Sequence[Message], i: int) -> str:
    return messages[i].content


def _plain_completion(message: Message, tags: ThinkTags, eos: str) -> str:
    if message.reasoning is None:
        return message.content + eos
    return tags.open + message.reasoning + tags.close + message.content + eos


_QWEN3_JINJA = r"""
{%- for message in messages -%}
    {%- set content = message.content -%}
    {%- if message.role == "assistant" -%}
        {%- set reasoning = "" -%}
        {%- if message.reasoning_content is string -%}
            {%- set reasoning = message.reasoning_content -%}
        {%- elif CLOSE_TAG in content -%}
            {%- set reasoning = content.rsplit(CLOSE_TAG, 1)[0].split(OPEN_TAG, 1)[-1] -%}
            {%- set content = content.rsplit(CLOSE_TAG, 1)[-1] -%}
        {%- endif -%}
        {{- "<|im_start|>assistant\n" + OPEN_TAG + "\n" + reasoning.strip("\n") + "\n" -}}
        {{- CLOSE_TAG + "\n\n" + content.lstrip("\n") + EOS + "\n" -}}
    {%- elif message.role == "tool" -%}
        {%- if loop.first or loop.previtem.role != "tool" -%}
            {{- "<|im_start|>user" -}}
        {%- endif -%}
        {{- "\n<tool_response>\n" + content + "\n</tool_response>" -}}
        {%- if loop.last or loop.nextitem.role != "tool" -%}
            {{- "<|im_end|>\n" -}}
        {%- endif -%}
    {%- else -%}
        {{- "<|im_start|>" + message.role + "\n" + content + "<|im_end|>\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\n" -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- OPEN_TAG + "\n\n" + CLOSE_TAG + "\n\n" -}}
    {%- endif -%}
{%- endif -%}
"""

_PLAIN_JINJA = r"""
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}
        {%- if message.reasoning_content is string -%}
            {{- OPEN_TAG + message.reasoning_content + CLOSE_TAG -}}
        {%- endif -%}
        {{- message.content + EOS -}}
    {%- else -%}
        {{- message.content -}}
    {%- endif -%}
{%- endfor -%}
"""

TEMPLATES: dict[str, ChatTemplate] = {
    # ChatML as Qwen3 is trained on it: arXiv 2505.09388, and huggingface/trl's training template,
    # which unlike the stock one keeps the think blocks of earlier turns.
    "qwen3": ChatTemplate(
        name="qwen3",
        header="<|im_start|>assistant\n",
        any_eos=False,
        turn=_qwen3_turn,
        completion=_qwen3_completion,
        empty_think="{open}\n\n{close}\n\n",
        jinja_source=_QWEN3_JINJA,
    ),
    # For tiny models with one question: the prompt's text, then the completion, nothing between.
    # It has no way to ask for no reasoning: `thinking` changes nothing.
    "plain": ChatTemplate(
        name="plain",
        header="",
        any_eos=True,
        turn=_plain_turn,
        completion=_plain_completion,
        empty_think="",
        jinja_source=_PLAIN_JINJA,
    ),
}

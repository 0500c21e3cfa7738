"""Messages to ids and a role mask: the one file that knows chat templates and think tags.

A conversation is rendered by its template and cut where the assistant's turns begin and end; each
piece is encoded by itself. So the ids of a conversation are exactly the ids a sampler was given
plus the ids it should have drawn, whatever the tokenizer merges across a cut. A template for which
that cannot be, because it rewrites earlier turns as the conversation goes on, is refused for
training and for nothing else.
"""

import bisect
import dataclasses
import datetime
import itertools
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxreason.text import jinja
from jaxreason.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class ThinkTags:
    """What encloses a reasoning."""

    open: str = "<think>"
    close: str = "</think>"

    def __post_init__(self):
        if not self.open or not self.close or self.open == self.close:
            raise ValueError(
                f"the think tags are {self.open!r} and {self.close!r}; they must be two texts, not "
                "empty and not the same"
            )


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
    """A format of conversations; `template_for` fits one to a tokenizer and tags."""

    name: str  # of TEMPLATES, or where it was read
    jinja: str  # what `apply_chat_template` of transformers renders too
    tags: ThinkTags
    specials: tuple[tuple[str, str], ...]  # bos_token, eos_token, ...: variables of the template
    today: datetime.date | None  # what the template takes for the day; None: the clock's
    eos: str = ""  # ends an assistant's turn

    @property
    def parts_turns(self) -> bool:
        """Whether it tells where a turn ends; the plain template does not, and has room for one."""
        begin = dict(self.specials).get("bos_token", "")
        return self.render_prompt([Message("user", "?")]) not in ("?", f"{begin}?")

    def render_prompt(self, messages: Sequence[Message], thinking: bool = True) -> str:
        """All turns, then what opens the assistant's; `thinking` is the template's to obey."""
        options = {"add_generation_prompt": True, "enable_thinking": thinking}
        return self.render(messages, **options).text

    def render_completion(self, message: Message) -> str:
        """What follows the prompt: reasoning, answer, end of the turn and the format's rest.

        Raises ValueError where the template writes something else than the prompt before it.
        """
        messages = [Message("user", "?"), message]
        text = self.render(messages).text
        ((begin, end),) = self._turns(text, messages)
        return text[begin:end]

    def prompt_parts(self, messages: Sequence[Message], thinking: bool = True) -> list[str]:
        """The prompt in the pieces that are encoded one by one: those of `layout`.

        Where the template rewrites earlier turns, those are in one piece with what follows.
        """
        text, cuts = self.render_prompt(messages, thinking), [0]
        for i, message in enumerate(messages):
            if message.role == "assistant":
                before = [self.render_prompt(messages[:i]), self.render(messages[: i + 1]).text]
                cuts += [len(part) for part in before if text.startswith(part)]
        return [text[a:b] for a, b in itertools.pairwise([*sorted(cuts), len(text)])]

    def layout(self, messages: Sequence[Message], train_roles: Sequence[str]) -> "Layout":
        """The text of a conversation, its turns and what of them is learnt.

        Raises ValueError where what a sampler would be given or should have drawn at some turn is
        not what the text holds there, and where the template leaves out a reasoning.
        """
        whole = self.render(messages)
        assistants = self._turns(whole.text, messages)
        trained = set(train_roles)
        others = self._other_turns(whole.text, messages, trained - {"assistant"})
        answers = (message for message in messages if message.role == "assistant")
        for (begin, end), message in zip(assistants, answers, strict=True):
            if message.reasoning and message.reasoning.strip() not in whole.text[begin:end]:
                raise ValueError(f"chat template {self.name} leaves out a message's reasoning")
        drawn = whole.generated or assistants if "assistant" in trained else []
        return Layout(whole.text, assistants, others, [*drawn, *others])

    def _turns(self, text: str, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """Where in the text of a conversation what an assistant draws begins and ends."""
        turns = []
        for i, message in enumerate(messages):
            if message.role == "assistant":
                before, so_far = messages[:i], messages[: i + 1]
                start = self._length(text, self.render_prompt(before), before)
                is_last = len(so_far) == len(messages)
                known = text if is_last else self.render(so_far).text
                turns.append((start, self._length(text, known, so_far)))
        return turns

    def _other_turns(
        self, text: str, messages: Sequence[Message], roles: set[str]
    ) -> list[tuple[int, int]]:
        """Where turns of these roles begin and end; neighbours of one role are one turn."""
        turns, begin = [], 0
        for role, run in itertools.groupby(messages, key=lambda message: message.role):
            end = begin + len(list(run))
            if role in roles:
                before, so_far = messages[:begin], messages[:end]
                start = self._length(text, self.render(before).text, before) if before else 0
                turns.append((start, self._length(text, self.render(so_far).text, so_far)))
            begin = end
        return turns

    def _length(self, text: str, beginning: str, messages: Sequence[Message]) -> int:
        if not text.startswith(beginning):
            raise ValueError(
                f"chat template {self.name} renders the first {len(messages)} messages of a "
                "conversation otherwise than when more follow, so what is learnt would not be what "
                "is sampled; set chat.template to a .jinja file that keeps them, or to qwen3 where "
                "turns end with <|im_end|>"
            )
        return len(beginning)

    def render(self, messages: Sequence[Message], **options) -> jinja.Rendered:
        """The text that transformers makes of `as_dicts(messages)` with the same options."""
        options = {"enable_thinking": True, "today": self.today} | options
        try:
            return jinja.render(
                self.jinja, self.as_dicts(messages), **dict(self.specials), **options
            )
        except ValueError as error:
            raise ValueError(f"chat template {self.name}: {error}") from error

    def as_dicts(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """What the template is given: a reasoning stands in the content where it reads none."""
        reads = jinja.reads_reasoning(self.jinja)
        dicts = []
        for message in messages:
            own = {"role": message.role, "content": message.content}
            if message.reasoning is not None and reads:
                own |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
            elif message.reasoning is not None:
                thought = message.reasoning.strip("\n")
                own["content"] = (
                    f"{self.tags.open}\n{thought}\n{self.tags.close}\n\n{message.content}"
                )
            dicts.append(own)
        return dicts


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things are in the text of a conversation; all pairs are (begin, end) in characters."""

    text: str
    assistants: list[tuple[int, int]]  # what is drawn at each of the assistant's turns
    others: list[tuple[int, int]]  # the turns of other roles that are learnt
    learnt: list[tuple[int, int]]


def template_for(
    template: str,
    tokenizer: Tokenizer,
    tags: ThinkTags = DEFAULT_TAGS,
    today: datetime.date | None = None,
) -> ChatTemplate:
    """The template with these tags and the tokenizer's special tokens.

    Args:
      template: a name of TEMPLATES, a .jinja file, or a folder as Hugging Face publishes them.

    Raises:
      ValueError: there is none, or its turns end otherwise than the tokenizer says; `fitted` makes
        a tokenizer that agrees.
    """
    made = _unchecked(template, tokenizer, tags, today)
    eos = tokenizer.decode([tokenizer.eos_id])
    if eos != made.eos:
        raise ValueError(
            f"chat template {template} ends turns with {made.eos!r}, the tokenizer with {eos!r}"
        )
    return made


def fitted(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer whose `eos_id` ends an assistant's turn of this template.

    A base model's tokenizer ends documents, and Gemma's names <eos> where turns end otherwise.
    Raises ValueError where there is no such template or no token of the tokenizer ends its turns.
    """
    return tokenizer.ending_with(_unchecked(template, tokenizer, DEFAULT_TAGS, None).eos)


def _unchecked(
    template: str, tokenizer: Tokenizer, tags: ThinkTags, today: datetime.date | None
) -> ChatTemplate:
    specials = tuple(sorted(tokenizer.special_tokens.items()))
    text = read_template(template, tags)
    if template in TEMPLATES and tokenizer.document_start:
        text = _set("DOCUMENT_START", tokenizer.document_start) + "\n" + text
    made = ChatTemplate(template, text, tags, specials, today)
    mark = "ANSWER"
    example = [Message("user", "?"), Message("assistant", mark)]
    rest = made.render(example).text.rpartition(mark)[2]
    ends = [token for token in tokenizer.encode(rest) if token in tokenizer.special_ids]
    if not ends:
        raise ValueError(
            f"chat template {template} ends turns with {rest!r}, which has no special token of the "
            "tokenizer: a sampler could not stop there; set chat.template to checkpoint or a "
            ".jinja file"
        )
    return dataclasses.replace(made, eos=tokenizer.decode(ends[:1]))


def read_template(template: str, tags: ThinkTags = DEFAULT_TAGS) -> str:
    """The Jinja of a template as `template_for` takes it. Raises ValueError where there is none."""
    if template in TEMPLATES:
        values = {"OPEN_TAG": tags.open, "CLOSE_TAG": tags.close}
        settings = (_set(name, value) for name, value in values.items())
        return "\n".join([*settings, TEMPLATES[template]])
    return _read_template(pathlib.Path(template))


def _set(name: str, value: str) -> str:
    return f"{{%- set {name} = {json.dumps(value)} -%}}"


def _read_template(path: pathlib.Path) -> str:
    if path.is_file() and path.suffix == ".jinja":
        return path.read_text(encoding="utf-8")
    if (path / "chat_template.jinja").is_file():
        return _read_template(path / "chat_template.jinja")
    config = path / "tokenizer_config.json"
    if not config.is_file():
        raise ValueError(
            f"chat template is {str(path)!r}; known templates: {', '.join(TEMPLATES)}, a .jinja "
            "file, or a folder with one"
        )
    found = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(found, list):  # several by name, for tools and documents
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if found is None:
        raise ValueError(
            f"chat template is that of {path}, which has none, as base models have not: set "
            f"chat.template to {', '.join(TEMPLATES)} or a .jinja file"
        )
    return found


def encode_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    thinking: bool = True,
) -> list[int]:
    """Ids of `render_prompt`, piece by piece."""
    parts = template.prompt_parts(messages, thinking)
    return [token for part in parts for token in tokenizer.encode(part)]


def encode_to_answer(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    reasoning: str,
) -> list[int]:
    """Ids of the prompt and of a whole reasoning: what a sampler draws next is the answer to it.

    Raises ValueError where the template leaves the reasoning out.
    """
    mark = "ANSWER"
    text = template.render_completion(Message("assistant", mark, reasoning=reasoning))
    before = text.rpartition(mark)[0]
    if reasoning.strip() not in before:
        raise ValueError(f"chat template {template.name} leaves out a message's reasoning")
    return [*encode_prompt(tokenizer, template, messages), *tokenizer.encode(before)]


def encode_conversation(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    train_roles: Sequence[str] = ("assistant",),
    *,
    reasoning_weight: float = 1.0,
    answer_weight: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """ids_T int32 and weights_T float32: 1 where ids_T[t] is to be learnt, 0 elsewhere.

    Of an assistant's turn what is learnt has `reasoning_weight` up to and with the last closing tag
    (both think tags count as reasoning, and so does a token that ends in the answer), and
    `answer_weight` after it, the end of the turn included. A turn without the tag is all answer.

    An assistant's turn is learnt after its header, or where the template marks it with
    {% generation %}, up to and including the end of the turn (also where that is the padding id)
    and no further: the sampler stops there. Any other trained role is learnt from the first token
    of its turn. Raises ValueError for an unknown role, for what `layout` refuses, where an
    assistant's end token would not be learnt, and where weights differ and a template writes a
    reasoning without the closing tag.
    """
    unknown = [role for role in train_roles if role not in ROLES]
    if unknown:
        raise ValueError(f"train_roles holds {unknown[0]!r}; known roles: {', '.join(ROLES)}")
    layout = template.layout(messages, train_roles)
    spans = [*layout.assistants, *layout.others, *layout.learnt]
    cuts = sorted({0, len(layout.text), *itertools.chain.from_iterable(spans)})
    ids, at = [], {0: 0}  # at: character -> how many ids come before it
    for begin, end in itertools.pairwise(cuts):
        ids += tokenizer.encode(layout.text[begin:end])
        at[end] = len(ids)
    weights_T = np.zeros(len(ids), np.float32)
    for begin, end in layout.learnt:
        weights_T[at[begin] : at[end]] = 1
    for begin, end in [*layout.assistants, *layout.others]:
        last = _last(ids, tokenizer.eos_id, at[begin], at[end])
        if last is not None:
            weights_T[last + 1 : at[end]] = 0
        ends_learnt = last is not None and weights_T[last] == 1
        if "assistant" in train_roles and (begin, end) in layout.assistants and not ends_learnt:
            raise ValueError(
                f"chat template {template.name} does not teach the end of an assistant's turn: no "
                f"{tokenizer.decode([tokenizer.eos_id])!r} in what is learnt of it"
            )
    if (reasoning_weight, answer_weight) != (1, 1):
        answers = (message for message in messages if message.role == "assistant")
        for (begin, end), message in zip(layout.assistants, answers, strict=True):
            middle = _end_of_reasoning(tokenizer, template, ids, (at[begin], at[end]), message)
            weights_T[at[begin] : middle] *= reasoning_weight
            weights_T[middle : at[end]] *= answer_weight
    return np.array(ids, np.int32), weights_T


def _end_of_reasoning(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    ids: Sequence[int],
    turn: tuple[int, int],
    message: Message,
) -> int:
    """The first id of the answer in ids[begin:end]: the one after the last closing tag.

    Found by decoding, because the tag may be several ids, or end within one.
    """
    begin, end = turn
    closed = lambda stop: tokenizer.decode(ids[begin:stop]).count(template.tags.close)
    count = closed(end)
    if count == 0:
        if message.reasoning:
            raise ValueError(
                f"chat template {template.name} writes a reasoning without {template.tags.close}, "
                "so that it cannot be weighed apart; set chat.think_close to the template's tag"
            )
        return begin
    return bisect.bisect_left(range(begin, end), count, key=closed) + begin


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
    """The wordings of a forced end (arXiv 2501.19393, 2505.09388), and what goes on instead.

    Tags that are no tokens of their own, as in Llama's and Gemma's vocabularies, are several ids.
    """

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


def _last(ids: Sequence[int], token: int, begin: int, end: int) -> int | None:
    """The last place of `token` in ids[begin:end], None where there is none."""
    places = (place for place in range(end - 1, begin - 1, -1) if ids[place] == token)
    return next(places, None)


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
        {{- CLOSE_TAG + "\n\n" + content.lstrip("\n") + "<|im_end|>\n" -}}
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
{%- if DOCUMENT_START is defined and messages -%}
    {{- DOCUMENT_START -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}
        {%- if message.reasoning_content is string -%}
            {{- OPEN_TAG + message.reasoning_content + CLOSE_TAG -}}
        {%- endif -%}
        {{- message.content + eos_token -}}
    {%- else -%}
        {{- message.content -}}
    {%- endif -%}
{%- endfor -%}
"""

# Jinja that reads OPEN_TAG and CLOSE_TAG, which `read_template` sets, and DOCUMENT_START, set where
# a tokenizer has one.
TEMPLATES: dict[str, str] = {
    # ChatML as Qwen3 is trained on it: arXiv 2505.09388, and huggingface/trl's training template,
    # which unlike the stock one keeps the think blocks of earlier turns.
    "qwen3": _QWEN3_JINJA,
    # For tiny models with one question: the prompt's text, then the completion, nothing between.
    # It has no way to ask for no reasoning: `thinking` changes nothing.
    "plain": _PLAIN_JINJA,
}

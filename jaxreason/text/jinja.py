"""Chat templates in Jinja: the same text as transformers' `apply_chat_template` makes of them.

A template comes from whoever published a checkpoint, so it runs in Jinja's immutable sandbox, with
the settings, names and limits that transformers 5 gives it (utils/chat_template_utils.py there).
"""

import contextvars
import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

# What templates call the reasoning of a message. transformers offers the first two.
REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation's text, and where {% generation %} blocks begin and end in it."""

    text: str
    generated: tuple[tuple[int, int], ...]


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    today: datetime.date | None = None,
    **variables: Any,
) -> Rendered:
    """The template on these messages; `variables` are the special tokens and `enable_thinking`.

    Args:
      messages: plain dicts of role, content and what else the template reads.
      today: what `strftime_now` tells; None: the clock.

    Raises:
      ValueError: the template is no Jinja, calls `raise_exception` or fails on these messages; on
        one line.
    """

    def strftime_now(form: str) -> str:
        return (today or datetime.datetime.now()).strftime(form)

    blocks, spans = [], []
    token = _PROGRESS.set((blocks, spans))
    try:
        parts = compiled(source).generate(
            messages=messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            strftime_now=strftime_now,
            **variables,
        )
        for part in parts:
            blocks.append(part)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        _PROGRESS.reset(token)
    return Rendered("".join(blocks), tuple(spans))


@functools.lru_cache(maxsize=64)
def compiled(source: str) -> jinja2.Template:
    """Raises ValueError, on one line, for what is no Jinja."""
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from error


@functools.lru_cache(maxsize=64)
def reads_reasoning(source: str) -> bool:
    """Whether the template writes a message's reasoning itself.

    Where it does not, as Qwen2.5's, Llama 3's and Gemma 3's, transformers drops the reasoning.
    Raises ValueError, on one line, for what is no Jinja.
    """
    tree = compiled(source).environment.parse(source)
    fields = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    texts = {node.value for node in tree.find_all(jinja2.nodes.Const)}
    return not (fields | texts).isdisjoint(REASONING)


# The parts rendered so far and the generation blocks in them: a context variable, because data
# workers render the same compiled template in several threads.
_Progress = tuple[list[str], list[tuple[int, int]]]
_PROGRESS: contextvars.ContextVar[_Progress] = contextvars.ContextVar("rendering")


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_note")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _note(self, caller) -> str:
        blocks, spans = _PROGRESS.get()
        text, start = caller(), sum(map(len, blocks))
        spans.append((start, start + len(text)))
        return text


class _Dict:
    """`dict` in a template: makes dictionaries, and is no class to climb out of the sandbox by."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs) -> dict:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in a template, without names that begin with an underscore."""

    def __init__(*args, **kwargs):
        self, *rest = args  # so that a template may have a field `self`
        fields = dict(*rest, **kwargs)
        for name in fields:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, fields)

    def __setitem__(self, name, value):
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace may not have a field {name!r}")


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as it is: Jinja's own filter would write HTML's escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment

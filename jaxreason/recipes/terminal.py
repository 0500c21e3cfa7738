"""A conversation on the terminal: lines in, an answer that appears as it is sampled."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

import jax

from jaxreason.text import chat
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.types import Completion, Sampling, ThinkingBudget

HELP = "/reset forgets, /think N limits the thinking (/think off does not), /quit ends."
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


Conversation = tuple[chat.Message, ...]


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model that answers conversations.

    answer: (conversations, sampling, key, **callbacks) -> completions[conversation][sample], with
      the callbacks of rollout/generate.py.
    """

    answer: Callable[..., list[list[Completion]]]
    template: chat.ChatTemplate
    tokenizer: Tokenizer
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Talk:
    """What the next answer follows from."""

    turns: Conversation
    sampling: Sampling


def obey(talk: Talk, command: str) -> tuple[Talk, str]:
    """(what a line that begins with / leaves, what there is to say). Raises ValueError."""
    name, *words = command.split()
    if name == "/reset" and not words:
        return dataclasses.replace(talk, turns=()), "forgotten"
    if name == "/think" and len(words) == 1 and (words[0] == "off" or words[0].isdecimal()):
        limit = None if words[0] == "off" else int(words[0])
        budget = dataclasses.replace(talk.sampling.thinking or ThinkingBudget(), max_tokens=limit)
        off = budget.max_tokens is None and not budget.waits
        sampling = dataclasses.replace(talk.sampling, thinking=None if off else budget)
        said = "no limit of the thinking" if limit is None else f"at most {limit} thinking tokens"
        return dataclasses.replace(talk, sampling=sampling), said
    raise ValueError(f"{command!r} is no command: {HELP}")


def converse(
    speaker: Speaker,
    sampling: Sampling,
    ask: Callable[[str], str],
    remember: bool,
    lines: Iterator[str],
    screen: "Screen",
) -> None:
    """Answers each line, after the turns before it where it should `remember` them.

    A mistake ends a conversation that is read from a pipe; on a terminal it is shown.
    """
    talk, number = Talk((), sampling), 0
    for line in lines:
        if line.strip() == "/quit":
            return
        try:
            if line.startswith("/"):
                talk, said = obey(talk, line)
                screen.say(said)
            elif line.strip():
                question = chat.Message("user", ask(line))
                turns = (*talk.turns, question) if remember else (question,)
                key = jax.random.fold_in(speaker.key, number)
                number += 1
                answer = _answer(speaker, turns, talk.sampling, key, screen)
                talk = dataclasses.replace(talk, turns=(*turns, answer))
        except ValueError as error:
            if not screen.is_terminal:
                raise
            screen.say(f"error: {error}")
        except KeyboardInterrupt:  # of a long answer: the question counts as never asked
            if not screen.is_terminal:
                raise
            screen.say("stopped")


def _answer(
    speaker: Speaker, turns: Conversation, sampling: Sampling, key: jax.Array, screen: "Screen"
) -> chat.Message:
    one = dataclasses.replace(sampling, num_samples=1)
    tags, tokenizer = speaker.template.tags, speaker.tokenizer
    end_ids = (tokenizer.eos_id, *tokenizer.stop_ids, *sampling.stop_ids)
    stream = Stream(tokenizer.decode, end_ids, (tags.open, tags.close), sampling.stop)
    with screen.answering():
        show = lambda prompt, sample, ids: screen.write(stream.feed(ids))
        ((completion,),) = speaker.answer([turns], one, key, on_tokens=show)
        screen.write(stream.finish(completion.text))
        if completion.truncated:
            screen.write(f" [cut off after {completion.num_tokens} tokens]", dim=True)
    reasoning, content = chat.split_reasoning(completion.text, tags)
    return chat.Message("assistant", content, reasoning)


def lines(source: TextIO) -> Iterator[str]:
    """Lines without their end, from a terminal with a prompt and line editing."""
    if not source.isatty():
        yield from (line.rstrip("\n") for line in source)
        return
    with contextlib.suppress(ImportError):  # not everywhere; only for the arrow keys
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


class Screen:
    """Where answers appear. On a terminal the thinking and what the program says are dim."""

    def __init__(self, out: TextIO, tags: chat.ThinkTags):
        self._out, self._tags = out, tags
        self.is_terminal = out.isatty()

    def say(self, text: str) -> None:
        """What the program says: on a terminal only, a pipe gets answers and nothing else."""
        if self.is_terminal:
            self.write(text, dim=True)
            self.write("\n")

    def write(self, piece: str, dim: bool = False) -> None:
        """A piece of an answer, which holds tags whole or not at all."""
        if self.is_terminal:
            opened = piece.replace(self._tags.open, _DIM + self._tags.open)
            piece = opened.replace(self._tags.close, self._tags.close + _PLAIN)
            piece = f"{_DIM}{piece}{_PLAIN}" if dim else piece
        elif dim:
            return
        self._out.write(piece)
        self._out.flush()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """An answer ends its line and its dimness, however it ends."""
        try:
            yield
        finally:
            self._out.write(f"{_PLAIN}\n" if self.is_terminal else "\n")
            self._out.flush()


@dataclasses.dataclass
class Stream:
    """The text of a completion, piece by piece as its ids arrive."""

    decode: Callable[[list[int]], str]
    end_ids: Sequence[int]  # one that comes last ends the completion and is no text
    tags: Sequence[str]  # shown whole or not at all
    stop: Sequence[str]  # not shown, nor what comes after one
    ids: list[int] = dataclasses.field(default_factory=list)
    shown: str = ""

    def feed(self, ids: Sequence[int]) -> str:
        """What can be shown now that was not before."""
        self.ids += ids
        ended = self.ids[-1] in self.end_ids
        # Decoded from the start: what an id stands for can depend on those around it.
        text = self.decode(self.ids[:-1] if ended else self.ids)
        text = settled(text, (*self.tags, *self.stop))
        for stop in self.stop:
            text = text.partition(stop)[0]
        return self._show(text)

    def finish(self, text: str) -> str:
        """The rest of the completion's text."""
        return self._show(text)

    def _show(self, text: str) -> str:
        if not text.startswith(self.shown):  # bytes that turned out to be no character
            return ""
        piece, self.shown = text[len(self.shown) :], text
        return piece


def settled(text: str, marks: Sequence[str]) -> str:
    """The beginning of a growing text that will not change.

    Held back: U+FFFD at the end, which stands for the first bytes of a character, and the first
    characters of a mark.
    """
    text = text.rstrip("\ufffd")
    held = [n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])]
    return text[: len(text) - max(held, default=0)]

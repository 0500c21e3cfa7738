"""How published traces mark their thinking, read into a reasoning and an answer.

Three ways: `<think> ... </think>` of DeepSeek-R1 and Qwen3, whose opening tag may be missing where
the template wrote it; `<|begin_of_thought|> ... <|end_of_thought|>` with the answer between
`<|begin_of_solution|>` and `<|end_of_solution|>`, of Sky-T1 (SkyThought) and OpenThoughts; and
`<|im_start|>think ... <|im_start|>answer` of s1 (arXiv 2501.19393, its train/ folder).
"""

from jaxreason.text.chat import ThinkTags, split_reasoning

_SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")
STYLES = (
    ThinkTags("<|begin_of_thought|>", "<|end_of_thought|>"),
    ThinkTags("<|im_start|>think", "<|im_start|>answer"),
    ThinkTags("<think>", "</think>"),
)


class TraceFault(ValueError):
    """Why a text cannot be learnt from as a trace."""


def read_trace(text: str, needs_thinking: bool = True) -> tuple[str | None, str]:
    """(reasoning, answer) of an assistant's text.

    Args:
      needs_thinking: a text without any tag is a fault; otherwise it is an answer whose reasoning
        is None. Where the template opened the thinking, a trace that was cut off has no tag.

    Raises:
      TraceFault: the thinking or the answer has no end, the answer is empty, or the text has parts
        that belong to neither.
    """
    tags = next((t for t in STYLES if t.open in text or t.close in text), None)
    if tags is None:
        if needs_thinking:
            raise TraceFault("no end of thinking: the text has no tag of a reasoning")
        return None, text
    if tags.close not in text:
        raise TraceFault(f"no end of thinking: {tags.open} without {tags.close}")
    opened = text.find(tags.open)
    if opened > 0 and opened < text.rfind(tags.close) and text[:opened].strip():
        raise TraceFault(f"text before {tags.open}")
    reasoning, answer = split_reasoning(text, tags)
    answer = _solution(answer)
    if not answer.strip():
        raise TraceFault(f"no answer after {tags.close}")
    return reasoning, answer


def _solution(answer: str) -> str:
    """The answer without the tags around it, if it has any."""
    begin, end = _SOLUTION
    before, begun, rest = answer.partition(begin)
    if not begun:
        return answer
    solution, ended, after = rest.partition(end)
    if not ended:
        raise TraceFault(f"no end of the answer: {begin} without {end}")
    if before.strip() or after.strip():
        raise TraceFault(f"text {'before ' + begin if before.strip() else 'after ' + end}")
    return solution.strip("\n")

"""A reasoning trace cut into steps that, joined, give the trace back, character by character.

Efficient Long CoT (arXiv 2505.18440) prunes by steps and lets a 14B model find them; these are
rules, so that a step is the same wherever it is asked for. A rule says where a step may begin:
  line        after every line break (one operation a line, as the arithmetic traces have it)
  paragraph   after every blank line
  sentence    after every sentence, and at list items, headings and blank lines
  marker      where a sentence or a line begins with one of `MARKERS`
A step begins wherever one of the chosen rules says so, except inside mathematics and code. White
space belongs to the step before it, indentation to the line that it is in front of.
"""

import bisect
import dataclasses
import functools
import re
from collections.abc import Iterator

RULES = ("line", "paragraph", "sentence", "marker")

# What opens a new thought, and so ends one that can stand alone: the trace could have stopped right
# before it. Counted as the first words of paragraphs and sentences in the 388 long traces of AMC23
# (number of traces' sentences in front): So 3,600, But 1,700, Wait 1,650, Now 1,440, Let/Let's
# 2,200, Therefore 1,020, Alternatively 640, Maybe 550, Hmm 200, Actually 90. Left out although
# frequent: words that go on with the thought before (This, Since, Then, For, Similarly, And).
MARKERS = (
    # doubts
    "wait", "but", "hmm", "hold on", "actually", "oh", "no", "however",
    # takes another way
    "alternatively", "another", "instead", "maybe", "perhaps", "let me", "let's",
    # looks again
    "check", "to check", "to verify", "to confirm", "again", "looking back",
    # concludes or goes on
    "so", "therefore", "thus", "hence", "now", "next", "first", "finally", "okay", "alright",
)  # fmt: skip

_ABBREVIATIONS = frozenset(
    "e.g i.e cf vs viz al resp approx ca eq eqs fig figs sec sect thm lem prop cor def ex ch vol "
    "pp dr mr mrs ms prof st jr sr dept est".split()
)
_BREAK = re.compile(r"\n(?:[^\S\n]*\n)*")  # one or more line breaks; indentation after it is not in
_PUNCTUATION = re.compile(
    # Possessive (++), and only from the first mark on: a model can print dots without end.
    r"(?:(?<![.!?…])([.!?…]++)[\"'”’)\]*_]*+[^\S\n]++(?=[A-Z0-9\"'“‘(\[{$\\*_`#\u00c0-\U0010ffff])"
    r"|[。！？][”’」』）]*)"
)
_ENDED = re.compile(r"[.!?…。！？][\"'”’)\]*_」』）\s]*+$")
_RELATION = re.compile(r"[^\S\n]*(?:=|≈|≤|≥|⇒|\\(?:approx|leq?|geq?|Rightarrow|implies)\b)")
_ITEM = re.compile(r"[^\S\n]*(?:[-*+•#>] ?|#+ |\(?\w{1,3}[.)] |\*\*|\||```)")
_NUMBERING = re.compile(
    r"[\s*_#>(-]{0,12}(?:(?:step|case|part|claim|row|question) )?(?:\d{1,3}|[a-z]|[ivx]{1,4})",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^[^\S\n]*```([^`\n]*)(?:\n|\Z)", re.MULTILINE)
_ENVIRONMENTS = (
    "align|alignat|aligned|array|[bBpvV]?matrix|cases|equation|eqnarray|gather|gathered|multline"
    "|split|tabular"
)
_LOOK_BACK = 60  # characters in which a line's numbering or an abbreviation is looked for
_MATH = (
    # A formula within a line of text holds no blank line, and no second opening of its own kind.
    re.compile(r"(?<!\\)\\\((?:(?!(?<!\\)\\\(|\n[^\S\n]*\n).)*?\\\)", re.DOTALL),
    re.compile(r"(?<!\\)\\\[(?:(?!(?<!\\)\\\[).)*?\\\]", re.DOTALL),
    re.compile(r"\$\$(?:(?!\$\$|\n[^\S\n]*\n).)*\$\$", re.DOTALL),
    re.compile(
        rf"\\begin\{{((?:{_ENVIRONMENTS})\*?)\}}(?:(?!\\begin\{{\1\}}|\n[^\S\n]*\n).)*?\\end\{{\1\}}",
        re.DOTALL,
    ),
    # As Pandoc tells formulas from prices: no space inside the dollars, no digit after the second.
    re.compile(r"(?<![\\$])\$(?=[^\s$])[^$\n]*?(?<=[^\s\\])\$(?![\d$])"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Where steps begin, and how short and how long joining may leave them.

    Steps are joined, never cut, to meet the limits: a step of fewer than `min_chars` characters
    (white space around it not counted) takes the next one in, the last one goes to the one before;
    no joining makes a step longer than `max_chars`, though a single one may be longer by itself.

    Raises:
      ValueError: an unknown rule, a bad marker, or limits that exclude each other.
    """

    rules: tuple[str, ...] = ("paragraph", "marker")
    markers: tuple[str, ...] = MARKERS
    min_chars: int = 20
    max_chars: int | None = None

    def __post_init__(self):
        known = isinstance(self.rules, tuple) and set(self.rules) <= set(RULES)
        if not known or not self.rules or len(set(self.rules)) < len(self.rules):
            raise ValueError(
                f"segment.rules is {self.rules!r}; it must be a tuple of one or more of "
                f"{', '.join(RULES)}, each once"
            )
        is_marker = lambda m: isinstance(m, str) and re.fullmatch(r"\w[\w' -]*", m)
        if not isinstance(self.markers, tuple) or not all(map(is_marker, self.markers)):
            raise ValueError(
                f"segment.markers is {self.markers!r}; it must be a tuple of words such as 'wait' "
                "or 'hold on'"
            )
        if "marker" in self.rules and not self.markers:
            raise ValueError("segment.markers is (); the rule marker needs at least one")
        if self.min_chars < 0:
            raise ValueError(f"segment.min_chars is {self.min_chars}; it must be 0 or more")
        if self.max_chars is not None and self.max_chars < max(self.min_chars, 1):
            raise ValueError(
                f"segment.max_chars is {self.max_chars}; it must be at least 1 and min_chars "
                f"{self.min_chars}, or None"
            )


DEFAULT = Segmentation()
LINES = Segmentation(rules=("line",), min_chars=0)  # one operation a line


def segment(trace: str, config: Segmentation = DEFAULT) -> list[str]:
    """The steps of a trace: `"".join(steps) == trace`, always.

    No step is empty or white space alone, except where the whole trace is white space (one step).
    The empty trace has no steps. Never cut inside are: LaTeX `\\( \\)`, `\\[ \\]`, `$ $`, `$$ $$`
    and environments, code between ``` fences, and, by the sentence rule, numbers, abbreviations,
    numberings and factorials. A delimiter that is not closed protects nothing: one slip of the
    model would otherwise make all that follows one step.
    """
    cuts = set()
    for rule in config.rules:
        cuts.update(_CUTS[rule](trace, config))
    spans = _protected(trace)
    ends = [end for _, end in spans]
    last = len(trace.rstrip())  # from there on is white space, which is no step
    pieces, begin = [], 0
    for cut in sorted(cuts):
        at = bisect.bisect_right(ends, cut)  # the first span that ends after the cut
        inside = at < len(spans) and spans[at][0] < cut
        if not inside and cut < last and trace[begin:cut].strip():
            pieces.append(trace[begin:cut])
            begin = cut
    if begin < len(trace):
        pieces.append(trace[begin:])
    return _joined(pieces, config)


def _joined(pieces: list[str], config: Segmentation) -> list[str]:
    short = lambda piece: len(piece.strip()) < config.min_chars
    fits = lambda a, b: config.max_chars is None or len(a) + len(b) <= config.max_chars
    steps: list[str] = []
    for piece in pieces:
        if steps and short(steps[-1]) and fits(steps[-1], piece):
            steps[-1] += piece
        else:
            steps.append(piece)
    if len(steps) > 1 and short(steps[-1]) and fits(steps[-2], steps[-1]):
        last = steps.pop()
        steps[-1] += last
    return steps


# ------------------------------------------------------------------------------------- rules


def _lines(trace: str, config: Segmentation) -> Iterator[int]:
    return (match.end() for match in _BREAK.finditer(trace))


def _paragraphs(trace: str, config: Segmentation) -> Iterator[int]:
    """After blank lines; what ends in a colon goes on, and so does a chain of equations."""
    for match in _BREAK.finditer(trace):
        goes_on = trace.endswith(":", 0, match.start()) or _RELATION.match(trace, match.end())
        if match[0].count("\n") > 1 and not goes_on:
            yield match.end()


def _sentences(trace: str, config: Segmentation) -> Iterator[int]:
    yield from _paragraphs(trace, config)
    yield from _after_punctuation(trace)
    for match in _BREAK.finditer(trace):
        line = trace[max(match.start() - _LOOK_BACK, 0) : match.start()]
        item = _ITEM.match(trace, match.end()) and not line.endswith(":")
        if item or _ENDED.search(line):
            yield match.end()


def _markers(trace: str, config: Segmentation) -> Iterator[int]:
    pattern = _marker_pattern(config.markers)
    for begin in (*_after_punctuation(trace), *_lines(trace, config)):
        if pattern.match(trace, begin):
            yield begin


_CUTS = {"line": _lines, "paragraph": _paragraphs, "sentence": _sentences, "marker": _markers}


@functools.cache
def _marker_pattern(markers: tuple[str, ...]) -> re.Pattern:
    words = "|".join(
        re.escape(marker).replace(r"\ ", r"\s+").replace("'", "['’]") for marker in markers
    )
    return re.compile(rf"[^\S\n]*[\"'“‘*_(]*(?:{words})(?![\w-])", re.IGNORECASE)


def _after_punctuation(trace: str) -> Iterator[int]:
    """Where sentences begin within a line."""
    for match in _PUNCTUATION.finditer(trace):
        if match[1] is None or _ends(trace, match.start(), match[1], trace[match.end()]):
            yield match.end()


def _ends(trace: str, at: int, mark: str, following: str) -> bool:
    """Whether the punctuation `mark` at a place ends a sentence."""
    begin = max(at - _LOOK_BACK, 0)
    line = trace[max(trace.rfind("\n", begin, at) + 1, begin) : at]
    word = re.search(r"(?<![\w.])[\w.]*+$", line)
    word = word[0].lower() if word else ""
    if mark == "!":  # 5! = 120, n! ways
        return not re.search(r"(?:\d|\)|\b[a-z])$", line)
    if mark != ".":
        return True
    if _NUMBERING.fullmatch(line):  # 1. Find, **2. Solve, Step 3. Check
        return False
    if word == "no":  # No. 5
        return not following.isdigit()
    # U.S. and i.e. have a dot inside; "angle at A." ends, as it mostly does in mathematics.
    return word not in _ABBREVIATIONS and not re.fullmatch(r"(?:[a-z]\.)+[a-z]", word)


# ----------------------------------------------------------------------- mathematics and code


def _protected(trace: str) -> list[tuple[int, int]]:
    """[begin, end) of the places where nothing is cut, in order, without overlap."""
    found = [match.span() for pattern in _MATH for match in pattern.finditer(trace)]
    spans: list[tuple[int, int]] = []
    for begin, end in sorted([*found, *_fenced(trace)]):
        if spans and begin < spans[-1][1]:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((begin, end))
    return spans


def _fenced(trace: str) -> Iterator[tuple[int, int]]:
    """Blocks between ``` lines. One with a language opens a block even where one was not closed."""
    opened = None
    for fence in _FENCE.finditer(trace):
        if opened is None or fence[1].strip():
            opened = fence.start()
        else:
            yield opened, fence.end()
            opened = None

"""Numbers as people and models write them, read exactly: no float, nothing evaluated.

Read are integers, decimals, fractions (1/2, \\frac{1}{2}, \\frac12), mixed numbers (1 1/2,
1\\frac{1}{2}), thousands separators, powers of ten (1.5e3, 1.5 \\times 10^3), percents and
magnitude words (2 million), each with a sign, a currency and a unit that is words. `2\\pi`, `7!`,
`10^10` and `5x` are no plain numbers.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

_MAX_CHARACTERS = 1_000  # longer ones are compared as text: a sampler can print digits without end

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_ARGUMENT = rf"(?:\{{\s*{_DIGITS}\s*\}}|\s*[0-9])"  # of \frac: {12}, or one bare digit
_FRACTION = rf"\\[dtc]?frac{_ARGUMENT}{_ARGUMENT}"
_EXPONENT = r"(?:\^-?[0-9]{1,3}(?![0-9])|\^\{\s*-?[0-9]{1,3}\s*\}|⁻?[⁰¹²³⁴-⁹]{1,3})"
_TEN = rf"(?:[eE][+-]?[0-9]{{1,3}}(?![\w.])|\s*(?:\\times|\\cdot|[x×*·])\s*10{_EXPONENT})"
_MAGNITUDE = (
    rf"(?:[0-9]++ *{_FRACTION}|[0-9]++ +[0-9]+/{_DIGITS}|{_FRACTION}"
    rf"|(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:{_TEN}| ?/ ?{_DIGITS})?)"
)
# A minus right after an operand or a closing bracket is a subtraction: "84-7" ends in 7.
_IN_TEXT = re.compile(
    rf"(?:(?<![\w)\].}}])[-−])?\$?{_MAGNITUDE}(?: (?:thousand|[mbt]r?illion)\b| ?\\?%)?"
)
_NUMERAL = re.compile(rf"([+-]?) *[$€£]?({_MAGNITUDE})")
_FRACTION_PARTS = re.compile(rf"([0-9]*) *\\[dtc]?frac({_ARGUMENT})({_ARGUMENT})")
_MIXED_PARTS = re.compile(r"([0-9]+) +([0-9]+)/(.+)")

_SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_SPACES = re.compile(r"\\[!,;: ]|~|\s+")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])")
_WRAPPED = re.compile(r"\*\*(.*)\*\*|\\\((.*)\\\)|\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
_ASSIGNED = re.compile(r"(?:[A-Za-z]|\\?[A-Za-z]{2,}(?: [A-Za-z]+)*)(?:_\w|_\{\w+\})? *= *")

_UNIT = re.compile(
    r" *(?:((?<= )[A-Za-z][A-Za-z .'/-]*)"
    r"|(cm|mm|km|kg|mg|ml|mL|ft|in|lb|lbs|oz|mph|km/h|hrs?|min|sec|cents?|€|£|¢)"
    r"|(?:\^ *(?:\\circ|\{ *\\circ *\})|\\degree|°)[CF]?)(?:\^\{?[23]\}?|[²³])?"
)
_TEXT = re.compile(r"\\(?:text|textrm|textbf|mathrm|mbox) *\{([^{}]*)\}")
_LETTER_UNITS = frozenset("mgshlLa")  # a day; any other single letter is a variable
_NO_UNITS = frozenset(
    "pi sqrt sin cos tan log ln exp infinity inf factorial squared cubed and or to plus minus over "
    "choose mod divided multiplied half third quarter dozen hundred".split()
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


class Number(NamedTuple):
    """An exact value as written; `percent`: a percent sign or word followed (50 % has value 50)."""

    value: Fraction
    percent: bool


def read(text: str) -> Number | None:
    """The number that a whole text is, None where it is something else or is divided by zero."""
    if len(text) > _MAX_CHARACTERS:
        return None
    text = _ASSIGNED.sub("", plain(text), count=1)
    match = _NUMERAL.match(text)
    if match is None:
        return None
    sign, magnitude = match.groups()
    value = _value(magnitude)
    scale = _scale(text[match.end() :])
    if value is None or scale is None:
        return None
    factor, percent = scale
    return Number((-value if sign == "-" else value) * factor, percent)


def plain(text: str) -> str:
    """The text without the marks of typesetting: dollar signs, LaTeX spaces, bold, a full stop."""
    text = text.replace("−", "-").replace("{,}", ",").replace("\\$", "$")
    text = _SPACES.sub(lambda space: "" if space[0] == "\\!" else " ", text).strip()
    text = text.removeprefix("$").removesuffix("$").strip().removesuffix(".").strip()
    if wrapped := _WRAPPED.fullmatch(text):
        text = next(inner for inner in wrapped.groups() if inner is not None).strip()
    return _THOUSANDS.sub(lambda digits: digits[0].replace(" ", ""), text)


def find(text: str) -> Iterator[str]:
    """The numbers in running text; exponents, indices and bases of powers are none."""
    for match in _IN_TEXT.finditer(text):
        before = text[max(match.start() - 2, 0) : match.start()]
        if not (before.endswith(("^", "_", "^{", "_{")) or text.startswith("^", match.end())):
            yield match[0]


def _value(magnitude: str) -> Fraction | None:
    """A match of _MAGNITUDE as a number; None where a denominator is 0."""
    magnitude = magnitude.replace(",", "")
    whole, over, exponent = "0", "1", "0"
    if parts := _FRACTION_PARTS.fullmatch(magnitude):
        whole, top, over = (part.strip(" {}") for part in parts.groups())
    elif parts := _MIXED_PARTS.fullmatch(magnitude):
        whole, top, over = parts.groups()
    elif "/" in magnitude:
        top, over = magnitude.split("/")
    else:
        top, exponent = _powers_of_ten(magnitude)
    if int(over) == 0:
        return None
    return int(whole or 0) + Fraction(top.strip()) / int(over) * Fraction(10) ** int(exponent)


def _powers_of_ten(magnitude: str) -> tuple[str, str]:
    """ "1.5e3" or "1.5 \\times 10^{3}" -> ("1.5", "3"); without a power the exponent is "0"."""
    parts = re.split(r"[eE]|\s*(?:\\times|\\cdot|[x×*·])\s*10\^?", magnitude)
    return parts[0], parts[1].strip("{} ").translate(_SUPERSCRIPTS) if len(parts) > 1 else "0"


def _scale(rest: str) -> tuple[int, bool] | None:
    """What follows a number: (factor, percent), None where it is no unit and so changes it."""
    rest, num_wrapped = _TEXT.subn(r" \1", rest)
    rest, factor = re.sub(" +", " ", rest).rstrip(), 1
    for word, value in _SCALES.items():
        if re.match(rf" {word}\b", rest):
            rest, factor = rest[len(word) + 1 :], value
    if re.fullmatch(r" ?(?:\\?%|percent)", rest):
        return factor, True
    if not rest:
        return factor, False
    unit = _UNIT.fullmatch(rest)
    if unit is None:
        return None
    words = re.findall("[A-Za-z]+", unit[1] or "")
    variables = [word for word in words if len(word) == 1 and word not in _LETTER_UNITS]
    if any(word.lower() in _NO_UNITS for word in words) or (variables and not num_wrapped):
        return None
    return factor, False

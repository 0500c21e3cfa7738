"""A weighted sum of rewards, by name, with the breakdown that logs and plots show."""

import dataclasses
import importlib
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxreason import types
from jaxreason.rewards.choice import Choice
from jaxreason.rewards.countdown import Countdown
from jaxreason.rewards.format import Format
from jaxreason.rewards.latex import MathVerify
from jaxreason.rewards.math import Exact, Split
from jaxreason.rewards.shaping import Length, Repetition
from jaxreason.text import chat

# Completions and their gold answers -> (values, {detail: values}), all in the same order.
RewardFn = Callable[
    [Sequence[types.Completion], Sequence[str]], tuple[list[float], dict[str, list[float]]]
]

# Each is a RewardFn; its fields, `split` and `tags` apart, are the options of a configuration.
# One that reads the gold answer has `complaints(answers)`: for each, what is wrong, or None.
KINDS: dict[str, type] = {
    "math": Exact,
    "arithmetic": Exact,
    "math_verify": MathVerify,
    "countdown": Countdown,
    "choice": Choice,
    "format": Format,
    "length": Length,
    "repetition": Repetition,
}
_GIVEN = ("split", "tags")
_WANTED = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """One term of the sum: a kind of KINDS or the user's own `module:function` (a RewardFn)."""

    kind: str
    weight: float = 1.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Reward:
    """sum over terms of weight * value: a RewardFn, and a context manager that ends its workers.

    The weights are used as they are, never normalised: GSM8K's 0.1 format + 1.0 exact is in
    [0, 1.1].
    """

    terms: Mapping[str, RewardFn]
    weights: Mapping[str, float]

    def __call__(
        self, completions: Sequence[types.Completion], answers: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Rewards and breakdown: each term's unweighted values under its name, details `name/x`.

        Raises ValueError where a user's function does not return a pair (values, details) with
        one finite number a completion.
        """
        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions have {len(answers)} answers")
        totals = [0.0] * len(completions)
        breakdown: dict[str, list[float]] = {}
        for name, term in self.terms.items():
            values, details = _read_pair(name, term(completions, answers), len(completions))
            breakdown[name] = values
            breakdown |= {f"{name}/{detail}": each for detail, each in details.items()}
            weight = self.weights[name]
            totals = [total + weight * value for total, value in zip(totals, values, strict=True)]
        return totals, breakdown

    def check(self, prompts: Iterable[types.Prompt]) -> None:
        """Raises ValueError naming the first prompt whose gold answer a term cannot read."""
        prompts = list(prompts)
        for name, term in self.terms.items():
            if not hasattr(term, "complaints"):
                continue
            complaints = term.complaints([prompt.answer for prompt in prompts])
            for prompt, complaint in zip(prompts, complaints, strict=True):
                if complaint is not None:
                    raise ValueError(f"{prompt.id}: rewards.{name}: gold answer {complaint}")

    def close(self) -> None:
        """Ends the worker processes, where a term has any."""
        for term in self.terms.values():
            if isinstance(term, MathVerify):
                term.close()

    def __enter__(self) -> "Reward":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def build(
    configs: Mapping[str, RewardConfig], split: Split, tags: chat.ThinkTags = chat.DEFAULT_TAGS
) -> Reward:
    """The reward of these terms; `split` and `tags` tell the reasoning from the answer.

    Raises ValueError naming the term for an unknown kind, an unknown, missing or impossible option
    or one of another type, a weight that is no number, and a user's function that is not there.
    """
    if not configs:
        raise ValueError("rewards is empty; it needs at least one term")
    terms = {}
    for name, config in configs.items():
        if not _is_finite(config.weight):
            raise ValueError(f"rewards.{name}.weight is {config.weight!r}; it must be finite")
        _check_option_types(f"rewards.{name}.options", config)
        try:
            terms[name] = _term(config, {"split": split, "tags": tags})
        except ValueError as error:
            raise ValueError(f"rewards.{name}: {error}") from error
    return Reward(terms, {name: config.weight for name, config in configs.items()})


def _check_option_types(where: str, config: RewardConfig) -> None:
    """Of a kind of KINDS; an option that it does not have is left to `_term`."""
    if config.kind not in KINDS:
        return
    types_of = {field.name: field.type for field in dataclasses.fields(KINDS[config.kind])}
    for key, value in config.options.items():
        wanted = types_of.get(key)
        if key in _GIVEN or wanted is None:
            continue
        fits = _is_finite(value) if wanted is float else isinstance(value, wanted)
        if not fits or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"{where}.{key} is {value!r}; it must be {_WANTED[wanted]}")


def _term(config: RewardConfig, given: Mapping[str, Any]) -> RewardFn:
    if ":" in config.kind:
        return _user_function(config)
    if config.kind not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(f"kind is {config.kind!r}; it must be module:function or one of {known}")
    fields = {field.name: field for field in dataclasses.fields(KINDS[config.kind]) if field.init}
    options = {name: field for name, field in fields.items() if name not in _GIVEN}
    for name in config.options:
        if name not in options:
            known = ", ".join(options) or "none"
            raise ValueError(f"{config.kind} has no option {name!r}; it has {known}")
    for name, field in options.items():
        required = field.default is dataclasses.MISSING
        if required and name not in config.options:
            raise ValueError(f"{config.kind} needs the option {name!r}")
    arguments = {name: value for name, value in given.items() if name in fields}
    return KINDS[config.kind](**arguments, **config.options)


def _user_function(config: RewardConfig) -> RewardFn:
    """`package.module:function`, imported from where the run was started or is installed."""
    module_name, _, name = config.kind.partition(":")
    if config.options:
        raise ValueError(f"{config.kind} takes no options; bind them in the function itself")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"kind is {config.kind!r}, but {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"kind is {config.kind!r}, but {module_name} has no function {name!r}")
    return function


def _read_pair(name: str, returned: Any, count: int) -> tuple[list[float], dict[str, list[float]]]:
    """The values and details that a term returned, as floats. Raises ValueError naming the term."""
    pair = isinstance(returned, (tuple, list)) and len(returned) == 2
    if not pair or not isinstance(returned[1], Mapping):
        raise ValueError(
            f"rewards.{name} returned {_shown(returned)}; it must be a pair (values, details): a "
            "number for each completion, and a dict of more such lists to log or {}"
        )
    values, details = returned
    one_each = lambda what, found: _one_each(f"rewards.{name} returned {what}", found, count)
    return one_each("values", values), {
        detail: one_each(f"details[{detail!r}]", each) for detail, each in details.items()
    }


def _one_each(what: str, found: Any, count: int) -> list[float]:
    """A list, or an array, of a number for each completion. Raises ValueError naming `what`."""
    right = f"it must hold one finite number for each of {count} completions"
    try:
        numbers = list(found)
    except TypeError as error:
        raise ValueError(f"{what} = {_shown(found)}; {right}") from error
    if len(numbers) != count:
        raise ValueError(f"{what} of length {len(numbers)}; {right}")
    for i, number in enumerate(numbers):
        if not _is_finite(number):
            raise ValueError(f"{what}[{i}] = {_shown(number)}; {right}")
    return [float(number) for number in numbers]


def _is_finite(value: Any) -> bool:
    """Whether it is one number, of any library, and finite."""
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _shown(value: Any) -> str:
    """The beginning of its repr, on one line."""
    return " ".join(reprlib.repr(value).split())

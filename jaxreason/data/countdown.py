"""Countdown: make a target from some numbers, each used exactly once, with + - * / and parentheses.

The task of TinyZero (github.com/Jiayi-Pan/TinyZero) and, as a search written out, of Stream of
Search (arXiv 2404.03683). Problems come from files with the fields `nums` and `target`, or are
generated; the solver is exact; a search trace, a few attempts with their running results of which
the last one is right, warms a model up for reinforcement learning:

    44 19 35->98:<think>44-19=25 35-25=10 no
    44+35=79 79+19=98 yes</think>44+35+19
"""

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from jaxreason.data.expressions import Expression, show

RENDERINGS = ("answer", "search_cot")
PROMPT = (
    "Make {target} out of the numbers {numbers}: use each of them exactly once, with + - * / and "
    "parentheses. Think first; then answer with nothing but the expression, as in (8-2)*7."
)
_REDRAWS = 3  # draws for each wrong attempt of a trace: some repeat another or are right
_TRIES = 1_000  # draws of a problem before the config is declared impossible


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountdownConfig:
    """Which problems there are, and what a search trace shows.

    The first `num_test` different problems are split "test"; "train" holds none of them, whatever
    the order of its numbers.

    Raises:
      ValueError: a field is out of its range.
    """

    num_numbers: int = 3  # of each problem; a file's others are left out
    num_test: int = 400
    num_train: int = 100_000  # generated problems; a file has as many as are left
    max_number: int = 99  # generated problems: numbers are 1 to max_number,
    min_target: int = 10  # and targets min_target to max_target
    max_target: int = 100
    cap: int = 200  # largest result in a trace, and on the way to a generated target
    max_attempts: int = 5  # in a trace: 1 to max_attempts, equally often
    seed: int = 0

    def __post_init__(self):
        least = {"num_numbers": 2, "max_attempts": 1, "seed": 0, "num_test": 0}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < least.get(field.name, 1):
                raise ValueError(
                    f"countdown.{field.name} is {value}; it must be {least.get(field.name, 1)} or "
                    "more"
                )
        if self.num_numbers > 6:
            raise ValueError(
                f"countdown.num_numbers is {self.num_numbers}; it must be 2 to 6, as the search "
                "for a solution grows about two hundredfold with each"
            )
        if self.min_target > self.max_target:
            raise ValueError(
                f"countdown.min_target is {self.min_target} and max_target is {self.max_target}; "
                "they must be min_target <= max_target"
            )
        if self.cap < max(self.max_number, self.max_target):
            raise ValueError(
                f"countdown.cap is {self.cap}; it must be at least max_number {self.max_number} "
                f"and max_target {self.max_target}"
            )


def parse_config(fields: Mapping[str, Any], key: str) -> CountdownConfig:
    """Raises ValueError naming a field that is unknown or out of its range."""
    known = [field.name for field in dataclasses.fields(CountdownConfig)]
    for name in fields:
        if name not in known:
            raise ValueError(f"{key}.{name} is unknown; known: {', '.join(known)}")
    return CountdownConfig(**fields)


# ---------------------------------------------------------------------------------- solver


def solve(
    numbers: Sequence[int], target: int, rng: random.Random | None = None, cap: int | None = None
) -> Expression | None:
    """An expression of value `target` that uses every number exactly once; None: there is none.

    Exact and complete: a node of the result whose value is no integer holds a Fraction.

    Args:
      rng: draws one of the solutions; None: always the same one.
      cap: only solutions all of whose intermediate results are integers from 0 to cap.
    """
    return _search([Expression(number) for number in numbers], target, rng, cap)


def _search(
    items: list[Expression], target: int, rng: random.Random | None, cap: int | None
) -> Expression | None:
    if len(items) == 1:
        return items[0] if items[0].value == target else None
    moves = list(_moves(items, cap))
    if rng is not None:
        rng.shuffle(moves)
    for move in moves:
        found = _search(_apply(items, move), target, rng, cap)
        if found is not None:
            return found
    return None


class _Move(NamedTuple):
    """Two of the items joined."""

    i: int
    j: int
    joined: Expression


def _apply(items: list[Expression], move: _Move) -> list[Expression]:
    return [move.joined, *(item for k, item in enumerate(items) if k not in (move.i, move.j))]


def _moves(items: Sequence[Expression], cap: int | None) -> Iterator[_Move]:
    """All ways to join two items, within the cap."""
    for i, j in itertools.combinations(range(len(items)), 2):
        for op, left, right in _operations(items[i], items[j]):
            value = _value(op, left.value, right.value)
            if value is None:
                continue
            if cap is None or (isinstance(value, int) and 0 <= value <= cap):
                yield _Move(i, j, Expression(value, op, left, right))


def _operations(a: Expression, b: Expression) -> Iterator[tuple[str, Expression, Expression]]:
    yield from (("+", a, b), ("*", a, b), ("-", a, b), ("/", a, b))
    if a.value != b.value:
        yield from (("-", b, a), ("/", b, a))


def _value(op: str, a: int | Fraction, b: int | Fraction) -> int | Fraction | None:
    """`a op b` exactly, an int where it is one; None for a division by zero."""
    if op == "+":
        value = a + b
    elif op == "-":
        value = a - b
    elif op == "*":
        value = a * b
    elif b == 0:
        return None
    else:
        value = a // b if a % b == 0 else Fraction(a, b)
    return value.numerator if value.denominator == 1 else value


# ----------------------------------------------------------------------------------- traces


def search_trace(
    numbers: Sequence[int], target: int, rng: random.Random, config: CountdownConfig
) -> tuple[str, str]:
    """(reasoning, answer): attempts that end in another number, then one that is right.

    An attempt is a line of steps, each with its result, and `no` or `yes`. What a wrong attempt
    joins is drawn from all that stays within the cap, and so is the solution where there is one
    within it. Attempts differ; where the problem has few wrong ones, there are fewer.

    Raises:
      ValueError: the problem has no solution.
    """
    solution = solve(numbers, target, rng, config.cap) or solve(numbers, target, rng)
    if solution is None:
        raise ValueError(f"countdown: {target} cannot be made from {list(numbers)}")
    num_wrong = rng.randrange(config.max_attempts)
    wrong: dict[str, None] = {}  # in order
    for _ in range(_REDRAWS * num_wrong):
        if len(wrong) == num_wrong:
            break
        attempt = _attempt(numbers, rng, config.cap)
        if attempt is not None and attempt.value != target:
            wrong[f"{_steps(attempt)} no"] = None
    return "\n".join([*wrong, f"{_steps(solution)} yes"]), show(solution)


def _attempt(numbers: Sequence[int], rng: random.Random, cap: int) -> Expression | None:
    """A random expression of all numbers; None where the draws led out of the cap."""
    items = [Expression(number) for number in numbers]
    while len(items) > 1:
        moves = list(_moves(items, cap))
        if not moves:
            return None
        items = _apply(items, rng.choice(moves))
    return items[0]


def _steps(tree: Expression) -> str:
    """`a+b=c` for every operation, innermost and leftmost first."""
    return " ".join(_walk(tree))


def _walk(tree: Expression) -> Iterator[str]:
    if tree.op:
        yield from _walk(tree.left)
        yield from _walk(tree.right)
        left, right = _operand(tree.left.value), _operand(tree.right.value)
        yield f"{left}{tree.op}{right}={tree.value}"


def _operand(value: int | Fraction) -> str:
    return str(value) if isinstance(value, int) and value >= 0 else f"({value})"


# -------------------------------------------------------------------------------- problems


class Problem(NamedTuple):
    numbers: tuple[int, ...]
    target: int

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """The same for problems that differ in the order of their numbers alone."""
        return tuple(sorted(self.numbers)), self.target

    @property
    def record(self) -> dict[str, Any]:
        """The fields of prompt templates: `numbers`, e.g. `44 19 35`, and `target`."""
        return {"numbers": " ".join(map(str, self.numbers)), "target": self.target}


def problem_of(record: Mapping[str, Any]) -> Problem:
    return Problem(tuple(map(int, record["numbers"].split())), record["target"])


def gold(record: Mapping[str, Any]) -> str:
    """What the reward reads: JSON, `{"target": 98, "numbers": [44, 19, 35]}`."""
    problem = problem_of(record)
    return json.dumps({"target": problem.target, "numbers": problem.numbers})


def completion(
    record: Mapping[str, Any], rendering: str, config: CountdownConfig
) -> tuple[str, str | None]:
    """(answer, reasoning) that a record trains; the same in every epoch.

    Raises:
      ValueError: the problem has no solution.
    """
    numbers, target = problem_of(record)
    rng = random.Random(f"{config.seed} trace {numbers} {target}")
    reasoning, answer = search_trace(numbers, target, rng, config)
    return answer, reasoning if rendering == "search_cot" else None


class CountdownSource:
    """Random access to the problems of one split, as dicts of `numbers` and `target`."""

    def __init__(self, size: int, problem: Callable[[int], Problem]):
        self._size = size
        self._problem = problem

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._problem(range(self._size)[index]).record


def generated(config: CountdownConfig, split: str) -> CountdownSource:
    """Problems with a solution within the cap, each from its own generator: nothing is stored.

    Raises:
      ValueError: there are not `num_test` different problems.
    """
    test: dict[tuple, Problem] = {}
    for index in range(config.num_test):
        problem = _generate(config, "test", index, test)
        test[problem.key] = problem
    if split == "test":
        return CountdownSource(len(test), list(test.values()).__getitem__)
    return CountdownSource(config.num_train, lambda index: _generate(config, "train", index, test))


def _generate(config: CountdownConfig, split: str, index: int, taken: Mapping) -> Problem:
    """Problem `index` of a split, not one of `taken`: numbers, and what an attempt made."""
    rng = random.Random(f"{config.seed} {split} {index}")
    for _ in range(_TRIES):
        numbers = tuple(rng.randint(1, config.max_number) for _ in range(config.num_numbers))
        made = _attempt(numbers, rng, config.cap)
        if made is None or not config.min_target <= made.value <= config.max_target:
            continue
        problem = Problem(numbers, made.value)
        if problem.key not in taken:
            return problem
    raise ValueError(
        f"countdown.num_test is {config.num_test}; there are not that many different problems of "
        f"{config.num_numbers} numbers to {config.max_number} with targets {config.min_target} to "
        f"{config.max_target} (lower num_test or widen these)"
    )


def from_records(
    records: Sequence[Mapping[str, Any]],
    config: CountdownConfig,
    split: str,
    place: Callable[[int], str],
) -> CountdownSource:
    """The problems of `num_numbers` numbers among records with `nums` and `target`.

    Args:
      place: where record i stands, for messages.

    Raises:
      ValueError: a record is no problem, or there are too few.
    """
    test: dict[tuple, Problem] = {}
    train = []
    for index in range(len(records)):
        problem = _read(records[index], place(index))
        if len(problem.numbers) != config.num_numbers:
            continue
        if len(test) < config.num_test and problem.key not in test:
            test[problem.key] = problem
        else:
            train.append(problem)
    train = [problem for problem in train if problem.key not in test]
    chosen = list(test.values()) if split == "test" else train
    if not chosen or len(test) < config.num_test:
        raise ValueError(
            f"countdown.num_test is {config.num_test} and countdown.num_numbers "
            f"{config.num_numbers}; the files hold {len(test)} and {len(train)} problems for test "
            f"and train"
        )
    return CountdownSource(len(chosen), chosen.__getitem__)


def _read(record: Mapping[str, Any], place: str) -> Problem:
    numbers, target = record.get("nums"), record["target"]
    whole = isinstance(numbers, list) and all(type(n) is int and n > 0 for n in (*numbers, target))
    if not whole:
        raise ValueError(
            f"{place} has nums {numbers!r} and target {target!r}; they must be a list of whole "
            "numbers above 0 and one such number"
        )
    return Problem(tuple(numbers), target)

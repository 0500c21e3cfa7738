"""The arithmetic benchmark: random expressions whose every intermediate result is an integer.

After section 1.3 of the long-CoT study of small models (Luo et al., EMNLP 2025): an item is one
expression of a fixed number of operations over operands 1 to `max_operand`. The number of
operations is fixed before anything is rejected (drawing it inside the rejection loop leaves almost
no long items), and divisions are built, not waited for (plain rejection makes 2 % of the operators
divisions): see `_build`. An item has four renderings: `text` for pretraining, and the answer alone,
a short chain (one step a line) or a long chain (re-checks, mistakes made and corrected).
"""

import bisect
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import operator
import os
import pathlib
import random
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxreason.data.expressions import Expression, show

RENDERINGS = ("text", "answer", "short_cot", "long_cot")
_NODE_TRIES = 4  # redraws of a node's subtrees before its parent redraws
_BUDGET = 20  # draws an operand or operation of an attempt; a typical item needs 2
_ITEM_TRIES = 1_000  # attempts at an item before the config is declared impossible
_WRONG_BY = (-10, -2, -1, 1, 2, 10)  # the slips of `long_cot`: a unit or two, a lost carry
_VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticConfig:
    """What to generate; a prepared directory is a function of this and nothing else.

    Raises:
      ValueError: a field is out of its range.
    """

    min_operations: int
    max_operations: int
    num_train: int
    num_test: int
    max_operand: int = 100
    cap: int = 1_000_000  # every intermediate result v has |v| <= cap
    operators: str = "+-*/"
    seed: int = 0
    train_seed: int | None = None  # of the train split; None: `seed`. The test split stays the same
    recheck_share: float = 0.3  # of the steps of `long_cot`: followed by the inverse operation
    mistake_share: float = 0.1  # of the steps of `long_cot`: first wrong, then corrected
    review_share: float = 0.0  # of the chains of `long_cot`: all steps come again before the answer
    max_reviews: int = 1  # ... 1 to so many times, each as likely

    def __post_init__(self):
        if not 1 <= self.min_operations <= self.max_operations:
            raise ValueError(
                f"arithmetic.min_operations is {self.min_operations} and max_operations is "
                f"{self.max_operations}; they must be 1 <= min_operations <= max_operations"
            )
        if self.max_operand < 2:
            raise ValueError(f"arithmetic.max_operand is {self.max_operand}; it must be at least 2")
        if self.cap < self.max_operand:
            raise ValueError(
                f"arithmetic.cap is {self.cap}; it must be at least max_operand {self.max_operand}"
            )
        known = set(self.operators) <= set("+-*/")
        if not self.operators or not known or len(set(self.operators)) < len(self.operators):
            raise ValueError(
                f"arithmetic.operators is {self.operators!r}; it must be one or more of '+-*/', "
                "each once"
            )
        for name in ("num_train", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"arithmetic.{name} is {getattr(self, name)}; it must be 1 or more"
                )
        if self.max_reviews < 1:
            raise ValueError(f"arithmetic.max_reviews is {self.max_reviews}; it must be 1 or more")
        for name in ("recheck_share", "mistake_share", "review_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"arithmetic.{name} is {getattr(self, name)}; it must be in [0, 1]"
                )


# ------------------------------------------------------------------------------- generation


class _Goal(NamedTuple):
    """The values a subtree may take: lo <= value <= hi and value = residue (mod modulus)."""

    lo: int
    hi: int
    residue: int = 0
    modulus: int = 1


@dataclasses.dataclass
class _Draw:
    """One attempt at an item: its randomness, its config, and how many subtrees it may still draw.

    The budget makes an attempt that cannot succeed end: redraws at every level would multiply.
    """

    rng: random.Random
    config: ArithmeticConfig
    budget: int


def generate(rng: random.Random, num_operations: int, config: ArithmeticConfig) -> Expression:
    """One expression of exactly `num_operations` operations.

    Raises:
      ValueError: no such expression was found within the cap.
    """
    goal = _Goal(-config.cap, config.cap)
    for _ in range(_ITEM_TRIES):
        draw = _Draw(rng, config, budget=_BUDGET * (2 * num_operations + 1))
        tree = _build(draw, num_operations, goal)
        if tree is not None:
            return tree
    raise ValueError(
        f"arithmetic: no expression of {num_operations} operations {config.operators!r} over "
        f"operands to {config.max_operand} was found with cap {config.cap}; raise cap or lower "
        "max_operations"
    )


def _build(draw: _Draw, num_operations: int, goal: _Goal) -> Expression | None:
    """A tree whose value meets the goal, or None when the draws led nowhere.

    The operator and the split are drawn first and kept over the redraws, so that no operator is
    thinned out by being hard to satisfy. One child is drawn; what the other must then be, a window
    and a residue class, is that one's goal. An exact division asks its dividend for a residue class
    modulo the divisor, which a leaf can meet as long as the modulus is at most `max_operand`.
    """
    if num_operations == 0:
        return _leaf(draw, goal)
    op = draw.rng.choice(draw.config.operators)
    num_left = draw.rng.randrange(num_operations)
    num_right = num_operations - 1 - num_left
    for _ in range(_NODE_TRIES):
        draw.budget -= 1
        if draw.budget < 0:
            return None
        if op == "/":
            pair = _quotient(draw, num_left, num_right, goal)
        else:
            pair = _left_then_right(op, draw, num_left, num_right, goal)
        if pair is not None:
            left, right = pair
            return Expression(_APPLY[op](left.value, right.value), op, left, right)
    return None


def _leaf(draw: _Draw, goal: _Goal) -> Expression | None:
    lowest = max(goal.lo, 1)
    first = lowest + (goal.residue - lowest) % goal.modulus
    count = (min(goal.hi, draw.config.max_operand) - first) // goal.modulus + 1
    return Expression(first + goal.modulus * draw.rng.randrange(count)) if count > 0 else None


def _left_then_right(
    op: str, draw: _Draw, num_left: int, num_right: int, goal: _Goal
) -> tuple[Expression, Expression] | None:
    """Both children of a sum, a difference or a product; None when no right child fits."""
    left = _build(draw, num_left, _left_window(op, num_right, goal, draw.config))
    if left is None:
        return None
    rest = _right_goal(op, left.value, goal, draw.config.cap)
    right = rest and _build(draw, num_right, rest)
    return right and (left, right)


def _left_window(op: str, num_right: int, goal: _Goal, config: ArithmeticConfig) -> _Goal:
    """Left values from which the right child can probably still reach the goal."""
    far = config.max_operand
    if op == "*":  # share the room between the factors, or products would eat the cap
        room = max(abs(goal.lo), abs(goal.hi))
        bound = max(1, math.isqrt(room) if num_right else room // far)
        return _Goal(-bound, bound)
    near = far if num_right else -1  # a right leaf is 1 to far, a right subtree has either sign
    below, above = (far, near) if op == "+" else (near, far)
    return _Goal(max(goal.lo - below, -config.cap), min(goal.hi + above, config.cap))


def _right_goal(op: str, x: int, goal: _Goal, cap: int) -> _Goal | None:
    """What y must be for `x op y` to meet the goal; None when no y does."""
    lo, hi, residue, modulus = goal
    if op == "+":
        lo, hi, residue = lo - x, hi - x, residue - x
    elif op == "-":
        lo, hi, residue = x - hi, x - lo, x - residue
    elif x == 0:
        if not lo <= 0 <= hi or residue % modulus:
            return None
        lo, hi, residue, modulus = -cap, cap, 0, 1
    else:
        lo, hi = (-(-lo // x), hi // x) if x > 0 else (-(-hi // x), lo // x)
        common = math.gcd(x, modulus)
        if residue % common:
            return None
        modulus //= common
        residue = residue // common * pow(x // common, -1, modulus)
    return _Goal(max(lo, -cap), min(hi, cap), residue, modulus)


def _quotient(
    draw: _Draw, num_left: int, num_right: int, goal: _Goal
) -> tuple[Expression, Expression] | None:
    """Dividend and divisor of an exact division whose quotient meets the goal, or None."""
    largest = draw.config.max_operand // goal.modulus
    if largest < 2:
        return None  # only 1 would be left as the divisor
    if num_right:
        right = _build(draw, num_right, _Goal(-largest, largest))
    else:
        right = Expression(_draw_divisor(draw.rng, largest))
    if right is None or right.value == 0:
        return None
    ends = goal.lo * right.value, goal.hi * right.value
    lo, hi = max(min(ends), -draw.config.cap), min(max(ends), draw.config.cap)
    modulus = goal.modulus * abs(right.value)
    left = _build(draw, num_left, _Goal(lo, hi, goal.residue * right.value, modulus))
    return left and (left, right)


def _draw_divisor(rng: random.Random, largest: int) -> int:
    """A divisor of 2 or more, as often as an exact pair of uniform draws has it."""
    weights = _divisor_weights(largest)
    return 2 + bisect.bisect(weights, rng.randrange(weights[-1]))


@functools.cache
def _divisor_weights(largest: int) -> list[int]:
    return list(itertools.accumulate(largest // divisor for divisor in range(2, largest + 1)))


_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


# ------------------------------------------------------------------------------- renderings


def short_cot(tree: Expression) -> str:
    """One step a line in evaluation order, e.g. `3+4=7`; the last line ends in `=ANSWER`."""
    return "\n".join(_step(*step) for step in _steps(tree))


def long_cot(tree: Expression, rng: random.Random, config: ArithmeticConfig) -> str:
    """The steps, some first wrong (then `wait` and the right step), some re-checked by the inverse.

    One line each, e.g. `3*4=13`, `wait 3*4=12`, `check 12/4=3`. In a review every step comes once
    more, as `again 3*4=12`: nothing after the last step is needed for the answer. Where that is not
    the last line, `=ANSWER` follows, so that the last line always ends in it.
    """
    lines, steps = [], list(_steps(tree))
    for op, a, b, c in steps:
        wrong = rng.random() < config.mistake_share
        if wrong:
            lines.append(_step(op, a, b, c + rng.choice(_WRONG_BY)))
        lines.append("wait " * wrong + _step(op, a, b, c))
        checked = rng.random() < config.recheck_share
        if checked:
            lines.append("check " + _inverse(op, a, b, c))
    reviewed = config.review_share > 0 and rng.random() < config.review_share
    if reviewed:
        again = ["again " + _step(*step) for step in steps]
        lines += again * rng.randint(1, config.max_reviews)
    if checked or reviewed:
        lines.append(f"={tree.value}")
    return "\n".join(lines)


def _steps(tree: Expression) -> Iterator[tuple[str, int, int, int]]:
    """(op, a, b, a op b) of every operation, innermost and leftmost first."""
    if tree.op:
        yield from _steps(tree.left)
        yield from _steps(tree.right)
        yield tree.op, tree.left.value, tree.right.value, tree.value


def _step(op: str, a: int, b: int, c: int) -> str:
    return f"{a}{op}{b}={c}" if b >= 0 else f"{a}{op}({b})={c}"


def _inverse(op: str, a: int, b: int, c: int) -> str:
    """The equation that undoes `a op b = c`; 0 * 0 has none and is written the other way round."""
    if op == "+":
        return _step("-", c, b, a)
    if op == "-":
        return _step("+", c, b, a)
    if op == "/":
        return _step("*", c, b, a)
    if b:
        return _step("/", c, b, a)
    return _step("/", c, a, b) if a else _step("*", b, a, c)


# ------------------------------------------------------------------------- prepared directories


def records(config: ArithmeticConfig) -> dict[str, list[dict[str, Any]] | Iterator[dict[str, Any]]]:
    """The records of both splits, in their order: {"test": a list, "train": an iterator}.

    The numbers of operations go round, one place further each round: every prefix of a split, and
    every n-th record of it, has equal counts. Item i of a split has its own generator, seeded by
    (its seed, split, i). No test expression appears twice or in train; train may repeat its own.

    Raises:
      ValueError: there are not `num_test` different expressions.
    """
    taken: set[str] = set()
    test = []
    for index in range(config.num_test):
        test.append(_record(config, "test", index, taken))
        taken.add(test[-1]["expression"])
    train = (_record(config, "train", index, taken) for index in range(config.num_train))
    return {"test": test, "train": train}


def _record(config: ArithmeticConfig, split: str, index: int, taken: set[str]) -> dict[str, Any]:
    """Record `index` of a split, its expression not among `taken`."""
    own = config.train_seed if split == "train" else None
    rng = random.Random(f"{config.seed if own is None else own} {split} {index}")
    span = config.max_operations - config.min_operations + 1
    num_operations = config.min_operations + (index + index // span) % span
    for _ in range(_ITEM_TRIES):
        tree = generate(rng, num_operations, config)
        expression = show(tree)
        if expression not in taken:
            break
    else:
        raise ValueError(
            f"arithmetic.num_test is {config.num_test}; there are not that many different "
            f"expressions of {num_operations} operations over operands to {config.max_operand} "
            "(lower num_test, or raise max_operand or min_operations)"
        )
    return {
        "expression": expression,
        "answer": str(tree.value),
        "num_operations": num_operations,
        "text": f"{expression}={tree.value}",
        "short_cot": short_cot(tree),
        "long_cot": long_cot(tree, rng, config),
    }


def prepare_arithmetic(config: ArithmeticConfig, directory: str | os.PathLike) -> pathlib.Path:
    """Writes both splits as ArrayRecord (a tensorflow-datasets directory) and returns it.

    The directory appears complete, by a rename; one that is there already is used again.

    Raises:
      ValueError: the directory holds another configuration's data.
    """
    directory = pathlib.Path(directory)
    wanted = dataclasses.asdict(config)
    if directory.exists():
        # What a directory does not name had no other value when it was made.
        fields = {f.name: f.default for f in dataclasses.fields(ArithmeticConfig)}
        found = fields | json.loads((directory / "arithmetic.json").read_text())
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"{directory} was prepared with arithmetic.{name} {found.get(name)!r}, not "
                    f"{wanted.get(name)!r}; use another directory or remove it"
                )
        return directory
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # it draws over the recipe's own lines
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    builder = _builder_class()(config, data_dir=unfinished, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # it says "Downloading ... Unknown size"
        builder.download_and_prepare()
    (unfinished / "arithmetic.json").write_text(json.dumps(wanted, indent=2) + "\n")
    os.replace(unfinished, directory)
    return directory


@functools.cache
def _builder_class() -> type:
    """The `ArithmeticBuilder`; made on demand because GPU images often lack tensorflow-datasets."""
    import tensorflow_datasets as tfds

    class ArithmeticBuilder(tfds.core.GeneratorBasedBuilder):
        """Random arithmetic expressions with chains of reasoning."""

        name = "arithmetic"
        VERSION = tfds.core.Version(_VERSION)
        # tfds 4.9.10 finds it through importlib_resources, which it does not install; nothing here
        # needs the path (it leads to the checksums of downloads).
        code_path = None

        def __init__(self, config: ArithmeticConfig, **kwargs):
            self._arithmetic = config
            super().__init__(**kwargs)

        def _info(self):
            texts = ("expression", "answer", "text", "short_cot", "long_cot")
            features = {name: tfds.features.Text() for name in texts}
            features["num_operations"] = np.int32
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,  # the order is the generator's
            )

        def _split_generators(self, dl_manager):
            splits = records(self._arithmetic)
            return {name: self._generate_examples(split) for name, split in splits.items()}

        def _generate_examples(self, split):
            yield from enumerate(split)

    return ArithmeticBuilder


class ArithmeticSource:
    """Random access to the records of one split, as dicts of str and int."""

    def __init__(self, records: Any):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, str | int]:
        record = self._records[index]
        return {k: v.decode() if isinstance(v, bytes) else int(v) for k, v in record.items()}


def open_arithmetic(directory: str | os.PathLike, split: str) -> ArithmeticSource:
    """A split ("train" or "test") of a directory that `prepare_arithmetic` wrote."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(pathlib.Path(directory) / "arithmetic" / _VERSION))
    return ArithmeticSource(builder.as_data_source(split))


def reasoning(record: dict[str, Any], rendering: str) -> str | None:
    """The reasoning text of a record under a rendering; None where it has none.

    Raises:
      ValueError: an unknown rendering.
    """
    if rendering not in RENDERINGS:
        raise ValueError(f"rendering is {rendering!r}; it must be one of {', '.join(RENDERINGS)}")
    return record[rendering] if rendering.endswith("_cot") else None
